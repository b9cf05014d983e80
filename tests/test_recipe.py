from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.pass_manager.recipe import (
    format_recipe,
    parse_recipe,
    read_recipe,
    recipe_from_yaml,
    recipe_to_yaml,
)


@register_pass
@dataclass
class Options(Pass):
    """A pass with an option of every kind."""

    count: int = 1
    ratio: float = 0.5
    deep: bool = False
    mode: str = "fast"
    tags: list[str] = field(default_factory=list)
    cap: float | None = None
    label: str | None = None

    name: ClassVar[str] = "test-options"

    def run(self, program, context: Context) -> PassResult:
        return PassResult(program)


TEXT = st.text(max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PASSES = st.one_of(
    st.sampled_from(["canonicalise", "dead-code-elimination", "insert-kv-cache"]).map(
        lambda name: parse_recipe(name)[0]
    ),
    st.builds(
        Options,
        count=st.integers(-(2**53), 2**53),
        ratio=FLOATS,
        deep=st.booleans(),
        mode=TEXT,
        tags=st.lists(TEXT, max_size=3),
        cap=st.none() | FLOATS,
        label=st.none() | TEXT,
    ),
)


@pytest.mark.slow
@example([Options(mode="0E0", tags=["1e5", "yes", "~"])])  # numbers in YAML 1.2 or in 1.1 alone
@given(st.lists(PASSES, max_size=4))
def test_text_yaml_and_python_are_one_thing(passes):
    assert parse_recipe(format_recipe(passes)) == passes
    assert recipe_from_yaml(recipe_to_yaml(passes)) == passes


def test_the_forms_as_people_write_them():
    passes = parse_recipe(
        'insert-kv-cache, test-options{ count=3, ratio=1e-2,deep=yes,tags=[a,"b c"]}'
    )
    assert passes[1] == Options(3, 0.01, True, tags=["a", "b c"])
    assert format_recipe(passes) == (
        'insert-kv-cache,test-options{count=3,ratio=0.01,deep=true,tags=[a,"b c"]}'
    )
    assert recipe_to_yaml(passes) == (
        "version: 1\npasses:\n- insert-kv-cache\n- test-options:\n    count: 3\n    ratio: 0.01\n"
        "    deep: true\n    tags:\n    - a\n    - b c\n"
    )
    assert parse_recipe("") == parse_recipe("  ") == []
    assert format_recipe([Options(label="none")]) == 'test-options{label="none"}'
    assert parse_recipe("test-options{label=none}") == [Options()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("insert-kv-cache,", "character 17: expected the name of a pass, found the end"),
        ("insert-kv-cache;carve-moe", "character 16: expected ',' or '{', found ';carve-moe'"),
        ("test-options{count}", "character 19: expected '=' after the option 'count', found '}'"),
        ("test-options{count=1", "character 21: expected ',' or '}', found the end"),
        ("test-options{count=}", "character 20: expected a value, found '}'"),
        ('test-options{mode="a', "character 21: expected a closing '\"', found the end"),
        ("test-options{tags=[a", "character 21: expected ',' or ']', found the end"),
        ("test-options{count=1,count=2}", "'count' is repeated"),
        ("fold-constant", "Unknown pass 'fold-constant'. Did you mean 'fold-constants'?"),
        ("test-options{rato=1}", "Did you mean 'ratio'?"),
    ],
)
def test_errors_say_where_and_what_to_do(text, message):
    with pytest.raises(UsageError) as caught:
        parse_recipe(text)
    assert message in str(caught.value)
    assert caught.value.remedy and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [", "line 1, column 10, is not YAML"),
        ("steps: []", "has no 'passes'"),
        ("- dead-code-elimination", "has no 'passes'"),
        ("passes: []\nextra: 1", "unknown key 'extra'"),
        ("version: 2\npasses: []", "has version 2, this graphopt reads 1"),
        ("passes: dead-code-elimination", "'passes' is not a list"),
        ("passes: [dead-code-elimination, 3]", "item 2 of 'passes' is 3"),
        ("passes: [{dead-code-elimination: [1]}]", "item 1 of 'passes'"),
        ("passes: [{test-options: {count: x}}]", "'x' is not an int"),
    ],
)
def test_yaml_errors(text, message):
    with pytest.raises(UsageError) as caught:
        recipe_from_yaml(text)
    assert message in str(caught.value)


def test_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml([Options(count=2)]))
    assert read_recipe(path) == [Options(count=2)]
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "absent.yaml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_recipe(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_of_options_are_finite(value):
    with pytest.raises(UsageError, match="is not finite"):
        parse_recipe(f"prune-blocks{{ratio={value}}}")


@pytest.mark.parametrize("value", ["9" * 30, "-" + "9" * 30, "9" * 5000])
def test_whole_numbers_of_options_are_within_reach(value):
    with pytest.raises(UsageError, match=r"out of reach|is not an int") as caught:
        parse_recipe(f"prune-blocks{{blocks={value}}}")
    assert len(caught.value.message) < 200
