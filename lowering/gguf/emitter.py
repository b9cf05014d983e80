"""The GGUF emitter: one file for llama.cpp, of the architectures that are read from such files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from graphopt.errors import LoweringError
from graphopt.ir.dtypes import AUTO
from graphopt.ir.graph import Program
from graphopt.ir.weights import Array, Cast, Dequantised, Producer
from graphopt.lowering.base import (
    NOTHING,
    Emitted,
    Emitter,
    StoredTensor,
    check_no_hosts,
    check_no_policies,
)
from graphopt.lowering.gguf.blocks import (
    AT_THE_ENDS,
    BLOCK,
    NUMBERS,
    TYPES,
    Stored,
    held_by_fp16,
    nbytes,
    number_type,
    type_of_codes,
)
from graphopt.lowering.gguf.file import most_common_type, write_file
from graphopt.lowering.gguf.keys import (
    ARCHITECTURES,
    Described,
    Unwritable,
    Value,
    describe,
    single,
)
from graphopt.lowering.gguf.layout import laid_out
from graphopt.lowering.gguf.same_model import difference_when_read
from graphopt.lowering.gguf.vocabulary import Written, written_vocabulary
from graphopt.lowering.hf.checkpoint import NoCheckpoint, dense_checkpoint, other_forms
from graphopt.sources.generation import GenerationSettings
from graphopt.sources.gguf import architectures
from graphopt.sources.gguf.container import GgufFile
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.plain import first_and_count
from graphopt.support.progress import Progress

NAME = "model.gguf"


class GgufEmitter(Emitter):
    """Writes `gguf/model.gguf`, of a program that one of llama.cpp's architectures is.

    The program must be what its config makes, and what the file is read as: the header is read back
    before a weight is, and the two models are compared.

    Args:
        type: The name of the type of matrices, one of `TYPES`; "auto" for what the program holds,
            codes as blocks where fp16 holds their scales.
    """

    name: ClassVar[str] = "gguf"

    def __init__(self, *, type: str = AUTO) -> None:
        self.type = type
        self._latest: tuple[Program, _Planned] | None = None
        self._written: tuple[Program, dict[str, Stored]] | None = None

    def _planned(self, program: Program) -> _Planned:
        """Return what is written; a program is planned once, and asked for by several steps."""
        if self._latest is None or self._latest[0] is not program:
            self._latest = (program, _plan(program))
        return self._latest[1]

    def check(self, program: Program, target: str) -> None:
        """Refuse a program that llama.cpp has no architecture, tokenizer or key for.

        Raises:
            LoweringError: With the reason.
        """
        check_no_policies(program, "A GGUF file")
        check_no_hosts(program, "A GGUF file")
        self._latest = None
        self._planned(program)

    def tensors(self, program: Program, target: str) -> dict[str, StoredTensor]:
        return {
            f"{NAME}/{name}": ((nbytes(stored.source.shape, stored.kind),), torch.uint8)
            for name, stored in self._stored(self._planned(program), None).items()
        }

    def kept(self, program: Program, target: str) -> set[str]:
        return set(_kept(program, self._stored(self._planned(program), None)))

    def element_type(self, program: Program, target: str) -> str | None:
        if self._written is not None and self._written[0] is program:
            return most_common_type(self._written[1]).name.lower()
        return most_common_type(self._stored(self._planned(program), None)).name.lower()

    def emit(
        self,
        program: Program,
        root: Path,
        target: str,
        progress: Progress,
        stored: Mapping[str, StoredWeight] = NOTHING,
    ) -> Emitted:
        planned = self._planned(program)
        folder = root / self.name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        emitted = Emitted([path], notes=list(planned.notes))
        reasons: dict[str, list[str]] = {}
        tensors = self._stored(planned, reasons)
        emitted.notes += [(first_and_count(names), reason) for reason, names in reasons.items()]
        keys: dict[str, Value] = {"general.name": program.name} | planned.keys()
        if program.licence:
            keys["general.license"] = program.licence
        places = write_file(path, planned.architecture, keys, tensors, progress)
        self._written = (program, tensors)
        for name, tensor in _kept(program, tensors).items():
            emitted.storage[name] = StoredWeight(
                path.relative_to(root).as_posix(), places[tensor], program.weights[name].shape,
                program.weights[name].dtype,
            )  # fmt: skip
        emitted.usage = [
            f"llama-cli -m {{out}}/{self.name}/{NAME} -p 'Hello'   # needs llama.cpp",
            f"graphopt generate {{out}}/{self.name}/{NAME} --prompt 'Hello'",
        ]
        return emitted

    def _stored(self, planned: _Planned, reasons: dict[str, list[str]] | None) -> dict[str, Stored]:
        """Return how each tensor is written.

        Args:
            reasons: Filled with what is not written as it was asked for, or as it is held; None
                where no weight is to be read. Scales are taken to fit then, and minima, which are
                products, not to.
        """
        found: dict[str, Stored] = {}
        for name, producer in planned.tensors.items():
            stored, reason = self._kind(name, producer, read=reasons is not None)
            found[name] = stored
            if reason is not None and reasons is not None:
                reasons.setdefault(reason, []).append(name)
        return found

    def _kind(self, name: str, producer: Producer, *, read: bool) -> tuple[Stored, str | None]:
        asked = TYPES.get(self.type)
        as_numbers = Stored(producer, number_type(producer))
        if len(producer.shape) < 2:
            return as_numbers, None
        wanted = asked
        if asked is not None and asked not in NUMBERS.values():
            if name in _AS_NUMBERS:
                return as_numbers, None
            if producer.shape[-1] % BLOCK:
                return as_numbers, (
                    f"written as numbers: its rows of {producer.shape[-1]} are no blocks of {BLOCK}"
                )
            wanted = TYPES["q8_0"] if name in AT_THE_ENDS else asked
        reason: str | None = None
        if isinstance(producer, Dequantised):
            blocks = type_of_codes(producer)
            if not isinstance(blocks, str) and asked is None:
                held = held_by_fp16(producer) if read else producer.encoding.symmetric
                if held:
                    return Stored(producer, blocks, exact=True), None
                blocks = "fp16 does not hold its scales exactly"
            elif not isinstance(blocks, str) and blocks in (asked, wanted):
                rounded = read and not held_by_fp16(producer)
                reason = "its scales are rounded to fp16" if rounded else None
                return Stored(producer, blocks, exact=True), reason
            if asked is None:
                return as_numbers, f"its codes are written as values: {blocks}; --gguf-type rounds"
            why = blocks if isinstance(blocks, str) else f"its codes are {blocks.name}"
            reason = f"its codes are rounded a second time: {why}"
        if wanted is None:
            return as_numbers, None
        if wanted in NUMBERS.values():
            dtype = next(dtype for dtype, kind in NUMBERS.items() if kind == wanted)
            return Stored(Cast(producer, dtype, name), wanted), None
        return Stored(producer, wanted), reason


_AS_NUMBERS = ("position_embd.weight",)
"""Matrices that are looked up and not multiplied, of which llama.cpp keeps numbers."""


@dataclass(frozen=True)
class _Planned:
    """What is written but for the types.

    Attributes:
        architecture: The format's name of it.
        described: The model's keys.
        tensors: By their names in the file.
        vocabulary: None for a program without a tokenizer.
        notes: What a user should know, as (where, what).
    """

    architecture: str
    described: Described
    tensors: dict[str, Producer]
    vocabulary: Written | None
    notes: list[tuple[str, str]] = field(default_factory=list)

    def keys(self) -> dict[str, Value]:
        """Return the entries of the file that describe the model and its vocabulary."""
        keys: dict[str, Value] = {
            f"{self.architecture}.{name}": value for name, value in self.described.keys.items()
        }
        return keys if self.vocabulary is None else keys | self.vocabulary.keys()


def _refusal(reason: str, remedy: str) -> LoweringError:
    return LoweringError(f"There is no GGUF file of this program: {reason}.", remedy)


def _plan(program: Program) -> _Planned:
    """Return what is written; no weight is read.

    Raises:
        LoweringError: llama.cpp has no architecture, key or rule for the program.
    """
    try:
        checkpoint = dense_checkpoint(program)
    except NoCheckpoint as error:
        raise _refusal(error.reason, error.remedy) from error
    config: Any = checkpoint.module.config

    def refusal(reason: str) -> LoweringError:
        return _refusal(reason, other_forms(program, "hf"))

    if checkpoint.code is not None:
        raise refusal("llama.cpp has no architecture with carved feed-forward parts")
    if config.model_type not in ARCHITECTURES:
        raise refusal(
            f"it is of type {config.model_type!r}, and what is written for llama.cpp is of the "
            f"types {', '.join(sorted(ARCHITECTURES))}"
        )
    name = ARCHITECTURES[config.model_type]
    notes: list[tuple[str, str]] = []
    try:
        described = describe(config)
        tensors = laid_out(checkpoint.tensors, architectures.ARCHITECTURES[name], config)
        tensors |= {key: Array(value) for key, value in described.tensors.items()}
        vocabulary = None
        if program.tokenizer is None:
            notes.append(("gguf", "without a tokenizer, llama.cpp has no text to run it on"))
        else:
            settings = GenerationSettings.of(program.config, program.generation)
            vocabulary = written_vocabulary(
                Path(program.tokenizer), config.model_type,
                tensors["token_embd.weight"].shape[0], settings.eos_token_id,
            )  # fmt: skip
    except Unwritable as error:
        raise refusal(str(error)) from error
    planned = _Planned(name, described, tensors, vocabulary, notes)
    metadata = {
        key: single(value) if isinstance(value, float) else value
        for key, value in (planned.keys() | {"general.architecture": name}).items()
    }
    header = GgufFile(Path(NAME), metadata, cast(Any, tensors), "")
    read_as = vocabulary.vocabulary if vocabulary is not None else None
    if (difference := difference_when_read(program, header, read_as)) is not None:
        raise refusal(f"as llama.cpp's {name} it would be another model: {difference}")
    return planned


def _kept(program: Program, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Return the weights that are in the file as the program has them, with the file's names."""
    by_producer = {id(w.producer): w for w in program.weights if w.encoding is None}
    kept: dict[str, str] = {}
    for name, stored in tensors.items():
        weight = by_producer.get(id(stored.source))
        if weight is not None and NUMBERS.get(weight.dtype) == stored.kind:
            kept[weight.name] = name
    return kept
