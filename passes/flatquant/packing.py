"""Codes in the place of weights that were trained to be rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from graphopt.ir.affine import role_of
from graphopt.ir.encoding import Packed, group_of
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, PassResult, Skip
from graphopt.passes.flatquant.structure import without_roundings
from graphopt.passes.quantize.quantize import Quantize
from graphopt.passes.quantize.run import Quantizing
from graphopt.passes.quantize.tables import find_tables
from graphopt.training.affine import Rounding


def pack_weights(program: Program, quantize: Quantize, context: Context) -> PassResult:
    """Return what `quantize` makes of a trained program.

    GPTQ has linears give what they gave before anything was rounded. Nothing is said of weights
    that are no matrices of the model: those of transforms.
    """
    rounding = Quantizing(quantize, program, context)
    rounding.dense = without_roundings(program)
    result = rounding.run()
    tables, transforms = find_tables(program), _transforms(program)
    skipped: list[Skip] = []
    for skip in result.skipped:
        if skip.where in (tables.head, tables.embedding):
            skipped.append(Skip(skip.where, "flatquant rounds weights of blocks alone"))
        elif skip.where not in transforms:
            skipped.append(skip)
    # One weight may be both tables.
    result.skipped = list(dict.fromkeys(skipped))
    return result


def encodings_of(program: Program, rounded: Iterable[tuple[str, Rounding]]) -> dict[str, Packed]:
    """Return how weights that were trained to be rounded are to be stored.

    One that several layers read stays dense, which `quantize` says among what it skips.

    Args:
        rounded: Their names, with how each is rounded.
    """
    readers = Counter(name for call in program.calls for name in call.weights.values())
    return {
        name: Packed(how.bits, group_of(how.group, program.weights[name].shape[1]))
        for name, how in rounded
        if readers[name] == 1
    }


def _transforms(program: Program) -> set[str]:
    """Return the weights of transforms that stay online, by function and slot as skips are."""
    found: set[str] = set()
    for function in program.functions.values():
        slots = function.slots_by_value()
        for node in function.nodes:
            if role_of(function, node) is not None:
                read = [slots[v] for v in node.inputs if v is not None and v in slots]
                found |= {f"{function.name}: {slot}" for slot in read}
    return found
