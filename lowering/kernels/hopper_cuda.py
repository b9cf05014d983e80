"""The family for Hopper in CUDA C++: prefill by `wgmma` products and the bulk tensor copies.

The source is a plan's constants, its product instructions, and then the text of the kernel.
"""

from __future__ import annotations

from typing import Any

from graphopt.lowering.kernels.family import CudaFamily, register_family, runtime_text
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.plan import AttentionPlan
from graphopt.plan.hopper import HopperPlanner, consumer_registers, loader_registers
from graphopt.runtime.nvrtc import macro
from graphopt.runtime.wgmma import product
from graphopt.targets import get_target

TEXT = "hopper_prefill.cu"


def hopper_constants(plan: AttentionPlan) -> dict[str, int | float]:
    """Return what the kernel's text takes as macros."""
    spec, tiles = plan.spec, plan.tiles
    return {
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.values,
        "GROUP": spec.group,
        **tiles,
        "LOADER_REGISTERS": loader_registers(tiles["CONSUMERS"]),
        "CONSUMER_REGISTERS": consumer_registers(get_target(plan.target), tiles["CONSUMERS"]),
        "BF16": int(spec.dtype == "bf16"),
        "CAUSAL": int(spec.causal),
        "TOP_LEFT": int(spec.align == "top-left"),
        "WINDOW": spec.window or 0,
        "SOFTCAP": spec.softcap or 0,
        "SINKS": int(spec.sinks),
        "VARLEN": int(spec.varlen),
        "KV_LENS": int(spec.kv_lens),
        "LSE": int(spec.lse),
    }


def hopper_source(plan: AttentionPlan) -> str:
    """Return the CUDA C++ text of a plan's kernel, its plan in front as a comment."""
    constants = hopper_constants(plan)
    defines = "".join(f"#define {name} {macro(value)}\n" for name, value in constants.items())
    dtype = plan.spec.dtype
    body = runtime_text(f"kernels/{TEXT}")
    return "\n".join(
        [
            *(f"// {line}" for line in plan.lines()),
            "",
            defines,
            # Keys are as they are stored, with their columns in a row; values by rows.
            product(
                "wgmma_scores",
                int(constants["BLOCK_N"]),
                dtype,
                from_registers=False,
                by_rows=False,
                begins=True,
            ),
            product(
                "wgmma_values",
                plan.spec.values,
                dtype,
                from_registers=True,
                by_rows=True,
                begins=False,
            ),
            body,
        ]
    )


@register_family
class HopperFamily(CudaFamily):
    """One kernel, for many query tokens."""

    planner = HopperPlanner()
    launcher = "hopper"
    arch = "sm_90a"

    def constants(self, plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
        # What launches Triton's kernels launches this one, and asks for the same constants.
        return {**kernel_constants(plan, ring=ring), **hopper_constants(plan)}

    def source(self, plan: AttentionPlan) -> str:
        return hopper_source(plan)
