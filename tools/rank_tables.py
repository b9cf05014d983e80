"""Tables of what several devices share."""

from __future__ import annotations

from results import markdown_table, measured_on, result_of


def data_parallel() -> str:
    """Evaluation and training on one device and shared by all."""
    result = result_of("data_parallel")
    if not result:
        return "Not measured yet; `tools/bench_data_parallel.py` is what measures it."
    rows = []
    for kind, (what, unit) in {
        "eval": ("`eval`", "windows"), "fuse-blocks": ("`fuse-blocks`", "steps")
    }.items():  # fmt: skip
        found = result["summary"][kind]
        speeds = [f"{found[who]:.1f} {unit}/s" for who in ("one", "all")]
        apart = ", ".join(
            f"{name.replace('_', ' ')} {off:.1e}" for name, off in found["apart"].items()
        )
        rows.append([what, *speeds, f"{found['times']:.2f}", apart])
    head = ["", "one device", f"{result['ranks']} devices", "times faster", "results apart by"]
    table, measured = markdown_table(head, rows), measured_on(result, "torch", "transformers")
    return (
        f"{table}\n\n{measured} Medians of rounds in turns; a step of `fuse-blocks` takes "
        f"{result['batch']} windows of {result['seqlen']:,} tokens. Weights are apart in units of "
        "how far training moved them."
    )
