"""The pass that lays the KV states that policies select of out in their pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir.graph import Program
from graphopt.ir.kv import KVLayout
from graphopt.ir.relayout import with_layouts
from graphopt.pass_manager.contract import Context, Pass, PassResult


@dataclass
class PageStates(Pass):
    """Give states with a policy the policy's pages, which kernels read one by one.

    Legality:

    1. The state is contiguous: another layout was asked for.
    """

    name: ClassVar[str] = "page-states"

    def run(self, program: Program, context: Context) -> PassResult:
        layouts = {
            state.name: KVLayout("paged", state.policy.budget.page)
            for state in program.states.values()
            if state.policy is not None and state.layout.kind == "contiguous"
        }
        matched = sum(state.policy is not None for state in program.states.values())
        result = PassResult(program, matched, len(layouts))
        if layouts:
            result.program = with_layouts(program, layouts)
        return result
