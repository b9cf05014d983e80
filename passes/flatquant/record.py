"""What `flatquant` tells: the error of every block before and after, conditions, clips."""

from __future__ import annotations

import pydantic

from graphopt.report.pictures import axis, curves, figure, legend, sentences
from graphopt.report.record import Figure
from graphopt.training.record import TrainingRecord


class TrainedBlock(pydantic.BaseModel):
    """What became of one block.

    Attributes:
        where: The block.
        before, after: Its relative squared error on held-out windows, with everything rounded, at
            the start of its training and at the end.
        steps: How many steps were made.
        condition: The condition number of every transform, by what it is named by and its part.
        clips: The share of the range that codes of activations, keys and values cover.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    where: str
    before: Figure
    after: Figure
    steps: int
    condition: dict[str, Figure]
    clips: dict[str, Figure]


class FlatQuantised(TrainingRecord):
    """What was trained and rounded.

    Attributes:
        kind: What the transforms are.
        bits: Of weights, activations, and keys and values.
        blocks: What became of each.
    """

    kind: str = ""
    bits: tuple[int, int, int] = (16, 16, 16)
    blocks: list[TrainedBlock] = pydantic.Field(default_factory=list)

    @property
    def worst(self) -> tuple[float, str] | None:
        """The highest condition number, and whose it is."""
        found = [
            (number, f"{block.where}.{name}")
            for block in self.blocks
            for name, number in block.condition.items()
            if number is not None
        ]
        return max(found, default=None)

    def line(self) -> str:
        told = f"W{self.bits[0]}A{self.bits[1]}KV{self.bits[2]}, transforms: {self.kind}"
        before, after = self._errors()
        if before and after:
            told += f"; error of blocks {before:.3g} → {after:.3g}"
        if self.worst is not None:
            told += f"; condition at most {self.worst[0]:.3g}"
        return "; ".join(filter(None, (told, super().line())))

    def own_sentences(self) -> list[str]:
        facts = super().own_sentences()
        if self.worst is not None:
            number, where = self.worst
            facts.append(f"The highest condition number is {figure(number, 3)}, that of {where}.")
        before, after = self._errors()
        if before and after:
            facts.append(
                f"The relative squared error of blocks went from {figure(before, 3)} to "
                f"{figure(after, 3)} on average."
            )
        return facts

    def card(self) -> str:
        return super().card() + self._picture()

    def _errors(self) -> tuple[float, float]:
        """Return the mean error of blocks before and after; 0 where there is none."""
        pairs = [(b.before, b.after) for b in self.blocks if b.before and b.after]
        if not pairs:
            return 0.0, 0.0
        first, last = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return first, last

    def _picture(self) -> str:
        sides = [[block.before for block in self.blocks], [block.after for block in self.blocks]]
        known = [value for side in sides for value in side if value]
        if len(self.blocks) < 2 or not known:
            return ""
        highest = max(known)
        lines = [
            (style, [(n, value / highest) for n, value in enumerate(side) if value])
            for style, side in zip(("time", "ffn"), sides, strict=True)
        ]
        note = sentences([f"Relative squared error of each block; the highest is {highest:.3g}."])
        picture = curves(lines, len(self.blocks) - 1, "error by block")
        ends = axis(self.blocks[0].where, self.blocks[-1].where)
        return f"<h3>Blocks</h3>{note}{picture}{ends}" + legend(
            [("bg-time", "before training"), ("ffn", "after")]
        )
