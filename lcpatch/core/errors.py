"""Errors that lcpatch raises for its users: what was given, the rule, the choices, the next step."""


class LcpatchError(Exception):
    """Base of every error that is lcpatch's own."""


class UnknownNameError(LcpatchError, ValueError):
    """A name that no registered method has; the message lists those that exist."""


class BenchmarkError(LcpatchError, RuntimeError):
    """A benchmark that cannot run here, or whose results are wrong, so that no time is worth reporting."""


class HubError(LcpatchError, RuntimeError):
    """The Hub refused or failed; the message says what was tried, why it failed and what to do."""


class StoreError(LcpatchError, ValueError):
    """A cache that cannot be written to a file or read from one; the message says what does not fit."""


class UnsupportedModelError(LcpatchError, ValueError):
    """A model that cannot take this patch; the message names its type and what would work."""


class ParallelError(LcpatchError, RuntimeError):
    """A group of ranks that cannot go on together; the message names the rank at fault."""


class TrainingError(LcpatchError, RuntimeError):
    """A training run that has to stop; the message says at which step, why, and what is kept."""


class TierError(LcpatchError):
    """A cache's disk tier failed: a folder that cannot be written, a full disk, pages that do not come back."""
