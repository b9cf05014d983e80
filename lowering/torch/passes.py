"""The passes that bring a program to what a torch artifact for a target runs."""

from __future__ import annotations

from graphopt.ir.graph import Program
from graphopt.ir.sighted import with_rows_apart
from graphopt.ir.verify import verify
from graphopt.lowering.kernels import get_layer_family
from graphopt.lowering.kernels.plan_kernels import PlanKernels
from graphopt.lowering.torch.fuse import FuseLayerOps
from graphopt.lowering.torch.packed import with_uniform_encodings
from graphopt.lowering.torch.residuals import DeferResidualAdds
from graphopt.lowering.torch.sees import Sees
from graphopt.pass_manager.contract import Context, Pass
from graphopt.targets import get_target


def lowering_passes(target: str) -> list[Pass]:
    """Return the exact passes that run before emission for a target, in their order."""
    machine = get_target(target)
    # What fuses ops is for kernels that run them, which a machine may be too old for.
    fuses = any(get_layer_family(name).refuses(machine) is None for name in machine.layer_kernels)
    passes: list[Pass] = [DeferResidualAdds(), FuseLayerOps(target)] if fuses else []
    return [*passes, PlanKernels(target)] if machine.kernels else passes


def lower(program: Program, target: str) -> Program:
    """Return the program as it is emitted for a target; only its structure is verified.

    In one of a model that sees, what token ids are looked up as is a value of its own, in the place
    of which embeddings may be given.

    Emission reads no weight for its text. A compile runs the same passes through a pipeline,
    which verifies each as it does those of a recipe; see `graphopt.compiler`.

    Raises:
        VerifyError: A pass made a malformed program.
    """
    passes = lowering_passes(target)
    if Sees.of(program) is not None:
        program = with_rows_apart(program)
    # The pass that fuses ops sees to that itself, behind one that layers of one function help.
    fused = any(isinstance(item, FuseLayerOps) for item in passes)
    lowered = program if fused else with_uniform_encodings(program)
    if passes and lowered is program:
        lowered = program.copy()
    for item in passes:
        lowered = item.run(lowered, Context()).program
        verify(lowered)
    return lowered
