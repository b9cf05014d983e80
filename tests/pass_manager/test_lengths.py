"""Short lengths stand for long ones, texts stand around changes, equal programs are proved."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import BASES, LARGE_SWITCH, LARGE_WINDOW, change, nodes, scaled

from graphopt.ir import Program
from graphopt.pass_manager.lengths import APART, FIRST, key_lengths, make_texts, short_lengths
from graphopt.pass_manager.lengths import with_short_lengths as shortened
from graphopt.pass_manager.numbering import same_outputs
from graphopt.pass_manager.pipeline import Pipeline


@given(st.sets(st.integers(1, 10**6), max_size=8))
def test_short_lengths_keep_the_order_and_what_lies_near(lengths: set[int]) -> None:
    short = short_lengths(lengths)
    ordered = sorted(lengths)
    assert [short[a] for a in ordered] == sorted({short[a] for a in ordered})
    for a, b in itertools.pairwise(ordered):
        assert short[b] - short[a] == min(b - a, APART)
    assert all(1 <= short[a] <= a for a in ordered)
    assert max(short.values(), default=0) <= FIRST + APART * len(lengths)


def test_windows_are_short_and_the_program_is_left_alone() -> None:
    program = BASES["large window"]()
    text = str(program)
    assert key_lengths(program) == {LARGE_WINDOW}
    assert key_lengths(shortened(program, {LARGE_WINDOW: 7})) == {7}
    assert str(program) == text


def test_a_text_stands_on_both_sides_of_a_switch_and_at_the_last_position() -> None:
    program = BASES["large switch"]()
    texts = make_texts(program, program, [7], seed=0)
    places = [batch["position_ids"] for batch in texts.batches]
    lasts = [int(p.max()) for p in places]
    assert LARGE_SWITCH - 1 in lasts and texts.positions - 1 in lasts
    assert texts.positions == 4 * LARGE_SWITCH and texts.rows == 97
    assert {LARGE_SWITCH - 1, LARGE_SWITCH, LARGE_SWITCH + 1} <= set(places[-2].flatten().tolist())
    assert int(texts.batches[0]["attention_mask"].sum()) < texts.batches[0]["input_ids"].numel()


def _turned_sum(program: Program) -> None:
    for node in nodes(program, "add") + nodes(program, "mul"):
        node.inputs.reverse()


@pytest.mark.parametrize("base", BASES)
def test_sums_in_another_order_are_the_same_and_another_weight_is_not(base: str) -> None:
    before = BASES[base]()
    after = before.copy()
    _turned_sum(after)
    assert same_outputs(before, after)
    _, report = Pipeline(["canonicalise"]).run(after)
    assert report.passes[0].verification in ("proved", "unchanged")
    change(after, "embed.weight", scaled(1.001, 50))
    assert not same_outputs(before, after)


def test_a_cache_is_the_same_for_whole_texts_alone() -> None:
    before = BASES["window"]()
    after, _ = Pipeline(["insert-kv-cache"]).run(before)
    assert same_outputs(before, after, without_past=True)
    assert not same_outputs(before, after)
