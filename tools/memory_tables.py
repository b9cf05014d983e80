"""Tables of what is said of memory, beside what torch's allocator for GPUs said."""

from __future__ import annotations

from typing import Any

from results import markdown_table, measured_on, result_of

_COMMAND = "python tools/bench_memory.py"


def _part(name: str, device: str = "cuda") -> dict[str, Any] | None:
    return result_of("memory").get(f"{name} on {device}")


def _missing(name: str) -> str:
    return f"Not measured yet: `{_COMMAND} --part {name}` on a GPU."


def _failed(rows: list[dict[str, Any]]) -> str:
    """Return a sentence on rows that failed, "" where none did."""
    failed = [row for row in rows if "failed" in row]
    named = "; ".join(f"{row['model']}, {row['phase']}: {row['failed']}" for row in failed)
    return f" Failed: {named}." if failed else ""


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.2f}%"


def memory_events() -> str:
    """Live bytes at the peak beside the allocator's own history."""
    part = _part("events")
    if part is None:
        return _missing("events")
    rows = [row for row in part["rows"] if "failed" not in row]
    table = markdown_table(
        ["step", "snapshot's peak, MB", "the trace's", "off", "tensors alone", "out of order",
         "events without values"],
        [
            [
                f"{row['phase']}, {row['model']}, {row['batch']} x {row['seq']}",
                _mb(row["snapshot_peak"]),
                _mb(row["live_peak"]),
                _percent(row["live_error"]),
                _percent(row["tensors_alone_error"]),
                f"{row['out_of_order']} of {row['instances_in_history']:,}",
                "the same" if row["same"] else f"{100 * row['in_common']:.1f}% in common",
            ]
            for row in rows
        ],
    )  # fmt: skip
    return f"{table}\n\n{measured_on(part, 'torch')}{_failed(part['rows'])}"


def memory_peaks() -> str:
    """What was predicted beside what the allocator measured."""
    part = _part("predict")
    if part is None:
        return _missing("predict")
    rows = [row for row in part["rows"] if "measured" in row]
    table = markdown_table(
        ["step", "batch", "tokens", "dtype", "predicted, MB", "measured, MB", "off",
         "reserved, off"],
        [
            [
                f"{row['phase']}, {row['model']}",
                str(row["batch"]),
                f"{row['seq']:,}",
                "fp32" if row["phase"] == "calibrate" else row["dtype"],
                _mb(row["predicted"]),
                _mb(row["measured"]),
                _percent(row["error"]),
                _percent(row["reserved_error"]),
            ]
            for row in rows
        ],
    )  # fmt: skip
    near = sum(abs(row["error"]) <= 0.05 for row in rows)
    left = len(part["rows"]) - len(rows)
    more = f" {left} drawn settings were not run." if left else ""
    return (
        f"{table}\n\n{near} of {len(rows)} within 5%, drawn with seed {part['seed']}."
        f"{more}{_failed(part['rows'])} {measured_on(part, 'torch')}"
    )


def memory_capacity() -> str:
    """The largest size that is predicted to fit beside the largest that runs."""
    part = _part("capacity")
    if part is None:
        return _missing("capacity")
    rows = [row for row in part["rows"] if "runs" in row]
    table = markdown_table(
        ["step", "largest", "predicted", "runs", "off"],
        [
            [
                f"{row['phase']}, {row['model']}, "
                + (f"{row['seq']:,} tokens" if "seq" in row else f"batch {row['batch']}"),
                "batch" if row["searched"] == "batch" else "tokens",
                f"{row['predicted']:,}",
                f"{row['runs']:,}",
                "-" if row["error"] is None else _percent(row["error"]),
            ]
            for row in rows
        ],
    )
    return (
        f"{table}\n\nA GPU limited to {part['memory'] / 1e9:g} GB by "
        f"`torch.cuda.set_per_process_memory_fraction`.{_failed(part['rows'])} "
        f"{measured_on(part, 'torch')}"
    )


def memory_overhead() -> str:
    """How much longer a recorded step takes."""
    part = _part("overhead", "cpu")
    if part is None:
        return _missing("overhead")
    table = markdown_table(
        ["step of SmolLM2-135M, fp32", "events", "times the CPU time of an eager step"],
        [
            [
                f"{row['phase']}, {row['batch']} x {row['seq']}",
                f"{row['events']:,}",
                f"{row['times']:.2f}",
            ]
            for row in part["rows"]
        ],
    )
    return (
        f"{table}\n\nMedians of pairs taken in turns, in CPU time of the process. "
        f"{measured_on(part, 'torch')}"
    )


def onnx_memory() -> str:
    """Sessions of ONNX Runtime beside our own figures for the same steps."""
    result = result_of("onnx_memory")
    if not result:
        return "Not measured yet: `python tools/bench_onnx_memory.py OUT`."
    rows, openings = [], []
    for row in result["rows"]:
        for name, session in row["sessions"].items():
            first, *rest = session["steps"]
            arena = session["arena"]
            default = name == "default"
            openings.append(session["opening"])
            rows.append(
                [
                    f"{row['phase']}, {row['batch']} x {row['seq']:,}" if default else "",
                    name,
                    f"{_mb(first['peak'])}, {_mb(first['kept'])}",
                    f"{_mb(max(s['peak'] for s in rest))}, {_mb(sum(s['kept'] for s in rest))}",
                    f"{_mb(arena[0]['in_use'])}, {_mb(max(s['in_use'] for s in arena[1:]))}"
                    if arena
                    else "-",
                    _mb(arena[-1]["held"]) if arena else "-",
                    f"{_mb(row['own']['live'])}, {_mb(row['own']['planned'])}" if default else "",
                    _mb(row["package"]["planned"]) if default and row["package"] else "",
                ]
            )
    table = markdown_table(
        ["step", "session", "first step: peak, stays", "later steps: peak, more stays",
         "its arena in use, first and later", "its arena holds", "own step: live, planned",
         "arena of the package"],
        rows,
    )  # fmt: skip
    kept, files = ([opening[key] for opening in openings] for key in ("kept", "kept_of_files"))
    return (
        f"{table}\n\nMB. {result['name']} in fp32; opening leaves {_mb(min(kept))} to "
        f"{_mb(max(kept))} MB, and {_mb(max(files))} MB of files. "
        f"{measured_on(result, 'torch', 'onnxruntime')}"
    )
