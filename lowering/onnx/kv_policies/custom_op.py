"""Attention with a policy as one operator of the domain `graphopt`, with its body.

A runtime that has a kernel of that name may take it; any other runs the body, which is what
`attend` writes, prompts in standard operators too.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.kv_policies import KVHeads, KVPolicy
from graphopt.ir.types import B, P, S
from graphopt.lowering.onnx.builder import GRAPHOPT, OPSET, GraphBuilder
from graphopt.lowering.onnx.kv_policies.attend import Operands, attend
from graphopt.lowering.onnx.kv_policies.frame import Frame
from graphopt.lowering.onnx.kv_policies.scoring import Attention

LAYER = "layer"


def policy_op(
    name: str,
    policy: KVPolicy,
    heads: KVHeads,
    *,
    scale: float,
    softcap: float | None,
    with_sinks: bool,
) -> ir.Function:
    """Return `graphopt::NAME` of q, k, v, past_k, past_v, mask, sinks, state and weights.

    Its attribute `layer` is the number by which layers take turns in reading all keys; all else
    that the policy is made of is part of the body. It gives the output [B, S, H Dv], both caches
    and the state.
    """
    builder = GraphBuilder()

    def inputs(*names: str) -> list[ir.Value]:
        return [ir.Value(name=each) for each in names]

    q, k, v, past_k, past_v, mask = inputs("q", "k", "v", "past_key", "past_value", "mask")
    sinks = inputs("sinks") if with_sinks else []
    state = inputs(*(f"past_{part}" for part in policy.state_types(heads, 0, 0)))
    weights = inputs(*(part.replace(".", "_") for part in policy.weight_types(heads)))
    total, new = builder.op("Shape", mask, start=1), builder.op("Shape", q, start=2, end=3)
    builder.bind(B, builder.op("Shape", q, start=0, end=1))
    builder.bind(S, new)
    builder.bind(P + S, total)
    builder.bind(P, builder.op("Sub", total, new))
    attributes = []
    layer = builder.constant(0)
    if policy.calibrate_every is not None:
        attributes = [ir.Attr(LAYER, ir.AttributeType.INT, 0)]
        layer = builder.op("Constant", value_int=ir.RefAttr("value_int", LAYER, attributes[0].type))
    attention = Attention(heads, scale, softcap, sinks[0] if sinks else None)
    frame = Frame(builder, {}, mask, past_k, policy.budget.page)
    bias = frame.causal_bias()
    results = attend(
        frame, policy, attention, Operands(q, k, v, past_k, past_v, state, weights, layer),
        lambda keys, values: attention.of_prompt(frame, q, keys, values, bias),
    )  # fmt: skip
    graph = ir.Graph(
        [q, k, v, past_k, past_v, mask, *sinks, *state, *weights],
        results,
        nodes=[*_constants(builder), *builder.nodes],
        opset_imports={"": OPSET},
        name=name,
    )
    return ir.Function(GRAPHOPT, name, graph=graph, attributes=attributes)


def _constants(builder: GraphBuilder) -> Sequence[ir.Node]:
    """Return nodes in the place of initializers, which a function has none of."""
    nodes = []
    for value in builder.initializers.values():
        assert value.const_value is not None
        nodes.append(ir.node("Constant", [], {"value": value.const_value}, outputs=[value]))
    return nodes
