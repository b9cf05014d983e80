"""`report.html`: the report as one page without any outside reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from graphopt.report.breakdown import PARTS
from graphopt.report.records import is_figure, perplexity_steps, removal_order

_LABELS = {"embed": "embedding", "ffn": "feed-forward", "norm": "norms"}


def render(report: Mapping[str, Any]) -> str:
    """Return the page for the content of a `report.json`."""
    template = resources.files("graphopt.report").joinpath("page.html").read_text(encoding="utf-8")
    passes: list[dict[str, Any]] = report["passes"]
    blocks: list[dict[str, Any]] = report["blocks"]
    return Template(template).substitute(
        title=f"{escape(report['name'])} · graphopt report",
        name=escape(report["name"]),
        subtitle=_subtitle(report),
        tiles=_tiles(report),
        run=_usage(report),
        recipe=escape(report["recipe"]) or "no passes",
        passes=_pass_table(passes),
        quality=_quality(passes, report["probe"]),
        time=_times(passes),
        parameters=_columns(blocks, "parameters"),
        flops=_columns(blocks, "flops"),
        details="".join(_details(item) for item in passes),
        skipped=_skipped(passes, report["artifact"]),
        made=_made(report),
    )


def si(value: float, unit: str = "") -> str:
    """Return a number with three digits and a metric prefix: 134.5 M."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _subtitle(report: Mapping[str, Any]) -> str:
    parts = [f"from {escape(report['source'])}"] if report["source"] else []
    if report["target"]:
        parts.append(f"target {escape(report['target'])}")
    if report["artifact"]:
        parts.append("emitted as " + ", ".join(map(escape, report["artifact"]["emit"])))
    return " · ".join(parts) or "graphopt report"


def _tiles(report: Mapping[str, Any]) -> str:
    passes = report["passes"]
    before = passes[0]["parameters_before"] if passes else report["parameters"]
    after = report["parameters"]
    label = "parameters"
    if before != after:
        label += f" ({(after - before) / before:+.1%})"
    tiles = [(si(after), label)]
    figures = ("perplexity_before", "perplexity_after")
    measured = [p for p in passes if all(p[figure] is not None for figure in figures)]
    if measured:
        old, new = measured[0]["perplexity_before"], measured[-1]["perplexity_after"]
        change = "unchanged" if f"{old:.2f}" == f"{new:.2f}" else f"from {old:.2f}"
        tiles.append((f"{new:.2f}", f"probe perplexity, {change}"))
    tiles.append((f"{report['total_seconds']:.1f} s", "total time"))
    tiles.append((si(report["peak_bytes"], "B"), "peak memory"))
    if report["artifact"]:
        tiles.append((si(report["artifact"]["bytes"], "B"), "artifact"))
    cells = [
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _usage(report: Mapping[str, Any]) -> str:
    if not report["artifact"] or not report["artifact"]["usage"]:
        return ""
    lines = escape("\n".join(report["artifact"]["usage"]))
    return f'<section class="card"><h2>Run it</h2><pre>{lines}</pre></section>'


_COLUMNS = (
    "matched", "changed", "skipped", "parameters", "max |Δ logit|", "KL", "perplexity",
    "seconds", "peak memory",
)  # fmt: skip


def _pass_table(passes: Sequence[Mapping[str, Any]]) -> str:
    if not passes:
        return '<p class="dim">The recipe has no passes.</p>'
    head = "".join(f'<th class="n">{name}</th>' for name in _COLUMNS)
    rows: list[str] = []
    for item in passes:
        cells = (
            item["matched"],
            item["changed"],
            len(item["skipped"]),
            _parameters(item),
            _figure(item["max_abs_logit_delta"]),
            _figure(item["kl"]),
            _perplexity(item),
            f"{item['seconds']:.2f}",
            si(item["peak_bytes"], "B"),
        )
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(item['name'])}</td>{numbers}<td>{_verdict(item)}</td></tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>pass</th>{head}<th>verified</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _parameters(item: Mapping[str, Any]) -> str:
    before, after = item["parameters_before"], item["parameters_after"]
    return "–" if before == after or not before else f"{(after - before) / before:+.1%}"


def _perplexity(item: Mapping[str, Any]) -> str:
    before, after = item["perplexity_before"], item["perplexity_after"]
    if before is None or after is None:
        return "–"
    if f"{before:.2f}" == f"{after:.2f}":
        return f"{after:.2f}"
    return f"{before:.2f} → {after:.2f}"


def _verdict(item: Mapping[str, Any]) -> str:
    style = {"proved": "good", "passed": "good", "measured": "warn"}.get(
        item["verification"], "dim"
    )
    return f'<span class="{style}">{escape(item["verification"])}</span>'


def _bar(parts: Iterable[tuple[float, str]]) -> str:
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


def _row(label: str, figure: str, bar: str) -> str:
    return (
        f'<div class="row"><div><span>{escape(label)}</span><span class="dim">{escape(figure)}'
        f"</span></div>{bar}</div>"
    )


def _quality(passes: Sequence[Mapping[str, Any]], probe: Mapping[str, Any] | None) -> str:
    rows: list[str] = []
    for item in passes:
        delta, limit = item["max_abs_logit_delta"], item["tolerance"]
        if item["verification"] == "unchanged":
            rows.append(_row(item["name"], "program unchanged", _bar([])))
        elif item["verification"] == "proved":
            rows.append(_row(item["name"], "the same expressions as before", _bar([])))
        elif delta is None:
            rows.append(_row(item["name"], item["verification"], _bar([])))
        elif limit is not None:
            share = delta / limit
            rows.append(
                _row(
                    item["name"],
                    f"Δ logit {_figure(delta)}, {share:.1%} of the tolerance",
                    _bar([(_decades(share), "delta")]),
                )
            )
        else:
            old, new = item["perplexity_before"], item["perplexity_after"]
            figure = f"KL {_figure(item['kl'])}"
            share = 0.0
            if old and new:
                figure += f", perplexity {old:.2f} → {new:.2f}"
                share = min(max(new / old - 1, 0.0), 1.0)
            rows.append(_row(item["name"], figure, _bar([(share, "ffn")])))
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


def _times(passes: Sequence[Mapping[str, Any]]) -> str:
    longest = max((p["seconds"] + p["verify_seconds"] for p in passes), default=0.0) or 1.0
    rows = [
        _row(
            item["name"],
            f"{item['seconds']:.2f} s + {item['verify_seconds']:.2f} s",
            _bar(
                [(item["seconds"] / longest, "time"), (item["verify_seconds"] / longest, "check")]
            ),
        )
        for item in passes
    ]
    legend = _legend([("bg-time", "the pass"), ("bg-check", "verifying it")])
    return f'<p class="dim">Seconds of wall time.</p>{"".join(rows)}{legend}'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = [f'<span><i class="{style}"></i>{escape(label)}</span>' for style, label in entries]
    return f'<div class="legend">{"".join(items)}</div>'


def _columns(blocks: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return stacked columns, one a call in order, and the totals of the parts."""
    totals = {part: sum(block[kind].get(part, 0) for block in blocks) for part in PARTS}
    total = sum(totals.values())
    if not total:
        return '<p class="dim">None.</p>'
    highest = max(sum(block[kind].values()) for block in blocks)
    rects: list[str] = []
    for index, block in enumerate(blocks):
        top = 100.0
        for part in PARTS:
            count = block[kind].get(part, 0)
            if not count:
                continue
            height = 100 * count / highest
            top -= height
            title = f"{block['name']}: {_LABELS.get(part, part)} {si(count)}"
            rects.append(
                f'<rect class="{part}" x="{index + 0.08:.2f}" y="{top:.3f}" width="0.84" '
                f'height="{height:.3f}"><title>{escape(title)}</title></rect>'
            )
    legend = _legend(
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
        f'<div class="axis"><span>{escape(blocks[0]["name"])}</span>'
        f"<span>{escape(blocks[-1]['name'])}</span></div>{legend}"
    )


def _details(item: Mapping[str, Any]) -> str:
    """Return the card of what a pass tells about itself; none where it tells nothing known.

    A pass's details are no contract. Whatever pass they come from, `scores`, `order`,
    `perplexity`, `training`, `controls`, `parts`, `work`, `loads`, `seconds`, `refits` and
    `tokens_per_second` have their pictures, as docs/report.md describes them; what has another
    form is left out.
    """
    details = item["details"]
    halves = [
        part
        for part in (_perplexity_rows(details), _seconds_rows(details), _controls(details))
        if part
    ]
    parts = [
        _removed(details),
        _scores(details),
        f'<div class="halves">{"".join(f"<div>{half}</div>" for half in halves)}</div>'
        if halves
        else "",
        _carved(details),
        _trainings(details),
        _facts(details),
    ]
    if not any(parts):
        return ""
    return f'<section class="card"><h2>{escape(item["name"])}</h2>{"".join(parts)}</section>'


def _records(details: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the objects of a list in the details; none where it is something else."""
    found = details.get(key)
    if not isinstance(found, list | tuple):
        return []
    return [record for record in found if isinstance(record, Mapping)]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and is_figure(value) else None


def _removed(details: Mapping[str, Any]) -> str:
    order = removal_order(details)
    return f"<p>Removed, in this order: {escape(', '.join(order))}.</p>" if order else ""


def _scores(details: Mapping[str, Any]) -> str:
    """Return a bar for each candidate's score in the first round, by their decades."""
    rounds = _records(details, "scores")
    first = {} if not rounds else {unit: _number(score) for unit, score in rounds[0].items()}
    positive = [score for score in first.values() if score is not None and score > 0]
    if not positive:
        return ""
    lowest, highest = min(positive), max(positive)
    decades = math.log(highest / lowest) or 1.0
    order = removal_order(details)
    bars: list[str] = []
    marks: list[str] = []
    for index, (unit, score) in enumerate(first.items()):
        # The lowest has a bar too, and so has what scores nothing.
        height = 4.0
        if score is not None and score > 0:
            height = 100 - 96 * math.log(highest / score) / decades
        style = "attention"
        title = [str(unit)]
        for number, scored in enumerate(rounds, 1):
            if unit in scored:
                title.append(f"round {number}: {_figure(_number(scored[unit]), 4)}")
        if unit in order:
            place = order.index(unit) + 1
            style = "ffn"
            title.append(f"removed as number {place}")
            middle = 100 * (index + 0.5) / len(first)
            marks.append(f'<span style="left:{middle:.2f}%">{place}</span>')
        bars.append(
            f"<g><title>{escape(chr(10).join(title))}</title>"
            f'<rect class="track" x="{index + 0.08:.2f}" width="0.84" height="100"/>'
            f'<rect class="{style}" x="{index + 0.08:.2f}" y="{100 - height:.2f}" width="0.84" '
            f'height="{height:.2f}"/></g>'
        )
    units = [str(unit) for unit in first]
    note = (
        f"Scores of the first round, from {_figure(lowest)} to {_figure(highest)} on a "
        "logarithmic scale."
    )
    if len(rounds) > 1:
        note += f" Point at a bar for all {len(rounds)} rounds."
    legend = _legend([("attention", "kept"), ("ffn", "removed; the number is its turn")])
    return (
        f'<p class="dim">{note}</p>'
        f'<div class="scroll"><div style="min-width:{14 * len(first)}px">'
        f'<svg class="columns low" viewBox="0 0 {len(first)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="scores by candidate">{"".join(bars)}</svg>'
        f'<div class="marks">{"".join(marks)}</div>'
        f'<div class="axis"><span>{escape(units[0])}</span><span>{escape(units[-1])}</span></div>'
        f"</div></div>{legend if order else ''}"
    )


def _perplexity_rows(details: Mapping[str, Any]) -> str:
    steps = perplexity_steps(details)
    known = [value for _, value in steps if value is not None and value > 0]
    if not known:
        return ""
    lowest = min(known)
    # A full bar is a doubling at least, so that a small rise looks small.
    full = max(math.log(max(known) / lowest), math.log(2))
    rows = [
        _row(
            what,
            "–" if value is None else f"{value:.2f}",
            _bar([(math.log(value / lowest) / full, "ffn")] if value in known else []),
        )
        for what, value in steps
    ]
    note = "Perplexity on held-out windows of the calibration text, the bar from the lowest up."
    return f'<h3>Perplexity</h3><p class="dim">{note}</p>{"".join(rows)}'


def _seconds_rows(details: Mapping[str, Any]) -> str:
    found = details.get("seconds")
    if not isinstance(found, Mapping):
        return ""
    parts = {
        str(part): seconds
        for part, value in found.items()
        if part != "all" and (seconds := _number(value)) is not None
    }
    total = _number(found.get("all")) or sum(parts.values())
    if not parts or not total:
        return ""
    rows = [
        _row(part, f"{seconds:.1f} s", _bar([(min(seconds / total, 1.0), "time")]))
        for part, seconds in parts.items()
    ]
    note = f"Of {total:.1f} s in all."
    return f'<h3>Time by part</h3><p class="dim">{note}</p>{"".join(rows)}'


def _controls(details: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{escape(str(control.get('donor', '')))}</td>"
        f'<td class="n">{_figure(_number(control.get("loss")), 4)}</td>'
        f'<td class="n">{_figure(_number(control.get("perplexity")), 4)}</td></tr>'
        for control in _records(details, "controls")
    ]
    if not rows:
        return ""
    return (
        '<h3>Control</h3><p class="dim">The same training with another donor.</p>'
        '<table><thead><tr><th>donor</th><th class="n">held-out loss</th>'
        f'<th class="n">perplexity</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


_SHARES = {
    "random": ("norm", "random experts"),
    "static": ("head", "the same neurons for every token"),
    "routed": ("ffn", "the router's experts"),
    "oracle": ("embed", "the best experts"),
}
"""Shares of energy in what became of carved parts: style and name of their lines."""


def _carved(details: Mapping[str, Any]) -> str:
    """Return a picture of the energy in the neurons that tokens do not run, block by block."""
    records = _records(details, "parts")
    found = {key: [_number(record.get(key)) for record in records] for key in _SHARES}
    known = [value for values in found.values() for value in values if value is not None]
    if len(records) < 2 or len(known) < len(_SHARES) * len(records) or max(known) <= 0:
        return ""
    highest, last = max(known), len(records) - 1
    lines, labels = [], []
    for key, (style, label) in _SHARES.items():
        values = [value or 0.0 for value in found[key]]
        places = " ".join(
            f"{100 * place / last:.2f},{39 - 38 * value / highest:.2f}"
            for place, value in enumerate(values)
        )
        lines.append(f'<polyline class="{style}" points="{places}"/>')
        labels.append((style, f"{label}, {sum(values) / len(values):.1%} on average"))
    ends = [escape(str(record.get("where", ""))) for record in (records[0], records[-1])]
    shared = [str(record.get("shared", "")) for record in records]
    pieces = f" Shared pieces of these parts: {', '.join(shared)}." if len(set(shared)) > 1 else ""
    return (
        '<h3>What tokens leave out</h3><p class="dim">Energy in the neurons that a token does not '
        f"run, as a share of all. The highest point is {highest:.1%}.{escape(pieces)}</p>"
        '<svg class="lines" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" '
        f'aria-label="energy left out by block">{"".join(lines)}</svg>'
        f'<div class="axis"><span>{ends[0]}</span><span>{ends[1]}</span></div>{_legend(labels)}'
    )


def _trainings(details: Mapping[str, Any]) -> str:
    pictures = "".join(_training(record) for record in _records(details, "training"))
    if not pictures:
        return ""
    legend = _legend([("bg-time", "training loss"), ("ffn", "held-out check")])
    return f'<h3>Training</h3><div class="pictures">{pictures}</div>{legend}'


def _training(record: Mapping[str, Any]) -> str:
    """Return a small picture of losses over steps, and what the training took."""
    losses, checks = _points(record.get("losses")), _points(record.get("checks"))
    known = [value for _, value in (*losses, *checks)]
    last = max((step for step, _ in (*losses, *checks)), default=0.0)
    picture = ""
    if last > 0:
        lowest, highest = min(known), max(known)
        span = math.log(highest / lowest) or 1.0

        def line(points: Sequence[tuple[float, float]], style: str) -> str:
            places = " ".join(
                f"{100 * step / last:.2f},{38 - 36 * math.log(value / lowest) / span:.2f}"
                for step, value in points
            )
            return f'<polyline class="{style}" points="{places}"/>'

        ends = f"loss {_figure(lowest, 3)} to {_figure(highest, 3)}, logarithmic"
        picture = (
            '<svg class="lines" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" '
            f'aria-label="loss over steps"><title>{escape(ends)}</title>'
            f"{line(losses, 'time')}{line(checks, 'ffn')}</svg>"
            f'<div class="axis"><span>step 0</span><span>{ends}</span>'
            f"<span>{last:,.0f}</span></div>"
        )
    facts: list[str] = []
    for key, unit in (("steps", "steps"), ("tokens", "tokens"), ("seconds", "s")):
        value = _number(record.get(key))
        if value is not None:
            facts.append(f"{value:.1f} s" if unit == "s" else f"{value:,.0f} {unit}")
    if len(checks) > 1:
        best = min(value for _, value in checks)
        facts.append(f"held-out loss {_figure(checks[0][1], 3)} → {_figure(best, 3)}")
    for step, rate in _points(record.get("lowered")):
        facts.append(
            f"rate at most {rate:.1e} from step {step:,.0f} on, as the one before got no further"
        )
    if record.get("stopped"):
        facts.append(f"stopped early: {record['stopped']}")
    return (
        f"<div><b>{escape(str(record.get('part', '')))}</b>"
        f'<p class="dim">{escape(", ".join(facts))}</p>{picture}</div>'
    )


def _points(pairs: Any) -> list[tuple[float, float]]:
    """Return the (step, loss) pairs that can be drawn on a logarithmic scale."""
    points: list[tuple[float, float]] = []
    for pair in pairs if isinstance(pairs, list | tuple) else []:
        if isinstance(pair, list | tuple) and len(pair) == 2:
            step, value = map(_number, pair)
            if step is not None and value is not None and value > 0:
                points.append((step, value))
    return points


def _facts(details: Mapping[str, Any]) -> str:
    """Return what is told in a sentence each."""
    facts: list[str] = []
    scoring = _number(details.get("scoring_seconds"))
    if scoring is not None:
        facts.append(f"Scoring took {scoring:.1f} s.")
    refits = _records(details, "refits")
    if refits:
        better = [refit for refit in refits if refit.get("ridge") is not None]
        fact = f"{len(better)} of {len(refits)} projections refitted in closed form"
        ends = [_number(refits[-1].get(key)) for key in ("before", "after")]
        if None not in ends:
            fact += (
                f"; relative squared error of the stream behind the last {_figure(ends[0])} → "
                f"{_figure(ends[1])}"
            )
        facts.append(fact + ".")
    own = _number(details.get("own_windows"))
    if own:
        facts.append(f"{own:,.0f} windows of text were written by the dense model.")
    facts += _work(details)
    speed = details.get("tokens_per_second")
    if isinstance(speed, list | tuple) and len(speed) == 2:
        before, after = map(_number, speed)
        if before and after:
            facts.append(
                f"A forward pass takes in {before:,.0f} → {after:,.0f} tokens a second "
                f"({after / before - 1:+.1%})."
            )
    return f'<p class="facts dim">{escape(" ".join(facts))}</p>' if facts else ""


def _work(details: Mapping[str, Any]) -> list[str]:
    """Return what a prompt takes before and after, and how evenly experts are used."""
    facts: list[str] = []
    work = details.get("work")
    for key, what in (("flops", "FLOPs in all"), ("weight_products", "products with weights")):
        found = work.get(key) if isinstance(work, Mapping) else None
        if isinstance(work, Mapping) and isinstance(found, list | tuple) and len(found) == 2:
            before, after, tokens = map(_number, (*found, work.get("tokens")))
            if before and after and tokens:
                facts.append(
                    f"A prompt of {tokens:,.0f} tokens takes {si(before)} → {si(after)} {what} "
                    f"({after / before - 1:+.1%})."
                )
    added = sum(_number(record.get("added")) or 0.0 for record in _records(details, "parts"))
    if added:
        facts.append(f"{added:,.0f} neurons of zeros were added.")
    loads = _records(details, "loads")
    for what in ("before", "after"):
        known = [load for record in loads if (load := _shares(record.get(what)))]
        if known:
            most = sum(max(load) / (sum(load) / len(load)) for load in known) / len(known)
            active = sum(map(sum, known)) / len(known)
            facts.append(
                f"{what.capitalize()} training a token runs {active:.2f} experts of a part, and "
                f"the most used one runs {most:.2f} times as often as the mean."
            )
    return facts


def _shares(values: Any) -> list[float]:
    """Return shares of tokens, if that is what a list holds and some are not 0."""
    shares = [_number(value) for value in values] if isinstance(values, list | tuple) else []
    known = [share for share in shares if share is not None]
    return known if len(known) == len(shares) and sum(known) > 0 else []


def _skipped(passes: Sequence[Mapping[str, Any]], artifact: Mapping[str, Any] | None) -> str:
    places = [(item["name"], skip) for item in passes for skip in item["skipped"]]
    places += [("emission", note) for note in (artifact or {}).get("notes", [])]
    rows = [
        f"<tr><td>{escape(name)}</td><td><code>{escape(place['where'])}</code></td>"
        f"<td>{escape(place['reason'])}</td></tr>"
        for name, place in places
    ]
    if not rows:
        return ""
    return (
        '<section class="card"><h2>Left alone, and why</h2><div class="scroll"><table><thead><tr>'
        f"<th>pass</th><th>where</th><th>reason</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div></section>"
    )


def _made(report: Mapping[str, Any]) -> str:
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["stages"].items())
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows = [
        ("Time", stages),
        ("Versions", versions),
        ("Machine", f"{machine['system']} {machine['processor']}, {machine['cores']} cores"),
        ("Weights", report["dtype"]),
    ]
    cells = "".join(
        f'<tr><td class="dim">{name}</td><td>{escape(text)}</td></tr>'
        for name, text in rows
        if text
    )
    return f"<table><tbody>{cells}</tbody></table>"
