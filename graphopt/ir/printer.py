"""The program as Python a person reads in one screen, complete but for the values of weights.

The functions come first, each once, then the calls, and behind them states, weights and facts.
`graphopt.ir.parse` reads the text back; docs/ir.md has its grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from graphopt.errors import VerifyError
from graphopt.ir.graph import Call, Function, In, Node, Program, Value
from graphopt.ir.kv import KVState
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.shapes import infer_function, infer_program
from graphopt.ir.text import fold, format_attr, name_text, policy_text, quoted, value_text
from graphopt.ir.types import DTYPE_NAMES, Type
from graphopt.ir.weights import Weight
from graphopt.support.plain import plain_line

_WIDTH = 88
_INFIX = {"add": "+", "mul": "*"}
_LANDMARKS = ("attention", "policy_attention", "rms_norm", "layer_norm", "add")


def format_count(count: int) -> str:
    """Return `count` as 134.5M and the like."""
    for limit, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        # Whatever rounds to 1.0 of a unit is written in it.
        if round(count / limit, 1) >= 1.0 and count >= 1000:
            return f"{count / limit:.1f}{suffix}"
    return str(count)


def operands_in_text(node: Node) -> list[Value]:
    """Return the operands of a node in the order in which its text names them, with repeats."""
    if not is_aten(node.op):
        return [value for value in node.inputs if value is not None]
    named: list[Value] = []

    def look(leaf: Any) -> Any:
        value = node.inputs[leaf.index] if isinstance(leaf, In) else None
        if value is not None:
            named.append(value)
        return leaf

    map_leaves([node.attrs["args"], node.attrs.get("kwargs", {})], look)
    return named


class FunctionPrinter:
    """Prints one function; values used once are written where they are used.

    Attributes:
        inline_width: An expression longer than this gets a line of its own.
        keeps_order: Only what stands in front of its reader is written there, so that the text
            has the nodes in their order.
    """

    inline_width = _WIDTH // 2
    keeps_order = True

    def __init__(self, function: Function, types: Mapping[Value, Type] | None = None) -> None:
        self.function = function
        self.types = types or {}
        self._uses = function.uses()
        self._outside = function.outside_values()
        self._inline: dict[Value, str] = {}
        self._moved: set[Value] = set()
        self._slots = {
            value: _slot_texts(slot, function)[0] for slot, value in function.weights.items()
        }

    def name(self, value: Value) -> str:
        """Return how a value is written where it is read."""
        if value in self._inline:
            return self._inline[value]
        return self._slots.get(value) or value_text(value.name)

    def target(self, value: Value) -> str:
        """Return how a value is written where it is assigned."""
        types = value.node.attrs.get("types") if value.node and is_aten(value.node.op) else None
        text = value_text(value.name)
        return text if types is None else f"{text}: {types[value.index]}"

    def expression(self, node: Node) -> str:
        """Return the right-hand side of a node."""
        if node.op in _INFIX and not node.attrs and len(node.inputs) == 2:
            left, right = node.inputs
            return f"{self._grouped(left, node.op)} {_INFIX[node.op]} " + self._grouped(
                right, node.op, right=True
            )
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
            if text in op.attributes:  # which it would stand for
                slot = {v: s for s, v in self.function.weights.items()}.get(value)
                text = f"%{quoted(value.name)}" if slot is None else f"@{quoted(slot)}"
            parts.append(f"{op.operand_name(index)}={text}" if by_name else text)
        for key, attr in node.attrs.items():
            if key in op.defaults and op.defaults[key] == attr:
                continue
            if attr is True and key in op.attributes:
                parts.append(key)
            else:
                parts.append(f"{key}={format_attr(attr)}")
        return f"{node.op}({', '.join(parts)})"

    def _grouped(self, value: Value | None, op: str, *, right: bool = False) -> str:
        assert value is not None
        text = self.name(value)
        inner = value.node.op if value in self._inline and value.node is not None else None
        loose = inner == "add" and op == "mul"
        return f"({text})" if loose or (right and inner in _INFIX) else text

    def _aten(self, node: Node) -> str:
        def change(leaf: Any) -> str:
            if isinstance(leaf, In):
                value = node.inputs[leaf.index]
                return "None" if value is None else self.name(value)
            return format_attr(leaf)

        def text(item: Any) -> str:
            if isinstance(item, list):
                return f"[{', '.join(map(text, item))}]"
            if isinstance(item, tuple):
                return f"({', '.join(map(text, item))}{',' if len(item) == 1 else ''})"
            return change(item)

        args = [text(arg) for arg in node.attrs["args"]]
        named = [f"{key}={text(item)}" for key, item in node.attrs.get("kwargs", {}).items()]
        return f"{node.op.removesuffix('.default')}({', '.join(args + named)})"

    def lines(self) -> list[tuple[str, str]]:
        """Return (statement, type comment) for every printed statement."""
        while True:
            self._inline = {}
            moved = len(self._moved)
            result = self._lines()
            if not self._avoid_names() and len(self._moved) == moved:
                return result

    def targets(self, node: Node) -> list[str]:
        """Return what a node's outputs are assigned to."""
        return [self.target(value) for value in node.outputs]

    def _avoid_names(self) -> bool:
        """Lengthen the texts of slots that are also names of values; return whether some were."""
        own = set(self.function.weights.values())
        shown = {
            value_text(value.name)
            for value in self.function.values()
            if value not in self._inline and value not in own
        }
        changed = False
        for slot, value in self.function.weights.items():
            texts = _slot_texts(slot, self.function)
            text = next(text for text in texts if text not in shown)
            changed |= texts.index(text) > texts.index(self._slots[value])
            self._slots[value] = max(text, self._slots[value], key=texts.index)
        return changed

    def _lines(self) -> list[tuple[str, str]]:
        """Return the statements, and note in `_moved` what they would write out of its order."""
        result: list[tuple[str, str]] = []
        waiting: list[Value] = []
        for node in self.function.nodes:
            text = self.expression(node)
            alone = len(node.outputs) == 1 and self._may_inline(node, text)
            self._take(node, waiting, last=not alone)
            if alone and node.output not in self._moved:
                self._inline[node.output] = text
                waiting.append(node.output)
                continue
            targets = ", ".join(self.targets(node))
            comment = ", ".join(
                str(self.types[value])
                for value in node.outputs
                if value in self.types and "types" not in node.attrs
            )
            result.append((f"{targets} = {text}", comment))
        return result

    def _take(self, node: Node, waiting: list[Value], *, last: bool) -> None:
        """Take what a node's text holds from the end of `waiting`, if it lies there in its order.

        Args:
            waiting: Values that are to be written where they are read, in the order of nodes.
            last: The node has a line of its own, in front of which all that waits was made.
        """
        if not self.keeps_order:
            return
        read = [value for value in operands_in_text(node) if value in self._inline]
        if read != waiting[len(waiting) - len(read) :]:
            self._moved.update(read)
        del waiting[len(waiting) - len(read) :]
        if last or node.output in self._moved:
            self._moved.update(waiting)
            waiting.clear()

    def _may_inline(self, node: Node, text: str) -> bool:
        value = node.output
        uses = self._uses[value]
        if len(uses) != 1 or value in self._outside or len(text) > self.inline_width:
            return False
        user = uses[0][0]
        if is_aten(user.op) and operands_in_text(user).count(value) != 1:
            return False
        if self.keeps_order and ("types" in node.attrs or (is_aten(user.op) and node.op in _INFIX)):
            return False
        # Norms, attention and sums into the residual stream are the landmarks of a block.
        return node.op not in _LANDMARKS or user.op == "linear"


def _slot_texts(slot: str, function: Function) -> list[str]:
    """Return how a weight slot may be written, the shortest first.

    Without `.weight` where that stands for no other slot; quoted, it stands for no value.
    """
    texts: list[str] = []
    for text in dict.fromkeys((slot.removesuffix(".weight"), slot)):
        alone = sum(other in function.weights for other in (text, f"{text}.weight")) == 1
        if alone and name_text(text) == text:
            texts.append(text)
    return [*texts, f"@{quoted(slot)}"]


def _signature(function: Function, printer: FunctionPrinter) -> str:
    params = ", ".join(value_text(value.name) for value in function.params)
    for cache in function.caches:
        past, present = (
            ", ".join(map(printer.name, values)) for values in (cache.pasts, cache.presents)
        )
        params += f"; {name_text(cache.slot)}: {past} -> {present}"
    return f"def {name_text(function.name)}({params}):"


def _function_lines(
    function: Function, types: Mapping[Value, Type] | None = None, note: str = ""
) -> list[str]:
    printer = FunctionPrinter(function, types)
    lines = [_with_comment(_signature(function, printer), note)]
    lines += [_with_comment(f"    {text}", comment) for text, comment in printer.lines()]
    results = ", ".join(map(printer.name, function.results))
    return [*lines, f"    return {results}".rstrip()]


def _with_comment(text: str, comment: str) -> str:
    return f"{text:{_WIDTH}s} # {comment}" if comment else text


def print_function(function: Function, types: Mapping[Value, Type] | None = None) -> str:
    """Return one function as text, a line a statement."""
    return "\n".join(_function_lines(function, types))


def print_program(program: Program, *, facts: bool = True) -> str:
    """Return the whole program as text.

    A program whose types do not fit is printed as well, without them and with what is wrong.

    Args:
        facts: Add where the program came from, its config and how it generates text.
    """
    lines = [_header(program)]
    called = dict.fromkeys(call.function for call in program.calls)
    names = [name for name in called if name in program.functions]
    try:
        carried = infer_program(program)[1]
    except VerifyError as error:
        lines.append(f"# {error.message}")
        carried = None
    except (KeyError, ValueError):  # a call that names what is not there
        carried = None
    for name in [*names, *(name for name in program.functions if name not in called)]:
        function = program.functions[name]
        calls = [call for call in program.calls if call.function == name]
        types: Mapping[Value, Type] | None = None
        if carried is not None and calls:
            args = [carried[arg] for arg in calls[0].args]
            types = infer_function(function, calls[0], args, program)
        note = f"x{len(calls)}" if len(calls) != 1 else ""
        lines += ["", *_function_lines(function, types, note), *_annotation_lines(function)]
    inputs = ", ".join(f"{value_text(name)}: {kind}" for name, kind in program.inputs.items())
    lines += ["", f"run({inputs}):", *fold([_call_line(program, call) for call in program.calls])]
    lines.append(f"    return {', '.join(map(value_text, program.outputs))}".rstrip())
    sections = {
        "states": fold([_state_line(state) for state in program.states.values()]),
        "weights": fold([_weight_line(weight) for weight in program.weights]),
        "notes": [f"    {quoted(where)}: {quoted(why)}" for where, why in program.notes],
        "facts": _facts(program) if facts else [],
    }
    for title, section in sections.items():
        if section:
            lines += ["", f"{title}:", *section]
    return "\n".join(map(plain_line, lines))


def _annotation_lines(function: Function) -> list[str]:
    """Return a comment for every line of the nodes' annotations, under the node's first output."""
    return [
        f"    # {node.outputs[0].name} {name}: {line}"
        for node in function.nodes
        for name, annotation in node.annotations.items()
        for line in str(annotation).splitlines()
    ]


def _header(program: Program) -> str:
    blocks = [call for call in program.calls if _is_layer(call)]
    about = f"{format_count(program.parameter_count())} params"
    if blocks:
        about += f", {len(blocks)} blocks, {len({call.function for call in blocks})} distinct"
    return f"program {name_text(program.name)}   # {about}"


def _call_line(program: Program, call: Call) -> str:
    function = program.functions.get(call.function)
    attrs = ", ".join(f"{name_text(key)}={format_attr(v)}" for key, v in sorted(call.attrs.items()))
    read = _read_slots(function) if function is not None else set()
    given = ", ".join(map(value_text, call.args))
    named = [
        f"{name_text(slot)}={name_text(name)}"
        for slot, name in sorted(call.weights.items())
        if name != default_weight(program, call.path, slot) or slot not in read
    ]
    named += [f"{name_text(slot)}={name_text(name)}" for slot, name in call.caches.items()]
    more = f"; {', '.join(named)}" if named else ""
    text = f"{name_text(call.function)}{f'[{attrs}]' if attrs else ''}({given}{more})"
    if call.results:
        text = f"{', '.join(map(value_text, call.results))} = {text}"
    if call.path:
        text += f" at {name_text(call.path)}"
    return text if call.placement is None else f"{text} {call.placement}"


def default_weight(program: Program, path: str, slot: str) -> str | None:
    """Return the weight of a slot where a call says none: called by path and slot, or by the slot.

    None where neither is there.
    """
    names = (f"{path}.{slot}" if path else slot, slot)
    return next((name for name in names if name in program.weights), None)


def _read_slots(function: Function) -> set[str]:
    """Return the weight slots that the text of a function names."""
    read = {value for node in function.nodes for value in node.inputs} | set(function.results)
    return {slot for slot, value in function.weights.items() if value in read}


def _state_line(state: KVState) -> str:
    sizes = f"heads={state.heads} k_dim={state.k_dim} v_dim={state.v_dim}"
    text = f"{name_text(state.name)}: {DTYPE_NAMES[state.dtype]} {sizes} {state.layout}"
    if state.policy is not None:
        text += f" {policy_text(state.policy)} query_heads={state.query_heads}"
    if state.placement is not None:
        text += f" {state.placement}"
    return text if state.host is None else f"{text} {state.host}"


def _weight_line(weight: Weight) -> str:
    text = f"{name_text(weight.name)}: {weight.type}"
    if weight.constant:
        text += " constant"
    if weight.checkpoint != (None if weight.constant else weight.name):
        found = weight.checkpoint
        text += f" from {'None' if found is None else name_text(found)}"
    return text if weight.placement is None else f"{text} {weight.placement}"


def _facts(program: Program) -> list[str]:
    facts = [f"    dtype = {DTYPE_NAMES[program.checkpoint_dtype]}"]
    if program.source:
        facts.insert(0, f"    source = {quoted(program.source)}")
    if program.licence:
        facts.append(f"    licence = {quoted(program.licence)}")
    if program.max_length is not None:
        facts.append(f"    max_length = {program.max_length}")
    for title in ("config", "generation"):
        if getattr(program, title):
            facts.append(f"    {title} = {json.dumps(getattr(program, title))}")
    return facts


def _is_layer(call: Call) -> bool:
    return call.function not in ("embed", "head", "main", "inter_layer")
