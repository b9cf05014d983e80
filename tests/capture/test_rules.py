"""Each rule of capture on a small graph that it raises and on small graphs that it must leave.

A rule that stops matching fails here, whatever the families that need it are called. What is
raised computes what it did: both are evaluated in fp64.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt.capture
from graphopt.capture import capture
from graphopt.capture.activations import raise_activations
from graphopt.capture.attention import raise_attention
from graphopt.capture.canonical import canonicalise
from graphopt.capture.export import export_layer
from graphopt.capture.layout_ops import raise_layout_ops
from graphopt.capture.linears import raise_linears, sink_reshape_below_linear
from graphopt.capture.norms import raise_norms
from graphopt.capture.rewriting import Raiser
from graphopt.capture.slots import SlotSources
from graphopt.ir import Array
from graphopt.ir.types import B, S, Type

SIZES = {B: 2, S: 3}


@dataclass
class Traced:
    """What `export_layer` asks of a call: a module, and how it is run."""

    module: nn.Module
    path: str = "the rule's graph"

    def run(self, inner: nn.Module, tensors: tuple[Tensor, ...]) -> Any:
        return inner(*tensors)


class Weights(nn.Module):
    """A function of x and of parameters."""

    def __init__(self, compute: Any, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )
        self.compute = compute

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self.compute(*tensors, *self.weights)
        return result


X = (B, S, 6)
HEADS = (B, 4, S, 8)


def norms(raiser: Raiser, slots: SlotSources) -> None:
    raise_norms(raiser)


def activations(raiser: Raiser, slots: SlotSources) -> None:
    raise_activations(raiser)


def flattening(raiser: Raiser, slots: SlotSources) -> None:
    raise_linears(raiser, slots)
    sink_reshape_below_linear(raiser)
    raise_layout_ops(raiser, slots)


def attention(raiser: Raiser, slots: SlotSources) -> None:
    raise_activations(raiser)
    raise_layout_ops(raiser, slots)
    raised, _ = raise_attention(raiser)
    assert all(not item.terms for item in raised)
    raiser.sweep()


def canonical(raiser: Raiser, slots: SlotSources) -> None:
    """What `traced` does already."""


def without_absent_experts(scores: Tensor, experts: int) -> Tensor:
    """Rows in the order of their experts, without those of experts that are not there."""
    chosen = torch.topk(scores, 2, dim=-1)
    ids, order = chosen.indices.reshape(-1).sort()
    rows = chosen.values.reshape(-1)[order]
    return rows.unsqueeze(-1).masked_fill((ids >= experts).unsqueeze(-1), 0.0)


def tables_of_chosen(scores: Tensor, table: Tensor, largest: int) -> Tensor:
    """Rows of a table by the experts of a top-k, which are clamped first."""
    ids, _ = torch.topk(scores, 2, dim=-1).indices.reshape(-1).sort()
    return table[ids.clamp(0, largest)]


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centred(x: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v


RAISED = {
    "linear, of a transpose": (raise_linears, lambda x, w: x @ w.t(), [X], [(5, 6)], ["linear"]),
    "linear, of a weight as it is": (raise_linears, lambda x, w: x @ w, [X], [(6, 5)], ["linear"]),
    "linear, and its bias": (
        raise_linears, lambda x, w, b: b + x @ w.t(), [X], [(5, 6), (5,)], ["linear"],
    ),
    "rms_norm": (norms, rms, [X], [], ["rms_norm"]),
    "rms_norm, with a gain": (norms, lambda x, w: w * rms(x), [X], [(6,)], ["rms_norm"]),
    "rms_norm, with an offset": (norms, lambda x, w: rms(x) * (1 + w), [X], [(6,)], ["rms_norm"]),
    "layer_norm": (
        norms, lambda x, w, b: centred(x) * w + b, [X], [(6,), (6,)], ["layer_norm"],
    ),
    "silu": (activations, lambda x: x * torch.sigmoid(x), [X], [], ["silu"]),
    "softcap": (activations, lambda x: torch.tanh(x / 30.0) * 30.0, [X], [], ["softcap"]),
    "scale": (activations, lambda x: x * 6.0 / 2.0, [X], [], ["scale"]),
    "flattened tokens": (
        flattening, lambda x, w: (x.reshape(-1, 6) @ w.t()).reshape(*x.shape[:2], 5),
        [X], [(5, 6)], ["linear"],
    ),
    "split_heads": (
        raise_layout_ops, lambda x: x.view(*x.shape[:2], 3, 2).transpose(1, 2),
        [X], [], ["split_heads"],
    ),
    "merge_heads": (
        raise_layout_ops,
        lambda x: x.permute(0, 2, 1, 3).reshape(*x.shape[:1], -1, 32),
        [HEADS], [], ["merge_heads"],
    ),
    "transpose_heads": (
        raise_layout_ops, lambda x: x.permute(0, 2, 1, 3), [HEADS], [],
        ["transpose_heads"],
    ),
    "layout ops that undo each other": (
        raise_layout_ops, lambda x: x.transpose(1, 2).transpose(1, 2) + x,
        [HEADS], [], ["add"],
    ),
    "attention, of torch": (
        attention, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [HEADS] * 3, [], ["attention"],
    ),
    "a mask of ids that top-k cannot give": (
        canonical, lambda x: without_absent_experts(x, 6), [X], [],
        ["aten.topk.default", "aten.reshape.default", "aten.sort.default", "aten.reshape.default",
         "aten.index.Tensor", "aten.unsqueeze.default"],
    ),
    "attention, written out": (attention, eager, [HEADS] * 3, [], ["attention"]),
}  # fmt: skip
LEFT = {
    "a product of two tensors": (raise_linears, lambda x, y: x @ y.transpose(-1, -2), [X, X], []),
    "a weight times a tensor": (raise_linears, lambda x, w: w @ x.transpose(-1, -2), [X], [(5, 6)]),
    "a norm by the sum of squares": (
        norms, lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5), [X], [],
    ),
    "a norm over tokens": (
        norms, lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), [X], [],
    ),
    "a norm by the mean of magnitudes": (
        norms, lambda x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-5), [X], [],
    ),
    "nearly silu": (activations, lambda x: x * torch.sigmoid(1.001 * x), [X], []),
    "a sum that is not linear": (activations, lambda x: torch.exp(x) + x, [X], []),
    "tokens that are mixed": (
        flattening, lambda x, w: (x.reshape(-1, 6).flip(0) @ w.t()).reshape(*x.shape[:2], 5),
        [X], [(5, 6)],
    ),
    "features in another order": (
        raise_layout_ops, lambda x: x.flip(-1), [X], [],
    ),
    "tokens in another order": (raise_layout_ops, lambda x: x.flip(1), [X], []),
    "a softmax of something else": (attention, lambda x: torch.softmax(x, -1) * x, [X], []),
    "a softmax over queries": (
        attention, lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -2) @ v, [HEADS] * 3, [],
    ),
}  # fmt: skip
# Ops of which one is what a graph of LEFT must not get.
NEVER = {
    raise_linears: {"linear"},
    norms: {"rms_norm", "layer_norm"},
    activations: {"silu", "quick_gelu", "gelu", "gelu_tanh", "softcap"},
    attention: {"attention"},
    raise_layout_ops: {"split_heads", "merge_heads", "transpose_heads"},
}


def traced(compute: Any, shapes: list[Any], weights: list[Any]) -> tuple[Raiser, SlotSources]:
    call = Traced(Weights(compute, *weights).eval())
    exported = export_layer(call, [Type(shape, torch.float32) for shape in shapes])  # type: ignore[arg-type]
    raiser = Raiser(exported.function, exported.types, exported.constants, call.path)
    canonicalise(raiser)
    return raiser, SlotSources()


def results(raiser: Raiser, slots: SlotSources) -> list[Tensor]:
    """Return what the function computes in fp64, of random inputs and weights by their names."""
    values: dict[Any, Tensor] = {}
    own = {}
    for number, (slot, value) in enumerate(sorted(raiser.function.weights.items())):
        if slot not in slots.derived and slot not in raiser.constants:
            generator = torch.Generator().manual_seed(number + 10)
            own[slot] = values[value] = raiser.random(value, SIZES, generator)
    for slot, value in raiser.function.weights.items():
        if slot in slots.derived:
            producer = slots.producer(slot, lambda origin: Array(own[origin]))
            values[value] = producer.load()
    for number, value in enumerate(raiser.function.params):
        values[value] = raiser.random(value, SIZES, torch.Generator().manual_seed(number))
    return raiser.evaluate(raiser.function.results, values, SIZES)


@pytest.mark.parametrize("name", RAISED)
def test_a_rule_raises_its_graph(name: str) -> None:
    rule, compute, shapes, weights, expected = RAISED[name]
    raiser, slots = traced(compute, shapes, weights)
    before = results(raiser, slots)
    rule(raiser, slots)
    assert [node.op for node in raiser.function.nodes] == expected
    for old, new in zip(before, results(raiser, slots), strict=True):
        # Formulas agree to the digits in which the source wrote its constants; see `proves`.
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEFT)
def test_a_rule_leaves_what_is_nearly_its_graph(name: str) -> None:
    rule, compute, shapes, weights = LEFT[name]
    raiser, slots = traced(compute, shapes, weights)
    before = results(raiser, slots)
    rule(raiser, slots)
    ops = {node.op for node in raiser.function.nodes}
    assert not ops & NEVER.get(rule, set())
    assert ops
    for old, new in zip(before, results(raiser, slots), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


def test_a_mask_of_ids_that_top_k_can_give_is_left() -> None:
    raiser, _ = traced(lambda x: without_absent_experts(x, 5), [X], [])
    assert "aten.masked_fill.Scalar" in {node.op for node in raiser.function.nodes}


@pytest.mark.parametrize(("largest", "left"), [(5, False), (4, True)])
def test_a_clamp_goes_that_no_id_of_a_top_k_reaches(largest: int, left: bool) -> None:
    raiser, _ = traced(lambda x, w: tables_of_chosen(x, w, largest), [X], [(6, 5)])
    ops = {node.op for node in raiser.function.nodes}
    assert ("aten.clamp.default" in ops) is left, ops


class Positions(nn.Module):
    """A language model with a table of positions, and layers of no interest."""

    def __init__(self, stretch: int) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(12, 8), nn.Embedding(64, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head, self.stretch = nn.Linear(8, 12), stretch

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        places = (attention_mask.cumsum(-1) * attention_mask - 1) * self.stretch + 2
        x = self.embed(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(x * attention_mask[..., None].to(x.dtype) + 0 * position_ids[..., None])


@pytest.mark.slow
@pytest.mark.parametrize(("stretch", "raised"), [(1, True), (2, False)])
def test_learned_positions_are_raised_where_they_count_tokens(stretch: int, raised: bool) -> None:
    program = capture(Positions(stretch).eval())
    tables = [
        node
        for call in program.calls
        for node in program.functions[call.function].nodes
        if node.op == "embedding"
    ]
    read = {node.inputs[0].name for node in tables if node.inputs[0] is not None}
    assert ("position_ids" in read) == raised


class Turning(nn.Module):
    """A layer that rotates heads by tables, and lets tokens see each other by a mask."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.out, self.sign = nn.Linear(16, 16), sign

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        first, second = heads.chunk(2, -1)
        turned = heads * cos + torch.cat((self.sign * second, first), -1) * sin
        mixed = F.scaled_dot_product_attention(turned, turned, heads, attn_mask=seen)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


class TurningModel(nn.Module):
    """A language model of two such layers.

    Args:
        sign: -1 for a rotation; anything else is none.
        ahead: How many tokens behind its own one a token sees.
    """

    def __init__(self, sign: float = -1.0, ahead: int = 0) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)
        self.layers = nn.ModuleList(Turning(sign) for _ in range(2))
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(4) / 4))
        self.ahead = ahead

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        angles = position_ids[..., None].float() * self.frequencies
        cos, sin = (torch.cat((t, t), -1)[:, None] for t in (angles.cos(), angles.sin()))
        places = torch.arange(input_ids.shape[1], device=x.device)
        seen = places[None, :] <= places[:, None] + self.ahead
        for layer in self.layers:
            x = layer(x, cos, sin, seen[None, None])
        return self.head(x)


def layer_nodes(model: nn.Module) -> dict[str, Any]:
    """Return the nodes of the first layer of a captured model, by op."""
    program = capture(model.eval())
    call = next(call for call in program.calls if call.path.endswith("layers.0"))
    return {node.op: node for node in program.functions[call.function].nodes}


@pytest.mark.slow
def test_rotations_and_causal_masks_are_raised() -> None:
    nodes = layer_nodes(TurningModel())
    assert "rope" in nodes and nodes["attention"].attrs["causal"] is True
    assert not any("." in op for op in nodes)


def test_what_is_nearly_a_rotation_is_left() -> None:
    nodes = layer_nodes(TurningModel(sign=1.0))
    assert "rope" not in nodes and nodes["attention"].attrs["causal"] is True


def test_what_is_nearly_a_causal_mask_is_left() -> None:
    nodes = layer_nodes(TurningModel(ahead=1))
    assert "rope" in nodes and nodes["attention"].attrs["causal"] is False


def test_every_rule_has_its_graphs() -> None:
    """The rules of the package, by the names of their functions, are those that are called here."""
    package = Path(graphopt.capture.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    rules = set(re.findall(r"^def (raise_\w+|sink_\w+|set_masks)\(", text, flags=re.MULTILINE))
    by_graph = {"raise_linears", "raise_norms", "raise_activations", "raise_layout_ops"}
    by_graph |= {"sink_reshape_below_linear", "raise_attention"}
    by_model = {"raise_ropes", "raise_position_embeddings", "set_masks"}
    assert rules == by_graph | by_model
