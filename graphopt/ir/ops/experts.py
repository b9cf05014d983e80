"""Feed-forward parts of which every token runs some: gates of experts, and the experts."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Count,
    Offset,
    Op,
    Tensors,
    Types,
    get_op,
    need,
    optional,
    register,
    same,
)
from graphopt.ir.types import Dim, Type, dim

Activation = Annotated[str, pydantic.Field(pattern=f"^({'|'.join(functional.ACTIVATIONS)})$")]
"""Type of the name of an activation."""


@register
class TopKGating(Op):
    """The gates of the `top_k` experts with the highest router logits [..., E]; others' are 0.

    A chosen expert's gate is 1, or with `gate_scale` [E] 1 + softmax(router_logits) gate_scale.
    With `selection_bias` [E] the highest of softmax(router_logits) + selection_bias are chosen
    instead; it is in no gate. Of equal ones the lowest index is chosen. Source: CMoE, arXiv
    2502.04416, section 4.3.

    With `mean_active_experts` a token chooses as many experts as have a router logit, or router
    logit + selection_bias, above 0; `mean_active_experts` is how many these are on average, and
    `top_k` the number of all experts, which is how many they may be.

    A choice has no gradient. With `surrogate` the fast form gives the router logits that of a
    soft choice in its place, which changes no value: sigmoid((logit - threshold) / spread), the
    threshold half way between the last chosen logit and the next, or 0 with
    `mean_active_experts`, spread the logits' standard deviation. A logit is here what is ranked,
    and no gradient of the soft choice is the selection bias's.

    With `balance` the fast form gives `selection_bias` a gradient of its own, whatever the gates'
    one is: how many tokens more than the mean run each expert. With `mean_active_experts` a form
    that learns chooses this many experts a token of those at hand, for else every gradient would
    ask for more; the gradient is the routing threshold above which these lie, and taking it from
    the selection bias brings that to 0.
    """

    name = "top_k_gating"
    operands = ("router_logits", "selection_bias?", "gate_scale?")
    attributes = {  # noqa: RUF012
        "top_k": Count, "mean_active_experts": Offset, "surrogate": bool, "balance": bool
    }  # fmt: skip
    defaults = {"mean_active_experts": 0, "surrogate": False, "balance": False}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        router_logits = need(types, 0)
        experts = router_logits.shape[-1]
        for kind in types[1:]:
            if kind is not None and kind.shape != (experts,):
                raise ValueError(f"top_k_gating of {router_logits} with {kind}")
        if not 0 < attrs["top_k"] <= experts:
            raise ValueError(f"top_k_gating of {attrs['top_k']} of {experts} experts")
        mean = attrs.get("mean_active_experts", 0)
        if mean and not 0 < mean <= attrs["top_k"] == experts:
            raise ValueError(f"top_k_gating of {mean} of {experts} experts on average")
        if attrs.get("balance") and (len(types) < 2 or types[1] is None):
            raise ValueError("top_k_gating cannot balance a choice without a selection bias")
        return [router_logits]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(6 * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        router_logits = tensors[0]
        selection_bias, gate_scale = optional(tensors, 1), optional(tensors, 2)
        assert router_logits is not None
        probabilities = (router_logits - router_logits.amax(-1, keepdim=True)).exp()
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        if attrs.get("mean_active_experts"):
            ranked = router_logits if selection_bias is None else router_logits + selection_bias
            chosen = (ranked > 0).to(router_logits.dtype)
        else:
            ranked = router_logits if selection_bias is None else probabilities + selection_bias
            better = (ranked[..., None, :] > ranked[..., :, None]).sum(-1)
            equal = ranked[..., None, :] == ranked[..., :, None]
            earlier = equal.tril(-1).sum(-1)
            chosen = (better + earlier < attrs["top_k"]).to(router_logits.dtype)
        return (chosen if gate_scale is None else chosen * (1 + probabilities * gate_scale),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        router_logits = tensors[0]
        assert router_logits is not None
        selection_bias, gate_scale = optional(tensors, 1), optional(tensors, 2)
        top_k, mean = attrs["top_k"], attrs.get("mean_active_experts", 0)
        excess: Tensor | None = None
        if attrs.get("balance") and mean and torch.is_grad_enabled():
            assert selection_bias is not None
            ranked = router_logits.detach().float() + selection_bias.detach()
            excess = routing_threshold(ranked, mean).expand_as(selection_bias)
        # The selection bias itself is moved by `excess`, and has no part in other gradients.
        moved = selection_bias
        if excess is not None and selection_bias is not None:
            moved = selection_bias.detach() - excess
        gates = functional.top_k_gating(
            router_logits, moved, gate_scale, top_k=top_k, mean_active_experts=mean
        )
        if attrs.get("surrogate") and (mean or top_k < router_logits.shape[-1]):
            ranked = router_logits.float()
            if moved is not None:
                ranked = (ranked if mean else ranked.softmax(-1)) + moved.detach()
            soft = soft_choice(ranked, top_k, mean).to(gates.dtype)
            gates = gates + (soft - soft.detach())
        if attrs.get("balance"):
            assert selection_bias is not None
            if excess is None:
                load = (gates.detach() != 0).flatten(0, -2).sum(0).to(selection_bias.dtype)
                excess = load - load.mean()
            gates = _balanced(gates, selection_bias, excess)
        return (gates,)


def soft_choice(ranked: Tensor, count: int, mean: int = 0) -> Tensor:
    """Return the soft choice whose gradient stands for that of `top_k_gating`."""
    threshold: Tensor | float = 0.0
    if not mean:
        order = ranked.detach().sort(dim=-1, descending=True).values
        threshold = (order[..., count - 1 : count] + order[..., count : count + 1]) / 2
    spread = ranked.detach().std(-1, keepdim=True).clamp(min=1e-6)
    return ((ranked - threshold) / spread).sigmoid()


def routing_threshold(ranked: Tensor, mean: int) -> Tensor:
    """Return the router logit, a scalar, above which `mean` experts a token lie, over all tokens.

    It is halfway between the highest logit below it and the lowest above, so that no token lies
    within rounding of it: on the same tokens another order of adding up chooses the same experts.

    Args:
        ranked: [..., E]. Equal ones may make it fewer experts.
    """
    flat = ranked.flatten()
    below = len(flat) - mean * (len(flat) // ranked.shape[-1])
    if not below:
        return flat.min() - 1
    under = flat.kthvalue(below).values
    over = torch.where(flat > under, flat, torch.inf).min()
    halfway = under + (over - under) / 2
    # Neighbours in a dtype have nothing between them, and the highest has nothing above it.
    return torch.where(halfway < over, halfway, under)


@torch.library.custom_op("graphopt::balanced", mutates_args=())
def _balanced(gates: Tensor, bias: Tensor, excess: Tensor) -> Tensor:
    """Return gates [..., E]; the gradient of `bias` [E] is `excess`, whatever comes from above.

    An operator of torch, because a step that is compiled is traced before it has gradients.
    """
    return gates.clone()


@_balanced.register_fake
def _(gates: Tensor, bias: Tensor, excess: Tensor) -> Tensor:
    return torch.empty_like(gates)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _excess(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    (excess,) = ctx.saved_tensors
    return gradient, excess, None


_balanced.register_autograd(_excess, setup_context=_keep)


@register
class Experts(Op):
    """The sum of experts by their gates [..., E]: sum_e g_e down_e (act(gate_e x) up_e x).

    The experts' neurons lie side by side: `gate` and `up` are [E m, in], `down` is [out, E m],
    and expert e is rows, or columns, e m to e m + m. Without `gate` a neuron is act(up x).
    `active` is how many gates of a token are not 0 at most; the cost is that of
    `mean_active_experts` where they are given.
    Source: CMoE, arXiv 2502.04416, equation 1.
    """

    name = "experts"
    operands = ("x", "gates", "up", "down", "gate?", "up_bias?", "gate_bias?")
    attributes = {"act": Activation, "active": Count, "mean_active_experts": Offset}  # noqa: RUF012
    defaults = {"mean_active_experts": 0}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, gates, up, down = (need(types, index) for index in range(4))
        count = gates.shape[-1]
        neurons = up.shape[0]
        if len(up.shape) != 2 or len(down.shape) != 2 or not same(up.shape[1], x.shape[-1]):
            raise ValueError(f"experts of {x} with {up} and {down}")
        if not same(down.shape[1], neurons) or int(neurons) % int(count):
            raise ValueError(f"{count} experts of {neurons} neurons with {down}")
        for index, shape in ((4, up.shape), (5, (neurons,)), (6, (neurons,))):
            kind = types[index] if index < len(types) else None
            if kind is not None and kind.shape != shape:
                raise ValueError(f"experts with {up} and {kind}")
        if not 0 < attrs["active"] <= count:
            raise ValueError(f"{attrs['active']} of {count} experts active")
        return [Type((*x.shape[:-1], down.shape[0]), x.dtype)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        x, gates, up, down = (need(types, index) for index in range(4))
        tokens = dim(x.numel / x.shape[-1])
        active = attrs.get("mean_active_experts") or attrs["active"]
        width = int(up.shape[0]) // int(gates.shape[-1]) * active
        gated = len(types) > 4 and types[4] is not None
        products = 2 * (1 + gated) * x.shape[-1] + 2 * down.shape[0]
        # An activation, the product with the other half, and the gate.
        return dim(tokens * width * (products + 4 + gated + 1))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, gates, up, down = tensors[:4]
        gate, up_bias, gate_bias = (optional(tensors, index) for index in (4, 5, 6))
        assert x is not None and gates is not None and up is not None and down is not None
        act = get_op(attrs["act"])
        count = gates.shape[-1]
        size = up.shape[0] // count
        total = x.new_zeros(*x.shape[:-1], down.shape[0])
        for number in range(count):
            rows = slice(number * size, (number + 1) * size)
            first = x @ (up if gate is None else gate)[rows].t()
            bias = up_bias if gate is None else gate_bias
            hidden = act.reference([first if bias is None else first + bias[rows]], {})[0]
            if gate is not None:
                other = x @ up[rows].t()
                hidden = hidden * (other if up_bias is None else other + up_bias[rows])
            total = total + gates[..., number, None] * (hidden @ down[:, rows].t())
        return (total,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, gates, up, down = tensors[:4]
        assert x is not None and gates is not None and up is not None and down is not None
        rest = [optional(tensors, index) for index in (4, 5, 6)]
        act = functional.ACTIVATIONS[attrs["act"]]
        return (functional.experts(x, gates, up, down, *rest, act=act),)
