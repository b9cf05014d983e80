"""The family for Volta in CUDA C++: a plan as its constants, and its source compiled with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.lowering.kernels.family import CudaFamily, register_family, runtime_text
from graphopt.plan import AttentionPlan
from graphopt.plan.base import form_constants
from graphopt.plan.volta import VoltaPlanner
from graphopt.runtime.nvrtc import Compiled, compile_cuda, macro
from graphopt.runtime.volta import DEFINES

SOURCE = "volta.cu"


def volta_source() -> str:
    """Return the text of the kernels."""
    return runtime_text(f"kernels/{SOURCE}")


def volta_constants(plan: AttentionPlan, *, ring: int = 0, bias_bits: int = 16) -> dict[str, Any]:
    """Return every constant of kernels/volta.cu, and those its launcher asks for.

    Args:
        plan: A plan of the family `volta-cuda`.
        ring: Slots of the ring, where the plan's cache is one.
        bias_bits: Bits of an element of the bias, 16 or 32, where the plan has one.
    """
    spec = plan.spec
    return {
        **form_constants(spec, ring=ring),
        "DECODE": spec.phase == "decode",
        "BIAS": bias_bits if spec.bias else 0,
        "OVERLAP": False,
        **plan.tiles,
    }


def volta_text(plan: AttentionPlan) -> str:
    """Return the CUDA C++ text of a plan's kernels, its plan and constants in front."""
    constants = volta_constants(plan)
    defines = [f"#define {name} {macro(constants[name])}" for name in DEFINES]
    return "\n".join([*(f"// {line}" for line in plan.lines()), "", *defines, "", volta_source()])


def compile_volta(constants: Mapping[str, Any], arch: str = "sm_70") -> Compiled:
    """Compile the kernels of some constants for `sm_70`, or to PTX for `compute_70`.

    Raises:
        LoweringError: There is no compiler for Volta here, or it refuses the constants.
    """
    defines = {name: constants[name] for name in DEFINES}
    return compile_cuda(volta_source(), SOURCE, arch, defines)


@register_family
class VoltaFamily(CudaFamily):
    """Prefill, and decode with its merge, for the matrix units of sm_70."""

    planner = VoltaPlanner()
    launcher = "volta"
    arch = "sm_70"
    portable = True

    def constants(self, plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
        return volta_constants(plan, ring=ring)

    def source(self, plan: AttentionPlan) -> str:
        return volta_text(plan)
