"""Planning: which kernel runs an attention on a target, and with what tiles."""

from __future__ import annotations

from graphopt.errors import LoweringError
from graphopt.plan.ascend import AscendPlanner
from graphopt.plan.base import AttentionPlan, Inequality, Planner
from graphopt.plan.hopper import HopperPlanner
from graphopt.plan.spec import AttentionSpec
from graphopt.plan.triton import TritonPlanner
from graphopt.plan.volta import VoltaPlanner
from graphopt.targets import Target

__all__ = ["AttentionPlan", "AttentionSpec", "Inequality", "Planner", "plan_attention"]

PLANNERS: dict[str, Planner] = {
    planner.kernel: planner
    for planner in (HopperPlanner(), TritonPlanner(), VoltaPlanner(), AscendPlanner())
}


def plan_attention(spec: AttentionSpec, target: Target) -> AttentionPlan:
    """Return how the target runs the attention: by the first of its kernels that can.

    Raises:
        LoweringError: None can; the message has every reason.
    """
    refused: list[tuple[str, str]] = []
    for kernel in target.kernels:
        planner = PLANNERS[kernel]
        reason = planner.refuses(spec, target)
        if reason is None:
            chosen = planner.choose(spec, target)
            if not isinstance(chosen, str):
                tiles, found, why = chosen
                return AttentionPlan(
                    spec, target.name, kernel, tiles, tuple(found), why, tuple(refused)
                )
            reason = chosen
        refused.append((kernel, reason))
    if not refused:
        raise LoweringError(
            f"{target.title} has no attention kernels of ours.",
            "Its programs run by their reference.",
        )
    reasons = dict.fromkeys(reason for _, reason in refused)
    raise LoweringError(
        f"{target.title} cannot run this attention ({spec.describe()}): {'; '.join(reasons)}.",
        "It runs by its reference in torch, or on another target.",
    )
