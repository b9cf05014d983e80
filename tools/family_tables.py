"""The tables of docs/families.md: what each form makes of each family of models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from results import markdown_table, measured_on, result_of


def families() -> str:
    """What each form does with each family."""
    result = result_of("families")
    forms = [
        "program", "torch", "onnx", "hf", "prune-blocks, onnx", "prune-blocks, hf",
        "carve-moe, onnx", "carve-moe, hf",
    ]  # fmt: skip
    return _verdicts(result, forms, ("torch", "transformers", "onnxruntime"))


def vision_families() -> str:
    """What each form does with each family of models that see."""
    result = dict(result_of("vision_families"))
    result["families"] = {name: [row] for name, row in result["families"].items()}
    forms = ["program", "torch", "hf"]
    forms += [f"{name}, {form}" for name in ("prune-blocks", "carve-moe") for form in forms[1:]]
    return _verdicts(result, forms, ("torch", "transformers"))


def _verdicts(result: dict[str, Any], forms: list[str], packages: Sequence[str]) -> str:
    """Return the table of a sweep, with what was refused and why.

    Args:
        result: Its families have a row a drawn config.
        forms: The columns; those that were not swept are left out.
    """
    swept = {form for drawn in result["families"].values() for r in drawn for form in r["verdicts"]}
    forms = [form for form in forms if {form, form.split(",")[0]} & swept]
    reasons: dict[str, int] = {}
    rows = []
    for name, drawn in result["families"].items():
        found: dict[str, str] = {}
        for row in drawn:
            for form, text in row["verdicts"].items():
                if found.get(form, "right") == "right":
                    found[form] = text
        both_ways = any(not row.get("causal", True) for row in drawn)
        cells = [f"{name} (sees both ways)" if both_ways else name]
        for form in forms:
            whole = form.split(",")[0]
            text = found["capture"] if found["capture"] != "right" else found.get(
                form, found.get(whole, "")
            )  # fmt: skip
            if text in ("right", ""):
                cells.append(text)
            elif text.startswith("!"):
                cells.append("**wrong**")
            else:
                text = _one_line(text)
                cells.append(f"[{reasons.setdefault(text, len(reasons) + 1)}]")
        rows.append(cells)
    notes = "\n".join(f"{number}. {text}" for text, number in reasons.items())
    refused = f"Refused because:\n\n{notes}\n\n" if notes else ""
    return (
        f"{markdown_table(['family', *forms], rows)}\n\n{refused}"
        f"{measured_on(result, *packages)} {result.get('note', '')}".rstrip()
    )


def _one_line(text: str) -> str:
    """Return a refusal in one line, shortened."""
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return text if len(text) <= 160 else text[:157].rsplit(" ", 1)[0] + " ..."
