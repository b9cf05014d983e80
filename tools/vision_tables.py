"""The table of docs/vision.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from results import markdown_table, measured_on, median, result_of

_SCORES = {"kl": "`prune-blocks`", "mi": "FuseGPT's score"}
_MODES = {
    "distil": "`fuse-blocks`",
    "published": "`mode=published`",
    "published, random donor": "`mode=published,donor=random`",
}
_MEASURED = {"pictures": "given pictures", "text": "alone"}


def _times(part: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return how many times the whole model's perplexities those of runs are."""
    return {name: [run[name] / part["whole"][name] for run in runs] for name in _MEASURED}


def _of(part: dict[str, Any], kind: str, **wanted: str) -> list[dict[str, Any]]:
    return [
        run
        for run in part["runs"]
        if run["kind"] == kind and all(run[name] == value for name, value in wanted.items())
    ]


def _range(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _ranked(part: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Return the figures of a choice, and which they are among those of random removals."""
    drawn, cells = _of(part, "removed"), []
    for name, (value,) in _times(part, [run]).items():
        better = sum(other[name] < run[name] for other in drawn)
        cells.append(f"{value:.3f} (no. {better + 1} of {len(drawn)})")
    return cells


def _single(part: dict[str, Any], run: dict[str, Any]) -> list[str]:
    return [f"{value:.3f}" for (value,) in _times(part, [run]).values()]


def vision() -> str:
    """What passes do to captions of small models, given their pictures and alone."""
    parts = [part for name, part in sorted(result_of("vision").items()) if "shapes" in name]
    first = parts[0]
    rows = [["the whole model, perplexity", ""]]
    rows += [["random removal, median (and range)", ""]]
    columns = [
        [f"{part['whole'][name]:.3f}" for part in parts for name in _MEASURED],
        [_range(v) for part in parts for v in _times(part, _of(part, "removed")).values()],
    ]
    for run in _of(first, "chosen"):
        same = {"how": run["how"], "learnt_from": run["learnt_from"]}
        rows.append([f"chosen by {_SCORES[run['how']]}", run["learnt_from"]])
        columns.append([c for part in parts for c in _ranked(part, *_of(part, "chosen", **same))])
    for run in _of(first, "trained"):
        same = {"how": run["how"], "learnt_from": run["learnt_from"]}
        rows.append([f"trained by {_MODES[run['how']]}", run["learnt_from"]])
        columns.append([c for part in parts for c in _single(part, *_of(part, "trained", **same))])
    rows.append(["random removal, trained by `fuse-blocks`", "text and pictures"])
    columns.append(
        [_range(v) for p in parts for v in _times(p, _of(p, "trained at random")).values()]
    )
    head = ["", "learnt from"]
    head += [f"{what}, model {n}" for n in range(1, len(parts) + 1) for what in _MEASURED.values()]
    table = markdown_table(head, [row + cells for row, cells in zip(rows, columns, strict=True)])
    drawn, trained = _of(first, "removed"), _of(first, "trained at random")
    note = (
        f"How many times the whole model's perplexity of captions. {first['removed']} of "
        f"{first['blocks']} blocks are taken out, {len(drawn)} sets of them at random, of which "
        f"{len(trained)} are trained; training has {first['fuse_steps']} steps, on what is left "
        "without the blocks that `prune-blocks` chose by text and pictures."
    )
    said = "\n\n".join(measured_on(part, "torch", "transformers") for part in parts)
    return f"{table}\n\n{said}\n\n{note}"
