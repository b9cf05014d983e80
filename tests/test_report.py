from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.errors import SourceError
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.cost import program_costs
from graphopt.ir.kv_policies import PageBudget, Quest
from graphopt.ir.types import B, P, S
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.passes.canonicalise import AppliedRules
from graphopt.passes.carve_moe.record import Carved, CarvedParts, Work
from graphopt.passes.fuse_blocks.record import Ablation, FusedBlocks
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.passes.tune_moe import ExpertLoads, TunedMoe
from graphopt.report.breakdown import breakdown, kv_cache_bytes, part_of_nodes
from graphopt.report.page import render
from graphopt.report.pictures import seconds_rows
from graphopt.report.record import Step
from graphopt.report.records import (
    VERSION,
    ArtifactEntry,
    PassEntry,
    Report,
    SkipEntry,
)
from graphopt.report.saved_report import read_report
from graphopt.training.record import TrainedPart, TrainingRecord

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
        PassEntry("prune-blocks", {"ratio": 0.25}, False, 4, 1, [skip], None, 100, 75, "measured",
                  2.5, None, 0.125, 20.0, 25.0, 1.5, 0.5, 10**9)
    )  # fmt: skip
    return made


def test_the_json_has_what_is_documented(report, tmp_path):
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["version"] == VERSION == 2
    assert set(data) >= ISSUE_FIELDS
    assert all(set(entry) >= ISSUE_PASS_FIELDS for entry in data["passes"])
    assert data["passes"][-1]["skipped"] == [
        {"where": "block: a", "reason": "its mask <b>is</b> computed"}
    ]
    documented = (Path(__file__).parent.parent / "docs" / "report.md").read_text()
    fields = {*data, *data["passes"][0], *data["artifact"], *data["blocks"][0]}
    undocumented = sorted(name for name in fields if f"`{name}`" not in documented)
    assert not undocumented
    for entry, saved in zip(report.passes, data["passes"], strict=True):
        record = None if entry.record is None else type(entry.record)
        assert PassEntry.from_json(saved, record) == entry


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
    html = render(report)
    page = _Page()
    page.feed(html)
    assert page.open == [] and page.references == []
    assert not re.search(r"https?://|url\(|@import|<script", html)
    text = " ".join(page.text)
    assert "tiny <model> & co" in text and "its mask <b>is</b> computed" in text
    assert "KL 0.12, perplexity × 1.25" in text
    assert "graphopt generate out --prompt 'Hi'" in text
    assert "prefers-color-scheme: dark" in html and "viewport" in html
    busy = [entry for entry in report.passes if not entry.idle]
    assert html.count("<svg") == 2 * len(busy) + 2
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
    "perplexity": [
        {"after": "the whole model", "value": 22.27},
        {"after": "removing 4", "value": 26.4},
        {"after": "removing 2", "value": 41.8},
    ],
    "scoring_seconds": 14.2,
    "tokens_per_second": [1210.0, 1815.0],
}
TUNED = {
    "part": "all <blocks>",
    "steps": 300,
    "seconds": 120.5,
    "tokens": 2457600,
    "preparing": 0.0,
    "losses": [[step, 0.9 * math.exp(-step / 90) + 0.2] for step in range(20, 301, 20)],
    "checks": [[step, 0.8 * math.exp(-step / 70) + 0.25] for step in range(0, 301, 30)],
    "lr_decays": [],
    "stopped": "",
    "not_compiled": "",
}
FUSION = {
    "seconds": {"warm start": 20.1, "training": 120.5, "all": 150.0},
    "perplexity": [
        {"after": "plain removal", "value": 41.8},
        {"after": "warm start", "value": 33.0},
        {"after": "trained", "value": 25.6},
    ],
    "reconstructions": [
        {"where": "3: attention", "before": 0.0, "after": 0.0, "ridge": None},
        {"where": "3: ffn", "before": 0.26, "after": 0.11, "ridge": 0.1},
    ],
    "training": [TUNED],
    "ablations": [
        {"donor": "pruned", "loss": 0.253, "perplexity": 25.6},
        {"donor": "random", "loss": 0.255, "perplexity": 25.7},
    ],
    "generated_windows": 256,
}


def lossy_report(*records):
    """Return a report with a pass for each of the records."""
    made = Report(source="x", name="x", recipe="", machine={"system": "", "processor": "",
                  "cores": 1})  # fmt: skip
    made.passes = [
        PassEntry(f"pass-{number}", {}, False, record=record)
        for number, record in enumerate(records)
    ]
    return made


def rendered(*records):
    """Return the page, checked, and its text."""
    html = render(lossy_report(*records))
    page = _Page()
    page.feed(html)
    assert page.open == []
    return html, " ".join(" ".join(page.text).split())


def carved(number, **values):
    """Return what became of one part, with figures that nothing here depends on."""
    figures = dict.fromkeys(("static", "random", "oracle", "routed", "recall", "agreement"), 0.5)
    return Carved(
        **{"where": f"layers.{number}", "shared": 3, "added": 0, "rounds": 2, "load": [],
           **figures, **values}
    )  # fmt: skip


WORK = Work(tokens=128, flops=(2 * 10**9, 15 * 10**8), weight_products=(10**9, 8 * 10**8))


def test_what_carved_parts_leave_out_is_drawn():
    shares = {"static": 0.1, "random": 0.2, "oracle": 0.05}
    parts = [carved(n, **shares, routed=0.05 + n / 100) for n in range(3)]
    record = CarvedParts(split="S3A3E8", parts=parts, work=WORK)
    html, text = rendered(record)
    lines = re.findall(r'<polyline class="(\w+)" points="([^"]*)"/>', html)
    assert [style for style, _ in lines] == ["norm", "head", "ffn", "embed"]
    routed = [float(p.split(",")[1]) for p in lines[2][1].split()]
    assert routed == sorted(routed, reverse=True)  # more is higher up
    assert "the router's experts, 6.0% on average" in text and "highest point is 20.0%" in text
    assert "Shared groups" not in text
    own = [replace(part, shared=n) for n, part in enumerate(parts)]
    text = rendered(record.model_copy(update={"parts": own}))[1]
    assert "Shared groups of these parts: 0, 1, 2." in text
    odd = [replace(part, routed=math.nan) for part in parts]
    text = rendered(record.model_copy(update={"parts": odd}))[1]
    assert "What tokens leave out" not in text and "nan" not in text


def test_work_and_loads_are_said_before_and_after():
    parts = [carved(0, added=3), carved(1, added=2)]
    loads = [ExpertLoads(where="x", before=[0.75, 0.25, 0.5], after=[0.5, 0.5, 0.5])]
    made = CarvedParts(split="S3A3E8", parts=parts, work=WORK), TunedMoe(loads=loads)
    text = rendered(*made)[1]
    assert "A prompt of 128 tokens takes 2.0 G → 1.5 G FLOPs in all (-25.0%)." in text
    assert "1.0 G → 800.0 M products with weights (-20.0%)." in text
    assert "5 neurons of zeros were added." in text
    assert "Before training a token runs 1.50 experts of a part, and the most used one" in text
    assert "1.50 times as often" in text and "1.00 times as often" in text
    unused = [ExpertLoads(where="x", before=[0.0], after=[])]
    assert "times as often" not in rendered(TunedMoe(loads=unused))[1]


def test_depth_pruning_is_drawn():
    html, text = rendered(PrunedBlocks.model_validate(PRUNING), FusedBlocks.model_validate(FUSION))
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
        "the whole model 22.27 removing 4 26.40 removing 2 41.80",
        "plain removal 41.80 warm start 33.00 trained 25.60",
        "Scoring took 14.2 s.",
        "A forward pass takes in 1,210 → 1,815 tokens a second (+50.0%).",
        "all <blocks> 300 steps, 2,457,600 tokens, 120.5 s, held-out loss 1.05 → 0.261",
        "Of 150.0 s in all. warm start 20.1 s training 120.5 s",
        "random 0.255 25.7",
        "1 of 2 projections reconstructed in closed form; relative squared error of the stream "
        "behind the last 0.26 → 0.11. 256 windows of text were written by the dense model.",
    ):
        assert sentence in text
    lines = re.findall(r'<polyline class="\w+" points="([^"]*)"/>', html)
    assert [len(line.split()) for line in lines] == [15, 11]
    points = [tuple(map(float, p.split(","))) for line in lines for p in line.split()]
    assert all(0 <= x <= 100 and 0 <= y <= 40 for x, y in points)
    # The first check is the highest loss of all.
    assert points[15] == (0.0, 2.0) and min(y for _, y in points) == 2.0


@pytest.mark.parametrize(("record", "details"), [(PrunedBlocks, PRUNING), (FusedBlocks, FUSION)])
@pytest.mark.parametrize("value", ["text", [{"a": {}}], [[[]]], [{"part": [], "losses": 3}]])
def test_details_of_another_form_are_no_record(record, details, value):
    """What a snapshot holds is refused by the entry that is wrong."""
    entry = PassEntry("x", {}, False).to_json()
    PassEntry.from_json({**entry, "details": details}, record)
    for key in details:
        with pytest.raises(SourceError, match=key) as caught:
            PassEntry.from_json({**entry, "details": {**details, key: value}}, record)
        assert "Leave --resume out." in caught.value.remedy
    with pytest.raises(SourceError, match="surplus"):
        PassEntry.from_json({**entry, "details": {**details, "surplus": 1}}, record)


FIGURES = st.none() | st.floats()
CURVES = st.lists(st.tuples(st.integers(0, 1000), FIGURES), max_size=4)
STEPS = st.lists(st.builds(Step, after=st.text(max_size=3), value=FIGURES), max_size=4)
SECONDS = st.floats(0, 1e6)
TRAINED = st.builds(
    TrainedPart, part=st.text(max_size=3), steps=st.integers(0, 9), tokens=st.integers(0, 9),
    seconds=SECONDS, preparing=SECONDS,
    losses=CURVES, checks=CURVES, lr_decays=CURVES, stopped=st.text(max_size=3),
)  # fmt: skip
RECORDS = st.one_of(
    st.builds(
        PrunedBlocks, scoring_seconds=SECONDS,
        order=st.lists(st.sampled_from("0123"), max_size=3, unique=True),
        scores=st.lists(st.dictionaries(st.sampled_from("0123"), FIGURES, max_size=4), max_size=2),
        perplexity=STEPS, tokens_per_second=st.lists(FIGURES, max_size=3),
    ),
    st.builds(
        FusedBlocks, perplexity=STEPS, training=st.lists(TRAINED, max_size=2),
        ablations=st.lists(st.builds(Ablation, donor=st.just("self"), loss=FIGURES,
                                    perplexity=FIGURES), max_size=2),
    ),
)  # fmt: skip


@pytest.mark.slow
@settings(deadline=None)
@given(RECORDS)
def test_every_record_has_a_page_and_a_line_and_reads_back(record):
    _, text = rendered(record)
    assert not {"nan", "inf"} & set(text.split()) and "nan" not in record.line().split()
    json.dumps(lossy_report(record).to_json(), allow_nan=False)
    entry = PassEntry("x", {}, False, record=record)
    assert PassEntry.from_json(json.loads(json.dumps(entry.to_json())), type(record)) == entry


def test_a_record_without_a_picture_has_no_card():
    html, text = rendered(AppliedRules(rules={"swap": 3}), TrainingRecord(), None)
    assert "<h2>pass-" not in html and "swap" not in text


def test_figures_that_are_not_finite_are_null(tmp_path):
    steps = [Step(after="a", value=20.0), Step(after="b", value=math.inf)]
    record = PrunedBlocks(
        order=["1"], removed=["x"], scores=[{"0": math.nan, "1": 2.0}], perplexity=steps
    )
    lossy_report(record).write(tmp_path)
    details = json.loads((tmp_path / "report.json").read_text())["passes"][0]["details"]
    assert details["scores"] == [{"0": None, "1": 2.0}]
    assert [step["value"] for step in details["perplexity"]] == [20.0, None]
    assert "round 1: –" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("version", [1, 2])
def test_a_report_of_an_older_version_opens(tmp_path, version):
    lossy_report(PrunedBlocks.model_validate(PRUNING)).write(tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    assert read_report(tmp_path).parameters == 0


def test_a_report_of_a_later_version_is_refused(tmp_path):
    lossy_report().write(tmp_path)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(SourceError, match="version"):
        read_report(tmp_path)


def test_a_page_of_nothing():
    empty = Report(source="", name="x", recipe="", machine={"system": "", "processor": "",
                   "cores": 1})  # fmt: skip
    html = render(empty)
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
    # What a policy remembers of a layer: the least and the largest of 8 features of every page.
    cached = tiny_program(cache=True)
    policy = Quest(PageBudget(page=4, pages=3, sink=1, local=1))
    found = kv_cache_bytes(with_policies(cached, {"kv.0": policy}), itemsize=2)
    bounds = 2 * 2 * 8 * 4 * B * sympy.ceiling((P + S) / 4)
    assert sympy.expand(found - bounds) == sympy.expand(2 * 2 * 2 * 8 * 2 * B * (P + S))


def test_bars_of_seconds_account_for_all_of_them():
    shown = seconds_rows({"warm start": 10.0, "training": 20.0, "all": 50.0})
    values = [float(value) for value in re.findall(r">([0-9.]+) s<", shown)]
    assert values == [10.0, 20.0, 20.0] and "Of 50.0 s in all" in shown
    assert "all else" not in seconds_rows({"training": 50.0, "all": 50.2})
    assert seconds_rows({"all": 3.0}) == ""
