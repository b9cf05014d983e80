"""The table of a recipe's passes: what each found, changed and cost, and what it left alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from graphopt.cli.console import format_figure, print_rows
from graphopt.report.skips import grouped_skips
from graphopt.support.quantities import format_bytes

if TYPE_CHECKING:
    from graphopt.report.records import PassEntry


def pass_table(entries: Sequence[PassEntry], width: int) -> Table:
    """Return the table of passes for so many columns.

    Where its rows do not fit them, names wrap at their hyphens, figures stay whole, and what is
    said below the table, or in the report, is left out.
    """
    table = _pass_table(entries, narrow=False)
    fits = Console(width=10 * width, markup=False).measure(table).maximum <= width
    return table if fits else _pass_table(entries, narrow=True)


def _pass_table(entries: Sequence[PassEntry], *, narrow: bool) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 1), collapse_padding=narrow, header_style="bold"
    )
    table.add_column("pass", no_wrap=True)
    for heading in ("matched", "changed", "skipped", "params", "max |Δlogit|", "KL", "×ppl",
                    "seconds", "peak"):  # fmt: skip
        if not narrow or heading not in ("skipped", "peak"):
            title = heading.replace(" ", "\n") if narrow else heading
            table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        name = entry.name + (" (resumed)" if entry.resumed else "")
        parameters = _parameters(entry)
        cells = [
            "\n".join(textwrap.wrap(name, 24)) if narrow else name,
            str(entry.matched),
            str(entry.changed),
            str(len(entry.skipped)),
            parameters.replace(" ", "\n") if narrow else parameters,
            _delta(entry),
            format_figure(entry.kl, 2),
            _times(entry.perplexity_times()),
            f"{entry.seconds + entry.verify_seconds:.1f}",
            format_bytes(entry.peak_bytes).replace(" ", "") if entry.peak_bytes else "-",
        ]
        table.add_row(*(cells[:3] + cells[4:-1] if narrow else cells))
    return table


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.3g}"


def _delta(entry: PassEntry) -> str:
    if entry.verification in ("unchanged", "proved"):
        return "same"
    return format_figure(entry.max_abs_logit_delta, 2)


def _verdict(entries: list[PassEntry]) -> str:
    """Return one line on what verification found."""
    kinds = [entry.verification for entry in entries]
    if set(kinds) == {"off"}:
        return f"none of {len(kinds)}"
    parts: list[str] = []
    for kind, text in (
        ("proved", "{} proved"),
        ("passed", "{} within tolerance"),
        ("measured", "{} lossy, measured"),
        ("unchanged", "{} changed nothing"),
        ("off", "{} not verified"),
        ("planned", "none of {}: nothing was run on weights"),
    ):
        if kind in kinds:
            parts.append(text.format(kinds.count(kind)))
            kinds = [other for other in kinds if other != kind]
    return ", ".join([*parts, *sorted(set(kinds))])


def _parameters(entry: PassEntry) -> str:
    from graphopt.ir.printer import format_count

    before, after = entry.parameters_before, entry.parameters_after
    if before == after or before == 0:
        return format_count(after)
    return f"{format_count(after)} ({(after - before) / before:+.1%})"


def print_passes(console: Console, entries: list[PassEntry]) -> None:
    """Print the table of passes, and under it what they did on the way and left alone, and why."""
    if not entries:
        console.print("The recipe has no passes.", style="dim")
        return
    console.print(pass_table(entries, console.width))
    print_rows(console, [("verified", _verdict(entries))])
    for entry in entries:
        line = entry.record.line() if entry.record is not None else ""
        if line:
            console.print(f"  {entry.name} {line}", soft_wrap=True)
        for group in grouped_skips((entry.name, skip) for skip in entry.skipped):
            places = f" ({group.count} places)" if group.count > 1 else ""
            console.print(
                f"  {entry.name} skipped {group.where}{places}: {group.reason}", soft_wrap=True
            )
