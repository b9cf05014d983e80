"""Access-time intervals, and what blocks are by data flow."""

from __future__ import annotations

import numpy as np
import pytest
from event_lists import EventList, training
from hypothesis import given
from hypothesis import strategies as st

from graphopt.memory.analysis.intervals import access_intervals
from graphopt.memory.analysis.kinds import (
    KINDS,
    bytes_by_category,
    bytes_by_kind,
    data_flow_kinds,
    disagreements,
)
from graphopt.memory.analysis.periods import find_period
from graphopt.memory.trace import READ, WRITE


def reused() -> EventList:
    """Return two blocks, the second allocated where the first was released."""
    events = EventList()
    (a,) = events.op("make", sizes=[64], takes=10)
    events.op("use", [a], takes=5)
    events.free(a)
    events.wait(1000)
    (b,) = events.op("make", sizes=[64], takes=20)
    events.op("use", [b])
    return events


def test_no_interval_spans_a_reuse_of_memory():
    trace = reused().trace()
    gaps = access_intervals(trace).gap.tolist()
    assert gaps == [10, 20]
    # The naive way, by address, joins the two blocks, and sees a long interval that nobody waits.
    accesses = np.flatnonzero((trace.kind == READ) | (trace.kind == WRITE))
    assert max(np.diff(trace.time_ns[accesses])) == 1005


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 50)), max_size=40))
def test_intervals_are_those_of_a_list_per_block(accesses):
    events = EventList()
    blocks = [events.external(8) for _ in range(5)]
    seen = {block: [] for block in blocks}
    for block, writes, takes in accesses:
        seen[blocks[block]].append(events.time)
        events.op("w" if writes else "r", [] if writes else [block], (), [block] * writes, takes)
    found = access_intervals(events.trace())
    for block, times in seen.items():
        assert found.gap[found.instance == block].tolist() == np.diff(times).tolist()
    assert len(found) == sum(max(len(times) - 1, 0) for times in seen.values())


def test_what_lives_on_has_an_interval_into_the_next_period():
    trace = training(4, 2)
    period = find_period(trace)
    found = access_intervals(trace, period)
    wraps = np.flatnonzero(found.wraps)
    assert sorted(found.instance[wraps]) == [0, 1]  # the weights; nothing else lives on
    whole = access_intervals(trace)
    for place in wraps:
        # The same weight's interval between the two steps before is as long.
        own = whole.gap[whole.instance == found.instance[place]]
        assert found.gap[place] in own
        assert found.first[place] > found.second[place]
    inner = found.gap[~found.wraps & (found.instance == 0)].sum()
    assert inner + found.gap[wraps][found.instance[wraps] == 0].sum() == period.duration(trace)


@pytest.mark.parametrize("first", [1, 40, 1000])
def test_of_steps_of_unequal_times_no_block_lies_untouched_longer_than_its_own(first):
    """The last step takes 100 between its two accesses; what the first took does not matter."""
    events = EventList("host")
    weight = events.external(10)
    for middle in (first, first, 100):
        events.mark()
        events.op("use", [weight], takes=5)
        events.op("other", sizes=[1], takes=middle)
        events.op("use", [weight], takes=7)
    trace = events.trace()
    found = access_intervals(trace, find_period(trace))
    own = found.instance == weight
    # Behind the last access comes what lay between two steps before, 7.
    assert found.gap[own].tolist() == [105, 7] and found.wraps[own].tolist() == [False, True]


def test_shares_and_quantiles():
    found = access_intervals(training(3, 2))
    gaps = sorted(found.gap.tolist())
    assert found.share_below(10) == sum(g <= 10 for g in gaps) / len(gaps)
    assert found.quantiles((0.5, 1.0)) == [gaps[(len(gaps) + 1) // 2 - 1], gaps[-1]]
    empty = access_intervals(EventList().trace())
    assert empty.share_below(10) == 0.0 and empty.quantiles() == [0, 0, 0, 0]


def test_kinds_follow_the_published_rule():
    trace = training(2, 2)
    kinds = [KINDS[k] for k in data_flow_kinds(trace)]
    assert kinds[:2] == ["parameter", "parameter"]  # read, then written by the update
    # What is loaded is written first: by data flow alone it is an intermediate.
    assert {kinds[i.index] for i in trace.instances if i.category == "input"} == {"intermediate"}
    # The gradient of the data is read by nobody.
    assert [i.producer for i in trace.instances if kinds[i.index] == "end"] == ["mm_backward"] * 2
    frozen, never = EventList(), EventList()
    weight = frozen.external(8)
    frozen.op("use", [weight], [4])
    assert [KINDS[k] for k in data_flow_kinds(frozen.trace())] == ["input", "end"]
    never.external(8)
    never.op("none")
    assert [KINDS[k] for k in data_flow_kinds(never.trace())] == ["untouched"]
    assert disagreements(trace) == {("input", "intermediate"): 2}


def test_shares_at_the_peak_add_up_to_it():
    trace = training(2, 3)
    size, event = trace.peak()
    assert sum(bytes_by_category(trace, event).values()) == size
    assert sum(bytes_by_kind(trace, event).values()) == size
    assert bytes_by_category(trace, event)["weight"] == 1000 + 2000 + 3000
