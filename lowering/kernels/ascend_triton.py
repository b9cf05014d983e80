"""The family for Huawei Ascend, in the Triton that triton-ascend takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.lowering.kernels.family import KernelFamily, register_family, runtime_text
from graphopt.plan import AttentionPlan
from graphopt.plan.ascend import AscendPlanner
from graphopt.plan.ascend_sums import AscendSumPlan
from graphopt.plan.base import form_constants

_FILES = ("ascend_prefill.py", "ascend_decode.py")


def ascend_constants(plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
    """Return a plan as the constants of ascend_prefill.py, or ascend_decode.py, under kernels.

    With them those that say of a cache what it is not, for `graphopt.runtime.attention.check`.

    Args:
        ring: Slots of the ring, where the plan's cache is one.
    """
    return {**form_constants(plan.spec, ring=ring), **plan.tiles}


def sum_sources(plan: AscendSumPlan) -> dict[str, str]:
    """Return the source of a linear that two devices sum, with its plan at its head, by file name.

    What launches it waits between stages, by the notices that devices send each other.
    """
    name = "ascend_linear_all_reduce.py"
    head = [f"# {line}" for line in plan.lines()]
    launches = [f"# rank {rank}: {plan.launches(rank)}" for rank in range(2)]
    return {name: "\n".join([*head, *launches, "", runtime_text(f"kernels/{name}")])}


@register_family
class AscendFamily(KernelFamily):
    """Kernels that are emitted as they are, and compiled by the machine that runs them."""

    planner = AscendPlanner()
    launcher = "ascend"
    modules = ("tiling_mask",)

    def constants(self, plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
        return ascend_constants(plan, ring=ring)

    def sources(self, plans: Mapping[str, AttentionPlan]) -> dict[str, str]:
        return {name: runtime_text(f"kernels/{name}") for name in _FILES}
