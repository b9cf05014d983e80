"""The report's page, checked for readers of screens and for narrow windows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import product

import pytest

from graphopt.report.columns import axis_end, columns
from graphopt.report.evaluations import Evaluation, add_evaluation
from graphopt.report.page import GRADE_STYLES, render, times_style
from graphopt.report.pictures import page_style
from graphopt.report.quality import MeasuredText, Quality, Sample
from graphopt.report.records import (
    ArtifactEntry,
    BlockEntry,
    CalibrationEntry,
    PassEntry,
    Report,
    SkipEntry,
)

STYLES = page_style()


def full_report() -> Report:
    """Return a report with every card that the pipeline itself fills."""
    text = MeasuredText("built-in text", "0f" * 32, 2048, 512, [1], 504, "The")
    samples = [Sample("The ferry to the northern", " islands <b>leaves</b>", " " + "the" * 60)]
    blocks = [
        BlockEntry("embed", {"embed": 100_000_000}, {}),
        *(BlockEntry(f"model.layers.{n}", {"attention": 2_000_000, "ffn": 3_000_000, "norm": 9},
                     {"attention": 400, "ffn": 600, "norm": 1}) for n in range(4)),
        BlockEntry("head", {"norm": 9}, {"head": 9000}),
    ]  # fmt: skip
    skips = [SkipEntry(f"model.layers.{n}.mlp: {'x' * 90}", "a norm behind it") for n in range(18)]
    return Report(
        source="some/" + "long-" * 20 + "name", name="a-model",
        recipe="a,b,prune-blocks{ratio=0.5}",
        target="cpu",
        passes=[
            PassEntry("canonicalise", {}, True, 3, 3, verification="proved",
                      parameters_before=100, parameters_after=100),
            PassEntry("common-subexpression-elimination", {}, True, verification="unchanged"),
            PassEntry("dead-code-elimination", {}, True, verification="unchanged"),
            PassEntry("fold-constants", {}, True, 2, 1, verification="passed",
                      max_abs_logit_delta=1e-5, tolerance=1e-3),
            PassEntry("prune-blocks", {}, False, 4, 2, skips, None, 100, 75, "measured", 2.5, None,
                      0.5, 20.0, 62.0, 1.5, 0.5, 10**9),
        ],
        machine={"system": "Linux", "processor": "x", "cores": 2},
        stages={"capture": 1.0}, parameters=75, dtype="f32",
        probe={"tokens": 111, "is_text": True, "note": ""},
        artifact=ArtifactEntry("out", 1, ["onnx"], ["graphopt generate out --prompt " + "x" * 200]),
        blocks=blocks, command="graphopt compile x --out " + "o" * 150,
        calibration=CalibrationEntry("calib.txt", "aa" * 32, 4096),
        quality=Quality(text, 20.0, 62.0, 400.0, 0.02, ["take fewer blocks"], samples),
        licence="apache-2.0", licence_files=["LICENSE"],
    )  # fmt: skip


class _Outline(HTMLParser):
    """Collects headings, header cells and pictures with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def page():
    return render(full_report())


def test_the_outline_has_one_title_and_leaves_no_level_out(page):
    outline = _Outline(page)
    assert outline.headings.count(1) == 1 and outline.headings[0] == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(below <= above + 1 for above, below in steps)
    assert [attributes for tag, attributes in outline.tags if tag == "html"] == [{"lang": "en"}]
    assert [tag for tag, _ in outline.tags].count("main") == 1


def test_cells_and_pictures_say_what_they_are(page):
    for tag, attributes in _Outline(page).tags:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
        if tag == "svg":
            named = attributes.get("role") == "img" and attributes.get("aria-label")
            assert named or attributes.get("aria-hidden") == "true"


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_the_standards_examples():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def themes() -> list[dict[str, str]]:
    """Return the colours by name, of the light and of the dark page."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLES, flags=re.DOTALL)
    )
    assert light.keys() == dark.keys()
    return [light, dark]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_colours_are_told_from_what_is_behind_them(theme):
    # WCAG 2.2: 4.5 for text (1.4.3), 3 for what pictures are made of (1.4.11).
    for text, behind in product(("text", "dim", "good", "warn", "bad"), ("bg", "card")):
        assert contrast(theme[text], theme[behind]) >= 4.5, (text, behind)
    for text in ("text", "dim"):
        assert contrast(theme[text], theme["track"]) >= 4.5, text
    for mark in ("embed", "attention", "ffn", "norm", "head"):
        assert contrast(theme[mark], theme["card"]) >= 3, mark


def test_every_grade_has_a_style_that_the_page_knows():
    assert set(GRADE_STYLES.values()) <= set(re.findall(r"\.(good|warn|bad|dim) \{", STYLES))
    # A thirty-fold rise looks unlike a mild one.
    assert [times_style(t) for t in (1.0, 1.2, 3.1, 30.0)] == ["good", "warn", "bad", "bad"]


def test_what_did_nothing_is_one_line(page):
    assert "2 passes did nothing: common-subexpression-elimination, dead-code-elimination" in page
    assert page.count("dead-code-elimination") == 1
    assert "model.layers.{0–17}.mlp" in page and "(18 places)" in page


def test_the_page_says_how_it_was_made(page):
    for fact in (
        "graphopt compile x --out ooo", "calib.txt, SHA-256 aaaaaaaaaaaa…; 4,096 tokens",
        "apache-2.0 · copied: LICENSE", "Perplexity is 3.1 times the source",
        "islands &lt;b&gt;leaves&lt;/b&gt;", "first token &#x27;The&#x27; (504)",
    ):  # fmt: skip
        assert fact in page


def test_a_large_embedding_does_not_make_slivers_of_blocks():
    blocks = full_report().blocks
    drawn = columns(blocks, "parameters")
    heights = [float(h) for h in re.findall(r'class="ffn" x=[^>]*height="([\d.]+)"', drawn)]
    # The axis ends at 1.3 times a block, three fifths of which are feed-forward.
    assert heights == [pytest.approx(100 / 1.3 * 0.6, rel=1e-3)] * 4
    assert 'class="gap" x="0"' in drawn and drawn.count('class="gap"') == 1
    assert "columns with a gap are higher: embed 100.0 M" in drawn
    embedding = re.search(r'class="embed" x="0.08" y="0.000" width="0.84" height="100', drawn)
    assert embedding is not None
    even = [BlockEntry(name, {"attention": 10}, {}) for name in "abc"]
    assert axis_end(even, [10, 10, 10]) == 10 and 'class="gap"' not in columns(even, "parameters")


def test_an_evaluation_comes_into_the_report_and_replaces_nothing_else(tmp_path):
    report = full_report()
    report.write(tmp_path)
    before = (tmp_path / "report.html").read_text()
    first = Evaluation(
        model="out", form="onnx", device="cpu", text="t <1>", text_sha256="bc" * 32,
        perplexity=21.5, tokens=4096, tokens_per_second=812.4,
    )  # fmt: skip
    asked = Evaluation(model="demo", form="program", device="cpu", piqa_accuracy=0.5, piqa_rows=8)
    add_evaluation(tmp_path, first)
    add_evaluation(tmp_path, asked)
    after = (tmp_path / "report.html").read_text()
    assert "21.500 (4,096 tokens of t &lt;1&gt;)" in after and "50.0% of 8" in after
    assert after.count("<h2>Evaluated</h2>") == 1
    section = re.compile("<!-- evaluations -->.*?<!-- end of evaluations -->", re.DOTALL)
    assert section.sub("", after) == section.sub("", before)
    assert '"tokens_per_second": 812.4' in (tmp_path / "report.json").read_text()


# In a browser.


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 500])
def test_nothing_scrolls_sideways(browser, page, tmp_path, width):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    assert browser.look_at(path, width).wide == []


@pytest.mark.browser
@pytest.mark.slow
def test_what_scrolls_sideways_is_noticed(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<html><body><main><pre>" + "x" * 999 + "</pre></main></body></html>")
    assert "PRE.null" in browser.look_at(path, 500).wide


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(browser, page, tmp_path, width, dark):
    axe = browser.axe_core()
    if axe is None:
        pytest.skip("axe-core is not here: `npm pack axe-core`, and set AXE_CORE to axe.min.js")
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    assert browser.look_at(path, width, dark=dark, axe=axe).violations == []
