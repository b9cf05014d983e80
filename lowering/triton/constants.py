"""A plan as the constants of the Triton kernels."""

from __future__ import annotations

from typing import Any

from graphopt.plan import AttentionPlan
from graphopt.plan.base import form_constants, split_size
from graphopt.targets import get_target


def kernel_constants(plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
    """Return every constant of kernels/prefill.py or kernels/decode.py, and the launch options.

    Args:
        ring: Slots of the ring, where the plan's cache is one.
    """
    spec = plan.spec
    first, rest = split_size(spec.head_dim)
    value_first, value_rest = split_size(spec.values)
    return {
        **form_constants(spec, ring=ring),
        "D0": first,
        "D1": rest,
        "V0": value_first,
        "V1": value_rest,
        # A launch before the end of the one in front came with sm_90.
        "OVERLAP": int(get_target(plan.target).isa.removeprefix("sm_")) >= 90,
        **plan.tiles,
    }
