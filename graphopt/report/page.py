"""`report.html`: the report as one page without any outside reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from graphopt.report.breakdown import PARTS
from graphopt.report.pictures import axis, bar, figure, legend, row, si
from graphopt.report.records import ArtifactEntry, BlockEntry, PassEntry, Report

_LABELS = {"embed": "embedding", "ffn": "feed-forward", "norm": "norms"}


def render(report: Report) -> str:
    """Return the page of a report."""
    template = resources.files("graphopt.report").joinpath("page.html").read_text(encoding="utf-8")
    passes, blocks = report.passes, report.blocks
    return Template(template).substitute(
        title=f"{escape(report.name)} · graphopt report",
        name=escape(report.name),
        subtitle=_subtitle(report),
        tiles=_tiles(report),
        run=_usage(report),
        recipe=escape(report.recipe) or "no passes",
        passes=_pass_table(passes),
        quality=_quality(passes, report.probe),
        time=_times(passes),
        parameters=_columns(blocks, "parameters"),
        flops=_columns(blocks, "flops"),
        details="".join(_details(item) for item in passes),
        skipped=_skipped(passes, report.artifact),
        made=_made(report),
    )


def _subtitle(report: Report) -> str:
    parts = [f"from {escape(report.source)}"] if report.source else []
    if report.target:
        parts.append(f"target {escape(report.target)}")
    if report.artifact:
        parts.append("emitted as " + ", ".join(map(escape, report.artifact.emit)))
    return " · ".join(parts) or "graphopt report"


def _tiles(report: Report) -> str:
    passes = report.passes
    before = passes[0].parameters_before if passes else report.parameters
    after = report.parameters
    label = "parameters"
    if before != after:
        label += f" ({(after - before) / before:+.1%})"
    tiles = [(si(after), label)]
    measured = [
        (entry.perplexity_before, entry.perplexity_after)
        for entry in passes
        if entry.perplexity_before is not None and entry.perplexity_after is not None
    ]
    if measured:
        old, new = measured[0][0], measured[-1][1]
        change = "unchanged" if f"{old:.2f}" == f"{new:.2f}" else f"from {old:.2f}"
        tiles.append((f"{new:.2f}", f"probe perplexity, {change}"))
    tiles.append((f"{report.total_seconds:.1f} s", "total time"))
    tiles.append((si(report.peak_bytes, "B"), "peak memory"))
    if report.artifact:
        tiles.append((si(report.artifact.bytes, "B"), "artifact"))
    cells = [
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _usage(report: Report) -> str:
    if not report.artifact or not report.artifact.usage:
        return ""
    lines = escape("\n".join(report.artifact.usage))
    return f'<section class="card"><h2>Run it</h2><pre>{lines}</pre></section>'


_COLUMNS = (
    "matched", "changed", "skipped", "parameters", "max |Δ logit|", "KL", "perplexity",
    "seconds", "peak memory",
)  # fmt: skip


def _pass_table(passes: Sequence[PassEntry]) -> str:
    if not passes:
        return '<p class="dim">The recipe has no passes.</p>'
    head = "".join(f'<th class="n">{name}</th>' for name in _COLUMNS)
    rows: list[str] = []
    for item in passes:
        cells = (
            item.matched,
            item.changed,
            len(item.skipped),
            _parameters(item),
            figure(item.max_abs_logit_delta),
            figure(item.kl),
            item.perplexity_change() or "–",
            f"{item.seconds:.2f}",
            si(item.peak_bytes, "B"),
        )
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(item.name)}</td>{numbers}<td>{_verdict(item)}</td></tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>pass</th>{head}<th>verified</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _parameters(item: PassEntry) -> str:
    before, after = item.parameters_before, item.parameters_after
    return "–" if before == after or not before else f"{(after - before) / before:+.1%}"


def _verdict(item: PassEntry) -> str:
    style = {"proved": "good", "passed": "good", "measured": "warn"}.get(item.verification, "dim")
    return f'<span class="{style}">{escape(item.verification)}</span>'


def _quality(passes: Sequence[PassEntry], probe: Mapping[str, Any] | None) -> str:
    rows: list[str] = []
    for item in passes:
        delta, limit = item.max_abs_logit_delta, item.tolerance
        if item.verification == "unchanged":
            rows.append(row(item.name, "program unchanged", bar([])))
        elif item.verification == "proved":
            rows.append(row(item.name, "the same expressions as before", bar([])))
        elif delta is None:
            rows.append(row(item.name, item.verification, bar([])))
        elif limit is not None:
            share = delta / limit
            rows.append(
                row(
                    item.name,
                    f"Δ logit {figure(delta)}, {share:.1%} of the tolerance",
                    bar([(_decades(share), "delta")]),
                )
            )
        else:
            old, new = item.perplexity_before, item.perplexity_after
            measured = f"KL {figure(item.kl)}"
            share = 0.0
            if old and new:
                measured += f", perplexity {old:.2f} → {new:.2f}"
                share = min(max(new / old - 1, 0.0), 1.0)
            rows.append(row(item.name, measured, bar([(share, "ffn")])))
    note = "Nothing was measured."
    if probe is not None:
        what = "of text" if probe["is_text"] else f"({probe['note']})"
        note = (
            f"On {probe['tokens']} tokens {what}. Exact passes: largest change of a logit beside "
            "its tolerance, four decades wide. Lossy passes: rise of the perplexity."
        )
    return f'<p class="dim">{escape(note)}</p>{"".join(rows)}'


def _decades(share: float) -> float:
    """Return where a share of the tolerance lies on four decades up to it."""
    return 0.0 if share <= 0 else min(max(1 + math.log10(share) / 4, 0.0), 1.0)


def _times(passes: Sequence[PassEntry]) -> str:
    longest = max((p.seconds + p.verify_seconds for p in passes), default=0.0) or 1.0
    rows = [
        row(
            item.name,
            f"{item.seconds:.2f} s + {item.verify_seconds:.2f} s",
            bar([(item.seconds / longest, "time"), (item.verify_seconds / longest, "check")]),
        )
        for item in passes
    ]
    colours = legend([("bg-time", "the pass"), ("bg-check", "verifying it")])
    return f'<p class="dim">Seconds of wall time.</p>{"".join(rows)}{colours}'


def _columns(blocks: Sequence[BlockEntry], kind: str) -> str:
    """Return stacked columns, one a call in order, and the totals of the parts."""
    totals = {part: sum(getattr(block, kind).get(part, 0) for block in blocks) for part in PARTS}
    total = sum(totals.values())
    if not total:
        return '<p class="dim">None.</p>'
    highest = max(sum(getattr(block, kind).values()) for block in blocks)
    rects: list[str] = []
    for index, block in enumerate(blocks):
        top = 100.0
        for part in PARTS:
            count = getattr(block, kind).get(part, 0)
            if not count:
                continue
            height = 100 * count / highest
            top -= height
            title = f"{block.name}: {_LABELS.get(part, part)} {si(count)}"
            rects.append(
                f'<rect class="{part}" x="{index + 0.08:.2f}" y="{top:.3f}" width="0.84" '
                f'height="{height:.3f}"><title>{escape(title)}</title></rect>'
            )
    colours = legend(
        (part, f"{_LABELS.get(part, part)} {si(totals[part])}, {totals[part] / total:.0%}")
        for part in PARTS
        if totals[part]
    )
    intro = f"{si(total)} in all; a column each for embedding, blocks and head."
    if kind == "flops":
        intro = f"{si(total)} for one prompt of 128 tokens; a multiply-add counts as two."
    return (
        f'<p class="dim">{intro} The highest column is {si(highest)}.</p>'
        f'<svg class="columns" viewBox="0 0 {len(blocks)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{kind} by part and block">{"".join(rects)}</svg>'
        f"{axis(blocks[0].name, blocks[-1].name)}{colours}"
    )


def _details(entry: PassEntry) -> str:
    """Return the card of what a pass tells about itself; none where it tells nothing to see."""
    card = entry.record.card() if entry.record is not None else ""
    return f'<section class="card"><h2>{escape(entry.name)}</h2>{card}</section>' if card else ""


def _skipped(passes: Sequence[PassEntry], artifact: ArtifactEntry | None) -> str:
    places = [(item.name, skip) for item in passes for skip in item.skipped]
    places += [("emission", note) for note in (artifact.notes if artifact is not None else [])]
    rows = [
        f"<tr><td>{escape(name)}</td><td><code>{escape(place.where)}</code></td>"
        f"<td>{escape(place.reason)}</td></tr>"
        for name, place in places
    ]
    if not rows:
        return ""
    return (
        '<section class="card"><h2>Left alone, and why</h2><div class="scroll"><table><thead><tr>'
        f"<th>pass</th><th>where</th><th>reason</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div></section>"
    )


def _made(report: Report) -> str:
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.stages.items())
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = [
        ("Time", stages),
        ("Versions", versions),
        ("Machine", f"{machine['system']} {machine['processor']}, {machine['cores']} cores"),
        ("Weights", report.dtype),
    ]
    cells = "".join(
        f'<tr><td class="dim">{name}</td><td>{escape(text)}</td></tr>'
        for name, text in rows
        if text
    )
    return f"<table><tbody>{cells}</tbody></table>"
