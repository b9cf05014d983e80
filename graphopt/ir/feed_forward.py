"""The feed-forward parts of blocks, and dividing their neurons into experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.blocks import Block, SubBlock, sub_blocks
from graphopt.ir.dataflow import region
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.functional import ACTIVATIONS
from graphopt.ir.graph import (
    Call,
    Function,
    Node,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.types import Type
from graphopt.ir.weights import Array, Padded, Producer, Rows, Transposed, Weight


@dataclass(frozen=True)
class FeedForward:
    """A part down(act(gate x) * up x), or down(act(up x)), of a function.

    Attributes:
        x: What the projections read, [..., N].
        hidden: What the down projection reads, one feature a neuron.
        gate: The linear behind the activation; None where there are two matrices.
        up, down: The other linears.
        act: The activation's name as an op.
    """

    x: Value
    hidden: Value
    gate: Node | None
    up: Node
    down: Node
    act: str


def feed_forwards(function: Function, stream: int) -> list[FeedForward | str]:
    """Return the feed-forward parts that a block adds to its stream; for an odd one the reason."""
    return [_read(function, part) for part in sub_blocks(function, stream) if part.kind == "ffn"]


def _read(function: Function, part: SubBlock) -> FeedForward | str:
    uses = function.uses()
    weights = set(function.weights.values())
    found: list[FeedForward] = []
    for node in region(function, [part.term]):
        if node.op != "linear" or node.inputs[1] not in weights:
            continue
        hidden = node.inputs[0]
        read = None if hidden is None else read_hidden(hidden, weights)
        if hidden is None or read is None:
            continue
        act, gate, up = read
        between = [hidden, up.output] + ([] if gate is None else [gate.output])
        if any(len(uses[value]) > 1 for value in between):
            return f"its activations ({hidden.name}) are used by more than its down projection"
        assert up.inputs[0] is not None
        found.append(FeedForward(up.inputs[0], hidden, gate, up, node, act))
    if len(found) == 1:
        return found[0]
    if found:
        return "it has several feed-forward parts in one"
    if any(node.op.startswith("aten.topk") for node in region(function, [part.term])):
        return "it is a mixture of experts already"
    return "it is no projection of an activation, or of its product with a projection"


def read_hidden(hidden: Value | None, weights: set[Value]) -> tuple[str, Node | None, Node] | None:
    """Return the activation, the linear behind it and the other one, if a value is that.

    Where there is one linear, it is the last.
    """
    node = None if hidden is None else hidden.node
    if node is None:
        return None
    if node.op in ACTIVATIONS:
        up = _linear(node.inputs[0], weights)
        return None if up is None else (node.op, None, up)
    if node.op != "mul":
        return None
    for first, second in ((0, 1), (1, 0)):
        active, up = node.inputs[first], _linear(node.inputs[second], weights)
        inner = None if active is None else active.node
        if inner is None or inner.op not in ACTIVATIONS or up is None:
            continue
        gate = _linear(inner.inputs[0], weights)
        if gate is not None and gate is not up and gate.inputs[0] is up.inputs[0]:
            return inner.op, gate, up
    return None


def _linear(value: Value | None, weights: set[Value]) -> Node | None:
    node = None if value is None else value.node
    return node if node is not None and node.op == "linear" and node.inputs[1] in weights else None


@dataclass(frozen=True)
class Split:
    """How neurons are divided.

    Attributes:
        shared: Neurons that every token runs.
        experts: Number of routed experts.
        active: How many of them a token runs.
        threshold: Whether that is a mean over tokens, which run every expert of a score above 0.
    """

    shared: int
    experts: int
    active: int
    threshold: bool = False


def with_experts(
    function: Function,
    part: FeedForward,
    split: Split,
    name: str,
    *,
    router: str = "linear",
) -> tuple[Function, dict[str, str]]:
    """Return a copy of a function whose feed-forward part is shared neurons and routed experts.

    What the part was named by stays in the names of its slots: `mlp.up_proj.weight` becomes
    `mlp.up_proj.weight.shared` and `mlp.up_proj.weight.experts`.

    Args:
        name: The name of the copy.
        router: `linear`: scores are a linear of the part's input, with a bias. `neuron`: they
            are the magnitude of one neuron an expert.

    Returns:
        The copy, and for every new slot what it holds: `gate`, `up` or `down` (with `.bias` for
        biases), then `.shared` or `.experts`; `router`, `router.bias`, `router.gate`.
    """
    rewritten = function.clone(name)
    where = dict(zip(function.nodes, rewritten.nodes, strict=True))
    down, up = where[part.down], where[part.up]
    gate = None if part.gate is None else where[part.gate]
    slots = rewritten.slots_by_value()
    x = up.inputs[0]
    made: dict[str, str] = {}

    def weight(slot: str, holds: str) -> Value:
        rewritten.weights[slot] = Value(slot)
        made[slot] = holds
        return rewritten.weights[slot]

    def piece(node: Node, kind: str, place: str) -> list[Value | None]:
        """Return the weight, and the bias if there is one, of a projection's part."""
        given = [node.inputs[1], node.operand(2)]
        holds = (kind, f"{kind}.bias")
        return [
            None if value is None else weight(f"{slots[value]}.{place}", f"{held}.{place}")
            for value, held in zip(given, holds, strict=True)
        ]

    stem = slots[down.inputs[1]].removesuffix(".weight").rpartition(".")[0]  # type: ignore[index]
    stem = f"{stem}." if stem else ""
    parts: list[Value] = []
    bias = down.operand(2)
    if split.shared:
        own = rewritten.add("linear", [x, *piece(up, "up", "shared")], before=down).output
        if gate is None:
            own = rewritten.add(part.act, [own], before=down).output
        else:
            first = rewritten.add("linear", [x, *piece(gate, "gate", "shared")], before=down).output
            first = rewritten.add(part.act, [first], before=down).output
            own = rewritten.add("mul", [first, own], before=down).output
        matrix = weight(f"{slots[down.inputs[1]]}.shared", "down.shared")  # type: ignore[index]
        parts.append(rewritten.add("linear", [own, matrix, bias], before=down).output)
    if split.experts:
        matrix = weight(f"{stem}router.weight", "router")
        if router == "linear":
            offset = weight(f"{stem}router.bias", "router.bias")
            scores = rewritten.add("linear", [x, matrix, offset], before=down).output
        else:
            scores = rewritten.add("linear", [x, matrix], before=down).output
            if gate is None:
                scores = rewritten.add(part.act, [scores], before=down).output
            else:
                first = weight(f"{stem}router.gate", "router.gate")
                active = rewritten.add("linear", [x, first], before=down).output
                active = rewritten.add(part.act, [active], before=down).output
                scores = rewritten.add("mul", [active, scores], before=down).output
            scores = rewritten.add("abs", [scores], before=down).output
        most, mean = split.active, {}
        if split.threshold:
            most, mean = split.experts, {"mean_active_experts": split.active}
        gates = rewritten.add("top_k_gating", [scores], {"top_k": most, **mean}, before=down).output
        up_weight, up_bias = piece(up, "up", "experts")
        gate_weight, gate_bias = (None, None) if gate is None else piece(gate, "gate", "experts")
        matrix = weight(f"{slots[down.inputs[1]]}.experts", "down.experts")  # type: ignore[index]
        routed = rewritten.add(
            "experts",
            [x, gates, up_weight, matrix, gate_weight, up_bias, gate_bias],
            {"act": part.act, "active": most, **mean},
            before=down,
        ).output
        if bias is not None and not split.shared:
            routed = rewritten.add("add", [routed, bias], before=down).output
        parts.append(routed)
    whole = parts[0]
    if len(parts) == 2:
        whole = rewritten.add("add", parts, before=down).output
    rewritten.replace(down.output, whole)
    remove_dead(rewritten)
    return rewritten, made


def read_split(
    program: Program, block: Block, types: Mapping[Value, Type], width: int
) -> tuple[Split, str, int] | None:
    """Return what `with_experts` was given to make a block's function, as far as it shows.

    Args:
        types: The types of the values of the block's call.
        width: Neurons that its feed-forward part had before.

    Returns:
        The split, what the router is, and how many neurons are divided, those of zeros among
        them. None where the block does not have one carved part, or its part is whole.
    """
    call = program.calls[block.position]
    function = program.functions[call.function]
    routed = [node for node in function.nodes if node.op == "experts"]
    if not routed:
        parts = feed_forwards(function, block.stream)
        if len(parts) != 1 or isinstance(parts[0], str):
            return None
        kept = int(types[parts[0].hidden].shape[-1])
        return (Split(kept, 0, 0), "linear", width) if kept < width else None
    gates, up = routed[0].inputs[1:3]
    scores = None
    if gates is not None and gates.node is not None and gates.node.op == "top_k_gating":
        scores = gates.node.inputs[0]
    if len(routed) > 1 or gates is None or up is None or scores is None:
        return None
    beside = [
        read
        for node in function.nodes
        if node.op == "linear"
        and (read := read_hidden(node.inputs[0], set(function.weights.values()))) is not None
        and read[2].inputs[0] is routed[0].inputs[0]
    ]
    if len(beside) > 1:
        return None
    shared = int(types[beside[0][2].output].shape[-1]) if beside else 0
    attrs = resolve_attrs(routed[0], call)
    bilinear = scores.node is not None and scores.node.op == "abs"
    split = Split(
        shared,
        int(types[gates].shape[-1]),
        attrs.get("mean_active_experts") or attrs["active"],
        threshold=bool(attrs.get("mean_active_experts")),
    )
    return split, "neuron" if bilinear else "linear", shared + int(types[up].shape[0])


def carve_call(
    program: Program,
    call: Call,
    part: FeedForward,
    rewritten: Function,
    made: dict[str, str],
    order: Tensor,
    shared: int,
    router: dict[str, Tensor],
) -> None:
    """Make a call run a function from `with_experts`, on the weights it has, in another order.

    No weight is read: the new ones are rows, or columns, of those that are there.

    Args:
        part: The feed-forward part of the function that the call runs so far.
        rewritten, made: From `with_experts`; the function is in the program.
        order: int64, every neuron once: the shared ones, then the experts' side by side.
            Numbers from the part's width on are neurons of zeros, which are added.
        shared: How many of them are shared.
        router: For `router`, `router.bias` and `router.gate`, where the function has them, the
            value.
    """
    function = program.functions[call.function]
    slots = function.slots_by_value()
    nodes = {"gate": part.gate, "up": part.up, "down": part.down}
    rows = {"shared": tuple(order[:shared].tolist()), "experts": tuple(order[shared:].tolist())}
    weights = {slot: name for slot, name in call.weights.items() if slot in rewritten.weights}
    # A layer's new weights are named as its own ones are.
    down = call.weights[slots[part.down.inputs[1]]]  # type: ignore[index]

    def add(name: str, producer: Producer) -> str:
        # Layers may share their weights, and are divided each in its own way.
        name = unique_name(name, {weight.name for weight in program.weights})
        program.weights.add(Weight(name, producer))
        return name

    for slot, holds in made.items():
        if holds in router:
            stem = down.rpartition(".")[0].rpartition(".")[0] or down
            value = router[holds].to(torch.float32).contiguous()
            weights[slot] = add(f"{stem}.{holds}", Array(value))
            continue
        kind, _, place = holds.rpartition(".")
        node = nodes[kind.removesuffix(".bias")]
        assert node is not None
        own = node.inputs[2 if kind.endswith(".bias") else 1]
        assert own is not None
        source = program.weights[call.weights[slots[own]]]
        neurons: Producer = source.producer
        if kind == "down":
            neurons = Transposed(neurons)
        more = max((*rows["shared"], *rows["experts"])) + 1 - neurons.shape[0]
        if more > 0:
            neurons = Padded(neurons, more)
        producer: Producer = Rows(neurons, rows[place])
        if kind == "down":
            producer = Transposed(producer)
        weights[slot] = add(f"{source.name}.{place}", producer)
    call.function, call.weights = rewritten.name, weights


def routed_gates(function: Function) -> list[Node]:
    """Return what makes the gates of `experts`: no mask over the neurons of a mixture's expert."""
    read = {node.inputs[1] for node in function.nodes if node.op == "experts"}
    return [node for node in function.nodes if node.op == "top_k_gating" and node.output in read]


def add_gate_operands(
    program: Program, *, selection_bias: bool, gate_scale: bool
) -> dict[str, list[str]]:
    """Give gates of routed experts, in place, a selection bias and scales that are 0 at first.

    With them at 0 every token runs the experts that it ran, with a gate of 1. What the router's
    slots are named by stays in the new ones: `mlp.router.selection_bias`, `mlp.router.gate_scale`.

    Args:
        selection_bias: Add the operand by which loads are balanced.
        gate_scale: Add the operand by which a gate is 1 and some of its expert's probability.

    Returns:
        The names of the new program weights, by `selection_bias` and `gate_scale`.
    """
    operands = [("selection_bias", 1)] * selection_bias + [("gate_scale", 2)] * gate_scale
    made: dict[str, list[str]] = {"selection_bias": [], "gate_scale": []}
    # For every function, the new slots: of which operand, and the slot that has as many rows.
    slots: dict[str, dict[str, tuple[str, str]]] = {}
    for function in program.functions.values():
        named = function.slots_by_value()
        for node in routed_gates(function):
            assert node.inputs[0] is not None
            last = [n for n in region(function, [node.inputs[0]]) if n.op == "linear"][-1]
            router = named[last.inputs[1]]  # type: ignore[index]
            stem = router.removesuffix(".weight")
            node.inputs += [None] * (3 - len(node.inputs))
            for operand, place in operands:
                if node.inputs[place] is None:
                    slot = unique_name(f"{stem}.{operand}", set(function.weights))
                    node.inputs[place] = function.weights[slot] = Value(slot)
                    slots.setdefault(function.name, {})[slot] = operand, router
    for call in program.calls:
        for slot, (operand, router) in slots.get(call.function, {}).items():
            name = f"{call.path}.{slot}" if call.path else slot
            name = unique_name(name, {weight.name for weight in program.weights})
            rows = program.weights[call.weights[router]].shape[0]
            program.weights.add(Weight(name, Array(torch.zeros(rows))))
            call.weights[slot] = name
            made[operand].append(name)
    return made
