"""The kernel for Volta: a plan as its constants, and its source compiled with them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from graphopt.lowering.cuda.compile import Compiled, compile_cuda, macro
from graphopt.plan import AttentionPlan
from graphopt.plan.base import form_constants
from graphopt.runtime.volta import DEFINES

SOURCE = "volta.cu"


def volta_source() -> str:
    """Return the text of the kernels."""
    return (resources.files("graphopt.runtime.kernels") / SOURCE).read_text(encoding="utf-8")


def volta_constants(plan: AttentionPlan, *, ring: int = 0, bias_bits: int = 16) -> dict[str, Any]:
    """Return every constant of kernels/volta.cu, and those its launcher asks for.

    Args:
        plan: Of the family `volta-cuda`.
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
