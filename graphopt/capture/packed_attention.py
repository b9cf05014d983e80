"""Towers that take the patches of all pictures behind each other, without a loop over pictures.

transformers finds places, windows and ends of pictures by loops over the values of a grid, which no
trace holds. Here each is computed from the place of a patch among all, by whole-tensor arithmetic;
and what attends within a picture or a window does so by a mask of equal numbers.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAME = "graphopt_flash_by_segments"
"""Models hand on the ends of segments where the name of their attention has `flash` in it."""

Arguments = Callable[[Tensor, Tensor], dict[str, Any]]


def packed_arguments(tower: nn.Module) -> Arguments | None:
    """Return what a tower is called with beside patches and grids; None if it takes no grids.

    The function makes of patches [S, values] and grids int64 [pictures, 3] the arguments by which
    transformers' towers (5.17 and later) do not compute anything by loops.
    """
    if "grid_thw" not in inspect.signature(type(tower).forward).parameters:
        return None
    towers: Any = tower
    has_windows = hasattr(sys.modules[type(tower).__module__], "get_vision_window_index")
    merge = int(towers.spatial_merge_size)
    window = towers.window_size // towers.patch_size if has_windows else None

    def arguments(patches: Tensor, grids: Tensor) -> dict[str, Any]:
        places = patch_places(patches.shape[0], grids, merge)
        row, column = places["row"], places["column"]
        made: dict[str, Any] = {
            "position_ids": torch.stack((row, column), -1),
            "cu_seqlens": places["frame"],
            "max_seqlen": 1,
        }
        if window is not None:
            # What attends by numbers of windows may stay in the order of the patches.
            wide = places["width"] // window + 1
            tall = places["height"] // window + 1
            number = (row // window) * wide + column // window
            made["cu_window_seqlens"] = _numbered(places["frame"], number, (wide * tall).amax())
            made["max_window_seqlen"] = 1
            made["window_index"] = torch.arange(patches.shape[0] // merge**2)
        return made

    return arguments


def patch_places(count: int, grids: Tensor, merge: int) -> dict[str, Tensor]:
    """Return where patches stand: `row`, `column`, their picture's `height` and `width`, `frame`.

    Patches of a picture come frame by frame, and in a frame by squares of merge x merge, which
    become one token each. Frames of all pictures are numbered, unequal for unequal ones.

    Args:
        count: How many patches there are, S.
        grids: int64 [pictures, 3]: frames, height and width in patches.

    Returns:
        int64 [S] each.
    """
    frames, heights, widths = grids.unbind(-1)
    ends = (frames * heights * widths).cumsum(0)
    index = torch.arange(count)
    behind = index[:, None] >= ends[None]  # [S, pictures]
    picture = behind.sum(-1).clamp(max=grids.shape[0] - 1)
    start = F.pad(ends, (1, 0))[picture]
    height, width = heights[picture], widths[picture]
    within = index - start
    frame = within // (height * width)
    within = within % (height * width)
    square, inside = within // merge**2, within % merge**2
    across = width // merge
    return {
        "row": square // across * merge + inside // merge,
        "column": square % across * merge + inside % merge,
        "height": height,
        "width": width,
        "frame": _numbered(picture, frame, frames.amax()),
    }


def _numbered(outer: Tensor, inner: Tensor, most: Tensor) -> Tensor:
    """Return one number for two, of which the inner is below `most`."""
    return outer * most + inner


@contextlib.contextmanager
def attention_by_segments(config: Any, *, one: bool) -> Iterator[None]:
    """Inside, towers of a config attend by a mask of equal numbers in the place of ends.

    What is handed on as ends of segments (`cu_seq_lens_q`) are numbers [S]; a patch attends to
    those with its own.

    Args:
        one: There is one picture, and all patches attend to all.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None = None, scaling: float | None = None, **others: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend; query, key, value f32 [1, heads, S, D]; the result is [1, S, heads, D]."""
        numbers = None if one else others["cu_seq_lens_q"]
        mask = None if numbers is None else numbers[:, None] == numbers[None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2), None

    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_NAME]
