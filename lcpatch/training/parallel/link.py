"""A group of ranks as the strategies use it: uneven all-to-all, pairwise transfers, a count of what was sent.

Only `torch.distributed` moves data. Everything is asynchronous until asked for, so that what can be computed meanwhile
is; and a collective that fails says which rank is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...core.errors import ParallelError
from .alive import Pulse

Message = tuple[Tensor, int]
"""A tensor, and the rank of the group that it goes to or comes from."""


class Link:
    """This process's end of a group.

    Args:
        group: a process group; None: all ranks.
        pulse: says which ranks are gone when something fails; None: errors name no rank.

    Attributes:
        sent: bytes that this rank sent to others by the methods below.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, pulse: Pulse | None = None) -> None:
        if not dist.is_initialized():
            raise ParallelError(
                "torch.distributed is not initialised: start with torchrun or accelerate launch, and call "
                "torch.distributed.init_process_group first"
            )
        self.group = dist.group.WORLD if group is None else group
        self.pulse = pulse
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sent = 0
        self._among: dict[tuple[int, ...], Members] = {}

    def among(self, members: tuple[int, ...]) -> Link:
        """Some of the group's ranks as a group of their own, on the same communicator: by pairwise transfers."""
        if members not in self._among:
            self._among[members] = Members(self, members)
        return self._among[members]

    def exchange(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Callable[[], Tensor]:
        """Send the first `sends[0]` rows to rank 0, the next to rank 1, …; differentiable.

        Args:
            rows: [n, ...], n = sum(sends).
            sends, receives: rows for and from each rank.

        Returns:
            A function that waits and returns what arrived, [sum(receives), ...], by sender. All ranks must call both,
            in the same order, and their results must reach the loss: the way back is a collective, too.
        """
        flight = _Flight(self, list(sends), list(receives))
        arriving = _Start.apply(rows, flight)
        return lambda: _Finish.apply(arriving, flight)

    def all_to_all(self, rows: Tensor, sends: list[int], receives: list[int]) -> tuple[Tensor, Callable[[], None]]:
        """The exchange itself: `(buffer, wait)`."""
        arrived = rows.new_empty(sum(receives), *rows.shape[1:])
        width = rows[:1].numel() * rows.element_size() if len(rows) else 0
        self.sent += width * (sum(sends) - sends[self.rank])
        with self.named():
            work = dist.all_to_all_single(arrived, rows, receives, sends, group=self.group, async_op=True)
        return arrived, lambda: self._wait([work], rows)

    def transfer(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Start pairwise transfers; returns what waits for them. Empty tensors are not sent."""
        sends = [(x.contiguous(), peer) for x, peer in sends if x.numel()]
        receives = [(x, peer) for x, peer in receives if x.numel()]
        self.sent += sum(x.numel() * x.element_size() for x, _ in sends)
        ops = [self._op(dist.isend, *message) for message in sends]
        ops += [self._op(dist.irecv, *message) for message in receives]
        if not ops:
            return lambda: None
        with self.named():
            works = dist.batch_isend_irecv(ops)
        return lambda: self._wait(works, sends)

    def gather(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Each rank's whole numbers, by rank; waits for all. They travel from and to `device`."""
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.named():
            dist.all_gather(found, mine, group=self.group)
        return torch.stack(found).tolist()

    def add(self, x: Tensor) -> None:
        """Replace `x` by its sum over the ranks."""
        with self.named():
            dist.all_reduce(x, group=self.group)

    @contextmanager
    def named(self) -> Iterator[None]:
        """An error of the backend becomes one that names the rank that is gone."""
        try:
            yield
        except ParallelError:
            raise
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            who = self.pulse.who_is_gone() if self.pulse else "which rank is at fault is not known"
            reason = str(error).strip().splitlines()[0]
            raise ParallelError(f"rank {self.rank} cannot reach its group: {who} ({reason})") from error

    def _op(self, kind: Callable, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, x, dist.get_global_rank(self.group, peer), self.group)

    def _wait(self, works: list[Any], keep: Any) -> None:
        """`keep` is what is being sent: it must not be freed before."""
        with self.named():
            for work in works:
                work.wait()


class Members(Link):
    """Some ranks of a link's group, numbered anew; the others need not know. See `Link.among`."""

    def __init__(self, whole: Link, members: tuple[int, ...]) -> None:
        self._whole, self._members = whole, members
        self.rank, self.size = members.index(whole.rank), len(members)

    @property
    def sent(self) -> int:
        """Bytes that the whole link sent."""
        return self._whole.sent

    def all_to_all(self, rows: Tensor, sends: list[int], receives: list[int]) -> tuple[Tensor, Callable[[], None]]:
        arrived = rows.new_empty(sum(receives), *rows.shape[1:])
        out, into = rows.split(sends), arrived.split(receives)
        into[self.rank].copy_(out[self.rank])
        others = [peer for peer in range(self.size) if peer != self.rank]
        return arrived, self.transfer([(out[p], p) for p in others], [(into[p], p) for p in others])

    def transfer(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        sends, receives = ([(x, self._members[peer]) for x, peer in messages] for messages in (sends, receives))
        return self._whole.transfer(sends, receives)

    def gather(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        found = [mine if peer == self.rank else torch.empty_like(mine) for peer in range(self.size)]
        others = [peer for peer in range(self.size) if peer != self.rank]
        self.transfer([(mine, peer) for peer in others], [(found[peer], peer) for peer in others])()
        return torch.stack(found).tolist()


class _Flight:
    """One exchange, there and back."""

    def __init__(self, link: Link, sends: list[int], receives: list[int]) -> None:
        self.link, self.sends, self.receives = link, sends, receives
        self.buffer: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def there(self, rows: Tensor) -> Tensor:
        """What will arrive of `rows`."""
        arriving, self._wait = self.link.all_to_all(rows.contiguous(), self.sends, self.receives)
        return arriving

    def back(self, grad: Tensor) -> None:
        """Send the gradients home, into `buffer`."""
        self.buffer, self._wait = self.link.all_to_all(grad.contiguous(), self.receives, self.sends)

    def wait(self) -> None:
        """Wait for what is under way, and hold on to it no longer."""
        if self._wait is not None:
            self._wait()
            self._wait = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        # Detached: a transfer holds its buffer, which must not lead back to the node that holds the transfer. Through
        # C++ no garbage collector sees such a cycle, and with it all that came before stays, step after step.
        return flight.there(rows).detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.wait()
        grad, flight.buffer = flight.buffer, None
        return grad, None


class _Finish(torch.autograd.Function):
    """Backward runs this before `_Start`, and between them what was computed while the exchange was under way."""

    @staticmethod
    def forward(ctx: Any, arriving: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.back(grad)
        return grad, None


class _Tie(torch.autograd.Function):
    """`x`, with a gradient of zero for `other`, so that its backward runs even where nothing of it was used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = other.shape, other.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_zeros(ctx.shape, dtype=ctx.dtype)


def tie(x: Tensor, other: Tensor) -> Tensor:
    """`x`, through which a backward also reaches `other`."""
    return _Tie.apply(x, other)
