"""Other names of an operator take its place, overload by overload."""

import pytest

from graphopt.capture.aliases import _ALIASES, _EQUIVALENTS, plain_name
from graphopt.ir.ops.aten import resolve_target


def _arguments(name):
    return [(a.name, str(a.type)) for a in resolve_target(name)._schema.arguments]


@pytest.mark.parametrize("alias", sorted(_ALIASES))
def test_an_alias_has_the_arguments_of_its_operator(alias):
    import torch

    overloads = getattr(torch.ops.aten, alias).overloads()
    # Captured names have no overload that writes into a tensor it is given, or names axes.
    taken = [o for o in overloads if "out" not in o and "ame" not in o]
    assert taken
    for overload in taken:
        name = f"aten.{alias}.{overload}"
        assert _arguments(plain_name(name)) == _arguments(name)


def test_equivalents_take_the_same_operands():
    for name, equivalent in _EQUIVALENTS.items():
        if "empty" not in name:
            assert len(_arguments(name)) == len(_arguments(equivalent))
            assert plain_name(name) == equivalent
