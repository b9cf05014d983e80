"""The torch emitter: a model as one Python file, with its weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from graphopt.ir.graph import Program
from graphopt.lowering.base import Emitted, Emitter, StoredWeight
from graphopt.lowering.tokenizer import copy_tokenizer
from graphopt.lowering.torch.render import render_model
from graphopt.progress import Progress
from graphopt.sources.safetensors import WEIGHTS_NAME, SafetensorsWriter

MODEL_NAME = "model.py"


class TorchEmitter(Emitter):
    """Writes `model.py`, `model.safetensors` with every weight, and the tokenizer's files."""

    name: ClassVar[str] = "torch"

    def check(self, program: Program, target: str) -> None:
        """Refuse a program with something in it that `model.py` cannot say.

        Raises:
            LoweringError: Naming the op and the call.
        """
        render_model(program)

    def emit(self, program: Program, root: Path, target: str, progress: Progress) -> Emitted:
        path = root / MODEL_NAME
        path.write_text(render_model(program), encoding="utf-8", newline="\n")
        storage = self._write_weights(program, root / WEIGHTS_NAME, progress)
        files = copy_tokenizer(program, root)
        run = f"python {{out}}/{MODEL_NAME}"
        usage = [f"{run} 1 2 3 --new 16   # token ids; needs torch and safetensors"]
        if any(file.name == "tokenizer.json" for file in files):
            usage = [f"{run} --prompt 'Hello'   # needs torch, safetensors and tokenizers"]
        usage.insert(0, "graphopt generate {out} --prompt 'Hello'")
        return Emitted([path, root / WEIGHTS_NAME, *files], storage, usage)

    @staticmethod
    def _write_weights(program: Program, path: Path, progress: Progress) -> dict[str, StoredWeight]:
        """Write every weight as it is, reading one at a time; return where each one is.

        Raises:
            SourceError: A weight cannot be read, or a trained one holds NaN or infinity.
            GraphoptError: The disk is full.
        """
        weights = list(program.weights)
        kinds = {weight.name: (weight.shape, weight.dtype) for weight in weights}
        with SafetensorsWriter(path, kinds) as writer:
            for done, weight in enumerate(weights):
                progress("writing weights", done, len(weights))
                if weight.constant:
                    # A constant may hold infinity on purpose.
                    writer.write(weight.name, weight.load().contiguous())
                else:
                    writer.copy(weight.name, weight.producer)
            progress("writing weights", len(weights), len(weights))
        return {
            name: StoredWeight(path.name, raw.offset, tuple(raw.shape), raw.dtype)
            for name, raw in writer.tensors.items()
        }
