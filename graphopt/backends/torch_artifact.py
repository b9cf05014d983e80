"""The `model.py` of a torch artifact, run as a language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError, SourceError, first_line
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import CPU, LanguageModel, _Replay
from graphopt.execute.likelihoods import token_log_likelihoods
from graphopt.files.finite import check_finite
from graphopt.ir.context import context_length
from graphopt.ir.graph import Program
from graphopt.sources.base import output_tokenizer
from graphopt.storage.artifact import artifact_target, check_weights_file
from graphopt.targets import get_target


class TorchArtifactModel(LanguageModel):
    """The `model.py` of a torch artifact.

    The file is code, and so are those beside it for a GPU, so they are run only where they are,
    byte for byte, what graphopt writes for the program beside them. One for a GPU runs there in
    16 bits, by its kernels; on the CPU, as one for the CPU does everywhere, in fp32.

    Args:
        root: Output folder of `graphopt compile --emit torch`.
        program: The program saved in it.
        device: Where to run it.
        trust_remote_code: Run the file even if it was changed.
        offload: Keep keys and values of a text in host memory.

    Raises:
        SourceError: The file differs from what graphopt writes, or cannot be loaded, or the
            weights beside it are others than the program's.
    """

    backend = "torch"

    def __init__(
        self,
        root: Path,
        program: Program,
        *,
        device: torch.device = CPU,
        trust_remote_code: bool = False,
        offload: bool = False,
    ) -> None:
        from safetensors import SafetensorError

        from graphopt.backends.code import checked_code, trusted_code

        target = artifact_target(root)
        path = root / "model.py"
        by_kernels = is_for_gpu(root) and device.type == "cuda"
        self._code = (
            trusted_code(root)
            if trust_remote_code
            else checked_code(root, program, target, images=by_kernels)
        )
        if not trust_remote_code:  # a changed file may read others
            check_weights_file(root, program)
        self.device, self._offload = device, offload
        self.name = program.name
        self.config, self.generation = program.config, program.generation
        self.tokenizer = output_tokenizer(root, program)
        self.length = context_length(program)
        self._cached = bool(program.states)
        # Full rings do not say how many tokens came before; kernels are told.
        rings = [state.layout.ring is not None for state in program.states.values()]
        self._counts_by_mask = self._cached and all(rings) and not by_kernels
        try:
            module = self._code.import_model()
            self._decoder = getattr(module, "Decoder", None)
            _check_weights(module, program)
            if by_kernels:
                self._model = module.load(root, device=device)
            else:
                self._model = module.load(root, dtype=torch.float32, device=device)
            forward = inspect.signature(self._model.forward).parameters
            self._needs_mask = forward["attention_mask"].default is inspect.Parameter.empty
        except (
            OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError
        ) as error:  # fmt: skip
            raise SourceError(
                f"{path} cannot be loaded: {first_line(error)}.",
                "Compile the model again.",
            ) from error

    def start(self, batch: int) -> Any:
        return self._model.empty_cache(batch) if self._cached else _Replay()

    def start_text(self, room: int) -> Any:
        if self._decoder is None:
            return self.start(1)
        # A decoder holds a token more than the prompt.
        room = max(room, 2)
        if not self._offload:
            return self._decoder(self._model, room)
        try:
            return self._decoder(self._model, room, offload=True)
        except Exception as error:  # of the package's own classes
            raise GraphoptError(
                getattr(error, "message", f"Keys cannot lie in host memory: {first_line(error)}."),
                getattr(error, "remedy", "Leave --offload out."),
            ) from error

    def capacity(self, cache: Any) -> int | None:
        if self._decoder is None or not isinstance(cache, self._decoder):
            return None
        return int(cache.capacity)

    def log_likelihoods(self, input_ids: Tensor) -> Tensor:
        cache = self._model.empty_cache(len(input_ids))
        logits, _ = self._forward(complete_inputs({"input_ids": input_ids}), cache)
        targets = input_ids[:, 1:].to(self.device)
        return token_log_likelihoods(logits[:, :-1], targets).cpu()

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        if self._decoder is not None and isinstance(cache, self._decoder):
            (tokens,) = inputs["input_ids"].tolist()
            if not cache.used:
                cache.start(tokens)
            elif len(tokens) == 1:
                cache.step(tokens[0])
            else:
                cache.extend(tokens)
            return cache.logits[:, None].float().cpu(), cache
        if not isinstance(cache, _Replay):
            return self._run(inputs, cache)
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
        with torch.no_grad():
            result: tuple[Tensor, Any] = self._model(
                inputs["input_ids"].to(self.device),
                mask.to(self.device) if masked else None,
                inputs["position_ids"].to(self.device),
                cache,
            )
        return result


def is_for_gpu(root: Path) -> bool:
    """Return whether the `model.py` of an output folder has kernels for a GPU, in 16 bits."""
    return get_target(artifact_target(root)).kind == "gpu"


def _check_weights(module: ModuleType, program: Program) -> None:
    """Let the weights that a module loads be checked, each by its name, before they are used."""
    build = getattr(module, "Model", None)
    constants = {weight.name for weight in program.weights if weight.constant}

    def checked(*weights: Mapping[str, Tensor]) -> Any:
        for name, value in (item for given in weights for item in given.items()):
            check_finite(name, value.detach(), constant=name in constants)
        assert build is not None
        return build(*weights)

    if build is not None:
        module.Model = checked  # type: ignore[attr-defined]
