"""Tower and projector of a model that sees, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphopt.backends.onnx_embedding import OnnxEmbedding
from graphopt.backends.onnx_session import open_session
from graphopt.capture import model_of_config
from graphopt.capture.model import everything_on_meta
from graphopt.capture.vision_export import GRIDS, PIXELS, SIZES, TowerParts, tower_of
from graphopt.errors import UsageError
from graphopt.files.onnx_file import VISION_NAME
from graphopt.ir.embedder import FEATURES
from graphopt.ir.graph import Program
from graphopt.runtime.picture_tower import Tower


class OnnxTower(Tower):
    """What is around the decoder, with `vision.onnx` in the place of tower and projector.

    How pictures are divided into tiles in front of the tower, how rows of features are arranged
    behind the projector, and where they go, is transformers' own.

    Args:
        program: Of the folder's model.
        folder: With `vision.onnx` and `embedding.onnx`.

    Raises:
        UsageError: The folder has no `vision.onnx`, or the model is one of text alone.
        SourceError: ONNX Runtime cannot load a graph.
    """

    def __init__(self, program: Program, folder: Path) -> None:
        if program.vision is not None and not (folder / VISION_NAME).is_file():
            raise UsageError(
                f"{folder} has no {VISION_NAME}, which makes features of pictures.",
                "Leave --backend out: pictures are looked at by the program.",
            )
        if program.vision is None:
            raise UsageError(
                f"{program.name} is a model of text alone and takes no pictures.",
                "Give a vision-language model, or leave the pictures out.",
            )
        vision = program.vision
        module = model_of_config(program.config)
        parts = tower_of(module)
        inside = tuple(
            f"{path}."
            for path, part in module.named_modules()
            if part is parts.first or part is parts.last
        )
        outside = [w for w in vision.carried if not w.name.startswith(inside)]
        super().__init__(
            module,
            {weight.name: weight.load(torch.float32) for weight in outside},
            OnnxEmbedding(folder),
            image_token=vision.image_token,
            axes=vision.sections is not None,
            both_ways=vision.both_ways,
        )
        self._session = open_session(folder / VISION_NAME)
        self._asked = [value.name for value in self._session.get_inputs()]
        self._features: Tensor | None = None
        self._stand_in(parts)

    def _stand_in(self, parts: TowerParts) -> None:
        """Let the tower put down what it is given, and the projector return the graph's rows.

        Both run on tensors without values, which have the sizes that what lies between asks for.
        """
        first, last = parts.first, parts.last

        def look(*args: Any, **kwargs: Any) -> Any:
            self._features = self._run(args, kwargs)
            if first is last:
                return SimpleNamespace(pooler_output=self._features)
            with everything_on_meta(first), _NothingMasked():
                return first(*map(_sizes, args), **{n: _sizes(v) for n, v in kwargs.items()})

        def project(*args: Any, **kwargs: Any) -> Tensor:
            with everything_on_meta(last):
                shape = last(*args, **kwargs).shape
            assert self._features is not None
            return self._features.view(shape)

        for name, child in list(parts.owner.named_children()):
            if child is first:
                parts.owner.register_module(name, _StandIn(first, look))
            elif child is last:
                parts.owner.register_module(name, _StandIn(last, project))

    def _run(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
        """Return the rows [rows, D] of the pictures that reach the tower."""
        masks = [v for v in given.values() if isinstance(v, Tensor) and v.dtype == torch.bool]
        if not all(bool(mask.all()) for mask in masks):
            raise UsageError(
                f"Pictures are padded to one size, and {VISION_NAME} takes whole ones.",
                "Leave --backend out: pictures are looked at by the program.",
            )
        pixels = args[0] if args else given[PIXELS]
        if GRIDS in self._asked:
            return self._rows({PIXELS: pixels, GRIDS: given["grid_thw"]})
        if given.get(SIZES) is None or not isinstance(self._session.get_inputs()[0].shape[0], int):
            return self._rows({PIXELS: pixels})
        # A graph for one picture of any size has them one by one, without what pads them.
        cut = [
            picture[None, :, : int(height), : int(width)]
            for picture, (height, width) in zip(pixels, given[SIZES], strict=True)
        ]
        return torch.cat([self._rows({PIXELS: one}) for one in cut])

    def _rows(self, feeds: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: value.contiguous().numpy() for name, value in feeds.items()}
        return torch.from_numpy(self._session.run([FEATURES], arrays)[0])


class _StandIn(nn.Module):
    """What is in the place of a part of a model, and says of itself what the part does."""

    def __init__(self, part: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self._stood_for, self._run = [part], run  # in a list, it is no part of this one
        # A model is where its first parameter is.
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stood_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class _NothingMasked(TorchFunctionMode):
    """Inside, what is asked of marks without values is true: pictures are whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item) and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _sizes(value: Any) -> Any:
    """Return a tensor of numbers or marks without its values; whole numbers are sizes and stay."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.bool):
        return value.to("meta")
    return value
