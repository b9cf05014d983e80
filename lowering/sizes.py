"""How much room the forms of a model take, before they are written and after."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch

from graphopt.errors import LoweringError
from graphopt.ir.dtypes import is_rounded
from graphopt.ir.graph import Program
from graphopt.ir.made_of import sources_of
from graphopt.ir.types import DTYPE_NAMES
from graphopt.lowering.base import Emitted, Emitter, StoredTensor
from graphopt.report.records import FormSize
from graphopt.sources.gguf.container import GgufTensor

PROGRAM = "program"
"""What the weights of a folder that lie beside its forms are called among those."""


def planned_sizes(emitters: Iterable[Emitter], program: Program, target: str) -> list[FormSize]:
    """Return the size of the weights in each form, from the structure alone.

    A form that cannot be written of this program, which is not refused before passes have run,
    counts as the program's own weights.
    """
    sizes: list[FormSize] = []
    trained = {weight.name for weight in program.weights if not weight.constant}
    written: dict[str, StoredTensor] = {}
    for emitter in in_order(emitters):
        element_type: str | None = None
        try:
            tensors = emitter.tensors(program, target)
            element_type = emitter.element_type(program, target)
        except LoweringError:
            tensors = Emitter.tensors(emitter, program, target)
        shared = {
            name
            for name, stored in tensors.items()
            if emitter.shares and name in trained and written.get(name) == stored
        }
        size = FormSize(emitter.name, 0, element_type or _usual(program, tensors.values()))
        for name, stored in tensors.items():
            if name in shared:
                size.shared_bytes += _bytes(stored)
            else:
                size.bytes += _bytes(stored)
        sizes.append(size)
        written = tensors | written
    return sizes


def program_size(emitters: Iterable[Emitter], program: Program, target: str) -> FormSize | None:
    """Return the size of what a folder holds of the program beside its forms, from the structure.

    Those are the weights that no form holds as the program does: the folder is a program that is
    opened again. None where the forms hold all matrices, or their codes.
    """
    kept: set[str] = set()
    for emitter in emitters:
        try:
            kept |= emitter.kept(program, target)
        except LoweringError:
            kept |= Emitter.kept(emitter, program, target)
    return size_of_rest(program, kept)


def size_of_rest(program: Program, kept: Collection[str]) -> FormSize | None:
    """Return the size of the tensors that are not among `kept`.

    None where no matrix is, nor the codes of one: scales alone, gains and constants are little.
    """
    every = list(program.weights)
    if program.vision is not None:
        every += program.vision.carried
    matrices = [w for w in every if len(w.shape) > 1 and not w.constant]
    if all(matrix.tensors()[0].name in kept for matrix in matrices):
        return None
    rest = [tensor for tensor in program.stored_tensors() if tensor.name not in kept]
    stored = [(tensor.shape, tensor.dtype) for tensor in rest]
    return FormSize(PROGRAM, sum(map(_bytes, stored)), _usual(program, stored))


def in_order(emitters: Iterable[Emitter]) -> list[Emitter]:
    """Return emitters in the order in which they write: those that read others' files last."""
    return sorted(emitters, key=lambda emitter: emitter.shares)


def written_size(emitter: Emitter, emitted: Emitted, program: Program, target: str) -> FormSize:
    """Return the size of a form that was written for a target."""
    stored = [emitted.storage[w.name] for w in program.weights
              if w.name in emitted.storage and is_rounded(w)]  # fmt: skip
    shared = [emitted.storage[name] for name in emitted.shared]
    return FormSize(
        emitter.name,
        sum(path.stat().st_size for path in set(emitted.files)),
        emitter.element_type(program, target)
        or _usual(program, ((place.shape, place.dtype) for place in stored)),
        sum(_bytes((place.shape, place.dtype)) for place in shared),
        sorted({place.file for place in shared}),
    )


def about_decoded_codes(program: Program, sizes: Sequence[FormSize]) -> str | None:
    """Return what a user should know who asked for no dtype where codes of 4 bits or so were read.

    Nothing of the source says in which dtype the values that codes stand for are to be stored.
    """
    wide = [size.name for size in sizes if size.dtype == DTYPE_NAMES[torch.float32]]
    decoded = any(
        isinstance(source, GgufTensor) and source.is_packed
        for weight in program.used_weights()
        for source in sources_of(weight.producer)
    )
    if not decoded or not wide:
        return None
    return (
        f"the source holds packed codes; the values they stand for are stored in float32, in which "
        f"they are exact ({', '.join(wide)}). --dtype bfloat16 halves that"
    )


def _usual(program: Program, tensors: Iterable[StoredTensor]) -> str:
    """Return how most elements are stored: a floating-point dtype, or as codes of how many bits."""
    counts: Counter[str] = Counter()
    for shape, dtype in tensors:
        if dtype.is_floating_point:
            counts[DTYPE_NAMES[dtype]] += math.prod(shape)
    for weight in program.used_weights():
        if weight.encoding is not None:
            counts[f"codes of {weight.encoding.bits} bits"] += weight.numel
    return counts.most_common(1)[0][0] if counts else "-"


def _bytes(stored: StoredTensor) -> int:
    shape, dtype = stored
    return math.prod(shape) * dtype.itemsize
