"""The program as Python a person reads in one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from graphopt.ir.graph import Call, Function, In, Node, Param, Program, Value
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.shapes import infer_function, infer_program
from graphopt.ir.types import DTYPE_NAMES, Type
from graphopt.support.plain import plain_line

_WIDTH = 88
_INFIX = {"add": "+", "mul": "*"}


def format_count(count: int) -> str:
    """Return `count` as 134.5M and the like."""
    for limit, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        # Whatever rounds to 1.0 of a unit is written in it.
        if round(count / limit, 1) >= 1.0 and count >= 1000:
            return f"{count / limit:.1f}{suffix}"
    return str(count)


def format_attr(value: Any) -> str:
    """Return an attribute as it is printed."""
    if isinstance(value, Param):
        return value.name
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, sympy.Expr):
        return str(value).replace(" ", "")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_attr(item) for item in value) + "]"
    return str(value)


class FunctionPrinter:
    """Prints one function; values used once are written where they are used.

    Attributes:
        inline_width: An expression longer than this gets a line of its own.
    """

    inline_width = _WIDTH // 2

    def __init__(self, function: Function, types: Mapping[Value, Type] | None = None) -> None:
        self.function = function
        self.types = types or {}
        self._uses = function.uses()
        self._outside = function.outside_values()
        self._inline: dict[Value, str] = {}
        self._slots = {value: slot for slot, value in function.weights.items()}

    def name(self, value: Value) -> str:
        """Return how a value is written where it is read."""
        if value in self._inline:
            return self._inline[value]
        slot = self._slots.get(value)
        return value.name if slot is None else slot.removesuffix(".weight")

    def target(self, value: Value) -> str:
        """Return how a value is written where it is assigned."""
        return value.name

    def expression(self, node: Node) -> str:
        """Return the right-hand side of a node."""
        if node.op in _INFIX:
            left, right = (self._grouped(value, node.op) for value in node.inputs)
            return f"{left} {_INFIX[node.op]} {right}"
        if is_aten(node.op):
            return self._aten(node)
        op = get_op(node.op)
        parts: list[str] = []
        by_name = False
        for index, value in enumerate(node.inputs):
            if value is None:
                by_name = True
                continue
            text = self.name(value)
            parts.append(f"{op.operand_name(index)}={text}" if by_name else text)
        for key, attr in node.attrs.items():
            if key in op.defaults and op.defaults[key] == attr:
                continue
            if attr is True:
                parts.append(key)
            else:
                parts.append(f"{key}={format_attr(attr)}")
        return f"{node.op}({', '.join(parts)})"

    def _grouped(self, value: Value | None, op: str) -> str:
        assert value is not None
        text = self.name(value)
        inner = value.node.op if value in self._inline and value.node is not None else None
        return f"({text})" if inner == "add" and op == "mul" else text

    def _aten(self, node: Node) -> str:
        def change(leaf: Any) -> Any:
            if isinstance(leaf, In):
                value = node.inputs[leaf.index]
                return "None" if value is None else self.name(value)
            return format_attr(leaf)

        args = [format_attr(map_leaves(arg, change)) for arg in node.attrs["args"]]
        kwargs = node.attrs.get("kwargs", {})
        named = [f"{k}={format_attr(map_leaves(v, change))}" for k, v in kwargs.items()]
        return f"{node.op.removesuffix('.default')}({', '.join(args + named)})"

    def lines(self) -> list[tuple[str, str]]:
        """Return (statement, type comment) for every printed statement."""
        result: list[tuple[str, str]] = []
        for node in self.function.nodes:
            text = self.expression(node)
            targets = ", ".join(self.target(value) for value in node.outputs)
            if len(node.outputs) == 1 and self._may_inline(node, text):
                self._inline[node.output] = text
                continue
            comment = ", ".join(
                str(self.types[value]) for value in node.outputs if value in self.types
            )
            result.append((f"{targets} = {text}", comment))
        return result

    def _may_inline(self, node: Node, text: str) -> bool:
        value = node.output
        uses = self._uses[value]
        if len(uses) != 1 or value in self._outside or len(text) > self.inline_width:
            return False
        user = uses[0][0]
        # Norms, attention and sums into the residual stream are the landmarks of a block.
        return node.op not in ("attention", "rms_norm", "layer_norm", "add") or user.op == "linear"


def print_function(function: Function, types: Mapping[Value, Type] | None = None) -> str:
    """Return one function as text, a line a statement."""
    params = ", ".join(value.name for value in function.params)
    results = ", ".join(value.name for value in function.results)
    body = [f"    {text}" for text, _ in FunctionPrinter(function, types).lines()]
    return "\n".join([f"def {function.name}({params}):", *body, f"    return {results}"])


def print_program(program: Program) -> str:
    """Return the whole program as text: a header, then each function once with its types."""
    blocks = [call for call in program.calls if _is_layer(program, call)]
    distinct = {call.function for call in blocks}
    header = f"program  {program.name}   {format_count(program.parameter_count())} params"
    if blocks:
        header += f"   {len(blocks)} blocks, {len(distinct)} distinct"
    lines = [header]
    printed: set[str] = set()
    _, carried = infer_program(program)
    for call in program.calls:
        if call.function in printed:
            continue
        printed.add(call.function)
        function = program.functions[call.function]
        calls = [other for other in program.calls if other.function == call.function]
        types = infer_function(function, call, [carried[a] for a in call.args], program)
        rows = FunctionPrinter(function, types).lines()
        label = call.function
        for index, (text, comment) in enumerate(rows):
            notes = [comment] if comment else []
            if index == 0 and len(calls) > 1:
                notes.insert(0, f"x{len(calls)}")
            prefix = f"{label if index == 0 else '':8s} {text}"
            lines.append(f"{prefix:{_WIDTH}s} # {'  '.join(notes)}" if notes else prefix)
        lines.extend(_annotation_lines(function))
        lines.extend(_param_lines(calls))
    for where, reason in program.notes:
        lines.append(f"note     {where}: {reason}")
    return "\n".join(map(plain_line, lines))


def _annotation_lines(function: Function) -> list[str]:
    """Return a comment for every line of the nodes' annotations, under the node's first output."""
    return [
        f"{'':8s} # {node.outputs[0].name} {name}: {line}"
        for node in function.nodes
        for name, annotation in node.annotations.items()
        for line in str(annotation).splitlines()
    ]


def _param_lines(calls: list[Call]) -> list[str]:
    """Return a line for every call attribute that is not the same everywhere."""
    lines: list[str] = []
    for name in sorted({key for call in calls for key in call.attrs}):
        values = [call.attrs.get(name) for call in calls]
        texts = [format_attr(value) for value in values]
        if len(set(texts)) == 1:
            lines.append(f"{'':8s}   {name} = {texts[0]}")
        else:
            lines.append(f"{'':8s}   {name} = {_runs(texts)}")
    return lines


def _runs(texts: list[str]) -> str:
    """Return a list with repeats written as `value x count`."""
    runs: list[tuple[str, int]] = []
    for text in texts:
        if runs and runs[-1][0] == text:
            runs[-1] = (text, runs[-1][1] + 1)
        else:
            runs.append((text, 1))
    return ", ".join(text if count == 1 else f"{text} x{count}" for text, count in runs)


def _is_layer(program: Program, call: Call) -> bool:
    return call.function not in ("embed", "head", "main", "glue")
