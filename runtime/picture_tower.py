"""What is around the decoder of a model that sees, run by transformers: pixels to embeddings.

It goes into packages of such models, which have transformers where there are pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import SourceError, UsageError, first_line
from graphopt.ir.functional import picture_mask, picture_numbers
from graphopt.support.boundary import out_of_memory

_KNOWN = frozenset({
    "inputs_embeds", "attention_mask", "position_ids", "input_ids", "past_key_values", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "cache_position",
})  # fmt: skip
"""What a decoder is called with that `Tower` passes on, or that changes no number."""


class _Reached(Exception):
    """The decoder was called."""


class Tower:
    """The tower, the projector and the merging of a model of transformers; its decoder is left out.

    Args:
        module: The model, its parameters on meta.
        carried: The weights outside the decoder, by their names in the model's class.
        embed: Maps token ids, int64 [B, S], to what the decoder takes for them, [B, S, D].
        image_token: The id of a token of a picture.
        axes: Whether positions have three axes.
        both_ways: Whether the tokens of one picture see each other both ways.
        dtype, device: Of the computation.
    """

    def __init__(
        self,
        module: Any,
        carried: Mapping[str, Tensor],
        embed: Callable[[Tensor], Tensor],
        *,
        image_token: int,
        axes: bool,
        both_ways: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.module, self.dtype, self.device = module, dtype, torch.device(device)
        self.image_token, self.axes, self.both_ways = image_token, axes, both_ways
        self.decoder: nn.Module = module.get_decoder()
        values = {name: value.to(device, dtype) for name, value in carried.items()}
        module.load_state_dict(values, strict=False, assign=True)

        def rows(ids: Tensor) -> Tensor:
            flat = embed(ids.reshape(1, -1) if ids.dim() != 2 else ids)
            return flat.reshape(*ids.shape, flat.shape[-1]).to(dtype)

        module.get_input_embeddings().forward = rows
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    kept = buffer.to(dtype) if buffer.is_floating_point() else buffer
                    part._buffers[name] = kept.to(device)

    @torch.no_grad()
    def inputs(self, input_ids: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """Return what a decoder that takes embeddings is given for texts with pictures.

        Args:
            input_ids: int64 [B, S], with the image token where a picture's tokens stand.
            given: What transformers' processor makes beside: `attention_mask` [B, S], and pixels
                and sizes in the model's own form; none for texts alone.

        Returns:
            `input_ids`, `attention_mask`, `position_ids` [B, S] or [3, B, S], `inputs_embeds`
            [B, S, D], and `pictures` [B, S] where tokens of a picture see each other both ways.

        Raises:
            UsageError: Texts have other numbers of image tokens than their pictures have.
            SourceError: The decoder is called with something else besides.
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
            except (SourceError, UsageError):
                raise
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
        embeds = called["inputs_embeds"]
        made = {"input_ids": input_ids, "attention_mask": mask, "inputs_embeds": embeds}
        positions = called.get("position_ids")
        if positions is None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.axes and positions.dim() == 2:
            positions = positions[None].expand(3, -1, -1)
        made["position_ids"] = positions[-3:] if positions.dim() == 3 else positions
        if self.both_ways:
            made["pictures"] = self._pictures(input_ids, called.get("attention_mask"))
        return made

    def _own(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def _pictures(self, input_ids: Tensor, masks: Any) -> Tensor:
        """Return which picture each token belongs to; the masks of the model must agree."""
        numbers = picture_numbers(input_ids == self.image_token)
        full = masks.get("full_attention") if isinstance(masks, dict) else masks
        if isinstance(full, Tensor) and full.dim() == 4:
            wanted = picture_mask(numbers, input_ids) == 0
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
