"""Kernel families that are compiled when a model is emitted, and travel with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.lowering.cuda.compile import compile_cuda
from graphopt.lowering.cuda.hopper import hopper_constants, hopper_source
from graphopt.lowering.cuda.volta import volta_constants, volta_text
from graphopt.lowering.triton.constants import kernel_constants
from graphopt.plan import AttentionPlan


@dataclass(frozen=True)
class Ahead:
    """How plans of a family become files of a model.

    Attributes:
        modules: Modules of the runtime that load and launch the kernel.
        constants: What the launcher asks for.
        text: The source, its plan and constants in front.
        images: Suffix of a file of code -> what it is compiled for. PTX is for GPUs that the
            machine code is not for.
    """

    modules: tuple[str, ...]
    constants: Callable[[AttentionPlan], dict[str, Any]]
    text: Callable[[AttentionPlan], str]
    images: Mapping[str, str]

    def compile(self, plan: AttentionPlan, name: str) -> dict[str, bytes]:
        """Return every file of code of a plan, by name.

        Raises:
            LoweringError: There is no compiler, or it refuses the source.
        """
        found: dict[str, bytes] = {}
        for suffix, arch in self.images.items():
            compiled = compile_cuda(self.text(plan), f"{name}.cu", arch, {})
            code = compiled.cubin if compiled.cubin is not None else (compiled.ptx or "").encode()
            found[name + suffix] = code
        return found


def _hopper(plan: AttentionPlan) -> dict[str, Any]:
    return {**kernel_constants(plan), **hopper_constants(plan)}


AHEAD = {
    "hopper-cuda": Ahead(("driver", "hopper"), _hopper, hopper_source, {".cubin": "sm_90a"}),
    "volta-cuda": Ahead(
        ("driver", "volta"),
        volta_constants,
        volta_text,
        {".cubin": "sm_70", ".ptx": "compute_70"},
    ),
}
