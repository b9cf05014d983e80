"""A model as something that gives logits: one interface for every form, and the program's own."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import SourceError
from graphopt.execute.checked import CheckedRunner
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.likelihoods import ProgramLikelihoods, token_log_likelihoods
from graphopt.ir.context import context_length, rotary_parameters, stated_length
from graphopt.ir.graph import Program
from graphopt.ir.sighted import EMBEDS
from graphopt.sources.generation import GenerationSettings
from graphopt.sources.windows import tokenizer_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CPU = torch.device("cpu")


_PROBED = 16
"""Tokens of a text by which is told whether a model sees both ways."""


class LanguageModel(ABC):
    """Something that maps token ids to logits, with or without a KV cache.

    Attributes:
        backend: How it runs: "program", "torch" or "onnx".
        name: Short name of the model.
        config: The Hugging Face config as a dict; {} where there is none.
        generation: How text is to be generated, as `Program.generation` has it.
        tokenizer: Folder with its tokenizer; None if there is none.
        length: How many tokens a text may have; None where that is what the config states.
        device: Where it runs.
        placement: Which form of it runs where, and why there, in one line.
        kv_policies: Kinds of KV policies by which its steps select what they read.
        reads_weights: Whether every batch reads the weights anew, so that larger ones take less.
    """

    backend: ClassVar[str]
    name: str
    config: dict[str, Any]
    generation: Mapping[str, Any] = {}
    tokenizer: Path | None
    length: int | None = None
    device: torch.device = CPU
    placement: str = ""
    kv_policies: tuple[str, ...] = ()
    reads_weights: bool = False

    @abstractmethod
    def start(self, batch: int) -> Any:
        """Return an empty cache for `batch` sequences, in the model's own form."""

    def start_text(self, room: int) -> Any:
        """Return an empty cache for one text of at most `room` tokens.

        A step with it gives at least the logits of its last token; nothing is padded.
        """
        return self.start(1)

    def capacity(self, cache: Any) -> int | None:
        """Return how many tokens a cache has room for; None where it grows."""
        return None

    @abstractmethod
    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        """Run the next tokens of every sequence.

        Args:
            inputs: `input_ids` [B, S], `attention_mask` [B, P + S], nonzero at real tokens, and
                `position_ids` [B, S], all int64.
            cache: From `start` or the step before, holding P tokens; it is used up.

        Returns:
            Logits [B, S, vocab] in fp32 on the CPU, and the cache with P + S tokens.
        """

    def check_ids(self, ids: Iterable[int]) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            SourceError: An id is beyond the vocabulary that the config states.
        """
        text = self.config.get("text_config")
        stated = (text if isinstance(text, dict) else self.config).get("vocab_size")
        largest = max(ids, default=0)
        if isinstance(stated, int) and largest >= stated:
            raise SourceError(
                f"The tokenizer of {self.name} gives the id {largest}, and the model knows "
                f"{stated} tokens.",
                "Put the tokenizer files that belong to the model into its folder.",
            )

    def check_causal(self, ids: Tensor) -> None:
        """Refuse a model whose tokens see those behind them: it is shown what it is to predict.

        Args:
            ids: int64 [S], at least two.

        Raises:
            SourceError: Another last token changes the logits of an earlier one.
        """
        pair = ids[:_PROBED].repeat(2, 1)
        pair[1, -1] = pair[0, 0] if pair[0, 0] != pair[0, -1] else (pair[0, -1] + 1) % 2
        one, other = self.logits(pair)[:, :-1]
        # A mixture's products differ by roundings of the dtype; what is seen shows beyond them.
        if float((one - other).abs().max()) > 0.05 * float(one.abs().max()):
            raise SourceError(
                f"{self.name} sees both ways: another last token changes what it says of earlier "
                "ones, so that likelihoods of a text say nothing.",
                'Where it is a decoder, its config lacks "is_decoder": true or its like.',
            )

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; None if nothing says it."""
        return self.length or stated_length(self.config)

    @property
    def settings(self) -> GenerationSettings:
        """What ends a text of the model, and how its tokens are drawn.

        Raises:
            SourceError: An entry of its config is of a wrong type or out of range.
        """
        return GenerationSettings.of(self.config, self.generation)

    @property
    def rotary_switch(self) -> int | None:
        """Tokens of the longest text with LongRoPE's short frequencies; None for other models."""
        lengths = [
            entries.get("original_max_position_embeddings")
            for entries in rotary_parameters(self.config, "longrope")
        ]
        return next((length for length in lengths if isinstance(length, int)), None)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of whole sequences.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], nonzero at real tokens; all of them by default.

        Returns:
            fp32 [B, S, vocab].
        """
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        return self.step(complete_inputs(inputs), self.start(input_ids.shape[0]))[0]

    def log_likelihoods(self, input_ids: Tensor) -> Tensor:
        """Return the log-probability of each token but the first, given those before it.

        Args:
            input_ids: int64 [B, S], S at least 2. Rows may be padded behind their texts with any
                token, since no token sees those behind it: what `check_causal` is for.

        Returns:
            fp32 [B, S - 1] on the CPU.
        """
        return token_log_likelihoods(self.logits(input_ids)[:, :-1], input_ids[:, 1:])


@dataclass
class _Replay:
    """What stands for a cache where the program has none: the tokens so far, run again."""

    input_ids: Tensor | None = None


class ProgramModel(LanguageModel):
    """A program, run by the ops' torch implementations in fp32.

    Args:
        program: What to run, with or without KV states.
        keep_weights: Hold every weight after its first use; otherwise each run reads them again
            and needs the memory of one layer.
        device: Where to run.

    Attributes:
        runner: Runs the program.
    """

    backend = "program"

    def __init__(
        self, program: Program, *, keep_weights: bool = True, device: torch.device = CPU
    ) -> None:
        self.name = program.name
        self.config, self.generation = program.config, program.generation
        self.tokenizer = Path(program.tokenizer) if program.tokenizer else None
        self.length = context_length(program)
        self.device, self.reads_weights = device, not keep_weights
        self.runner = CheckedRunner(program, device=device, keep_weights=keep_weights)

    def log_likelihoods(self, input_ids: Tensor) -> Tensor:
        return self._likelihoods.of(input_ids).cpu()

    @functools.cached_property
    def _likelihoods(self) -> ProgramLikelihoods:
        return ProgramLikelihoods(self.runner)

    def start(self, batch: int) -> Any:
        states = self.runner.program.states
        return self.runner.empty_cache(batch) if states else _Replay()

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        if EMBEDS in self.runner.program.inputs and isinstance(cache, _Replay):
            # Of embeddings all are given in every step; see `SightedModel`.
            return self.runner.run(inputs)[0][0].float().cpu(), cache
        if not isinstance(cache, _Replay):
            outputs, cache = self.runner.run(inputs, cache)
            return outputs[0].float().cpu(), cache
        new = inputs["input_ids"]
        ids = new if cache.input_ids is None else torch.cat([cache.input_ids, new], 1)
        whole = complete_inputs({"input_ids": ids, "attention_mask": inputs["attention_mask"]})
        outputs, _ = self.runner.run(whole)
        return outputs[0][:, -new.shape[1] :].float().cpu(), _Replay(ids)


def load_tokenizer(model: LanguageModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Raises:
        SourceError: It has none, or the files cannot be read without running code.
    """
    return tokenizer_at(model.tokenizer, model.name)
