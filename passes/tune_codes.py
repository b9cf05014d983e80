"""Training after `quantize`: scales and codes learn from the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from graphopt.errors import PassError
from graphopt.execute.block_runner import Parametrisation
from graphopt.ir.graph import Call, Program
from graphopt.ir.weights import Array, Dequantised
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, Skip, register_pass
from graphopt.pass_manager.rounding_statements import RetunedCodes
from graphopt.passes.quantize.record import QuantizedModel
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.training.codes import CodeParametrisation
from graphopt.training.distil import Distiller
from graphopt.training.forecast import forecast_training
from graphopt.training.options import TrainingOptions
from graphopt.training.parametrisations import weight_scale
from graphopt.training.record import TrainingRecord

WITHIN_A_STEP = 0.95
"""The share of elements that are within a step of their codes in a matrix that was rounded to them.
Rounding on text moves some farther, and clips the largest."""


class TunedCodes(TrainingRecord):
    """What training packed weights gave.

    Attributes:
        changed: The share of codes that became other ones.
    """

    changed: Annotated[float, Field(ge=0, le=1)] = 0.0

    def own_sentences(self) -> list[str]:
        return [*super().own_sentences(), f"{self.changed:.2%} of the codes became other ones."]


@register_pass
@dataclass
class TuneCodes(TrainingOptions, Pass):
    """Train a model of packed weights on the next-token distributions of the model as it was.

    Every element of a packed weight has a place between two codes and becomes the nearer one;
    places and scales are trained, and so are the gains and biases of the blocks
    (`graphopt.training.codes`). Encodings stay: the result is as large as what was given, and runs
    as fast. Activations, keys and values are rounded as they will be.

    Training lasts `seconds` or `steps`, whichever is given (150 seconds if neither). A step takes
    `batch` windows of `seqlen` tokens; by default 4 of 2048 on a GPU and 2 of 256 on a CPU.
    `generated_windows` is as for `fuse-blocks`.

    Legality:

    1. The recipe has `quantize` before it, which packed weights of the blocks.
    2. The calibration text has a window for training and one for checks.
    """

    name: ClassVar[str] = "tune-codes"
    record: ClassVar[type[Record]] = TunedCodes
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("quantize",)

    def check_options(self) -> None:
        self.refuse_low_rank("tune-codes trains scales and codes")

    def milder(self, recipe: Sequence[str]) -> str:
        return "train for longer (tune-codes{seconds=}) and on text of your own (--calib)"

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        return forecast_training(self, program, device, "trains scales and codes")

    def run(self, program: Program, context: Context) -> PassResult:
        packed = [weight.name for weight in program.used_weights() if weight.encoding is not None]
        if context.dense is None or context.record(QuantizedModel) is None or not packed:
            raise PassError(
                "tune-codes needs a model whose weights quantize packed.",
                "Run both in one recipe: quantize{w=4},tune-codes.",
            )
        remedy = "Lower batch or seqlen, or give generated_windows=0."
        with must_fit(context.device, self.name, remedy):
            return _Tuning(self, program, context).run()


class _Tuning(Distiller):
    """One run of the pass."""

    record: TunedCodes
    tells = TunedCodes

    def __init__(self, options: TuneCodes, program: Program, context: Context) -> None:
        super().__init__(options, program, context)
        self.codes: dict[str, CodeParametrisation] = {}

    def run(self) -> PassResult:
        self.note("the whole model", self.dense)
        self.note("rounding", self.program)
        self.distil(self.logit_data())
        self.note("trained", self.program)
        self.say_if_useless()
        packed = len(self.codes)
        statement = RetunedCodes()
        if not self.changed:
            return PassResult(self.original, packed, 0, self.skipped, self.record, statement)
        return PassResult(self.fold(), packed, packed, self.skipped, self.record, statement)

    def parametrisations(self, program: Program, calls: list[Call]) -> dict[str, Parametrisation]:
        found = super().parametrisations(program, calls)
        for name in list(found):
            weight = self.original.weights[name]
            encoding = weight.encoding
            if encoding is None:
                # Of dense weights those are trained that take no part in products.
                if len(weight.shape) > 1:
                    del found[name]
                continue
            if encoding.axis != 1:
                reason = f"it is {encoding}, and codes are trained whose groups lie along axis 1"
                self.skipped.append(Skip(name, reason))
                del found[name]
                continue
            tensors = {
                tensor.name.removeprefix(f"{name}."): tensor.load().to(self.device)
                for tensor in weight.tensors()
            }
            value = weight.load(torch.float32)
            source = self._source(name, value, tensors["scales"].float())
            codes = CodeParametrisation(encoding, tensors, source, weight_scale(value))
            self.codes[name] = found[name] = codes.to(self.device)
        return found

    def _source(self, name: str, value: torch.Tensor, steps: torch.Tensor) -> torch.Tensor | None:
        """Return a weight as it was before it was rounded; None where that is not known.

        The model as it was has a matrix of that name, which is not what was rounded where a pass in
        between scaled, fused or fitted it: then most elements are farther from it than a step.

        Args:
            value: The weight [out, in], fp32.
            steps: The scales of its codes, [out, groups].
        """
        dense = self.dense.weights
        if name not in dense or dense[name].shape != tuple(value.shape):
            return None
        source = dense[name].load(torch.float32).to(self.device)
        off = (source - value.to(source)).abs().unflatten(-1, (steps.shape[1], -1))
        near = (off <= steps.abs()[..., None]).float().mean()
        return source if float(near) >= WITHIN_A_STEP else None

    def fold(self, structure: Program | None = None) -> Program:
        result = super().fold(structure)
        changed = total = 0
        for name, codes in self.codes.items():
            weight = self.original.weights[name]
            assert isinstance(weight.producer, Dequantised)
            tensors = {s: t.cpu().contiguous() for s, t in codes.tensors().items()}
            before = weight.producer.encoding.codes(weight.producer.packed.load())
            after = weight.producer.encoding.codes(tensors["packed"])
            changed += int((before != after).sum())
            total += before.numel()
            parts = {suffix: Array(tensor) for suffix, tensor in tensors.items()}
            result.weights.replace(
                weight.with_producer(Dequantised(weight.producer.encoding, **parts))
            )
        self.record.changed = changed / max(total, 1)
        return result
