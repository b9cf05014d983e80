"""Affine transforms in front of matrices, each with its inverse behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from pydantic import Field

from graphopt.calibration.affine_factors import FactorMaker, condition, conditions
from graphopt.calibration.affine_plan import AffinePlan, insert_transforms, plan_transforms
from graphopt.calibration.text import calibration_windows, pick, window_length
from graphopt.errors import PassError
from graphopt.ir.affine_sites import find_sites
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import (
    Context,
    Forecast,
    Pass,
    PassResult,
    Skip,
    register_pass,
)
from graphopt.report.pictures import figure, sentences
from graphopt.report.record import Figure, Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice, on_device


class InsertedTransform(pydantic.BaseModel):
    """One transform of one layer.

    Attributes:
        where: The layer, and what its weights are named by.
        form: How its features are divided, and into how many: `kronecker 24 x 24`.
        condition: The condition number of each of its parts.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    where: str
    form: str
    condition: dict[str, Figure]


class InsertedTransforms(Record):
    """What was inserted, and how well it can be inverted."""

    kind: str
    transforms: list[InsertedTransform]

    @property
    def worst(self) -> tuple[str, float] | None:
        """The part of the highest condition number, and that number."""
        found = [
            (number, f"{item.where}, {role}")
            for item in self.transforms
            for role, number in item.condition.items()
            if number is not None
        ]
        if not found:
            return None
        number, where = max(found)
        return where, number

    def line(self) -> str:
        worst = self.worst
        told = f"{len(self.transforms)} transforms ({self.kind})"
        return told if worst is None else f"{told}, condition at most {worst[1]:.3g} ({worst[0]})"

    def card(self) -> str:
        facts = [f"{len(self.transforms)} transforms of kind {self.kind} were inserted."]
        if self.worst is not None:
            where, number = self.worst
            facts.append(f"The highest condition number is {figure(number, 3)}, that of {where}.")
        return sentences(facts)


def inserted_transforms(plan: AffinePlan, kind: str) -> InsertedTransforms:
    """Return the record of a plan."""
    found: list[InsertedTransform] = []
    for part in plan.functions:
        layers = zip(part.calls, part.factors, part.key_matrices, strict=True)
        for call, factors, matrices in layers:
            for item, made in zip(part.inputs, factors, strict=True):
                sizes = (
                    "" if item.sizes.form == "none" else f" {item.sizes.left}x{item.sizes.right}"
                )
                found.append(
                    InsertedTransform(
                        where=f"{call.path}.{item.site.stem}",
                        form=f"{item.sizes.form}{sizes}",
                        condition={**conditions(made)},
                    )
                )
            for key, matrix in zip(part.keys, matrices, strict=True):
                found.append(
                    InsertedTransform(
                        where=f"{call.path}.{key.key_stem}",
                        form=f"keys {len(matrix)}",
                        condition={"keys": condition(matrix)},
                    )
                )
    return InsertedTransforms(kind=kind, transforms=found)


@register_pass
@dataclass
class InsertAffine(Pass):
    """Put an affine transform, and its inverse behind it, in front of the matrices of every layer.

    What matrices read is multiplied by an invertible matrix, a Kronecker product of two small ones
    (FlatQuant, arXiv 2410.09426, section 3.1), and by its inverse: nothing changes. `fold-affine`
    then multiplies the inverses into the weights, so that what lies between, which is flatter than
    it was, can be rounded to few bits. Matrices of one value share a transform. An attention's
    values are mapped feature by feature, which is undone behind it, and its merged heads across
    heads; keys are multiplied by a matrix and queries by its inverse transpose, in front of the
    attention and behind every rotation.

    `kind` is what the matrices are: `kronecker` draws invertible ones with scales, as training
    begins with; `hadamard` and `random` are orthogonal (QuaRot, arXiv 2404.00456); `closed` is
    solved for from second moments on the calibration text so that rounding costs least
    (`graphopt.solvers.alignment`); `scale` is a diagonal alone (SmoothQuant, arXiv 2211.10438);
    `none` inserts nothing.

    Legality:

    1. The node is a `linear`, an `experts` or a mixture's grouped product, of a matrix that is
       stored and that no other operation of the layer reads.
    2. A scale needs a norm, or the linear beside a gate, in front of it, whose result nothing else
       reads: it is folded there.
    3. Values are mapped where they are heads of one linear's output, and nothing but their
       attention, and nothing but matrices behind it, reads them.
    4. Keys are transformed where one attention alone reads them: a matrix in front of a rotation
       would not commute with it.
    5. The embedding, the head and what chooses experts stay as they are.
    6. Features that have no two useful factors (a prime, twice one) have a dense matrix where they
       are at most 1,024, and a block-diagonal one where they are more.

    Options:
        kind: What the transforms are.
        scale: Whether features are also scaled one by one, with kind=kronecker or closed.
        heads: Whether values and merged heads have transforms of their own.
        keys: Whether queries and keys are transformed.
        windows: How many windows of the calibration text second moments are of.
        seqlen: Tokens of a window.
    """

    name: ClassVar[str] = "insert-affine"
    record: ClassVar[type[Record]] = InsertedTransforms
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("!kv-cache",)

    kind: Literal["kronecker", "hadamard", "random", "closed", "scale", "none"] = "hadamard"
    scale: bool = True
    heads: bool = True
    keys: bool = True
    windows: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=16, gpu=64)
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=512, gpu=2048)

    def check(self, program: Program) -> None:
        sites = find_sites(program).values()
        if self.kind != "none" and not any(found.inputs or found.keys for found in sites):
            reasons = sorted({reason for found in sites for _, reason in found.left})
            raise PassError(
                f"{program.name} has no matrix that a transform can stand in front of"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                "Leave insert-affine out.",
            )

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        tokens = 0.0
        if self.kind in ("closed", "scale"):
            tokens = float(on_device(self.windows, device) * on_device(self.seqlen, device))
        return Forecast(f"inserts transforms of kind {self.kind}", tokens=tokens)

    def run(self, program: Program, context: Context) -> PassResult:
        if self.kind == "none":
            return PassResult(program, record=InsertedTransforms(kind="none", transforms=[]))
        generator = torch.Generator().manual_seed(context.seed)
        scaled = self.kind == "scale" or (self.scale and self.kind in ("kronecker", "closed"))
        maker = FactorMaker(self.kind, program, generator, scaled)
        windows = None
        if maker.needs_text:
            length = window_length(program, self.seqlen, context.device)
            count = on_device(self.windows, context.device)
            windows = pick(calibration_windows(program, context, length), count, context.seed)
        with must_fit(context.device, self.name, "Lower windows or seqlen, or take --device cpu."):
            plan = plan_transforms(
                program, maker, heads=self.heads, keys=self.keys, windows=windows,
                device=context.device, progress=context.progress,
            )  # fmt: skip
        insert_transforms(program, plan)
        record = inserted_transforms(plan, self.kind)
        skipped = [Skip(where, reason) for where, reason in plan.left]
        count = len(record.transforms)
        return PassResult(program, count + len(skipped), count, skipped, record)
