"""What layers of pages ask of an index stands in protocols, and the indexes there are keep to them."""

from __future__ import annotations

import inspect
import re

import pytest

from lcpatch.caches import fixed_pages, paged
from lcpatch.caches.index import FixedIndex, Index, OpenIndex
from lcpatch.caches.scorer_index import ScorerIndex
from lcpatch.caches.tree_index import TreeIndex

PROTOCOLS = (Index, FixedIndex, OpenIndex)


def listed(*protocols: type) -> dict[str, object]:
    """What protocols list, by name: methods, and None for what is read."""
    found = {name: None for protocol in protocols for name in inspect.get_annotations(protocol)}
    for protocol in protocols:
        found |= {name: member for name, member in vars(protocol).items() if inspect.isfunction(member)}
    return {name: member for name, member in found.items() if not name.startswith("_")}


@pytest.mark.parametrize(("kind", "protocols"), [(ScorerIndex, PROTOCOLS), (TreeIndex, PROTOCOLS[:2])])
def test_an_index_has_what_its_layer_asks_for(kind, protocols):
    for name, member in listed(*protocols).items():
        own = getattr(kind, name)
        if member is None:
            assert isinstance(own, property), name
        else:
            assert inspect.signature(own) == inspect.signature(member), name


@pytest.mark.parametrize(("module", "protocols"), [(paged, PROTOCOLS[:1]), (fixed_pages, PROTOCOLS)])
def test_a_layer_asks_for_what_is_listed(module, protocols):
    asked = set(re.findall(r"self\.index\.(\w+)", inspect.getsource(module)))
    assert asked
    assert asked <= listed(*protocols).keys()
