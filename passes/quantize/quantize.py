"""Weights, activations and KV caches in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.encoding import BITS
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, register_pass
from graphopt.passes.quantize.places import find_places
from graphopt.passes.quantize.record import QuantizedModel
from graphopt.passes.quantize.run import Quantizing
from graphopt.passes.quantize.tables import find_tables
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice, on_device

WHOLE = 16
"""What stands for numbers that are not rounded, whatever they are stored in."""


@register_pass
@dataclass
class Quantize(Pass):
    """Store weights as codes of few bits, and round activations, keys and values to few bits.

    The weights of the blocks' linears become codes of `w` bits, which share a scale in groups of
    `group` neighbours along the input, or, with `group=0`, in each output channel. With
    `symmetric=false` a group has a zero point too. `a` rounds what the blocks' linears read, also
    those whose weights stay as they are or are codes already, per token and symmetrically; `kv`
    rounds keys, behind rotary embeddings, and values, per token and head, with a zero point. 16
    stands for numbers that stay as they are.

    With `method=rtn` each element becomes the nearest code, and no text is needed. With
    `method=gptq` codes are chosen on `windows` windows of `seqlen` tokens of the calibration text,
    block by block, so that what linears give stays nearest to what they gave before anything was
    rounded: errors in front of a weight are made up for by it
    (`graphopt.passes.quantize.calibrated`), and of a column by the columns behind it
    (`graphopt.solvers.gptq`: GPTQ, arXiv 2210.17323, and coordinate descent behind it).

    With `scale`, features that matter are first scaled up in front of weights, and down in the norm
    or the rows in front of them, by the power of their size at which rounding costs least (AWQ,
    arXiv 2306.00978; `graphopt.passes.quantize.scaling`): `method=rtn,scale=true` is that method.

    With `clip` the range that codes of a group cover is searched for by squared error; else it is
    all of the group's.

    `head` and `embedding` are the bits of the output matrix and of the table of token embeddings,
    which most methods leave alone; they are rounded to nearest codes. Where the two are one weight
    they are given alike.

    Legality:

    1. A weight that is packed is a dense matrix that one `linear` of one layer reads; experts are
       not chosen by it. Others stay as they are.
    2. A group divides the features of a linear, or is halved until it does, down to 16; where none
       does, there is a scale for each output channel.
    3. Keys and values are those that an `attention` reads as new ones.
    4. Weights are finite, and so are activations on the calibration text.

    Options:
        w: Bits of the weights of the blocks' linears, 2, 3, 4 or 8.
        a: Bits of what the blocks' linears read, 2 to 8.
        kv: Bits of keys and values, 2 to 8.
        group: Neighbours along the input that share a scale; 0 for all of an output channel.
        symmetric: Whether codes of weights have no zero point of their own.
        method: How codes are chosen: nearest (rtn), or by the calibration text (gptq).
        scale: Whether features are scaled first where that is free.
        clip: Whether the range of codes is searched for.
        head: Bits of the output matrix, 2, 3, 4 or 8.
        embedding: Bits of the table of token embeddings, 2, 3, 4 or 8.
        windows: Windows of the calibration text that gptq and scale measure.
        seqlen: Tokens of a window.
    """

    name: ClassVar[str] = "quantize"
    record: ClassVar[type[Record]] = QuantizedModel
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    w: Annotated[int, Field(ge=2, le=16)] = 4
    a: Annotated[int, Field(ge=2, le=16)] = WHOLE
    kv: Annotated[int, Field(ge=2, le=16)] = WHOLE
    group: Annotated[int, Field(ge=0)] = 0
    symmetric: bool = True
    method: Literal["rtn", "gptq"] = "gptq"
    scale: bool = False
    clip: bool = True
    head: Annotated[int, Field(ge=2, le=16)] = WHOLE
    embedding: Annotated[int, Field(ge=2, le=16)] = WHOLE
    windows: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=16, gpu=64)
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=512, gpu=2048)

    @property
    def needs_text(self) -> bool:
        """Whether weights are rounded by what is measured on text."""
        return self.w < WHOLE and (self.scale or self.method == "gptq")

    def check_options(self) -> None:
        """Refuse widths that nothing computes with, and options that ask for nothing.

        Raises:
            UsageError: Naming the option and the widths that there are.
        """
        for option in ("w", "head", "embedding"):
            bits = getattr(self, option)
            if bits not in (*BITS, WHOLE):
                raise UsageError(
                    f"quantize: {option}={bits}, and codes of weights have "
                    f"{', '.join(map(str, BITS[:-1]))} or {BITS[-1]} bits.",
                    f"Give one of these, or {option}={WHOLE} to leave them as they are.",
                )
        for option in ("a", "kv"):
            bits = getattr(self, option)
            if 8 < bits < WHOLE:
                raise UsageError(
                    f"quantize: {option}={bits}, and activations are rounded to 2 to 8 bits.",
                    f"Give one of these, or {option}={WHOLE} to leave them as they are.",
                )
        if self.scale and self.w == WHOLE:
            raise UsageError(
                f"scale=true is for weights that are rounded, and w={WHOLE} leaves them.",
                "Give w, or leave scale out.",
            )
        if all(getattr(self, o) == WHOLE for o in ("w", "a", "kv", "head", "embedding")):
            raise UsageError(
                f"quantize with w={WHOLE} and nothing else rounds nothing.",
                "Give the bits of weights (w=), activations (a=) or keys and values (kv=).",
            )

    def check(self, program: Program) -> None:
        """Refuse a program that has nothing to round, or one table asked for in two widths.

        Raises:
            PassError: With the reason and the remedy.
        """
        places = find_places(program)
        if self.w < WHOLE and not any(places.packable.values()):
            reasons = sorted({skip.reason for skip in places.skipped})
            raise PassError(
                f"{program.name} has no linear whose weight can be packed"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                f"Give w={WHOLE}, or leave quantize out of the recipe.",
            )
        if self.a < WHOLE and not any(places.stages.values()):
            raise PassError(
                f"{program.name} has no linear of a block whose input could be rounded.",
                f"Give a={WHOLE}.",
            )
        if self.kv < WHOLE and not any(places.attentions.values()):
            raise PassError(
                f"{program.name} has no attention whose keys and values could be rounded.",
                f"Give kv={WHOLE}.",
            )
        tables = find_tables(program)
        for option, what in (("head", "output matrix"), ("embedding", "table of embeddings")):
            if getattr(self, option) < WHOLE and option in tables.reasons:
                raise PassError(
                    f"{program.name} cannot have its {what} rounded: {tables.reasons[option]}.",
                    f"Leave {option}={getattr(self, option)} out.",
                )
        if tables.tied and self.head != self.embedding:
            raise PassError(
                f"{program.name} has one weight as its output matrix and its table of embeddings, "
                f"and was asked for head={self.head} and embedding={self.embedding}.",
                "Give both alike.",
            )

    def milder(self, recipe: Sequence[str]) -> str:
        advice: list[str] = []
        if self.w < WHOLE:
            advice += ["give weights more bits (quantize{w=8})"] if self.w < 8 else []
            smaller = 32 if not self.group else self.group // 2
            advice += [f"make groups smaller ({{group={smaller}}})"] if smaller >= 16 else []
            advice.append("train the weights (tune-codes)")
        for option, what in (
            ("a", "activations"), ("kv", "keys and values"), ("head", "the output matrix"),
            ("embedding", "the table of embeddings"),
        ):  # fmt: skip
            bits = getattr(self, option)
            if bits < 8:
                advice.append(f"give {what} more bits ({{{option}=8}})")
            elif bits < WHOLE:
                advice.append(f"leave {what} as before ({{{option}={WHOLE}}})")
        return ", or ".join(advice)

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        told = [f"rounds the linears of {len(find_blocks(program))} blocks to {self.w} bits"]
        told = [] if self.w == WHOLE else told
        told += [] if self.a == WHOLE else [f"activations to {self.a}"]
        told += [] if self.kv == WHOLE else [f"keys and values to {self.kv}"]
        # Both models are run about twice, as far as each stage of a block.
        tokens = 4 * on_device(self.windows, device) * on_device(self.seqlen, device)
        return Forecast(", ".join(told), tokens=float(tokens) if self.needs_text else 0.0)

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower windows or seqlen, take method=rtn, or take --device cpu."
        with must_fit(context.device, "Rounding weights", remedy):
            return Quantizing(self, program, context).run()
