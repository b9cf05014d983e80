"""Which values of a function are split over the ranks: sets that split along their axes together.

A region begins at a value and an axis, such as the heads of an attention's output, and takes in
what every node that makes or reads one of its values splits with it, until matrices: those whose
rows go with it make it out of what is whole, and those whose columns do turn it into partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from graphopt.ir.graph import Call, Function, Node, Value, resolve_attrs
from graphopt.ir.ops import is_aten
from graphopt.ir.split import Alignment, Split
from graphopt.ir.splits import alignments, features_of_all, reason, takes_any
from graphopt.ir.types import Type


class Whole(Exception):
    """A region cannot be split; says why, as a clause."""


@dataclass(frozen=True)
class Chosen:
    """How a node is split: an alignment, and the split of its base."""

    alignment: Alignment
    base: Split


@dataclass
class Regions:
    """What of a function is split.

    Attributes:
        function, call, types: A call of the function, and the types of its values, of the whole.
        ranks: How many ranks there are.
        given: The parameters that come in parts.
        may_split: Raises `ValueError` where the weight in a slot does not split so.
        shares_keys: Whether keys and values that are returned stay in parts.
        splits: The values that are split.
        chosen: How the nodes that make or read them are.
        gathered: Values of which a node reads all.
    """

    function: Function
    call: Call
    types: Mapping[Value, Type]
    ranks: int
    given: Mapping[Value, Split]
    may_split: Callable[[str, Split], None]
    shares_keys: bool = True
    splits: dict[Value, Split] = field(default_factory=dict)
    chosen: dict[Node, Chosen] = field(default_factory=dict)
    gathered: set[Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._slots = self.function.slots_by_value()
        self._uses = self.function.uses()

    def grow(self, value: Value, split: Split) -> None:
        """Take in what is split with a value.

        Raises:
            Whole: Something of it does not split, and nothing was taken in.
        """
        before = dict(self.splits), dict(self.chosen), set(self.gathered)
        try:
            waiting: list[Value] = []
            self._take(value, split, waiting)
            while waiting:
                self._follow(waiting.pop(), waiting)
            if not any(
                value in self._slots and len(self.types[value].shape) > 1
                for value in self.splits.keys() - before[0].keys()
            ):
                raise Whole("no matrix would be split with it")
        except Whole:
            self.splits, self.chosen, self.gathered = before
            raise

    def _take(self, value: Value, split: Split, waiting: list[Value]) -> None:
        known = self.splits.get(value)
        if known is not None:
            if known != split:
                raise Whole(f"{value.name} would be split in two ways")
            return
        size = self.types[value].shape[split.axis]
        parts = split.parts(self.ranks)
        if not isinstance(size, int) or size % (parts * split.sections):
            each = "" if split.sections == 1 else f" in each of {split.sections} sections"
            raise Whole(f"{size} entries of {value.name} do not divide by {parts}{each}")
        if value in self._slots:
            try:
                self.may_split(self._slots[value], split)
            except ValueError as error:
                raise Whole(f"{self._slots[value]} has {error}") from error
        elif value in self.function.params and self.given.get(value) != split:
            raise Whole(f"{value.name} is made elsewhere, whole")
        self.splits[value] = split
        waiting.append(value)

    def _follow(self, value: Value, waiting: list[Value]) -> None:
        split = self.splits[value]
        if value.node is not None:
            found = self._choose(value.node, value.index, split, of_result=True)
            if found is None:
                raise Whole(reason(value.node))
            self._apply(value.node, found, waiting)
        for node, place in self._uses[value]:
            if takes_any(node.op, place):
                continue
            found = self._choose(node, place, split, of_result=False)
            if found is not None:
                self._apply(node, found, waiting)
            elif split.sections > 1 or split.copies > 1 or node in self.chosen:
                raise Whole(reason(node))
            else:
                self.gathered.add(value)
        if value in self.function.results and not self._is_key_or_value(value):
            if split.sections > 1 or split.copies > 1:
                raise Whole(f"{value.name}, which another call reads, is no row of parts")
            self.gathered.add(value)

    def _is_key_or_value(self, value: Value) -> bool:
        """Whether other calls may attend to it: they read a rank's heads as this one does."""
        return self.shares_keys and any(
            node.op == "attention" and place in (1, 2) for node, place in self._uses[value]
        )

    def _choose(self, node: Node, place: int, split: Split, *, of_result: bool) -> Chosen | None:
        """Return how a node is split where an operand or result of it is; None for not at all."""
        attrs = resolve_attrs(node, self.call)
        if is_aten(node.op):
            attrs["target"] = node.op
        operands = [None if value is None else self.types[value] for value in node.inputs]
        results = [self.types[value] for value in node.outputs]
        known = self.chosen.get(node)
        for alignment in alignments(node.op, attrs, operands, results, self.ranks):
            member = (alignment.results if of_result else alignment.operands).get(place)
            base = None if member is None else split.over(member)
            if base is None:
                continue
            if alignment.sums and features_of_all(node.op, attrs, base.copies) is None:
                if base.copies > 1:
                    continue
            found = Chosen(alignment, base)
            if known is not None and known != found:
                continue
            if alignment.unit > 1:
                size = operands[0].shape[alignment.operands[0].axis]  # type: ignore[union-attr]
                if int(size) // alignment.unit % (base.parts(self.ranks) * base.sections):
                    continue
            if alignment.sums and not (self._bias_is_weight(node) and self._has_rows(node, found)):
                continue
            return found
        return None

    def _bias_is_weight(self, node: Node) -> bool:
        """Whether what a linear adds to a partial sum can be on one rank alone."""
        bias = node.operand(2) if node.op == "linear" else None
        return bias is None or (bias in self._slots and len(self._uses[bias]) == 1)

    def _has_rows(self, node: Node, found: Chosen) -> bool:
        """Whether the weights that are multiplied with parts split as well: codes may not."""
        for place, member in found.alignment.operands.items():
            value = node.inputs[place]
            if value in self._slots:
                try:
                    self.may_split(self._slots[value], found.base.times(member))
                except ValueError:
                    return False
        return True

    def _apply(self, node: Node, found: Chosen, waiting: list[Value]) -> None:
        if node in self.chosen:
            return
        self.chosen[node] = found
        for place, member in found.alignment.operands.items():
            value = node.inputs[place]
            if value is not None:
                self._take(value, found.base.times(member), waiting)
        for place, member in found.alignment.results.items():
            self._take(node.outputs[place], found.base.times(member), waiting)
