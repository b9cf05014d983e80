"""Draw the two figures of a study of memory in training, from benchmarks/memory_paper.json.

    python tools/memory_figures.py [--to docs/pictures]

memory-outliers.svg shows intervals between accesses by the size of the block, with the line above
which it does not get to the host and back in time; memory-breakdown.svg shows what memory at the
peak is for, by batch size.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import ROOT, result_of

WIDTH, PANEL, HIGH, COLUMNS = 1060, 250, 200, 4
KINDS = {"input": "#0f8a99", "parameter": "#8391a1", "intermediate": "#1d73b9", "end": "#c97a05"}
STUDY = (6.4e9, 6.3e9)
"""Bytes a second out and in, of the study's copies."""


def bytes_text(size: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size:.0f} B"


def time_text(nanoseconds: float) -> str:
    for limit, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if nanoseconds >= limit:
            return f"{nanoseconds / limit:.3g} {unit}"
    return f"{nanoseconds:.0f} ns"


def text(x: float, y: float, what: str, style: str = "", anchor: str = "start") -> str:
    chosen = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{chosen}>{escape(what)}</text>'


def picture(panels: Sequence[str], label: str, below: str) -> str:
    """Return panels in rows as an SVG, with a line of text under them."""
    rows = -(-len(panels) // COLUMNS)
    height = rows * HIGH + 34
    placed = "".join(
        f'<g transform="translate({15 + n % COLUMNS * (PANEL + 10)},{n // COLUMNS * HIGH})">{p}</g>'
        for n, p in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" role="img" '
        f'aria-label="{escape(label)}">\n<style>.name{{font-weight:bold;font-size:13px}}'
        "text{fill:#1d2733}.dim{fill:#5b6b7b}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n{placed}\n'
        f'<g transform="translate(15,{height - 14})">{below}</g>\n</svg>\n'
    )


def log_scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """Return where a value lies on a logarithmic axis, held within its ends."""

    def place(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return start + min(share, 1.0) * (stop - start)

    return place


def outliers(run: dict[str, Any]) -> str:
    """Return the panel of one model's intervals and sizes."""
    x = log_scale(1e3, 3e9, 40, PANEL - 6)
    y = log_scale(10, 3e9, HIGH - 38, 26)
    parts = [text(40, 16, f"{run['model']}, {run['data']}, batch {run['batch']}", "name")]
    for power in (4, 6, 8):
        at = x(10.0**power)
        parts.append(f'<path d="M{at:.1f} 24V{HIGH - 38}" stroke="#e2e5ea"/>')
        parts.append(text(at, HIGH - 24, time_text(10.0**power), "dim", "middle"))
    for power in (3, 6, 9):
        at = y(10.0**power)
        parts.append(f'<path d="M40 {at:.1f}H{PANEL - 6}" stroke="#e2e5ea"/>')
        parts.append(text(36, at + 4, bytes_text(10.0**power), "dim", "end"))
    fits, not_fits = [], []
    for gap, size in run["points"]:
        hidden = gap / 1e9 / (1 / STUDY[0] + 1 / STUDY[1])
        (fits if size <= hidden else not_fits).append((x(gap), y(size)))
    for places, colour in ((not_fits, "#8391a1"), (fits, "#c97a05")):
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
        parts.append(
            f'<path d="{dots}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        )
    line = [(g, g / 1e9 / (1 / STUDY[0] + 1 / STUDY[1])) for g in (1e3 * 1.3**n for n in range(57))]
    points = " ".join(f"{x(g):.1f},{y(s):.1f}" for g, s in line if 10 <= s <= 3e9)
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="#b3261e" stroke-dasharray="5 3"/>'
    )
    return "".join(parts)


def breakdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the panel of one model's memory by batch size."""
    first = rows[0]
    data = "" if first["model"] == "MLP" else f", {first['data']}"
    parts = [text(4, 16, f"{first['model']}{data}", "name")]
    wide = (PANEL - 10) / len(rows)
    top, low = 26, HIGH - 52
    for n, row in enumerate(rows):
        at, total = 4 + n * wide, sum(row["by_kind"].values())
        y = float(low)
        for kind, colour in KINDS.items():
            tall = row["by_kind"].get(kind, 0) / total * (low - top)
            y -= tall
            parts.append(
                f'<rect x="{at + 1:.1f}" y="{y:.2f}" width="{wide - 2:.1f}" height="{tall:.2f}" '
                f'fill="{colour}"/>'
            )
        middle = at + wide / 2
        batch = row["batch"]
        shown = f"{batch // 2**10}k" if batch >= 2**13 else str(batch)
        parts.append(text(middle, low + 13, shown, "", "middle"))
        share = row["by_kind"].get("intermediate", 0) / total
        parts.append(text(middle, low + 26, f"{share:.0%}", "dim", "middle"))
        number, unit = bytes_text(row["peak_bytes"]).split()
        parts.append(text(middle, low + 38, f"{float(number):.3g}{unit[0]}", "dim", "middle"))
    return "".join(parts)


def key(entries: Sequence[tuple[str, str]], note: str) -> str:
    """Return the meaning of colours, and a note behind it."""
    parts, at = [], 0.0
    for colour, label in entries:
        parts.append(f'<rect x="{at:.0f}" y="-9" width="10" height="10" fill="{colour}"/>')
        parts.append(text(at + 14, 0, label))
        at += 28 + 6.2 * len(label)
    return "".join([*parts, text(at, 0, note, "dim")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "pictures")
    arguments = parser.parse_args()
    found = result_of("memory_paper")
    measured = found.get("patterns on cuda") or found["patterns on cpu"]
    clock = measured["runs"][0]["clock"]
    below = key(
        [("#c97a05", "gets to the host and back in time"), ("#8391a1", "does not"),
         ("#b3261e", "6.4 and 6.3 GB/s")],
        f"from left to right: time between accesses ({clock}); from bottom to top: block",
    )  # fmt: skip
    label = "Intervals between accesses by size of the block, for the models of the study"
    drawn = picture([outliers(run) for run in measured["runs"]], label, below)
    (arguments.to / "memory-outliers.svg").write_text(drawn, encoding="utf-8")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["breakdown on cpu"]["rows"]:
        groups.setdefault((row["model"], row["data"]), []).append(row)
    below = key(
        [(colour, kind) for kind, colour in KINDS.items()],
        "under each bar: batch, share of intermediates, bytes at the peak (B, k, M, G)",
    )
    label = "What memory at the peak is for, by batch size, for the models of the study"
    drawn = picture([breakdown(rows) for rows in groups.values()], label, below)
    (arguments.to / "memory-breakdown.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
