"""Which kernel family runs an attention on a target, and with what tiles."""

from __future__ import annotations

from graphopt.errors import LoweringError
from graphopt.lowering.kernels.family import get_family
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.targets import Target, all_targets


def plan_attention(spec: AttentionSpec, target: Target) -> AttentionPlan:
    """Return how the target runs the attention: by the first of its kernel families that can.

    Raises:
        LoweringError: None can; the message has every reason.
    """
    refused: list[tuple[str, str]] = []
    for name in target.kernels:
        planner = get_family(name).planner
        reason = planner.refuses(spec, target)
        if reason is None:
            chosen = planner.choose(spec, target)
            if not isinstance(chosen, str):
                tiles, inequalities, why = chosen
                return AttentionPlan(
                    spec, target.name, name, tiles, tuple(inequalities), why, tuple(refused)
                )
            reason = chosen
        refused.append((name, reason))
    if not refused:
        raise LoweringError(
            f"{target.name} has no attention kernels of ours.",
            "Its programs run by their reference.",
        )
    reasons = dict.fromkeys(reason for _, reason in refused)
    raise LoweringError(
        f"{target.title} cannot run this attention ({spec.describe()}): {'; '.join(reasons)}.",
        "It runs by its reference in torch, or on another target.",
    )


def why_no_kernel(spec: AttentionSpec, target: Target) -> str | None:
    """Return why no kernel family of the target can do the attention; None where one can."""
    reasons: dict[str, None] = {}
    for name in target.kernels:
        reason = get_family(name).planner.refuses(spec, target)
        if reason is None:
            return None
        reasons[reason] = None
    return "; ".join(reasons) or f"{target.name} has no attention kernels of ours"


def plain_gpu(dtype: str) -> Target:
    """Return the oldest GPU without kernels of ours: a first run has nothing to compile.

    Args:
        dtype: What it computes in.
    """
    return min(
        (
            target
            for target in all_targets().values()
            if target.kind == "gpu"
            and dtype in target.dtypes
            and not target.kernels
            and not target.layer_kernels
        ),
        key=lambda target: target.compute_capability or (0, 0),
    )


def portable_gpu() -> Target:
    """Return the oldest GPU whose kernels are compiled where they run: newer ones take them too."""
    return min(
        (
            target
            for target in all_targets().values()
            if target.kind == "gpu"
            and target.kernels
            and not any(get_family(name).ahead for name in target.kernels)
        ),
        key=lambda target: (target.compute_capability or (0, 0), target.name),
    )
