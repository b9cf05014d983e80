"""Linears joined with the sum of their results over ranks, and with the attention in front of them.

How long each way to compute and sum them takes is predicted for the reader of the program.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from graphopt.ir.graph import Function, Node, Program, Value
from graphopt.ir.ops.attention import ATTENTIONS, BIAS, is_general
from graphopt.ir.ops.fused_collectives import FUSED_COLLECTIVES
from graphopt.ir.types import Type
from graphopt.lowering.kernels.triton import reduction_figures
from graphopt.lowering.torch.sees import Sees
from graphopt.rewrite import Match, NoMatch, Rule, Site, rule
from graphopt.runtime.reduction_plan import (
    CausalAttention,
    LinearPlan,
    plan_attention_linear,
    plan_linear,
)
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


def fuse_attention_with_sum(program: Program) -> Rule:
    """Return the rule that lets attention of the next rows run while the sum of others is sent.

    Args:
        program: What the rule looks at functions of.
    """
    elsewhere = _attends_elsewhere(program)

    @rule("linear_all_reduce")
    def fuse_attention_with_sum(site: Site) -> Match | NoMatch:
        """linear_all_reduce(merge_heads(attention), weight) -> attention_linear_all_reduce."""
        heads = site.maker(0, "merge_heads")
        attention = site.maker(0, "attention", node=heads) if heads is not None else None
        if heads is None or attention is None or not site.attr("swap", heads):
            between = _behind_attention(site.node)
            if between is not None:
                return site.no(f"{between.op} stands between the attention and it", between)
            return site.no("what it multiplies is not made by an attention")
        if site.operand(2) is not None:
            return site.no("a bias is added, for which a sum in chunks has no place")
        out = attention.outputs[0]
        if site.only_reader(heads.output) is not site.node or site.only_reader(out) is not heads:
            return site.no("something else reads the attention's output", attention)
        if site.attr("causal", attention) is not True or attention.operand(BIAS) is not None:
            return site.no("a query sees keys behind its own, or a bias", attention)
        if is_general(attention.attrs, attention.inputs):
            return site.no("the attention reads selected pages, or gives statistics", attention)
        if site.node.attrs["ranks"] != 2:
            return site.no("a sum is cut into chunks for two ranks alone")
        if elsewhere is not None:
            return site.no(elsewhere, attention)
        operands = [out, site.node.inputs[1]]
        return site.change("attention_linear_all_reduce", operands, site.node.attrs)

    return fuse_attention_with_sum


def _attends_elsewhere(program: Program) -> str | None:
    """Return what in a program runs attentions in a way that has no rows; None for nothing."""
    if any(state.host for state in program.states.values()):
        return "keys of the program lie in the host's memory"
    if any(state.policy for state in program.states.values()):
        return "policies of the program's cache choose what attentions read"
    sees = Sees.of(program)
    if sees is not None and sees.both_ways:
        return "tokens of a picture see each other both ways"
    return None


def _behind_attention(linear: Node) -> Node | None:
    """Return what makes a linear's input of an attention's output, without another linear."""
    waiting, seen = [linear], {linear}
    while waiting:
        for value in waiting.pop().inputs:
            made = None if value is None else value.node
            if made is None or made in seen or made.op.endswith("linear"):
                continue
            if made.op in ATTENTIONS and value is made.outputs[0]:
                last = linear.inputs[0]
                return None if last is None else last.node
            seen.add(made)
            waiting.append(made)
    return None


def annotate_sums(
    function: Function, types: Sequence[Mapping[Value, Type]], target: Target
) -> None:
    """Annotate the linears of a function that are summed with the plans for some tokens.

    Args:
        types: Of its values, in each call; those of the first are taken.
    """
    figures = reduction_figures(target)
    for node in function.nodes:
        if node.op not in FUSED_COLLECTIVES or figures is None or not types:
            continue
        x, weight = node.inputs[:2]
        assert x is not None and weight is not None
        columns, depth = (int(size) for size in types[0][weight].shape)
        bias = node.operand(2) is not None
        ranks = int(node.attrs["ranks"])
        plans: list[tuple[int, LinearPlan]] = []
        for rows in TOKENS:
            plan = plan_linear(rows, columns, depth, ranks, figures, bias=bias)
            if node.op == "attention_linear_all_reduce" and rows > 1:
                attention = CausalAttention(rows, int(types[0][x].shape[1]))
                plan = plan_attention_linear(attention, columns, depth, ranks, figures)
            plans.append((rows, plan))
        node.annotations[ANNOTATION] = SumPlans(tuple(plans))
