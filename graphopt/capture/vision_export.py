"""From pixels to what stands among a text's embeddings: a tower and its projector as a program."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphopt.capture import model_of_config
from graphopt.capture.export import Wrapped, export_function
from graphopt.capture.model import parameters_reserved
from graphopt.capture.packed_attention import attention_by_segments, packed_arguments
from graphopt.capture.vision import language_decoder
from graphopt.errors import CaptureError
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.embedder import FEATURES
from graphopt.ir.graph import Call, Program
from graphopt.ir.types import B, S, Type
from graphopt.ir.verify import verify
from graphopt.ir.weights import Array, Weight

PIXELS = "pixel_values"
"""What a tower takes: pictures [pictures, channels, height, width], or their patches."""

GRIDS = "image_grid_thw"
"""How many patches each picture has in time, height and width, int64 [pictures, 3]."""

SIZES = "image_sizes"
"""Height and width of each picture, int64 [pictures, 2]."""

_REMEDY = "Pictures are looked at by the program, or by the checkpoint (--emit hf) in transformers."


@dataclass(frozen=True)
class TowerParts:
    """What of a model of transformers makes embeddings of pictures.

    Attributes:
        owner: The part whose `get_image_features` runs the others.
        first, last: Those of its children between whose input and output the program lies; one
            where there is no projector by itself.
    """

    owner: nn.Module
    first: nn.Module
    last: nn.Module


def tower_of(module: nn.Module) -> TowerParts:
    """Return the tower of a model that sees, and its projector.

    Raises:
        CaptureError: The model's parts are arranged in another way.
    """
    owner = getattr(module, str(getattr(module, "base_model_prefix", "")), module)
    decoder = language_decoder(module)  # type: ignore[arg-type]
    parts = [
        child for child in owner.children()
        if child is not decoder and any(True for _ in child.parameters())
        and not any(other is decoder for other in child.modules())
    ]  # fmt: skip
    if not hasattr(owner, "get_image_features") or len(parts) not in (1, 2):
        raise CaptureError(
            f"{type(module).__name__}: which of its parts are tower and projector is unknown.",
            _REMEDY,
        )
    return TowerParts(owner, parts[0], parts[-1])


def tower_program(program: Program) -> Program:
    """Return what makes embeddings of pictures as a program of its own.

    Its inputs are what reaches the tower: `pixel_values` [pictures, channels, height, width] of
    the size that the config states; or the patches of all pictures [patches, values], and
    `image_grid_thw`. A symbol B is the number of pictures, S that of patches; where a tower takes
    one picture of any size, these are its height and width in merged patches. The result is
    `image_features` [rows, D]. Its weights are those that `program.vision` carries.

    Raises:
        CaptureError: torch.export cannot trace the tower, or its parts are arranged in an unknown
            way.
    """
    assert program.vision is not None
    module = model_of_config(program.config)
    tower = tower_of(module)
    inputs, run = _taken(module, tower)
    where = f"the tower ({type(tower.first).__name__})"
    with parameters_reserved(module), _segmented(module, tower):
        exported = export_function(Wrapped(module, run), list(inputs.values()), where)
    function = exported.function
    remove_dead(function)
    if len(function.results) != 1:
        raise CaptureError(f"{where} makes {len(function.results)} tensors, not one.", _REMEDY)
    made = Program(f"{program.name} vision", inputs=dict(inputs), outputs=[FEATURES])
    made.source, made.checkpoint_dtype = program.source, program.checkpoint_dtype
    function.name = "tower"
    made.functions[function.name] = function
    for param, name in zip(function.params, inputs, strict=True):
        param.name = name
    for slot in function.weights:
        if slot in program.vision.carried:
            made.weights.add(program.vision.carried[slot])
        elif slot in exported.constants:
            made.weights.add(Weight(slot, Array(exported.constants[slot]), None, constant=True))
        else:
            raise CaptureError(f"{where} reads {slot}, which is no weight around the decoder.")
    slots = {slot: slot for slot in function.weights}
    made.calls.append(Call(function.name, list(inputs), [FEATURES], slots))
    verify(made)
    return made


def _segmented(module: Any, tower: TowerParts) -> contextlib.AbstractContextManager[None]:
    """Let a tower attend by segments where it takes more than pictures of one size."""
    one = _any_size(tower.first)
    if packed_arguments(tower.first) is None and not one:
        return contextlib.nullcontext()
    return attention_by_segments(module.config.vision_config, one=one)


def _any_size(tower: nn.Module) -> bool:
    """Whether a tower takes pictures of several sizes, which it is told."""
    return SIZES in inspect.signature(type(tower).forward).parameters


def _taken(module: Any, tower: TowerParts) -> tuple[dict[str, Type], Callable[..., Tensor]]:
    """Return what the tower's program takes, and the function that it is."""
    config: Any = module.config
    seen = config.vision_config
    channels = getattr(seen, "num_channels", getattr(seen, "in_channels", 3))
    arguments = packed_arguments(tower.first)
    if arguments is not None:
        patches = seen.spatial_merge_size**2 * S, channels * seen.temporal_patch_size * (
            seen.patch_size**2
        )  # fmt: skip

        def packed(inner: Any, values: Tensor, grids: Tensor) -> Tensor:
            own = tower_of(inner)
            return _tensor(own.first(values, grid_thw=grids, **arguments(values, grids)))

        taken = {PIXELS: Type(patches, torch.float32), GRIDS: Type((B, 3), torch.int64)}
        return taken, packed

    def pictures(inner: Any, values: Tensor) -> Tensor:
        return _features(tower_of(inner), values)

    if _any_size(tower.first):
        unit = seen.patch_size * getattr(config, "spatial_merge_size", 1)
        return {PIXELS: Type((1, channels, unit * B, unit * S), torch.float32)}, pictures
    size = seen.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {PIXELS: Type((B, channels, height, width), torch.float32)}, pictures


def _features(tower: TowerParts, values: Tensor) -> Tensor:
    """Run the part of `get_image_features` between the tower's input and the projector's output.

    What lies in front of it divides pictures into tiles, or drops those that are none; what lies
    behind arranges their features.
    """
    made: list[Tensor] = []

    def enter(part: nn.Module, args: Any, kwargs: Any) -> Any:
        # Which patches are padding is said by masks; whole pictures have none.
        kept = {name: v for name, v in kwargs.items() if not isinstance(v, Tensor)}
        return (values, *args[1:]), kept

    def leave(part: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        made.append(_tensor(output))
        return _Over()

    hooks = [
        tower.first.register_forward_pre_hook(enter, with_kwargs=True),
        tower.last.register_forward_hook(leave, with_kwargs=True),
    ]
    run: Any = tower.owner.get_image_features
    sizes: dict[str, Any] = {}
    if SIZES in inspect.signature(run).parameters:
        sizes[SIZES] = [tuple(values.shape[-2:])] if _any_size(tower.first) else []
    try:
        # Some take the pictures of each prompt by themselves, and unpack five sizes.
        for given in (values, values[None]):
            with contextlib.suppress(_Reached, ValueError), _WholePictures():
                run(pixel_values=given, **sizes)
            if made:
                return made[0].flatten(0, -2)
    finally:
        for hook in hooks:
            hook.remove()
    raise CaptureError(f"{type(tower.owner).__name__} does not run its projector.", _REMEDY)


class _Reached(Exception):
    """The features are made; what is done with them behind the projector is not."""


class _Over:
    """Stands for the projector's output: whatever reads it ends the trace."""

    def __getattr__(self, name: str) -> Any:
        raise _Reached

    def __iter__(self) -> Iterator[Any]:
        raise _Reached

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Reached


class _WholePictures(TorchFunctionMode):
    """Inside, no picture of a batch is padding: choosing those that are none takes all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            tensor, index = args
            if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() == 1:
                return tensor
        return func(*args, **(kwargs or {}))


def _tensor(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    return pooled if isinstance(pooled, Tensor) else output
