"""The transformers emitter: a checkpoint, where the structure is one a config makes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from graphopt.capture import capture_config
from graphopt.capture.checkpoint import persistent_buffers
from graphopt.capture.conversion import to_checkpoint
from graphopt.errors import CaptureError, LoweringError
from graphopt.ir.compare import first_difference, slots_by_use
from graphopt.ir.graph import Program
from graphopt.ir.types import DTYPE_NAMES
from graphopt.ir.weights import Array, Producer, Transposed
from graphopt.lowering.base import Emitted, Emitter, StoredWeight
from graphopt.lowering.hf.parts import Part, assemble, origin
from graphopt.lowering.tokenizer import copy_tokenizer
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.progress import Progress
from graphopt.sources.safetensors import INDEX_NAME, WEIGHTS_NAME, SafetensorsWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_SHARD = 5 * 10**9
"""Bytes of a file beyond which another one is begun, as transformers does by default."""


class HfEmitter(Emitter):
    """Writes `hf/`: config.json, safetensors and tokenizer, as `save_pretrained` would.

    The program must be what the config makes: the config is captured again and the two programs
    are compared, both brought to one form by the exact passes.
    """

    name: ClassVar[str] = "hf"

    def check(self, program: Program, target: str) -> None:
        """Refuse a program that no config makes.

        Raises:
            LoweringError: Naming the first difference.
        """
        _checkpoint(program)

    def emit(self, program: Program, root: Path, target: str, progress: Progress) -> Emitted:
        module, tensors = _checkpoint(program)
        folder = root / "hf"
        folder.mkdir(parents=True, exist_ok=True)
        emitted = Emitted()
        places = _write(tensors, folder, emitted, progress)
        emitted.files += [_write_config(program, module, folder), *copy_tokenizer(program, folder)]
        _add_storage(program, tensors, places, root, emitted)
        emitted.usage.append("transformers:  AutoModelForCausalLM.from_pretrained('{out}/hf')")
        return emitted


def _refusal(reason: str) -> LoweringError:
    return LoweringError(
        f"There is no transformers checkpoint of this program: {reason}.",
        "Emit torch or onnx instead (--emit torch,onnx).",
    )


@functools.lru_cache(maxsize=1)
def _capture_again(config: str, trained: tuple[str, ...]) -> tuple[Program, PreTrainedModel]:
    """Return the program and the module that a config makes; the latest is kept."""
    program, module = capture_config(json.loads(config), trained)
    return _one_form(program), module


def _one_form(program: Program) -> Program:
    """Return the program as the default passes, all exact, leave it at last."""
    program = program.copy()
    while True:
        changed = 0
        for item in Pipeline.default().passes:
            result = item.run(program, Context())
            program, changed = result.program, changed + result.changed
        if not changed:
            return program


def _checkpoint(program: Program) -> tuple[PreTrainedModel, dict[str, Producer]]:
    """Return the module of a program's config, and the tensors of its checkpoint by name.

    Raises:
        LoweringError: The program is not what the config makes.
    """
    if not program.config:
        raise _refusal("it was captured from a module without a transformers config")
    if program.config.get("auto_map"):
        raise _refusal("its class is code of the checkpoint, which is not part of transformers")
    used = {w.checkpoint for w in program.used_weights() if w.checkpoint and not w.constant}
    text = json.dumps(program.config, sort_keys=True, default=str)
    try:
        want, module = _capture_again(text, ())
        trained = tuple(sorted(used & set(persistent_buffers(module))))
        if trained:
            want, module = _capture_again(text, trained)
    except CaptureError as error:
        raise _refusal(error.message.rstrip(".")) from error
    have = _one_form(program)
    difference = first_difference(have, want)
    if difference is not None:
        raise _refusal(f"{difference}, as its config makes it")
    tensors = _module_tensors(have, want, module)
    return module, to_checkpoint(module, tensors)


def _module_tensors(have: Program, want: Program, module: PreTrainedModel) -> dict[str, Producer]:
    """Return the value of every parameter and persistent buffer of the module."""
    filled: dict[str, str] = {}
    parts: dict[str, list[Part]] = {}
    for ours, theirs in zip(have.calls, want.calls, strict=True):
        slots = zip(
            *(slots_by_use(p.functions[c.function]) for p, c in ((have, ours), (want, theirs))),
            strict=True,
        )
        for slot, twin in slots:
            name = theirs.weights[twin]
            weight, value = want.weights[name], have.weights[ours.weights[slot]]
            if weight.constant:
                if not torch.equal(weight.load(), value.load().to(weight.dtype)):
                    raise _refusal(f"the constant {value.name!r} is not what the config makes it")
                continue
            if filled.setdefault(name, value.name) != value.name:
                raise _refusal(f"the config ties {filled[name]!r} and {value.name!r}")
            parent, steps = origin(weight.producer)
            part = Part(steps, value.producer)
            if part not in parts.setdefault(parent, []):
                parts[parent].append(part)
    tied = set(getattr(module, "all_tied_weights_keys", None) or ())
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tensors: dict[str, Producer] = {}
    for aliases in names.values():
        kept = next((name for name in aliases if name not in tied), aliases[0])
        shape = tuple(module.get_parameter(kept).shape)
        found = [part for alias in aliases for part in parts.get(alias, [])]
        if not found:
            raise _refusal(f"its class has the parameter {kept!r}, which the program never reads")
        try:
            tensors[kept] = assemble(shape, found)
        except ValueError as error:
            raise _refusal(f"{kept!r} cannot be put together: {error}") from error
    for name, buffer in persistent_buffers(module).items():
        found = parts.get(name, [])
        tensors[name] = assemble(tuple(buffer.shape), found) if found else Array(buffer)
    return tensors


def _shards(tensors: Mapping[str, Producer]) -> list[dict[str, Producer]]:
    """Divide tensors into files, in order."""
    shards: list[dict[str, Producer]] = [{}]
    size = 0
    for name, producer in tensors.items():
        count = math.prod(producer.shape) * producer.dtype.itemsize
        if shards[-1] and size + count > LARGEST_SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = producer
        size += count
    return shards


def _write(
    tensors: Mapping[str, Producer], folder: Path, emitted: Emitted, progress: Progress
) -> dict[str, tuple[Path, int]]:
    """Write the tensors, one at a time; return the file and offset of each."""
    places: dict[str, tuple[Path, int]] = {}
    shards = _shards(tensors)
    done = 0
    for number, shard in enumerate(shards, start=1):
        path = folder / WEIGHTS_NAME
        if len(shards) > 1:
            path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        kinds = {name: (producer.shape, producer.dtype) for name, producer in shard.items()}
        with SafetensorsWriter(path, kinds) as writer:
            for name, producer in shard.items():
                progress("writing checkpoint", done, len(tensors))
                writer.copy(name, producer)
                places[name] = (path, writer.tensors[name].offset)
                done += 1
        emitted.files.append(path)
    progress("writing checkpoint", done, len(tensors))
    if len(shards) > 1:
        total = sum(math.prod(p.shape) * p.dtype.itemsize for p in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: path.name for name, (path, _) in sorted(places.items())},
        }
        path = folder / INDEX_NAME
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        emitted.files.append(path)
    return places


def _write_config(program: Program, module: PreTrainedModel, folder: Path) -> Path:
    config: Any = module.config
    config.architectures = [type(module).__name__]
    config.dtype = program.checkpoint_dtype
    config.use_cache = program.config.get("use_cache", True)
    config.save_pretrained(folder)
    return folder / "config.json"


def _add_storage(
    program: Program,
    tensors: Mapping[str, Producer],
    places: Mapping[str, tuple[Path, int]],
    root: Path,
    emitted: Emitted,
) -> None:
    """Say where the program's weights lie, for those that are whole tensors of the checkpoint."""
    by_producer: dict[int, tuple[str, bool]] = {}
    for name, producer in tensors.items():
        inner = producer.source if isinstance(producer, Transposed) else producer
        by_producer[id(inner)] = (name, inner is not producer)
    for weight in program.weights:
        if id(weight.producer) in by_producer and weight.dtype in DTYPE_NAMES:
            name, transposed = by_producer[id(weight.producer)]
            path, offset = places[name]
            emitted.storage[weight.name] = StoredWeight(
                path.relative_to(root).as_posix(),
                offset,
                tuple(tensors[name].shape),
                weight.dtype,
                transposed,
            )
