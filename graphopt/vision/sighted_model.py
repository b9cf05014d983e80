"""A model that sees as what gives logits, token by token, behind a prompt with pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.execute.language_model import CPU, LanguageModel, ProgramModel
from graphopt.ir.graph import Program
from graphopt.ir.sighted import EMBEDS, PICTURES, sighted
from graphopt.runtime.picture_tower import Tower
from graphopt.vision.tower import VisionTower


@dataclass
class _Seen:
    """What a step goes on from: the cache, or all inputs where the program has none."""

    cache: Any
    inputs: dict[str, Tensor]


class SightedModel(LanguageModel):
    """A program with pictures, in any form that takes embeddings.

    Texts that begin with the prompt that `look_at` was given have its pictures; all others are
    text alone.

    Args:
        program: On text alone, as it was captured or opened.
        form: What runs it: its `step` takes what `VisionTower.inputs` gives, of new tokens, or of
            all where the program has no KV cache. By default the ops' torch implementations.
        tower: What makes embeddings of prompts with pictures; by default transformers' own.
        device: Where the tower runs, and the program where there is no other form.
    """

    def __init__(
        self,
        program: Program,
        form: LanguageModel | None = None,
        *,
        tower: Tower | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.form = ProgramModel(sighted(program), device=device) if form is None else form
        self.tower = VisionTower(program, device=device) if tower is None else tower
        self.name, self.config, self.generation = program.name, program.config, program.generation
        self.tokenizer, self.length = self.form.tokenizer, self.form.length
        self.device, self.placement = device, self.form.placement
        self.kv_policies = self.form.kv_policies
        self._cached = bool(program.states)
        self._prompt: dict[str, Tensor] | None = None

    @property
    def backend(self) -> str:  # type: ignore[override]
        return self.form.backend

    def look_at(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Take a prompt, as a processor makes it, of one text; return its token ids.

        Raises:
            UsageError: It has another number of image tokens than its pictures have.
        """
        self._prompt = self.tower.inputs(**{n: v.to(self.device) for n, v in inputs.items()})
        ids: list[int] = self._prompt["input_ids"][0].tolist()
        return ids

    def check_ids(self, ids: Iterable[int]) -> None:
        # The image token is no word, and some models have no row for it.
        super().check_ids(i for i in ids if i != self.tower.image_token)

    def start(self, batch: int) -> Any:
        return _Seen(self.form.start(batch), {})

    def start_text(self, room: int) -> Any:
        return _Seen(self.form.start_text(room), {})

    def capacity(self, cache: Any) -> int | None:
        return self.form.capacity(cache.cache)

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        assert isinstance(cache, _Seen)
        new = self._new(inputs["input_ids"].to(self.device), cache.inputs)
        whole = _joined(cache.inputs, new)
        if not self._cached:
            logits, _ = self.form.step(whole, self.form.start(len(new["input_ids"])))
            return logits[:, -new["input_ids"].shape[1] :], _Seen(cache.cache, whole)
        asked = new | {name: whole[name] for name in _OF_ALL if name in whole}
        logits, past = self.form.step(asked, cache.cache)
        # Embeddings that the cache has the keys of are not needed again.
        kept = {name: value for name, value in whole.items() if name != EMBEDS}
        return logits, _Seen(past, kept)

    def _new(self, ids: Tensor, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of new tokens: the prompt's own where they begin with it, or text."""
        prompt = self._prompt
        if before or prompt is None or not _begins(ids, prompt["input_ids"]):
            return self._behind(self.tower.inputs(input_ids=ids), before)
        rest = ids[:, prompt["input_ids"].shape[1] :]
        if not rest.shape[1]:
            return dict(prompt)
        return _joined(prompt, self._behind(self.tower.inputs(input_ids=rest), prompt))

    @staticmethod
    def _behind(text: dict[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a text that goes on: its positions begin behind all before it."""
        if not before:
            return text
        shift = before["position_ids"].amax() + 1
        return text | {"position_ids": text["position_ids"] + shift}


_OF_ALL = ("attention_mask", PICTURES)
"""Inputs that speak of the tokens in the cache too."""


def _begins(ids: Tensor, prompt: Tensor) -> bool:
    length = prompt.shape[1]
    return ids.shape[1] >= length and torch.equal(ids[:, :length], prompt)


def _joined(before: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs with new ones behind them, along the tokens."""
    if not before:
        return dict(new)
    axis = {EMBEDS: 1}
    return {
        name: torch.cat((before[name], value), axis.get(name, -1)) if name in before else value
        for name, value in new.items()
    }


def answer_log_likelihoods(model: SightedModel, inputs: Mapping[str, Tensor], count: int) -> Tensor:
    """Return the log-probability of each of the last `count` tokens of one text, fp32 [count]."""
    given = model.tower.inputs(**{name: value.to(model.device) for name, value in inputs.items()})
    with torch.no_grad():
        logits, _ = model.form.step(given, model.form.start(1))
    rows = F.log_softmax(logits[0, -count - 1 : -1].float(), -1)
    wanted = given["input_ids"][0, -count:].cpu()
    return rows.gather(-1, wanted[:, None])[:, 0].cpu()
