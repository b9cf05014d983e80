"""The graph of an ONNX artifact, run as a language model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.onnx_cache import NUMPY_DTYPES, RoomyCache, page_of, room_of
from graphopt.backends.onnx_embedding import OnnxEmbedding
from graphopt.backends.onnx_session import open_session, states_of
from graphopt.errors import SourceError, first_line
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import LanguageModel, _Replay
from graphopt.ir.sighted import EMBEDS
from graphopt.sources.base import tokenizer_in
from graphopt.sources.generation import read_generation
from graphopt.support.boundary import out_of_memory


class OnnxArtifactModel(LanguageModel):
    """The graph of an ONNX artifact, run by ONNX Runtime on the CPU.

    Args:
        folder: Folder with `model.onnx`, whose inputs are `input_ids`, or `inputs_embeds` as
            `embedding.onnx` beside it makes them, and where it has them
            `attention_mask`, `position_ids` and `past_key_values.N.key` / `.value`, and whose
            outputs are `logits` and `present.N.key` / `.value`; where a policy selects what steps
            read, also `past_policy.N.NAME` and `present_policy.N.NAME`; caches have room then.
        name: Short name of the model.
        config: Its Hugging Face config.
        generation: How text is to be generated; by default what a generation_config.json in the
            folder says.
        tokenizer: Folder with its tokenizer; by default `folder` where it holds one.
        constants: Initializers that may hold infinity on purpose.
        length: How many tokens a text may have; None where that is what the config states.

    Raises:
        SourceError: ONNX Runtime cannot load the graph, its inputs are others, its data lies
            outside the folder, or a weight is not finite.
    """

    backend = "onnx"

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "",
        config: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        constants: Collection[str] = (),
        length: int | None = None,
    ) -> None:
        self.name = name or folder.resolve().name
        self.config = dict(config or {})
        self.generation = read_generation(folder) if generation is None else generation
        self.length = length
        self.tokenizer = tokenizer_in(folder) or tokenizer
        path = folder / "model.onnx"
        self._session = open_session(path, constants)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._pasts = states_of(self._inputs)
        known = {"input_ids", "attention_mask", "position_ids", EMBEDS, *self._pasts}
        missing = {EMBEDS if EMBEDS in self._inputs else "input_ids"} - set(self._inputs)
        missing |= set(self._pasts.values()) - set(self._outputs)
        odd = sorted((set(self._inputs) - known) | missing)
        if odd or "logits" not in self._outputs:
            raise SourceError(
                f"{path} is no language model as graphopt emits it: {(odd or ['logits'])[0]!r} is "
                "unexpected or missing.",
                "Compile the model again with --emit onnx.",
            )
        self._path = path
        # The decoder of a model that sees takes what another graph makes of tokens.
        self._embedding = OnnxEmbedding(folder) if EMBEDS in self._inputs else None
        self._check_logits(next(o for o in self._session.get_outputs() if o.name == "logits"))
        for name in self._pasts:
            self._check_cache(name)
        self._has_room = any(
            room_of(size) is not None for name in self._pasts for size in self._inputs[name].shape
        )
        if self._has_room and "attention_mask" not in self._inputs:
            raise SourceError(
                f"{self._path}: caches have room, and no attention_mask says how much is used.",
                "Compile the model again with --emit onnx.",
            )

    def _check_logits(self, value: Any) -> None:
        if value.type not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
            raise SourceError(
                f"{self._path}: the output 'logits' is a {value.type}, and it should be a tensor "
                "of floats.",
                "Compile the model again with --emit onnx.",
            )

    def _check_cache(self, name: str) -> None:
        """Refuse a cache of other dimensions than [B, heads, P, head size], the middle ones known.

        Raises:
            SourceError: Naming the input.
        """
        value = self._inputs[name]
        if name.startswith("past_policy."):
            self._check_policy_state(name)
            return
        sizes = value.shape[1::2]
        if (
            value.type != "tensor(float)"
            or len(value.shape) != 4
            or not all(isinstance(size, int) and 0 < size < 2**16 for size in sizes)
        ):
            raise SourceError(
                f"{self._path}: the input {name!r} is a {value.type} of shape {value.shape}, and a "
                "cache as graphopt emits it is a tensor(float) of [batch, heads, past, head size].",
                "Compile the model again with --emit onnx.",
            )

    def _check_policy_state(self, name: str) -> None:
        """Refuse what a policy remembers where it is no tensor of rows of known heads.

        Raises:
            SourceError: Naming the input.
        """
        value = self._inputs[name]
        sizes = [size if isinstance(size, int) else page_of(size) for size in value.shape[1:]]
        if value.type not in NUMPY_DTYPES or not all(0 < (size or 0) < 2**16 for size in sizes):
            raise SourceError(
                f"{self._path}: the input {name!r} is a {value.type} of shape {value.shape}, and "
                "what a policy remembers is a tensor of floats or whole numbers, a row a text.",
                "Compile the model again with --emit onnx.",
            )

    def start(self, batch: int) -> Any:
        if not self._pasts:
            return _Replay()
        if self._has_room:
            return self._roomy(batch)
        cache = {}
        for name in self._pasts:
            rest = [size if isinstance(size, int) else 0 for size in self._inputs[name].shape[1:]]
            cache[name] = torch.zeros(batch, *rest).numpy()
        return cache

    def start_text(self, room: int) -> Any:
        return self._roomy(1, room) if self._has_room else self.start(1)

    def _roomy(self, batch: int, room: int = 0) -> RoomyCache:
        inputs = {name: self._inputs[name] for name in self._pasts}
        return RoomyCache(inputs, self._pasts, batch, room)

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        count = inputs["input_ids"].shape[1]
        replayed = isinstance(cache, _Replay)
        # Of embeddings all are given in every step without a cache; see `SightedModel`.
        if replayed and cache.input_ids is not None and EMBEDS not in inputs:
            ids = torch.cat([cache.input_ids, inputs["input_ids"]], 1)
            mask = inputs["attention_mask"]
            inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
        if self._embedding is not None and EMBEDS not in inputs:
            inputs = self._of_text(inputs)
        feeds = {n: v.numpy() for n, v in inputs.items() if n in self._inputs}
        roomy = isinstance(cache, RoomyCache)
        if not replayed and not roomy:
            feeds.update(cache)
        results = self._run(feeds, cache if roomy else None)
        logits = torch.from_numpy(results["logits"]).float()
        rows, places = inputs["input_ids"].shape
        if logits.dim() != 3 or logits.shape[:2] != (rows, places):
            raise SourceError(
                f"{self._path} gives logits of shape {list(logits.shape)} for {rows} x {places} "
                "tokens.",
                "Compile the model again with --emit onnx.",
            )
        if replayed:
            return logits[:, -count:], _Replay(inputs["input_ids"])
        if roomy:
            return logits, cache
        return logits, {name: results[present] for name, present in self._pasts.items()}

    def _of_text(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of tokens of a text alone with their embeddings."""
        assert self._embedding is not None
        made = dict(inputs) | {EMBEDS: self._embedding(inputs["input_ids"])}
        axes = self._inputs["position_ids"].shape[:-2] if "position_ids" in self._inputs else []
        if axes:
            made["position_ids"] = made["position_ids"].expand(*axes, -1, -1)
        return made

    def _run(self, feeds: Mapping[str, Any], cache: RoomyCache | None) -> dict[str, Any]:
        """Return the outputs of the graph by name; with a cache, which it changes, but for its own.

        Raises:
            SourceError: ONNX Runtime cannot run it: shapes of tensors inside do not agree, or it
                takes other inputs than it did when it was emitted.
        """
        try:
            if cache is None:
                return dict(
                    zip(self._outputs, self._session.run(self._outputs, feeds), strict=True)
                )
            cache.hold(feeds["attention_mask"].shape[1])
            return {"logits": cache.run(self._session, feeds, ["logits"])[0]}
        except Exception as error:
            if out_of_memory(error):
                raise
            raise SourceError(
                f"ONNX Runtime cannot run {self._path}: {first_line(error)}.",
                "Compile the model again with --emit onnx.",
            ) from error
