"""Nothing that a model says is obeyed by a terminal, or by a browser that shows its report."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pydantic
import pytest
from command_line import runner
from hostile import change
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.cli import console as ui
from graphopt.cli.commands import app
from graphopt.cli.pass_table import print_passes
from graphopt.errors import SourceError
from graphopt.lowering.onnx.genai import run_script
from graphopt.lowering.torch.render import render_model
from graphopt.passes.carve_moe.record import CarvedParts
from graphopt.passes.fuse_blocks.record import FusedBlocks
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.passes.tune_moe import TunedMoe
from graphopt.report.page import render
from graphopt.report.record import Record
from graphopt.report.records import ArtifactEntry, BlockEntry, PassEntry, Report, SkipEntry
from graphopt.support.plain import plain_line, plain_text, plain_text_source

ESCAPES = (
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07", "\x9b2J", "a\rb",
    "\x08\x08", "\x00", "\u202egnp.exe", "\u2066x\u2069", "\x1b]8;;http://evil\x1b\\link",
    "\x7f", "[red]x[/red]", "[link=http://evil]x[/link]", "[/]", ":smile:", "\ud800",
)  # fmt: skip
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters()))
def test_plain_text(text: str) -> None:
    plain = plain_text(text)
    assert not BAD.search(plain) and "\n" not in plain_line(text)
    plain.encode()
    if not BAD.search(text) and "\u2028" not in text and "\u2029" not in text:
        assert plain == text
    assert plain_text(plain) == plain


@pytest.mark.parametrize("kind", ["genai", "torch"])
def test_the_scripts_of_artifacts_print_plain_text(kind: str) -> None:
    script = run_script() if kind == "genai" else render_model(tiny_program())
    assert plain_text_source().strip() in script
    scope: dict[str, Any] = {"re": re}
    exec(plain_text_source(), scope)
    assert [scope["plain_text"](text) for text in ESCAPES] == [plain_text(t) for t in ESCAPES]
    assert script.count("print(plain_text(") == 1


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where a console writes; on a terminal Rich's own codes are there too, so colours are off."""
    file = io.StringIO()
    make = ui._Console.__init__
    options = {"file": file, "force_terminal": request.param, "color_system": None, "width": 200}
    monkeypatch.setattr(ui._Console, "__init__", lambda self, **kw: make(self, **{**kw, **options}))
    return file


@pytest.mark.parametrize("evil", ESCAPES, ids=ascii)
def test_whatever_is_printed(screen: io.StringIO, evil: str) -> None:
    from rich.table import Table

    table = Table(evil)
    table.add_row(evil)
    console = ui.stdout()
    console.print(evil)
    console.print(table)
    ui.print_rows(console, [("note", f"{evil}\nartifact  elsewhere")])
    ui.say_error(f"{evil} is wrong.", evil)
    ui.print_report(console, Report(
        source=evil, name=evil, recipe=evil,
        artifact=ArtifactEntry("out", 1, [evil], [evil], [SkipEntry(evil, evil)]),
    ))  # fmt: skip
    # Half a surrogate pair is no text that a record takes; the console does not rely on that.
    record = PrunedBlocks.model_construct(order=[evil], perplexity=[])
    print_passes(
        console,
        [PassEntry(evil, {}, True, skipped=[SkipEntry(evil, evil)], record=record)],
    )
    shown = screen.getvalue()
    assert not BAD.search(shown)
    if ("[" in evil and "\x1b" not in evil) or (":" in evil and "\x1b" not in evil):
        assert evil in shown  # as it is, not as markup
    assert "\nartifact" not in shown.split("error:")[0].replace("\nartifact  out", "")


def run(*args: Any) -> str:
    result = runner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stdout + result.stderr


@pytest.mark.slow
def test_commands_on_a_model_full_of_them(tmp_path: Path) -> None:
    """Names of program, notes, values, weights, calls and config, by every command."""
    root = tmp_path / "out"
    program = tiny_program(layers=2, cache=True, vocab=300)
    save_tiny(tmp_path / "tokenizer")
    program.tokenizer = str(tmp_path / "tokenizer")
    go.emit(program, root, emit=("torch",))
    evil = "\x1b[31m\x1b]0;t\x07\r\u202e[bold]"

    def edit(data: dict[str, Any]) -> None:
        data["name"] = data["source"] = evil
        data["notes"] = [[evil, evil]]
        data["config"] = {"model_type": evil, "architectures": [evil]}
        text = json.dumps(data)
        for name in ("norm.weight", "logits"):
            text = text.replace(json.dumps(name), json.dumps(name + evil))
        data.update(json.loads(text))

    change(root, edit)
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "text").write_text("the quick brown fox " * 40)
    for args in (
        ["inspect", root],
        ["diff", root, tmp_path / "other"],
        ["eval", root, "--backend", "program", "--text", tmp_path / "text", "--seqlen", 16],
        ["generate", root, "--backend", "program", "--prompt", "the", "--max-new-tokens", 4],
        ["compile", root, "-o", tmp_path / "again", "--emit", "torch", "--passes", ""],
        ["compile", root, "-o", tmp_path / "hf", "--emit", "hf", "--dry-run"],
        ["inspect", tmp_path / evil],
    ):
        shown = run(*args)
        assert shown and not BAD.search(shown.replace("\r\n", "\n")), (args, shown)
    for path in (tmp_path / "again").rglob("*.txt"):
        assert not BAD.search(path.read_text()), path
    model = (tmp_path / "again" / "model.py").read_text()
    assert not BAD.search(model)


@pytest.mark.parametrize("evil", ESCAPES, ids=ascii)
def test_generated_text(capsys: pytest.CaptureFixture[str], evil: str) -> None:
    ui.write_piece(f"a{evil}b\n")
    assert not BAD.search(capsys.readouterr().out)


def test_what_libraries_log_and_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    stream = io.StringIO()
    logger, handler = logging.getLogger("some.library"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        ui.keep_logs_plain()
        logger.warning("config says %s", "\x1b[31m")
        logger.warning("100%% of %s\x9b")
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            ui.say_traceback()
        text = warnings.formatwarning("\x1b[31m", UserWarning, "file.py", 1)
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert "\\x1b[31m" in stream.getvalue() and not BAD.search(stream.getvalue() + text)


# The report -------------------------------------------------------------------------------------

MARKUP = "<img src=x onerror=alert(1)>\"'&</title></script><script>evil()</script>"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def everywhere(value: Any) -> Any:
    """Put markup into every text of a report and of what it holds."""
    if isinstance(value, str):
        return value + MARKUP
    if isinstance(value, dict):
        return {key: everywhere(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(everywhere(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        changed = {name: everywhere(getattr(value, name)) for name in fields}
        return dataclasses.replace(value, **changed)
    if isinstance(value, pydantic.BaseModel):
        fields = list(type(value).model_fields)
        return value.model_copy(update={name: everywhere(getattr(value, name)) for name in fields})
    return value


def records() -> list[Record]:
    """What each pass tells that has a card, with something in every field that is drawn."""
    steps = [{"after": "a", "value": 3.0}, {"after": "b", "value": 4.0}]
    curves = {"losses": [(0, 1.0), (1, 0.5)], "checks": [(0, 1.0), (1, 0.5)], "lr_decays": []}
    trained = {
        "part": "x", "steps": 1, "tokens": 2, "seconds": 1.0, "preparing": 0.0, **curves,
        "stopped": "early", "not_compiled": "",
    }  # fmt: skip
    training = {
        "training": [trained], "perplexity": steps, "generated_windows": 3,
        "seconds": {f"part {MARKUP}": 1.0},
    }  # fmt: skip
    reconstructions = [{"where": "x", "before": 1.0, "after": 0.5, "ridge": 0.1}]
    shares = dict.fromkeys(("static", "random", "oracle", "routed", "recall", "agreement"), 0.5)
    parts = [
        {"where": where, "shared": shared, "added": 1, "rounds": 2, "load": [0.5], **shares}
        for where, shared in (("a", 1), ("b", 2))
    ]
    return [
        PrunedBlocks.model_validate(
            {"order": [f"block {MARKUP}", "b"], "removed": ["x", "y"], "perplexity": steps,
             "scores": [{f"block {MARKUP}": 1.0, "b": 2.0}], "tokens_per_second": [1.0, 2.0]}
        ),
        FusedBlocks.model_validate(
            {**training, "order": [3], "reconstructions": reconstructions,
             "ablations": [{"donor": "x", "loss": 1.0, "perplexity": 2.0}]}
        ),
        CarvedParts.model_validate(
            {"split": "s", "parts": parts, "reconstructions": reconstructions,
             "sensitivity": [{"where": "x", "kl": 0.1}],
             "work": {"tokens": 1, "flops": (4, 2), "weight_products": (4, 2)},
             "seconds": {f"part {MARKUP}": 1.0}}
        ),
        TunedMoe.model_validate(
            {**training, "loads": [{"where": "x", "before": [0.5], "after": [0.5]}]}
        ),
    ]  # fmt: skip


def test_a_report_shows_text_as_text() -> None:
    entries = [
        PassEntry("p", {}, False, skipped=[SkipEntry("w", "r")], record=record, verification="v")
        for record in records()
    ]
    assert all(record.card() for record in records())
    report = Report(
        source="s", name="n", recipe="r", target="t", passes=entries,
        versions={f"torch{MARKUP}": "1"},
        machine={"system": "s", "processor": "p", "cores": 2}, stages={f"s{MARKUP}": 1.0},
        probe={"tokens": 1, "is_text": False, "note": "n"}, dtype="d",
        artifact=ArtifactEntry("out", 1, ["e"], ["u"], [SkipEntry("w", "r")]),
        blocks=[BlockEntry("b", {"attention": 3}, {"attention": 4})],
    )  # fmt: skip
    page = Page()
    page.feed(render(everywhere(report)))
    tags = {tag for tag, _ in page.found}
    assert not tags & {"img", "script", "iframe", "object", "embed", "link", "form"}
    for tag, attrs in page.found:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert not {"src", "href", "action", "xlink:href"} & set(attrs), (tag, attrs)


def test_an_error_names_odd_files_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        go.capture(str(tmp_path / "\x1b[31m"))
