"""Plans of linears that are summed over ranks: the formula, beside a simulation tile by tile."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.lowering.kernels.triton import reduction_figures
from graphopt.plan.rank_schedule import Machine, Work, simulate, tiles_of_ranks
from graphopt.runtime.reduction_plan import (
    CausalAttention,
    Stage,
    chunkings,
    overlapped,
    plan_attention_linear,
    plan_linear,
    product_seconds,
    sent_bytes,
)
from graphopt.targets import get_target

LAUNCHED = reduction_figures(get_target("hopper"))
assert LAUNCHED is not None
FIGURES = LAUNCHED.recorded()
SHAPES = [
    (1024, 8192, 4096), (4096, 8192, 4096), (16384, 8192, 4096),
    (1024, 8192, 14336), (4096, 8192, 14336), (16384, 8192, 14336),
    (1024, 4096, 2048), (4096, 4096, 2048), (16384, 4096, 2048),
]  # fmt: skip
seconds = st.floats(1e-6, 1e-3)
stages = st.lists(st.builds(Stage, seconds, seconds), min_size=1, max_size=8)


@pytest.mark.slow
@given(stages)
def test_overlapped_stages_lie_between_their_bounds(parts):
    computed, sent = sum(p.compute for p in parts), sum(p.send for p in parts)
    found = overlapped(parts)
    tolerance = 1e-12
    assert found <= computed + sent + tolerance
    assert found >= max(computed + parts[-1].send, parts[0].compute + sent) - tolerance


@given(stages)
def test_the_formula_is_what_one_core_and_one_link_do(parts):
    """A core with one buffer hands a stage on when the one before is sent: the formula's maxima."""
    link = 1e9
    work = [[Work(p.compute, ((1, p.send * link),)) for p in parts], []]
    found = simulate(work, Machine(cores=1, link=link, signal=0.0))
    serial = sum(p.compute + p.send for p in parts)
    # The core may begin a stage before the link is through with the one before: not later.
    assert found.seconds <= overlapped(parts) + 1e-12 <= serial + 2e-12


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_the_formula_agrees_with_tiles_one_by_one(rows, columns, depth):
    tiles = FIGURES.tiles[0]
    count = -(-rows // tiles.rows) * -(-columns // tiles.columns)
    compute = 2.0 * tiles.rows * tiles.columns * depth * FIGURES.cores / tiles.flops
    compute += tiles.beside
    size = 2.0 * tiles.rows * tiles.columns
    machine = Machine(FIGURES.cores, FIGURES.push, FIGURES.signal, FIGURES.launch)
    found = simulate(tiles_of_ranks(count, 2, compute, size), machine)
    only = dataclasses.replace(FIGURES, tiles=(tiles,))
    plan = plan_linear(rows, columns, depth, 2, only)
    told = plan.seconds if plan.how == "persistent" else plan.others["persistent"]
    # Cores that wait for the link fall out of step, and then wait less than whole waves would.
    assert 0.75 * told <= found.seconds <= 1.1 * told
    serial = machine.start + -(-count // FIGURES.cores) * compute
    serial += sent_bytes(rows, columns, 2) / FIGURES.push + 2 * FIGURES.signal
    assert found.seconds <= serial
    for rank in range(2):
        hidden = found.overlap(rank)
        shorter = min(found.busy(rank, "compute"), found.busy(rank, "send"))
        # What one wave computes is sent when nothing is left to compute.
        assert (hidden > 0) == (count > FIGURES.cores)
        if rows >= 4096:
            assert hidden >= 0.6 * shorter


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40), st.integers(2, 4), st.integers(1, 6), st.floats(1e-6, 1e-4),
    st.floats(1e-7, 1e-4),
)  # fmt: skip
def test_no_schedule_is_longer_than_one_thing_after_the_other(tiles, ranks, cores, compute, send):
    link = 1e9
    work = tiles_of_ranks(tiles, ranks, compute, send * link)
    found = simulate(work, Machine(cores, link, signal=1e-6))
    waves = -(-tiles // cores)
    # A rank sends a tile once to the one that sums it, and each sum to all others.
    most = 2 * -(-tiles // ranks) * send + tiles * send
    assert found.seconds <= waves * compute * ranks + most * ranks + 4e-6 * tiles
    done = {(span.rank, span.number) for span in found.spans if span.what == "compute"}
    assert done == {(rank, tile) for rank in range(ranks) for tile in range(tiles)}
    assert found.seconds >= waves * compute


def test_ranks_that_wait_for_each_other_are_said_to():
    work = [[Work(1.0, (), ((1, 0),))], [Work(1.0, (), ((0, 0),))]]
    with pytest.raises(ValueError, match="without end"):
        simulate(work, Machine(1, 1e9, 0.0))


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_no_plan_is_slower_than_the_library_or_two_shots(rows, columns, depth):
    plan = plan_linear(rows, columns, depth, 2, FIGURES)
    product = product_seconds(rows, columns, depth, FIGURES)
    library = product + FIGURES.library_start + 2.0 * rows * columns / FIGURES.library
    two_shot = product + 2 * FIGURES.signal + sent_bytes(rows, columns, 2) / FIGURES.link
    assert plan.seconds <= min(library, two_shot) + 1e-12
    assert plan.seconds >= product - FIGURES.launch
    assert set(plan.others) | {plan.how} == {
        "persistent", "chunks", "two-shot", "one-shot", "library"
    }  # fmt: skip


def test_few_bytes_are_sent_in_one_trip_and_no_gain_leaves_it_to_the_library():
    assert plan_linear(1, 4096, 4096, 2, FIGURES).how == "one-shot"
    slow = dataclasses.replace(FIGURES, link=1e9, push=1e9, copy_engine=1e9)
    plan = plan_linear(4096, 8192, 4096, 2, slow)
    assert plan.how == "library"
    assert plan.others["one-shot"] == "for up to 1,048,576 bytes"
    assert plan_linear(64, 8192, 4096, 2, FIGURES).others["persistent"] == (
        "fewer rows than a tile has"
    )
    assert plan.line().startswith("library, ") and "two-shot" in plan.line()


def test_reasons_against_plans_are_told():
    plan = plan_linear(4096, 8192, 4096, 4, FIGURES)
    assert plan.others["chunks"] == "of 2 ranks, and there are 4"
    biased = plan_linear(4096, 8192, 4096, 2, FIGURES, bias=True)
    assert "no place for a bias" in str(biased.others["chunks"])
    assert "no one-shot: for up to" in biased.line()


def test_chunks_take_as_long_as_a_host_launches_them():
    """Unless a CUDA graph does: of few tokens another plan is the faster one, of many the same."""
    assert LAUNCHED.chunk_launch and LAUNCHED.attention_chunk_launch
    launched = plan_linear(4096, 8192, 4096, 2, LAUNCHED)
    recorded = plan_linear(4096, 8192, 4096, 2, FIGURES)
    assert recorded.how == "chunks" and launched.how == "persistent"
    assert launched.others["chunks"] >= 2 * LAUNCHED.chunk_launch
    many = (16384, 8192, 14336, 2)
    assert plan_linear(*many, LAUNCHED) == plan_linear(*many, FIGURES)
    attention = CausalAttention(8192, heads=16)
    hows = [
        plan_attention_linear(attention, 4096, 2048, 2, known).how
        for known in (LAUNCHED, FIGURES, dataclasses.replace(FIGURES, least_gain=0.0))
    ]
    # What is predicted to gain less than a prediction is good for is left.
    assert hows == ["persistent", "persistent", "attention-chunks"]


@given(st.integers(128, 20000))
def test_chunks_are_all_of_a_share(rows):
    for chunks in chunkings(rows, rows):
        assert sum(chunks) == rows and min(chunks) >= 128
        assert list(chunks) == sorted(chunks, reverse=True)
    assert chunkings(rows, rows + 1) == []


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_chunks_take_as_long_as_their_copies_and_what_they_wait_for(rows, columns, depth):
    only = dataclasses.replace(FIGURES, tiles=(), one_shot_bytes=1, link=1.0, library=1.0)
    plan = plan_linear(rows, columns, depth, 2, only)
    assert plan.chunks is not None
    sent = len(plan.chunks)
    # On one core; what a rank waits for before it computes is a step of no time that needs it.
    work = [
        [
            *(Work(s.compute, ((1 - rank, s.send),)) for s in plan.stages[:sent]),
            *(
                item
                for need, s in enumerate(plan.stages[sent:])
                for item in (
                    Work(0.0, (), ((1 - rank, need),)),
                    Work(s.compute, ((1 - rank, s.send),)),
                )
            ),
        ]
        for rank in range(2)
    ]  # fmt: skip
    found = simulate(work, Machine(1, 1.0, 0.0, queues=True))
    assert abs(found.seconds - plan.seconds) <= 1e-9


@pytest.mark.parametrize("rows", [4096, 16384])
def test_attention_in_chunks_hides_what_is_sent(rows):
    """Where a link takes longer than the product alone, and not where the product hides it."""
    slow = dataclasses.replace(FIGURES, tiles=(), copy_engine=1.5e11, link=1e11)
    attention = CausalAttention(rows, heads=32)
    plan = plan_attention_linear(attention, 8192, 4096, 2, slow)
    assert plan.how == "attention-chunks" and sum(plan.chunks) == rows // 2
    (told,) = plan.others.values()
    assert isinstance(told, float) and plan.seconds < told
    # One row more is an empty one besides.
    odd = plan_attention_linear(
        dataclasses.replace(attention, tokens=rows - 1), 8192, 4096, 2, slow
    )
    assert odd.chunks == plan.chunks
    whole = plan_attention_linear(attention, 8192, 4096, 4, slow)
    assert whole.others == {"chunks": "of 2 ranks, and there are 4"}
    hidden = plan_attention_linear(attention, 8192, 4096, 2, FIGURES)
    assert hidden.how == "chunks" and "chunks of attention" in hidden.others


@given(
    st.integers(1, 40), st.integers(1, 3), st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 50)), st.data(),
)  # fmt: skip
def test_rows_of_attention_take_what_the_keys_they_see_do(tokens, texts, past, most, data):
    start = data.draw(st.integers(0, texts * tokens - 1))
    stop = data.draw(st.integers(start + 1, texts * tokens))
    attention = CausalAttention(tokens, 4, texts, past, most)
    whole = texts * tokens
    found = attention._seen_until(stop) - attention._seen_until(start)
    # A query half a key behind its own on average, in a window or not.
    seen = [min(past + row % tokens + 0.5, most or math.inf) for row in range(start, stop)]
    assert abs(found - sum(seen)) <= 0.125 * (1 + (stop - start) / tokens) + 1e-9 or most is None
    assert most is not None or math.isclose(found, sum(seen))
    parts = attention.seconds(0, start, 64, FIGURES) if start else 0.0
    parts += attention.seconds(start, whole, 64, FIGURES)
    assert parts >= attention.seconds(0, whole, 64, FIGURES) * (1 - 1e-12)
    # No chunk is faster than its longest tile on one core.
    longest = max(past + row % tokens + 1 for row in range(start, stop))
    one_tile = 4 * 128 * min(longest, most or longest) * 16 * FIGURES.cores
    assert attention.seconds(start, stop, 64, FIGURES) >= one_tile / FIGURES.attention_flops
