"""Parts of the page that the report and the records of passes are made of.

All return HTML whose texts are escaped. Styles are those of `style.css`: `embed`, `attention`,
`ffn`, `norm`, `head` for the parts of a model, `time` and `check` for durations.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Protocol

from graphopt.report.record import Step, finite_or_none


def page_style() -> str:
    """Return the style sheet that all pages have in common."""
    return resources.files("graphopt.report").joinpath("style.css").read_text(encoding="utf-8")


def si(value: float, unit: str = "") -> str:
    """Return a number with three digits and a metric prefix: 134.5 M."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def figure(value: float | None, digits: int = 2) -> str:
    """Return a figure with so many digits; a dash where there is none."""
    known = finite_or_none(value)
    return "–" if known is None else f"{known:.{digits}g}"


def bar(parts: Iterable[tuple[float, str]]) -> str:
    """Return one horizontal bar of stacked shares of its width."""
    rects = ['<rect class="track" width="100" height="1"/>']
    start = 0.0
    for share, style in parts:
        width = max(share * 100, 0.0)
        rects.append(f'<rect class="{style}" x="{start:.3f}" width="{width:.3f}" height="1"/>')
        start += width
    return (
        '<svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(rects)}</svg>"
    )


def row(label: str, value: str, drawn: str) -> str:
    """Return a label and a value over a bar."""
    return (
        f'<div class="row"><div><span>{escape(label)}</span><span class="dim">{escape(value)}'
        f"</span></div>{drawn}</div>"
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return the meaning of colours, given as (style, label)."""
    items = [f'<span><i class="{style}"></i>{escape(label)}</span>' for style, label in entries]
    return f'<div class="legend">{"".join(items)}</div>'


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()
) -> str:
    """Return a table whose rows become blocks of labelled lines where the page is narrow.

    Roles are stated, since what is laid out as blocks loses those of its tags.

    Args:
        rows: HTML of every cell; the first names the row.
        numbers: Headings of the columns that are aligned to the right.
    """

    def attributes(heading: str) -> str:
        return ' class="n"' if heading in numbers else ""

    head = "".join(
        f'<th scope="col" role="columnheader"{attributes(heading)}>{escape(heading)}</th>'
        for heading in headings
    )
    body = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{first}</th>'
        + "".join(
            f'<td role="cell" data-label="{escape(heading)}"{attributes(heading)}>{cell}</td>'
            for heading, cell in zip(headings[1:], cells, strict=True)
        )
        + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<table class="wide" role="table"><thead role="rowgroup"><tr role="row">{head}</tr>'
        f'</thead><tbody role="rowgroup">{body}</tbody></table>'
    )


def facts_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of labels and texts, without those that have no text."""
    cells = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(text)}</td></tr>'
        for label, text in rows
        if text
    )
    return f'<table class="facts-table"><tbody>{cells}</tbody></table>'


def halves(parts: Iterable[str]) -> str:
    """Return what there is of several parts side by side."""
    shown = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div class="halves">{shown}</div>' if shown else ""


def removed_in_order(order: Sequence[str]) -> str:
    """Return the sentence on what was removed, first to last."""
    return f"<p>Removed, in this order: {escape(', '.join(order))}.</p>" if order else ""


def sentences(facts: Sequence[str]) -> str:
    """Return a paragraph of facts that have no picture."""
    return f'<p class="facts dim">{escape(" ".join(facts))}</p>' if facts else ""


def perplexity_rows(steps: Sequence[Step]) -> str:
    """Return a bar for the perplexity after each step of a pass, from the lowest up."""
    known = [step.value for step in steps if step.value is not None and step.value > 0]
    if not known:
        return ""
    lowest = min(known)
    # A full bar is a doubling at least, so that a small rise looks small.
    full = max(math.log(max(known) / lowest), math.log(2))
    rows = [
        row(
            step.after,
            "–" if step.value is None else f"{step.value:.2f}",
            bar([(math.log(step.value / lowest) / full, "ffn")] if step.value in known else []),
        )
        for step in steps
    ]
    note = "Perplexity on held-out windows of the calibration text, the bar from the lowest up."
    return f'<h3>Perplexity</h3><p class="dim">{note}</p>{"".join(rows)}'


def seconds_rows(seconds: Mapping[str, float]) -> str:
    """Return a bar for the seconds of each part of a pass; `all` is the whole.

    What no part accounts for has a bar too: measuring before and after, mostly.
    """
    parts = {part: value for part, value in seconds.items() if part != "all"}
    total = seconds.get("all") or sum(parts.values())
    if not parts or not total:
        return ""
    rest = total - sum(parts.values())
    if rest > 0.01 * total:
        parts["all else"] = rest
    rows = [
        row(part, f"{value:.1f} s", bar([(min(value / total, 1.0), "time")]))
        for part, value in parts.items()
    ]
    note = f"Of {total:.1f} s in all."
    return f'<h3>Time by part</h3><p class="dim">{note}</p>{"".join(rows)}'


class Reconstructed(Protocol):
    """A projection that was solved for anew: a `graphopt.calibration.reconstruction` of one."""

    @property
    def before(self) -> float: ...
    @property
    def after(self) -> float: ...


def reconstruction_sentences(reconstructions: Sequence[Reconstructed]) -> list[str]:
    """Return how many projections were reconstructed, and what came of the last one."""
    if not reconstructions:
        return []
    better = [
        reconstruction
        for reconstruction in reconstructions
        if reconstruction.after < reconstruction.before
    ]
    fact = f"{len(better)} of {len(reconstructions)} projections reconstructed in closed form"
    last = reconstructions[-1]
    return [
        f"{fact}; relative squared error of the stream behind the last {figure(last.before)} → "
        f"{figure(last.after)}."
    ]


def curves(
    lines: Iterable[tuple[str, Sequence[tuple[float, float]]]],
    width: float,
    label: str,
    title: str = "",
) -> str:
    """Return lines over one axis, each as (style, points).

    Args:
        lines: Points are (x, y), with x from 0 to `width` and y from 0 at the bottom to 1.
        label: What it shows, for readers of screens.
        title: What pointing at it shows.
    """
    drawn = "".join(
        f'<polyline class="{style}" points="'
        + " ".join(f"{100 * x / width:.2f},{38 - 36 * y:.2f}" for x, y in points)
        + '"/>'
        for style, points in lines
    )
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        '<svg class="lines" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{told}{drawn}</svg>'
    )


def axis(*ends: str) -> str:
    """Return the texts under a picture, from left to right."""
    return f'<div class="axis">{"".join(f"<span>{escape(end)}</span>" for end in ends)}</div>'


def heat_map(shares: Sequence[Sequence[float]], label: str) -> str:
    """Return a picture of rows of shares, from 0, which is empty, to 1.

    It is a PNG within the page: a rectangle each would make large pages.

    Args:
        label: What it shows, for readers of screens.
    """
    colour = bytes((29, 115, 185))
    rows = b"".join(
        b"\0" + b"".join(colour + bytes((round(255 * min(max(share, 0.0), 1.0)),)) for share in row)
        for row in shares
    )
    width, height = len(shares[0]) if shares else 0, len(shares)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits of colours and alpha
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="heat" alt="{escape(label)}" src="data:image/png;base64,{data}">'
