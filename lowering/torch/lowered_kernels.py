"""A model's attentions on a GPU: plans of kernels, sources, and what is compiled ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from graphopt.errors import LoweringError
from graphopt.ir.dataflow import used_ops
from graphopt.ir.graph import Program
from graphopt.lowering.kernels import KernelFamily, LayerKernels, get_family, get_layer_family
from graphopt.lowering.kernels.family import policy_files, runtime_text
from graphopt.lowering.kernels.plan_kernels import PlanKernels, compute_dtype, planned_attentions
from graphopt.lowering.torch.sees import Sees
from graphopt.pass_manager.contract import Context
from graphopt.plan import AttentionPlan
from graphopt.runtime import host_attention
from graphopt.targets import Target, get_target

FOLDER = "kernels"
# Modules that go with every model, as they are.
_MODULES = (
    "functional",
    "kv_memory",
    "fitting_tiles",
    "attention",
    "kv_cache",
    "dispatch",
    "decoder",
    "recorded",
)
# Those of a model whose steps read what policies select, besides.
_POLICY_MODULES = (
    "kv_policy", "policy_cache", "policy_dispatch", "policy_decoder",
    "copies", "kv_offload", "kv_slots", "offloaded_cache", "free_memory", "quantities",
)  # fmt: skip
# Those of a model some of whose keys lie in the host's memory.
_HOST_MODULES = (
    "errors", "quantities", "free_memory", "native_library", "driver", "copies", "kv_host",
    "host_attention", "host_step", "host_parts", "host_layer", "host_kv", "host_decoder",
    "host_dispatch",
)  # fmt: skip


_ATTENTIONS = ("attention", "cached_attention", "attention_results")
_POLICY_FUNCTIONS = ("policy_attention", "policy_of")
_BY_ROWS = ("attention_by_rows", "cached_attention_by_rows")


@dataclass
class LoweredKernels:
    """What a program's attentions become on a target.

    Attributes:
        target: Where it runs.
        dtype: What the model computes in, an IR name.
        plans: Distinct ones, the best for a description first.
        refused: (where, reason) of each attention that no kernel of the target takes.
        notes: (where, what) of those that a kernel takes which was made for something else.
        ops: Those of the program.
        has_hosts: Whether keys of some layers lie in the host's memory.
        both_ways: Whether tokens of one picture see each other both ways.
    """

    target: Target
    dtype: str
    plans: list[AttentionPlan] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    ops: frozenset[str] = frozenset()
    has_hosts: bool = False
    both_ways: bool = False

    def layer_kernels(self) -> list[LayerKernels]:
        """Return the kernels beside attention that the target has and the program needs."""
        return [group for group, reason in self._wanted() if reason is None]

    def without_layer_kernels(self) -> list[tuple[str, str]]:
        """Return what the program needs and runs in plain torch, and why."""
        return [
            (", ".join(group.functions), f"run in plain torch: {reason}")
            for group, reason in self._wanted()
            if reason is not None
        ]

    def _wanted(self) -> Iterator[tuple[LayerKernels, str | None]]:
        """Yield the kernels that the program needs, and why the target has them not, or None."""
        for name in self.target.layer_kernels:
            family = get_layer_family(name)
            refused = family.refuses(self.target)
            for group in family.groups:
                reason = refused
                if refused is None and group.setup is not None and not group.setup(self.target):
                    reason = f"{self.target.name}.toml has no figures for their kernels"
                if not group.needed_by or group.needed_by & self.ops:
                    yield group, reason

    def functions(self) -> list[str]:
        """Return the functions of `graphopt.ir.functional`, and classes, that the folder has."""
        own = [n for group in self.layer_kernels() for n in (*group.functions, *group.classes)]
        policies = _POLICY_FUNCTIONS if self.has_policies else ()
        by_rows = _BY_ROWS if self.has_rows else ()
        both_ways = ("picture_attention",) if self.both_ways else ()
        return [*_ATTENTIONS, *by_rows, *policies, *both_ways, *own]

    @property
    def has_policies(self) -> bool:
        """Whether policies select what steps read."""
        return "policy_attention" in self.ops

    @property
    def has_rows(self) -> bool:
        """Whether sums over ranks ask for attentions row by row."""
        return "attention_linear_all_reduce" in self.ops

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
        compiled: list[str] = []
        for family in families:
            modules += (*family.modules, family.launcher)
        for group in self.layer_kernels():
            modules += (*group.helpers, group.module)
            kernels += group.files
            compiled += group.sources
        if self.has_policies:
            modules += _POLICY_MODULES
            kernels += ("kv_selection", "key_codes", "kv_fetch")
        modules += _HOST_MODULES if self.has_hosts else ()
        texts = {f"{name}.py": runtime_text(f"{name}.py") for name in modules}
        if self.has_hosts:
            texts |= {name: runtime_text(f"kernels/{name}") for name in host_attention.FILES}
        texts |= policy_files() if self.has_policies else {}
        texts |= {f"{name}.py": runtime_text(f"kernels/{name}.py") for name in kernels}
        texts |= {name: runtime_text(f"kernels/{name}") for name in compiled}
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
                f"padding_mask={spec.padding_mask}, kv_lens={spec.kv_lens},",
                f"            kv={spec.kv!r}, size={spec.slots or spec.page}, "
                f"selected_blocks={spec.selected_blocks}, lse={spec.lse}, "
                f"page_max={spec.page_max}, kv_bits={spec.kv_bits},",
                "        ),",
                f"        {family.launcher!r},",
                f"        {family.constants(plan)!r},",
                f"        {stem if family.ahead else None!r},",
                "    ),",
            ]
        arguments = f"PLANS, HERE, {self.target.compute_capability}"
        imports = [
            "from .decoder import Decoder",
            "from .dispatch import AttentionDispatcher, AttentionKey, Planned",
            "from .kv_cache import growing_caches, tokens_held",
        ]
        plans = "\n".join(["[", *rows, "]"]) if self.target.kernels else "None"
        more = "picture_attention = DISPATCHER.picture_attention\n" if self.both_ways else ""
        if self.has_rows:
            imports = [
                "from .attention_rows import RowsDispatcher as AttentionDispatcher",
                "from .decoder import Decoder",
                "from .dispatch import AttentionKey, Planned",
                "from .kv_cache import growing_caches, tokens_held",
            ]
            more += "".join(f"{name} = DISPATCHER.{name}\n" for name in _BY_ROWS)
        if self.has_policies:
            imports = [
                "from .dispatch import AttentionKey, Planned",
                "from .kv_cache import growing_caches, tokens_held",
                "from .policy_attention import policy_of",
                "from .policy_decoder import PolicyDecoder as Decoder",
                "from .policy_dispatch import PolicyDispatcher as AttentionDispatcher",
            ]
            more = "policy_attention = DISPATCHER.policy_attention\n"
        if self.has_hosts:
            imports = [
                "from .dispatch import AttentionKey, Planned",
                "from .host_decoder import HostDecoder as Decoder",
                "from .host_dispatch import HostDispatcher as AttentionDispatcher",
                "from .kv_cache import growing_caches, tokens_held",
            ]
        made: list[str] = []
        for group in self.layer_kernels():
            functions = [*group.functions, *group.classes]
            if group.cache_writer is not None:
                arguments += f", {group.cache_writer}"
                functions.append(group.cache_writer)
            needed = {group.module: functions}
            setup = None if group.setup is None else group.setup(self.target)
            if setup is not None:
                needed[group.module] = [name for name in functions if name not in setup.makes]
                for module, wanted in setup.imports.items():
                    needed[module] = [*needed.get(module, ()), *wanted]
                made += [*setup.statements, ""]
            imports += (
                f"from .{module} import {', '.join(sorted(names))}"
                for module, names in sorted(needed.items())
            )
        names = ["Decoder", "growing_caches", "tokens_held", *self.functions()]
        return _INIT.format(
            title=self.target.title, plans=plans, imports="\n".join(imports),
            made="".join(f"{line}\n" for line in made), more=more,
            arguments=arguments, names=", ".join(f'"{name}"' for name in names),
        )  # fmt: skip


TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16"}
_INIT = '''"""Attention for {title}, and the plans of its kernels; written by graphopt."""

from pathlib import Path

import torch

{imports}

HERE = Path(__file__).parent
PLANS = {plans}
DISPATCHER = AttentionDispatcher({arguments})
attention, cached_attention = DISPATCHER.attention, DISPATCHER.cached_attention
attention_results = DISPATCHER.attention_results
{more}
{made}__all__ = [{names}]
'''


def in_plain_torch(program: Program, machine: Target) -> bool:
    """Return whether a model is in plain PyTorch, with caches that grow by copying.

    So it is for a CPU; and for a GPU without kernels of ours if it has no 16 bits, or if policies
    select keys or some lie on the host, which kernels do in caches of fixed room.
    """
    if machine.kind == "cpu" or machine.kernels:
        return machine.kind == "cpu"
    apart = any(state.policy or state.host for state in program.states.values())
    return apart or "f16" not in machine.dtypes


def lower_attentions(program: Program, target: str) -> LoweredKernels | None:
    """Return the kernels of a program on a target; None where the model is in plain PyTorch.

    A GPU that has none of ours has no plans: its attentions and layers are torch's. Caches have
    fixed room, and a step is recorded, all the same.

    Args:
        program: As it is emitted: annotated by `plan-kernels`. Any other is planned here.
    """
    machine = get_target(target)
    if in_plain_torch(program, machine):
        return None
    planned = planned_attentions(program)
    if not planned:
        program = PlanKernels(target).run(program.copy(), Context()).program
        planned = planned_attentions(program)
    sees = Sees.of(program)
    return LoweredKernels(
        machine,
        compute_dtype(program, machine),
        # A ring's keys may come as those of another layer's contiguous cache do.
        list({(plan.spec, plan.kernel): plan for p in planned for plan in p.plans}.values()),
        [(plans.where, reason) for plans in planned for reason in plans.refused],
        [(plans.where, note) for plans in planned for note in plans.notes],
        used_ops(program),
        any(state.host for state in program.states.values()),
        sees is not None and sees.both_ways,
    )


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
