"""A plan as the constants of the Triton kernels."""

from __future__ import annotations

from typing import Any

from graphopt.plan import AttentionPlan
from graphopt.plan.base import split_size
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
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.values,
        "D0": first,
        "D1": rest,
        "V0": value_first,
        "V1": value_rest,
        "GROUP": spec.group,
        "CAUSAL": spec.causal,
        "TOP_LEFT": spec.align == "top-left",
        "WINDOW": spec.window or 0,
        "CHUNK": spec.chunk or 0,
        "SOFTCAP": float(spec.softcap or 0.0),
        "KEY_MASK": spec.key_mask,
        "BIAS": spec.bias,
        "ALIBI": spec.alibi,
        "SINKS": spec.sinks,
        "VARLEN": spec.varlen,
        "LENGTHS": spec.lengths,
        "RING": ring,
        "PAGE": spec.page or 0,
        "SELECTED": spec.selected_pages,
        "LSE": spec.lse,
        "PAGE_MAX": spec.page_max,
        # A launch before the end of the one in front came with sm_90.
        "OVERLAP": int(get_target(plan.target).isa.removeprefix("sm_")) >= 90,
        **plan.tiles,
    }
