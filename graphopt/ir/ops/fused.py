"""Ops that lowering makes of several others, where one kernel or one product does their work.

`graphopt.lowering.torch.passes` makes them, for targets with kernels of them. Each has a function
of `graphopt.ir.functional` of the same name; an absent addend is None there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Count,
    Least,
    Number,
    Op,
    Tensors,
    Types,
    broadcast,
    get_op,
    need,
    optional,
    register,
)
from graphopt.ir.ops.experts import Activation, Experts, TopKGating
from graphopt.ir.types import Dim, Type, dim


def _type(types: Types, index: int) -> Type | None:
    return types[index] if index < len(types) else None


class _Fused(Op):
    fused = True


@register
class AddRmsNorm(_Fused):
    """total = x + y and its RMS norm: -> (total, rms_norm(total, weight))."""

    name = "add_rms_norm"
    operands = ("x", "y", "weight?")
    attributes = {"eps": Least, "offset": Number}  # noqa: RUF012
    defaults = {"offset": 0.0}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        (total,) = get_op("add").infer(types[:2], {})
        return [total, *get_op("rms_norm").infer([total, _type(types, 2)], attrs)]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        return dim(5 * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        (total,) = get_op("add").reference(tensors[:2], {})
        return (total, *get_op("rms_norm").reference([total, optional(tensors, 2)], attrs))

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, y = tensors[:2]
        assert x is not None and y is not None
        offset = attrs.get("offset", 0.0)
        return functional.add_rms_norm(x, y, optional(tensors, 2), attrs["eps"], offset)


@register
class NoAddend(_Fused):
    """y = 0, of the type of x: what is added to a stream that is whole already.

    A layer whose result is a sum hands its summands on, for the norm of the next one to add; one
    whose result is none hands this on as the second. Emitted models hand on None.
    """

    name = "no_addend"
    operands = ("x",)

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return [need(types, 0)]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        return 0

    def bytes(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        return 0

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (torch.zeros_like(x),)


@register
class ActMul(_Fused):
    """y = act(gate) up, elementwise with broadcasting; `act` is the name of an activation."""

    name = "act_mul"
    operands = ("gate", "up")
    attributes = {"act": Activation}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        gate, up = need(types, 0), need(types, 1)
        return [Type(broadcast(gate.shape, up.shape), torch.promote_types(gate.dtype, up.dtype))]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        gate = [need(types, 0)]
        return dim(get_op(attrs["act"]).flops(gate, gate, {}) + outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        gate, up = tensors
        assert gate is not None and up is not None
        return (get_op(attrs["act"]).reference([gate], {})[0] * up,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        gate, up = tensors
        assert gate is not None and up is not None
        return (functional.act_mul(gate, up, attrs["act"]),)


@register
class RopePair(_Fused):
    """`rope` of queries and keys by the same tables: -> (rope(q), rope(k)).

    With `q_right` and `k_right`, both or none, each is then transformed by its factor [D, D].
    """

    name = "rope_pair"
    operands = ("q", "k", "cos", "sin", "q_right?", "k_right?")
    attributes = {"interleaved": bool, "heads_first": bool}  # noqa: RUF012
    defaults = {"interleaved": False, "heads_first": True}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        rope, tables = get_op("rope"), [need(types, 2), need(types, 3)]
        turned = [kind for x in types[:2] for kind in rope.infer([x, *tables], attrs)]
        factors = [kind for kind in types[4:] if kind is not None]
        if len(factors) == 1:
            raise ValueError("rope_pair with a factor of queries or of keys alone")
        return [
            kind if place >= len(factors) else self._made(kind, factors[place])
            for place, kind in enumerate(turned)
        ]

    @staticmethod
    def _made(turned: Type, factor: Type) -> Type:
        if factor.shape[0] != turned.shape[-1]:
            raise ValueError(f"rope_pair of heads {turned} with a factor {factor}")
        return get_op("kronecker").infer([turned, None, factor], {})[0]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        rope, tables = get_op("rope"), types[2:4]
        one, other = (rope.flops([x, *tables], [], attrs) for x in types[:2])
        factors = [kind for kind in types[4:] if kind is not None]
        dense = sum(
            2 * need(types, place).numel * factor.shape[0] for place, factor in enumerate(factors)
        )
        return dim(one + other + dense)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k, *tables = tensors[:4]
        rope, kronecker = get_op("rope"), get_op("kronecker")
        turned = [y for x in (q, k) for y in rope.reference([x, *tables], attrs)]
        for place, factor in enumerate(tensors[4:]):
            if factor is not None:
                (turned[place],) = kronecker.reference([turned[place], None, factor], {})
        return tuple(turned)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k, cos, sin = tensors[:4]
        assert q is not None and k is not None and cos is not None and sin is not None
        factors = optional(tensors, 4), optional(tensors, 5)
        interleaved, first = attrs.get("interleaved", False), attrs.get("heads_first", True)
        return functional.rope_pair(q, k, cos, sin, *factors, interleaved, first)


@register
class FusedLinear(_Fused):
    """`linear` of one x with `parts` weights, as one product: -> one output a weight.

    `factors` are the weights [out_i, in], and behind them as many biases [out_i], or none.
    """

    name = "fused_linear"
    operands: ClassVar[tuple[str, ...]] = ("x", "factors*")
    attributes = {"parts": Count}  # noqa: RUF012

    @staticmethod
    def _each(types: Types, attrs: Attrs) -> list[list[Type]]:
        """Return the operands of every single product."""
        parts, factors = attrs["parts"], [need(types, i) for i in range(1, len(types))]
        if len(factors) not in (parts, 2 * parts):
            raise ValueError(f"fused_linear of {parts} parts with {len(factors)} factors")
        return [[need(types, 0), *factors[part::parts]] for part in range(parts)]

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        linear = get_op("linear")
        return [kind for each in self._each(types, attrs) for kind in linear.infer(each, {})]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        linear = get_op("linear")
        each = zip(self._each(types, attrs), outputs, strict=True)
        return dim(sum(linear.flops(operands, [output], {}) for operands, output in each))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, *factors = tensors
        linear, parts = get_op("linear"), attrs["parts"]
        return tuple(
            y for part in range(parts) for y in linear.reference([x, *factors[part::parts]], {})
        )

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, parts = tensors[0], attrs["parts"]
        factors = [factor for factor in tensors[1:] if factor is not None]
        assert x is not None
        weights, biases = factors[:parts], factors[parts:]
        product = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
        return tuple(product.split([len(weight) for weight in weights], -1))


_SHARED = ("shared_up", "shared_down", "shared_gate")
_SHARED_BIASES = ("shared_up_bias", "shared_gate_bias", "shared_down_bias")


@register
class Moe(_Fused):
    """`experts`, and beside them the feed-forward part that every token runs, if there is one.

    The shared part's `shared_up` and `shared_gate` are [M, in], `shared_down` is [out, M].
    """

    name = "moe"
    operands = (*Experts.operands, *(f"{name}?" for name in (*_SHARED, *_SHARED_BIASES)))
    encoded = _SHARED
    attributes = Experts.attributes
    defaults = Experts.defaults

    @staticmethod
    def _shared_types(types: Types) -> list[Type | None]:
        return [_type(types, index) for index in range(7, 13)]

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        routed = get_op("experts").infer(types[:7], attrs)
        up, down, gate, up_bias, gate_bias, down_bias = self._shared_types(types)
        if up is None or down is None:
            if any(kind is not None for kind in types[7:]):
                raise ValueError("moe with a shared part that lacks shared_up or shared_down")
            return routed
        linear, x = get_op("linear"), need(types, 0)
        hidden = linear.infer([x, up, up_bias], {})
        if gate is not None and linear.infer([x, gate, gate_bias], {}) != hidden:
            raise ValueError(f"moe with shared_up {up} and shared_gate {gate}")
        if linear.infer([*hidden, down, down_bias], {}) != routed:
            raise ValueError(f"moe with experts to {routed[0]} and shared_down {down}")
        return routed

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        total = get_op("experts").flops(types[:7], outputs, attrs)
        up, _, gate, *_ = self._shared_types(types)
        if up is None:
            return total
        x = need(types, 0)
        products = 2 * (1 + (gate is not None)) * x.shape[-1] + 2 * outputs[0].shape[-1]
        return dim(total + x.numel / x.shape[-1] * up.shape[0] * (products + 5))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        (routed,) = get_op("experts").reference(tensors[:7], attrs)
        up, down, gate, up_bias, gate_bias, down_bias = (
            optional(tensors, index) for index in range(7, 13)
        )
        if up is None:
            return (routed,)
        linear, act, x = get_op("linear"), get_op(attrs["act"]), tensors[0]
        (hidden,) = linear.reference([x, up, up_bias], {})
        if gate is None:
            (hidden,) = act.reference([hidden], {})
        else:
            hidden = act.reference(linear.reference([x, gate, gate_bias], {}), {})[0] * hidden
        return (linear.reference([hidden, down, down_bias], {})[0] + routed,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, gates, up, down = tensors[:4]
        assert x is not None and gates is not None and up is not None and down is not None
        rest = [optional(tensors, index) for index in range(4, 13)]
        act, active = attrs["act"], attrs["active"]
        return (functional.moe(x, gates, up, down, *rest, act=act, active=active),)


@register
class Route(_Fused):
    """`top_k_gating` of the router logits x weight^T + router_bias: x [..., in], weight [E, in]."""

    name = "route"
    operands = ("x", "weight", "router_bias?", "selection_bias?", "gate_scale?")
    encoded = ("weight",)
    attributes = TopKGating.attributes
    defaults = TopKGating.defaults

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        scores = get_op("linear").infer(types[:3], {})
        return get_op("top_k_gating").infer([*scores, *types[3:]], attrs)

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        product = get_op("linear").flops(types[:3], outputs, {})
        return dim(product + get_op("top_k_gating").flops([], outputs, attrs))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        scores = get_op("linear").reference(tensors[:3], {})
        return get_op("top_k_gating").reference([*scores, *tensors[3:]], attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        scores = get_op("linear").torch(tensors[:3], {})
        return get_op("top_k_gating").torch([*scores, *tensors[3:]], attrs)
