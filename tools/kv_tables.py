"""The table of KV policies."""

from __future__ import annotations

from typing import Any

from results import markdown_table, measured_on, result_of


def kv() -> str:
    """What every KV policy does to a model on long texts."""
    texts = [_part(name, part) for name, part in sorted(result_of("kv").items(), key=_order)]
    return "\n\n".join(texts) or "Not measured yet."


def _order(item: tuple[str, dict[str, Any]]) -> tuple[int, str]:
    return item[1]["tokens"], item[0]


def _part(name: str, part: dict[str, Any]) -> str:
    """Return the table of texts of one length on one device."""
    asked, dense = part.get("needles"), part["dense"]
    rows = [["dense", "-", f"{dense['perplexity']:.3f}", "1", "1", "-", "-"]]
    if asked:
        rows[0].append(f"{dense['needles']} of {asked}")
    for run in part["runs"]:
        row = [
            f"`{run['policy']}`",
            f"{run['budget_tokens']:,}",
            f"{run['perplexity']:.3f}",
            f"{run['times_dense']:.3f}",
            f"{run['recall']:.3f}",
            f"{run['share_of_oracle']:.3f}",
            f"{run['tokens_read']:,.0f}",
        ]
        if asked:
            row.append(f"{run['needles']} of {asked}" if "needles" in run else "-")
        rows.append(row)
    head = [
        f"{part['model']}, {part['tokens']:,} tokens",
        "budget", "perplexity", "times dense", "recall", "of the best pages'", "tokens read",
    ]  # fmt: skip
    head += ["needles"] if asked else []
    about = (
        f"On {part['texts']} texts of {part['text']}, behind prompts of {part['prompt']:,} tokens."
    )
    return f"{markdown_table(head, rows)}\n\n{measured_on(part, 'torch', 'transformers')} {about}"
