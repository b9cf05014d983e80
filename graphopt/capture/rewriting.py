"""What the raising rules share: looking at ATen nodes, replacing them, and proving by evaluation.

A rule finds a candidate by dataflow and then runs the old nodes and the new op side by side on
random fp64 inputs; only a candidate that computes the same is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.ir.dataflow import region
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Function, Node, Param, Value
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import aten_argument, concretize
from graphopt.ir.types import B, P, S, Type

SMALL_SIZES: tuple[Mapping[sympy.Symbol, int], ...] = ({B: 2, S: 3, P: 0}, {B: 3, S: 5, P: 0})
"""The sizes at which a candidate is tried: two, so that no size is taken for another."""


def base(op: str) -> str:
    """Return `view` for `aten.view.default`, and a raised op's own name."""
    return op.split(".")[1] if is_aten(op) else op


class NotRaisedError(Exception):
    """A candidate does not fit the op after all; it stays as it is."""


class Raiser:
    """A function being raised.

    Attributes:
        function: Changed in place.
        types: Type of every value; kept up to date.
        constants: Values of constant weight slots.
        label: Where this function comes from, for messages.
        notes: Rules that stopped, as (where, reason).
    """

    def __init__(
        self,
        function: Function,
        types: dict[Value, Type],
        constants: dict[str, Tensor],
        label: str,
    ) -> None:
        self.function = function
        self.types = types
        self.constants = constants
        self.label = label
        self.notes: list[tuple[str, str]] = []
        self._slots = function.slots_by_value()

    def attempt(self, rule: Callable[..., None], *args: Any) -> None:
        """Run a rule; where it stops at a graph it was not made for, the rest stays ATen.

        Every step of a rule leaves a graph that computes the same, so what it did so far holds.
        """
        try:
            rule(*args)
        except Exception as error:
            reason = f"the rule {rule.__name__} stopped: {type(error).__name__}: {error}"
            self.notes.append((self.label, reason))
            self.sweep()

    # Looking -------------------------------------------------------------------------------

    def slot(self, value: Value) -> str | None:
        """Return the weight slot `value` stands for."""
        if value.node is not None:
            return None
        found = self._slots.get(value)
        if found is None:
            self._slots = {v: s for s, v in self.function.weights.items()}
            found = self._slots.get(value)
        return found

    def constant(self, value: Value) -> Tensor | None:
        """Return the value of a constant slot."""
        slot = self.slot(value)
        return None if slot is None else self.constants.get(slot)

    def is_weight(self, value: Value) -> bool:
        slot = self.slot(value)
        return slot is not None and slot not in self.constants

    arg = staticmethod(aten_argument)

    def made_by(self, value: Value | None, *names: str) -> Node | None:
        """Return the node of `value` if its base name is one of `names`."""
        if isinstance(value, Value) and value.node is not None and base(value.node.op) in names:
            return value.node
        return None

    def scalar(self, item: Any) -> float | int | None:
        """Return a number for a literal or a constant with one element."""
        if isinstance(item, bool):
            return None
        if isinstance(item, int | float):
            return item
        if isinstance(item, sympy.Expr) and item.is_number:
            return float(item)
        if isinstance(item, Value):
            constant = self.constant(item)
            if constant is not None and constant.numel() == 1 and constant.dim() == 0:
                return constant.item()
        return None

    def node_index(self) -> dict[Node, int]:
        return {node: index for index, node in enumerate(self.function.nodes)}

    # Changing ------------------------------------------------------------------------------

    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None,
        before: Node,
        names: Iterable[str] = (),
        outputs: int = 1,
    ) -> Node:
        """Insert a raised op before a node and infer its types.

        Raises:
            NotRaisedError: The op refuses the operands; nothing was inserted.
        """
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        node = self.function.add(op, trimmed, attrs, names, outputs=outputs, before=before)
        try:
            self.infer(node)
        except (ValueError, TypeError) as error:
            self.function.nodes.remove(node)
            raise NotRaisedError(f"{node.outputs[0].name}: {error}") from error
        return node

    def infer(self, node: Node) -> None:
        operands = [None if v is None else self.types[v] for v in node.inputs]
        attrs = {k: None if isinstance(v, Param) else v for k, v in node.attrs.items()}
        outputs = get_op(node.op).infer(operands, attrs)
        self.types.update(zip(node.outputs, outputs, strict=True))

    def replace(
        self,
        old: Value,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        name: str = "",
    ) -> Value:
        """Compute `old` by a raised op instead; what nothing reads any more is swept later."""
        assert old.node is not None
        node = self.insert(op, inputs, attrs, old.node, [name or op])
        self.function.replace(old, node.output)
        return node.output

    def add_weight(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        """Add a weight slot and return its value."""
        value = Value(slot)
        self.function.weights[slot] = value
        self._slots[value] = slot
        self.types[value] = Type(shape, dtype)
        return value

    def sweep(self) -> None:
        """Remove what nothing reads; weights stay, the caller decides about them."""
        kept = dict(self.function.weights)
        remove_dead(self.function)
        self.function.weights = kept

    # Proving -------------------------------------------------------------------------------

    def random(
        self, value: Value, sizes: Mapping[sympy.Symbol, int], generator: torch.Generator
    ) -> Tensor:
        """Return a random fp64 tensor of the value's shape (its real value for a constant)."""
        constant = self.constant(value)
        if constant is not None:
            return constant.double() if constant.is_floating_point() else constant
        kind = self.types[value]
        shape = kind.concrete(sizes)
        if kind.dtype.is_complex:
            parts = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
            return torch.view_as_complex(parts)
        if not kind.dtype.is_floating_point:
            return torch.randint(0, 2, shape, generator=generator).to(kind.dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def evaluate(
        self,
        targets: Sequence[Value],
        boundary: Mapping[Value, Tensor],
        sizes: Mapping[sympy.Symbol, int],
    ) -> list[Tensor]:
        """Compute `targets` from the values of `boundary`, in fp64.

        Raises:
            KeyError: A target depends on something outside the boundary.
        """
        values: dict[Value, Tensor] = dict(boundary)
        needed = self.region(targets, boundary)
        for node in needed:
            attrs: dict[str, Any] = dict(node.attrs)
            if is_aten(node.op):
                attrs = {**concretize(attrs, sizes), "target": node.op}
            operands = [None if v is None else self._value(v, values) for v in node.inputs]
            outputs = get_op(node.op).reference(operands, attrs)
            values.update(zip(node.outputs, outputs, strict=False))
        return [self._value(target, values) for target in targets]

    def _value(self, value: Value, values: Mapping[Value, Tensor]) -> Tensor:
        if value in values:
            return values[value]
        constant = self.constant(value)
        if constant is None:
            raise KeyError(value.name)
        return constant.double() if constant.is_floating_point() else constant

    def region(self, targets: Sequence[Value], boundary: Iterable[Value]) -> list[Node]:
        """Return the nodes between the boundary and the targets, in order."""
        return region(self.function, targets, boundary)

    def proves(
        self,
        old: Value,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, Any],
        sources: Sequence[Value],
        magnitude: float = 1.0,
    ) -> bool:
        """True where `op` computes what `old` does, from random values of `sources`.

        Compared in fp64 at two sizes to a relative 1e-6, which leaves room for constants that
        the source wrote with seven digits, and for nothing else.
        """
        generator = torch.Generator().manual_seed(0)
        for sizes in SMALL_SIZES:
            boundary = {s: self.random(s, sizes, generator) * magnitude for s in sources}
            try:
                (expected,) = self.evaluate([old], boundary, sizes)
                operands = [None if v is None else self._value(v, boundary) for v in inputs]
                actual = get_op(op).reference(operands, attrs)[0]
            except (KeyError, RuntimeError, ValueError, IndexError, TypeError):
                return False
            if expected.shape != actual.shape or not close(expected, actual):
                return False
        return True


def close(expected: Tensor, actual: Tensor, tolerance: float = 1e-6) -> bool:
    """True where two fp64 tensors agree to `tolerance` relative to the largest value."""
    if not bool(torch.isfinite(actual).all() & torch.isfinite(expected).all()):
        return bool(torch.equal(expected, actual))
    largest = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-30)
    return (
        bool((expected - actual).abs().max() <= tolerance * largest) if expected.numel() else True
    )
