"""What `graphopt inspect` and `diff` say, as plain data."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graphopt.execute.what_fits import what_fits
from graphopt.ir.cost import total_cost
from graphopt.ir.graph import Program
from graphopt.ir.printer import print_program
from graphopt.ir.ranks import group_of, rank_program
from graphopt.ir.types import DTYPE_NAMES, B, Dim, P, S
from graphopt.ir.weights import Weight
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.report.breakdown import PARTS, breakdown, evaluate_cost, kv_cache_bytes
from graphopt.report.records import REPORT_NAME
from graphopt.report.saved_report import SavedReport, read_report
from graphopt.support.progress import Progress, silent


def inspect_program(
    program: Program,
    batch: int = 1,
    seq: int = 128,
    past: int = 0,
    memory: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return a program's text, parameters and costs; no weight is read.

    FLOPs and bytes are those of the program with a KV cache where it can have one, so that past
    tokens count; and those of one rank where it is split over devices, parameters of parts too.

    Args:
        batch, seq, past: B sequences, S tokens of the step, P tokens in the cache.
        memory: Bytes of a GPU's memory, to say what fits them; None to leave that out.

    Returns:
        JSON data; a cost has a `symbolic` form in B, S and P and a `value`.
    """
    cached = make_pass("insert-kv-cache", {}).run(program.copy(), Context()).program
    if not cached.states:
        past = 0
    sizes = {B: batch, S: seq, P: past}
    ranks = len(group_of(program))
    every, cached = cached, rank_program(cached, 0) if ranks else cached
    cost = total_cost(cached)

    def both(value: Dim) -> dict[str, Any]:
        return {"symbolic": _pretty(value), "value": evaluate_cost(value, sizes)}

    parts: dict[str, dict[str, int]] = {part: {"parameters": 0, "flops": 0} for part in PARTS}
    evaluated: dict[int, dict[str, int]] = {}
    for block in breakdown(cached):
        for part, count in block.parameters.items():
            parts[part]["parameters"] += count
        if id(block.flops) not in evaluated:
            evaluated[id(block.flops)] = {
                p: evaluate_cost(c, sizes) for p, c in block.flops.items()
            }
        for part, count in evaluated[id(block.flops)].items():
            parts[part]["flops"] += count
    return {
        "name": program.name,
        "source": program.source,
        "model_type": program.config.get("model_type"),
        "dtype": DTYPE_NAMES[program.checkpoint_dtype],
        "parameters": program.parameter_count(),
        "weight_bytes": sum(w.nbytes for w in program.used_weights()),
        "ranks": ranks or 1,
        "inputs": {name: str(kind) for name, kind in program.inputs.items()},
        "outputs": list(program.outputs),
        "functions": {
            name: {
                "calls": sum(call.function == name for call in program.calls),
                "nodes": len(function.nodes),
            }
            for name, function in program.functions.items()
        },
        "sizes": {"B": batch, "S": seq, "P": past},
        "kv_cache": bool(cached.states),
        "flops": both(cost.flops),
        "bytes": {
            "weights": both(cost.weight_bytes),
            "activations": both(cost.activation_bytes),
            "kv_cache": both(kv_cache_bytes(cached)),
        },
        "flops_by_op": {
            op: evaluate_cost(flops, sizes) for op, flops in cost.by_op.items() if flops != 0
        },
        "parts": parts,
        "fits": None if memory is None else fits_of(every, memory, batch, seq, progress),
        "notes": [{"where": where, "reason": reason} for where, reason in program.notes],
        "program": print_program(program, facts=False),
    }


def fits_of(
    program: Program, memory: int, batch: int, seq: int, progress: Progress = silent
) -> dict[str, Any]:
    """Return what batches and lengths fit a GPU's memory, as JSON data; see `what_fits`."""
    found = what_fits(program, memory, batch=batch, seq=seq, progress=progress)
    entries = [asdict(entry) | {"text": entry.describe()} for entry in found]
    return {"memory": memory, "sizes": entries}


def _pretty(value: Dim) -> str:
    """Return a cost as a polynomial with the sizes B, S and P."""
    import sympy

    expanded = sympy.expand(sympy.sympify(value))
    return str(sympy.collect(expanded, B)).replace("**", "^")


def diff_models(
    a: str, b: str, *, trust_remote_code: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Compare two models or output folders.

    Weights that both have are read one by one and compared as fp32, unless both come from the
    same place.

    Returns:
        JSON data: `parameters`, `weight_bytes`, `structure` (a unified diff of the programs as
        text), `weights` and, where both have one, `report`.

    Raises:
        GraphoptError: One of them cannot be opened or captured.
    """
    from graphopt.capture import capture

    left = capture(a, trust_remote_code=trust_remote_code)
    right = capture(b, trust_remote_code=trust_remote_code)
    before, after = _body(left).splitlines(), _body(right).splitlines()
    return {
        "a": a,
        "b": b,
        "parameters": [left.parameter_count(), right.parameter_count()],
        "weight_bytes": [
            sum(w.nbytes for w in program.used_weights()) for program in (left, right)
        ],
        "structure": list(difflib.unified_diff(before, after, fromfile=a, tofile=b, lineterm="")),
        "weights": _diff_weights(left, right, progress),
        "report": _diff_reports(Path(a), Path(b)),
    }


def _body(program: Program) -> str:
    """Return the printed program without its header line, which names it."""
    return print_program(program, facts=False).partition("\n")[2]


def _diff_weights(left: Program, right: Program, progress: Progress) -> dict[str, Any]:
    ours = {weight.name: weight for weight in left.used_weights()}
    theirs = {weight.name: weight for weight in right.used_weights()}
    common = [name for name in ours if name in theirs]
    changed: list[dict[str, Any]] = []
    readable = left.has_values() and right.has_values()
    progress("weights", 0, len(common))
    for done, name in enumerate(common, start=1):
        row = _diff_weight(ours[name], theirs[name], readable)
        if row is not None:
            changed.append({"name": name, **row})
        progress("weights", done, len(common))
    return {
        "only_a": sorted(set(ours) - set(theirs)),
        "only_b": sorted(set(theirs) - set(ours)),
        "common": len(common),
        "compared": readable,
        "changed": changed,
    }


def _diff_weight(a: Weight, b: Weight, readable: bool) -> dict[str, Any] | None:
    """Return how a weight differs; None where it does not."""
    shapes = {"shape": [list(a.shape), list(b.shape)]}
    dtypes = {"dtype": [DTYPE_NAMES.get(w.dtype, str(w.dtype)) for w in (a, b)]}
    if a.shape != b.shape:
        return {**shapes, **dtypes, "max_abs_delta": None}
    if not readable or a.producer == b.producer:
        return {**shapes, **dtypes, "max_abs_delta": None} if a.dtype != b.dtype else None
    delta = _largest_difference(a, b)
    if delta == 0 and a.dtype == b.dtype:
        return None
    return {**shapes, **dtypes, "max_abs_delta": delta}


def _largest_difference(a: Weight, b: Weight) -> float:
    if a.numel == 0:
        return 0.0
    x, y = a.load(torch.float32), b.load(torch.float32)
    if x.is_floating_point():
        # Equal infinities, as masks hold them, don't differ.
        return float((x - y).masked_fill(x == y, 0.0).abs().max())
    return float((x.double() - y.double()).abs().max())


def _diff_reports(a: Path, b: Path) -> dict[str, Any] | None:
    """Return the figures of two reports side by side; None unless both are there."""
    if not all((folder / REPORT_NAME).exists() for folder in (a, b)):
        return None
    reports = [read_report(folder) for folder in (a, b)]
    figures: dict[str, list[Any]] = {
        key: [getattr(report, key) for report in reports]
        for key in ("recipe", "target", "parameters", "total_seconds", "peak_bytes")
    }
    figures["artifact_bytes"] = [r.artifact.bytes if r.artifact else None for r in reports]
    figures["perplexity_text"] = [
        None if r.quality is None else r.quality.text.measured().describe() for r in reports
    ]
    reasons = _not_comparable(*reports)
    for key, reason in reasons.items():
        if not reason:
            figures[key] = [getattr(r.quality, key) for r in reports]
    return {**figures, "not_compared": {key: reason for key, reason in reasons.items() if reason}}


def _not_comparable(a: SavedReport, b: SavedReport) -> dict[str, str]:
    """Return, by figure, why those of two reports say nothing beside each other; "" if they do."""
    if a.quality is None or b.quality is None:
        missing = [name for name, r in (("a", a), ("b", b)) if r.quality is None]
        reason = (
            f"none was measured of {' and '.join(missing)}: compile with --text FILE, or run "
            "graphopt eval on both with one text"
        )
        return {"perplexity_after": reason, "times": reason}
    if not a.quality.text.measured().same_as(b.quality.text.measured()):
        reason = (
            "measured on different texts, or in different tokens of one: run graphopt eval on "
            "both with one text"
        )
        return {"perplexity_after": reason, "times": reason}
    of_one = a.quality.perplexity_before == b.quality.perplexity_before
    return {"perplexity_after": "", "times": "" if of_one else "their sources differ"}
