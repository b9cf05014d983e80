"""The tables of plans of memory: allocation problems, and arenas of packages."""

from __future__ import annotations

from typing import Any

from results import markdown_table, measured_on, result_of


def allocation() -> str:
    """Offsets for allocation problems."""
    result = result_of("allocation")
    head = [
        "problem", "blocks", "bound", "asked for", "height",
        "times the bound", "seconds", "CPU seconds", "by",
    ]  # fmt: skip
    rows = [
        [
            row["name"],
            f"{row['blocks']:,}",
            f"{row['bound']:,}",
            "the least" if row["capacity"] is None else f"{row['capacity']:,}",
            f"{row['height']:,}" + _missed(row),
            f"{row['height'] / row['bound']:.4f}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            row["how"],
        ]
        for row in result["rows"]
    ]
    return f"{markdown_table(head, rows)}\n\n{measured_on(result, 'numpy')}"


def allocation_greedy() -> str:
    """How long plans in one go take."""
    result = result_of("allocation_greedy")
    plans = list(dict.fromkeys(row["plan"] for row in result["rows"]))
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    for row in result["rows"]:
        seconds.setdefault((row["problem"], row["blocks"]), {})[row["plan"]] = row["cpu_seconds"]
    rows = [
        [name, f"{blocks:,}", *(f"{found[plan]:.2f}" for plan in plans)]
        for (name, blocks), found in seconds.items()
    ]
    table = markdown_table(["problem", "blocks", *plans], rows)
    return f"{table}\n\n{measured_on(result, 'numpy')} CPU seconds."


def _missed(row: dict[str, Any]) -> str:
    if row["capacity"] is None or row["height"] <= row["capacity"]:
        return ""
    return " (not reached)"


def arena() -> str:
    """What steps of packages allocate, with an arena and without."""
    tables = []
    for name, row in result_of("arena").items():
        rows = []
        for phase, plans in (("prefill", "prefill"), ("decode", "decode")):
            planned = [step for key, step in row["steps"].items() if key.startswith(plans)]
            plain, later = (row["runs"][f"{kind}, again"][phase] for kind in ("plain", "arena"))
            reserved = row.get("caching_allocator", {}).get(phase, {}).get("reserved")
            rows.append(
                [
                    phase,
                    f"{max(step['live'] for step in planned):,}",
                    f"{max(step['height'] for step in planned):,}",
                    "-" if reserved is None else f"{reserved:,}",
                    _allocated(plain),
                    _allocated(later),
                    f"{plain['seconds'] * 1e3:.1f}",
                    f"{later['seconds'] * 1e3:.1f}",
                ]
            )
        head = [
            f"{name}, {row['batch']} x {row['prompt']} tokens",
            "needed at once", "planned", "reserved by torch's allocator",
            "allocations of a step", "in the arena", "ms", "ms in the arena",
        ]  # fmt: skip
        told = f"The arena has {row['buffer_bytes']:,} bytes."
        graphs = row.get("graph_seconds")
        if graphs:
            told += (
                f" Recorded as a CUDA graph, a step takes {graphs['plain'] * 1e3:.2f} ms without "
                f"and {graphs['arena'] * 1e3:.2f} ms with it."
            )
        tables.append(f"{markdown_table(head, rows)}\n\n{measured_on(row, 'torch')} {told}")
    return "\n\n".join(tables)


def _allocated(run: dict[str, Any]) -> str:
    found = run["allocated_later_most"]
    return f"{found['times']:,}, {found['bytes']:,} bytes" if found["times"] else "0"
