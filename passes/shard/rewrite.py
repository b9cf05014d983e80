"""A function as every rank runs it: its own sizes, and collectives where parts meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Function, Node, Value, resolve_attrs
from graphopt.ir.mixture import GROUPED_PRODUCTS
from graphopt.ir.ops import is_aten
from graphopt.ir.split import Layout, Split
from graphopt.ir.splits import features_of_all, keeps_sums, local_attrs, takes_any
from graphopt.ir.types import B, P, S, Type, evaluate, numel
from graphopt.passes.shard.regions import Chosen, Regions

_LOOK_UPS = ("embedding", "aten.index.Tensor", "aten.index_select.default")
_SIZES_OF_A_STEP = 8
"""Tokens of a step by which the sizes of values are compared."""


class Ungathered(Exception):
    """A value that other calls split in sections, or in copies, is read whole."""


@dataclass
class Rewritten:
    """What ranks run of a function.

    Attributes:
        function: The function.
        weights: How the weights in its slots lie; those that are not here are whole.
        states: How the states of its cache slots are split.
        results: How its results are split.
    """

    function: Function
    weights: dict[str, Layout] = field(default_factory=dict)
    states: dict[str, Split] = field(default_factory=dict)
    results: list[Split | None] = field(default_factory=list)


def rewrite(regions: Regions, columns: Sequence[Node] = ()) -> Rewritten:
    """Return a function for one rank.

    Args:
        columns: Linears whose rows are split although all of their output is read.
    """
    return _Rewriting(regions, columns).run()


@dataclass(frozen=True)
class _Mixed:
    """A sum of what is whole and of what is a partial sum, which nobody needs yet."""

    whole: Value
    summand: Value


class _Rewriting:
    def __init__(self, regions: Regions, columns: Sequence[Node]) -> None:
        self.regions, self.ranks = regions, regions.ranks
        old = regions.function
        self.result = Rewritten(old.clone())
        self.function = self.result.function
        new = dict(zip(old.values(), self.function.values(), strict=True))
        self.types: dict[Value, Type] = {new[v]: kind for v, kind in regions.types.items()}
        nodes = dict(zip(old.nodes, self.function.nodes, strict=True))
        self.chosen: dict[Node, Chosen] = {nodes[n]: c for n, c in regions.chosen.items()}
        self.columns = {nodes[node] for node in columns}
        self.layouts: dict[Value, Layout] = {new[v]: s for v, s in regions.splits.items()}
        self.layouts |= {new[v]: split for v, split in regions.given.items()}
        self.mixed: dict[Value, _Mixed] = {}
        self.made_whole: dict[Value, Value] = {}
        self.slots = self.function.slots_by_value()
        self.uses = self.function.uses()
        self.outside = self.function.outside_values()

    def run(self) -> Rewritten:
        for node in list(self.function.nodes):
            self._node(node)
        function = self.function
        self.result.results = [self._result(n) for n in range(len(function.results))]
        for cache in function.caches:
            split = self.layouts.get(cache.past_k)
            if isinstance(split, Split):
                self.result.states[cache.slot] = split
        self.result.weights = {
            slot: layout
            for slot, value in function.weights.items()
            if (layout := self.layouts.get(value)) is not None
        }
        remove_dead(function)
        return self.result

    def _result(self, place: int) -> Split | None:
        value = self.function.results[place]
        layout = self.layouts.get(value)
        old = self.regions.function.results[place]
        if isinstance(layout, Split) and old not in self.regions.gathered:
            return layout
        self.function.results[place] = self._whole(value)
        return None

    # Nodes

    def _node(self, node: Node) -> None:
        attrs = resolve_attrs(node, self.regions.call)
        operands = [None if v is None else self.types[v] for v in node.inputs]
        chosen = self.chosen.get(node)
        members = {} if chosen is None else chosen.alignment.operands
        if chosen is not None and chosen.alignment.sums:
            self._sum_of(node)
        elif node in self.columns:
            self._column(node)
            return
        summed = [] if chosen is not None else self._summands(node)
        if summed and self._add(node):
            return
        if summed and self._scatter(node):
            return
        kept = bool(summed) and self._keeps(node, attrs, operands, summed)
        summed = self._summands(node)
        for place, value in enumerate(node.inputs):
            if value is None or place in members or takes_any(node.op, place):
                continue
            if kept and place in summed:
                continue
            if self.layouts.get(value) == "sum" and value in self.slots:
                continue
            node.inputs[place] = self._whole(value)
        if kept:
            self.layouts |= dict.fromkeys(node.outputs, "sum")
        if chosen is not None:
            self._localise(node, chosen, operands)

    def _localise(self, node: Node, chosen: Chosen, operands: Sequence[Type | None]) -> None:
        """Give a node the arguments for a rank's parts."""
        made = {p: self.layouts.get(v) for p, v in enumerate(node.outputs)}
        results = [self.types[value] for value in node.outputs]
        if chosen.alignment.sums and chosen.base.copies > 1:
            own = features_of_all(node.op, node.attrs, chosen.base.copies)
            node.attrs = own or node.attrs
        if is_aten(node.op):
            node.attrs = local_attrs(node.op, node.attrs, operands, results, made, self.ranks)

    def _sum_of(self, node: Node) -> None:
        """Make a node's result a partial sum, to which one rank alone adds a bias."""
        self.layouts[node.outputs[0]] = "sum"
        bias = node.operand(2) if node.op == "linear" else None
        if bias is not None:
            self.layouts[bias] = "sum"

    def _column(self, node: Node) -> None:
        """Split the rows of a linear's weight; its output is gathered where it is read."""
        node.inputs[0] = self._whole(node.inputs[0])  # type: ignore[arg-type]
        for value in node.inputs[1:]:
            if value is not None:
                self.layouts[value] = Split(0)
        self.layouts[node.output] = Split(len(self.types[node.output].shape) - 1)

    # Partial sums

    def _summands(self, node: Node) -> list[int]:
        return [
            place
            for place, value in enumerate(node.inputs)
            if value is not None and (self.layouts.get(value) == "sum" or value in self.mixed)
        ]

    def _keeps(
        self, node: Node, attrs: Mapping[str, object], operands: Sequence[Type | None],
        summed: Sequence[int],
    ) -> bool:  # fmt: skip
        """Whether the ranks' results are to be added up behind a node, and not in front of it."""
        values = [node.inputs[place] for place in summed]
        if any(v is None or v in self.mixed or not self._is_read_once(v) for v in values):
            return False
        before = min(self._size(v) for v in values if v is not None)
        if max(map(self._size, node.outputs)) > before:
            return False
        places = list(summed)
        others = [place for place in range(len(node.inputs)) if place not in summed]
        if node.op in ("add", "aten.add.Tensor") and self._of_experts(values):
            # A bias, or rows of a table of biases, is added on one rank.
            places += [place for place in others if self._becomes_sum(node.inputs[place])]
        return keeps_sums(node.op, attrs, operands, places)

    @staticmethod
    def _of_experts(values: Sequence[Value | None]) -> bool:
        """Whether partial sums are a row for every expert that a token runs: many to add up."""
        makers = [None if value is None else value.node for value in values]
        return all(node is not None and node.op in GROUPED_PRODUCTS for node in makers)

    def _is_read_once(self, value: Value) -> bool:
        return len(self.uses[value]) == 1 and value not in self.outside

    def _size(self, value: Value) -> int:
        sizes = {B: 1, S: _SIZES_OF_A_STEP, P: _SIZES_OF_A_STEP}
        return evaluate(numel(self.types[value].shape), sizes)

    def _becomes_sum(self, value: Value | None) -> bool:
        """Let a bias that is read once be one rank's alone; return whether it is one."""
        if value is None or self.layouts.get(value) == "sum":
            return value is not None
        if not self._is_read_once(value):
            return False
        weight: Value | None = value
        if value.node is not None and value.node.op in _LOOK_UPS:
            table = 1 if value.node.op == "embedding" else 0
            weight = value.node.inputs[table]
        if weight not in self.slots or len(self.uses[weight]) > 1 or weight in self.layouts:
            return False
        self.layouts |= {weight: "sum", value: "sum"}
        return True

    def _add(self, node: Node) -> bool:
        """Put off adding a partial sum to what is whole while further summands come.

        Of `(x + a) + b` with partial sums a and b the ranks add up a + b, once.
        """
        if node.op != "add":
            return False
        first, second = node.inputs
        assert first is not None and second is not None
        value = node.output
        parts = [self._parts(first), self._parts(second)]
        wholes = [whole for whole, _ in parts if whole is not None]
        summands = [summand for _, summand in parts if summand is not None]
        if not wholes:
            return False
        if any(self.types[v].shape != self.types[value].shape for v in (*wholes, *summands)):
            return False
        pending = [v for v in (first, second) if v in self.mixed]
        if not pending and self._of_experts(summands):
            return False
        reader = self.uses[value][0][0] if self._is_read_once(value) else None
        if not pending and (reader is None or reader.op != "add"):
            return False
        summand = self._total(summands, node)
        whole = self._total(wholes, node)
        if reader is not None and reader.op == "add":
            self.mixed[value] = _Mixed(whole, summand)
            return True
        node.inputs = [whole, self._whole(summand)]
        return True

    def _parts(self, value: Value) -> tuple[Value | None, Value | None]:
        """Return what of a value is whole, and what is a partial sum."""
        if value in self.mixed:
            return self.mixed[value].whole, self.mixed[value].summand
        if self.layouts.get(value) == "sum":
            return None, value
        return self._whole(value), None

    def _total(self, values: Sequence[Value], before: Node) -> Value:
        total = values[0]
        for value in values[1:]:
            made = self.function.add("add", [total, value], names=["x"], before=before).output
            self.types[made] = self.types[total]
            if self.layouts.get(total) == "sum":
                self.layouts[made] = "sum"
            total = made
        return total

    def _scatter(self, node: Node) -> bool:
        """Let a matrix that reads a partial sum, and nothing else does, read a part of the sum."""
        if node.op != "linear" or node in self.chosen:
            return False
        x, weight = node.inputs[:2]
        bias = node.operand(2)
        assert x is not None and weight is not None
        if x in self.mixed or not self._is_read_once(x) or weight in self.layouts:
            return False
        if weight not in self.slots or (bias is not None and bias not in self.slots):
            return False
        last = len(self.types[x].shape) - 1
        if int(self.types[x].shape[last]) % self.ranks:
            return False
        try:
            self.regions.may_split(self.slots[weight], Split(1))
        except ValueError:
            return False
        attrs = {"axis": last, "ranks": self.ranks}
        name = f"{x.name}_part"
        part = self.function.add("reduce_scatter", [x], attrs, [name], before=node).output
        self.layouts |= {part: Split(last), weight: Split(1)}
        self.types[part] = self.types[x]
        node.inputs[0] = part
        self._sum_of(node)
        return True

    # Collectives

    def _whole(self, value: Value) -> Value:
        """Return what is the same on every rank of a value, by a collective where it needs one."""
        if value in self.mixed:
            mixed = self.mixed.pop(value)
            node = value.node
            assert node is not None
            node.inputs = [mixed.whole, self._whole(mixed.summand)]
            self._move_behind(node, [v for v in node.inputs if v is not None])
            return value
        layout = self.layouts.get(value)
        if layout is None:
            return value
        if value not in self.made_whole:
            if layout == "sum":
                op, made_of, attrs = "all_reduce", "sum", {"ranks": self.ranks}
            elif layout.sections > 1 or layout.copies > 1:
                raise Ungathered(value.name)
            else:
                op, made_of = "all_gather", "whole"
                attrs = {"axis": layout.axis, "ranks": self.ranks}
            made = self.function.add(op, [value], attrs, [f"{value.name}_{made_of}"]).output
            assert made.node is not None
            self._move_behind(made.node, [value])
            self.types[made] = self.types[value]
            self.made_whole[value] = made
        return self.made_whole[value]

    def _move_behind(self, node: Node, values: Sequence[Value]) -> None:
        """Put a node behind those that make what it reads, and in front of all others."""
        nodes = self.function.nodes
        nodes.remove(node)
        places = [nodes.index(v.node) for v in values if v.node is not None]
        nodes.insert(max(places, default=-1) + 1, node)
