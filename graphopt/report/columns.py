"""Parameters or FLOPs of every call as stacked columns, with a broken axis where one towers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graphopt.report.breakdown import PARTS
from graphopt.report.pictures import axis, legend, si
from graphopt.report.records import BlockEntry

LABELS = {"embed": "embedding", "ffn": "feed-forward", "norm": "norms"}

TOWERING = 2.0
"""Times the highest block that the embedding or the head may be before the axis is broken."""

_ROOM = 1.3
"""Times the highest block that a broken axis ends at."""

_GAP = (6.0, 3.0)
"""Where the gap in a cut column begins, in hundredths from the top, and how high it is."""


def columns(blocks: Sequence[BlockEntry], kind: str) -> str:
    """Return stacked columns, one a call in order, and the totals of the parts.

    Args:
        kind: "parameters" or "flops".
    """
    counts: list[dict[str, int]] = [getattr(block, kind) for block in blocks]
    heights = [sum(parts.values()) for parts in counts]
    total = sum(heights)
    if not total:
        return '<p class="dim">None.</p>'
    top = axis_end(blocks, heights)
    rects = [
        rect
        for index, (block, parts) in enumerate(zip(blocks, counts, strict=True))
        for rect in _column(index, block.name, parts, heights[index], top)
    ]
    totals = {part: sum(parts.get(part, 0) for parts in counts) for part in PARTS}
    colours = legend(
        (part, f"{LABELS.get(part, part)} {si(totals[part])}, {totals[part] / total:.0%}")
        for part in PARTS
        if totals[part]
    )
    intro = f"{si(total)} in all; a column each for embedding, blocks and head."
    if kind == "flops":
        intro = f"{si(total)} for one prompt of 128 tokens; a multiply-add counts as two."
    return (
        f'<p class="dim">{intro} {escape(_axis_sentence(blocks, heights, top))}</p>'
        f'<svg class="columns" viewBox="0 0 {len(blocks)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{kind} by part and block">{"".join(rects)}</svg>'
        f"{axis(blocks[0].name, blocks[-1].name)}{colours}"
    )


def axis_end(blocks: Sequence[BlockEntry], heights: Sequence[int]) -> float:
    """Return what the full height stands for: the highest column, or less where that towers."""
    highest = max(heights)
    of_blocks = [
        height
        for block, height in zip(blocks, heights, strict=True)
        if "attention" in block.flops or "attention" in block.parameters
    ]
    tallest = max(of_blocks, default=highest)
    return highest if highest <= TOWERING * tallest else _ROOM * tallest


def _axis_sentence(blocks: Sequence[BlockEntry], heights: Sequence[int], top: float) -> str:
    cut = [
        f"{block.name} {si(height)}"
        for block, height in zip(blocks, heights, strict=True)
        if height > top
    ]
    if not cut:
        return f"The highest column is {si(max(heights))}."
    return f"The axis ends at {si(top)}; columns with a gap are higher: {', '.join(cut)}."


def _column(index: int, name: str, parts: dict[str, int], height: int, top: float) -> list[str]:
    """Return the rectangles of one column; a cut one fills the height and has a gap."""
    cut = height > top
    scale = 100 / (height if cut else top)
    rects: list[str] = []
    y = 100.0
    for part in PARTS:
        count = parts.get(part, 0)
        if not count:
            continue
        y -= count * scale
        title = f"{name}: {LABELS.get(part, part)} {si(count)}"
        rects.append(
            f'<rect class="{part}" x="{index + 0.08:.2f}" y="{max(y, 0.0):.3f}" width="0.84" '
            f'height="{count * scale:.3f}"><title>{escape(title)}</title></rect>'
        )
    if cut:
        start, size = _GAP
        rects.append(f'<rect class="gap" x="{index}" y="{start}" width="1" height="{size}"></rect>')
    return rects
