"""com.microsoft::MoE for experts: when it is the op, its body, and a test of the runtime's kernel.

The operator's softmax over router scores makes its gates, so what it is given are logarithms of
the gates, and its output is multiplied by their sum (docs/onnx.md).

A model-local function of the operator's own name is what lets other runtimes run the file. ONNX
Runtime takes its kernel all the same; onnx.reference and the inliner of onnx take the function.
They look it up by domain and name alone, not by overload, so that one file has one kind of MoE.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs
from graphopt.ir.ops import get_op
from graphopt.ir.types import Type
from graphopt.lowering.onnx.builder import MICROSOFT, OPSET, GraphBuilder

NAME = "MoE"

# By our activation, and whether it multiplies another product.
_ACTIVATIONS = {
    ("silu", True): "swiglu",
    ("silu", False): "silu",
    ("relu", False): "relu",
    ("gelu_tanh", False): "gelu",
}


@dataclass(frozen=True)
class Kind:
    """What the operator, and its body, need to know of experts.

    Attributes:
        act: Our name of the activation.
        gated: It multiplies another product.
        biased: The first products have biases.
    """

    act: str
    gated: bool
    biased: bool

    def attributes(self) -> dict[str, Any]:
        """Return the operator's attributes but for `k`."""
        found: dict[str, Any] = {
            "activation_type": _ACTIVATIONS[self.act, self.gated],
            "normalize_routing_weights": 0,
        }
        if self.gated:
            # Rows of fc1 in turns, the only order that ONNX Runtime's CPU kernel takes.
            found |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        return found


@dataclass(frozen=True)
class Plan:
    """Experts that the operator can compute.

    Attributes:
        experts, chosen: How many there are, and how many of them a token runs.
        unit: Every gate is 0 or 1.
        first: Program weights of the first products: [gate, up], or [up].
        biases: Theirs, or nothing.
        last: Program weight of the last product.
    """

    kind: Kind
    experts: int
    chosen: int
    unit: bool
    first: tuple[str, ...]
    biases: tuple[str, ...]
    last: str

    @property
    def weights(self) -> tuple[str, ...]:
        return (*self.first, *self.biases, self.last)


@dataclass(frozen=True, eq=False)
class Fused:
    """Experts that the operator computes, and their weights in the graph.

    Attributes:
        first: [experts, neurons, in]; of two products the rows take turns, gate first.
        bias: [experts, neurons] or None.
        last: [experts, out, neurons of the last product].
    """

    plan: Plan
    first: ir.Value
    bias: ir.Value | None
    last: ir.Value


def plan(
    program: Program, call: Call, function: Function, node: Node, types: Mapping[Value, Type]
) -> Plan | str:
    """Return how the operator computes an `experts` node, or why it can't.

    Raises:
        SourceError: A weight `gate_scale` of the gates cannot be read.
    """
    x, gates, up, down, gate, up_bias, gate_bias = (*node.inputs, None, None, None)[:7]
    assert x is not None and gates is not None
    act = resolve_attrs(node, call)["act"]
    if (act, gate is not None) not in _ACTIVATIONS:
        return f"it has no {'gated ' if gate is not None else ''}{act}"
    if gate is not None and (up_bias is None) != (gate_bias is None):
        return "one of two projections has a bias"
    if types[node.output].shape != types[x].shape or len(types[x].shape) != 3:
        return f"it gives what it takes, [batch, sequence, width], not {types[node.output]}"
    slots = function.slots_by_value()

    def names(*values: Value | None) -> tuple[str, ...]:
        return tuple(call.weights[slots[value]] for value in values if value in slots)

    first = names(gate, up)
    biases = names(gate_bias, up_bias)
    last = names(down)
    given = [value for value in node.inputs[2:] if value is not None]
    matrices = [program.weights[name] for name in (*first, *biases, *last)]
    if len(matrices) != len(given) or any(weight.constant for weight in matrices):
        return "its matrices are not weights of the model"
    made = gates.node
    if made is None or made.op != "top_k_gating" or made.attrs.get("mean_active_experts"):
        return "it needs the same number of experts for every token"
    gate_scale = made.operand(2)
    if gate_scale is not None:
        known = names(gate_scale)
        # A gate is 1 + probability gate_scale, and probabilities are at most 1.
        if not known or not float(program.weights[known[0]].load().min()) > -1:
            return "it needs gates above 0, and one may not be: a `gate_scale` is -1 or below"
    kind = Kind(act, gate is not None, bool(biases))
    reason = why_not(kind)
    if reason is not None:
        return reason
    chosen = resolve_attrs(made, call)["top_k"]
    experts = int(types[gates].shape[-1])
    return Plan(kind, experts, chosen, gate_scale is None, first, biases, last[0])


def routed(builder: GraphBuilder, fused: Fused, x: ir.Value, gates: ir.Value) -> ir.Value:
    """Return the experts' sum for x [B, S, in] by gates [B, S, experts]."""
    made = fused.plan
    if made.unit:
        # Softmax of 0 for the chosen and -1e4 for the others is 1 / chosen and 0.
        scores = builder.op("Sub", gates, builder.number(1.0))
        scores = builder.op("Mul", scores, builder.number(1e4))
        total = builder.number(float(made.chosen))
    else:
        # The smallest normal number in place of 0 counts for nothing beside a gate.
        least = builder.number(float(np.finfo(np.float32).tiny))
        scores = builder.op("Log", builder.op("Max", gates, least))
        total = builder.op("ReduceSum", gates, builder.constant([-1]), keepdims=1)
    scores = builder.op("Reshape", scores, builder.constant([-1, made.experts]))
    # Before ONNX Runtime 1.32 the kernel's output may lie where its input does, which it still
    # reads. That needs two values of one known size; the number of rows is none that is known.
    rows = builder.op("Flatten", x, axis=2)
    out = builder.op(
        NAME, rows, scores, fused.first, fused.bias, fused.last,
        domain=MICROSOFT, k=made.chosen, **made.kind.attributes(),
    )  # fmt: skip
    out = builder.op("Reshape", out, builder.op("Shape", x))
    result = out if made.unit and made.chosen == 1 else builder.op("Mul", out, total)
    assert isinstance(result, ir.Value)
    return result


# The body --------------------------------------------------------------------------------------


def body(kind: Kind) -> ir.Function:
    """Return the operator for one kind of experts as a function in standard operators.

    It computes every expert for every token, whatever their number.
    """
    names = ("input", "router_probs", "fc1_experts_weights", "fc1_experts_bias",
             "fc2_experts_weights")  # fmt: skip
    x, router, first, bias, last = inputs = [ir.Value(name=name) for name in names]
    nodes: list[ir.Node] = []

    def op(op_type: str, *operands: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        nodes.append(ir.node(op_type, operands, attributes, num_outputs=outputs))
        made = nodes[-1].outputs
        return made[0] if outputs == 1 else made

    def ints(*values: int) -> ir.Value:
        made = op("Constant", value_ints=list(values))
        assert isinstance(made, ir.Value)
        return made

    def number(value: float) -> ir.Value:
        made = op("Constant", value_float=value)
        assert isinstance(made, ir.Value)
        return made

    probabilities = op("Softmax", router, axis=-1)
    top_k = op("Constant", value_int=ir.RefAttr("value_int", "k", ir.AttributeType.INT))
    best, places = op("TopK", probabilities, op("Reshape", top_k, ints(1)), outputs=2, axis=-1)
    zeros = op("Expand", number(0.0), op("Shape", router))
    weights = op("ScatterElements", zeros, places, best, axis=-1)
    width = op("Shape", x, start=-1)
    tokens = op("Reshape", x, op("Concat", ints(-1), width, axis=0))
    # [experts, tokens, neurons] from here on.
    hidden = op("MatMul", tokens, op("Transpose", first, perm=[0, 2, 1]))
    if kind.biased:
        hidden = op("Add", hidden, op("Unsqueeze", bias, ints(1)))
    if kind.gated:
        pairs = op("Reshape", hidden, ints(0, 0, -1, 2))
        own, other = op("Split", pairs, outputs=2, axis=-1, num_outputs=2)
        hidden, other = (op("Squeeze", value, ints(-1)) for value in (own, other))
    if kind.act == "silu":
        hidden = op("Mul", hidden, op("Sigmoid", hidden))
    elif kind.act == "relu":
        hidden = op("Relu", hidden)
    else:
        # Gelu itself is a function, which onnx.reference does not find from within another.
        cube = op("Mul", hidden, op("Mul", hidden, hidden))
        inner = op("Add", hidden, op("Mul", cube, number(0.044715)))
        bent = op("Tanh", op("Mul", inner, number(math.sqrt(2 / math.pi))))
        hidden = op("Mul", op("Mul", hidden, number(0.5)), op("Add", bent, number(1.0)))
    if kind.gated:
        hidden = op("Mul", hidden, other)
    out = op("MatMul", hidden, op("Transpose", last, perm=[0, 2, 1]))
    by_expert = op("Unsqueeze", op("Transpose", weights, perm=[1, 0]), ints(-1))
    total = op("ReduceSum", op("Mul", out, by_expert), ints(0), keepdims=0)
    whole = op("Reshape", total, op("Shape", x))
    graph = ir.Graph(inputs, [whole], nodes=nodes, opset_imports={"": OPSET}, name=NAME)
    kinds = {str: ir.AttributeType.STRING, int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}
    attributes = [
        ir.Attr(name, kinds[type(value)], None)
        for name, value in {"k": 1, **kind.attributes()}.items()
    ]
    return ir.Function(MICROSOFT, NAME, graph=graph, attributes=attributes)


# The kernel ------------------------------------------------------------------------------------


@functools.cache
def why_not(kind: Kind) -> str | None:
    """Return why the installed ONNX Runtime's kernel is not the op; None where it is.

    Kernels differ: before microsoft/onnxruntime#28467 one had the SwiGLU of a single model. A
    tiny model of random weights says what this one has, once a process.
    """
    import onnxruntime

    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    for unit in (True, False):
        try:
            error = _error(kind, unit)
        # Its exceptions share no base class but this one.
        except Exception as failure:
            return f"{runtime} does not run it: {str(failure).splitlines()[0]}"
        # Sums of some ten products in fp32 are right to about 1e-6 of the largest.
        if not error < 1e-5:
            return f"that of {runtime} gives other values for {kind.act}, off by {error:.2g}"
    return None


def _error(kind: Kind, unit: bool) -> float:
    """Return how far the kernel is from the op, as a share of the largest value.

    Values before the activation are spread by about 10, so that limits show.
    """
    import onnxruntime

    experts, chosen, width, neurons, tokens = 4, 2, 8, 6, 16
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    builder = GraphBuilder()

    def held(name: str, value: torch.Tensor) -> ir.Value:
        return builder.initializer(name, ir.tensor(value.contiguous().numpy(), name=name))

    total = experts * neurons
    x, down = 4 * random(1, tokens, width), random(width, total)
    up, up_bias = random(total, width), random(total) if kind.biased else None
    gate = random(total, width) if kind.gated else None
    gate_bias = random(total) if kind.gated and kind.biased else None
    best = random(1, tokens, experts).topk(chosen).indices
    gates = torch.zeros(1, tokens, experts).scatter(-1, best, 1.0)
    if not unit:
        gates = gates * (0.5 + torch.rand(gates.shape, generator=generator))

    def joined(own: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
        value = other if own is None else torch.stack([own, other], 1).flatten(0, 1)
        return value.unflatten(0, (experts, -1))

    made = Plan(kind, experts, chosen, unit, (), (), "")
    fused = Fused(
        made,
        held("first", joined(gate, up)),
        None if up_bias is None else held("bias", joined(gate_bias, up_bias)),
        held("last", down.unflatten(1, (experts, -1)).transpose(0, 1)),
    )
    single = ir.TensorType(ir.DataType.FLOAT)
    inputs = [
        ir.Value(name=name, shape=ir.Shape(["batch", "sequence", value.shape[-1]]), type=single)
        for name, value in (("x", x), ("gates", gates))
    ]
    # A computed value of sizes that are not known, whose memory may be taken for another: what a
    # model gives to the kernel.
    out = routed(builder, fused, builder.op("Neg", inputs[0]), inputs[1])
    out.type = single
    model = builder.model("moe", inputs, [out], {})
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what fails is said by the caller
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, settings, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": -x.numpy(), "gates": gates.numpy()})
    operands = [x, gates, up, down, gate, up_bias, gate_bias]
    wide = [None if value is None else value.double() for value in operands]
    (expected,) = get_op("experts").reference(wide, {"act": kind.act, "active": chosen})
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
