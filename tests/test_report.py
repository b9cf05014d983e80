from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from programs import tiny_program

from graphopt.ir.cost import program_costs
from graphopt.ir.types import B, P, S
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.report.breakdown import breakdown, kv_cache_bytes, part_of_nodes
from graphopt.report.page import render
from graphopt.report.records import (
    VERSION,
    ArtifactEntry,
    PassEntry,
    Report,
    SkipEntry,
    perplexity_steps,
)

ISSUE_FIELDS = {
    "source", "target", "recipe", "versions", "total_seconds", "peak_bytes", "artifact", "passes",
}  # fmt: skip
ISSUE_PASS_FIELDS = {
    "name", "options", "matched", "changed", "skipped", "exact", "parameters_before",
    "parameters_after", "max_abs_logit_delta", "kl", "perplexity_before", "perplexity_after",
    "seconds", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    _, made = Pipeline.default().run(tiny_program())
    made.target = "cpu"
    made.name = "tiny <model> & co"
    made.artifact = ArtifactEntry(
        "out", 12345678, ["onnx"], ["graphopt generate out --prompt 'Hi'"]
    )
    skip = SkipEntry("block: a", "its mask <b>is</b> computed")
    made.passes.append(
        PassEntry("prune-blocks", {"ratio": 0.25}, False, 4, 1, [skip], {}, 100, 75, "measured",
                  2.5, None, 0.125, 20.0, 25.0, 1.5, 0.5, 10**9)
    )  # fmt: skip
    return made


def test_the_json_has_what_is_documented(report, tmp_path):
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["version"] == VERSION == 1
    assert set(data) >= ISSUE_FIELDS
    assert all(set(entry) >= ISSUE_PASS_FIELDS for entry in data["passes"])
    assert data["passes"][-1]["skipped"] == [
        {"where": "block: a", "reason": "its mask <b>is</b> computed"}
    ]
    documented = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    fields = {*data, *data["passes"][0], *data["artifact"], *data["blocks"][0]}
    undocumented = sorted(name for name in fields if f"`{name}`" not in documented)
    assert not undocumented
    assert PassEntry.from_json(data["passes"][-1]) == report.passes[-1]


class _Page(HTMLParser):
    """Checks that tags nest and collects what they refer to."""

    VOID = ("meta", "br", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.references += [value for key, value in attrs if key in ("src", "href", "data")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_self_contained(report):
    html = render(report.to_json())
    page = _Page()
    page.feed(html)
    assert page.open == [] and page.references == []
    assert not re.search(r"https?://|url\(|@import|<script", html)
    text = " ".join(page.text)
    assert "tiny <model> & co" in text and "its mask <b>is</b> computed" in text
    assert "KL 0.12, perplexity 20.00 → 25.00" in text
    assert "graphopt generate out --prompt 'Hi'" in text
    assert "prefers-color-scheme: dark" in html and "viewport" in html
    assert html.count("<svg") == 2 * len(report.passes) + 2
    assert "None" not in text and "nan" not in text.split()


# Block 4 goes first, then block 2; scores of the second round are a little higher.
PRUNING = {
    "order": ["4", "2"],
    "removed": ["model.layers.4", "model.layers.2"],
    "candidates": [str(index) for index in range(6)],
    "scores": [
        {"0": 0.91, "1": 0.072, "2": 0.0061, "3": 0.011, "4": 0.0048, "5": 0.34},
        {"0": 0.93, "1": 0.081, "2": 0.0125, "3": 0.024, "5": 0.41},
    ],
    "perplexity": [22.27, 26.4, 41.8],
    "scoring_seconds": 14.2,
    "tokens_per_second": [1210.0, 1815.0],
}
TUNED = {
    "part": "all <blocks>",
    "steps": 300,
    "seconds": 120.5,
    "tokens": 2457600,
    "losses": [[step, 0.9 * math.exp(-step / 90) + 0.2] for step in range(20, 301, 20)],
    "checks": [[step, 0.8 * math.exp(-step / 70) + 0.25] for step in range(0, 301, 30)],
    "stopped": "",
}
FUSION = {
    "seconds": {"warm start": 20.1, "training": 120.5, "all": 150.0},
    "perplexity": [
        {"after": "plain removal", "value": 41.8},
        {"after": "warm start", "value": 33.0},
        {"after": "trained", "value": 25.6},
    ],
    "refits": [
        {"where": "3: attention", "before": 0.0, "after": 0.0, "ridge": None},
        {"where": "3: ffn", "before": 0.26, "after": 0.11, "ridge": 0.1},
    ],
    "training": [TUNED],
    "controls": [
        {"donor": "pruned", "loss": 0.253, "perplexity": 25.6},
        {"donor": "random", "loss": 0.255, "perplexity": 25.7},
    ],
    "own_windows": 256,
}


def depth_report(*details):
    """Return a report with a pass for each of the details."""
    made = Report(source="x", name="x", recipe="", machine={"system": "", "processor": "",
                  "cores": 1})  # fmt: skip
    made.passes = [
        PassEntry(f"pass-{number}", {}, False, details=item) for number, item in enumerate(details)
    ]
    return made


def rendered(*details):
    """Return the page, checked, and its text."""
    html = render(depth_report(*details).to_json())
    page = _Page()
    page.feed(html)
    assert page.open == []
    return html, " ".join(" ".join(page.text).split())


def test_what_carved_parts_leave_out_is_drawn():
    parts = [
        {
            "where": f"layers.{n}",
            "static": 0.1,
            "random": 0.2,
            "oracle": 0.05,
            "routed": 0.05 + n / 100,
        }
        for n in range(3)
    ]
    html, text = rendered({"parts": parts})
    lines = re.findall(r'<polyline class="(\w+)" points="([^"]*)"/>', html)
    assert [style for style, _ in lines] == ["norm", "head", "ffn", "embed"]
    routed = [float(p.split(",")[1]) for p in lines[2][1].split()]
    assert routed == sorted(routed, reverse=True)  # more is higher up
    assert "the router's experts, 6.0% on average" in text and "highest point is 20.0%" in text
    assert "Shared pieces" not in text
    own = [{**part, "shared": n} for n, part in enumerate(parts)]
    assert "Shared pieces of these parts: 0, 1, 2." in rendered({"parts": own})[1]
    assert "What tokens leave out" not in rendered({"parts": [{"where": "x"}] * 3})[1]


def test_work_and_loads_are_said_before_and_after():
    work = {"tokens": 128, "flops": [2e9, 1.5e9], "weight_products": [1e9, 8e8]}
    loads = [{"where": "x", "before": [0.75, 0.25, 0.5], "after": [0.5, 0.5, 0.5]}]
    text = rendered({"work": work, "parts": [{"added": 3}, {"added": 2}]}, {"loads": loads})[1]
    assert "A prompt of 128 tokens takes 2.0 G → 1.5 G FLOPs in all (-25.0%)." in text
    assert "1.0 G → 800.0 M products with weights (-20.0%)." in text
    assert "5 neurons of zeros were added." in text
    assert "Before training a token runs 1.50 experts of a part, and the most used one" in text
    assert "1.50 times as often" in text and "1.00 times as often" in text
    odd = {"work": {"flops": [1, "x"]}, "loads": [{"before": [0.0], "after": "x"}]}
    assert "times as often" not in rendered(odd)[1]


def test_depth_pruning_is_drawn():
    html, text = rendered(PRUNING, FUSION)
    assert "Removed, in this order: 4, 2." in text
    marks = re.findall(r'<span style="left:([\d.]+)%">(\d)</span>', html)
    # The middle of the third and of the fifth of six bars.
    assert marks == [("41.67", "2"), ("75.00", "1")]
    bars = re.findall(r'<rect class="(attention|ffn)" x="[\d.]+" y="[\d.]+" width="0.84" '
                      r'height="([\d.]+)"', html)  # fmt: skip
    assert [style for style, _ in bars] == [
        "attention", "attention", "ffn", "attention", "ffn", "attention",
    ]  # fmt: skip
    heights = [float(height) for _, height in bars]
    scores = list(PRUNING["scores"][0].values())
    assert heights[0] == 100 and heights[4] == 4
    assert sorted(range(6), key=heights.__getitem__) == sorted(range(6), key=scores.__getitem__)
    assert "<title>2\nround 1: 0.0061\nround 2: 0.0125\nremoved as number 2</title>" in html
    assert "<title>4\nround 1: 0.0048\nremoved as number 1</title>" in html
    for sentence in (
        "whole model 22.27 4 removed 26.40 2 removed 41.80",
        "plain removal 41.80 warm start 33.00 trained 25.60",
        "Scoring took 14.2 s.",
        "A forward pass takes in 1,210 → 1,815 tokens a second (+50.0%).",
        "all <blocks> 300 steps, 2,457,600 tokens, 120.5 s, held-out loss 1.05 → 0.261",
        "Of 150.0 s in all. warm start 20.1 s training 120.5 s",
        "random 0.255 25.7",
        "1 of 2 projections refitted in closed form; relative squared error of the stream behind "
        "the last 0.26 → 0.11. 256 windows of text were written by the dense model.",
    ):
        assert sentence in text
    lines = re.findall(r'<polyline class="\w+" points="([^"]*)"/>', html)
    assert [len(line.split()) for line in lines] == [15, 11]
    points = [tuple(map(float, p.split(","))) for line in lines for p in line.split()]
    assert all(0 <= x <= 100 and 0 <= y <= 40 for x, y in points)
    # The first check is the highest loss of all.
    assert points[15] == (0.0, 2.0) and min(y for _, y in points) == 2.0


@pytest.mark.parametrize("key", [*FUSION, *PRUNING])
@pytest.mark.parametrize(
    "value",
    [None, 3, True, "text", [], {}, [None], [[1, 2]], [{}], {"a": None}, [0.0, -1.0],
     [{"a": 0.0}, {"a": -2.0}], [{"part": None, "losses": 3, "checks": [[1], ["a", 2], [0, 0.0]]}],
     [{"after": 3, "value": "x"}]],
)  # fmt: skip
def test_details_of_another_form_break_nothing(key, value):
    rendered({**PRUNING, **FUSION, key: value}, {key: value})


def test_details_without_a_picture_have_no_card():
    html, text = rendered({"rules": {"swap": 3}}, {"training": [], "scores": []})
    assert "<h2>pass-" not in html and "swap" not in text


def test_figures_that_are_not_finite_are_null(tmp_path):
    made = depth_report(
        {"scores": [{"0": math.nan, "1": 2.0}], "perplexity": [20.0, math.inf], "order": ["1"]}
    )
    made.write(tmp_path)
    details = json.loads((tmp_path / "report.json").read_text())["passes"][0]["details"]
    assert details == {
        "scores": [{"0": None, "1": 2.0}], "perplexity": [20.0, None], "order": ["1"],
    }  # fmt: skip
    assert "round 1: –" in (tmp_path / "report.html").read_text()


def test_perplexity_along_the_way():
    assert perplexity_steps(PRUNING) == [
        ("whole model", 22.27), ("4 removed", 26.4), ("2 removed", 41.8),
    ]  # fmt: skip
    listed = {"perplexity": [22.0, 40.0], "order": ["1", "2", "3"]}
    assert perplexity_steps(listed) == [("whole model", 22.0), ("all removed", 40.0)]
    assert perplexity_steps(FUSION)[-1] == ("trained", 25.6)
    assert perplexity_steps({}) == []


def test_a_page_of_nothing():
    empty = Report(source="", name="x", recipe="", machine={"system": "", "processor": "",
                   "cores": 1})  # fmt: skip
    html = render(empty.to_json())
    assert "The recipe has no passes." in html and "Nothing was measured." in html


def test_parts_of_a_block_follow_the_dataflow():
    program = tiny_program()
    parts = part_of_nodes(program.functions["block"])
    found = {node.outputs[0].name: part for node, part in parts.items()}
    assert found == {
        "h": "norm", "q": "attention", "k": "attention", "v": "attention", "q_heads": "attention",
        "k_heads": "attention", "v_heads": "attention", "q_rope": "attention",
        "k_rope": "attention", "a": "attention", "merged": "attention", "o": "attention",
        "x_1": "ffn", "h_1": "norm", "gate": "ffn", "act": "ffn", "up": "ffn", "m": "ffn",
        "down": "ffn", "x_2": "ffn",
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_parts_add_up(tied):
    program = tiny_program(tied=tied, bias=True, norm="layer")
    blocks = breakdown(program)
    assert sum(sum(b.parameters.values()) for b in blocks) == program.parameter_count()
    for block, cost in zip(blocks, program_costs(program), strict=True):
        assert sum(block.flops.values()) == cost.flops
    assert blocks[-1].parameters.get("head", 0) == (0 if tied else 97 * 32)
    # Two projections of 32 to 32 and two of 32 to 16, with biases.
    assert blocks[1].parameters["attention"] == 2 * 32 * 33 + 2 * 16 * 33
    assert blocks[1].parameters["ffn"] == 2 * 48 * 33 + 32 * 49


def test_kv_cache_bytes():
    # 2 layers, keys and values, 2 heads of 8, 4 bytes.
    assert kv_cache_bytes(tiny_program(cache=True)) == 2 * 2 * 2 * 8 * 4 * B * (P + S)
    assert kv_cache_bytes(tiny_program(), itemsize=2) == 2 * 2 * 2 * 8 * 2 * B * (P + S)
