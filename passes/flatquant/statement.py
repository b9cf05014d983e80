"""What `flatquant` states of the program it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Statement
from graphopt.pass_manager.rounding_statements import added_roundings, check_roundings
from graphopt.pass_manager.statements import ChangedBlocks


@dataclass(frozen=True)
class RoundedBlocks(Statement):
    """Blocks were changed, so that they compute in few bits; nothing else was changed.

    Attributes:
        encodings: Of the weights that were trained to be rounded, by name.
        readers: The weights by whose linears a rounded value is read.
        activations: Bits of what these linears read; None for no change.
        kv: Bits of the keys and values that attentions read; None for no change.
        folded: The program as it was trained, its weights dense.
        packing: What holds of the result against `folded`; None where no weight is rounded.
    """

    encodings: Mapping[str, Packed]
    readers: frozenset[str]
    activations: int | None
    kv: int | None
    folded: Program
    packing: Statement | None

    def check(self, before: Program, after: Program) -> str | None:
        untrue = ChangedBlocks().check(before, after)
        if untrue is not None:
            return untrue
        for name, encoding in self.encodings.items():
            if name not in after.weights:
                return f"{name} is not read any more"
            made = after.weights[name].encoding
            if made != encoding:
                return f"{name} is {made or 'dense'}, not {encoding}"
        added = added_roundings(before, after)
        untrue = check_roundings(
            after, added, self.readers, self.activations, self.kv, clipped=True
        )
        if untrue is not None or self.packing is None:
            return untrue
        return self.packing.check(self.folded, after)
