"""Whether all ranks of a run hold the same program, after each pass."""

from __future__ import annotations

import hashlib
import json
import zlib

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.ir.graph import Program
from graphopt.ir.imprint import arrays
from graphopt.ir.serialize import program_to_json
from graphopt.ir.weights import Array
from graphopt.support.ranks import Ranks
from graphopt.support.tensor_bytes import tensor_bytes

APART = 1e-2
"""The share by which a weight may differ between ranks and count as rounded differently: of the
norm of its numbers, or of the number of its codes."""

_NO_RESULT = ("name", "source", "notes", "tokenizer")
"""Parts of a saved program that decide no number."""


def agree(ranks: Ranks, name: str, before: Program, after: Program) -> list[str]:
    """Make the programs of all ranks one after a pass: the first rank's.

    What ranks decide by is the same on each, and so is what they make, but where a device rounds
    sums differently each time. Then the first rank's numbers are taken.

    Args:
        name: The pass.
        before, after: The program in front of it, and behind it, whose new tensors may be changed.

    Returns:
        Names of weights whose numbers were not the same on all ranks.

    Raises:
        PassError: The programs differ by more than rounding.
    """
    if ranks.world == 1:
        return []
    known = {id(array) for weight in before.weights for array in arrays(weight.producer)}
    fresh: dict[int, tuple[str, Array]] = {}
    for weight in after.weights:
        for array in arrays(weight.producer):
            if id(array) not in known:
                fresh.setdefault(id(array), (weight.name, array))
    made = list(fresh.values())
    own = [_structure(after, made), *(_checksum(array.value) for _, array in made)]
    first = ranks.made_by_first(lambda: own)
    structure = int(own[0] != first[0])
    differing = [structure] + [0] * len(made)
    if not structure:
        differing = [int(mine != theirs) for mine, theirs in zip(own, first, strict=True)]
    # Every rank must know which any of them has otherwise.
    if ranks.most(structure):
        raise _differ(name, "they have another structure")
    places = ranks.total(torch.tensor(differing[1:], dtype=torch.int64)).tolist()
    found: list[str] = []
    for (own_name, array), differs in zip(made, places, strict=True):
        if differs:
            _take(ranks, name, own_name, array)
            found.append(own_name)
    return list(dict.fromkeys(found))


def digest(program: Program) -> str:
    """Return a hash of a program's structure and of all its tensors in memory."""
    made = [(weight.name, array) for weight in program.weights for array in arrays(weight.producer)]
    sums = [_checksum(array.value) for _, array in made]
    return hashlib.sha256(json.dumps([_structure(program, made), sums]).encode()).hexdigest()


def _structure(program: Program, made: list[tuple[str, Array]]) -> int:
    """Return a checksum of all that a program is beside the numbers of new tensors."""
    data = {k: part for k, part in program_to_json(program).items() if k not in _NO_RESULT}
    shapes = [(name, list(array.shape), str(array.dtype)) for name, array in made]
    return zlib.crc32(json.dumps([data, shapes], sort_keys=True, default=str).encode())


def _checksum(value: Tensor) -> int:
    return zlib.crc32(tensor_bytes(value).numpy())  # type: ignore[arg-type]


def _take(ranks: Ranks, name: str, weight: str, array: Array) -> None:
    """Give a tensor the first rank's numbers, which are to be nearly its own."""
    own = array.value.detach()
    theirs = own.clone()
    ranks.take_from_first([theirs])
    if own.dtype.is_floating_point:
        apart = float((own.double() - theirs.double()).norm())
        far = not apart <= APART * float(theirs.double().norm())
    else:
        far = int((own != theirs).sum()) > APART * own.numel()
    if ranks.most(int(far)):
        raise _differ(name, f"weight {weight!r} has other values")
    with torch.inference_mode(own.is_inference()):
        own.copy_(theirs)


def _differ(name: str, what: str) -> PassError:
    return PassError(
        f"After {name!r} the ranks hold different programs: {what}.",
        "Run it in one process, and report it with what you gave: ranks must decide alike.",
    )
