"""The smallest exact period, against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest
from event_lists import EventList, training
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.memory.analysis.periods import _smallest, event_keys, find_period, z_function


def brute(keys: list[int]) -> int | None:
    """Return the smallest period of a stretch that is more than half, and two periods, long."""
    count = len(keys)
    for period in range(1, count // 2 + 1):
        run = 0
        for place in range(count - period):
            run = run + 1 if keys[place] == keys[place + period] else 0
            if run >= period and 2 * (run + period) > count:
                return period
    return None


@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_z_function_by_its_definition(keys):
    for place, length in enumerate(z_function(keys)):
        assert keys[place : place + length] == keys[:length]
        assert place + length == len(keys) or keys[place + length] != keys[length]


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_smallest_period_of_any_keys_is_that_of_brute_force(keys):
    found = _smallest(keys)
    assert (found and found[0]) == brute(keys)
    if found is not None:
        period, start, stop = found
        assert 2 * (stop - start) > len(keys) and stop - start >= 2 * period
        assert keys[start : stop - period] == keys[start + period : stop]
        assert start == 0 or keys[start - 1] != keys[start - 1 + period]
        assert stop == len(keys) or keys[stop] != keys[stop - period]


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(3, 5),
    st.lists(st.integers(4, 9), max_size=4), st.lists(st.integers(4, 9), max_size=4),
)  # fmt: skip
def test_warm_up_and_what_comes_behind_are_left_out(body, repeats, before, behind):
    keys = [*before, *body * repeats, *behind]
    if 2 * len(body) * repeats > len(keys):
        assert _smallest(keys)[0] == brute(keys) <= len(body)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("warm_up", [0, 7])
def test_training_steps_repeat(marks, warm_up):
    trace = training(5, marks=marks, warm_up=warm_up)
    period = find_period(trace)
    step = (len(trace) - 3 * warm_up) // 5
    assert period.events == step and period.repeats == 5 and period.same_sizes
    begin, stop = period.window
    # Between two steps fewest bytes are alive: the window is one step with or without marks.
    assert (begin, stop) == (3 * warm_up + 4 * step, len(trace))
    first = trace.time_ns[3 * warm_up]
    assert period.duration(trace) == (trace.time_ns[begin] - first) // 4


def test_one_step_has_no_period():
    assert find_period(training(1, 40, marks=True)) is None
    assert find_period(training(1, 40, marks=False)) is None


def test_layers_with_weights_of_their_own_are_no_iterations():
    events = EventList()
    (x,) = events.op("load", sizes=[8])
    for weight in [events.external(64) for _ in range(30)]:
        (y,) = events.op("mm", [x, weight], [8])
        events.free(x)
        x = y
    trace = events.trace()
    assert find_period(trace) is None
    assert event_keys(trace)[1] != event_keys(trace)[5]


def test_shuffled_events_have_no_period():
    keys = event_keys(training(5, 6))
    random.Random(0).shuffle(keys)
    assert _smallest(keys) is None


def test_a_growing_cache_repeats_but_for_its_size():
    events = EventList()
    weight = events.external(64)
    (cache,) = events.op("zeros", sizes=[16], category="kv")
    for step in range(8):
        (longer,) = events.op("cat", [cache, weight], [16 * (step + 2)], category="kv")
        events.free(cache)
        cache = longer
    trace = events.trace()
    assert find_period(trace) is None
    period = find_period(trace, sizes=False)
    assert period.events == 5 and not period.same_sizes


def test_an_empty_trace_has_no_period():
    assert find_period(EventList().trace()) is None


def test_a_long_trace_is_searched_in_linear_time():
    # A search that compares all distances would take hours.
    body = np.random.default_rng(0).integers(0, 50, 2500).tolist()
    assert _smallest(body * 80) == (2500, 0, 200_000)
