"""Gates of experts, and experts that each compute the tokens they are chosen for."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.graph import Node, Value
from graphopt.lowering.onnx import moe
from graphopt.lowering.onnx.ops.registry import Lowering, translation, translation_of


def activation(lower: Lowering, act: str, x: ir.Value) -> ir.Value:
    """Return an activation of a value, in the form that the op itself has."""
    value = Value("hidden")
    lower.values[value] = x
    form = translation_of(act)
    assert form is not None
    made = form(lower, Node(act, [value], {}))
    assert isinstance(made, ir.Value)
    return made


@translation("top_k_gating")
def top_k_gating(lower: Lowering, node: Node) -> ir.Value:
    """TopK, whose first of equal values is the lowest index, and a one in each of its places.

    With a mean number of experts in place of one, a one where something is above 0.
    """
    builder, attrs = lower.builder, lower.attrs(node)
    router_logits = lower.whole(node.inputs[0])
    selection_bias, gate_scale = node.operand(1), node.operand(2)
    probabilities = (
        None
        if selection_bias is None and gate_scale is None
        else builder.op("Softmax", router_logits, axis=-1)
    )
    nothing, one = builder.number(0.0), builder.number(1.0)
    if attrs.get("mean_active_experts"):
        ranked = (
            router_logits
            if selection_bias is None
            else builder.op("Add", router_logits, lower.whole(selection_bias))
        )
        chosen = builder.op("Where", builder.op("Greater", ranked, nothing), one, nothing)
    else:
        ranked = (
            router_logits
            if selection_bias is None
            else builder.op("Add", probabilities, lower.whole(selection_bias))
        )
        top_k = builder.constant([attrs["top_k"]])
        _, places = builder.op("TopK", ranked, top_k, outputs=2, axis=-1, largest=1, sorted=1)
        nothing = builder.op("Expand", nothing, builder.op("Shape", router_logits))
        ones = builder.op("Expand", one, builder.op("Shape", places))
        chosen = builder.op("ScatterElements", nothing, places, ones, axis=-1)
    if gate_scale is None:
        return chosen
    gate = builder.op("Mul", probabilities, lower.whole(gate_scale))
    return builder.op("Mul", chosen, builder.op("Add", gate, one))


@translation("experts")
def experts(lower: Lowering, node: Node) -> ir.Value:
    """For each expert products over the tokens whose gate is not 0, added where they stand.

    ONNX Runtime's MoE multiplies weights that are not packed, by one thread an expert, and takes
    longer for prompts (tools/bench_width.py): it is there for those who ask for it.

    Tokens are added expert by expert: ScatterND adds side by side, so that within one no place
    may occur twice (microsoft/onnxruntime#23396).
    """
    builder, act = lower.builder, lower.attrs(node)["act"]
    x, gates = lower.whole(node.inputs[0]), lower.whole(node.inputs[1])
    if node in lower.fused:
        return moe.routed(builder, lower.fused[node], x, gates)
    up, down, gate = node.inputs[2], node.inputs[3], node.operand(4)
    assert node.inputs[1] is not None
    shape = lower.types[node.inputs[1]].shape
    rank, count = len(shape), int(shape[-1])
    by_expert = [rank - 1, *range(rank - 1)]
    chosen = builder.op("Cast", gates, to=ir.DataType.BOOL)
    chosen = builder.op("Transpose", chosen, perm=by_expert)
    # In the order of experts, and for each the place of a token: [routes, rank].
    routes = builder.op("Transpose", builder.op("NonZero", chosen), perm=[1, 0])
    tokens = builder.op("Slice", routes, *(builder.constant([i]) for i in (1, rank, 1)))
    loads = builder.op("Cast", chosen, to=ir.DataType.INT64)
    loads = builder.op("ReduceSum", loads, builder.constant([*range(1, rank)]), keepdims=0)
    places = builder.split(tokens, count, loads)
    weights: list[ir.Value] | None = None
    if not _ones(lower, node.inputs[1]):
        of_routes = builder.op("GatherND", builder.op("Transpose", gates, perm=by_expert), routes)
        of_routes = builder.op("Unsqueeze", of_routes, builder.constant([1]))
        weights = builder.split(of_routes, count, loads)
    first = _parts(lower, up if gate is None else gate, count)
    first_bias = _parts(lower, node.operand(5 if gate is None else 6), count)
    other = _parts(lower, None if gate is None else up, count)
    other_bias = _parts(lower, None if gate is None else node.operand(5), count)
    last = _parts(lower, down, count, turned=True)
    total = _zeros(lower, node.output)
    for number in range(count):
        own = builder.op("GatherND", x, places[number])
        hidden = builder.op("Gemm", own, first[number], first_bias[number], transB=1)
        hidden = activation(lower, act, hidden)
        if gate is not None:
            wide = builder.op("Gemm", own, other[number], other_bias[number], transB=1)
            hidden = builder.op("Mul", hidden, wide)
        if weights is not None:
            hidden = builder.op("Mul", hidden, weights[number])
        out = builder.op("MatMul", hidden, last[number])
        total = builder.op("ScatterND", total, places[number], out, reduction="add")
    return total


def _ones(lower: Lowering, gates: Value) -> bool:
    """Return whether the gates that are not 0 are 1."""
    made = gates.node
    return made is not None and made.op == "top_k_gating" and made.operand(2) is None


def _zeros(lower: Lowering, value: Value) -> ir.Value:
    """Return zeros of a value's shape; made once a graph."""
    shape = lower.types[value].shape
    key = ("zeros", shape)
    if key not in lower.shared:
        builder = lower.builder
        scope, builder.scope = builder.scope, "experts"
        sizes = builder.shape(shape)
        lower.shared[key] = builder.op("Expand", builder.number(0.0), sizes)
        builder.scope = scope
    made = lower.shared[key]
    assert isinstance(made, ir.Value)
    return made


def _parts(
    lower: Lowering, value: Value | None, count: int, *, turned: bool = False
) -> list[ir.Value] | list[None]:
    """Return each expert's rows of an operand, or of its transpose; Nones where there is none."""
    if value is None:
        return [None] * count
    stored = lower.whole(value)
    if turned and stored not in lower.shared["transposed"]:
        stored = lower.builder.op("Transpose", stored, perm=[1, 0])
    return lower.builder.rows(stored, count)
