"""Past one GPU: ranks that each hold a part of every row and exchange what the layers' patterns need, no more."""

from .model import Parallel, parallelize

__all__ = ["Parallel", "parallelize"]
