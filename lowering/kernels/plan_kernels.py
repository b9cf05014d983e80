"""The pass that plans the kernels of a target, as annotations of the nodes that they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from graphopt.errors import LoweringError
from graphopt.ir.graph import Call, KVLayout, KVState, Node, Program, Value, resolve_attrs
from graphopt.ir.kv_policies import KVPolicy
from graphopt.ir.ops.attention import (
    ATTENTIONS,
    BIAS,
    KEY,
    PAST_K,
    QUERY,
    SELECTED,
    SINKS,
    SLOPES,
    VALUE,
)
from graphopt.ir.relayout import with_layouts
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

    Every description is planned for prefill and decode, and for every form that its keys come in:
    those of a cache that grows by copying, with and without a padding mask, and those of one of
    fixed room. A ring's keys are read in the ring, or contiguous where a step is too long for that.

    An attention whose keys lie in the host's memory is planned in parts besides, whose results are
    merged by their log-sum-exp: a step's own keys, and those before it.

    States whose pages a policy selects are laid out in these pages, where the target has kernels
    that read some pages alone.

    Legality:

    1. No node changes: an annotation decides no number.
    2. A plan satisfies every inequality of its family over the target's figures.
    3. A state that is laid out in pages was contiguous: another layout was asked for.

    Options:
        target: Name of a target.
    """

    target: str = "cpu"

    name: ClassVar[str] = "plan-kernels"
    takes_ranks: ClassVar[bool] = True
    record: ClassVar[type[Record]] = PlannedKernels

    def run(self, program: Program, context: Context) -> PassResult:
        machine = get_target(self.target)
        result = PassResult(program)
        if not machine.kernels:
            result.record = PlannedKernels(families=[], plans=0)
            return result
        if _SELECTING & set(machine.kernels):
            result.program, result.changed = _in_pages(program)
            program = result.program
        planned: dict[_Described, SpecPlans] = {}
        of_node: dict[Node, dict[_Described, SpecPlans]] = {}
        for where, node, described in _attentions(program, compute_dtype(program, machine)):
            if described not in planned:
                planned[described] = _plan(described, machine, where, len(planned))
                result.skipped += [Skip(where, reason) for reason in planned[described].refused]
            of_node.setdefault(node, {})[described] = planned[described]
            result.matched += 1
        for node, specs in of_node.items():
            node.annotations[ANNOTATION] = KernelPlans(tuple(specs.values()))
        chosen = [plan for plans in planned.values() for plan in plans.plans]
        families = dict.fromkeys(plan.kernel for plan in chosen)
        result.record = PlannedKernels(families=list(families), plans=len(chosen))
        return result


_SELECTING = {"triton"}
"""Families of kernels that read selected pages alone."""


def _in_pages(program: Program) -> tuple[Program, int]:
    """Return the program with the states of policies in their pages, and how many were not."""
    layouts = {
        state.name: KVLayout("paged", state.policy.budget.page)
        for state in program.states.values()
        if state.policy is not None and state.layout.kind == "contiguous"
    }
    return (with_layouts(program, layouts) if layouts else program), len(layouts)


def planned_attentions(program: Program) -> list[SpecPlans]:
    """Return what `plan-kernels` found, of every description in the program, in its order."""
    found = {
        plans.number: plans
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


def _forms(spec: AttentionSpec) -> Iterator[AttentionSpec]:
    """Yield a description with each form that its keys come in, the plainest first."""
    flags = (False, True)
    if spec.kv == "paged" and spec.kv_bits == 16:
        yield from (spec.replace(padding_mask=mask, kv_lens=True) for mask in flags)
        return
    if spec.kv_bits < 16:
        # A cache of fixed room holds codes, and one that grows the values that they stand for.
        yield from _forms(spec.replace(kv_bits=16))
        yield spec.replace(kv_lens=True)
        if spec.kv == "ring":
            yield spec.replace(kv="contiguous", slots=None, kv_lens=True)
        return
    plain = spec.replace(kv="contiguous", slots=None)
    if spec.kv == "ring":
        yield from (plain.replace(padding_mask=mask) for mask in flags)
        yield from (form.replace(kv_lens=True) for form in (plain, spec))
        return
    yield from (plain.replace(padding_mask=a, kv_lens=b) for a in flags for b in flags)


def _plan(described: _Described, target: Target, where: str, number: int) -> SpecPlans:
    spec = described.spec
    if described.reason is not None:
        return SpecPlans(number, where, spec, (), (described.reason,), ())
    if described.in_parts:
        return _plan_parts(spec, target, where, number)
    plans: list[AttentionPlan] = []
    # One reason for each phase and layout: masks make no other.
    refused: dict[tuple[str, str], str] = {}
    notes: dict[str, str] = {}
    for phase in ("prefill", "decode"):
        for form in _forms(spec.replace(phase=phase)):
            try:
                plans += _plans(form, target)
            except LoweringError as error:
                prefill = form.replace(phase="prefill")
                if phase == "decode" and any(plan.spec == prefill for plan in plans):
                    note = f"decodes as a short prefill: {error.message}"
                    notes.setdefault(form.kv, note)
                else:
                    refused.setdefault((phase, form.kv), f"{phase}: {error.message}")
    rest = tuple(refused.values()), tuple(notes.values())
    return SpecPlans(number, where, spec, tuple(plans), *rest)


def _plan_parts(spec: AttentionSpec, target: Target, where: str, number: int) -> SpecPlans:
    """Plan the parts of an attention whose keys lie in the host's memory."""
    spec = spec.replace(lse=True, kv="contiguous", slots=None, sinks=False)
    past = spec.replace(causal=False, kv_lens=True)
    plans: list[AttentionPlan] = []
    refused: list[str] = []
    for form in (
        spec.replace(phase="prefill", kv_bits=16),  # of a step's own keys, not codes yet
        past.replace(phase="prefill"),
        past.replace(phase="decode"),
    ):
        try:
            plans += _plans(form, target)
        except LoweringError as error:
            refused.append(f"{form.phase} in parts: {error.message}")
    return SpecPlans(number, where, spec, tuple(plans), tuple(dict.fromkeys(refused)), ())


def _plans(spec: AttentionSpec, target: Target) -> Iterator[AttentionPlan]:
    """Yield the plan, and behind one of a kernel compiled ahead what runs without its code."""
    plan = plan_attention(spec, target)
    yield plan
    others = tuple(name for name in target.kernels if not get_family(name).ahead)
    if get_family(plan.kernel).ahead and others:
        with contextlib.suppress(LoweringError):
            yield plan_attention(spec, replace(target, kernels=others))


@dataclass(frozen=True)
class _Described:
    """An attention without phase and masks, or why no kernel reads its keys as they lie.

    Attributes:
        in_parts: It is merged from parts by their log-sum-exp.
    """

    spec: AttentionSpec
    reason: str | None = None
    in_parts: bool = False


def _attentions(program: Program, dtype: str) -> Iterator[tuple[str, Node, _Described]]:
    """Yield where each attention is, its node and its description."""
    per_call, _ = infer_program(program)
    for call, types in zip(program.calls, per_call, strict=True):
        for node in program.functions[call.function].nodes:
            if node.op not in ATTENTIONS:
                continue
            attrs = resolve_attrs(node, call)
            spec = _spec(node, types, attrs, dtype)
            layout, where = _layout(program, call, node), call.path or call.function
            if node.op == "attention":
                selects = node.operand(SELECTED) is not None
                yield where, node, _in_layout(spec, layout, attrs, selects=selects)
                if _on_host(program, call, node):
                    yield where, node, _Described(spec, in_parts=True)
                continue
            policy: KVPolicy = attrs["policy"]
            yield where, node, _in_layout(spec, layout, attrs, selects=False)
            learnt = {**attrs, "lse": True, "page_max": policy.budget.page}
            selected = {**learnt, "page": policy.budget.page}
            yield where, node, _in_layout(spec, layout, selected, selects=True)
            if policy.calibrate_every is not None:
                yield where, node, _in_layout(spec, layout, learnt, selects=False)


def _state(program: Program, call: Call, node: Node) -> KVState | None:
    """Return the state whose keys an attention of a call reads; None where it reads no cache."""
    past = node.operand(PAST_K)
    for cache in program.functions[call.function].caches:
        if cache.past_k is past:
            return program.states[call.caches[cache.slot]]
    return None


def _layout(program: Program, call: Call, node: Node) -> KVLayout:
    state = _state(program, call, node)
    return KVLayout() if state is None else state.layout


def _on_host(program: Program, call: Call, node: Node) -> bool:
    state = _state(program, call, node)
    return state is not None and state.host is not None


def _in_layout(
    spec: AttentionSpec, layout: KVLayout, attrs: dict[str, Any], *, selects: bool
) -> _Described:
    """Describe an attention with the layout of its keys, and what it gives beside its output."""
    spec = spec.replace(lse=bool(attrs.get("lse")))
    if layout.kind == "ring":
        spec = spec.replace(kv="ring", slots=layout.size)
    elif layout.kind == "paged":
        spec = spec.replace(kv="paged", page=layout.size)
    maxima = attrs.get("page_max")
    for tokens in (attrs.get("page"), maxima):
        if tokens not in (None, layout.page):
            reason = f"kernels know the pages of a paged cache, and pages of {tokens} tokens are "
            return _Described(spec, f"{reason}asked for of a {layout} one")
    return _Described(spec.replace(page_max=maxima is not None, selected_blocks=selects))


def _spec(node: Node, types: dict[Value, Type], attrs: dict[str, Any], dtype: str) -> AttentionSpec:
    def shape(index: int) -> tuple[Any, ...]:
        value = node.inputs[index]
        assert value is not None
        return types[value].shape

    def has(index: int) -> bool:
        return node.operand(index) is not None

    return AttentionSpec(
        head_dim=int(shape(QUERY)[3]), value_dim=int(shape(VALUE)[3]),
        heads=int(shape(QUERY)[1]), kv_heads=int(shape(KEY)[1]), dtype=dtype,
        causal=bool(attrs["causal"]), window=attrs.get("window"), chunk=attrs.get("chunk"),
        softcap=attrs.get("softcap"), sinks=has(SINKS), alibi=has(SLOPES), bias=has(BIAS),
        kv_bits=int(attrs.get("kv_bits", 16)),
    )  # fmt: skip
