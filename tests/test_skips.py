from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from graphopt.report.records import SkipEntry
from graphopt.report.skips import grouped_skips, places_in_short, ranges


def test_equal_skips_of_eighteen_layers_are_one_line():
    skips = [("carve-moe", SkipEntry(f"model.layers.{n}.mlp", "a norm")) for n in range(18)]
    skips.append(("carve-moe", SkipEntry("model.layers.3.mlp", "another reason")))
    skips.append(("fold", SkipEntry("model.layers.4.mlp", "a norm")))
    groups = grouped_skips(skips)
    assert [(g.source, g.where, g.count) for g in groups] == [
        ("carve-moe", "model.layers.{0–17}.mlp", 18),
        ("carve-moe", "model.layers.3.mlp", 1),
        ("fold", "model.layers.4.mlp", 1),
    ]


def test_names_that_differ_in_more_than_one_number():
    assert places_in_short(["a.0.b.1", "a.1.b.2"]) == "a.0.b.1, a.1.b.2"
    assert places_in_short([f"a.{n}.b.{n}" for n in range(9)]) == "a.0.b.0 … a.8.b.8"
    assert places_in_short(["x", "x"]) == "x"


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_name_every_number_once(numbers):
    read = [
        n
        for part in ranges(numbers).split(", ")
        for a, b in [re.fullmatch(r"(\d+)(?:–(\d+))?", part).groups()]
        for n in range(int(a), int(b or a) + 1)
    ]
    assert read == sorted(numbers)


@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("rs"), st.integers(0, 9))))
def test_no_skip_is_lost(given_skips):
    skips = [(source, SkipEntry(f"l.{n}", reason)) for source, reason, n in given_skips]
    assert sum(group.count for group in grouped_skips(skips)) == len(skips)
