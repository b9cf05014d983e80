"""Attention that reads what a policy of its KV cache selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pydantic
import sympy
import torch
from torch import Tensor

from graphopt.ir.kv import policy_types
from graphopt.ir.kv_policies import Filled, KVHeads, KVPolicy, Scoring, State, page_probabilities
from graphopt.ir.ops.attention import (
    BIAS,
    KEY,
    MASK,
    PAST_K,
    PAST_V,
    QUERY,
    SELECTED,
    SINKS,
    SLOPES,
    VALUE,
    Attention,
)
from graphopt.ir.ops.base import (
    Attrs,
    Number,
    Offset,
    Op,
    Positive,
    Tensors,
    Types,
    need,
    optional,
    register,
    same,
)
from graphopt.ir.policy_attention import policy_attention
from graphopt.ir.types import Dim, Type, dim

STATE = SELECTED
"""Where the policy's state begins among the operands; behind it come the policy's weights."""


@register
class PolicyAttention(Op):
    """Causal attention of which a step of one token reads the pages that a policy selects.

    Operands: those of `attention` up to `past_v`, bias and slopes absent, a past and a policy
    given; then what the policy remembers, in the order of `KVPolicy.state_types`, and its weights,
    in that of `KVPolicy.weight_types`.
    Outputs: o [B,H,S,Dv]; present_k, present_v; and the policy's state after the step.
    Several new tokens, or one that nothing comes before, see all keys, and the state is made anew
    (`init`). One token on a past sees the keys in M pages for each key head (`select`), and its
    scores are what the policy learns from (`observe`). In a step that is due, it sees all keys
    (`calibrate`); layers take turns in that by the attribute `layer`.
    """

    name = "policy_attention"
    operands = (
        "q", "k", "v", "mask?", "bias?", "slopes?", "sinks?", "past_k?", "past_v?", "state*",
    )  # fmt: skip
    attributes = {  # noqa: RUF012
        "scale": Number, "causal": bool, "softcap": Positive | None,
        "policy": pydantic.InstanceOf[KVPolicy], "layer": Offset,
    }  # fmt: skip
    defaults: ClassVar[Attrs] = {"softcap": None, "layer": 0}

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        q, k, v = need(types, QUERY), need(types, KEY), need(types, VALUE)
        past = types[PAST_K] if len(types) > PAST_V else None
        if past is None or not attrs["causal"]:
            raise ValueError("policy_attention: it is causal and has a past")
        if types[BIAS] is not None or types[SLOPES] is not None:
            raise ValueError("policy_attention: policies do not know of biases and slopes")
        dense = _ATTENTION.infer(types[:STATE], _dense_attrs(attrs))
        policy, heads = attrs["policy"], _heads(q, k, v)
        before = policy_types(policy, heads, q.shape[0], past.shape[2])
        after = policy_types(policy, heads, q.shape[0], dense[1].shape[2])
        weights = {
            name: Type(tuple(shape), dtype)
            for name, (shape, dtype) in policy.weight_types(heads).items()
        }
        given = types[STATE:]
        wanted = {**before, **weights}
        if len(given) != len(wanted):
            raise ValueError(
                f"policy_attention: {len(given)} tensors of the policy's, where {policy.kind} has "
                f"{', '.join(wanted) or 'none'}"
            )
        for (name, kind), found in zip(wanted.items(), given, strict=True):
            assert found is not None
            alike = len(kind.shape) == len(found.shape) and all(map(same, kind.shape, found.shape))
            if not alike or (name in before and kind.dtype != found.dtype):
                raise ValueError(
                    f"policy_attention: {name} is {found}, and {policy.kind} has {kind}"
                )
        return [*dense, *after.values()]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return _ATTENTION.flops(types[:STATE], outputs[:3], _dense_attrs(attrs))

    def bytes(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        """Return what a step moves: listed pages of keys and values, and the state twice."""
        moved = _ATTENTION.bytes(_step_types(types, attrs), outputs[:3], _step_attrs(attrs))
        state = [kind for kind in (*types[STATE:], *outputs[3:]) if kind is not None]
        return dim(sympy.sympify(moved) + sum(sympy.sympify(kind.bytes) for kind in state))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k = tensors[QUERY], tensors[KEY]
        past = optional(tensors, PAST_K)
        assert q is not None and k is not None and past is not None
        attention, policy, state = _ATTENTION.reference, *_with_state(tensors, attrs)
        mask, groups, page = optional(tensors, MASK), k.shape[1], policy.budget.page
        scoring = Scoring(attrs["scale"], attrs.get("softcap"), optional(tensors, SINKS))
        plain = _dense_attrs(attrs)
        observed = {**plain, "lse": True, "page_max": page}
        if q.shape[2] > 1 or past.shape[2] == 0:
            out, keys, values = attention(tensors[:STATE], plain)
            last = q[:, :, q.shape[2] - min(policy.history, q.shape[2]) :]
            left = policy.init(last, keys, values, mask, scoring)
            return out, keys, values, *_in_order(left, tensors, attrs)
        due = policy.due(state, attrs.get("layer", 0))
        if due is not None and bool(due.any()):
            out, keys, values, lse, maxima = attention(tensors[:STATE], observed)
            lengths = Filled.all_of(keys) if mask is None else Filled.of_mask(mask)
            probabilities = page_probabilities(maxima, lse, groups)[:, :, 0]
            left = policy.calibrate(state, probabilities, k, lengths)
            return out, keys, values, *_in_order(left, tensors, attrs)
        _, keys, values = attention(tensors[:STATE], plain)
        lengths = Filled.all_of(keys) if mask is None else Filled.of_mask(mask)
        selected = policy.select(state, q, keys, lengths, scoring)
        out, keys, values, lse, maxima = attention(
            [*tensors[:STATE], selected], {**observed, "page": page}
        )
        probabilities = page_probabilities(maxima, lse, groups)[:, :, 0]
        left = policy.observe(state, selected, probabilities, k, lengths)
        return out, keys, values, *_in_order(left, tensors, attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k, v = tensors[QUERY], tensors[KEY], tensors[VALUE]
        past_k, past_v = optional(tensors, PAST_K), optional(tensors, PAST_V)
        assert q is not None and k is not None and v is not None
        assert past_k is not None and past_v is not None
        policy, state = _with_state(tensors, attrs)
        out, present, left = policy_attention(
            q, k, v, (past_k, past_v), state, optional(tensors, MASK), optional(tensors, SINKS),
            policy=policy, layer=attrs.get("layer", 0),
            scale=attrs["scale"], softcap=attrs.get("softcap"),
        )  # fmt: skip
        return out, *present, *_in_order(left, tensors, attrs)


_ATTENTION = Attention()


def _heads(q: Type, k: Type, v: Type) -> KVHeads:
    key_heads, query_heads = int(k.shape[1]), int(q.shape[1])
    return KVHeads(key_heads, query_heads, int(k.shape[3]), int(v.shape[3]), k.dtype)


def _sizes(tensors: Tensors) -> KVHeads:
    q, k, v = tensors[QUERY], tensors[KEY], tensors[VALUE]
    assert q is not None and k is not None and v is not None
    return KVHeads(k.shape[1], q.shape[1], k.shape[3], v.shape[3], k.dtype)


def _in_order(state: State, tensors: Tensors, attrs: Attrs) -> list[Tensor]:
    """Return the tensors of a state in the order of their types."""
    return [state[name] for name in attrs["policy"].state_types(_sizes(tensors), 0, 0)]


def _with_state(tensors: Tensors, attrs: Attrs) -> tuple[KVPolicy, State]:
    """Return the policy with its weights, and its state by name."""
    policy: KVPolicy = attrs["policy"]
    heads = _sizes(tensors)
    names = [*policy.state_types(heads, 0, 0)]
    given = [tensor for tensor in tensors[STATE:] if tensor is not None]
    state = dict(zip(names, given, strict=False))
    weights = dict(zip(policy.weight_types(heads), given[len(names) :], strict=True))
    return policy.with_weights(weights) if weights else policy, state


def _dense_attrs(attrs: Attrs) -> dict[str, Any]:
    """Return the attributes of the attention that reads all keys."""
    return {key: attrs.get(key) for key in ("scale", "causal", "softcap")}


def _step_attrs(attrs: Attrs) -> dict[str, Any]:
    return {**_dense_attrs(attrs), "page": attrs["policy"].budget.page}


def _step_types(types: Types, attrs: Attrs) -> list[Type | None]:
    """Return the operands of the attention that reads selected pages."""
    k, pages = need(types, KEY), attrs["policy"].budget.pages
    return [*types[:STATE], Type((k.shape[0], k.shape[1], pages), torch.int64)]
