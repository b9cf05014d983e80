"""Blocks that could be moved away or computed again, and choices among them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from event_lists import EventList, training
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.memory.analysis.intervals import access_intervals
from graphopt.memory.analysis.link import Link, default_link, fit_link, parse_link
from graphopt.memory.analysis.periods import find_period
from graphopt.memory.analysis.recompute import call_times, recompute_candidates
from graphopt.memory.analysis.swap import Candidate, queue, swap_candidates
from graphopt.memory.analysis.target import reach_target

PUBLISHED = Link(6.4e9, 6.3e9)
"""Pinned copies of the published study (Li et al., ISPASS 2021)."""

FITTED = Link(1e9 / 0.1563, 1e9 / 0.1574, 8242, 12352)
"""The same by its authors' own fit, with what a copy costs whatever its size."""


def test_what_an_interval_hides_as_published():
    assert PUBLISHED.largest_hidden(25_000) == pytest.approx(79.37e3, rel=1e-4)
    assert PUBLISHED.largest_hidden(800e6) == pytest.approx(2.54e9, rel=1e-3)
    assert FITTED.largest_hidden(25_000) == pytest.approx(14e3, rel=5e-3)
    assert FITTED.largest_hidden(20_000) == 0.0
    for link in (PUBLISHED, FITTED, default_link()):
        size = link.largest_hidden(1e9)
        assert link.round_trip(size) == pytest.approx(1e9)


def test_a_line_is_fitted_through_copies():
    sizes = [2**n for n in range(12, 28)]
    link = fit_link(
        [(s, FITTED.out_time(s)) for s in sizes], [(s, PUBLISHED.in_time(s)) for s in sizes], "test"
    )
    assert (link.out_bytes, link.out_ns) == pytest.approx((FITTED.out_bytes, 8242))
    assert (link.in_bytes, link.in_ns) == (pytest.approx(6.3e9), pytest.approx(0, abs=1e-3))


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("25GB", (25e9, 25e9, 0, 0)),
        ("6.4GB/s,6.3gb", (6.4e9, 6.3e9, 0, 0)),
        ("1e9,2M,8,12.5", (1e9, 2e6, 8e3, 12.5e3)),
    ],
)
def test_links_are_read(text, link):
    found = parse_link(text)
    assert (found.out_bytes, found.in_bytes, found.out_ns, found.in_ns) == link


@pytest.mark.parametrize("text", ["", "0", "fast", "1GB,2GB,3", "1,2,x,4", "1,2,-1,4", "-3GB", "."])
def test_what_is_no_link_is_refused(text):
    with pytest.raises(UsageError, match="swap-bandwidth"):
        parse_link(text)


def candidates(trace, link, period=None):
    window = period.window if period else (0, len(trace))
    live = trace.live_bytes()[slice(*window)]
    return swap_candidates(
        trace, access_intervals(trace, period), link, peak=window[0] + int(live.argmax()),
        window=window,
    )  # fmt: skip


def test_candidates_fall_away_with_the_bandwidth():
    trace = training(3, 4, size=1000)
    period = find_period(trace)
    found = [
        {(c.instance, c.first) for c in candidates(trace, Link(speed, speed), period)}
        for speed in (1.0, 1e10, 3e10, 1e11, 1e13)
    ]
    assert found[0] == set() and found[-1]
    assert all(low <= high for low, high in itertools.pairwise(found))
    assert len(set(map(len, found))) > 2


def test_a_clock_that_counts_operations_times_no_copy():
    trace = training(3, 4).with_clock(training(3, 4).time_ns, "operation index")
    assert candidates(trace, Link(1e15, 1e15)) == []
    reached = reach_target(trace, 0, Link(1e15, 1e15))
    assert all(choice.how == "recompute" for choice in reached.choices)
    assert "counts operations" in reached.left


def job(instance, ready, due, size):
    return Candidate(instance, instance, instance + 1, ready, due, size, 0.0, True)


def test_copies_wait_for_each_other():
    link = Link(1e9, 1e9)  # one byte a nanosecond
    one, other = job(0, 0, 250, 100), job(1, 0, 250, 100)
    assert [(a.start, a.stop) for a in queue([one], link)] == [(100, 150)]
    # Each fits alone; together the second copy out ends behind the start of its copy back.
    assert queue([one, other], link) is None
    late = job(1, 0, 400, 100)
    assert [(a.start, a.stop) for a in queue([one, late], link)] == [(100, 150), (200, 300)]


def test_a_period_carries_its_copies_into_the_next():
    link = Link(1e9, 1e9)
    # Ready at 90 of 100, due at 40 of the next period: the copies lie around the seam.
    wrapping = job(0, 90, 140, 20)
    assert [(a.start, a.stop) for a in queue([wrapping], link, 100)] == [(110, 120)]
    # A block that is ready at 0 waits for the copy that began in the period before.
    early = job(1, 0, 60, 20)
    waits = queue([wrapping, early], link, 100)
    assert [(a.start, a.stop) for a in waits] == [(110, 120), (30, 40)]
    assert queue([wrapping, job(1, 0, 99, 90)], link, 100) is None  # more than a period holds


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(1, 300), st.integers(1, 40)), max_size=6
    ),
    st.booleans(),
)  # fmt: skip
def test_no_two_copies_of_one_direction_overlap(jobs, periodic):
    link = Link(1e9, 0.5e9, 1, 2)
    wanted = [job(n, ready, ready + gap, size) for n, (ready, gap, size) in enumerate(jobs)]
    aways = queue(wanted, link, 100.0 if periodic else None)
    if aways is None:
        return
    for times, begin in (
        ([(a.start - link.out_time(c.size), a.start) for a, c in zip(aways, wanted, strict=True)],
         [c.ready for c in wanted]),
        ([(a.stop, a.stop + link.in_time(c.size)) for a, c in zip(aways, wanted, strict=True)],
         None),
    ):  # fmt: skip
        shifts = (-200, -100, 0, 100, 200) if periodic else (0,)
        copies = sorted((low + s, high + s) for low, high in times for s in shifts)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(copies))
        if begin is not None:
            assert all(low >= ready - 1e-6 for (low, _), ready in zip(times, begin, strict=True))
    for away, one in zip(aways, wanted, strict=True):
        assert away.start <= away.stop
        assert away.stop + link.in_time(one.size) <= one.due + 1e-6


def chain() -> tuple[EventList, dict[str, int]]:
    """Return a forward pass whose first result is read again at the end."""
    events = EventList()
    named = {"w": events.external(50), "x": events.external(10, "input")}
    (named["a"],) = events.op("mm", [named["x"], named["w"]], [1000], takes=7)
    (named["b"],) = events.op("relu", [named["a"]], [1000], takes=3)
    (named["big"],) = events.op("mm", [named["b"], named["w"]], [5000], takes=20)
    events.op("sum", [named["big"]], [8])
    events.free(named["big"])
    return events, named


def test_a_block_is_computed_again_by_what_made_it():
    events, named = chain()
    events.op("mul", [named["a"], named["b"]], [8])
    trace = events.trace()
    assert call_times(trace).tolist() == [7, 3, 20, 10, 0]
    found = {
        r.instance: r for r in recompute_candidates(trace, access_intervals(trace)) if r.second > 12
    }
    a, b = found[named["a"]], found[named["b"]]
    assert (a.cost, a.chain, a.extra) == (7, (named["a"],), 0)
    assert a.needs == {named["x"], named["w"]}
    assert (b.cost, b.chain, b.needs) == (3, (named["b"],), {named["a"]})


def test_what_is_gone_is_computed_again_first():
    events, named = chain()
    events.free(named["a"])
    events.op("mul", [named["b"]], [8])
    trace = events.trace()
    found = [r for r in recompute_candidates(trace, access_intervals(trace)) if r.second > 12]
    assert [(r.instance, r.cost, r.chain, r.extra) for r in found] == [
        (named["b"], 10, (named["a"], named["b"]), 1000)
    ]


@pytest.mark.parametrize("why", ["random", "written again", "its input written", "input gone"])
def test_what_cannot_be_computed_again(why):
    events = EventList()
    x, w = events.external(10, "input"), events.external(50)
    op = "aten.native_dropout.default" if why == "random" else "aten.native_layer_norm.default"
    (a,) = events.op(op, [x, w], [1000])
    events.op("use", [a])
    if why == "written again":
        events.op("add_", [a], writes=[a])
    if why == "its input written":
        events.op("sgd", [w], writes=[w])
    if why == "input gone":
        events.free(x)
    events.op("other", [w])
    events.op("use", [a])
    trace = events.trace()
    long = list(recompute_candidates(trace, access_intervals(trace)))
    assert not long


def test_nothing_is_computed_again_between_accesses_of_neighbours():
    """Two reads by one operator, and a read right behind another, leave no time in between."""
    events = EventList()
    x = events.external(10, "input")
    (a,) = events.op("relu", [x], [1000])
    events.op("other", [x])
    events.op("mul", [a, a])
    events.op("use", [a])
    events.op("other", [x])
    events.op("use", [a])
    trace = events.trace()
    found = recompute_candidates(trace, access_intervals(trace))
    calls = sorted((int(trace.call[r.first]), int(trace.call[r.second])) for r in found)
    assert calls == [(0, 2), (3, 5)]


def test_choices_reach_a_target_and_say_what_each_leaves():
    trace = training(4, 6, size=1000)
    period = find_period(trace)
    begin, stop = period.window
    before = int(trace.live_bytes()[begin:stop].max())
    swapped = reach_target(trace, before - 2500, Link(1e12, 1e12), period, recomputes=False)
    assert swapped.before == before and swapped.after <= before - 2500 and not swapped.left
    assert {c.how for c in swapped.choices} == {"swap"}
    peaks = [before, *(c.peak for c in swapped.choices)]
    assert all(low <= high for high, low in itertools.pairwise(peaks))
    again = reach_target(trace, before - 1500, Link(1.0, 1.0), period)
    assert {c.how for c in again.choices} == {"recompute"} and again.after <= before - 1500
    assert all(c.cost > 0 for c in again.choices)
    none = reach_target(trace, 1, Link(1.0, 1.0), period, recomputes=False)
    assert none.after == before and not none.choices and "no other block of 2 bytes" in none.left
    assert not reach_target(trace, before, Link(1.0, 1.0), period).choices


def test_a_block_that_waits_on_the_host_lowers_the_peak_by_its_size():
    events = EventList()
    (kept,) = events.op("make", sizes=[4000], takes=100)
    events.op("use", [kept], takes=10_000)
    (big,) = events.op("make", sizes=[6000], takes=10_000)
    events.free(big)
    events.wait(10_000)
    events.op("use", [kept])
    trace = events.trace()
    found = reach_target(trace, 6000, Link(1e9, 1e9))  # 4 us of 30 each way
    assert (found.before, found.after) == (10_000, 6000)
    assert [(c.how, c.instance, c.cost) for c in found.choices] == [("swap", kept, 0)]
    # A slower link brings it back in time, but lets it go too late.
    slow = reach_target(trace, 6000, Link(0.39e9, 1e10), recomputes=False)
    assert slow.after == 10_000 and not slow.choices


def test_of_a_trace_without_events_there_is_nothing_to_choose():
    reached = reach_target(EventList().trace(), 0, PUBLISHED)
    assert (reached.before, reached.after, reached.choices) == (0, 0, [])
    assert np.array_equal(call_times(EventList().trace()), [])


def test_what_does_not_get_away_in_time_is_computed_again():
    trace = training(4, 8, size=1000)
    period = find_period(trace)
    before = reach_target(trace, 10**9, Link(1.0, 1.0), period).before
    # A link that has time for one block or two in a step.
    slow = Link(3e10, 3e10)
    swapped = reach_target(trace, 1, slow, period, recomputes=False)
    both = reach_target(trace, swapped.after - 1000, slow, period)
    assert before > swapped.after > both.after and not both.left
    assert {c.how for c in both.choices} == {"swap", "recompute"}
    keys = [(c.instance, c.first) for c in both.choices]
    assert len(set(keys)) == len(keys)
