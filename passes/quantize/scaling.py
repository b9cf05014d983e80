"""Activation-aware scaling: features that matter are scaled up in front of rounded weights.

A weight's columns times s, and what it reads divided by s, changes nothing; but a column that is
larger beside its neighbours is rounded more finely beside them. s is a power of the features' root
mean squares, and of a few powers the one is taken whose rounded weights move their products least.
It is folded into the gain of the norm, or the rows beside the gate, in front.

Source: Lin et al., AWQ, arXiv 2306.00978, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.affine_factors import FactorMaker, Sizes, checked
from graphopt.calibration.affine_plan import insert_transforms, plan_transforms
from graphopt.calibration.second_moments import SecondMoments
from graphopt.ir.affine import Factors
from graphopt.ir.affine_sites import InputSite
from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Call, Function, Program, Value
from graphopt.ir.types import Type
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.passes.quantize.places import find_places
from graphopt.passes.quantize.rounding import choose_grid
from graphopt.solvers.gptq import output_error

POWERS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
"""Powers that are tried, from none at all."""


@dataclass(kw_only=True)
class SearchedScales(FactorMaker):
    """Makes the scale of every site whose scale can be folded.

    Attributes:
        encoding: Returns how a matrix of a number of columns will be packed.
        clip: Whether ranges are searched for.
        packable: Weights that become codes in every layer that calls their function. A site whose
            scale would go into others has none: folding it would make them dense, and their own.
    """

    encoding: Callable[[int], Packed]
    clip: bool
    packable: Set[Value]

    def roles(self, site: InputSite, sizes: Sizes) -> list[str]:
        changed = {reader.weight for reader in site.readers}
        if site.scaled is not None and site.scaled.op == "linear":
            rows = site.scaled.inputs[1]
            assert rows is not None
            changed.add(rows)
        return super().roles(site, sizes) if changed <= self.packable else []

    def factors(
        self,
        function: Function,
        call: Call,
        site: InputSite,
        types: Mapping[Value, Type],
        sizes: Sizes,
        roles: Sequence[str],
        moments: Mapping[Value, SecondMoments],
    ) -> Factors:
        where = f"{call.path}.{site.stem}"
        c = moments[site.x].mean(where)
        slots = function.slots_by_value()
        matrices: list[Tensor] = []
        for reader in site.readers:
            weight = self.program.weights[call.weights[slots[reader.weight]]].load(torch.float32)
            matrices.append(weight.to(c.device).movedim(reader.axis, -1).flatten(0, -2))
        size = c.diagonal().sqrt()
        size = size.clamp(min=1e-4 * float(size.max()) + 1e-12)
        tried = [self._error(matrices, c, self._scale(size, power)) for power in POWERS]
        best = self._scale(size, POWERS[tried.index(min(tried))])
        return checked(Factors(scale=(1 / best).cpu()), where)

    @staticmethod
    def _scale(size: Tensor, power: float) -> Tensor:
        """Return the scale of a power: its geometric mean is 1."""
        logarithms = power * size.log()
        return (logarithms - logarithms.mean()).exp()

    def _error(self, matrices: Sequence[Tensor], c: Tensor, scale: Tensor) -> float:
        """Return by how much products move where matrices are rounded behind a scale."""
        total = 0.0
        for matrix in matrices:
            scaled = matrix * scale.float()
            encoding = self.encoding(matrix.shape[1])
            importance = (c.diagonal() / scale.square()).float() if self.clip else None
            grid = choose_grid(scaled, encoding, torch.float32, self.clip, importance)
            made = grid.values(grid.codes(scaled)) / scale.float()
            total += output_error(made - matrix, c)
        return total


def scale_features(
    program: Program,
    windows: Tensor,
    encoding: Callable[[int], Packed],
    clip: bool,
    context: Context,
) -> tuple[Program, int]:
    """Return a program that computes the same, its features scaled, and how many sites were.

    Args:
        program: It is not changed.
        windows: Text, int64 [N, S].
        encoding: Returns how a matrix of a number of columns will be packed.
        clip: Whether ranges are searched for.

    Raises:
        PassError: Activations are not finite on the text.
    """
    scaled = program.copy()
    generator = torch.Generator().manual_seed(context.seed)
    maker = SearchedScales(
        "scale", scaled, generator, encoding=encoding, clip=clip, packable=_packable(scaled)
    )
    plan = plan_transforms(
        scaled, maker, heads=False, keys=False, windows=windows,
        device=context.device, progress=context.progress,
    )  # fmt: skip
    insert_transforms(scaled, plan)
    folded = make_pass("fold-affine", {}).run(scaled, context).program
    return folded, sum(len(part.inputs) * len(part.calls) for part in plan.functions)


def _packable(program: Program) -> set[Value]:
    """Return the weights of functions that can be packed in every call of a block."""
    places = find_places(program)
    packable: dict[str, frozenset[str]] = {}
    for position, slots in places.packable.items():
        name = program.calls[position].function
        packable[name] = packable.get(name, slots) & slots
    return {
        program.functions[name].weights[slot] for name, slots in packable.items() for slot in slots
    }
