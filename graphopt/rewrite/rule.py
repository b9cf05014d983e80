"""What a rule is: it looks at a node and gives a match, or the reason and the node why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from graphopt.ir.graph import Call, Function, Node, Param, Value
from graphopt.ir.ops import get_op
from graphopt.ir.types import Type

VARIES = object()
"""What `uniform_attribute` returns where the calls differ."""


def uniform_attribute(node: Node, key: str, calls: Iterable[Call]) -> Any:
    """Return attribute `key` of `node` if it is the same in all calls, else `VARIES`.

    An attribute that the node does not carry has its op's default.
    """
    value = node.attrs.get(key, get_op(node.op).defaults.get(key))
    if not isinstance(value, Param):
        return value
    values = [call.attrs[value.name] for call in calls]
    same = values and all(other == values[0] for other in values)
    return values[0] if same else VARIES


@dataclass(frozen=True)
class NoMatch:
    """A rule does not apply.

    Attributes:
        reason: Why, as a clause.
        node: Where it ends: the node the rule looked at, or one that it reached from there.
    """

    reason: str
    node: Node


@dataclass(frozen=True)
class Match:
    """A rule applies.

    Attributes:
        rewrite: Changes the function in place. What it makes unread is removed by the driver.
    """

    rewrite: Callable[[], None]


Outcome: TypeAlias = Match | NoMatch


@dataclass
class Site:
    """A node that a rule looks at, and what is known about its function.

    Attributes:
        calls: The calls of the function.
        types: For each distinct kind of call, the types of the function's values.
        order: Rank of every value: parameters, node outputs as they are made, then weights.
        uses: For every value, the (node, operand index) places that read it.
        outside: What is read after the function's end.
    """

    node: Node
    function: Function
    calls: Sequence[Call] = ()
    types: Sequence[dict[Value, Type]] = ()
    order: dict[Value, int] = field(default_factory=dict)
    uses: dict[Value, list[tuple[Node, int]]] = field(default_factory=dict)
    outside: set[Value] = field(default_factory=set)

    # Questions ------------------------------------------------------------------------------------

    def operand(self, index: int, node: Node | None = None) -> Value | None:
        """Return an operand; None where it is absent."""
        return (node or self.node).operand(index)

    def maker(self, index: int, *ops: str, node: Node | None = None) -> Node | None:
        """Return the node that makes an operand, if its op is one of `ops`."""
        value = self.operand(index, node)
        if value is None or value.node is None or value.node.op not in ops:
            return None
        return value.node

    def attr(self, key: str, node: Node | None = None) -> Any:
        """Return an attribute if it is the same in all calls, else `VARIES`."""
        return uniform_attribute(node or self.node, key, self.calls)

    def same_type(self, a: Value, b: Value) -> bool:
        """Return whether two values have one type in every call."""
        return all(types[a] == types[b] for types in self.types)

    def only_reader(self, value: Value) -> Node | None:
        """Return the node that alone reads a value; None where several do, or the outside."""
        readers = self.uses[value]
        return readers[0][0] if len(readers) == 1 and value not in self.outside else None

    def is_weight(self, value: Value | None) -> bool:
        """Return whether a value is a weight of the function."""
        return value in self.function.weights.values()

    # Answers --------------------------------------------------------------------------------------

    def no(self, reason: str, node: Node | None = None) -> NoMatch:
        """Return that the rule does not apply, because of this node or another."""
        return NoMatch(reason, node or self.node)

    def forward(self, value: Value | None) -> Match:
        """Return the match that makes readers of the node read `value` instead."""
        assert value is not None
        return Match(lambda: self.function.replace(self.node.output, value))

    def change(
        self, op: str, inputs: Iterable[Value | None], attrs: dict[str, Any] | None = None
    ) -> Match:
        """Return the match that makes the node another operation, its outputs as they are."""
        given, own = list(inputs), dict(attrs or {})

        def rewrite() -> None:
            self.node.op, self.node.inputs, self.node.attrs = op, given, own

        return Match(rewrite)

    def join(
        self,
        nodes: Sequence[Node],
        op: str,
        inputs: Iterable[Value | None],
        attrs: dict[str, Any],
        *,
        before: Node,
        outputs: Sequence[Value | None] | None = None,
    ) -> Match:
        """Return the match that makes one node of several.

        Args:
            nodes: They go.
            before: The node in whose place the new one stands.
            outputs: Its outputs, in their order; None among them for one that nothing reads. By
                default all of `nodes`, in order.
        """
        given = list(inputs)

        def rewrite() -> None:
            function = self.function
            new = function.add(op, given, attrs, before=before)
            made = [value for node in nodes for value in node.outputs]
            kept = made if outputs is None else outputs
            new.outputs = [new.output if value is None else value for value in kept]
            for index, value in enumerate(new.outputs):
                value.node, value.index = new, index
            function.nodes = [node for node in function.nodes if node not in nodes]

        return Match(rewrite)


@dataclass(frozen=True)
class Rule:
    """A way to rewrite a node and what it hangs together with.

    Attributes:
        name: What reports and messages call it.
        ops: The ops of the nodes that it looks at; empty for any.
        match: Looks at a node and changes nothing.
    """

    name: str
    ops: frozenset[str]
    match: Callable[[Site], Outcome]

    def __call__(self, site: Site) -> Outcome:
        return self.match(site)


def rule(*ops: str) -> Callable[[Callable[[Site], Outcome]], Rule]:
    """Function decorator: make a rule of a function, under the function's name.

    Args:
        ops: The ops of the nodes that it looks at; none for any.
    """

    def made(match: Callable[[Site], Outcome]) -> Rule:
        return Rule(match.__name__, frozenset(ops), match)

    return made
