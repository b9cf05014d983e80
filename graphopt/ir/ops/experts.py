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
    register,
    same,
)
from graphopt.ir.types import Dim, Type, dim

Activation = Annotated[str, pydantic.Field(pattern=f"^({'|'.join(functional.ACTIVATIONS)})$")]
"""Type of the name of an activation."""


def _operand(tensors: Tensors, index: int) -> Tensor | None:
    return tensors[index] if index < len(tensors) else None


@register
class TopGates(Op):
    """The gates of the `count` experts with the highest scores [..., E]; the others' are 0.

    A chosen expert's gate is 1, or with `extra` [E] 1 + softmax(scores) extra. With `bias` [E]
    the highest of softmax(scores) + bias are chosen instead; it is in no gate. Equal scores go
    to the lowest index. Source: CMoE, arXiv 2502.04416, section 4.3.

    With `mean` a token chooses as many experts as have a score above 0, or score + bias; `mean`
    is how many these are on average, and `count` the number of all experts, which is how many
    they may be.

    A choice has no gradient. With `surrogate` the fast form gives the scores that of a soft
    choice in its place, which changes no value: sigmoid((score - edge) / spread), edge half way
    between the last chosen score and the next, or 0 with `mean`, spread the scores' standard
    deviation. Scores are here what is ranked, and no gradient of the soft choice is the bias's.

    With `balance` the fast form gives `bias` a gradient of its own, whatever the gates' one is:
    how many tokens more than the mean run each expert. With `mean` a form that learns chooses
    `mean` experts a token of those at hand, for else every gradient would ask for more; the
    gradient is the edge above which these lie, and taking it from the bias brings that to 0.
    """

    name = "top_gates"
    operands = ("scores", "bias?", "extra?")
    attributes = {"count": Count, "mean": Offset, "surrogate": bool, "balance": bool}  # noqa: RUF012
    defaults = {"mean": 0, "surrogate": False, "balance": False}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        scores = need(types, 0)
        experts = scores.shape[-1]
        for kind in types[1:]:
            if kind is not None and kind.shape != (experts,):
                raise ValueError(f"top_gates of {scores} with {kind}")
        if not 0 < attrs["count"] <= experts:
            raise ValueError(f"top_gates of {attrs['count']} of {experts} experts")
        if attrs.get("mean", 0) and not 0 < attrs["mean"] <= attrs["count"] == experts:
            raise ValueError(f"top_gates of {attrs['mean']} of {experts} experts on average")
        if attrs.get("balance") and (len(types) < 2 or types[1] is None):
            raise ValueError("top_gates cannot balance a choice without a bias")
        return [scores]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(6 * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        scores, bias, extra = tensors[0], _operand(tensors, 1), _operand(tensors, 2)
        assert scores is not None
        odds = (scores - scores.amax(-1, keepdim=True)).exp()
        odds = odds / odds.sum(-1, keepdim=True)
        if attrs.get("mean"):
            chosen = ((scores if bias is None else scores + bias) > 0).to(scores.dtype)
        else:
            ranked = scores if bias is None else odds + bias
            better = (ranked[..., None, :] > ranked[..., :, None]).sum(-1)
            equal = ranked[..., None, :] == ranked[..., :, None]
            earlier = equal.tril(-1).sum(-1)
            chosen = (better + earlier < attrs["count"]).to(scores.dtype)
        return (chosen if extra is None else chosen * (1 + odds * extra),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        scores = tensors[0]
        assert scores is not None
        bias, extra = _operand(tensors, 1), _operand(tensors, 2)
        count, mean = attrs["count"], attrs.get("mean", 0)
        pull: Tensor | None = None
        if attrs.get("balance") and mean and torch.is_grad_enabled():
            assert bias is not None
            pull = edge(scores.detach().float() + bias.detach(), mean).expand_as(bias)
        # The bias itself is moved by `pull`, and has no part in other gradients.
        moved = bias if pull is None or bias is None else bias.detach() - pull
        gates = functional.top_gates(scores, moved, extra, count=count, mean=mean)
        if attrs.get("surrogate") and (mean or count < scores.shape[-1]):
            ranked = scores.float()
            if moved is not None:
                ranked = (ranked if mean else ranked.softmax(-1)) + moved.detach()
            soft = soft_choice(ranked, count, mean).to(gates.dtype)
            gates = gates + (soft - soft.detach())
        if attrs.get("balance"):
            assert bias is not None
            if pull is None:
                load = (gates.detach() != 0).flatten(0, -2).sum(0).to(bias.dtype)
                pull = load - load.mean()
            gates = _balanced(gates, bias, pull)
        return (gates,)


def soft_choice(ranked: Tensor, count: int, mean: int = 0) -> Tensor:
    """Return the soft choice whose gradient stands for that of `top_gates`."""
    edge: Tensor | float = 0.0
    if not mean:
        order = ranked.detach().sort(dim=-1, descending=True).values
        edge = (order[..., count - 1 : count] + order[..., count : count + 1]) / 2
    spread = ranked.detach().std(-1, keepdim=True).clamp(min=1e-6)
    return ((ranked - edge) / spread).sigmoid()


def edge(ranked: Tensor, mean: int) -> Tensor:
    """Return the score, a scalar, above which `mean` experts a token lie, over all tokens.

    Args:
        ranked: [..., E]. Equal ones may make it fewer experts.
    """
    flat = ranked.flatten()
    below = len(flat) - mean * (len(flat) // ranked.shape[-1])
    return flat.kthvalue(below).values if below else flat.min() - 1


@torch.library.custom_op("graphopt::balanced", mutates_args=())
def _balanced(gates: Tensor, bias: Tensor, pull: Tensor) -> Tensor:
    """Return gates [..., E]; the gradient of `bias` [E] is `pull`, whatever comes from above.

    An operator of torch, because a step that is compiled is traced before it has gradients.
    """
    return gates.clone()


@_balanced.register_fake
def _(gates: Tensor, bias: Tensor, pull: Tensor) -> Tensor:
    return torch.empty_like(gates)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _pull(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    (pull,) = ctx.saved_tensors
    return gradient, pull, None


_balanced.register_autograd(_pull, setup_context=_keep)


@register
class Experts(Op):
    """The sum of experts by their gates [..., E]: sum_e g_e down_e (act(gate_e x) up_e x).

    The experts' neurons lie side by side: `gate` and `up` are [E m, in], `down` is [out, E m],
    and expert e is rows, or columns, e m to e m + m. Without `gate` a neuron is act(up x).
    `active` is how many gates of a token are not 0 at most; the cost is that of `mean` experts
    where there is a mean.
    Source: CMoE, arXiv 2502.04416, equation 1.
    """

    name = "experts"
    operands = ("x", "gates", "up", "down", "gate?", "up_bias?", "gate_bias?")
    attributes = {"act": Activation, "active": Count, "mean": Offset}  # noqa: RUF012
    defaults = {"mean": 0}  # noqa: RUF012

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
        width = int(up.shape[0]) // int(gates.shape[-1]) * (attrs.get("mean") or attrs["active"])
        gated = len(types) > 4 and types[4] is not None
        products = 2 * (1 + gated) * x.shape[-1] + 2 * down.shape[0]
        # An activation, the product with the other half, and the gate.
        return dim(tokens * width * (products + 4 + gated + 1))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, gates, up, down = tensors[:4]
        gate, up_bias, gate_bias = (_operand(tensors, index) for index in (4, 5, 6))
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
        rest = [_operand(tensors, index) for index in (4, 5, 6)]
        act = functional.ACTIVATIONS[attrs["act"]]
        return (functional.experts(x, gates, up, down, *rest, act=act),)
