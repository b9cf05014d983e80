"""Tables of methods on many models, from what tools/bench_models.py keeps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import markdown_table, measured_on, median, result_of

Part = Mapping[str, Any]
"""What is kept of one model."""


def values(part: Part, method: str, figure: str) -> list[float]:
    """Return a figure of all runs of a method, whatever their seeds."""
    return [run[figure] for run in part["runs"] if run["method"] == method and figure in run]


def not_better(part: Part, method: str) -> list[str]:
    """Return the controls of a method that it does not beat, by medians of perplexity."""
    ours = values(part, method, "times_dense")
    return [
        control
        for control in part["methods"].get(method, ())
        if ours
        and (theirs := values(part, control, "times_dense"))
        and median(ours) >= median(theirs)
    ]


def told(part: Part, method: str) -> list[str]:
    """Return what the passes of a method's runs said, each line once."""
    lines = [
        line
        for run in part["runs"]
        if run["method"] == method
        for line in run.get("said", [run[why] for why in ("refused", "failed") if why in run])
    ]
    return list(dict.fromkeys(lines))


def methods_on_models(parts: Mapping[str, Part]) -> str:
    """Return the table of methods and models: perplexity in terms of the dense model's.

    A cell is the median of a method's runs, in brackets the lowest and the highest where they
    differ; it has an asterisk where the method is no better than a control. A dash stands where it
    refuses the model.
    """
    methods = list(dict.fromkeys(name for part in parts.values() for name in part["methods"]))
    dense = [f"{part['dense']['perplexity']:.2f}" for part in parts.values()]
    rows = [
        ["perplexity of the dense model", *dense],
        ["blocks", *(str(part["blocks"]) for part in parts.values())],
    ]
    for method in methods:
        cells = []
        for part in parts.values():
            times = values(part, method, "times_dense")
            if not times:
                ends = [run for run in part["runs"] if run["method"] == method]
                failed = any("failed" in run for run in ends)
                cells.append("failed" if failed else "-" if ends else "")
                continue
            cell, low, high = (f"{value(times):.3f}" for value in (median, min, max))
            if low != high:
                cell += f" ({low} to {high})"
            cells.append(cell + (" \\*" if not_better(part, method) else ""))
        rows.append([method, *cells])
    return markdown_table(["times the dense model's perplexity", *parts], rows)


def _parts(device: str) -> dict[str, dict[str, Any]]:
    """Return what was measured on a device, by the names of models."""
    ending = f" on {device}"
    return {
        name.removesuffix(ending): part
        for name, part in result_of("models").items()
        if name.endswith(ending)
    }


def models() -> str:
    """Methods on all models, with what each device gave."""
    texts = []
    for device in ("cuda", "cpu"):
        parts = _parts(device)
        if not parts:
            continue
        texts.append(methods_on_models(parts))
        asterisks = [
            f"\\* {name}, {method}: no better than {', '.join(controls)}; the passes said: "
            f"{'; '.join(told(part, method)) or 'nothing'}."
            for name, part in parts.items()
            for method in part["methods"]
            if (controls := not_better(part, method))
        ]
        texts += asterisks
        by_settings: dict[str, list[str]] = {}
        for name, part in parts.items():
            command = part["command"].replace(f"--models {shlex.quote(name)} ", "")
            text = measured_on({**part, "command": command}, "torch", "transformers")
            text += f" {part['note']}" if "note" in part else ""
            by_settings.setdefault(text, []).append(name)
        texts += [f"{', '.join(names)}: {text}" for text, names in by_settings.items()]
    return "\n\n".join(texts) or "Not measured yet."


def models_answers() -> str:
    """PIQA of the models that know more of it than chance, beside their perplexity."""
    rows = []
    for device in ("cuda", "cpu"):
        for name, part in _parts(device).items():
            if not any("piqa" in run for run in part["runs"]):
                continue
            dense = part["dense"]
            rows.append(
                [name, "dense", f"{dense['perplexity']:.2f}", "", f"{dense['piqa']:.1%}", ""]
            )
            for method in part["methods"]:
                figures = ("perplexity", "times_dense", "piqa", "seconds")
                runs = [values(part, method, figure) for figure in figures]
                if all(runs):
                    forms = ("{:.2f}", "{:.3f}", "{:.1%}", "{:.0f}")
                    cells = [
                        form.format(median(run)) for form, run in zip(forms, runs, strict=True)
                    ]
                    rows.append([name, method, *cells])
    head = ["model", "method", "perplexity", "times the dense model's", "PIQA", "seconds"]
    return markdown_table(head, rows) if rows else "Not measured yet."


def models_choice() -> str:
    """The blocks that are chosen by default beside random sets, by divergence on other text."""
    rows, texts = [], []
    for part in result_of("choice").values():
        for model, ways in part["compared"].items():
            by_way = {row["way"]: row for row in ways}
            chosen = by_way["default"]["kl"]
            best, middle = (
                next(row["kl"] for way, row in by_way.items() if way.startswith(start))
                for start in ("best of", "median of")
            )
            greedy = by_way["greedy ppl, much text"]["kl"]
            sets = next(way for way in by_way if way.startswith("best of")).split()[2]
            cells = [f"{value:.3f}" for value in (chosen, best, middle, greedy)]
            rows.append([model, *cells, sets])
        texts.append(measured_on(part, "torch", "transformers"))
    head = ["model", "default", "best random set", "median random set", "greedy by perplexity",
            "random sets"]  # fmt: skip
    return "\n\n".join([markdown_table(head, rows), *texts])
