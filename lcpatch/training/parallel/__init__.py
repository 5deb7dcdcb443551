"""Past one GPU: ranks that each hold a part of every row and exchange what the layers' patterns need, no more."""

from .cost import Choice, Rates, choose
from .model import Parallel, parallelize
from .strategy import Work

__all__ = ["Choice", "Parallel", "Rates", "Work", "choose", "parallelize"]
