"""The family for Hopper in CUDA C++: prefill by `wgmma` products and the bulk tensor copies.

The source is a plan's constants, its product instructions, and then the text of the kernel.
"""

from __future__ import annotations

from typing import Any

from graphopt.lowering.cuda.compile import macro
from graphopt.lowering.kernels.family import CudaFamily, register_family, runtime_text
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.plan import AttentionPlan
from graphopt.plan.hopper import HopperPlanner, consumer_registers, loader_registers
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
            _product("wgmma_scores", int(constants["BLOCK_N"]), dtype, from_registers=False),
            _product("wgmma_values", plan.spec.values, dtype, from_registers=True),
            body,
        ]
    )


def _product(name: str, columns: int, dtype: str, *, from_registers: bool) -> str:
    """Return a function around `wgmma.mma_async` of [64, 16] by [16, columns], summed in fp32.

    Source: PTX ISA, wgmma.mma_async. The right side lies in shared memory, its columns in a row
    for scores (keys as they are stored, transposed by the product) and its rows for values.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
    if from_registers:
        left = ", ".join(f"%{count + i}" for i in range(4))
        parameters = "const unsigned* a, unsigned long long b"
        code = f'"{shape} {{{sums}}}, {{{left}}}, %{count + 4}, 1, 1, 1, 1;"'
        inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)'
    else:
        parameters = "unsigned long long a, unsigned long long b, bool add"
        code = (
            f'"{{ .reg .pred add; setp.ne.b32 add, %{count + 2}, 0; "\n'
            f'      "{shape} {{{sums}}}, %{count}, %{count + 1}, add, 1, 1, 0, 0; }}"'
        )
        inputs = '"l"(a), "l"(b), "r"((int)add)'
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}) {{\n"
        f"  asm volatile(\n      {code}\n      : {outputs}\n      : {inputs});\n}}\n"
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
