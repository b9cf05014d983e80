"""Offsets: against brute force, against the bound, and against what is no plan."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import SourceError, VerifyError
from graphopt.memory.planning import Outcome, Plan, Problem, check_offsets, plan_offsets
from graphopt.memory.planning import compiled as compiled_module
from graphopt.memory.planning import greedy as greedy_module
from graphopt.memory.planning import spans as spans_module
from graphopt.memory.planning.compiled import Found, search
from graphopt.memory.planning.greedy import fill_valleys, fit_in_order, greedy_plans
from graphopt.memory.planning.problem import read_problem, write_offsets
from graphopt.memory.planning.sections import live_at_peak, sections_of
from graphopt.memory.planning.spans import spans_of

ALLOCATION = Path(__file__).parents[3] / "shared" / "data" / "allocation"


def problem(*rows: tuple[int, int, int], alignment: int = 1) -> Problem:
    lower, upper, size = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    return Problem([str(k) for k in range(len(rows))], lower, upper, size, alignment)


def cut_apart(seed: int, count: int, time: int = 40, height: int = 64) -> Problem:
    """Cut a rectangle of time and height into blocks: they fill an arena without a gap."""
    random = np.random.default_rng(seed)
    blocks = [(0, time, 0, height)]
    while len(blocks) < count:
        area = np.array([(b - a) * (d - c) for a, b, c, d in blocks], float)
        a, b, c, d = blocks.pop(random.choice(len(blocks), p=area / area.sum()))
        if random.random() < (b - a) / time / ((b - a) / time + (d - c) / height) and b - a > 1:
            at = int(random.integers(a + 1, b))
            blocks += [(a, at, c, d), (at, b, c, d)]
        elif d - c > 1:
            at = int(random.integers(c + 1, d))
            blocks += [(a, b, c, at), (a, b, at, d)]
        else:
            blocks.append((a, b, c, d))
    order = random.permutation(len(blocks))
    return problem(*[(blocks[k][0], blocks[k][1], blocks[k][3] - blocks[k][2]) for k in order])


def least_height(of: Problem) -> int:
    """The lowest arena: blocks in every order, each on top of those before that it meets."""
    best = int(of.padded.sum())
    for order in itertools.permutations(range(len(of))):
        offsets: dict[int, int] = {}
        for block in order:
            offsets[block] = max(
                (
                    offsets[other] + int(of.padded[other])
                    for other in offsets
                    if of.lower[other] < of.upper[block] and of.lower[block] < of.upper[other]
                ),
                default=0,
            )
        best = min(best, max(offsets[block] + int(of.padded[block]) for block in order))
    return best


ROWS = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(ROWS, st.sampled_from([1, 4]))
def test_a_plan_is_the_lowest_there_is_and_one_byte_less_is_proved_to_be_none(rows, alignment):
    of = problem(*[(at, at + length, size) for at, length, size in rows], alignment=alignment)
    least = least_height(of)
    plan = plan_offsets(of, threads=1, seconds=20)
    assert check_offsets(of, plan.offsets) <= plan.height == least
    assert plan.outcome is Outcome.REACHED
    below = plan_offsets(of, least - 1, threads=1, seconds=20)
    assert below.outcome is Outcome.INFEASIBLE
    assert least - 1 < below.bound <= least


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_the_search_decides_every_capacity(rows):
    of = problem(*[(at, at + length, size) for at, length, size in rows])
    least = least_height(of)
    for capacity in range(live_at_peak(of) - 1, least + 2):
        done = search(of, capacity, 20, threads=1)
        if capacity < least:
            assert done.found is Found.INFEASIBLE and done.offsets is None
        else:
            assert done.found is Found.OFFSETS and done.offsets is not None
            check_offsets(of, done.offsets, capacity)


@given(ROWS)
def test_sections_are_the_maximal_sets_of_blocks_that_live_together(rows):
    of = problem(*[(at, at + length, size) for at, length, size in rows])
    sections = sections_of(of)
    in_time = [
        frozenset(np.flatnonzero((of.lower <= t) & (t < of.upper)).tolist()) for t in range(13)
    ]
    maximal = {s for s in in_time if s and not any(s < other for other in in_time)}
    found = [
        frozenset(np.flatnonzero((sections.first <= k) & (k < sections.end)).tolist())
        for k in range(sections.total)
    ]
    assert set(found) == maximal


@pytest.mark.parametrize("seed", range(4))
def test_what_was_cut_apart_is_put_together_without_a_gap(seed):
    """Every section is full, so that no greedy order gets there except by luck."""
    of = cut_apart(seed, 60)
    plan = plan_offsets(of, seconds=60)
    assert plan.height == plan.live == 64


def test_greedy_plans_are_plans():
    of = cut_apart(9, 50)
    heights = {how: check_offsets(of, offsets) for how, offsets in greedy_plans(of)}
    assert len(heights) == 10 and min(heights.values()) >= 64


def fitted(of: Problem, order: list[int], best: bool) -> list[int]:
    """Offsets of blocks in order: of every gap between those that a block meets, one is taken."""
    places: dict[int, tuple[int, int]] = {}
    for block in order:
        size = int(of.padded[block])
        met = sorted(
            place
            for other, place in places.items()
            if of.lower[other] < of.upper[block] and of.lower[block] < of.upper[other]
        )
        ends = [0, *itertools.accumulate((end for _, end in met), max)]
        gaps = [(met[k][0] - ends[k], ends[k]) for k in range(len(met))]
        gaps = [gap for gap in gaps if gap[0] >= size]
        low = ends[-1] if not gaps else min(gaps)[1] if best else gaps[0][1]
        places[block] = (low, low + size)
    return [places[block][0] for block in range(len(of))]


def filled(of: Problem, priority: np.ndarray) -> list[int]:
    """Offsets of blocks of which each in turn goes on the lowest of all floors."""
    first, end, total = sections_of(of)
    size, waiting, offsets = of.padded.tolist(), set(range(len(of))), [0] * len(of)
    floor: list[float] = [0] * total
    while waiting:
        height = min(floor)
        lo = floor.index(height)
        hi = next((at for at in range(lo, total) if floor[at] > height), total)
        within = [k for k in waiting if first[k] >= lo and end[k] <= hi]
        if not within:
            beside = [floor[at] for at in (lo - 1, hi) if 0 <= at < total]
            floor[lo:hi] = [min(beside)] * (hi - lo)
            continue
        block = min(within, key=lambda k: (-priority[k], -size[k], k))
        waiting.discard(block)
        offsets[block] = int(height)
        for at in range(first[block], end[block]):
            waited_for = any(first[k] <= at < end[k] for k in waiting)
            floor[at] = height + size[block] if waited_for else float("inf")
    return offsets


def check_greedy(of: Problem, seed: int) -> None:
    """Compare the offsets of a priority, and of an order, with those of brute force."""
    sections, spans = sections_of(of), spans_of(of)
    for priority in (sections.end - sections.first, of.padded * (of.upper - of.lower)):
        assert fill_valleys(of.padded, sections, priority).tolist() == filled(of, priority)
    order = np.random.default_rng(seed).permutation(len(of))
    for best in (True, False):
        found = fit_in_order(of, order, spans, best=best)
        assert found.tolist() == fitted(of, order.tolist(), best)
    for span, count in enumerate(spans.counts):
        assert count == ((spans.first <= span) & (span <= spans.last)).sum()
    # All that lives together with a block is in a span of it.
    meets = (of.lower < of.upper[:, None]) & (of.lower[:, None] < of.upper)
    together = (spans.first <= spans.last[:, None]) & (spans.first[:, None] <= spans.last)
    assert (together | ~meets).all()


MANY = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=30
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(MANY, st.sampled_from([1, 4]), st.integers(1, 3), st.integers(0, 9))
def test_greedy_offsets_are_those_of_brute_force(rows, alignment, fewest, seed):
    of = problem(*[(at, at + length, size) for at, length, size in rows], alignment=alignment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "_FEWEST", fewest)
        patch.setattr(greedy_module, "_AHEAD", fewest)
        check_greedy(of, seed)


@pytest.mark.parametrize(("seed", "life"), [(0, 3), (1, 20), (2, 200)])
def test_greedy_offsets_of_many_blocks_are_those_of_brute_force(seed, life):
    random = np.random.default_rng(seed)
    lower = random.integers(0, 300, 200)
    upper = lower + 1 + random.exponential(life, 200).astype(np.int64)
    of = problem(*zip(lower, upper, random.integers(1, 1000, 200), strict=True), alignment=64)
    assert life == 200 or len(spans_of(of).counts) > 2
    check_greedy(of, seed)


def test_a_block_is_in_two_spans_on_average_at_most():
    for life in (1, 30, 1000, 10**6):
        random = np.random.default_rng(life)
        lower = random.integers(0, 3000, 2000)
        upper = lower + 1 + random.integers(0, life, 2000)
        spans = spans_of(problem(*zip(lower, upper, lower + 1, strict=True)))
        assert spans.counts.sum() <= 2 * 2000


def test_blocks_without_size_or_life_lie_at_0_and_are_in_nobodys_way():
    of = problem((0, 9, 4), (0, 9, 0), (3, 3, 7), (2, 5, 4))
    plan = plan_offsets(of)
    assert plan.height == plan.bound == 8
    assert plan.offsets[1] == plan.offsets[2] == 0
    nothing = plan_offsets(problem((3, 3, 7)))
    assert nothing.height == nothing.bound == 0 and nothing.outcome is Outcome.REACHED


def test_offsets_are_multiples_of_the_alignment():
    plan = plan_offsets(problem((0, 3, 100), (1, 4, 700), (2, 5, 1), alignment=512))
    assert sorted(plan.offsets % 512) == [0, 0, 0] and plan.height == plan.bound == 2048


def test_a_search_without_time_says_that_it_did_not_decide():
    of = cut_apart(3, 300, 200, 1024)
    plan = plan_offsets(of, 1024, seconds=1e-4)
    assert plan.outcome is Outcome.UNDECIDED and plan.height > 1024 == plan.bound


def test_without_a_compiler_plans_are_greedy_and_say_so(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled_module._library.cache_clear()
    try:
        plan = plan_offsets(cut_apart(3, 100), 64, seconds=5)
    finally:
        compiled_module._library.cache_clear()
    assert plan.outcome is Outcome.UNDECIDED
    assert "there is no C compiler (no-such-compiler)" in plan.notes[0]


def test_a_compiler_that_fails_is_told_with_what_it_said(monkeypatch):
    monkeypatch.setenv("CC", "false")
    compiled_module._library.cache_clear()
    try:
        plan = plan_offsets(cut_apart(3, 100), 64, seconds=5)
    finally:
        compiled_module._library.cache_clear()
    assert "false does not compile it" in plan.notes[0]


@pytest.mark.parametrize("name", ["A", "B", "C", "E", "F", "H", "J"])
def test_the_challenging_problems_fit_a_mebibyte(name):
    path = ALLOCATION / f"{name}.1048576.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    of = read_problem(path)
    plan = plan_offsets(of, 2**20, seconds=60)
    assert plan.outcome is Outcome.REACHED
    assert check_offsets(of, plan.offsets, 2**20) == plan.height


def _checked(rows: list[tuple[int, int, int, int]], **more: int) -> int:
    of = problem(*[row[:3] for row in rows])
    return check_offsets(of, np.array([row[3] for row in rows], np.int64), **more)


def test_the_check_finds_overlaps_and_what_is_out_of_bounds():
    assert _checked([(0, 4, 3, 0), (4, 6, 5, 1), (2, 5, 2, 6)], capacity=8) == 8
    with pytest.raises(VerifyError, match="both alive at 2"):
        _checked([(0, 4, 3, 0), (2, 6, 5, 2)])
    with pytest.raises(VerifyError, match="both alive at 0"):
        _checked([(0, 4, 9, 0), (0, 6, 1, 4)])
    with pytest.raises(VerifyError, match="above 2"):
        _checked([(0, 4, 3, 0)], capacity=2)
    with pytest.raises(VerifyError, match="multiple of 1"):
        _checked([(0, 4, 3, -1)])


@settings(deadline=None)
@given(ROWS, st.lists(st.integers(0, 8), min_size=6, max_size=6))
def test_the_check_agrees_with_every_pair(rows, places):
    rows = [(a, a + n, size, at) for (a, n, size), at in zip(rows, places, strict=False)]
    meet = any(
        a[0] < b[1] and b[0] < a[1] and a[3] < b[3] + b[2] and b[3] < a[3] + a[2]
        for a, b in itertools.combinations(rows, 2)
    )
    if meet:
        with pytest.raises(VerifyError):
            _checked(rows)
    else:
        assert _checked(rows) == max(row[3] + row[2] for row in rows)


def _file(folder: Path, text: str | bytes) -> Path:
    path = folder / "blocks.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_is_read_in_any_order_of_columns_and_written_with_offsets(tmp_path):
    text = '\ufeffsize,ID, upper ,lower,offset\r\n4,"a, b",9,-3,77\r\n\r\n5,c,+2,1,\r\n'
    of = read_problem(_file(tmp_path, text))
    assert of.ids == ["a, b", "c"]
    assert (of.lower.tolist(), of.upper.tolist(), of.size.tolist()) == ([-3, 1], [9, 2], [4, 5])
    written = write_offsets(of, np.array([5, 0]))
    assert written == 'id,lower,upper,size,offset\n"a, b",-3,9,4,5\nc,1,2,5,0\n'
    assert read_problem(_file(tmp_path, written)).ids == of.ids


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no column id"),
        ("id,lower,upper,size\n", "no row below its header"),
        ("id,lower,upper\na,1,2\n", "no column size"),
        ("id,lower,upper,size,alignment\na,1,2,3,4\n", "'alignment' is unknown"),
        ("id,lower,upper,size,size\na,1,2,3,4\n", "'size' occurs twice"),
        ("id,lower,upper,size\na,1,2,3\nb,1,2\n", "line 3 has 3 fields"),
        ("id,lower,upper,size\na,1,2,3\n\na,1,2,3\n", "line 4: the id 'a' stands in line 2"),
        ("id,lower,upper,size\na,5,2,3\n", "line 2: lower is 5, and upper 2"),
        ("id,lower,upper,size\na,1,2,-3\n", "line 2: the size is -3"),
        ("id,lower,upper,size\na,1,2,3.5\n", "line 2: size is '3.5'"),
        ("id,lower,upper,size\na,one,2,3\n", "line 2: lower is 'one'"),
        ("id,lower,upper,size\na,1,2,9999999999999999999\n", "line 2: size is"),
        (f"id,lower,upper,size\na,1,2,{2**62}\nb,1,2,1\n", "line 3: up to here the sizes add up"),
        ('id,lower,upper,size\n"a,1,2,3\n', "no row of a CSV file"),
        (b"id,lower,upper,size\n\xff,1,2,3\n", "not UTF-8"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_line(text, said, tmp_path):
    with pytest.raises(SourceError, match=said):
        read_problem(_file(tmp_path, text))


def test_a_problem_that_is_none_is_refused():
    with pytest.raises(SourceError, match="lives from 3 to 2"):
        plan_offsets(problem((3, 2, 1)))
    with pytest.raises(SourceError, match="add up to more"):
        plan_offsets(problem((0, 2, 2**61), (0, 1, 2**61), (0, 1, 2**61)))


def _plan(**options: object) -> Plan:
    return plan_offsets(cut_apart(1, 40), **options)  # type: ignore[arg-type]


def test_a_capacity_above_the_bound_is_enough():
    plan = _plan(capacity=10**6)
    assert plan.outcome is Outcome.REACHED and plan.bound == 64
