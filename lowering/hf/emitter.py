"""The transformers emitter: a checkpoint, where the structure is one a config makes.

A carved program has one too: of a narrower config, or with a class that the checkpoint brings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from graphopt.ir.graph import Program
from graphopt.ir.types import DTYPE_NAMES
from graphopt.ir.weights import Producer, Transposed
from graphopt.lowering.base import (
    NOTHING,
    Emitted,
    Emitter,
    StoredTensor,
    check_no_hosts,
    check_no_policies,
)
from graphopt.lowering.hf.carved import CODE_NAME, loader_of
from graphopt.lowering.hf.checkpoint import Checkpoint, checkpoint_of
from graphopt.lowering.hf.pack_quantized import PackedWords
from graphopt.lowering.hf.shards import write_shards
from graphopt.lowering.hf.usage import transformers_line
from graphopt.lowering.tokenizer import copy_tokenizer, run_lines, write_generation
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress


class HfEmitter(Emitter):
    """Writes `hf/`: config.json, safetensors and tokenizer, as `save_pretrained` would.

    The program must be what the config makes: the config is captured again and the two programs
    are compared, both brought to one form by the exact passes. What the config makes may be
    carved for that as the program is; then the checkpoint brings a class of its own.
    """

    name: ClassVar[str] = "hf"

    def check(self, program: Program, target: str) -> None:
        """Refuse a program that no config makes.

        Raises:
            LoweringError: Naming the first difference, or the KV policy that it has.
        """
        check_no_policies(program, "A transformers checkpoint")
        check_no_hosts(program, "A transformers checkpoint")
        checkpoint_of(program)

    def without_pictures(self, program: Program) -> str | None:
        return None

    def tensors(self, program: Program, target: str) -> dict[str, StoredTensor]:
        tensors = checkpoint_of(program).tensors
        return {name: (tuple(held.shape), held.dtype) for name, held in tensors.items()}

    def kept(self, program: Program, target: str) -> set[str]:
        return set(_kept(program, checkpoint_of(program).tensors))

    def emit(
        self,
        program: Program,
        root: Path,
        target: str,
        progress: Progress,
        stored: Mapping[str, StoredWeight] = NOTHING,
    ) -> Emitted:
        found = checkpoint_of(program)
        folder = root / "hf"
        folder.mkdir(parents=True, exist_ok=True)
        emitted = Emitted()
        places, files = write_shards(found.tensors, folder, progress)
        emitted.files += files
        emitted.files.append(_write_config(program, found, folder))
        emitted.files += copy_tokenizer(program, folder) + write_generation(program, folder)
        _add_storage(program, found.tensors, places, root, emitted)
        emitted.notes += found.notes
        if found.code is not None:
            (folder / CODE_NAME).write_text(found.code, encoding="utf-8")
            emitted.files.append(folder / CODE_NAME)
            name = found.module.config.auto_map[loader_of(found.module)]
            emitted.notes.append(
                (
                    "hf",
                    f"no class of transformers is carved, so the checkpoint brings {name} "
                    "(auto_map), which runs where a user sets trust_remote_code=True",
                )
            )
        line = transformers_line(
            program,
            trust=found.code is not None,
            packed=found.quantisation is not None,
            dequantised=found.dequantised,
        )
        emitted.usage += [line, *run_lines(program)]
        return emitted


def _write_config(program: Program, checkpoint: Checkpoint, folder: Path) -> Path:
    config: Any = copy.deepcopy(checkpoint.module.config)
    config.architectures = [type(checkpoint.module).__name__]
    config.dtype = program.checkpoint_dtype
    config.use_cache = program.config.get("use_cache", True)
    if checkpoint.quantisation is not None:
        config.quantization_config = checkpoint.quantisation
    config.save_pretrained(folder)
    return folder / "config.json"


def _kept(program: Program, tensors: Mapping[str, Producer]) -> dict[str, tuple[str, bool]]:
    """Return the program's weights that are whole tensors of the checkpoint, by name.

    With each stands the name of the tensor, and whether that is transposed. The codes of a packed
    one lie in `weight_packed` where words add nothing to them.
    """
    by_producer: dict[int, tuple[str, bool]] = {}
    for name, producer in tensors.items():
        inner = producer.source if isinstance(producer, Transposed) else producer
        if isinstance(producer, PackedWords) and producer.is_as_stored:
            inner = producer.weight.packed
        by_producer[id(inner)] = (name, isinstance(producer, Transposed))
    return {
        weight.name: by_producer[id(weight.producer)]
        for weight in program.stored_tensors()
        if id(weight.producer) in by_producer and weight.dtype in DTYPE_NAMES
    }


def _add_storage(
    program: Program,
    tensors: Mapping[str, Producer],
    places: Mapping[str, tuple[Path, int]],
    root: Path,
    emitted: Emitted,
) -> None:
    """Say where the program's weights lie, for those that are whole tensors of the checkpoint."""
    kept = _kept(program, tensors)
    for weight in program.stored_tensors():
        if weight.name not in kept:
            continue
        name, transposed = kept[weight.name]
        path, offset = places[name]
        as_stored = tensors[name]
        is_words = isinstance(as_stored, PackedWords)
        emitted.storage[weight.name] = StoredWeight(
            path.relative_to(root).as_posix(),
            offset,
            weight.shape if is_words else tuple(as_stored.shape),
            weight.dtype,
            transposed,
        )
