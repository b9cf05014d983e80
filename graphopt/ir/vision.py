"""What a model that sees has beside the decoder of its language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graphopt.ir.weight_store import WeightStore

Sections = tuple[int, int, int]
"""How many rotary frequencies turn with a token's place in time, height and width."""


@dataclass(frozen=True, eq=False)
class PictureTokens:
    """Where tokens of pictures stand in a text whose ids from `first` on are such tokens.

    Each token of each picture has an id of its own, so that a window of ids says all of them.

    Attributes:
        first: The first id; the number of rows of the table that words are looked up in.
        pictures: int64 [K], which picture a token belongs to.
        places: int64 [3, K], how far it stands behind the beginning of its picture, in time, height
            and width.
        steps: int64 [K], for the last token of a picture how far apart the tokens around it stand,
            less one; 0 for the others.
    """

    first: int
    pictures: Tensor
    places: Tensor
    steps: Tensor

    def positions(self, ids: Tensor) -> Tensor:
        """Return the positions [3, B, S] of texts of ids [B, S], in time, height and width.

        They count from 0 at the first token; a picture that a text begins within stands as far
        from what follows as it does in its whole.
        """
        own, row = self._rows(ids)
        steps = torch.where(own, self.steps.to(ids.device)[row], 1)
        start = steps.cumsum(-1) - steps
        return start + torch.where(own, self.places.to(ids.device)[:, row], 0)

    def numbers(self, ids: Tensor) -> Tensor:
        """Return which picture each token of texts [B, S] belongs to, -1 for none."""
        own, row = self._rows(ids)
        return torch.where(own, self.pictures.to(ids.device)[row], -1)

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        own = ids >= self.first
        return own, torch.where(own, ids - self.first, 0)


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
        tokens: Where each token of a picture stands, while a pass learns from pictures that are
            more than vectors among others; None at all other times.
    """

    carried: WeightStore = field(default_factory=WeightStore)
    image_token: int = -1
    embedding_scale: float = 1.0
    sections: Sections | None = None
    both_ways: bool = False
    tokens: PictureTokens | None = None

    def copy(self) -> Vision:
        """Return an independent copy that shares the producers of the weights."""
        return replace(copy.copy(self), carried=self.carried.copy())
