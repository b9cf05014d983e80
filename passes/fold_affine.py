"""Inverses of affine transforms, multiplied into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir.affine import fold_transforms
from graphopt.ir.graph import Program
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.rewrite import calls_of


@register_pass
@dataclass
class FoldAffine(Pass):
    """Multiply what undoes the transforms of `insert-affine` into the weights, in fp64.

    An inverse goes into the columns of the matrices that read it, a scale into the gain of the norm
    in front of it (and its bias) or into the rows of the linear beside the gate, and the map of an
    attention's values into the rows, and the bias, of what makes them. What is left in the graph is
    the transforms that have to be computed for every token. Changed weights are in fp32 at least.

    Legality:

    1. The node is part of a transform that was inserted: its factors' slots say so.
    2. An inverse is read by matrices alone; a scale by its transform alone, and what it scales by
       nothing else.
    """

    name: ClassVar[str] = "fold-affine"
    reads_weights: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult(program)
        kinds = infer_program(program)[0]
        places = {id(call): number for number, call in enumerate(program.calls)}
        for name, calls in calls_of(program).items():
            types = kinds[places[id(calls[0])]]
            folded = fold_transforms(program, program.functions[name], calls, types)
            result.changed += folded.places * len(calls)
            result.matched += (folded.places + len(folded.left)) * len(calls)
            where = calls[0].path or name
            result.skipped += [Skip(f"{where}.{slot}", reason) for slot, reason in folded.left]
        program.prune_unused()
        return result
