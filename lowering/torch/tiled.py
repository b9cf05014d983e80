"""A model's attentions on a target with kernels: plans, sources, and what is compiled ahead."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import torch

from graphopt.errors import LoweringError
from graphopt.ir.graph import Node, Program, Value, resolve_attrs
from graphopt.ir.ops.attention import BIAS, KEY, QUERY, SINKS, SLOPES, VALUE
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.lowering.cuda.ahead import AHEAD
from graphopt.lowering.torch.fuse import FUSED, MOE
from graphopt.lowering.triton.constants import kernel_constants
from graphopt.lowering.triton.specialise import specialise
from graphopt.plan import AttentionPlan, AttentionSpec, plan_attention
from graphopt.plan.ascend import ascend_constants
from graphopt.targets import Target, get_target

FOLDER = "kernels"
# Modules that go with every model, as they are.
_MODULES = ("functional", "attention", "tiled")


@dataclass(frozen=True)
class _Triton:
    """A family written in Triton, which the machine at hand compiles when it runs.

    Attributes:
        kernels: Its files under runtime/kernels.
        modules: Modules of the runtime that launch it, beside those that go with every model.
        constants: What they ask for.
        entries: The functions that run a plan, by its phase: those of its files are emitted with
            all folded that is the same in every plan. None for files that go as they are.
    """

    kernels: tuple[str, ...]
    modules: tuple[str, ...]
    constants: Callable[[AttentionPlan], dict[str, Any]]
    entries: Mapping[str, tuple[str, ...]] | None = None


_TRITON = {
    "triton": _Triton(
        ("common", "prefill", "decode"),
        (),
        kernel_constants,
        {"prefill": ("attention_prefill",), "decode": ("attention_decode", "attention_merge")},
    ),
    "ascend-triton": _Triton(
        ("ascend_prefill", "ascend_decode"), ("ascend", "tiling_mask"), ascend_constants
    ),
}
# Families of kernels beside attention: the modules that launch them, and their files.
_LAYER_KERNELS = {"triton": (["fused"], ["block"])}
# The same, for models with experts.
_MOE_KERNELS = {"triton": (["moe"], ["experts"])}


@dataclass
class TiledModel:
    """What a program's attentions become on a target.

    Attributes:
        dtype: What the model computes in, an IR name.
        plans: Distinct ones, the best for a form first.
        refused: (where, reason) of each attention that no kernel of the target takes.
        notes: (where, what) of those that a kernel takes which was made for something else.
        images: Plans whose kernel is compiled ahead, by the stem of their files' names.
        experts: Whether tokens run some of a part's neurons.
    """

    target: Target
    dtype: str
    plans: list[AttentionPlan] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    images: dict[str, AttentionPlan] = field(default_factory=dict)
    experts: bool = False

    def files(self) -> dict[str, str]:
        """Return the text of every source file of the folder `kernels`, by name."""
        used = dict.fromkeys(plan.kernel for plan in self.plans)
        modules: list[str] = [*_MODULES]
        kernels: list[str] = []
        for kernel in used:
            modules += (AHEAD if kernel in AHEAD else _TRITON)[kernel].modules
        for family in self.target.layer_kernels:
            modules += _LAYER_KERNELS[family][0]
            kernels += _LAYER_KERNELS[family][1]
            if self.experts:
                modules += _MOE_KERNELS[family][0]
                kernels += _MOE_KERNELS[family][1]
        texts = {f"{name}.py": _runtime_text(f"{name}.py") for name in modules}
        texts |= {f"{name}.py": _runtime_text(f"kernels/{name}.py") for name in kernels}
        for kernel in used:
            if kernel in _TRITON:
                texts |= self._kernel_texts(kernel)
        for stem, plan in self.images.items():
            texts[f"{stem}.cu"] = AHEAD[plan.kernel].text(plan)
        texts["__init__.py"] = self._init()
        return texts

    def _kernel_texts(self, kernel: str) -> dict[str, str]:
        """Return the files of a family in Triton, by name, as its plans here need them."""
        family = _TRITON[kernel]
        texts = {name: _runtime_text(f"kernels/{name}.py") for name in family.kernels}
        if family.entries is not None:
            served: dict[str, list[tuple[str, dict[str, Any]]]] = {}
            for plan in self.plans:
                if plan.kernel == kernel:
                    for entry in family.entries[plan.spec.phase]:
                        row = (plan.spec.describe(), family.constants(plan))
                        served.setdefault(entry, []).append(row)
            texts = specialise(texts, served)
        return {f"{name}.py": text for name, text in texts.items()}

    def compile(self) -> dict[str, bytes]:
        """Return the machine code of every kernel that is compiled ahead, by file name.

        Raises:
            LoweringError: There is no compiler for it.
        """
        found: dict[str, bytes] = {}
        for stem, plan in self.images.items():
            found |= AHEAD[plan.kernel].compile(plan, stem)
        return found

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
        names = {id(plan): stem for stem, plan in self.images.items()}
        for plan in self.plans:
            rows += [f"    # {line}" for line in plan.lines()]
            spec = plan.spec
            image = names.get(id(plan))
            family = _TRITON[plan.kernel] if image is None else AHEAD[plan.kernel]
            constants = family.constants(plan)
            rows += [
                "    Planned(",
                "        Form(",
                f"            {spec.phase!r}, {spec.head_dim}, {spec.values}, {spec.group}, "
                f"torch.{TORCH_NAMES[spec.dtype]},",
                f"            causal={spec.causal}, window={spec.window}, chunk={spec.chunk}, "
                f"softcap={spec.softcap},",
                f"            sinks={spec.sinks}, alibi={spec.alibi}, bias={spec.bias}, "
                f"key_mask={spec.key_mask}, lengths={spec.lengths},",
                "        ),",
                f"        {plan.kernel!r},",
                f"        {constants!r},",
                f"        {image!r},",
                "    ),",
            ]
        number = self.target.isa.removeprefix("sm_")
        arch = divmod(int(number), 10) if number.isdigit() else None
        exported, tiled = ["Slot", "attention", "cached_attention"], f"PLANS, HERE, {arch}"
        imports = "from .tiled import Form, Planned, Slot, Tiled"
        if self.target.layer_kernels:
            joined = ", ".join(sorted([*FUSED, "append_kv"]))
            own = f"from .fused import {joined}\n"
            exported += FUSED
            if self.experts:
                own += f"from .moe import {', '.join(MOE)}\n"
                exported += MOE
            imports = own + imports
            tiled += ", append_kv"
        return _INIT.format(
            title=self.target.title, rows="\n".join(rows), imports=imports, tiled=tiled,
            names=", ".join(f'"{name}"' for name in exported),
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
TILED = Tiled({tiled})
attention, cached_attention = TILED.attention, TILED.cached_attention

__all__ = [{names}]
'''


def _runtime_text(name: str) -> str:
    """Return a module that goes with a model, its imports turned to its neighbours."""
    package = "graphopt.ir" if name == "functional.py" else "graphopt.runtime"
    text = (resources.files(package) / name).read_text(encoding="utf-8")
    text = re.sub(r"from graphopt\.runtime\.(?:kernels\.)?(\w+) import", r"from .\1 import", text)
    return re.sub(r"from graphopt\.(?:ir|runtime) import", "from . import", text)


def compute_dtype(program: Program, target: Target) -> str:
    """Return the 16-bit dtype a model computes in: its own where the target has it, else f16."""
    own = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(program.checkpoint_dtype)
    return own if own is not None and own in target.dtypes else "f16"


def lower_attentions(program: Program, target: str) -> TiledModel | None:
    """Plan every attention of a program; None where the target has no kernels of ours.

    Every form is planned for prefill and decode, with and without a padding mask, and for a
    cache that grows by copying as for one with room to spare.
    """
    machine = get_target(target)
    if not machine.kernels:
        return None
    model = TiledModel(machine, compute_dtype(program, machine))
    called = {call.function for call in program.calls}
    model.experts = any(
        node.op == "experts" for name in called for node in program.functions[name].nodes
    )
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
    for number, plan in enumerate(p for p in model.plans if p.kernel in AHEAD):
        model.images[f"{plan.kernel.removesuffix('-cuda')}_{plan.spec.phase}_{number}"] = plan
    return model


def _plans(spec: AttentionSpec, target: Target) -> Iterator[AttentionPlan]:
    """Yield the plan, and behind one of a kernel compiled ahead what runs without its image."""
    plan = plan_attention(spec, target)
    yield plan
    if plan.kernel in AHEAD and "triton" in target.kernels:
        with contextlib.suppress(LoweringError):
            yield plan_attention(spec, replace(target, kernels=("triton",)))


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
