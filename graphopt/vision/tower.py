"""What is around the decoder of a model that sees, run by transformers: pixels to embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture import model_of_config
from graphopt.capture.vision import language_decoder
from graphopt.capture.vision_probe import picture_numbers
from graphopt.errors import SourceError, UsageError, first_line
from graphopt.ir import functional
from graphopt.ir.graph import Program
from graphopt.ir.sighted import EMBEDS, PICTURES
from graphopt.support.boundary import out_of_memory

_KNOWN = frozenset({
    "inputs_embeds", "attention_mask", "position_ids", "input_ids", "past_key_values", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "cache_position",
})  # fmt: skip
"""What a decoder is called with that `VisionTower` passes on, or that changes no number."""


class _Reached(Exception):
    """The decoder was called."""


class VisionTower:
    """The tower, the projector and the merging of a program's model.

    They are transformers' own, with the weights that the program carries and the table that it
    looks words up in; the decoder is left out.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if program.vision is None:
            raise UsageError(
                f"{program.name} is a model of text alone and takes no pictures.",
                "Give a vision-language model, or leave the pictures out.",
            )
        if "auto_map" in program.config:
            raise UsageError(
                f"{program.name} is of a class that its checkpoint brings (auto_map), and pictures "
                "are looked at by transformers' own classes alone.",
                "Give the output folder that the checkpoint lies in, or use the model on text.",
            )
        self.program, self.vision = program, program.vision
        self.dtype, self.device = dtype, torch.device(device)
        self.module = model_of_config(program.config)
        self.decoder = language_decoder(self.module)
        values = {weight.name: weight.load(dtype).to(device) for weight in self.vision.carried}
        self.module.load_state_dict(values, strict=False, assign=True)
        self.module.get_input_embeddings().load_state_dict(
            {"weight": self._table().to(device)}, strict=False, assign=True
        )
        for part in self.module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    kept = buffer.to(dtype) if buffer.is_floating_point() else buffer
                    part._buffers[name] = kept.to(device)

    def _table(self) -> Tensor:
        """Return the rows that words are looked up as."""
        for call in self.program.calls:
            function = self.program.functions[call.function]
            slots = function.slots_by_value()
            for node in function.nodes:
                if node.op == "embedding" and node.inputs[1] in slots:
                    weight = self.program.weights[call.weights[slots[node.inputs[1]]]]
                    return weight.load(self.dtype)
        raise UsageError(
            f"{self.program.name} looks no words up in a table.",
            "Give the program that takes token ids.",
        )

    @torch.no_grad()
    def inputs(self, input_ids: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """Return what the sighted program takes for texts with pictures.

        Args:
            input_ids: int64 [B, S], with the image token where a picture's tokens stand.
            given: What transformers' processor makes beside: `attention_mask` [B, S], and pixels
                and sizes in the model's own form; none for texts alone.

        Returns:
            `input_ids`, `attention_mask`, `position_ids` [B, S] or [3, B, S], `inputs_embeds`
            [B, S, D], and `pictures` [B, S] where the program takes it.

        Raises:
            UsageError: Texts have other numbers of image tokens than their pictures have.
        """
        mask = given.pop("attention_mask", torch.ones_like(input_ids))
        called: dict[str, Any] = {}
        with _recorded(self.decoder, called):
            try:
                self.module(
                    input_ids=input_ids, attention_mask=mask, use_cache=False,
                    **{name: self._own(value) for name, value in given.items()},
                )  # fmt: skip
            except _Reached:
                pass
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise UsageError(
                    f"The pictures do not fit the prompts: {first_line(error)}.",
                    "Each prompt needs as many image tokens as its pictures have; transformers' "
                    "processor of the model puts them there.",
                ) from error
        odd = sorted(
            name
            for name, value in called.items()
            if name not in _KNOWN and isinstance(value, Tensor | list | tuple)
        )
        if odd:
            raise SourceError(
                f"{type(self.decoder).__name__} is called with {', '.join(odd)} where there are "
                "pictures, which has no form in graphopt.",
                "Use the model on text alone.",
            )
        made = {"input_ids": input_ids, "attention_mask": mask, EMBEDS: called[EMBEDS]}
        positions = called.get("position_ids")
        plain = (mask.cumsum(-1) - 1).clamp(min=0)
        if positions is None:
            positions = plain
        if self.vision.sections is not None and positions.dim() == 2:
            positions = positions[None].expand(3, -1, -1)
        made["position_ids"] = positions[-3:] if positions.dim() == 3 else positions
        if self.vision.both_ways:
            made[PICTURES] = self._pictures(input_ids, called.get("attention_mask"))
        return made

    def _own(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def _pictures(self, input_ids: Tensor, masks: Any) -> Tensor:
        """Return which picture each token belongs to; the masks of the model must agree."""
        own = input_ids == self.vision.image_token
        numbers = torch.stack([picture_numbers(row) for row in own])
        full = masks.get("full_attention") if isinstance(masks, dict) else masks
        if isinstance(full, Tensor) and full.dim() == 4:
            wanted = functional.picture_mask(numbers, input_ids) == 0
            seen = full[:, :1] if full.dtype == torch.bool else full[:, :1] == 0
            if bool((seen & ~wanted).any()):
                raise SourceError(
                    f"{type(self.module).__name__}: tokens of pictures see more than those of "
                    "their own picture, which has no form in graphopt.",
                    "Use the model on text alone.",
                )
        return numbers


@contextlib.contextmanager
def _recorded(decoder: nn.Module, called: dict[str, Any]) -> Iterator[None]:
    """Inside, a call of the decoder is put down, and goes no further."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.update(kwargs)
        raise _Reached

    decoder.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.__dict__["forward"]
