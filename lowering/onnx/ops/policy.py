"""Attention whose steps read the pages that a policy selects.

Letters: B batch, G key heads, H query heads, S new tokens, R slots of a cache, D head size.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.ir.kv_policies import KVHeads, KVPolicy
from graphopt.ir.ops.attention import KEY, MASK, PAST_K, PAST_V, QUERY, SINKS, VALUE
from graphopt.ir.ops.policy_attention import STATE
from graphopt.lowering.onnx.kv_policies.attend import Operands, attend
from graphopt.lowering.onnx.kv_policies.custom_op import LAYER, policy_op
from graphopt.lowering.onnx.kv_policies.frame import Frame
from graphopt.lowering.onnx.kv_policies.scoring import Attention
from graphopt.lowering.onnx.ops.attention import (
    attention_bias,
    fits_group_query,
    group_query,
    lengths,
    padding_mask,
    several_rows_continue,
)
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, translation


@translation("policy_attention")
def policy_attention(lower: Lowering, node: Node) -> list[Lowered]:
    builder, attrs = lower.builder, lower.attrs(node)
    policy: KVPolicy = attrs["policy"]
    q, k, v, past_k, past_v = (
        lower.whole(node.inputs[place]) for place in (QUERY, KEY, VALUE, PAST_K, PAST_V)
    )
    types = [lower.types[node.inputs[place]] for place in (QUERY, KEY, VALUE)]  # type: ignore[index]
    key_heads, query_heads = int(types[1].shape[1]), int(types[0].shape[1])
    heads = KVHeads(key_heads, query_heads, int(types[1].shape[3]), int(types[2].shape[3]))
    count = len(policy.state_types(heads, 0, 0))
    own = [lower.whole(value) for value in node.inputs[STATE:]]
    state, weights = own[:count], own[count:]
    mask = padding_mask(lower, node.operand(MASK))
    sinks = None if node.operand(SINKS) is None else lower.whole(node.operand(SINKS))
    attention = Attention(heads, attrs["scale"], attrs.get("softcap"), sinks)
    layer = int(attrs.get("layer", 0))
    if lower.shared.get("policy_op"):
        function = _function(lower, policy, attention)
        operands = [q, k, v, past_k, past_v, mask, *([] if sinks is None else [sinks]), *own]
        turn = {} if policy.calibrate_every is None else {LAYER: layer}
        made = builder.call(function, *operands, outputs=3 + count, **turn)
    else:
        frame = Frame.of(builder, lower.shared, mask, past_k, policy.budget.page)
        given = Operands(q, k, v, past_k, past_v, state, weights, builder.constant(layer))
        bias = frame.causal_bias()
        several = several_rows_continue(lower)
        if fits_group_query(lower, node):
            # What the fused operator takes, and shares with attentions without a policy.
            seen = attention_bias(lower, node.operand(MASK), None, True, None, None)
            lengths(lower)
            flat_q, flat_k, flat_v = (
                lower.heads(node.inputs[place]) for place in (QUERY, KEY, VALUE)
            )

            def prompt(keys: ir.Value, values: ir.Value) -> ir.Value:
                with builder.branch("continue") as plain:
                    plain.results = [attention.of_prompt(frame, q, keys, values, bias)]
                with builder.branch("fused") as fused:
                    fused.results = group_query(lower, node, flat_q, flat_k, flat_v, seen)[:1]
                return builder.op(  # type: ignore[no-any-return]
                    "If", several, then_branch=plain.graph(), else_branch=fused.graph()
                )
        else:

            def prompt(keys: ir.Value, values: ir.Value) -> ir.Value:
                return attention.of_prompt(frame, q, keys, values, bias)

        made = attend(frame, policy, attention, given, prompt)
    out, *rest = made
    return [Heads(out, heads.query_heads, heads.v_dim, True), *rest]


def _function(lower: Lowering, policy: KVPolicy, attention: Attention) -> ir.Function:
    """Return the operator of a policy; one for all layers that have it alike."""
    with_sinks = attention.sinks is not None
    key = ("policy op", policy, attention.heads, attention.scale, attention.softcap, with_sinks)
    if key not in lower.shared:
        stem = "".join(word.capitalize() for word in policy.kind.split("-")) + "Attention"
        name, number = stem, 1
        while name in lower.builder.functions:
            number += 1
            name = f"{stem}{number}"
        lower.shared[key] = policy_op(
            name, policy, attention.heads,
            scale=attention.scale, softcap=attention.softcap, with_sinks=with_sinks,
        )  # fmt: skip
    made: ir.Function = lower.shared[key]
    return made
