"""A `model.py` that is loaded in this process, run as a language model."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.code import import_model
from graphopt.errors import GraphoptError, SourceError, first_line
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import _Replay
from graphopt.execute.likelihoods import token_log_likelihoods
from graphopt.files.finite import check_finite
from graphopt.ir.sighted import EMBEDS, PICTURES

_LOOKED_AT = (EMBEDS, "attention_mask", "position_ids", PICTURES)
"""What a decoder of fixed room is given of a prompt of embeddings."""


@dataclass(frozen=True)
class ModuleFacts:
    """What is to be known of a program to run its `model.py`.

    Attributes:
        cached: It has KV states.
        rings: All of them are rings, which do not say how many tokens came before.
        constants: The weights that may hold infinity on purpose.
        by_kernels: It runs by kernels for a GPU, in their 16 bits; else in fp32.
        offload: Keys and values of a text lie in host memory.
    """

    cached: bool
    rings: bool
    constants: Collection[str]
    by_kernels: bool = False
    offload: bool = False


class RunningModule:
    """A `model.py` that is loaded.

    Args:
        path: The file, whose text is to be run.
        weights: The folder of its weights.
        device: Where it runs; of a model for several ranks the kind of it, and each has its own.

    Raises:
        SourceError: It cannot be loaded.
    """

    def __init__(self, path: Path, weights: Path, device: torch.device, facts: ModuleFacts) -> None:
        from safetensors import SafetensorError

        self._facts, self._device = facts, device
        try:
            module = import_model(path)
            self._decoder = getattr(module, "Decoder", None)
            _check_weights(module, facts.constants)
            if facts.by_kernels:
                self._model = module.load(weights, device=device)
            else:
                self._model = module.load(weights, dtype=torch.float32, device=device)
            forward = inspect.signature(self._model.forward).parameters
            self._needs_mask = forward["attention_mask"].default is inspect.Parameter.empty
        except (
            OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError
        ) as error:  # fmt: skip
            raise SourceError(
                f"{weights / 'model.py'} cannot be loaded: {first_line(error)}.",
                "Compile the model again.",
            ) from error
        # Full rings do not say how many tokens came before; kernels are told.
        self._counts_by_mask = facts.cached and facts.rings and not facts.by_kernels

    def start(self, batch: int) -> Any:
        """See `LanguageModel.start`."""
        return self._model.empty_cache(batch) if self._facts.cached else _Replay()

    def start_text(self, room: int) -> Any:
        """See `LanguageModel.start_text`.

        Raises:
            GraphoptError: Keys are to lie in host memory, and cannot, or were placed for less.
        """
        if self._decoder is None:
            return self.start(1)
        # A decoder holds a token more than the prompt.
        room = max(room, 2)
        what, remedy = "There can be no such cache", "Ask for fewer tokens."
        if self._facts.offload:
            what, remedy = "Keys cannot lie in host memory", "Leave --offload out."
        try:
            if not self._facts.offload:
                return self._decoder(self._model, room)
            return self._decoder(self._model, room, offload=True)
        except Exception as error:  # of the package's own classes
            raise GraphoptError(
                getattr(error, "message", f"{what}: {first_line(error)}."),
                getattr(error, "remedy", remedy),
            ) from error

    def capacity(self, cache: Any) -> int | None:
        """See `LanguageModel.capacity`."""
        if self._decoder is None or not isinstance(cache, self._decoder):
            return None
        return int(cache.capacity)

    def log_likelihoods(self, input_ids: Tensor) -> Tensor:
        """See `LanguageModel.log_likelihoods`."""
        cache = self._model.empty_cache(len(input_ids))
        logits, _ = self._forward(complete_inputs({"input_ids": input_ids}), cache)
        targets = input_ids[:, 1:].to(self._device)
        return token_log_likelihoods(logits[:, :-1], targets).cpu()

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        """See `LanguageModel.step`."""
        if self._decoder is not None and isinstance(cache, self._decoder):
            (tokens,) = inputs["input_ids"].tolist()
            if not cache.used and EMBEDS in inputs:
                names = [name for name in _LOOKED_AT if name in inputs]
                cache.look(**{name: inputs[name].to(self._device) for name in names})
            elif not cache.used:
                cache.start(tokens)
            elif len(tokens) == 1:
                cache.step(tokens[0])
            else:
                cache.extend(tokens)
            return cache.logits[:, None].float().cpu(), cache
        if not isinstance(cache, _Replay):
            return self._run(inputs, cache)
        if EMBEDS in inputs:
            # Of embeddings all are given in every step; see `SightedModel`.
            return self._run(inputs, self._model.empty_cache(len(inputs[EMBEDS])))[0], cache
        new = inputs["input_ids"]
        ids = new if cache.input_ids is None else torch.cat([cache.input_ids, new], 1)
        whole = complete_inputs({"input_ids": ids, "attention_mask": inputs["attention_mask"]})
        logits, _ = self._run(whole, self._model.empty_cache(ids.shape[0]))
        return logits[:, -new.shape[1] :], _Replay(ids)

    def _run(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        logits, cache = self._forward(inputs, cache)
        return logits.float().cpu(), cache

    def _forward(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        mask = inputs["attention_mask"]
        # Attention is faster without a mask, which is needed only where something is padded.
        masked = self._needs_mask or not bool(mask.all())
        if self._counts_by_mask and mask.shape[1] > inputs["input_ids"].shape[1]:
            masked = True
        # What a text with pictures has in the place of its ids, and beside them.
        seen = {
            name: inputs[name].to(self._device) for name in (EMBEDS, PICTURES) if name in inputs
        }
        with torch.no_grad():
            result: tuple[Tensor, Any] = self._model(
                None if EMBEDS in seen else inputs["input_ids"].to(self._device),
                mask.to(self._device) if masked else None,
                inputs["position_ids"].to(self._device),
                cache,
                **seen,
            )
        return result


def _check_weights(module: ModuleType, constants: Collection[str]) -> None:
    """Let the weights that a module loads be checked, each by its name, before they are used."""
    build = getattr(module, "Model", None)

    def checked(*weights: Mapping[str, Tensor]) -> Any:
        for name, value in (item for given in weights for item in given.items()):
            check_finite(name, value.detach(), constant=name in constants)
        assert build is not None
        return build(*weights)

    if build is not None:
        module.Model = checked  # type: ignore[attr-defined]
