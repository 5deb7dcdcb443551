from pathlib import Path

import pytest
import training_cases


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tokens are cached per session, never in the user's folder."""
    monkeypatch.setenv("LCPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return training_cases.base(tmp_path_factory.mktemp("base"))
