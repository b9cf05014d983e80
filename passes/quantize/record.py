"""What `quantize` tells: what was rounded to how many bits, what it weighs, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from pydantic import Field

from graphopt.report.pictures import (
    axis,
    curves,
    facts_table,
    figure,
    halves,
    legend,
    seconds_rows,
    sentences,
    si,
    table,
)
from graphopt.report.record import Figure, Record, Seconds


@dataclass(frozen=True)
class RoundedWeight:
    """One matrix that became codes.

    Attributes:
        name: The weight's.
        bits, group: Of its encoding.
        error: Squared error of the matrix relative to its square.
    """

    name: str
    bits: int
    group: int
    error: float


@dataclass(frozen=True)
class RoundedBlock:
    """One block.

    Attributes:
        where: What it is called.
        weights: Squared error of its matrices relative to their square.
        stream: Squared error of the residual stream behind it, relative to each token's square and
            averaged over tokens; None where no text was run.
    """

    where: str
    weights: Figure
    stream: Figure


class QuantizedModel(Record):
    """What was rounded.

    Attributes:
        w, a, kv: Bits of weights of blocks, of what they read, and of keys and values; 16 for none.
        method: How codes were chosen.
        weights: The matrices that became codes.
        blocks: What came of each block.
        roundings: How many roundings of activations there are, and of keys and values.
        bits_per_weight: Of the matrices that became codes, scales and zero points included.
        bytes: Of all weights, before and after.
        scaled: How many values have features that were scaled first.
        tokens: How many tokens of text were measured.
        seconds: The seconds of the pass, by what they were spent on.
    """

    w: int
    a: int
    kv: int
    method: str
    weights: list[RoundedWeight] = Field(default_factory=list)
    blocks: list[RoundedBlock] = Field(default_factory=list)
    roundings: tuple[int, int] = (0, 0)
    bits_per_weight: Figure = None
    bytes: tuple[int, int]
    scaled: int = 0
    tokens: int = 0
    seconds: dict[str, Seconds] = Field(default_factory=dict)

    def line(self) -> str:
        before, after = self.bytes
        told: list[str] = []
        if self.weights:
            told.append(
                f"{len(self.weights)} matrices at {figure(self.bits_per_weight, 3)} bits a weight "
                f"by {self.method}"
            )
        activations, caches = self.roundings
        if activations:
            told.append(f"{activations} inputs of linears at {self.a} bits")
        if caches:
            told.append(f"keys and values of {caches} attentions at {self.kv} bits")
        told.append(f"weights {si(before, 'B')} → {si(after, 'B')}")
        streams = [block.stream for block in self.blocks if block.stream is not None]
        if streams:
            told.append(f"squared error of the stream behind the last block {figure(streams[-1])}")
        return "; ".join(told)

    def card(self) -> str:
        before, after = self.bytes
        rows = [
            ("weights of blocks", "as they were" if self.w == 16 else f"{self.w} bits"),
            ("what they read", "as it was" if self.a == 16 else f"{self.a} bits, per token"),
            ("keys and values", "as they were" if self.kv == 16 else f"{self.kv} bits, per token"),
            ("scaled first", f"the features of {self.scaled} values" if self.scaled else ""),
            ("bits a weight", "" if not self.weights else figure(self.bits_per_weight, 3)),
            ("bytes of all weights", f"{si(before, 'B')} → {si(after, 'B')}"),
            ("tokens measured", f"{self.tokens:,}" if self.tokens else ""),
        ]
        return "".join(
            (
                halves([facts_table(rows), seconds_rows(self.seconds)]),
                self._picture(),
                self._worst(),
            )
        )

    def _picture(self) -> str:
        """Return the error of the residual stream, block by block."""
        errors = [block.stream for block in self.blocks if block.stream is not None]
        highest = max(errors, default=0.0)
        if len(errors) < 2 or len(errors) != len(self.blocks) or highest <= 0:
            return ""
        line = [(number, error / highest) for number, error in enumerate(errors)]
        return (
            '<h3>Error by block</h3><p class="dim">Squared error of the residual stream behind '
            f"each block, relative to it. The highest point is {figure(highest)}.</p>"
            f"{curves([('attention', line)], len(errors) - 1, 'error of the stream by block')}"
            f"{axis(self.blocks[0].where, self.blocks[-1].where)}"
            f"{legend([('attention', f'{figure(errors[-1])} behind the last block')])}"
        )

    def _worst(self) -> str:
        """Return the matrices of the largest errors."""
        if not self.weights:
            return ""
        worst = sorted(self.weights, key=lambda weight: -weight.error)[:8]
        rows = [(escape(w.name), str(w.bits), str(w.group), escape(figure(w.error))) for w in worst]
        columns = ("weight", "bits", "group", "squared error")
        fact = f"The {len(worst)} of {len(self.weights)} matrices with the largest errors."
        return table(columns, rows, columns[1:]) + sentences([fact])
