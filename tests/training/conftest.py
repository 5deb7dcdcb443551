from pathlib import Path

import pytest
import torch.distributed as dist
import training_cases


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tokens are cached per session, never in the user's folder."""
    monkeypatch.setenv("LCPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return training_cases.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
