"""What a model that sees has beside the decoder of its language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from graphopt.ir.weight_store import WeightStore

Sections = tuple[int, int, int]
"""How many rotary frequencies turn with a token's place in time, height and width."""


@dataclass
class Vision:
    """Tower, projector and merging of a vision-language model, and how its decoder takes pictures.

    A program is the decoder on text alone; `graphopt.ir.sighted` makes of it, by this, the one
    that takes embeddings.

    Attributes:
        carried: The weights outside the decoder, by their names in the model's class. No pass
            reads or changes them.
        image_token: The id that stands in a text for a token of a picture.
        embedding_scale: What the class's embedding multiplies the rows of its table by. What a
            picture becomes is not multiplied.
        sections: Where positions have three axes; None where they have one.
        both_ways: Tokens of one picture see each other, also those behind them.
    """

    carried: WeightStore = field(default_factory=WeightStore)
    image_token: int = -1
    embedding_scale: float = 1.0
    sections: Sections | None = None
    both_ways: bool = False

    def copy(self) -> Vision:
        """Return an independent copy that shares the producers of the weights."""
        return replace(copy.copy(self), carried=self.carried.copy())
