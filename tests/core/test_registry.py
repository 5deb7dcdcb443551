"""The registry finds what registered itself, and explains what it does not find."""

import pytest

import lcpatch
from lcpatch.core.registry import Registry
from lcpatch.patterns import patterns


def test_methods_are_those_in_the_folder():
    methods = lcpatch.methods()
    assert {"s2", "sf", "shift", "sink"} <= set(methods)
    assert list(methods) == sorted(methods)
    for name, cls in methods.items():
        assert cls.name == name
        assert cls.__module__ == f"lcpatch.patterns.{name}"  # file = registry key


@pytest.mark.parametrize("name", ["s2_attn", "s2attn", "S2-Attn", "longlora", "LongLoRA", "shift_attn"])
def test_ambiguous_names_say_which_is_which(name: str):
    with pytest.raises(lcpatch.UnknownNameError) as error:
        patterns.get(name)
    message = str(error.value)
    choices = f"Choices: {', '.join(lcpatch.methods())}."
    for word in (repr(name), "2407.17678", "2309.12307", "'shift'", "'s2'", choices):
        assert word in message


@pytest.mark.parametrize(("name", "guess"), [("sinks", "sink"), ("shfit", "shift"), ("S2", "s2"), ("flash", None)])
def test_unknown_names_list_the_choices(name: str, guess: str | None):
    with pytest.raises(lcpatch.UnknownNameError) as error:
        patterns.get(name)
    assert isinstance(error.value, ValueError)
    assert str(error.value).endswith(f"Choices: {', '.join(lcpatch.methods())}.")
    assert ("Did you mean" in str(error.value)) == (guess is not None)
    assert guess is None or f"Did you mean {guess!r}?" in str(error.value)


def test_a_name_is_taken_once():
    registry: Registry = Registry("thing", package="lcpatch.patterns")

    @registry.register("one")
    class One: ...

    with pytest.raises(ValueError, match="'one' is taken by"):

        @registry.register("one")
        class Two: ...

    for bad in ("One", "a-b", "", "1a"):
        with pytest.raises(ValueError, match="lower-case identifier"):
            registry.register(bad)
