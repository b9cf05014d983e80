from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from graphopt.errors import UsageError
from graphopt.pass_manager.contract import (
    Context,
    Pass,
    PassResult,
    declared_passes,
    get_pass,
    make_pass,
    register_pass,
)
from graphopt.pass_manager.options import Bare


@register_pass
@dataclass
class Everything(Pass):
    """A pass with an option of every kind."""

    count: int = 1
    ratio: float = 0.5
    deep: bool = False
    mode: str = "fast"
    layers: list[int] = field(default_factory=list)
    cap: float | None = None

    name: ClassVar[str] = "test-everything"

    def run(self, program, context: Context) -> PassResult:
        return PassResult(program)


def test_the_first_passes_are_known():
    known = declared_passes()
    names = (
        "canonicalise common-subexpression-elimination fold-constants dead-code-elimination "
        "insert-kv-cache"
    )
    assert set(names.split()) <= set(known)
    assert all("Legality:" in known[name].__doc__ for name in names.split())
    assert all(known[name].exact for name in names.split())


def test_options_are_coerced_from_text():
    made = make_pass(
        "test-everything",
        {"count": Bare("3"), "ratio": Bare("1e-3"), "deep": Bare("true"), "mode": Bare("slow"),
         "layers": [Bare("1"), Bare("2")], "cap": Bare("none")},
    )  # fmt: skip
    assert made == Everything(3, 1e-3, True, "slow", [1, 2], None)
    assert make_pass("test-everything", {"layers": 4, "cap": 2}) == Everything(layers=[4], cap=2.0)
    assert Everything(ratio=0.25).options() == {"ratio": 0.25}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": "many"}, "'many' is not an int"),
        ({"count": 1.5}, "1.5 is not an int"),
        ({"count": True}, "True is not an int"),
        ({"ratio": "half"}, "'half' is not a float"),
        ({"deep": "perhaps"}, "'perhaps' is not a bool"),
        ({"mode": [1]}, r"\[1\] is not a str"),
        ({"count": None}, "None is not an int"),
        ({"ratios": 1}, "Did you mean 'ratio'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_pass("test-everything", options)
    assert "test-everything" in str(caught.value)


def test_an_unknown_pass_has_the_nearest_name():
    with pytest.raises(UsageError, match=r"'dead-kode-removal'\. Did you mean 'dead-code-elim"):
        get_pass("dead-kode-removal")
    with pytest.raises(UsageError, match="takes no options"):
        make_pass("dead-code-elimination", {"hard": True})


def test_a_malformed_pass_is_refused_when_it_registers():
    class NotADataclass(Pass):
        name: ClassVar[str] = "test-plain"

        def run(self, program, context):
            return PassResult(program)

    with pytest.raises(ValueError, match="put @dataclass on"):
        register_pass(NotADataclass)

    @dataclass
    class OddOption(NotADataclass):
        table: dict = field(default_factory=dict)

    with pytest.raises(ValueError, match="has no text form"):
        register_pass(OddOption)

    @dataclass
    class Taken(NotADataclass):
        name: ClassVar[str] = "dead-code-elimination"

    with pytest.raises(ValueError, match="registered twice"):
        register_pass(Taken)
