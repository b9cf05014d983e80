from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from programs import tiny_program

from graphopt.breakdown import breakdown, kv_cache_bytes, part_of_nodes
from graphopt.ir.cost import program_costs
from graphopt.ir.types import B, P, S
from graphopt.pipeline import Pipeline
from graphopt.report import VERSION, ArtifactEntry, PassEntry, Report, SkipEntry
from graphopt.report_page import render

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
