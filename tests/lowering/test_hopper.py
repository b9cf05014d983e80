"""The Hopper kernel as source and as machine code; its numerics are tested on a GPU."""

from __future__ import annotations

import re

import pytest
from sampling import exhaustive_but

from graphopt.errors import LoweringError
from graphopt.lowering.kernels import plan_attention
from graphopt.lowering.kernels.hopper_cuda import hopper_constants, hopper_source
from graphopt.plan import AttentionSpec
from graphopt.runtime.hopper import shared_bytes
from graphopt.runtime.nvrtc import compile_cuda, nvrtc_version
from graphopt.targets import get_target

FORMS = {
    "causal": {},
    "full, D 64": {"causal": False, "head_dim": 64},
    "D 32": {"head_dim": 32},
    "D 96, f16": {"head_dim": 96, "dtype": "f16"},
    "D 192 over 128": {"head_dim": 192, "value_dim": 128},
    "D 256": {"head_dim": 256},
    "everything": {"window": 300, "softcap": 20.0, "sinks": True, "kv_lens": True, "lse": True,
                   "align": "top-left"},
    "varlen": {"varlen": True},
}  # fmt: skip


def planned(**fields):
    spec = AttentionSpec(**{"head_dim": 128, "heads": 32, "kv_heads": 8, "dtype": "bf16", **fields})
    plan = plan_attention(spec, get_target("hopper"))
    assert plan.kernel == "hopper-cuda"
    return plan


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", exhaustive_but(FORMS, "D 192 over 128", "D 256", "everything", "varlen")
)
def test_it_compiles_without_spills_and_as_large_as_planned(form):
    try:
        nvrtc_version()
    except LoweringError as error:
        pytest.skip(str(error))
    plan = planned(**FORMS[form])
    compiled = compile_cuda(hopper_source(plan), "hopper_prefill.cu", "sm_90a", {})
    assert compiled.cubin
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in compiled.log
    # Registers are shared out anew when the kernel runs; at its start all threads have as many.
    (registers,) = map(int, re.findall(r"Used (\d+) registers", compiled.log))
    assert registers * 128 * (plan.tiles["CONSUMERS"] + 1) <= 65536
    (fixed,) = map(int, re.findall(r"(\d+) bytes smem", compiled.log))
    dynamic = shared_bytes(plan.spec.head_dim, plan.spec.values, plan.tiles)
    planned_bytes = next(i.value for i in plan.inequalities if i.name == "shared memory")
    assert dynamic + fixed <= planned_bytes <= 232448


def test_the_source_is_its_plan_its_constants_and_the_kernel():
    plan = planned(window=100)
    text = hopper_source(plan)
    assert text == hopper_source(plan)
    for line in plan.lines():
        assert f"// {line}\n" in text
    for name, value in hopper_constants(plan).items():
        assert f"#define {name} {value}" in text
    # One product with both sides in shared memory, one with its left side in registers.
    assert len(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n128k16", text)) == 2
