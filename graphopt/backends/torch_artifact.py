"""The `model.py` of a torch artifact, run as a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import SourceError, first_line
from graphopt.execute.interpreter import complete_inputs
from graphopt.files.finite import check_finite
from graphopt.ir.context import context_length
from graphopt.ir.graph import Program
from graphopt.sources.base import output_tokenizer
from graphopt.targets import get_target

if TYPE_CHECKING:
    pass
from graphopt.execute.language_model import LanguageModel, _Replay


class TorchArtifactModel(LanguageModel):
    """The `model.py` of a torch artifact.

    The file is code, and so are those beside it for a GPU, so they are run only where they are,
    byte for byte, what graphopt writes for the program beside them. One for a GPU runs there in
    16 bits where there is one, and otherwise on the CPU in fp32.

    Args:
        root: Output folder of `graphopt compile --emit torch`.
        program: The program saved in it.
        trust_remote_code: Run the file even if it was changed.

    Raises:
        SourceError: The file differs from what graphopt writes, or cannot be loaded, or the
            weights beside it are others than the program's.
    """

    backend = "torch"

    def __init__(self, root: Path, program: Program, *, trust_remote_code: bool = False) -> None:
        from safetensors import SafetensorError

        from graphopt.backends.code import checked_code, trusted_code
        from graphopt.storage.artifact import artifact_target, check_weights_file

        target = artifact_target(root)
        path = root / "model.py"
        on_gpu = get_target(target).kind == "gpu" and torch.cuda.is_available()
        self._code = (
            trusted_code(root)
            if trust_remote_code
            else checked_code(root, program, target, images=on_gpu)
        )
        if not trust_remote_code:  # a changed file may read others
            check_weights_file(root, program)
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self.name = program.name
        self.config, self.generation = program.config, program.generation
        self.tokenizer = output_tokenizer(root, program)
        self.length = context_length(program)
        self._cached = bool(program.states)
        try:
            module = self._code.import_model()
            self._decoder = getattr(module, "Decoder", None)
            _check_weights(module, program)
            if on_gpu:
                self._model = module.load(root, device=self._device)
            else:
                self._model = module.load(root, dtype=torch.float32, device=self._device)
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
        return self._decoder(self._model, max(room, 2))

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        if self._decoder is not None and isinstance(cache, self._decoder):
            (tokens,) = inputs["input_ids"].tolist()
            if cache.used:
                for token in tokens:
                    cache.step(token)
            else:
                cache.start(tokens)
            return cache.logits[:, None].float().cpu(), cache
        if not isinstance(cache, _Replay):
            return self._run(inputs, cache)
        new = inputs["input_ids"]
        ids = new if cache.input_ids is None else torch.cat([cache.input_ids, new], 1)
        whole = complete_inputs({"input_ids": ids, "attention_mask": inputs["attention_mask"]})
        logits, _ = self._run(whole, self._model.empty_cache(ids.shape[0]))
        return logits[:, -new.shape[1] :], _Replay(ids)

    def _run(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        mask = inputs["attention_mask"]
        # Kernels need no mask where nothing is padded.
        needed = self._device.type == "cpu" or not bool(mask.all())
        with torch.no_grad():
            logits, cache = self._model(
                inputs["input_ids"].to(self._device),
                mask.to(self._device) if needed else None,
                inputs["position_ids"].to(self._device),
                cache,
            )
        return logits.float().cpu(), cache


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
