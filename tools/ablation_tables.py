"""The tables of rounding behind every kind of transform; imports nothing that computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from results import markdown_table, measured_on, median, result_of

COLUMNS = {
    "perplexity": "perplexity",
    "times_dense": "times the dense model's",
    "piqa_texts_times_dense": "the same on PIQA's texts",
    "piqa": "PIQA",
    "seconds": "seconds",
}
"""Figures of a run, and what they are called in a table."""


def ablation_table(found: Mapping[str, Any]) -> str:
    """Return the medians of each method's runs as a Markdown table.

    Args:
        found: What `tools/bench_bits.py` keeps of one model.
    """
    measured = [run for run in found["runs"] if "perplexity" in run]
    figures = [key for key in COLUMNS if any(key in run for run in measured)]
    rows: list[list[str]] = []
    for method in dict.fromkeys(run["method"] for run in found["runs"]):
        runs = [run for run in measured if run["method"] == method]
        row = [method]
        for key in figures:
            values = [run[key] for run in runs if key in run]
            digits = ".0f" if key == "seconds" else ".1%" if key == "piqa" else ".4g"
            row.append(f"{median(values):{digits}}" if values else "-")
        rows.append(row)
    return markdown_table(["method", *(COLUMNS[key] for key in figures)], rows)


def bits() -> str:
    """What few bits cost behind each kind of transform, a table a model and machine."""
    tables: list[str] = []
    for name, part in result_of("bits").items():
        model, _, device = name.rpartition(" on ")
        if "runs" not in part:
            continue
        count, length = part["windows"]
        w, a, kv = part["bits"]
        tables.append(ablation_table(part))
        where = "GPU" if device == "cuda" else "CPU"
        dense = f"{part['dense']['perplexity']:.2f}"
        tables.append(
            f"`{model}`, W{w}A{a}KV{kv} but where weights or the cache alone are rounded, {where}: "
            f"the dense model has perplexity {dense} on {count} windows of {length:,} tokens of "
            f"{part['text']}; calibration text {part['calib']}, trainings of {part['training']}. "
            + measured_on(part, "torch", "transformers")
        )
    return "\n\n".join(tables)


def bits_kernels() -> str:
    """Kernels of four bits beside what they stand for: medians, in microseconds."""
    found = result_of("bits_kernels")
    pairs = {
        "transform": ("transform", "copy", "a copy of as many bytes", "times a copy"),
        "w4a4": ("whole", "bf16", "F.linear in bf16", "times faster"),
        "w4a16": ("int4", "bf16", "F.linear in bf16", "times faster"),
    }
    tables: list[str] = []
    for part, (ours, other, beside, ratio) in pairs.items():
        if part not in found:
            continue
        rows = []
        for row in found[part]["rows"]:
            if ours not in row.get("microseconds", {}):
                continue  # it failed, or compares tiles
            mine, theirs = (median(row["microseconds"][key]) for key in (ours, other))
            times = mine / theirs if ratio == "times a copy" else theirs / mine
            rows.append([row["name"], f"{mine:.1f}", f"{theirs:.1f}", f"{times:.2f}"])
        tables.append(markdown_table(["kernel", "microseconds", beside, ratio], rows))
    if "steps" in found:
        rows = [
            [row["name"], *(f"{median(row['microseconds'][key]):.2f}" for key in _STEPS)]
            for row in found["steps"]["rows"]
        ]
        tables.append(markdown_table(["microseconds", *_STEPS.values()], rows))
    if "kv" in found:
        rows = [
            [row["name"], *(f"{median(row['microseconds'][key]):.1f}" for key in _CACHES)]
            for row in found["kv"]["rows"]
            if "microseconds" in row
        ]
        tables.append(markdown_table(["microseconds", *_CACHES], rows))
    if "model" in found:
        ran = [row for row in found["model"]["rows"] if "tokens_per_second" in row]
        timed, rows = all("gpu_microseconds" in row for row in ran), []
        for row in ran:
            rate = f"{median(row['tokens_per_second']):.0f}"
            rows.append([row["name"], rate, f"{row.get('times_bf16', 1):.2f}"])
            if timed:
                spent = f"{median(row['gpu_microseconds']):.0f}"
                rows[-1] += [spent, f"{row.get('times_bf16_by_gpu', 1):.2f}"]
        heads = ["1.1B Llama shape", "tokens a second", "times bf16"]
        heads += ["microseconds of the GPU a step", "times bf16"] if timed else []
        tables.append(markdown_table(heads, rows))
    tables += [measured_on(part, "torch", "triton") for part in _by_command(found)]
    return "\n\n".join(tables)


_STEPS = {"alone": "alone", "transformed": "with a transform", "codes": "and rounded"}
_CACHES = ("torch", "16 bits", "8 bits", "4 bits")


def _by_command(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list({part["command"]: part for part in found.values()}.values())


def int4_onnx() -> str:
    """Graphs of four-bit weights beside those of onnxruntime-genai's builder."""
    found = result_of("int4_onnx")
    rows = [
        [
            name,
            f"{model['bytes'] / 1e6:.0f}",
            f"{model['tokens_per_second']:.1f}",
            f"{model['perplexity']:.2f}",
            f"{model['greedy_as_level_1']:.1%}",
        ]
        for name, model in found["models"].items()
    ]
    head = ["graph", "MB", "tokens a second", "perplexity", "likeliest token as level 1"]
    about = measured_on(found, "onnxruntime", "onnxruntime-genai")
    return f"{markdown_table(head, rows)}\n\n`{found['recipe']}`. {about}"
