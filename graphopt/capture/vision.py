"""What a model that sees has beside its decoder, and the decoder inside it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.capture.layer_calls import repeated_layers
from graphopt.capture.vision_probe import REMEDY, axis_sections, sees_both_ways
from graphopt.errors import CaptureError
from graphopt.ir.graph import Program
from graphopt.ir.vision import Vision
from graphopt.ir.weights import Producer, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graphopt.capture.assemble import Resolve

_PLAIN = frozenset({
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "labels", "logits_to_keep", "token_type_ids", "head_mask",
})  # fmt: skip
"""What the forward pass of a decoder may take that reads text alone."""


def language_decoder(module: PreTrainedModel) -> nn.Module:
    """Return the part of a model that sees which reads embeddings: its stack of layers.

    Raises:
        CaptureError: No part is one, or it takes more of pictures than embeddings.
    """
    decoder: nn.Module = module.get_decoder()
    label = type(module).__name__
    if decoder is module or not repeated_layers(decoder):
        raise CaptureError(
            f"{label}: no part of it is a decoder by itself, so its layout is unknown.", REMEDY
        )
    parameters = inspect.signature(type(decoder).forward).parameters
    taken = [
        name
        for name, parameter in parameters.items()
        if name not in _PLAIN | {"self"}
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if taken or "inputs_embeds" not in parameters:
        path = _path(module, decoder)
        what = f"takes {', '.join(sorted(taken))}" if taken else "takes no inputs_embeds"
        raise CaptureError(
            f"{path} ({type(decoder).__name__}) {what}: what pictures add inside its layers, as "
            "DeepStack and cross-attention do, has no form in graphopt.",
            REMEDY,
        )
    return decoder


def _path(module: nn.Module, part: nn.Module) -> str:
    return next((path for path, other in module.named_modules() if other is part), "the decoder")


class ReadWeights:
    """Hands on what resolves names, and remembers the parameters and buffers asked for."""

    def __init__(self, module: nn.Module, resolve: Resolve) -> None:
        self._resolve = resolve
        names: dict[int, str] = {}
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            names[id(value)] = name
        self._names = names
        self.read: set[str] = set()

    def __call__(self, name: str, parameter: Tensor) -> tuple[Producer, str | None]:
        self.read.add(self._names.get(id(parameter), name))
        return self._resolve(name, parameter)


def read_vision(
    module: PreTrainedModel, program: Program, resolve: Resolve, read: set[str]
) -> Vision:
    """Return what a model has beside the decoder that was captured of it.

    Args:
        module: Parameters on meta.
        program: The decoder on text alone.
        resolve: Gives the producer of a parameter.
        read: The parameters that the program reads.

    Raises:
        CaptureError: What the decoder does with pictures has no form.
    """
    decoder = language_decoder(module)
    inside = _path(module, decoder) + "."
    output = module.get_output_embeddings()
    head = set() if output is None else {f"{_path(module, output)}.{n}" for n in ("weight", "bias")}
    vision = Vision(image_token=_image_token(module.config))
    persistent = module.state_dict().keys()
    buffers = [(name, value) for name, value in module.named_buffers() if name in persistent]
    for name, parameter in (*module.named_parameters(), *buffers):
        if name in read:
            continue
        if name.startswith(inside) or name in head:
            raise CaptureError(
                f"{name} is read by pictures alone: parts of the decoder that a text does not "
                "pass have no form in graphopt.",
                REMEDY,
            )
        producer, checkpoint = resolve(name, parameter)
        vision.carried.add(Weight(name, producer, checkpoint))
    vision.embedding_scale = _embedding_scale(module)
    vision.sections = axis_sections(module, decoder, program)
    vision.both_ways = sees_both_ways(module, decoder, program)
    return vision


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise CaptureError(
        f"The config of type {config.model_type!r} states no image_token_id, so where pictures "
        "stand in a text is unknown.",
        REMEDY,
    )


def _embedding_scale(module: PreTrainedModel) -> float:
    """Return what the model's embedding multiplies rows of its table by."""
    embedding: Any = module.get_input_embeddings()
    table = torch.linspace(0.5, 1.5, 12).reshape(3, 4)
    ids = torch.tensor([[0, 2]])
    weight = embedding._parameters["weight"]
    embedding._parameters["weight"] = nn.Parameter(table, requires_grad=False)
    try:
        with torch.no_grad():
            ratio = embedding(ids) / F.embedding(ids, table)
    finally:
        embedding._parameters["weight"] = weight
    scale = float(ratio.flatten()[0])
    if not torch.allclose(ratio, torch.full_like(ratio, scale), rtol=1e-5):
        raise CaptureError(
            f"{type(embedding).__name__} does more than multiply the rows of its table, so what "
            "pictures are put among is unknown.",
            REMEDY,
        )
    return scale
