"""Functions whose weights get other sizes: the numbers in their nodes that follow.

Types of most values are derived from weights, but what capture left as ATen ops has sizes of the
traced model among its arguments. Here sizes of weights are changed, and the change is followed
from value to value: an argument that is such a size, and the recorded types, become what they
would be, had the model been traced with the new weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from graphopt.ir.graph import Call, Function, In, Node, Param, Value, resolve_attrs
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import concretize, map_leaves, resolve_target
from graphopt.ir.types import B, Dim, P, S, Type, dim, evaluate, numel

WeightSizes = Mapping[str, Mapping[int, int]]
"""For slots of weights the new sizes of some of their axes."""

_SIZES = {B: 3, S: 5, P: 7}
"""Sizes at which ops are asked for their shapes: different primes, so that none is another one."""

_ELEMENTWISE = frozenset(
    {"add", "mul", "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor"}
)
_RESHAPES = ("aten.reshape.default", "aten.view.default", "aten._unsafe_view.default")
_TO_THE_END = 2**62
"""Where a slice ends that has no end."""


@dataclass(frozen=True)
class Resized:
    """A function that fits weights of other sizes.

    Attributes:
        function: A copy, with other numbers in its nodes.
        weights: The new sizes that were asked for, and those of weights that are added to or
            multiplied with what changed.
        attrs: New values of the call's attributes.
    """

    function: Function
    weights: dict[str, dict[int, int]]
    attrs: dict[str, Any]


def resize(
    function: Function,
    call: Call,
    types: Mapping[Value, Type],
    weights: WeightSizes,
    name: str,
    counting: Collection[Node] = (),
) -> Resized:
    """Return a copy of a function that fits weights of other sizes.

    Args:
        call: A call of the function.
        types: The types of its values as that call uses it.
        name: The name of the copy.
        counting: Nodes that make an axis of such a size although none of their operands has it: a
            histogram's bins, the size that 1 is expanded to.

    Raises:
        ValueError: A size would reach what the function returns, or an op has no rule.
    """
    wanted = {slot: dict(sizes) for slot, sizes in weights.items()}
    while True:
        resizing = _Resizing(function, call, types, wanted, counting)
        more = resizing.run()
        if not more:
            return Resized(resizing.copy(name), wanted, resizing.call_attrs)
        for slot, axis, size in more:
            wanted.setdefault(slot, {})[axis] = size


class _Resizing:
    """One walk over a function's nodes."""

    def __init__(
        self,
        function: Function,
        call: Call,
        types: Mapping[Value, Type],
        weights: WeightSizes,
        counting: Collection[Node],
    ) -> None:
        self.function, self.call, self.types = function, call, types
        self.counting = counting
        self.changed: dict[Value, Type] = {}
        self.attrs: dict[Node, dict[str, Any]] = {}
        self.call_attrs: dict[str, Any] = {}
        self.sizes: dict[int, int] = {}
        self.demanded: list[tuple[str, int, int]] = []
        for slot, sizes in weights.items():
            value = function.weights[slot]
            shape = list(types[value].shape)
            for axis, size in sizes.items():
                self.sizes[int(shape[axis])] = size
                shape[axis] = size
            self.changed[value] = Type(tuple(shape), types[value].dtype)

    def run(self) -> list[tuple[str, int, int]]:
        """Follow the sizes; return which more weights have to follow, by slot, axis and size."""
        for node in self.function.nodes:
            if node in self.counting or any(value in self.changed for value in node.inputs):
                self._follow(node)
                if self.demanded:
                    return self.demanded
        for value in self.function.outside_values():
            if value in self.changed:
                raise ValueError(f"{value.name}, which the block returns, would be resized")
        return []

    def copy(self, name: str) -> Function:
        """Return a copy of the function with the attributes that were found."""
        copied = self.function.clone(name)
        for node, own in zip(self.function.nodes, copied.nodes, strict=True):
            own.attrs.update(map_leaves(self.attrs.get(node, {}), lambda leaf: leaf))
        return copied

    def _type(self, value: Value) -> Type:
        return self.changed.get(value, self.types[value])

    def _follow(self, node: Node) -> None:
        operands = [None if value is None else self._type(value) for value in node.inputs]
        if node.op in _ELEMENTWISE:
            self._align(node)
        if node.op == "linear" and node.operand(2) is not None:
            self._follow_bias(node)
        if self.demanded:
            return
        attrs = self._attrs(node)
        if is_aten(node.op):
            outputs = self._aten_types(node, operands, attrs)
            if outputs != [self.types[value] for value in node.outputs]:
                attrs = {**attrs, "types": outputs}
        else:
            outputs = get_op(node.op).infer(operands, attrs)
        self._keep_attrs(node, attrs)
        for value, kind in zip(node.outputs, outputs, strict=True):
            if kind != self.types[value]:
                self.changed[value] = kind

    def _keep_attrs(self, node: Node, attrs: dict[str, Any]) -> None:
        before = resolve_attrs(node, self.call)
        for key, value in attrs.items():
            if value == before.get(key):
                continue
            own = node.attrs[key]
            if not isinstance(own, Param):
                self.attrs.setdefault(node, {})[key] = value
            elif self._reads(own) > 1:
                raise ValueError(f"{own.name} is an attribute of several nodes")
            else:
                self.call_attrs[own.name] = value

    def _reads(self, param: Param) -> int:
        return sum(param in node.attrs.values() for node in self.function.nodes)

    def _align(self, node: Node) -> None:
        """Let the other operand of a sum or product follow the axis that changed."""
        for value in node.inputs:
            if value is None or value not in self.changed:
                continue
            old, new = self.types[value].shape, self.changed[value].shape
            for back in range(1, len(old) + 1):
                if old[-back] == new[-back]:
                    continue
                for other in node.inputs:
                    if other is None or other is value:
                        continue
                    shape = self._type(other).shape
                    if len(shape) >= back and shape[-back] == old[-back] != 1:
                        self._demand(other, len(shape) - back, int(new[-back]))

    def _follow_bias(self, node: Node) -> None:
        weight, bias = node.inputs[1], node.operand(2)
        assert weight is not None and bias is not None
        rows = self._type(weight).shape[0]
        if self._type(bias).shape[0] != rows:
            self._demand(bias, 0, int(rows))

    def _demand(self, value: Value, axis: int, size: int) -> None:
        """Say that the weight that a value is made of must have another size on an axis."""
        slots = self.function.slots_by_value()
        while value not in slots:
            node = value.node
            source = None if node is None else node.inputs[0]
            if node is not None and node.op == "embedding":
                source, axis = node.inputs[1], axis - len(self.types[value].shape) + 2
            elif node is not None and node.op.startswith(("aten.squeeze.", "aten.unsqueeze.")):
                assert source is not None
                axis = _same_axis(self.types[source].shape, self.types[value].shape, axis)
            elif node is None or not node.op.startswith("aten.to."):
                source = None
            if source is None:
                raise ValueError(f"{value.name} has as many entries and is made of no weight")
            value = source
        self.demanded.append((slots[value], axis, size))

    def _attrs(self, node: Node) -> dict[str, Any]:
        """Return the attributes of a node with its sizes as they become."""
        attrs = resolve_attrs(node, self.call)
        if node.op == "split_heads":
            assert node.inputs[0] is not None
            old, new = (kinds[node.inputs[0]].shape[-1] for kinds in (self.types, self.changed))
            head_dim = _scaled(attrs["head_dim"], int(old), int(new))
            self.sizes[attrs["head_dim"]] = head_dim
            return {**attrs, "head_dim": head_dim}
        if not is_aten(node.op):
            return attrs
        args = list(attrs["args"])
        if node.op in _RESHAPES:
            args[1] = self._reshaped(node, args[1])
        elif node.op == "aten.expand.default" and node in self.counting:
            args[1] = self._expanded(node, args[1])
        elif node.op == "aten.histc.default" and node in self.counting:
            bins = self.sizes.get(args[1], args[1])
            args[1], args[3] = bins, args[3] + bins - args[1]
        elif node.op == "aten.slice.Tensor":
            args = self._sliced(node, args)
        elif node.op.startswith(("aten.split", "aten.new_", "aten.zeros", "aten.full.")):
            raise ValueError(f"{node.outputs[0].name} = {node.op} has sizes of its own")
        return {**attrs, "args": args} if args != attrs["args"] else attrs

    def _reshaped(self, node: Node, sizes: Sequence[Dim]) -> list[Dim]:
        """Return the sizes that a reshape is given: each made of those it was made of."""
        source = node.inputs[0]
        assert source is not None
        old, new = self.types[source].shape, self._type(source).shape
        made = self.types[node.outputs[0]].shape
        given = list(sizes)
        for inner, outer in factors(old, made):
            before, after = numel(old[i] for i in inner), numel(new[i] for i in inner)
            if before == after:
                continue
            # Of several sizes one follows: that of the axis itself, else the last, which is
            # what is in a group.
            gone = {old[i] for i in inner if old[i] != new[i]}
            place = next((i for i in outer if made[i] in gone), None)
            if place is None:
                place = [i for i in outer if len(outer) == 1 or isinstance(made[i], int)][-1]
            size = dim(sympy.sympify(made[place]) * after / before)
            if isinstance(size, sympy.Rational):
                raise ValueError(f"{made[place]} of {before} cannot become {size}")
            if isinstance(made[place], int):
                self.sizes[int(made[place])] = int(size)
            if given[place] != -1:
                given[place] = size
        return given

    def _expanded(self, node: Node, sizes: Sequence[Dim]) -> list[Dim]:
        source = node.inputs[0]
        assert source is not None
        shape = self._type(source).shape
        front = len(sizes) - len(shape)
        return [
            self.sizes.get(size, size)  # type: ignore[call-overload]
            if place >= front and shape[place - front] == 1 and size != 1
            else size
            for place, size in enumerate(sizes)
        ]

    def _sliced(self, node: Node, args: list[Any]) -> list[Any]:
        """Return a slice's arguments where its ends are shares of the axis, and not every nth."""
        source = node.inputs[0]
        assert source is not None
        axis = args[1] if len(args) > 1 else 0
        old, new = self.types[source].shape[axis], self._type(source).shape[axis]
        if old == new or (len(args) > 4 and args[4] != 1):
            return args
        ends = [
            _scaled(end, int(old), int(new))
            if isinstance(end, int) and 0 < end < _TO_THE_END
            else end
            for end in args[2:4]
        ]
        return [*args[:2], *ends, *args[4:]]

    def _aten_types(
        self, node: Node, operands: Sequence[Type | None], attrs: Mapping[str, Any]
    ) -> list[Type]:
        """Return the types that an operator gives, by running it on tensors without values."""
        if node.op.startswith("transformers.grouped_mm"):
            rows, stack = operands[:2]
            assert rows is not None and stack is not None
            return [Type((rows.shape[0], stack.shape[-1]), rows.dtype)]
        if node.op == "aten.histc.default":
            (made,) = attrs["types"]
            return [Type((attrs["args"][1],), made.dtype)]
        tensors = [
            None
            if kind is None
            else torch.empty(kind.concrete(_SIZES), dtype=kind.dtype, device="meta")
            for kind in operands
        ]

        def change(leaf: Any) -> Any:
            if isinstance(leaf, In):
                return tensors[leaf.index]
            return torch.device("meta") if isinstance(leaf, torch.device) else leaf

        given = concretize(attrs, _SIZES)
        try:
            result = resolve_target(node.op)(
                *map_leaves(given["args"], change), **map_leaves(given.get("kwargs", {}), change)
            )
        except (RuntimeError, NotImplementedError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{node.outputs[0].name} = {node.op}: {reason}") from error
        found = [result] if isinstance(result, torch.Tensor) else list(result)
        return [
            Type(
                tuple(_resized(*size) for size in zip(kind.shape, made.shape, strict=True)),
                kind.dtype,
            )
            for kind, made in zip(attrs["types"], found, strict=True)
        ]


def _resized(size: Dim, found: int) -> Dim:
    """Return what a size has become that is now so much at `_SIZES`."""
    before = evaluate(size, _SIZES)
    return size if before == found else dim(sympy.sympify(size) * found / before)


def _scaled(size: int, old: int, new: int) -> int:
    """Return a share of an axis of another size.

    Raises:
        ValueError: It is not whole.
    """
    if size * new % old:
        raise ValueError(f"{new} do not divide into parts as {old} do into parts of {size}")
    return size * new // old


def _same_axis(source: Sequence[Dim], made: Sequence[Dim], axis: int) -> int:
    """Return the axis before axes of size 1 were added or left out."""
    number = sum(size != 1 for size in made[:axis])
    return [place for place, size in enumerate(source) if size != 1][number]


def factors(first: Sequence[Dim], second: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Return which axes of two shapes of one tensor are made of each other, in order."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(first) and j < len(second):
        inner, outer = [i], [j]
        one, other = sympy.sympify(first[i]), sympy.sympify(second[j])
        i, j = i + 1, j + 1
        while one != other:
            more = sympy.fraction(sympy.cancel(other / one))[1] == 1
            if more and i < len(first):
                one, inner, i = one * first[i], [*inner, i], i + 1
            elif j < len(second):
                other, outer, j = other * second[j], [*outer, j], j + 1
            else:
                break
        found.append((inner, outer))
    return found
