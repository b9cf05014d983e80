"""What decoders compute of pictures among their tokens: positions of three axes, and masks."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Count,
    Number,
    Offset,
    Op,
    Tensors,
    Types,
    need,
    register,
    same,
)
from graphopt.ir.types import Type

AXES = 3
"""Time, height and width."""


@register
class AxialRopeTable(Op):
    """Cosines and sines by positions of three axes: two of [B, S, R/2].

    positions [3, B, S] are in time, height and width, or [B, S] where all three are one, as they
    are in text; inv_freq [R/2]. The first `time` frequencies turn with the first axis, the next
    `height` with the second and the last `width` with the third.

    Source: Wang et al., Qwen2-VL, arXiv 2409.12191, section 2.1.
    """

    name = "axial_rope_table"
    operands = ("positions", "inv_freq")
    attributes = {"time": Offset, "height": Offset, "width": Offset, "scale": Number}  # noqa: RUF012
    defaults = {"scale": 1.0}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        positions, inv_freq = need(types, 0), need(types, 1)
        sections = attrs["time"] + attrs["height"] + attrs["width"]
        fits = len(positions.shape) == 2 or (
            len(positions.shape) == 3 and positions.shape[0] == AXES
        )
        if len(inv_freq.shape) != 1 or inv_freq.shape[0] != sections or not fits:
            raise ValueError(f"axial_rope_table of {sections} for {inv_freq} at {positions}")
        table = Type((*positions.shape[-2:], inv_freq.shape[0]), inv_freq.dtype)
        return [table, table]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, inv_freq = tensors
        assert positions is not None and inv_freq is not None
        scale, sections = attrs.get("scale", 1.0), (attrs["time"], attrs["height"], attrs["width"])
        columns = []
        for frequency in range(inv_freq.shape[0]):
            axis = sum(frequency >= sum(sections[: later + 1]) for later in range(AXES - 1))
            place = positions if positions.dim() == 2 else positions[axis]
            columns.append(place.to(inv_freq.dtype) * inv_freq[frequency])
        angles = torch.stack(columns, -1)
        return torch.cos(angles) * scale, torch.sin(angles) * scale

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, inv_freq = tensors
        assert positions is not None and inv_freq is not None
        sections = (attrs["time"], attrs["height"], attrs["width"])
        return functional.axial_rope_table(
            positions, inv_freq, *sections, scale=attrs.get("scale", 1.0)
        )


@register
class PictureMask(Op):
    """Which keys are seen where tokens of one picture see each other both ways: [B, 1, S, T].

    0 where a key is seen and minus infinity where not, an attention's `bias`. pictures int
    [B, T] says to which picture a token belongs, a negative number for none; tokens [B, S] are
    the S newest, of which only the shape counts. A token sees itself, what is before it, and the
    tokens of its own picture; with `window`, of all those the keys after its window-th last.

    Source: Gemma Team, Gemma 3, arXiv 2503.19786, and its code in transformers.
    """

    name = "picture_mask"
    operands = ("pictures", "tokens")
    attributes = {"window": Count | None}  # noqa: RUF012
    defaults = {"window": None}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        pictures, tokens = need(types, 0), need(types, 1)
        if len(pictures.shape) != 2 or len(tokens.shape) != 2:
            raise ValueError(f"picture_mask of {pictures} for {tokens}")
        if not same(pictures.shape[0], tokens.shape[0]):
            raise ValueError(f"picture_mask of {pictures} for {tokens}: batches differ")
        batch, keys = pictures.shape
        return [Type((batch, 1, tokens.shape[1], keys), torch.float32)]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        pictures, tokens = tensors
        assert pictures is not None and tokens is not None
        (batch, keys), queries, window = pictures.shape, tokens.shape[1], attrs.get("window")
        made = torch.full((batch, 1, queries, keys), float("-inf"))
        for row in range(batch):
            for query in range(queries):
                place = keys - queries + query
                for key in range(keys):
                    own = pictures[row, key] == pictures[row, place] and pictures[row, key] >= 0
                    near = window is None or key > place - window
                    if (key <= place or own) and near:
                        made[row, 0, query, key] = 0.0
        return (made,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        pictures, tokens = tensors
        assert pictures is not None and tokens is not None
        return (functional.picture_mask(pictures, tokens, attrs.get("window")),)
