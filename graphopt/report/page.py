"""`report.html`: the report as one page without any outside reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from graphopt.report.columns import columns
from graphopt.report.evaluations import evaluations_section
from graphopt.report.pictures import (
    bar,
    facts_table,
    figure,
    legend,
    page_style,
    row,
    si,
    table,
)
from graphopt.report.quality import SLIGHT, UNCHANGED, Quality, Sample
from graphopt.report.records import ArtifactEntry, PassEntry, Report
from graphopt.report.skips import grouped_skips


def render(report: Report) -> str:
    """Return the page of a report."""
    template = resources.files("graphopt.report").joinpath("page.html").read_text(encoding="utf-8")
    busy = [entry for entry in report.passes if not entry.idle]
    idle = [entry for entry in report.passes if entry.idle]
    return Template(template).substitute(
        style=page_style(),
        title=f"{escape(report.name)} · graphopt report",
        name=escape(report.name),
        subtitle=_subtitle(report),
        verdict=_verdict(report),
        tiles=_tiles(report),
        run=_usage(report),
        evaluations=evaluations_section([]),
        recipe=escape(report.recipe) or "no passes",
        passes=(_pass_table(busy) + _idle(idle)) or '<p class="dim">The recipe has no passes.</p>',
        quality=_quality_by_pass(busy, report.probe),
        time=_times(busy),
        parameters=columns(report.blocks, "parameters"),
        flops=columns(report.blocks, "flops"),
        details="".join(_details(item) for item in report.passes),
        skipped=_skipped(report.passes, report.artifact),
        made=_made(report),
    )


def _subtitle(report: Report) -> str:
    parts = [f"from {escape(report.source)}"] if report.source else []
    if report.target:
        parts.append(f"target {escape(report.target)}")
    if report.artifact:
        parts.append("emitted as " + ", ".join(map(escape, report.artifact.emit)))
    return " · ".join(parts) or "graphopt report"


GRADE_STYLES = {
    "unchanged": "good",
    "better": "good",
    "slightly worse": "warn",
    "clearly worse": "bad",
    "destroyed": "bad",
    "not measured": "dim",
}


def _verdict(report: Report) -> str:
    """Return the card that says what became of the model's quality, with samples of text."""
    verdict, quality = report.verdict(), report.quality
    if verdict is None:
        return ""
    title, _, rest = verdict.sentence.partition(": ")
    text, samples = "", ""
    if quality is not None:
        text = f'<p class="dim small">Measured on {escape(quality.text.describe())}</p>'
        samples = _samples(quality)
    style = GRADE_STYLES[verdict.grade]
    return (
        f'<section class="card verdict line-{style}"><h2 class="{style}">{escape(title)}</h2>'
        f"<p>{escape(rest[:1].upper() + rest[1:])}</p>{text}{samples}</section>"
    )


def _samples(quality: Quality) -> str:
    if quality.not_sampled:
        return f'<p class="dim small">No samples: {escape(quality.not_sampled)}.</p>'
    parts = "".join(map(_sample, quality.samples))
    if not parts:
        return ""
    note = "The likeliest token each time, behind beginnings from that text."
    return f'<h3>What they write</h3><p class="dim small">{note}</p>{parts}'


def _sample(sample: Sample) -> str:
    rows = (("beginning", sample.prompt), ("source", sample.before), ("result", sample.after))
    return facts_table((label, " ".join(text.split())) for label, text in rows)


def _tiles(report: Report) -> str:
    passes = report.passes
    before = passes[0].parameters_before if passes else report.parameters
    after = report.parameters
    label = "parameters"
    if before != after:
        label += f" ({(after - before) / before:+.1%})"
    tiles = [(si(after), label)]
    times = None if report.quality is None else report.quality.times
    if times is not None:
        tiles.insert(0, (f"{times:.3g} ×", "the source's perplexity"))
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
    sizes = facts_table((form.name, form.describe()) for form in report.artifact.forms)
    return f'<section class="card"><h2>Run it</h2><pre>{lines}</pre>{sizes}</section>'


_NUMBERS = ("changed", "left alone", "parameters", "seconds", "peak memory")


def _pass_table(passes: Sequence[PassEntry]) -> str:
    if not passes:
        return ""
    rows: list[list[str]] = []
    for item in passes:
        changed = str(item.changed)
        if item.changed != item.matched:
            changed += f" of {item.matched}"
        style, result = _result(item)
        rows.append(
            [
                escape(item.name),
                changed,
                str(len(item.skipped) or "–"),
                _parameters(item),
                f'<span class="{style}">{escape(result)}</span>',
                f"{item.seconds:.2f}",
                si(item.peak_bytes, "B"),
            ]
        )
    headings = ("pass", *_NUMBERS[:3], "result", *_NUMBERS[3:])
    return table(headings, rows, _NUMBERS)


def _idle(passes: Sequence[PassEntry]) -> str:
    """Return the line on the passes that found nothing to do."""
    if not passes:
        return ""
    names = ", ".join(dict.fromkeys(escape(entry.name) for entry in passes))
    seconds = sum(entry.seconds + entry.verify_seconds for entry in passes)
    many = "passes" if len(passes) > 1 else "pass"
    return f'<p class="dim idle">{len(passes)} {many} did nothing: {names} ({seconds:.2f} s).</p>'


def _parameters(item: PassEntry) -> str:
    before, after = item.parameters_before, item.parameters_after
    return "–" if before == after or not before else f"{(after - before) / before:+.1%}"


def _result(item: PassEntry) -> tuple[str, str]:
    """Return the style and the words for what verification found of a pass."""
    if item.verification == "proved":
        return "good", "proved to be equal"
    if item.verification == "passed":
        return "good", f"equal within rounding, Δ logit {figure(item.max_abs_logit_delta)}"
    times = item.perplexity_times()
    if times is not None:
        return times_style(times), f"perplexity × {times:.3g}, KL {figure(item.kl)}"
    if item.kl is not None and item.verification == "measured":
        return "warn", f"KL {figure(item.kl)}"
    return "dim", item.verification


def times_style(times: float) -> str:
    """Return the style of a perplexity that is so many times another."""
    return "good" if times <= UNCHANGED else "warn" if times <= SLIGHT else "bad"


def _quality_by_pass(passes: Sequence[PassEntry], probe: Mapping[str, Any] | None) -> str:
    rows: list[str] = []
    for item in passes:
        delta, limit, times = item.max_abs_logit_delta, item.tolerance, item.perplexity_times()
        drawn: list[tuple[float, str]] = []
        if item.verification == "proved":
            text = "the same expressions as before"
        elif item.verification == "unchanged" or delta is None:
            text = item.verification
        elif limit is not None:
            share = delta / limit
            text, drawn = f"{share:.1%} of the tolerance", [(_decades(share), "delta")]
        else:
            text = f"KL {figure(item.kl)}"
            if times is not None:
                text += f", perplexity × {times:.3g}"
                drawn = [(doublings(times) / _DOUBLINGS, "ffn")]
        rows.append(row(item.name, text, bar(drawn)))
    note = "Nothing was measured."
    if probe is not None:
        what = "of text" if probe["is_text"] else f"({probe['note']})"
        note = (
            f"On {probe['tokens']} tokens {what}, which compare two programs and measure no model. "
            "Exact passes: largest change of a logit beside its tolerance, four decades wide. "
            f"Lossy passes: rise of the perplexity, {_DOUBLINGS} doublings wide."
        )
    return f'<p class="dim">{escape(note)}</p>{"".join(rows)}'


_DOUBLINGS = 5


def doublings(times: float) -> float:
    """Return how often something doubled that is so many times what it was, from 0 up to 5."""
    return min(max(math.log2(times), 0.0), float(_DOUBLINGS)) if times > 0 else 0.0


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


def _details(entry: PassEntry) -> str:
    """Return the card of what a pass tells about itself; none where it tells nothing to see."""
    card = entry.record.card() if entry.record is not None else ""
    return f'<section class="card"><h2>{escape(entry.name)}</h2>{card}</section>' if card else ""


def _skipped(passes: Sequence[PassEntry], artifact: ArtifactEntry | None) -> str:
    places = [(item.name, skip) for item in passes for skip in item.skipped]
    places += [("emission", note) for note in (artifact.notes if artifact is not None else [])]
    rows = [
        (
            escape(group.source),
            f"<code>{escape(group.where)}</code>"
            + (f" ({group.count} places)" if group.count > 1 else ""),
            escape(group.reason),
        )
        for group in grouped_skips(places)
    ]
    if not rows:
        return ""
    shown = table(("pass", "where", "reason"), rows)
    return f'<section class="card"><h2>Left alone, and why</h2>{shown}</section>'


def _made(report: Report) -> str:
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.stages.items())
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = [
        ("Command", report.command or ""),
        ("Calibration text", _calibration(report)),
        ("Licence of the source", _licence(report)),
        ("Time", stages),
        ("Versions", versions),
        ("Machine", f"{machine['system']} {machine['processor']}, {machine['cores']} cores"),
        ("Weights", report.dtype),
    ]
    return facts_table(rows)


def _calibration(report: Report) -> str:
    text = report.calibration
    if text is None:
        return ""
    written = text.self_generated_tokens
    own = f"; {written:,} tokens that the model wrote behind beginnings from it" if written else ""
    pictures = f"; {text.pictures}" if text.pictures else ""
    return f"{text.name}, SHA-256 {text.sha256[:12]}…{own}{pictures}"


def _licence(report: Report) -> str:
    files = ", ".join(report.licence_files)
    stated = report.licence or ("" if files else "the source states none")
    return " · ".join(part for part in (stated, files and f"copied: {files}") if part)
