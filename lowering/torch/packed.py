"""Packed weights in `model.py`: kept as they are stored, and unpacked where they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Call, Program, unique_name
from graphopt.lowering.torch.text import quoted

CLASS_NAME = "QuantisedWeight"

CLASS = f'''
class {CLASS_NAME}(nn.Module):
    """Matrices kept as packed codes with scales, one behind the other; a call gives their values.

    `sizes` are the outputs of each.
    """

    def __init__(
        self, weights: dict[str, Tensor], *names: str, bits: int, group: int, axis: int
    ) -> None:
        super().__init__()
        self.bits, self.group, self.axis = bits, group, axis
        self.sizes = [len(weights[f"{{name}}.packed"]) for name in names]
        for suffix in ("packed", "scales", "zeros"):
            stored = [weights.get(f"{{name}}.{{suffix}}") for name in names]
            tensors = [tensor for tensor in stored if tensor is not None]
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else None
            self.register_parameter(
                suffix, None if joined is None else nn.Parameter(joined, requires_grad=False)
            )

    def forward(self) -> Tensor:
        """Return the matrix [out,in]."""
        options = {{"bits": self.bits, "group": self.group, "axis": self.axis}}
        return dequantise(self.packed, self.scales, self.zeros, **options)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows `ids` [...] of the matrix, [...,in]; its groups lie along rows."""
        # Not by indexing, which would count negative ids from the end.
        flat = ids.reshape(-1)
        zeros = None if self.zeros is None else self.zeros.index_select(0, flat)
        packed, scales = self.packed.index_select(0, flat), self.scales.index_select(0, flat)
        rows = dequantise(packed, scales, zeros, bits=self.bits, group=self.group)
        return rows.view(*ids.shape, rows.shape[-1])
'''


def encodings(program: Program, call: Call) -> dict[str, Packed]:
    """Return the encodings of a call's packed weights, by slot."""
    found = {slot: program.weights[name].encoding for slot, name in call.weights.items()}
    return {slot: encoding for slot, encoding in found.items() if encoding is not None}


def with_uniform_encodings(program: Program) -> Program:
    """Return a program in which the calls of a function agree on how its weights are stored.

    Where they don't, as when the first layers stay dense, each way gets a copy of the function; a
    program in which they do is returned as it is.
    """
    made = program
    names: dict[tuple[str, str], str] = {}
    for number, call in enumerate(program.calls):
        key = (call.function, repr(sorted(encodings(program, call).items())))
        if key not in names:
            names[key] = call.function
            if any(name == call.function for name, _ in list(names)[:-1]):
                made = program.copy() if made is program else made
                names[key] = unique_name(call.function, set(made.functions))
                function = program.functions[call.function].clone(names[key])
                made.functions[function.name] = function
        if names[key] != call.function:
            made.calls[number].function = names[key]
    return made


def init_statement(attribute: str, slots: Sequence[str], encoding: Packed) -> str:
    """Return what sets the attribute of a packed weight, or of several one behind the other."""
    options = f"bits={encoding.bits}, group={encoding.group}, axis={encoding.axis}"
    return f"self.{attribute} = {CLASS_NAME}(weights, {', '.join(map(quoted, slots))}, {options})"


def rows_text(attribute: str, ids: str) -> str:
    """Return the look-up of rows of a packed table."""
    return f"{attribute.removesuffix('()')}.rows({ids})"


def stored_slots(program: Program, call: Call, slots: Mapping[str, object]) -> dict[str, str]:
    """Return the names of the tensors that a call's weights are stored as, by slot and suffix."""
    return {
        slot + tensor.name.removeprefix(call.weights[slot]): tensor.name
        for slot in slots
        for tensor in program.weights[call.weights[slot]].tensors()
    }
