"""The `model.py` of a torch artifact, run as a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.code import MODEL_NAME, checked_code, trusted_code
from graphopt.backends.rank_processes import RankProcesses
from graphopt.backends.running_module import ModuleFacts, RunningModule
from graphopt.execute.language_model import CPU, LanguageModel
from graphopt.ir.context import context_length
from graphopt.ir.graph import Program
from graphopt.ir.ranks import group_of
from graphopt.sources.base import output_tokenizer
from graphopt.storage.artifact import artifact_target, check_weights_file
from graphopt.targets import get_target


class TorchArtifactModel(LanguageModel):
    """The `model.py` of a torch artifact.

    The file is code, and so are those beside it for a GPU, so they are run only where they are,
    byte for byte, what graphopt writes for the program beside them. One for a GPU runs there in
    16 bits, by its kernels; on the CPU, as one for the CPU does everywhere, in fp32. One for
    several ranks runs in as many processes, each with a device of its own.

    Args:
        root: Output folder of `graphopt compile --emit torch`.
        program: The program saved in it.
        device: Where to run it; for several ranks the kind of their devices.
        trust_remote_code: Run the file even if it was changed.
        offload: Keep keys and values of a text in host memory.

    Raises:
        SourceError: The file differs from what graphopt writes, or cannot be loaded, or the
            weights beside it are others than the program's.
        GraphoptError: A rank ended.

    Attributes:
        program: What was given.
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
        by_kernels = is_for_gpu(root) and device.type == "cuda"
        self._code = (
            trusted_code(root)
            if trust_remote_code
            else checked_code(root, program, artifact_target(root), images=by_kernels)
        )
        if not trust_remote_code:  # a changed file may read others
            check_weights_file(root, program)
        self.device, self.program = device, program
        self.name = program.name
        self.config, self.generation = program.config, program.generation
        self.tokenizer = output_tokenizer(root, program)
        self.length = context_length(program)
        facts = ModuleFacts(
            cached=bool(program.states),
            rings=all(state.layout.ring is not None for state in program.states.values()),
            constants=[weight.name for weight in program.weights if weight.constant],
            by_kernels=by_kernels,
            offload=offload,
        )
        path, ranks = self._code.root / MODEL_NAME, len(group_of(program))
        self._running: RunningModule | RankProcesses
        if ranks:
            self._running = RankProcesses(ranks, path, root, device, facts)
        else:
            self._running = RunningModule(path, root, device, facts)

    def start(self, batch: int) -> Any:
        return self._running.start(batch)

    def start_text(self, room: int) -> Any:
        return self._running.start_text(room)

    def capacity(self, cache: Any) -> int | None:
        return self._running.capacity(cache)

    def log_likelihoods(self, input_ids: Tensor) -> Tensor:
        return self._running.log_likelihoods(input_ids)

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        return self._running.step(inputs, cache)


def is_for_gpu(root: Path) -> bool:
    """Return whether the `model.py` of an output folder has kernels for a GPU, in 16 bits."""
    return get_target(artifact_target(root)).kind == "gpu"
