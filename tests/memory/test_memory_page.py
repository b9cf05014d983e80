"""What is said of a trace: as plain data, as a page, and for the Perfetto viewer."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from event_lists import EventList, training

from graphopt.memory import perfetto
from graphopt.memory.analysis.fragmentation import fragmentation
from graphopt.memory.analysis.link import Link
from graphopt.memory.analysis.summary import Summary, summarise
from graphopt.memory.page import drawing
from graphopt.memory.page.drawing import drawn
from graphopt.memory.page.page import render
from graphopt.memory.perfetto import trace_events, write_perfetto
from graphopt.report.pictures import page_style
from graphopt.support.quantities import format_bytes

FAST = Link(1e12, 1e12, 1.0, 2.0)


@pytest.fixture(scope="module")
def summary() -> Summary:
    trace = training(4, 5)
    target = trace.peak().bytes - 3000
    return summarise(trace, "a <toy>", FAST, target=target, facts={"phase": "train"})


def test_the_summary_is_plain_data(summary):
    data = json.loads(json.dumps(summary.to_json()))
    trace = summary.trace
    assert data["peak_bytes"] == trace.peak().bytes == sum(data["by_category"].values())
    assert data["rounded_peak_bytes"] == trace.peak(alignment=512).bytes > data["peak_bytes"]
    assert data["clock"] == "cost model" and data["phase"] == "train"
    assert data["period"]["events"] * 4 == data["events"]
    assert data["target"]["after"] <= data["target"]["target"] and data["swap_candidates"]
    assert data["intervals"]["share_below_25_us"] == 1.0


def test_a_clock_that_counts_says_so(summary):
    trace = summary.trace.with_clock(summary.trace.time_ns, "operation index")
    counted = summarise(trace, "a toy", FAST)
    assert counted.to_json()["intervals"]["share_below_25_us"] is None
    assert counted.time(12) == "12 ops" and "ops each" in counted.period_sentence()
    assert "no copy can be timed" in render(counted)


def test_nothing_happened():
    nothing = summarise(EventList().trace(), "nothing", FAST, target=5)
    assert nothing.to_json()["peak_bytes"] == 0
    assert "No block is accessed twice" in render(nothing)
    assert trace_events(nothing)["traceEvents"][0]["ph"] == "M"


def test_the_page_tells_what_the_summary_holds(summary):
    page = render(summary)
    assert "<h1>a &lt;toy&gt;</h1>" in page and "clock: cost model" in page
    assert format_bytes(summary.peak) in page and f"{summary.period.events} events" in page
    assert "Phase</" in page and "phase</" not in page
    assert "To get down to" in page and "Could wait on the host" in page
    assert "src=" not in page and "http" not in page.replace("http-equiv", "")
    part = dataclasses.replace(
        summary.trace, complete=False, notes=["Iteration 2 of 4 failed: <x>."]
    )
    page = render(dataclasses.replace(summary, trace=part))
    assert "Iteration 2 of 4 failed: &lt;x&gt;." in page and "what follows is a part" in page


def test_a_loop_that_grows_shows_the_period_of_its_operations():
    events = EventList()
    weight = events.external(64)
    (cache,) = events.op("zeros", sizes=[16], category="kv")
    for step in range(8):
        (longer,) = events.op("cat", [cache, weight], [16 * (step + 2)], category="kv")
        events.free(cache)
        cache = longer
    grown = summarise(events.trace(), "a cache", FAST)
    assert grown.period is None and grown.grows.events == 5
    assert "no exact period" in grown.period_sentence()
    assert "period of operations, whose sizes change" in render(grown)
    assert grown.to_json()["growing_period"]["events"] == 5


def numbers(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), f"<{dtype}")


def test_blocks_are_drawn_where_they_were_planned(summary):
    trace = summary.trace
    offsets = np.arange(len(trace.instances)) * 7
    data = drawn(summary, offsets).data
    index = numbers(data["index"], "u4")
    assert sorted(index) == list(range(len(trace.instances)))
    assert numbers(data["offset"], "f8").tolist() == (index * 7).tolist()
    assert numbers(data["size"], "f8").tolist() == trace.sizes[index].tolist()
    for place, one in enumerate(index):
        instance = trace.instances[one]
        begin = 0 if instance.external else trace.time_ns[instance.born]
        assert numbers(data["begin"], "f8")[place] == begin
    assert (np.diff(numbers(data["category"], "u1").astype(int)) >= 0).all()


def test_what_is_too_long_to_draw_is_sampled_and_said(summary, monkeypatch):
    monkeypatch.setattr(drawing, "MOST_BLOCKS", 10)
    monkeypatch.setattr(drawing, "MOST_POINTS", 8)
    monkeypatch.setattr(drawing, "CURVE", 5)
    found = drawn(summary)
    count = len(summary.trace.instances)
    assert f"Of {count:,} blocks, the 10 with most bytes" in found.left_out[0]
    assert f"Of {len(summary.intervals)} intervals, 8 are drawn" in found.left_out[1]
    assert len(numbers(found.data["index"], "u4")) == 10
    assert len(numbers(found.data["pointGap"], "f8")) == 8
    # The peak is in the curve, however few places it has.
    curves = [numbers(curve, "f8") for curve in found.data["curves"].values()]
    assert len(curves[0]) <= 5 and max(sum(curves)) == summary.peak
    assert all(text in render(summary) for text in found.left_out)


EVENT = {
    "type": "object",
    "required": ["ph", "name", "pid", "tid"],
    "properties": {
        "ph": {"enum": ["X", "C", "i", "M"]}, "name": {"type": "string"},
        "pid": {"type": "integer"}, "tid": {"type": "integer"},
        "ts": {"type": "number", "minimum": 0}, "dur": {"type": "number", "minimum": 0},
        "cat": {"type": "string"}, "args": {"type": "object"}, "s": {"enum": ["g", "p", "t"]},
    },
    "allOf": [
        {"if": {"properties": {"ph": {"const": "X"}}}, "then": {"required": ["ts", "dur"]}},
        {"if": {"properties": {"ph": {"const": "i"}}}, "then": {"required": ["ts", "s"]}},
        {"if": {"properties": {"ph": {"const": "M"}}},
         "then": {"required": ["args"],
                  "properties": {"name": {"enum": ["process_name", "thread_name"]}}}},
        {"if": {"properties": {"ph": {"const": "C"}}},
         "then": {"required": ["ts", "args"],
                  "properties": {"args": {"additionalProperties": {"type": "number"}}}}},
    ],
}  # fmt: skip
"""What the Trace Event Format asks of the events that are written."""


def test_the_perfetto_trace_has_the_form_and_the_peak(summary, tmp_path):
    path = tmp_path / "trace.json"
    write_perfetto(summary, path)
    data = json.loads(path.read_text())
    jsonschema.validate(data["traceEvents"], {"type": "array", "items": EVENT})
    assert all(isinstance(value, str) for value in data["otherData"].values())
    counters = [e["args"] for e in data["traceEvents"] if e["ph"] == "C"]
    total = [args["bytes"] for args in counters if "bytes" in args]
    assert max(total) == summary.peak
    assert max(sum(args.values()) for args in counters if "bytes" not in args) == summary.peak
    slices = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert sorted(e["args"]["block"] for e in slices) == list(range(len(slices)))
    lanes = defaultdict(list)
    for event in slices:
        lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for lives in lanes.values():
        lives.sort()
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(lives))
    accesses = (summary.trace.kind >= 2).sum()
    assert sum(e["ph"] == "i" for e in data["traceEvents"]) == accesses


def test_accesses_that_are_too_many_are_left_out_and_said(summary, monkeypatch):
    monkeypatch.setattr(perfetto, "MOST_ACCESSES", 10)
    data = trace_events(summary)
    assert not any(e["ph"] == "i" for e in data["traceEvents"])
    assert "reads and writes are left out" in data["otherData"]["notes"]


def test_fragmentation_by_hand():
    def block(size: int, state: str, requested: int) -> dict:
        return {"size": size, "state": state, "requested_size": requested}

    segments = [
        {"device": 0, "total_size": 4096, "blocks": [
            block(1024, "active_allocated", 1000), block(1024, "inactive", 0),
            block(512, "active_pending_free", 512), block(1536, "inactive", 0)]},
        {"device": 0, "total_size": 512, "blocks": [block(512, "inactive", 0)]},
        {"device": 1, "total_size": 512, "blocks": [block(512, "inactive", 0)]},
    ]  # fmt: skip
    found = fragmentation(segments, device=0)
    assert (found.reserved, found.active, found.free, found.segments) == (4608, 1536, 3072, 2)
    assert (found.rounding, found.largest_free) == (24, 1536)
    assert found.external == 0.5 and found.idle_share == pytest.approx(2 / 3)
    assert fragmentation([]).external == fragmentation([]).idle_share == 0.0
    with pytest.raises(ValueError, match="has blocks of 0 bytes"):
        fragmentation([{"total_size": 5, "blocks": []}])


def test_colours_of_categories_are_told_from_what_is_behind_them(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from test_accessible_page import contrast

    text = render(summarise(EventList().trace(), "x", FAST))
    own = re.findall(r":root \{ (--gradient.*?) \}", text)
    shared = re.findall(r":root \{(.*?)\}", page_style(), flags=re.DOTALL)
    for added, block in zip(own, shared, strict=True):
        theme = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block + added))
        for mark in ("gradient", "optimizer", "input", "kv", "workspace", "other", "attention"):
            for behind in ("card", "track"):
                assert contrast(theme[mark], theme[behind]) >= 3, (mark, behind)


# In a browser.


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(browser, summary, tmp_path, width, dark):
    path = tmp_path / "memory.html"
    path.write_text(render(summary), encoding="utf-8")
    look = browser.look_at(path, width, dark=dark, axe=browser.axe_core())
    assert look.wide == [] and look.violations == []


@pytest.mark.browser
@pytest.mark.slow
def test_the_script_draws_every_block(browser, summary, tmp_path):
    path = tmp_path / "memory.html"
    told = "document.title = document.getElementById('gantt').dataset.drawn;</script></body>"
    path.write_text(render(summary).replace("</script>\n</body>", f"\n{told}"), encoding="utf-8")
    shown = browser._run(["--window-size=1400,1000", "--dump-dom", path.as_uri()], str(tmp_path))
    assert f"<title>{len(summary.trace.instances)}</title>" in shown
