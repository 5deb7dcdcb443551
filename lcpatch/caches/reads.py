"""How many pages a token of a row reads, and which of them always."""

from __future__ import annotations

from .budget import Budget, check_integer, is_integer


class Reads:
    """How many pages a token of a row reads, and which of them always.

    Raises:
        ValueError: options out of range, or a budget that the pages always read fill.
    """

    def __init__(self, budget: int | float, page: int, num_sinks: int, recent: int) -> None:
        if type(page) is not int or page < 1 or page & (page - 1):
            raise ValueError(f"page={page!r} must be a power of two")
        check_integer("recent", recent, 1)
        check_integer("num_sinks", num_sinks, 0)
        self.page, self.recent = page, recent
        self.sink_pages = -(-num_sinks // page)
        # Recent tokens may begin within a page, and there is one page to choose at least.
        self.least = self.sink_pages + -(-recent // page) + 2
        if is_integer(budget) and 0 < budget < self.least * page:  # said at once, whatever else is too little
            raise ValueError(
                f"budget={budget} must hold the pages of {num_sinks} sinks and {recent} recent tokens and one more: at "
                f"least {self.least * page} with page={page}, or smaller pages"
            )
        self.budget = Budget(budget, num_sinks, recent)

    def holding(self, pages: int) -> Reads:
        """The same of a row that reads so many pages."""
        return Reads(pages * self.page, self.page, self.budget.num_sinks, self.recent)

    def of(self, real: int) -> int:
        """The pages that a row of `real` tokens reads."""
        return max(self.budget.of(real) // self.page, self.least)
