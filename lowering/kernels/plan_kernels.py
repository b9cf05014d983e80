"""The pass that plans the kernels of a target, as annotations of the nodes that they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from graphopt.errors import LoweringError
from graphopt.ir.graph import Call, KVLayout, Node, Program, Value, resolve_attrs
from graphopt.ir.ops.attention import BIAS, KEY, PAST_K, QUERY, SINKS, SLOPES, VALUE
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.lowering.kernels.family import get_family
from graphopt.lowering.kernels.planning import plan_attention
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.report.record import Record
from graphopt.targets import Target, get_target

ANNOTATION = "kernels"
"""Name of the annotation: `KernelPlans`."""


@dataclass(frozen=True)
class SpecPlans:
    """The plans of one description, for every phase and with every mask that a step may bring.

    Attributes:
        number: How many other descriptions come before it in the program.
        where: The first call with such an attention.
        plans: The best for a phase and its masks first.
        refused: Why there is no kernel, of each phase without one.
        notes: What runs by a kernel that was made for something else.
    """

    number: int
    where: str
    spec: AttentionSpec
    plans: tuple[AttentionPlan, ...]
    refused: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the choices as text, each once, whatever the masks."""
        chosen = [
            f"{plan.spec.phase}: {plan.kernel} "
            + ", ".join(f"{name}={size}" for name, size in plan.tiles.items())
            for plan in self.plans
        ]
        refused = [f"{reason}; by its reference" for reason in self.refused]
        return list(dict.fromkeys([*chosen, *refused, *self.notes]))


@dataclass(frozen=True)
class KernelPlans:
    """The plans of one node, over all calls of its function."""

    specs: tuple[SpecPlans, ...]

    def __str__(self) -> str:
        """Return a line for every choice; where calls differ, their descriptions between."""
        if len(self.specs) == 1:
            return "\n".join(self.specs[0].lines())
        # The lines say the phase; a description begins with it.
        rows = [(plans.spec.describe().partition(" ")[2], plans.lines()) for plans in self.specs]
        return "\n".join(f"{spec}: {line}" for spec, lines in rows for line in lines)


class PlannedKernels(Record):
    """Which families of kernels run the attentions, and how many plans there are."""

    families: list[str]
    plans: int

    def line(self) -> str:
        return f"{self.plans} plans of {', '.join(self.families)}" if self.plans else "no plans"


@dataclass
class PlanKernels(Pass):
    """Annotate every attention with the kernels that run it on a target, or why none does.

    Every description is planned for prefill and decode, with and without a padding mask, and for
    a cache that grows by copying as for one with room to spare.

    Legality:

    1. No node changes: an annotation decides no number.
    2. A plan satisfies every inequality of its family over the target's figures.

    Options:
        target: Name of a target.
    """

    target: str = "cpu"

    name: ClassVar[str] = "plan-kernels"
    record: ClassVar[type[Record]] = PlannedKernels

    def run(self, program: Program, context: Context) -> PassResult:
        machine = get_target(self.target)
        result = PassResult(program)
        if not machine.kernels:
            result.record = PlannedKernels(families=[], plans=0)
            return result
        planned: dict[AttentionSpec, SpecPlans] = {}
        of_node: dict[Node, dict[AttentionSpec, SpecPlans]] = {}
        for where, node, spec in _attentions(program, compute_dtype(program, machine)):
            if spec not in planned:
                planned[spec] = _plan(spec, machine, where, len(planned))
                result.skipped += [Skip(where, reason) for reason in planned[spec].refused]
            of_node.setdefault(node, {})[spec] = planned[spec]
            result.matched += 1
        for node, specs in of_node.items():
            node.annotations[ANNOTATION] = KernelPlans(tuple(specs.values()))
        chosen = [plan for plans in planned.values() for plan in plans.plans]
        families = dict.fromkeys(plan.kernel for plan in chosen)
        result.record = PlannedKernels(families=list(families), plans=len(chosen))
        return result


def planned_attentions(program: Program) -> list[SpecPlans]:
    """Return what `plan-kernels` found, of every description in the program, in its order."""
    found = {
        plans.spec: plans
        for call in program.calls
        for node in program.functions[call.function].nodes
        if ANNOTATION in node.annotations
        for plans in node.annotations[ANNOTATION].specs
    }
    return sorted(found.values(), key=lambda plans: plans.number)


def compute_dtype(program: Program, target: Target) -> str:
    """Return the 16-bit dtype a model computes in: its own where the target has it, else f16."""
    own = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(program.checkpoint_dtype)
    return own if own is not None and own in target.dtypes else "f16"


def _plan(spec: AttentionSpec, target: Target, where: str, number: int) -> SpecPlans:
    plans: list[AttentionPlan] = []
    refused: list[str] = []
    notes: list[str] = []
    for phase in ("prefill", "decode"):
        try:
            for padding_mask in (False, True):
                for kv_lens in (False, True):
                    whole = spec.replace(phase=phase, padding_mask=padding_mask, kv_lens=kv_lens)
                    plans += _plans(whole, target)
        except LoweringError as error:
            if phase == "decode" and any(plan.spec == spec for plan in plans):
                notes.append(f"decodes as a short prefill: {error.message}")
            else:
                refused.append(f"{phase}: {error.message}")
    return SpecPlans(number, where, spec, tuple(plans), tuple(refused), tuple(notes))


def _plans(spec: AttentionSpec, target: Target) -> Iterator[AttentionPlan]:
    """Yield the plan, and behind one of a kernel compiled ahead what runs without its code."""
    plan = plan_attention(spec, target)
    yield plan
    others = tuple(name for name in target.kernels if not get_family(name).ahead)
    if get_family(plan.kernel).ahead and others:
        with contextlib.suppress(LoweringError):
            yield plan_attention(spec, replace(target, kernels=others))


def _attentions(program: Program, dtype: str) -> Iterator[tuple[str, Node, AttentionSpec]]:
    """Yield where each attention is, its node and its description without phase and masks."""
    per_call, _ = infer_program(program)
    for call, types in zip(program.calls, per_call, strict=True):
        for node in program.functions[call.function].nodes:
            if node.op == "attention":
                attrs = resolve_attrs(node, call)
                spec = _spec(node, types, attrs, dtype)
                layout = _layout(program, call, node)
                yield call.path or call.function, node, _in_layout(spec, layout, attrs)


def _layout(program: Program, call: Call, node: Node) -> KVLayout:
    """Return where the keys lie that an attention of a call reads."""
    past = node.inputs[PAST_K] if len(node.inputs) > PAST_K else None
    for cache in program.functions[call.function].caches:
        if cache.past_k is past:
            return program.states[call.caches[cache.slot]].layout
    return KVLayout()


def _in_layout(spec: AttentionSpec, layout: KVLayout, attrs: dict[str, Any]) -> AttentionSpec:
    """Return a description with the layout of its keys, and what it gives beside its output."""
    spec = spec.replace(lse=bool(attrs.get("lse")))
    if layout.kind == "ring":
        return spec.replace(kv="ring", slots=layout.size)
    if layout.kind == "paged":
        # A kernel has the largest score of whole pages of the cache.
        maxima = attrs.get("page_max") == layout.size
        return spec.replace(kv="paged", page=layout.size, page_max=maxima)
    return spec


def _spec(node: Node, types: dict[Value, Type], attrs: dict[str, Any], dtype: str) -> AttentionSpec:
    def shape(index: int) -> tuple[Any, ...]:
        value = node.inputs[index]
        assert value is not None
        return types[value].shape

    def has(index: int) -> bool:
        return len(node.inputs) > index and node.inputs[index] is not None

    return AttentionSpec(
        head_dim=int(shape(QUERY)[3]), value_dim=int(shape(VALUE)[3]),
        heads=int(shape(QUERY)[1]), kv_heads=int(shape(KEY)[1]), dtype=dtype,
        causal=bool(attrs["causal"]), window=attrs.get("window"), chunk=attrs.get("chunk"),
        softcap=attrs.get("softcap"), sinks=has(SINKS), alibi=has(SLOPES), bias=has(BIAS),
    )  # fmt: skip
