"""Mistakes that a pass might make, each planted behind an exact pass that makes none.

A mistake takes the program after the pass and changes it in place. `BASES` are the programs before
it, by what they have: every length in them lies beyond the 56 tokens of the probe of text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from carved import carved
from programs import IDS, tiny_program
from torch import Tensor

from graphopt.ir import Array, Placement, Program, Rows, Transposed, Value, Weight
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.feed_forward import Split
from graphopt.ir.graph import Call, Function, In, Node
from graphopt.ir.kv import KVLayout
from graphopt.ir.types import B, S, Type
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_affine import InsertAffine

WINDOW, SWITCH, CONTEXT = 100, 300, 600
LARGE_WINDOW, LARGE_SWITCH = 4096, 32768


# The programs before


def _embed(program: Program) -> Function:
    return program.functions["embed"]


def _weight(program: Program, call: Call, slot: str, name: str, value: Tensor) -> Value:
    program.weights.add(Weight(name, Array(value), constant=slot != "positions"))
    function = program.function_of(call)
    function.weights[slot] = Value(slot.replace(".", "_"))
    call.weights[slot] = name
    return function.weights[slot]


def learned_positions(rows: int = CONTEXT, spare: int = 0) -> Program:
    """Return a program that adds a row of a table of positions to each token's.

    Args:
        spare: Rows that no position has.
    """
    program = tiny_program(alibi=True)
    program.config["n_positions"] = rows
    embed, call = _embed(program), program.calls[0]
    positions = Value("position_ids")
    embed.params.append(positions)
    call.args.append("position_ids")
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(rows + spare, 32, generator=generator) * 0.1
    table = _weight(program, call, "positions", "positions.weight", value)
    rows_of = embed.add("embedding", [positions, table], names=["p"]).output
    embed.results = [embed.add("add", [embed.results[0], rows_of], names=["x"]).output]
    return program


def _before_tables(program: Program, op: str, operands: int, attrs: dict[str, Any]) -> Program:
    """Put an op that makes frequencies before the tables of cosines and sines."""
    embed, call = _embed(program), program.calls[0]
    (table,) = [node for node in embed.nodes if node.op == "rope_table"]
    positions, frequencies = table.inputs
    given = [positions, frequencies]
    if operands == 3:
        long = torch.tensor([0.9, 0.02, 0.003, 0.0001])
        given.append(_weight(program, call, "rope.long", "rope.long", long))
    made = embed.add(op, given, attrs, ["frequencies"], before=table)
    table.inputs = [positions, made.output]
    program.config["max_position_embeddings"] = max(CONTEXT, 4 * attrs["length"])
    return program


def switching(length: int = SWITCH) -> Program:
    """Return a program with LongRoPE's two sets of frequencies."""
    return _before_tables(tiny_program(), "by_length", 3, {"length": length})


def growing() -> Program:
    """Return a program whose rotary base grows with the text."""
    attrs = {"base": 100.0, "factor": 4.0, "length": SWITCH}
    return _before_tables(tiny_program(), "ntk_frequencies", 2, attrs)


def chunked() -> Program:
    """Return a program whose attentions see the keys of their own chunk."""
    program = tiny_program()
    nodes(program, "attention")[0].attrs["chunk"] = WINDOW
    return program


def gelu() -> Program:
    program = tiny_program()
    nodes(program, "silu")[0].op = "gelu"
    return program


def transformed() -> Program:
    """Return a program with transforms and their inverses, which nothing has folded."""
    return InsertAffine(kind="kronecker").run(tiny_program(), Context()).program


BASES: dict[str, Callable[[], Program]] = {
    "plain": tiny_program,
    "cached": lambda: tiny_program(cache=True),
    "untied": lambda: tiny_program(tied=False),
    "biased": lambda: tiny_program(bias=True, norm="layer"),
    "window": lambda: tiny_program(window=WINDOW),
    "large window": lambda: tiny_program(window=LARGE_WINDOW),
    "softcap": lambda: tiny_program(softcap=2.0),
    "sinks": lambda: tiny_program(sinks=True),
    "alibi": lambda: tiny_program(alibi=True),
    "part of a head": lambda: tiny_program(rotary_dim=4),
    "positions": learned_positions,
    "last position": lambda: learned_positions(CONTEXT, spare=2),
    "switch": switching,
    "large switch": lambda: switching(LARGE_SWITCH),
    "growing": growing,
    "chunk": chunked,
    "gelu": gelu,
    "transformed": transformed,
    "experts": lambda: carved(tiny_program(), Split(16, 4, 2)),
    "thresholds": lambda: carved(tiny_program(), Split(16, 4, 2, True)),
}


# Finding and changing


def nodes(program: Program, op: str, function: str | None = None) -> list[Node]:
    """Return the nodes of an op, in all functions or in one."""
    functions = [f for f in program.functions.values() if function in (None, f.name)]
    return [node for f in functions for node in f.nodes if node.op == op]


def node_of(program: Program, op: str, result: str) -> Node:
    """Return the node of an op whose result is called so."""
    (found,) = [node for node in nodes(program, op) if node.outputs[0].name == result]
    return found


def alone(program: Program, layer: int) -> Function:
    """Give a layer a function of its own and return it."""
    call = layer_call(program, layer)
    function = program.function_of(call).clone(f"{call.function}_{layer}")
    program.functions[function.name] = function
    call.function = function.name
    return function


def layer_call(program: Program, layer: int) -> Call:
    (call,) = [call for call in program.calls if call.path == f"layers.{layer}"]
    return call


def change(program: Program, name: str, act: Callable[[Tensor], Any]) -> None:
    """Put a changed copy in a weight's place; `act` changes it in place or returns another."""
    weight = program.weights[name]
    value = weight.load().clone()
    made = act(value)
    made = made if isinstance(made, Tensor) else value
    program.weights.replace(weight.with_producer(Array(made)))


def set_attr(program: Program, op: str, key: str, value: Any) -> None:
    for node in nodes(program, op):
        node.attrs[key] = value


def aten(
    function: Function, op: str, value: Value, args: list[Any], kind: Type, before: Node | None
) -> Value:
    """Insert an ATen node that reads `value` first."""
    attrs = {"args": [In(0), *args], "kwargs": {}, "types": [kind]}
    return function.add(op, [value], attrs, before=before).output


def clamp(program: Program, param: str, largest: int) -> None:
    """Let the embedding see no larger number of an input than this."""
    embed = _embed(program)
    value = next(v for v in embed.params if v.name == param)
    readers = [node for node in embed.nodes if value in node.inputs]
    short = aten(embed, "aten.clamp.default", value, [None, largest], IDS, embed.nodes[0])
    for node in readers:
        node.inputs = [short if v is value else v for v in node.inputs]


# Short forms, for the table


def weight(name: str, act: Callable[[Tensor], Any]) -> Callable[[Program], None]:
    return lambda program: change(program, name, act)


def placed(name: str) -> Callable[[Program], None]:
    """Put a copy of a weight on every rank."""

    def act(program: Program) -> None:
        weight = program.weights[name]
        assert weight.placement is not None
        everywhere = Placement(weight.placement.devices)
        program.weights.replace(replace(weight, placement=everywhere))

    return act


def set_op(program: Program, old: str, new: str) -> None:
    for node in nodes(program, old):
        node.op = new


def router(act: Callable[[Tensor], Any], kind: str = "router") -> Callable[[Program], None]:
    def run(program: Program) -> None:
        change(program, next(w.name for w in program.weights if w.name.endswith(kind)), act)

    return run


def attr(op: str, **attrs: Any) -> Callable[[Program], None]:
    def run(program: Program) -> None:
        for key, value in attrs.items():
            set_attr(program, op, key, value)

    return run


def first(op: str, **attrs: Any) -> Callable[[Program], None]:
    """Set attributes of the first node of an op alone."""
    return lambda program: nodes(program, op, "block")[0].attrs.update(attrs)


def window(layer: int, size: int | None) -> Callable[[Program], None]:
    return lambda program: layer_call(program, layer).attrs.update(window=size)


def slot(call: int, slot: str, name: str) -> Callable[[Program], None]:
    """Put another weight in a slot of a call."""
    return lambda program: program.calls[call].weights.update({slot: name})


def of(act: Callable[..., Any], *given: Any) -> Callable[[Program], None]:
    return lambda program: act(program, *given)


# Mistakes in the graph


def drop_residual(program: Program, layer: int, result: str) -> None:
    """Let a sum with the stream be its other term."""
    function = alone(program, layer)
    adds = [node for node in function.nodes if node.op == "add"]
    node = adds[0] if result == "attention" else adds[-1]
    function.replace(node.output, node.inputs[1])


def stream_before_attention(program: Program) -> None:
    block = program.functions["block"]
    adds = [node for node in block.nodes if node.op == "add"]
    adds[-1].inputs[0] = block.params[0]


def skip(program: Program, op: str, result: str, layer: int | None = None) -> None:
    """Let readers of a node read its first operand."""
    function = program.functions["block"] if layer is None else alone(program, layer)
    node = next(n for n in function.nodes if n.op == op and n.outputs[0].name == result)
    function.replace(node.output, node.inputs[0])
    remove_dead(function)
    program.prune_unused()


def swap_operands(program: Program, op: str, result: str, a: int, b: int) -> None:
    inputs = node_of(program, op, result).inputs
    inputs[a], inputs[b] = inputs[b], inputs[a]


def drop_operand(program: Program, op: str, result: str, index: int) -> None:
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == op and node.outputs[0].name == result:
                node.inputs[index] = None
                while node.inputs[-1] is None:
                    node.inputs.pop()
        remove_dead(function)
    program.prune_unused()


def read_instead(program: Program, op: str, result: str, index: int, other: str) -> None:
    """Let a node of the block read the value of another name."""
    block = program.functions["block"]
    value = next(v for v in block.values() if v.name == other)
    node_of(program, op, result).inputs[index] = value


def last_token(program: Program) -> None:
    """Scale what the head's matrix gets for the last token."""
    head = program.functions["head"]
    kind = Type((B, S, 32), torch.float32)
    norm, first = head.nodes
    x = norm.output
    begin = aten(head, "aten.slice.Tensor", x, [1, 0, -1], Type((B, S - 1, 32), kind.dtype), first)
    end = aten(head, "aten.slice.Tensor", x, [1, -1, 2**40], Type((B, 1, 32), kind.dtype), first)
    end = head.add("scale", [end], {"factor": 1.001}, before=first).output
    attrs = {"args": [[In(0), In(1)], 1], "kwargs": {}, "types": [kind]}
    both = head.add("aten.cat.default", [begin, end], attrs, before=first).output
    first.inputs = [both if value is x else value for value in first.inputs]


def positions_in_the_step(program: Program) -> None:
    """Count positions from the start of a step."""
    embed = _embed(program)
    value = next(v for v in embed.params if v.name == "position_ids")
    attrs = {"args": [S], "kwargs": {}, "types": [Type((S,), torch.int64)]}
    counted = embed.add("aten.arange.default", [], attrs, before=embed.nodes[0]).output
    row = aten(
        embed, "aten.unsqueeze.default", counted, [0], Type((1, S), torch.int64), embed.nodes[1]
    )
    zero = aten(embed, "aten.mul.Tensor", value, [0], IDS, embed.nodes[2])
    attrs = {"args": [In(0), In(1)], "kwargs": {}, "types": [IDS]}
    placed = embed.add("aten.add.Tensor", [zero, row], attrs, before=embed.nodes[3]).output
    for node in embed.nodes[4:]:
        node.inputs = [placed if v is value else v for v in node.inputs]


def drop_layer(program: Program, layer: int) -> None:
    program.calls.remove(layer_call(program, layer))
    program.prune_unused()


def swap_layers(program: Program) -> None:
    first, second = layer_call(program, 0), layer_call(program, 1)
    first.weights, second.weights = second.weights, first.weights


def swap_slots(program: Program, layer: int, a: str, b: str) -> None:
    weights = layer_call(program, layer).weights
    weights[a], weights[b] = weights[b], weights[a]


def lose_sum(program: Program, operand: int) -> None:
    """Let a block read one of the two summands that it is given."""
    block = program.functions["block"]
    node = next(n for n in block.nodes if n.op == "add" and set(n.inputs) <= set(block.params))
    block.replace(node.output, node.inputs[operand])


def older_summand(program: Program) -> None:
    """Let the second block be given the summand of the first."""
    first, second = layer_call(program, 0), layer_call(program, 1)
    first.results = [f"{name}_0" if name in second.args else name for name in first.results]
    second.args = [f"{name}_0" if f"{name}_0" in first.results and name != "x_delta" else name
                   for name in second.args]  # fmt: skip


def transform_before_rotation(program: Program) -> None:
    """Multiply keys and queries by their matrices first and rotate them then."""
    for side, name in (("keys", "k"), ("queries", "q")):
        turned, mapped = (
            node_of(program, "rope", f"{name}_rope"),
            node_of(program, "kronecker", f"{side}_t"),
        )
        block = program.functions["block"]
        block.replace(mapped.output, turned.output)
        mapped.inputs[0], turned.inputs[0] = turned.inputs[0], mapped.output
        block.nodes.remove(mapped)
        block.nodes.insert(block.nodes.index(turned), mapped)


# Mistakes in a cache


def one_state(program: Program) -> None:
    cache = dict.fromkeys(layer_call(program, 1).caches, "kv.0")
    layer_call(program, 1).caches = cache
    program.prune_unused()


def past_swapped(program: Program) -> None:
    (cache,) = program.functions["block"].caches
    inputs = nodes(program, "attention")[0].inputs
    k, v = inputs.index(cache.past_k), inputs.index(cache.past_v)
    inputs[k], inputs[v] = inputs[v], inputs[k]


def present_swapped(program: Program) -> None:
    (cache,) = program.functions["block"].caches
    cache.present_k, cache.present_v = cache.present_v, cache.present_k


def half_states(program: Program) -> None:
    for state in program.states.values():
        state.dtype = torch.float16


def short_ring(program: Program, slots: int) -> None:
    """Keep the keys of a windowed layer in a ring, of a window that it holds."""
    for state in program.states.values():
        state.layout = KVLayout("ring", slots)
    for node in nodes(program, "attention"):
        node.attrs |= {"ring": slots, "window": slots}
    for call in program.calls:
        call.attrs.pop("window", None)


def unrotated_keys(program: Program) -> None:
    """Let an attention read, and leave in the cache, keys that are not rotated."""
    block = program.functions["block"]
    k = next(v for v in block.values() if v.name == "k_heads")
    nodes(program, "attention")[0].inputs[1] = k
    remove_dead(block)


# Mistakes in weights


def rows_off_by_one(program: Program, name: str, start: int = 0) -> None:
    given = program.weights[name]
    rows = given.shape[0]
    index = [*range(start), *range(start + 1, rows), rows - 1]
    program.weights.replace(given.with_producer(Rows(given.producer, tuple(index))))


def transpose(program: Program, name: str) -> None:
    weight = program.weights[name]
    program.weights.replace(weight.with_producer(Transposed(weight.producer)))


def untie(program: Program) -> None:
    """Give the head a matrix of its own, in which one row is another."""
    weight = program.weights["embed.weight"]
    value = weight.load().clone()
    value[91] *= 1.01
    program.weights.add(replace(weight, name="lm_head.weight", producer=Array(value)))
    program.calls[-1].weights["lm_head.weight"] = "lm_head.weight"


def scaled(factor: float, rows: slice | int = slice(None)) -> Callable[[Tensor], None]:
    def act(value: Tensor) -> None:
        value[rows] *= factor

    return act


def swapped(a: slice | int, b: slice | int) -> Callable[[Tensor], None]:
    def act(value: Tensor) -> None:
        value[a], value[b] = value[b].clone(), value[a].clone()

    return act


@dataclass(frozen=True)
class Mistake:
    """One mistake that an exact pass might make.

    Attributes:
        what: What was done.
        behind: The exact pass that it is planted behind.
        base: Of `BASES`.
        act: Changes the program after the pass.
        found: What the refusal says.
        length: Tokens of a text that shows it; None where that would be too many.
        start: Its first position.
    """

    what: str
    behind: str
    base: str
    act: Callable[[Program], object]
    found: str = "is exact but"
    length: int | None = 24
    start: int = 0
