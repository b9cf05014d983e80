"""The table of KV policies."""

from __future__ import annotations

import re
from typing import Any

from results import markdown_table, measured_on, result_of

DEFAULT_PAGE = 16
"""Tokens of a page where a policy names none, as for `graphopt eval --kv-policy`."""

CODED_TOKENS = 16
"""Tokens whose codes are as many bytes as one key and one value of 16 bits."""


def kv() -> str:
    """What every KV policy does to a model on long texts."""
    texts = [_part(name, part) for name, part in sorted(result_of("kv").items(), key=_order)]
    return "\n\n".join(texts) or "Not measured yet."


def _order(item: tuple[str, dict[str, Any]]) -> tuple[int, str]:
    return item[1]["tokens"], item[0]


def _part(name: str, part: dict[str, Any]) -> str:
    """Return the table of texts of one length on one device."""
    asked, dense = part.get("needles"), part["dense"]
    rows = [["dense", "-", f"{dense['perplexity']:.3f}", "1", "1", "-", "-", "-"]]
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
            _state_read(run, part["tokens"]),
        ]
        if asked:
            row.append(f"{run['needles']} of {asked}" if "needles" in run else "-")
        rows.append(row)
    head = [
        f"{part['model']}, {part['tokens']:,} tokens",
        "budget", "perplexity", "times dense", "recall", "of the best pages'", "tokens read",
        "state read",
    ]  # fmt: skip
    head += ["needles"] if asked else []
    about = (
        f"On {part['texts']} texts of {part['text']}, behind prompts of {part['prompt']:,} tokens."
    )
    return f"{markdown_table(head, rows)}\n\n{measured_on(part, 'torch', 'transformers')} {about}"


def _state_read(run: dict[str, Any], tokens: int) -> str:
    """Return what selecting reads of a policy's state, as so many tokens' keys and values.

    Of each page the ends of its keys' range are as much as one key and one value, and so are codes
    of 16 tokens beside keys of 16 bits; other policies read a number or none.
    """
    if run["kind"] == "key-codes":
        return f"{-(-tokens // CODED_TOKENS):,}"
    if run["kind"] not in ("quest", "page-range"):
        return "-"
    given = re.search(r"page=(\d+)", run["policy"])
    return f"{-(-tokens // int(given[1] if given else DEFAULT_PAGE)):,}"


def kv_speed() -> str:
    """How long a step takes that reads selected pages, beside one that reads all keys."""
    kernels, offload, costs = (result_of(f"kv_{name}") for name in ("kernels", "offload", "costs"))
    tables: list[str] = []
    if kernels:
        head = ["one text, a tenth of 131,072 keys", "microseconds", "all keys", "times faster"]
        rows = [
            _speed(f"pages of {row['page']}, given", row, "selected") for row in kernels["decode"]
        ]
        rows += [
            _speed(f"pages of {row['page']}, `{row['policy']}`", row, "step")
            for row in kernels["selection"]
        ]
        tables += [markdown_table(head, rows), measured_on(kernels, "torch", "triton")]
    if offload:
        names = {
            "on_device": "keys on the device, all read",
            "full": "keys on the host, all read",
            "ema": "keys on the host, `ema`",
        }
        rows = [
            [
                title,
                f"{offload[key]['tokens_a_second']:.1f}",
                f"{offload[key].get('bytes_a_token', 0) / 1e6:,.0f}",
            ]
            for key, title in names.items()
        ]
        head = [f"Llama-8B shape, {offload['context']:,} keys", "tokens a second", "MB a token"]
        tables += [markdown_table(head, rows), measured_on(offload, "torch", "triton")]
    if costs:
        right = sum(row["right"] for row in costs["verdicts"])
        tables.append(
            f"Whether a policy saves time was foretold right in {right} of "
            f"{len(costs['verdicts'])} settings. {measured_on(costs, 'torch', 'triton')}"
        )
    return "\n\n".join(tables) or "Not measured yet."


def kv_onnx() -> str:
    """What a step takes under ONNX Runtime with a policy, beside one that reads all keys."""
    tables: list[str] = []
    for part in result_of("kv_onnx").values():
        names = {"dense": "dense, caches in place", "dense, growing": "dense, caches that grow"}
        rows = [
            [
                names.get(row["graph"], f"`{row['graph']}`"),
                f"{row['milliseconds']:.1f}",
                f"{row['times_faster']:.2f} ({row['quartiles'][0]:.2f} to "
                f"{row['quartiles'][2]:.2f})",
                f"{row['one_thread']['milliseconds']:.1f}",
                f"{row['one_thread']['times_faster']:.2f}",
            ]
            for row in part["graphs"]
        ]
        head = [
            f"{part['model']}, {part['context']:,} keys, {part['budget_tokens']:,} read",
            f"milliseconds, {part['threads']} threads", "times faster",
            "milliseconds of the processor, one thread", "times faster",
        ]  # fmt: skip
        load = " to ".join(f"{each:.1f}" for each in part["load"])
        about = (
            f"Medians of {part['rounds']} rounds taken in turns, and of their ratios, with "
            f"quartiles. Other work ran beside it: a load of {load}."
        )
        tables += [markdown_table(head, rows), f"{measured_on(part, 'onnxruntime')} {about}"]
    return "\n\n".join(tables) or "Not measured yet."


def _speed(what: str, row: dict[str, Any], ours: str) -> list[str]:
    """Return a row: ours beside the fastest kernel that reads all keys."""
    times = row["microseconds"]
    dense = min(value for name, value in times.items() if name.startswith("dense"))
    return [what, f"{times[ours]:.1f}", f"{dense:.1f}", f"{dense / times[ours]:.2f}"]
