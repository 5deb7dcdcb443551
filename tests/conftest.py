import gc
import os

import pytest
import torch
from hypothesis import settings

# Triton decides when a kernel is decorated whether it interprets it, so this comes before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time: a test that fails, fails for everyone. HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Several processes share a GPU: what a test has freed is the others'."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
