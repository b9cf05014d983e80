"""Linears joined with the sum of their results over ranks, and how long each way of that takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from graphopt.ir.graph import Function, Value
from graphopt.ir.types import Type
from graphopt.lowering.kernels.triton import reduction_figures
from graphopt.rewrite import Match, NoMatch, Rule, Site, rule
from graphopt.runtime.reduction_plan import LinearPlan, plan_linear
from graphopt.targets import Target

ANNOTATION = "sums"
"""Name of the annotation: `SumPlans`."""
TOKENS = (1, 16, 1024, 4096, 16384)
"""Rows of a step that plans are shown for; a launch plans for those that it has."""


@dataclass(frozen=True)
class SumPlans:
    """How a linear is computed and summed over the ranks, by the rows of a step."""

    plans: tuple[tuple[int, LinearPlan], ...]

    def __str__(self) -> str:
        """Return a line for each number of rows."""
        return "\n".join(f"{rows} tokens: {plan.line()}" for rows, plan in self.plans)


def fuse_linear_with_sum(packed: Collection[str], target: Target) -> Rule:
    """Return the rule that joins a linear and the sum over ranks of what it makes.

    Args:
        packed: Slots of weights that are no dense ones.
        target: Whose file says what sums over ranks take.
    """
    figures = reduction_figures(target)

    @rule("all_reduce")
    def fuse_linear_with_sum(site: Site) -> Match | NoMatch:
        """all_reduce(linear(x, weight, bias)) -> linear_all_reduce(x, weight, bias)."""
        if figures is None:
            return site.no(f"{target.name}.toml does not say what sums over ranks take")
        linear = site.maker(0, "linear")
        if linear is None:
            return site.no("what it sums is not made by a linear")
        if site.only_reader(linear.output) is not site.node:
            return site.no("something else reads what it sums", linear)
        slots = site.function.slots_by_value()
        weight = linear.inputs[1]
        if weight is None or slots.get(weight, "") in packed:
            return site.no("the weight of what it sums is packed", linear)
        return site.join(
            [site.node], "linear_all_reduce", linear.inputs, site.node.attrs, before=site.node
        )

    return fuse_linear_with_sum


def annotate_sums(
    function: Function, types: Sequence[Mapping[Value, Type]], target: Target
) -> None:
    """Annotate the linears of a function that are summed with the plans for some tokens.

    Args:
        types: Of its values, in each call; those of the first are taken.
    """
    figures = reduction_figures(target)
    for node in function.nodes:
        if node.op != "linear_all_reduce" or figures is None or not types:
            continue
        x, weight = node.inputs[:2]
        assert x is not None and weight is not None
        columns, depth = (int(size) for size in types[0][weight].shape)
        bias = node.operand(2) is not None
        ranks = int(node.attrs["ranks"])
        node.annotations[ANNOTATION] = SumPlans(
            tuple(
                (rows, plan_linear(rows, columns, depth, ranks, figures, bias=bias))
                for rows in TOKENS
            )
        )
