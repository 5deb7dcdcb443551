"""The file of results: whom it binds, and what a full disk leaves of it."""

import pytest
from room import room_for

from lcpatch.core.errors import LcpatchError
from lcpatch.eval.store import Store


def test_what_was_begun_and_measured_nothing_binds_nobody(tmp_path):
    Store(tmp_path, {"steps": 1})
    Store(tmp_path, {"steps": 2}).add("full/0", {"nll": 3.0})
    assert Store(tmp_path, {"steps": 2}).rows == {"full/0": {"key": "full/0", "nll": 3.0}}
    with pytest.raises(ValueError, match="holds a run with steps=2, this one has 1"):
        Store(tmp_path, {"steps": 1})


@pytest.mark.parametrize("fits", [0, 10])
def test_a_full_disk_is_told_and_costs_the_last_row_alone(tmp_path, fits: int):
    """Where some of a row still fits, the system says how much, and no error."""
    store = Store(tmp_path, {"steps": 1})
    store.add("full/0", {"nll": 3.0})
    with (
        room_for(store.path.stat().st_size + fits),
        pytest.raises(LcpatchError, match=r"a result could not be written \(.* MiB are free in .*\); those before"),
    ):
        store.add("full/1", {"nll": 3.1})
    if fits:
        with pytest.warns(UserWarning, match="line 3 was cut off and is measured again; 2 are kept"):
            store = Store(tmp_path, {"steps": 1})
    store.add("full/1", {"nll": 3.1})
    assert list(Store(tmp_path, {"steps": 1}).rows) == ["full/0", "full/1"]
