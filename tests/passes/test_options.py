"""Options of passes: types, ranges, defaults by device, and the JSON schema of them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from graphopt.errors import UsageError
from graphopt.pass_manager.contract import Pass, PassResult, get_pass, make_pass, register_pass
from graphopt.pass_manager.options import OptionType, option_types
from graphopt.pass_manager.recipe import format_recipe, parse_recipe
from graphopt.pass_manager.recipe_schema import recipe_schema
from graphopt.support.per_device import PerDevice

Count = Annotated[int, Field(ge=2)]


@register_pass
@dataclass
class Ranged(Pass):
    """A pass with a range on every option."""

    name: ClassVar[str] = "test-ranged"

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    count: Annotated[Count, Field(le=8)] = 4
    mode: Literal["fast", "thorough"] = "fast"
    layers: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    windows: Count | PerDevice[int] = PerDevice(cpu=2, gpu=16)

    def check_options(self) -> None:
        if self.mode == "fast" and self.layers:
            raise UsageError("mode=fast looks at no layers.", "Leave layers out.")

    def run(self, program, context):
        return PassResult(program)


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"count": 1}, "test-ranged: count=1 is below 2.", "Give 2 or more and 8 or less,"),
        ({"count": "9"}, "test-ranged: count=9 is above 8.", "Give 2 or more and 8 or less,"),
        (
            {"share": 0},
            "test-ranged: share=0 is not above 0.",
            "Give a number above 0 and below 1,",
        ),
        (
            {"share": "1"},
            "test-ranged: share=1 is not below 1.",
            "Give a number above 0 and below 1,",
        ),
        ({"mode": "fest"}, "test-ranged knows no mode 'fest'.", "Did you mean 'fast'?"),
        ({"layers": [3, -1]}, "test-ranged: layers=-1 is below 0.", "Give 0 or more,"),
        ({"windows": 1}, "test-ranged: windows=1 is below 2.", "Give 2 or more,"),
        ({"windows": None}, "'windows' of pass 'test-ranged': None is not an int", "an int, 2 or"),
        ({"layers": [1]}, "mode=fast looks at no layers.", "Leave layers out."),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(options, message, remedy):
    for make in (lambda: make_pass("test-ranged", options), lambda: Ranged(**options)):
        with pytest.raises(UsageError) as caught:
            make()
        assert message in caught.value.message and remedy in caught.value.remedy


@given(
    st.builds(
        Ranged,
        share=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
        count=st.integers(2, 8),
        mode=st.just("thorough"),
        layers=st.lists(st.integers(0, 2**53), max_size=3),
        windows=st.integers(2, 2**53) | st.just(PerDevice(cpu=2, gpu=16)),
    )
)
def test_every_value_in_range_is_taken_and_written_down(made):
    assert parse_recipe(format_recipe([made])) == [made]


def test_a_default_depends_on_the_device_until_a_value_is_given():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    by_default, chosen = Ranged(), Ranged(windows=5)
    assert [by_default.values(device)["windows"] for device in (cpu, gpu)] == [2, 16]
    assert [chosen.values(device)["windows"] for device in (cpu, gpu)] == [5, 5]
    assert by_default.options() == {} and chosen.options() == {"windows": 5}


def test_what_an_option_may_be_is_said_in_words():
    types = option_types(Ranged)
    assert {name: (kind.name, kind.allowed) for name, kind in types.items()} == {
        "share": ("float | None", "above 0 and below 1"),
        "count": ("int", "2 or more and 8 or less"),
        "mode": ("str", "fast, thorough"),
        "layers": ("list[int]", "0 or more"),
        "windows": ("int", "2 or more"),
    }


@pytest.mark.parametrize("hint", [dict, int | str, list[dict], Literal[1, 2], bytes])
def test_a_type_without_a_text_form_is_refused(hint):
    with pytest.raises(ValueError, match="has no text form"):
        OptionType.of("odd", hint)


def test_the_schema_is_valid_and_tells_right_from_wrong():
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    recipe = jsonschema.Draft202012Validator(schema)
    right = [
        "canonicalise",
        {"dead-code-elimination": None},
        {"prune-blocks": {"ratio": 0.25, "score": "kl", "windows": 4}},
        {"test-ranged": {"share": None, "layers": [0, 3], "mode": "thorough"}},
    ]
    assert recipe.is_valid({"version": 1, "passes": right})
    for wrong in (
        "canonicalize",
        {"dead-code-elimination": {"hard": True}},
        {"prune-blocks": {"ratio": 1.0}},
        {"prune-blocks": {"score": "magic"}},
        {"test-ranged": {"windows": 1}},
        {"test-ranged": {"layers": [-1]}},
        {"canonicalise": {}, "dead-code-elimination": {}},
    ):
        assert not recipe.is_valid({"passes": [wrong]}), wrong
    assert not recipe.is_valid({"version": 2, "passes": []}) and not recipe.is_valid({})


def test_the_schema_has_every_option_with_its_range_and_default():
    options = recipe_schema()["$defs"]
    for name in ("carve-moe", "prune-blocks", "fuse-blocks", "tune-moe", "fold-constants"):
        assert set(options[name]["properties"]) == set(option_types(get_pass(name)))
    assert options["fold-constants"]["properties"]["max_bytes"] == {
        "default": 1 << 20, "minimum": 1, "title": "Max Bytes", "type": "integer",
    }  # fmt: skip
    windows = options["test-ranged"]["properties"]["windows"]
    assert windows["description"] == "By default 2 on a CPU, 16 on a GPU."
    assert windows["minimum"] == 2 and "default" not in windows
