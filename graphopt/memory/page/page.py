"""The page of a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from graphopt.memory.analysis.recompute import Recompute
from graphopt.memory.analysis.summary import SHORT_NS, SHOWN, Summary
from graphopt.memory.analysis.swap import Candidate, has_times
from graphopt.memory.analysis.target import Choice
from graphopt.memory.page.drawing import drawn
from graphopt.report.pictures import bar, facts_table, legend, page_style, row, table
from graphopt.support.quantities import format_bytes

T = TypeVar("T", Candidate, Recompute)


def render(summary: Summary, offsets: npt.NDArray[np.int64] | None = None) -> str:
    """Return the page of a summary.

    Args:
        offsets: Planned place of each instance, int64 [instances], -1 where it has none; None
            where no plan was made.
    """
    folder = resources.files("graphopt.memory.page")
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    picture = drawn(summary, offsets)
    trace = summary.trace
    placed = (
        "Places are those of a plan, which puts no two blocks that are alive at once over each "
        "other."
        if offsets is not None
        else "No plan was made: blocks are stacked in order of their allocation."
    )
    peak = f"Peak {format_bytes(summary.peak)} at {_operation(summary)}."
    return Template(template).substitute(
        style=page_style(),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
        # Neither the end of a script's tag nor the beginning of a comment may stand in one.
        data=json.dumps(picture.data, separators=(",", ":")).replace("<", "\\u003c"),
        title=f"{escape(summary.title)} · graphopt memory",
        name=escape(summary.title),
        subtitle=escape(_subtitle(summary)),
        notes=_notes(summary),
        tiles=_tiles(summary),
        placed=placed,
        gantt_label=escape(
            f"Blocks of memory over time: {len(trace.instances):,} blocks. {peak} The table of "
            "candidates below has the blocks that matter most."
        ),
        curve_label=escape(f"Bytes alive over time by category. {peak}"),
        legend=legend([(f"c-{name}", name) for name in summary.by_category]),
        left_out="".join(f'<p class="dim small">{escape(s)}</p>' for s in picture.left_out),
        interval_text=escape(_interval_text(summary)),
        cdf_label=escape(f"Distribution of intervals between accesses. {_interval_text(summary)}"),
        swap_text=escape(_swap_text(summary)),
        scatter_label=escape(f"Intervals by size of the block. {_swap_text(summary)}"),
        choices=_choices(summary),
        candidates=_candidates(summary),
        made=facts_table(_facts(summary)),
    )


def _operation(summary: Summary) -> str:
    return summary.peak_operation() or "no operation"


def _subtitle(summary: Summary) -> str:
    trace = summary.trace
    return " · ".join(
        [
            *summary.said.values(),
            f"{len(trace):,} events of {len(trace.instances):,} blocks",
            f"clock: {trace.clock}",
        ]
    )


def _notes(summary: Summary) -> str:
    """Return the card on what is not known, first where the run failed midway."""
    trace = summary.trace
    parts = list(trace.notes)
    if not trace.complete:
        parts.insert(0, "The run did not end, or not every event was kept: what follows is a part.")
    if not parts:
        return ""
    style = "warn" if trace.complete else "bad"
    shown = "".join(f"<p>{escape(part)}</p>" for part in parts)
    return (
        f'<section class="card verdict line-{style}"><h2 class="{style}">What to know</h2>{shown}'
        "</section>"
    )


def _tiles(summary: Summary) -> str:
    tiles = [
        (_digits(summary.peak), "most bytes alive"),
        (_digits(summary.rounded_peak), "the same, sizes rounded up to 512: the bound"),
    ]
    if summary.planned is not None:
        over = summary.planned / summary.rounded_peak if summary.rounded_peak else 1.0
        tiles.append((_digits(summary.planned), f"planned arena: {over:.4f} × the bound"))
    if summary.allocator is not None:
        share = summary.allocator.idle_share
        tiles.append(
            (
                format_bytes(summary.allocator.reserved),
                f"reserved by the allocator, {share:.1%} idle",
            )
        )
    repeats = summary.period or summary.grows
    changing = "" if summary.grows is None else " of operations, whose sizes change"
    tiles.append(("none" if repeats is None else f"{repeats.events:,} events", f"period{changing}"))
    cells = [
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in tiles
    ]
    rows = [
        row(
            category,
            f"{format_bytes(size)}, {size / summary.peak:.1%}",
            bar([(size / summary.peak, f"c-{category}")]),
        )
        for category, size in sorted(summary.by_category.items(), key=lambda item: -item[1])
    ]
    shares = f'<section class="card"><h2>At the peak</h2>{"".join(rows)}</section>' if rows else ""
    return f'<div class="tiles">{"".join(cells)}</div>{shares}'


def _digits(size: int) -> str:
    """Return bytes with so many digits that figures near each other are told apart."""
    text = format_bytes(size)
    _number, _, unit = text.partition(" ")
    factor = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}.get(unit)
    return text if factor is None else f"{size / factor:#.5g} {unit}"


def _interval_text(summary: Summary) -> str:
    found = summary.intervals
    if not len(found):
        return "No block is accessed twice."
    median, most, _, longest = summary.intervals.quantiles()
    repeats = summary.period or summary.grows
    scope = "of one period" if repeats is not None else "of the whole trace"
    text = (
        f"{len(found):,} intervals between accesses of one block, {scope}: half are at most "
        f"{summary.time(median)}, nine tenths {summary.time(most)}, the longest "
        f"{summary.time(longest)}."
    )
    if has_times(summary.trace):
        text += f" {found.share_below(SHORT_NS):.1%} are no longer than 25 us."
    return text


def _swap_text(summary: Summary) -> str:
    if not has_times(summary.trace):
        return "The clock counts operations: no copy can be timed against it."
    over = sum(c.over_peak for c in summary.swaps)
    return (
        f"Above the dashed line a block does not get to the host and back in time: "
        f"{summary.link.describe()}. {len(summary.swaps):,} of {len(summary.intervals):,} "
        f"intervals suffice, {over:,} of them over the peak."
    )


def _choices(summary: Summary) -> str:
    reached = summary.reached
    if reached is None:
        return ""
    verdict = (
        f"Reached: {format_bytes(reached.after)}, from {format_bytes(reached.before)}."
        if not reached.left
        else f"Not reached: {format_bytes(reached.after)}, from {format_bytes(reached.before)}; "
        f"{reached.left}."
    )
    alike: dict[tuple[str, str], list[Choice]] = {}
    for choice in reached.choices:
        alike.setdefault((choice.how, summary.label(choice.instance)), []).append(choice)
    rows = [
        [
            escape(how),
            escape(label) + (f" × {len(made):,}" if len(made) > 1 else ""),
            format_bytes(sum(choice.size for choice in made)),
            escape(summary.time(cost)) if (cost := sum(c.cost for c in made)) else "none",
            format_bytes(made[-1].peak),
        ]
        for (how, label), made in alike.items()
    ]
    heads = ("choice", "block", "size", "costs", "peak then")
    shown = table(heads, rows, ("size", "costs", "peak then")) if rows else ""
    note = (
        '<p class="dim">Each choice was made with those before; alike ones are one row, with the '
        "peak behind the last of them.</p>"
        if rows
        else ""
    )
    return (
        f'<section class="card"><h2>To get down to {format_bytes(reached.target)}</h2>'
        f"<p>{escape(verdict)}</p>{note}{shown}</section>"
    )


def _candidates(summary: Summary) -> str:
    parts: list[str] = []
    swaps = _alike(summary, summary.swaps)
    if swaps:
        rows = [
            [
                _times(summary, c.instance, count),
                format_bytes(c.size),
                escape(summary.time(c.gap)),
                escape(summary.time(c.trip)),
                "yes" if c.over_peak else "no",
            ]
            for c, count in swaps[:SHOWN]
        ]
        heads = ("block", "size", "untouched", "both copies", "over peak")
        parts.append(_card("Could wait on the host", heads, rows, len(swaps)))
    drops = _alike(summary, summary.recomputes)
    if drops:
        rows = [
            [
                _times(summary, r.instance, count),
                format_bytes(r.size),
                escape(summary.time(r.cost)),
                str(len(r.chain)),
                format_bytes(r.extra) if r.extra else "–",
            ]
            for r, count in drops[:SHOWN]
        ]
        heads = ("block", "size", "costs", "operations", "extra")
        parts.append(_card("Could be computed again", heads, rows, len(drops)))
    return "".join(parts)


def _alike(summary: Summary, candidates: Sequence[T]) -> list[tuple[T, int]]:
    """Return the first candidate of each label, and how many there are."""
    first: dict[str, T] = {}
    counts: Counter[str] = Counter()
    for candidate in candidates:
        label = summary.label(candidate.instance)
        first.setdefault(label, candidate)
        counts[label] += 1
    return [(candidate, counts[label]) for label, candidate in first.items()]


def _times(summary: Summary, instance: int, count: int) -> str:
    label = escape(summary.label(instance))
    return label if count == 1 else f"{label} × {count:,}"


def _card(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], kinds: int) -> str:
    more = f" The first {len(rows)} of {kinds:,} kinds." if kinds > len(rows) else ""
    note = f'<p class="dim">Of intervals that are alike, the best is shown.{more}</p>'
    shown = table(heads, rows, heads[1:])
    return f'<section class="card"><h2>{title}</h2>{note}{shown}</section>'


def _facts(summary: Summary) -> list[tuple[str, str]]:
    trace = summary.trace
    return [
        *(
            ("Length" if name == "seq" else name.capitalize(), said)
            for name, said in summary.said.items()
        ),
        ("Clock", trace.clock),
        ("Period", summary.period_sentence()),
        ("Peak", f"behind event {summary.peak_event:,}, {_operation(summary)}"),
        ("Link", summary.link.describe()),
    ]
