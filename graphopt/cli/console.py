"""What the command line prints: echo, progress, tables.

Names, notes and tokens of a model are data: nothing in them styles the output or is obeyed by the
terminal. That is seen to in one place, `_Console.render`, for whatever is printed.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from graphopt.support.plain import plain_line, plain_text
from graphopt.support.quantities import counted, format_bytes, format_duration

if TYPE_CHECKING:
    from graphopt.ir.graph import Program
    from graphopt.ir.vision import Vision
    from graphopt.report.records import Report


_PIPED = 140
"""Columns of results that go to no terminal, in which tables of long names fit."""


class _Console(Console):
    """A console that prints text as text: without markup, and without control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Rich's own control codes come in segments of their own, styles apart from the text.
            plain = segment.text if segment.control else plain_text(segment.text)
            yield Segment(plain, segment.style, segment.control)


def stdout() -> Console:
    """Return the console for results; it honours NO_COLOR and never wraps when piped."""
    console = _Console(soft_wrap=False)
    if not console.is_terminal:
        console = _Console(width=max(console.width, _PIPED))
    return console


def stderr() -> Console:
    """Return the console for progress and errors."""
    return _Console(stderr=True)


def write_piece(text: str) -> None:
    """Write a piece of generated text to stdout at once; a carriage return is left out."""
    sys.stdout.write(plain_text(text.replace("\r", "")))
    sys.stdout.flush()


def say_traceback() -> None:
    """Write the traceback of the error at hand to stderr."""
    sys.stderr.write(plain_text(traceback.format_exc()))


def keep_logs_plain() -> None:
    """Let what libraries log, and warn of, go through the same as what graphopt prints."""
    make, show = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # a bad format string is the logger's to report
            made.msg, made.args = plain_text(made.getMessage()), ()
        return made

    def warning(*args: Any, **kwargs: Any) -> str:
        return plain_text(show(*args, **kwargs))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning


MAX_MESSAGE = 1000
"""Letters of an error that are shown."""


def say_error(message: str, remedy: str = "") -> None:
    """Write an error as one sentence and its remedy to stderr."""
    console = stderr()
    if len(message) > MAX_MESSAGE:
        # What a file or an argument holds is quoted in messages, however long it is.
        half = MAX_MESSAGE // 2
        message = f"{message[:half]} ... {message[-half:]}"
    console.print("error: ", style="bold red", end="")
    console.print(message, soft_wrap=True)
    if remedy:
        console.print(remedy, soft_wrap=True)


def say_note(message: str) -> None:
    """Write a sentence beside a result to stderr."""
    stderr().print(message, style="dim", markup=False, soft_wrap=True)


class ShownProgress(Protocol):
    """A progress callback whose work is shown to the user."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell how far a piece of work is; see `graphopt.support.progress`."""

    def milestone(self, text: str) -> None:
        """Tell that something is done."""


@contextlib.contextmanager
def progress_bars() -> Iterator[ShownProgress]:
    """Give a progress callback: bars on stderr while it is a terminal, else a line now and then."""
    console = stderr()
    if not console.is_terminal:
        from graphopt.cli.progress_lines import ProgressLines

        lines = ProgressLines(lambda text: stderr().print(text, soft_wrap=True))
        with lines.ticking():
            yield lines
        return
    # Bars take as long to import as the rest of Rich, and only a terminal shows any.
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}", justify="left", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    class Bars:
        """A bar for each piece of work, as long as it goes on; what is done has its table."""

        def __init__(self) -> None:
            self._tasks: dict[str, Any] = {}

        def __call__(self, what: str, done: int, total: int) -> None:
            if what not in self._tasks:
                self._tasks[what] = bars.add_task(what, total=total)
            bars.update(self._tasks[what], completed=done, total=total)
            if done >= total:
                bars.remove_task(self._tasks.pop(what))

        def milestone(self, text: str) -> None:
            pass

    with bars:
        yield Bars()


def format_figure(value: float | None, digits: int = 3) -> str:
    """Return a measured figure; `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def describe(program: Program) -> list[tuple[str, str]]:
    """Return what was resolved about a model, as (label, text)."""
    from graphopt.ir.ops.attention import ATTENTIONS
    from graphopt.ir.printer import format_count
    from graphopt.ir.types import DTYPE_NAMES

    config = program.config
    classes = config.get("architectures") or []
    family = config.get("model_type", "")
    model = ", ".join(classes) + (f" ({family})" if family and classes else family)
    blocks = sum(any(n.op in ATTENTIONS for n in program.function_of(c).nodes)
                 for c in program.calls)  # fmt: skip
    rows = [("model", f"{program.name}  {model}".rstrip())]
    rows.append(
        (
            "size",
            f"{format_count(program.parameter_count())} parameters, "
            f"{counted(blocks, 'attention block')}, "
            f"{DTYPE_NAMES.get(program.checkpoint_dtype, '?')}",
        )
    )
    if program.vision is not None:
        rows.append(("vision", _about_vision(program.vision)))
    rows += [("note", f"{where}: {reason}") for where, reason in program.notes]
    return rows


def _about_vision(vision: Vision) -> str:
    """Return what a model that sees has beside its decoder, in one line."""
    from graphopt.ir.printer import format_count

    parts = [f"{format_count(sum(w.numel for w in vision.carried))} parameters around the decoder"]
    if vision.sections is not None:
        parts.append("positions in time, height and width")
    if vision.both_ways:
        parts.append("tokens of a picture see each other both ways")
    return ", ".join(parts)


def print_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print aligned `label  text` lines."""
    rows = list(rows)
    width = max([8, *(len(label) for label, _ in rows)]) + 1
    for label, text in rows:
        console.print(f"{label:<{width}}", style="dim", end="")
        console.print(plain_line(text), soft_wrap=True)


def print_estimate(console: Console, report: Report) -> None:
    """Print what a dry run found that a compile would do and take."""
    estimate = report.estimate
    assert estimate is not None
    rows = [("will do", f"{entry.name}: {entry.what}") for entry in estimate.passes]
    stages = ", ".join(
        f"{name} {format_duration(seconds)}" for name, seconds in estimate.seconds.items()
    )
    total = sum(estimate.seconds.values())
    rows.append(("time", f"about {format_duration(total)} ({stages})"))
    rows.append(("memory", f"about {format_bytes(estimate.peak_bytes)}"))
    rows += [("size", f"{form.name} about {form.describe()}") for form in estimate.forms]
    if estimate.memory is not None:
        rows += _fit_rows(estimate.memory, [entry.describe() for entry in estimate.fits])
    print_rows(console, rows)
    console.print()
    console.print("Dry run: no weight was read and nothing was written.")


def print_report(console: Console, report: Report) -> None:
    """Print what a compile left behind."""
    artifact = report.artifact
    assert artifact is not None
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.stages.items())
    rows = quality_rows(report)
    rows += [
        ("time", f"{report.total_seconds:.1f} s ({stages})"),
        ("memory", f"{format_bytes(report.peak_bytes)} at most"),
        ("artifact", f"{artifact.path}  {format_bytes(artifact.bytes)}"),
        *(("size", f"{form.name} {form.describe()}") for form in artifact.forms),
        ("report", f"{artifact.path}/report.html"),
    ]
    rows += [("note", f"{note.where}: {note.reason}") for note in artifact.notes]
    rows += [("run", line) for line in artifact.usage]
    print_rows(console, rows)


_PROMPT_LETTERS, _WRITTEN_LETTERS = 30, 80
"""How much of a sample a terminal shows."""


def quality_rows(report: Report) -> list[tuple[str, str]]:
    """Return what became of the model's quality, first of all in a sentence."""
    verdict, quality = report.verdict(), report.quality
    rows = [("quality", verdict.sentence)] if verdict is not None else []
    if quality is None:
        return rows
    rows.append(("text", quality.text.describe()))
    for sample in quality.samples[:1]:
        for label, continued in (("before", sample.before), ("after", sample.after)):
            begun, written = " ".join(sample.prompt.split()), " ".join(continued.split())
            rows.append((label, f"…{begun[-_PROMPT_LETTERS:]} | {written[:_WRITTEN_LETTERS]}"))
    return rows


def print_inspection(console: Console, program: Program, found: dict[str, Any]) -> None:
    """Print what `inspect` found."""
    from graphopt.ir.printer import format_count

    sizes = ", ".join(f"{name}={size}" for name, size in found["sizes"].items())
    console.print(found["program"], soft_wrap=True)
    console.print()
    print_rows(console, describe(program))
    if found["ranks"] > 1:
        row = ("ranks", f"{found['ranks']}; what follows are the figures of one")
        print_rows(console, [row])
    if not found["kv_cache"]:
        print_rows(console, [("cache", "its attention can't have a KV cache; past is taken as 0")])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for heading in ("parameters", f"FLOPs ({sizes})"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part, figures in found["parts"].items():
        table.add_row(part, format_count(figures["parameters"]), format_count(figures["flops"]))
    total = sum(figures["parameters"] for figures in found["parts"].values())
    table.add_row("total", format_count(total), format_count(found["flops"]["value"]))
    console.print()
    console.print(table)
    console.print()
    rows = [("FLOPs", f"{found['flops']['symbolic']}")]
    for name, cost in found["bytes"].items():
        rows.append((name.replace("_", " "), f"{format_bytes(cost['value'])}  {cost['symbolic']}"))
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        console.print(f"{label:<{width}}", style="dim", end="")
        console.print(text, soft_wrap=True)
    if found["fits"] is not None:
        console.print()
        texts = [entry["text"] for entry in found["fits"]["sizes"]]
        print_rows(console, _fit_rows(found["fits"]["memory"], texts))


def _fit_rows(memory: int, texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return what fits a GPU's memory, a line each."""
    said = f"{format_bytes(memory)} of a GPU, beside what its driver takes; in 16 bits"
    return [("fits", said), *(("", text) for text in texts)]


def print_diff(console: Console, found: dict[str, Any]) -> None:
    """Print how two models differ."""
    from graphopt.ir.printer import format_count

    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in found["structure"]:
        console.print(line, style=styles.get(line[:1]), soft_wrap=True)
    if not found["structure"]:
        console.print("The programs have the same structure.")
    weights = found["weights"]
    before, after = (format_count(count) for count in found["parameters"])
    rows = [("parameters", f"{before} → {after}")]
    rows += [
        (f"only in {side}", ", ".join(weights[key]))
        for side, key in (("a", "only_a"), ("b", "only_b"))
        if weights[key]
    ]
    equal = weights["common"] - len(weights["changed"])
    compared = "" if weights["compared"] else " in shape and dtype; values were not compared"
    rows.append(("weights", f"{equal} of {weights['common']} common ones are equal{compared}"))
    for label, text in rows:
        console.print(f"{label:<12}", style="dim", end="")
        console.print(text, soft_wrap=True)
    if weights["changed"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("weight", no_wrap=True)
        for heading in ("shape", "dtype", "max|Δ|"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in weights["changed"]:
            pairs = (row["shape"], row["dtype"])
            cells = [str(a) if a == b else f"{a} → {b}" for a, b in pairs]
            table.add_row(row["name"], *cells, format_figure(row["max_abs_delta"]))
        console.print(table)
    if found["report"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("report", "a", "b"):
            table.add_column(heading, overflow="fold")
        figures = dict(found["report"])
        refused = figures.pop("not_compared")
        for key, (a, b) in figures.items():
            table.add_row(key, _cell(a), _cell(b))
        console.print(table)
        for key, reason in refused.items():
            console.print(f"{key} is not compared: {reason}.", soft_wrap=True)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
