"""A model's attentions on a target with kernels: plans, sources, and what is compiled ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphopt.errors import LoweringError
from graphopt.ir.graph import Node, Program, Value, resolve_attrs
from graphopt.ir.ops.attention import BIAS, KEY, QUERY, SINKS, SLOPES, VALUE
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.lowering.kernels import (
    KernelFamily,
    LayerKernels,
    get_family,
    get_layer_family,
    plan_attention,
)
from graphopt.lowering.kernels.family import runtime_text
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.targets import Target, get_target

FOLDER = "kernels"
# Modules that go with every model, as they are.
_MODULES = ("functional", "attention", "dispatch")


@dataclass
class LoweredKernels:
    """What a program's attentions become on a target.

    Attributes:
        dtype: What the model computes in, an IR name.
        plans: Distinct ones, the best for a description first.
        refused: (where, reason) of each attention that no kernel of the target takes.
        notes: (where, what) of those that a kernel takes which was made for something else.
        ops: Those of the program.
    """

    target: Target
    dtype: str
    plans: list[AttentionPlan] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    ops: frozenset[str] = frozenset()

    def layer_kernels(self) -> list[LayerKernels]:
        """Return the kernels beside attention that the target has and the program needs."""
        groups = [g for name in self.target.layer_kernels for g in get_layer_family(name).groups]
        return [group for group in groups if not group.needed_by or group.needed_by & self.ops]

    def functions(self) -> list[str]:
        """Return the functions of `graphopt.ir.functional` that the folder has its own of."""
        own = [name for group in self.layer_kernels() for name in group.functions]
        return ["attention", "cached_attention", *own]

    def stems(self, family: KernelFamily) -> dict[str, AttentionPlan]:
        """Return the plans of a family, by the stem of the files of each."""
        return {
            stem: plan
            for stem, plan in zip(self._stems(), self.plans, strict=True)
            if plan.kernel == family.name
        }

    def _stems(self) -> list[str]:
        """Return the stem of the files of every plan; those compiled ahead are counted apart."""
        counts = {True: 0, False: 0}
        stems: list[str] = []
        for plan in self.plans:
            family = get_family(plan.kernel)
            stems.append(f"{family.launcher}_{plan.spec.phase}_{counts[family.ahead]}")
            counts[family.ahead] += 1
        return stems

    def files(self) -> dict[str, str]:
        """Return the text of every source file of the folder `kernels`, by name."""
        families = [get_family(name) for name in dict.fromkeys(plan.kernel for plan in self.plans)]
        modules: list[str] = [*_MODULES]
        kernels: list[str] = []
        for family in families:
            modules += (*family.modules, family.launcher)
        for group in self.layer_kernels():
            modules.append(group.module)
            kernels += group.files
        texts = {f"{name}.py": runtime_text(f"{name}.py") for name in modules}
        texts |= {f"{name}.py": runtime_text(f"kernels/{name}.py") for name in kernels}
        for family in families:
            texts |= family.sources(self.stems(family))
        texts["__init__.py"] = self._init()
        return texts

    def compile(self) -> dict[str, bytes]:
        """Return the machine code of every kernel that is compiled ahead, by file name.

        Raises:
            LoweringError: There is no compiler for it.
        """
        code: dict[str, bytes] = {}
        for stem, plan in zip(self._stems(), self.plans, strict=True):
            code |= get_family(plan.kernel).compile(plan, stem)
        return code

    @property
    def device(self) -> str:
        """What torch calls the device."""
        return "npu" if self.target.kind == "npu" else "cuda"

    @property
    def packages(self) -> list[str]:
        """What the model needs of PyPI, by the target's file."""
        return [*self.target.runtime, "safetensors"]

    def _init(self) -> str:
        rows: list[str] = []
        for stem, plan in zip(self._stems(), self.plans, strict=True):
            rows += [f"    # {line}" for line in plan.lines()]
            spec, family = plan.spec, get_family(plan.kernel)
            rows += [
                "    Planned(",
                "        AttentionKey(",
                f"            {spec.phase!r}, {spec.head_dim}, {spec.values}, {spec.group}, "
                f"torch.{TORCH_NAMES[spec.dtype]},",
                f"            causal={spec.causal}, window={spec.window}, chunk={spec.chunk}, "
                f"softcap={spec.softcap},",
                f"            sinks={spec.sinks}, alibi={spec.alibi}, bias={spec.bias}, "
                f"key_mask={spec.key_mask}, lengths={spec.lengths},",
                "        ),",
                f"        {family.launcher!r},",
                f"        {family.constants(plan)!r},",
                f"        {stem if family.ahead else None!r},",
                "    ),",
            ]
        number = self.target.isa.removeprefix("sm_")
        arch = divmod(int(number), 10) if number.isdigit() else None
        arguments = f"PLANS, HERE, {arch}"
        imports = [
            "from .dispatch import AttentionDispatcher, AttentionKey, Planned, StaticKVCache"
        ]
        for group in self.layer_kernels():
            functions = [*group.functions]
            if group.cache_writer is not None:
                arguments += f", {group.cache_writer}"
                functions.append(group.cache_writer)
            imports.append(f"from .{group.module} import {', '.join(sorted(functions))}")
        names = ["StaticKVCache", *self.functions()]
        return _INIT.format(
            title=self.target.title, rows="\n".join(rows), imports="\n".join(imports),
            arguments=arguments, names=", ".join(f'"{name}"' for name in names),
        )  # fmt: skip


TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16"}
_INIT = '''"""Attention for {title}, and the plans of its kernels; written by graphopt."""

from pathlib import Path

import torch

{imports}

HERE = Path(__file__).parent
PLANS = [
{rows}
]
DISPATCHER = AttentionDispatcher({arguments})
attention, cached_attention = DISPATCHER.attention, DISPATCHER.cached_attention

__all__ = [{names}]
'''


def compute_dtype(program: Program, target: Target) -> str:
    """Return the 16-bit dtype a model computes in: its own where the target has it, else f16."""
    own = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(program.checkpoint_dtype)
    return own if own is not None and own in target.dtypes else "f16"


def lower_attentions(program: Program, target: str) -> LoweredKernels | None:
    """Plan every attention of a program; None where the target has no kernels of ours.

    Every form is planned for prefill and decode, with and without a padding mask, and for a
    cache that grows by copying as for one with room to spare.
    """
    machine = get_target(target)
    if not machine.kernels:
        return None
    model = LoweredKernels(machine, compute_dtype(program, machine))
    called = {call.function for call in program.calls}
    model.ops = frozenset(node.op for name in called for node in program.functions[name].nodes)
    seen: dict[AttentionSpec, None] = {}
    for where, spec in _specs(program, model.dtype):
        if spec in seen:
            continue
        seen[spec] = None
        for phase in ("prefill", "decode"):
            try:
                for key_mask in (False, True):
                    for lengths in (False, True):
                        form = spec.replace(phase=phase, key_mask=key_mask, lengths=lengths)
                        model.plans += _plans(form, machine)
            except LoweringError as error:
                if phase == "decode" and any(plan.spec == spec for plan in model.plans):
                    model.notes.append((where, f"decodes as a short prefill: {error.message}"))
                else:
                    model.refused.append((where, f"{phase}: {error.message}"))
    return model


def _plans(spec: AttentionSpec, target: Target) -> Iterator[AttentionPlan]:
    """Yield the plan, and behind one of a kernel compiled ahead what runs without its code."""
    plan = plan_attention(spec, target)
    yield plan
    others = tuple(name for name in target.kernels if not get_family(name).ahead)
    if get_family(plan.kernel).ahead and others:
        with contextlib.suppress(LoweringError):
            yield plan_attention(spec, replace(target, kernels=others))


def _specs(program: Program, dtype: str) -> Iterator[tuple[str, AttentionSpec]]:
    """Yield where each attention is, and its description without phase and masks."""
    kinds, _ = infer_program(program)
    for call, types in zip(program.calls, kinds, strict=True):
        for node in program.functions[call.function].nodes:
            if node.op == "attention":
                attrs = resolve_attrs(node, call)
                yield call.path or call.function, _spec(node, types, attrs, dtype)


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


def range_report(program: Program, dtype: str) -> list[tuple[str, str]]:
    """Return what is lost where trained weights are rounded to f16, as (where, what).

    Reads every weight, one at a time. Nothing is said where they are of the dtype already.

    Raises:
        LoweringError: A weight is beyond the largest number of f16.
    """
    limits = torch.finfo(torch.float16)
    largest, small, count = 0.0, 0, 0
    if dtype != "f16":
        return []
    for weight in program.weights:
        if weight.constant or weight.dtype == torch.float16 or not weight.dtype.is_floating_point:
            continue
        values = weight.load(torch.float32).abs()
        top = float(values.max()) if values.numel() else 0.0
        if top > limits.max:
            raise LoweringError(
                f"{weight.name} holds {top:.6g}, and f16 ends at {limits.max:.6g}.",
                "Emit for a target with bf16, or for the CPU.",
            )
        largest = max(largest, top)
        small += int(((values > 0) & (values < limits.tiny)).sum())
        count += values.numel()
    if not count:
        return []
    return [
        (
            "weights",
            f"computed in f16: the largest is {largest:.4g} of {limits.max:.6g}; "
            f"{small:,} of {count:,} are below {limits.tiny:.2g} and lose precision",
        )
    ]
