"""A function of a printed program, read statement by statement."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from graphopt.errors import ParseError
from graphopt.ir.graph import Cache, Function, In, Node, Value, unique_name
from graphopt.ir.ops import all_ops
from graphopt.ir.scan import Line, Token
from graphopt.ir.types import Type

_Place: TypeAlias = tuple[Line, Token, str]
"""A name in the text, with where it stands."""

_CacheNames: TypeAlias = tuple[str, list[Value], list[_Place]]
"""A cache slot, what is read from it, and the names of what is left in it."""

_MOST_OPERANDS = 1000
"""The largest number of operands of an op that takes any number of them."""


class ParsedFunction:
    """A function whose weight slots are known by the names that its text has for them.

    Args:
        function: Its weights are by those names.
        exact: Those of them that are whole names of slots.

    Attributes:
        cache_slots: The slots of its caches.
    """

    def __init__(self, function: Function, exact: Collection[str]) -> None:
        self._function = function
        self._exact = exact
        self._slots: dict[str, str] = {}
        self._unread: dict[str, None] = {}
        self.cache_slots = [cache.slot for cache in function.caches]

    @property
    def name(self) -> str:
        return self._function.name

    def candidates(self) -> list[str]:
        """Return what its slots may be called."""
        return [slot for text in self._function.weights for slot in (text, f"{text}.weight")]

    def resolve_slots(self, given: Mapping[str, str], known: Collection[str]) -> list[str]:
        """Return the slots that a call has weights for.

        Args:
            given: The weights that the call names, by slot.
            known: Those of `candidates` for which the call has a weight without naming it.
        """
        for text in self._function.weights:
            longer = f"{text}.weight"
            if text not in self._slots or self._slots[text] == text:
                whole = text in self._exact or not (longer in given or longer in known)
                self._slots[text] = text if whole else longer
        slots = list(self._slots.values())
        for slot in given:
            if slot not in slots:
                self._unread[slot] = None
        return [*slots, *self._unread]

    def finished(self) -> Function:
        """Return the function with the whole names of its slots."""
        function = self._function
        function.weights = {
            self._slots.get(text, text): value for text, value in function.weights.items()
        }
        names = function.value_names()
        for slot in self._unread:
            name = unique_name(_identifier(slot), names)
            names.add(name)
            function.weights[slot] = Value(name)
        return function


def _identifier(slot: str) -> str:
    return re.sub(r"\W", "_", slot)


class FunctionParser:
    """Reads one function.

    Args:
        head: The line `def NAME(PARAMETERS; CACHES):`.
        body: The lines behind it, with their numbers.
    """

    def __init__(self, head: Line, body: list[tuple[int, str]]) -> None:
        self._head = head
        self._body = body
        self._function = Function("")
        self._values: dict[str, Value] = {}
        self._exact: set[str] = set()
        self._written_inside: list[Value] = []

    def parse(self) -> ParsedFunction:
        """Return the function.

        Raises:
            ParseError: With the place and what is expected there.
        """
        presents = self._signature()
        if not self._body:
            raise ParseError(self._head.number + 1, 5, "statements", "none")
        *statements, end = (Line(number, text) for number, text in self._body)
        for line in statements:
            self._statement(line)
        end.expect("return")
        self._function.results = end.separated(lambda: self._reference(end))
        end.end()
        for slot, (past_k, past_v, *past_state), names in presents:
            present_k, present_v, *present_state = map(self._made, names)
            self._function.caches.append(
                Cache(slot, past_k, past_v, present_k, present_v, past_state, present_state)
            )
        self._name_the_rest()
        return ParsedFunction(self._function, self._exact)

    def _name_the_rest(self) -> None:
        """Name slots and what has no line of its own, by names that the text leaves free."""
        taken = set(self._values)
        for text, value in self._function.weights.items():
            value.name = unique_name(_identifier(text), taken)
            taken.add(value.name)
        for value in self._written_inside:
            assert value.node is not None
            op = value.node.op
            value.name = unique_name(op.split(".")[1] if "." in op else op, taken)
            taken.add(value.name)

    def _signature(self) -> list[_CacheNames]:
        line = self._head
        line.expect("def")
        self._function.name = line.named("the name of a function")
        line.expect("(")

        def parameter() -> Value:
            return self._define(line, line.next, line.value_name("the name of a parameter"))

        self._function.params = line.separated(parameter, ";", ")")
        presents: list[_CacheNames] = []
        while line.accept(";"):
            slot = line.named("a cache slot")
            line.expect(":")
            pasts = [parameter()]
            while len(pasts) < 2 or line.at(","):
                line.expect(",")
                pasts.append(parameter())
            line.expect("->")
            made: list[_Place] = []
            for number in range(len(pasts)):
                if number:
                    line.expect(",")
                start = line.next
                made.append((line, start, line.value_name("a value that the function makes")))
            presents.append((slot, pasts, made))
        line.expect(")", ":")
        line.end()
        return presents

    def _define(self, line: Line, start: Token, name: str, node: Node | None = None) -> Value:
        if name in self._values:
            raise line.fail("a value of another name", start)
        value = self._values[name] = Value(name, node, len(node.outputs) if node else 0)
        return value

    def _made(self, place: _Place) -> Value:
        line, start, name = place
        if name not in self._values:
            raise line.fail("a value that the function makes", start)
        return self._values[name]

    def _statement(self, line: Line) -> None:
        types: list[Type | None] = []

        def target() -> tuple[Token, str]:
            start, name = line.next, line.value_name("the name of a value")
            types.append(line.type() if line.accept(":") else None)
            return start, name

        targets = line.separated(target, "=")
        if not targets:
            raise line.fail("the name of a value")
        line.expect("=")
        start = line.next
        value = self._sum(line)
        line.end()
        node = value.node
        if node is None or value not in self._written_inside:
            raise line.fail("an operation, and not a value alone", start)
        self._written_inside.remove(value)
        node.outputs = []
        for first, name in targets:
            node.outputs.append(self._define(line, first, name, node))
        kinds = [kind for kind in types if kind is not None]
        if kinds:
            if len(kinds) < len(types) or "." not in node.op:
                raise line.fail("a type of every result, of an operator of torch alone", start)
            node.attrs["types"] = kinds

    # --- expressions ---

    def _sum(self, line: Line) -> Value:
        left = self._product(line)
        while line.accept("+"):
            left = self._node("add", [left, self._product(line)], {})
        return left

    def _product(self, line: Line) -> Value:
        left = self._factor(line)
        while line.accept("*"):
            left = self._node("mul", [left, self._factor(line)], {})
        return left

    def _factor(self, line: Line) -> Value:
        if line.accept("("):
            inner = self._sum(line)
            line.expect(")")
            return inner
        if line.next.kind == "name" and line.at("(", ahead=1):
            return self._operation(line)
        return self._reference(line)

    def _reference(self, line: Line) -> Value:
        """Take the name of a value, or of a weight slot, which every other name is."""
        if line.accept("@"):
            slot = line.string("the name of a weight slot")
            self._exact.add(slot)
            return self._function.weights.setdefault(slot, Value(slot))
        start = line.next
        if line.at("%"):
            name = line.value_name("the name of a value")
            if name not in self._values:
                raise line.fail("a value that is made above", start)
            return self._values[name]
        if start.kind != "name":
            raise line.fail("a value")
        text = line.take().text
        if text in self._values:
            return self._values[text]
        return self._function.weights.setdefault(text, Value(text))

    def _node(self, op: str, inputs: list[Value | None], attrs: dict[str, Any]) -> Value:
        node = Node(op, inputs, attrs)
        value = Value("", node)
        node.outputs.append(value)
        self._function.nodes.append(node)
        self._written_inside.append(value)
        return value

    def _operation(self, line: Line) -> Value:
        token = line.take()
        if "." in token.text:
            return self._torch_operation(line, token)
        ops = all_ops()
        if token.text not in ops or token.text == "aten":
            raise line.fail("an op or a value", token)
        op = ops[token.text]
        many = any(name.endswith("*") for name in op.operands)
        count = len(op.operands) + (_MOST_OPERANDS if many else 0)
        places = {op.operand_name(place): place for place in range(count)}
        inputs: list[Value | None] = []
        attrs: dict[str, Any] = {}

        def argument() -> None:
            start = line.next
            named = start.kind == "name" and line.at("=", ahead=1)
            if named and start.text in places:
                line.take()
                line.expect("=")
                place = places[start.text]
                if place < len(inputs):
                    raise line.fail("an operand that is not given yet", start)
                inputs.extend([None] * (place - len(inputs)))
                inputs.append(self._sum(line))
            elif named:
                key = line.take().text
                if key in attrs:
                    raise line.fail("another attribute", start)
                line.expect("=")
                attrs[key] = line.literal()
            elif (
                start.text in op.attributes
                and start.text not in self._values
                and line.at(",", ")", ahead=1)
            ):
                attrs[line.take().text] = True
            elif attrs or len(inputs) >= len(places):
                raise line.fail(f"an attribute of {token.text}, or ')'")
            else:
                inputs.append(self._sum(line))

        line.expect("(")
        line.separated(argument, ")")
        line.expect(")")
        return self._node(token.text, inputs, attrs)

    def _torch_operation(self, line: Line, token: Token) -> Value:
        words = token.text.split(".")
        if len(words) not in (2, 3):
            raise line.fail("an operator such as aten.cat", token)
        inputs: list[Value | None] = []
        args: list[Any] = []
        kwargs: dict[str, Any] = {}

        def reference() -> In:
            value = self._factor(line)
            if value not in inputs:
                inputs.append(value)
            return In(inputs.index(value))

        def argument() -> None:
            start = line.next
            if start.kind == "name" and line.at("=", ahead=1):
                line.take()
                line.expect("=")
                kwargs[start.text] = line.literal(reference)
            elif kwargs:
                raise line.fail("an argument by its name, or ')'")
            else:
                args.append(line.literal(reference))

        line.expect("(")
        line.separated(argument, ")")
        line.expect(")")
        op = ".".join(words) if len(words) == 3 else f"{token.text}.default"
        return self._node(op, inputs, {"args": args, "kwargs": kwargs})
