"""Programs from their text: what `graphopt.ir.printer` writes, read back.

The text has all of a program but the values of its weights, and the names of values that it writes
where they are read; those get names by their ops. docs/ir.md has the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from graphopt.errors import ParseError
from graphopt.ir.function_parser import FunctionParser, ParsedFunction
from graphopt.ir.graph import Call, KVLayout, KVState, Program
from graphopt.ir.printer import default_weight
from graphopt.ir.scan import Line
from graphopt.ir.text import unfold
from graphopt.ir.types import DTYPES, Type
from graphopt.ir.weights import Array, Dequantised, Missing, Producer, Weight

_Lines = list[tuple[int, str]]


def parse_program(text: str, values: Mapping[str, Tensor] | None = None) -> Program:
    """Return the program that a text says.

    Nothing is inferred or verified: a text may say a malformed program.

    Args:
        text: As `print_program` writes it; comments are skipped.
        values: Values of weights, by the names of the tensors that they are stored as. The others
            have none.

    Raises:
        ParseError: With the line, the column, and what is expected there.
    """
    return _Parser(text, values or {}).program()


class _Parser:
    def __init__(self, text: str, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.result = Program("")
        self.functions: dict[str, ParsedFunction] = {}
        self.end = text.count("\n") + 1
        self.sections = _sections(text)

    def program(self) -> Program:
        """Return the program: weights and states first, which the calls name."""
        if not self.sections:
            raise ParseError(1, 1, "a program", "an empty text")
        for head, body in self.sections:
            line = Line(*head)
            if line.at("def"):
                function = FunctionParser(line, body).parse()
                if function.name in self.functions:
                    raise ParseError(head[0], 5, "a function of another name", function.name)
                self.functions[function.name] = function
        readers: dict[str, Callable[[Line], None]] = {
            "states": self._state, "weights": self._weight, "notes": self._note,
        }  # fmt: skip
        run: tuple[Line, _Lines] | None = None
        for place, (head, body) in enumerate(self.sections):
            line = Line(*head)
            word = line.next.text
            if place == 0:
                line.expect("program")
                self.result.name = line.named("the name of the program")
                line.end()
                continue
            if word == "run" and run is None:
                run = line, body
            elif word in readers:
                self._header(line, word)
                for item in _unfolded(body):
                    entry = Line(*item)
                    readers[word](entry)
                    entry.end()
            elif word == "facts":
                self._header(line, word)
                for number, fact in body:
                    self._fact(number, fact)
            elif word != "def":
                raise line.fail("def, run, states, weights, notes or facts, each once")
        if run is None:
            raise ParseError(self.end, 1, "run(...), which calls the functions", "the end")
        self._run(*run)
        for name, function in self.functions.items():
            self.result.functions[name] = function.finished()
        return self.result

    @staticmethod
    def _header(line: Line, word: str) -> None:
        line.expect(word, ":")
        line.end()

    # --- sections ---

    def _state(self, line: Line) -> None:
        name = line.named("the name of a state")
        line.expect(":")
        start = line.next
        if start.text not in DTYPES:
            raise line.fail("a dtype")
        dtype = DTYPES[line.take().text]
        sizes: list[int] = []
        for size in ("heads", "k_dim", "v_dim"):
            line.expect(size, "=")
            sizes.append(line.whole(f"the number for {size}"))
        heads, k_dim, v_dim = sizes
        state = KVState(name, heads, k_dim, v_dim, dtype, self._layout(line))
        if line.at("policy"):
            state.policy = line.policy()
            line.expect("query_heads", "=")
            state.query_heads = line.whole("the number of query heads")
        state.placement = line.placement()
        state.host = line.host_share()
        self.result.states[name] = state

    @staticmethod
    def _layout(line: Line) -> KVLayout:
        start = line.next
        word = {"ring": "slots", "paged": "page"}.get(start.text)
        try:
            if word is None:
                line.expect("contiguous")
                return KVLayout()
            line.take()
            line.expect("(", word, "=")
            size = line.whole(word)
            line.expect(")")
            return KVLayout(start.text, size)  # type: ignore[arg-type]
        except ValueError as error:
            raise line.fail(f"a layout ({error})", start) from error

    def _weight(self, line: Line) -> None:
        start = line.next
        name = line.named("the name of a weight")
        line.expect(":")
        place = line.next
        producer = self._producer(name, line.type(), lambda why: line.fail(why, place))
        constant = line.accept("constant")
        checkpoint = None if constant else name
        if line.accept("from"):
            plain_none = line.accept("None")
            checkpoint = None if plain_none else line.named("the name of a checkpoint tensor")
        if name in self.result.weights:
            raise line.fail("a weight of another name", start)
        self.result.weights.add(Weight(name, producer, checkpoint, constant, line.placement()))

    def _producer(self, name: str, kind: Type, fail: Callable[[str], ParseError]) -> Producer:
        """Return where a weight's value comes from: what was given, or nowhere."""
        shape = tuple(size for size in kind.shape if isinstance(size, int))
        if len(shape) < len(kind.shape):
            raise fail("a shape of whole numbers")
        if kind.encoding is None:
            if name in self.values:
                return Array(self.values[name])
            return Missing(shape, kind.dtype, name)
        try:
            tensors = kind.encoding.stored(shape, kind.dtype)
        except ValueError as error:
            raise fail(f"a matrix that is packed so ({error})") from error
        parts: dict[str, Producer] = {}
        for suffix, (size, dtype) in tensors.items():
            full = f"{name}.{suffix}"
            given = self.values.get(full)
            parts[suffix] = Missing(size, dtype, full) if given is None else Array(given)
        return Dequantised(kind.encoding, **parts)

    def _note(self, line: Line) -> None:
        where = line.string("a quoted place")
        line.expect(":")
        self.result.notes.append((where, line.string("a quoted reason")))

    def _fact(self, number: int, text: str) -> None:
        line = Line(number, re.sub(r"=.*", "=", text))
        name = line.named("source, dtype, licence, max_length, config or generation")
        line.expect("=")
        place = text.index("=") + 1
        try:
            value: Any = text[place:].strip() if name == "dtype" else json.loads(text[place:])
        except ValueError as error:
            raise ParseError(number, place + 2, "JSON", repr(text[place:].strip()[:40])) from error
        wanted = {"source": str, "dtype": str, "licence": str, "max_length": int, "config": dict,
                  "generation": dict}  # fmt: skip
        if name not in wanted or type(value) is not wanted[name]:
            raise ParseError(number, 5, f"one of {', '.join(wanted)}, with its kind of value", name)
        if name != "dtype":
            setattr(self.result, name, value)
        elif isinstance(value, str) and value in DTYPES:
            self.result.checkpoint_dtype = DTYPES[value]
        else:
            raise ParseError(number, place + 2, "a dtype", repr(value))

    # --- calls ---

    def _run(self, line: Line, body: _Lines) -> None:
        def item() -> tuple[str, Type]:
            name = line.value_name("the name of an input")
            line.expect(":")
            return name, line.type()

        line.expect("run", "(")
        self.result.inputs = dict(line.separated(item, ")"))
        line.expect(")", ":")
        line.end()
        rows = _unfolded(body)
        if not rows or not Line(*rows[-1]).at("return"):
            raise ParseError(rows[-1][0] if rows else line.number, 5, "a last line return ...",
                             "none")  # fmt: skip
        for row in rows[:-1]:
            self._call(Line(*row))
        last = Line(*rows[-1])
        last.expect("return")
        self.result.outputs = last.separated(lambda: last.value_name("the name of an output"))
        last.end()

    def _call(self, line: Line) -> None:
        results: list[str] = []
        if not (line.at("(", "[", ahead=1) or line.next.kind == "string"):
            results = line.separated(lambda: line.value_name("the name of a result"), "=")
            line.expect("=")
        start = line.next
        name = line.named("the name of a function")
        if name not in self.functions:
            raise line.fail("the name of a function that is defined here", start)
        function = self.functions[name]
        attrs: dict[str, Any] = {}
        if line.accept("["):

            def attribute() -> tuple[str, Any]:
                key = line.named("the name of an attribute")
                line.expect("=")
                return key, line.literal()

            attrs = dict(line.separated(attribute, "]"))
            line.expect("]")
        line.expect("(")
        args = line.separated(lambda: line.value_name("the name of a value"), ";", ")")
        given: dict[str, str] = {}
        if line.accept(";"):

            def mapping() -> tuple[str, str]:
                slot = line.named("a slot")
                line.expect("=")
                return slot, line.named("the name of a weight or state")

            given = dict(line.separated(mapping, ")"))
        line.expect(")")
        path = line.named("a path") if line.accept("at") else ""
        placement = line.placement()
        line.end()
        caches = {slot: given.pop(slot) for slot in function.cache_slots if slot in given}
        named = {slot: default_weight(self.result, path, slot) for slot in function.candidates()}
        slots = function.resolve_slots(given, {slot for slot, weight in named.items() if weight})
        weights = {slot: given.get(slot) or named.get(slot) or slot for slot in slots}
        self.result.calls.append(Call(name, args, results, weights, attrs, caches, path, placement))


def _sections(text: str) -> list[tuple[tuple[int, str], _Lines]]:
    """Return the first line of every section, and the lines that are set in behind it."""
    found: list[tuple[tuple[int, str], _Lines]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        if not line.startswith(" "):
            found.append(((number, line), []))
        elif not found:
            raise ParseError(number, 1, "program NAME", "a line that is set in")
        else:
            found[-1][1].append((number, line))
    return found


def _unfolded(body: _Lines) -> _Lines:
    try:
        return unfold(body)
    except ValueError as error:
        expected, number = error.args
        raise ParseError(number, 5, expected, "another loop") from error
