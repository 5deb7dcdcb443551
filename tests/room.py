"""A disk that is full: a limit on a file's size makes real writers fail as one does, each in its own words."""

import resource
from contextlib import contextmanager


@contextmanager
def room_for(size: int):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
