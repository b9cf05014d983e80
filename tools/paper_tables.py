"""Tables of a study's findings on memory looked at again, and of passes in limited memory."""

from __future__ import annotations

from typing import Any

from results import markdown_table, measured_on, result_of

PUBLISHED_LIVE = {
    ("VGG-16", "cifar"): 658, ("ResNet-50", "cifar"): 249.5, ("VGG-16", "imagenet"): 3184,
    ("ResNet-50", "imagenet"): 2992, ("GoogLeNet", "imagenet"): 2853,
}  # fmt: skip
"""MiB alive at the peak in the logs that the study's authors published."""

PUBLISHED_EVENTS = {
    ("VGG-16", "cifar"): 1022, ("ResNet-50", "imagenet"): 1270, ("GoogLeNet", "imagenet"): 2244,
}  # fmt: skip
"""Allocations and releases of a step in them; the logs are of one setting a model."""


SMALL = 2**26
"""Bytes: what libraries keep for themselves is more."""


def _time(nanoseconds: float) -> str:
    for limit, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if nanoseconds >= limit:
            return f"{nanoseconds / limit:.3g} {unit}"
    return f"{nanoseconds:.0f} ns"


def memory_paper() -> str:
    """Period, intervals and what could wait on the host."""
    found = result_of("memory_paper")
    fake = found["patterns on cpu"]
    gpu = found.get("patterns on cuda")
    on_gpu = {(r["model"], r["data"]): r for r in gpu["runs"]} if gpu else {}
    rows = []
    for run in fake["runs"]:
        key = run["model"], run["data"]
        own = on_gpu.get(key)
        period = run["period"]
        swap = run["swap"]["study_fit"]
        beside = PUBLISHED_EVENTS.get(key)
        live = PUBLISHED_LIVE.get(key)
        rows.append(
            [
                f"{run['model']}, {run['data']}, {run['batch']}",
                f"{period['events']:,}, {period['repeats']} times" if period else "none",
                f"{period['mallocs_and_frees']:,}" + (f" ({beside:,})" if beside else ""),
                f"{run['peak_bytes'] / 2**20:,.1f}" + (f" ({live:,})" if live else ""),
                f"{run['share_below_25_us']:.0%}",
                f"{own['share_below_25_us']:.0%}" if own else "-",
                f"{own['host_clock']['share_below_25_us']:.0%}" if own else "-",
                f"{swap['over_peak']:,}, {swap['bytes_over_peak'] / run['peak_bytes']:.0%}",
                f"{own['max_memory_reserved'] / own['peak_bytes']:.2f}"
                if own and own["peak_bytes"] > SMALL
                else "-",
            ]
        )
    head = [
        "model, data, batch", "period in events", "allocations and releases (study)",
        "MiB at the peak (study)", "intervals up to 25 us, roofline", "CUDA events", "host clock",
        "could wait on the host, of the peak", "reserved by torch, times the peak",
    ]  # fmt: skip
    measured = measured_on(fake, "torch")
    more = f" {measured_on(gpu, 'torch')}" if gpu else " Not measured on a GPU yet."
    return f"{markdown_table(head, rows)}\n\n{measured}{more}"


def memory_paper_addresses() -> str:
    """What intervals by address see."""
    result = result_of("memory_paper")["patterns on cpu"]
    rows = []
    for run in result["runs"]:
        naive = run["by_address"]
        rows.append(
            [
                f"{run['model']}, {run['data']}, {run['batch']}",
                f"{naive['across_reuse']:,} of {naive['intervals']:,}",
                f"{naive['within_blocks_share_below_25_us']:.0%}",
                f"{naive['share_below_25_us']:.0%}",
                _time(run["quantiles_ns"][0]),
                _time(run["quantiles_ns"][1]),
            ]
        )
    head = [
        "model, data, batch", "intervals by address that span a reuse", "up to 25 us, by block",
        "by address", "half of those of a step up to", "nine tenths up to",
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{measured_on(result, 'torch')}"


def memory_passes() -> str:
    """How passes size their batches in limited memory, and what they then take."""
    found = result_of("memory_passes")
    parts = [part for name, part in found.items() if name.endswith("on cuda")]
    if not parts:
        return "Not measured yet: `python tools/bench_memory_passes.py` on a GPU."
    rows = [_pass_row(run) for part in parts for run in part["runs"]]
    head = ["pass", "memory", "what it said", "reserved at most", "seconds"]
    return f"{markdown_table(head, rows)}\n\n{measured_on(parts[0], 'torch')}"


def _pass_row(run: dict[str, Any]) -> list[str]:
    told = run.get("batches", {}).get(run["pass"], run.get("refused", "nothing"))
    return [
        run["pass"],
        f"{run['memory'] / 1e9:.0f} GB",
        told if isinstance(told, str) else " ".join(told),
        f"{run['max_memory_reserved'] / 1e9:.2f} GB",
        f"{run['seconds']:.0f}",
    ]
