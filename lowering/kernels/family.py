"""What a family of kernels is, and the registry of them: a file a family in this folder."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any, ClassVar

from graphopt.errors import LoweringError, unknown_name
from graphopt.plan import AttentionPlan, Planner
from graphopt.runtime.nvrtc import compile_cuda
from graphopt.targets import Target


class KernelFamily(ABC):
    """The attention kernels of one family: planned, written, compiled and launched.

    Attributes:
        planner: Finds the tiles, or says why there are none; its `kernel` names the family.
        launcher: The module of `graphopt.runtime` that starts the kernels. An emitted model
            carries it and calls its `load(phase, constants, code)`, which returns a function of
            (q, keys, scale=, extras=) that returns the output first.
        modules: Further modules of `graphopt.runtime` that the launcher imports.
        ahead: Whether a plan is compiled when the model is emitted. The machine that runs the
            model compiles the kernels of other families.
    """

    planner: ClassVar[Planner]
    launcher: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    ahead: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What targets, plans and tables of measured tiles call the family."""
        return self.planner.kernel

    @abstractmethod
    def constants(self, plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
        """Return what a plan's kernel is compiled for and what its launcher asks for, by name.

        Args:
            ring: Slots of the ring, where the plan's cache is one.
        """

    @abstractmethod
    def sources(self, plans: Mapping[str, AttentionPlan]) -> dict[str, str]:
        """Return the kernels' source files, by file name.

        Args:
            plans: The plans of this family in one model, by the stem of the files of each.
        """

    def compile(self, plan: AttentionPlan, stem: str) -> dict[str, bytes]:
        """Return the machine code of a plan by file name; nothing unless compiled ahead.

        Raises:
            LoweringError: There is no compiler, or it refuses the source.
        """
        return {}

    def load(self, plan: AttentionPlan) -> Callable[..., Any]:
        """Return what runs a plan on the machine at hand, as an emitted model would load it.

        Raises:
            LoweringError: There is no compiler, or it refuses the source.
        """
        code = next(iter(self.compile(plan, self.launcher).values()), None)
        launcher = import_module(f"graphopt.runtime.{self.launcher}")
        run: Callable[..., Any] = launcher.load(plan.spec.phase, self.constants(plan), code)
        return run


class CudaFamily(KernelFamily):
    """A family in CUDA C++, compiled when a model is emitted.

    Attributes:
        arch: The architecture that machine code is for, as `sm_70`.
        portable: Put PTX beside it, for GPUs that the machine code is not for.
    """

    modules = ("driver",)
    ahead = True
    arch: ClassVar[str]
    portable: ClassVar[bool] = False

    @abstractmethod
    def source(self, plan: AttentionPlan) -> str:
        """Return the CUDA C++ text of a plan's kernels, the plan in front as a comment."""

    def sources(self, plans: Mapping[str, AttentionPlan]) -> dict[str, str]:
        return {f"{stem}.cu": self.source(plan) for stem, plan in plans.items()}

    def compile(self, plan: AttentionPlan, stem: str) -> dict[str, bytes]:
        compiled = compile_cuda(self.source(plan), f"{stem}.cu", self.arch, {})
        assert compiled.cubin is not None
        files = {f"{stem}.cubin": compiled.cubin}
        if self.portable:
            files[f"{stem}.ptx"] = compiled.ptx.encode()
        return files


@dataclass(frozen=True)
class LayerSetup:
    """What an emitted model says to have a module's functions made for its target.

    Attributes:
        imports: Names that the statements mention, by the module that has them.
        makes: Functions that the statements define; the others are imported.
        statements: Lines of Python.
    """

    imports: Mapping[str, tuple[str, ...]]
    makes: tuple[str, ...]
    statements: tuple[str, ...]


@dataclass(frozen=True)
class LayerKernels:
    """One module of kernels for what a layer does beside attention.

    Attributes:
        module: The module of `graphopt.runtime` that has a function of its own for each of
            `functions`, of the same arguments.
        files: Its kernels under runtime/kernels.
        helpers: Modules of `graphopt.runtime` that it imports and that not every model has.
        sources: Kernels in CUDA C++ under runtime/kernels, compiled where the model runs.
        functions: Functions of `graphopt.ir.functional`, by name.
        classes: Classes of the module that stand for those of the same names in `model.py`.
        needed_by: Ops without which a program carries neither module nor kernels; empty where
            every program carries them.
        cache_writer: The function of the module that does what `kv_memory.append_kv` does; None
            where it has none.
        setup: Returns what makes functions of the module from the figures of a target; None where
            the target has none of them, which then runs `functional` instead.
    """

    module: str
    files: tuple[str, ...]
    functions: tuple[str, ...]
    needed_by: frozenset[str] = frozenset()
    cache_writer: str | None = None
    classes: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    setup: Callable[[Target], LayerSetup | None] | None = None


@dataclass(frozen=True)
class LayerFamily:
    """The kernels of one family for norms, rotary positions, gates, cache writes and experts.

    Attributes:
        name: What targets call it, in `layer_kernels`.
        groups: Its modules.
        refuses: Returns why a machine runs none of them; None where it runs them.
    """

    name: str
    groups: tuple[LayerKernels, ...]
    refuses: Callable[[Target], str | None] = lambda target: None


_FAMILIES: dict[str, KernelFamily] = {}
_LAYER_FAMILIES: dict[str, LayerFamily] = {}


def register_family(family: type[KernelFamily]) -> type[KernelFamily]:
    """Class decorator: make a family of attention kernels known under its planner's name.

    Raises:
        ValueError: The name is taken.
    """
    name = family.planner.kernel
    if name in _FAMILIES:
        raise ValueError(f"kernel family {name!r} is registered twice")
    _FAMILIES[name] = family()
    return family


def register_layer_family(family: LayerFamily) -> LayerFamily:
    """Make a family of layers' kernels known under its name.

    Raises:
        ValueError: The name is taken.
    """
    if family.name in _LAYER_FAMILIES:
        raise ValueError(f"family of layers' kernels {family.name!r} is registered twice")
    _LAYER_FAMILIES[family.name] = family
    return family


def all_families() -> dict[str, KernelFamily]:
    """Return the families of attention kernels, by name."""
    return dict(_FAMILIES)


def get_family(name: str) -> KernelFamily:
    """Return the family of attention kernels of that name.

    Raises:
        LoweringError: There is none; the message has the nearest name.
    """
    if name not in _FAMILIES:
        nearest = unknown_name("kernel family", name, _FAMILIES)
        raise LoweringError(nearest.message, nearest.remedy)
    return _FAMILIES[name]


def get_layer_family(name: str) -> LayerFamily:
    """Return the family of layers' kernels of that name.

    Raises:
        LoweringError: There is none; the message has the nearest name.
    """
    if name not in _LAYER_FAMILIES:
        nearest = unknown_name("family of layers' kernels", name, _LAYER_FAMILIES)
        raise LoweringError(nearest.message, nearest.remedy)
    return _LAYER_FAMILIES[name]


_OF_IR = ("functional.py", "kv_host.py", "kv_memory.py", "policy_attention.py")
_OF_SUPPORT = (
    "boundary.py", "free_memory.py", "meta_parameters.py", "native_library.py", "plain.py",
    "quantities.py", "rank_watch.py", "recorded.py",
)  # fmt: skip
POLICIES = "kv_policies"
"""The folder of the policies, in `graphopt.ir` and in models."""


def runtime_text(name: str) -> str:
    """Return a file that goes with a model, its imports turned to its neighbours.

    Args:
        name: `errors.py`, a file of `graphopt.ir` or `graphopt.support` that goes into models,
            such as `functional.py`, or a path under `graphopt.runtime`.
    """
    folder, _, _ = name.rpartition("/")
    package = "graphopt.runtime"
    if name in _OF_IR or folder == POLICIES:
        package = "graphopt.ir"
    elif name in _OF_SUPPORT:
        package = "graphopt.support"
    elif name == "errors.py":
        package = "graphopt"
    text = (resources.files(package) / name).read_text(encoding="utf-8")
    # Kernels lie beside what launches them, policies in a folder of their own.
    up = ".." if folder == POLICIES else "."
    modules = r"from graphopt\.(?:ir|runtime\.kernels|runtime|support)\.([\w.]+) import"
    text = re.sub(modules, rf"from {up}\1 import", text)
    text = re.sub(r"from graphopt\.(?:ir|runtime) import", f"from {up} import", text)
    return text.replace("from graphopt.errors import", f"from {up}errors import")


def policy_files() -> dict[str, str]:
    """Return the text of what runs policies of KV caches, by the path in the folder it goes to."""
    folder = resources.files("graphopt.ir") / POLICIES
    # A model's weights are with its others.
    own = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name.endswith(".py") and entry.name != "checkpoint.py"
    )
    names = ["errors.py", "policy_attention.py", *(f"{POLICIES}/{name}" for name in own)]
    return {name: runtime_text(name) for name in names}
