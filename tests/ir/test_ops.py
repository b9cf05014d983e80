"""Every op: against a formula of its own, its fast form against it, its types and refusals."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir import B, P, S, Type
from graphopt.ir.kv_policies import PageBudget, SinkLocal
from graphopt.ir.ops import all_ops, get_op
from graphopt.ir.ops.collectives import COLLECTIVES
from graphopt.ir.ops.fused_collectives import FUSED_COLLECTIVES

F64, I64 = torch.float64, torch.int64
# What several ranks do together is in test_collectives.py.
OPS = sorted(
    set(all_ops()) - {"aten", "vocab_parallel_embedding"} - FUSED_COLLECTIVES - COLLECTIVES
)


@dataclass
class Case:
    """One way to use an op.

    Attributes:
        types: Of the operands, in B, S and P; None for an absent one.
        terms: The longest sum behind one output element.
        size: The largest magnitude on the way to an output, where it is more than that.
    """

    op: str
    types: list[Type | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    terms: int = 1
    size: float = 1.0

    def __str__(self):
        options = "".join(f",{key}={value}" for key, value in self.attrs.items())
        present = sum(kind is not None for kind in self.types)
        return f"{self.op}({present}{options})"

    def tensors(self, sizes, dtype=F64, seed=0):
        """Return random operands; what an integer operand means is told by its name."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for index, kind in enumerate(self.types):
            name = get_op(self.op).operand_name(index)
            if kind is None:
                made.append(None)
                continue
            shape = kind.concrete(sizes)
            if name == "codes":
                made.append(torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8))
            elif name == "ids":
                made.append(torch.randint(0, 5, shape, generator=generator))
            elif name == "pictures":
                made.append(torch.randint(-1, 2, shape, generator=generator))
            elif name == "tokens":
                made.append(torch.zeros(shape, dtype=I64))
            elif name == "positions":
                made.append(torch.randint(0, 60, shape, generator=generator))
            elif name.startswith("clip"):
                part = torch.rand(shape, generator=generator, dtype=F64) / 2
                made.append((part + 0.5).to(dtype))
            elif name == "mask":
                mask = torch.ones(shape, dtype=I64)
                mask[-1, : shape[1] // 2] = 0
                made.append(mask)
            else:
                made.append(torch.randn(shape, generator=generator, dtype=F64).to(dtype))
        return made


def f64(*shape):
    return Type(shape, F64)


def i64(*shape):
    return Type(shape, I64)


X = f64(B, S, 6)
Q, K, V = f64(B, 4, S, 8), f64(B, 2, S, 8), f64(B, 2, S, 5)
MASK, PAST_MASK = i64(B, S), i64(B, P + S)
PAST = [f64(B, 2, P, 8), f64(B, 2, P, 5)]
HEADS = f64(4)
TABLE = f64(B, S, 3)


def attention(*extra, **attrs):
    return Case("attention", [Q, K, V, *extra], {"scale": 0.35, "causal": True} | attrs, 21)


CASES = [
    *(Case(name, [X]) for name in ("abs", "relu", "relu2", "silu", "sigmoid", "tanh", "gelu",
                                   "gelu_tanh", "quick_gelu")),
    Case("softcap", [X], {"cap": 1.5}),
    Case("scale", [X], {"factor": -0.7}),
    *(Case(name, kinds) for name in ("add", "mul")
      for kinds in ([X, X], [X, f64(6)], [f64(B, 1, 6), f64(S, 1)])),
    Case("embedding", [i64(B, S), f64(7, 3)]),
    Case("embedding", [i64(B, S), f64(7, 3)], {"offset": 2}),
    *(Case("top_k_gating", [f64(B, S, 5), *rest], {"top_k": top_k})
      for top_k in (1, 3, 5) for rest in ([], [f64(5)], [None, f64(5)], [f64(5), f64(5)])),
    *(Case("top_k_gating", [f64(B, S, 5), *rest], {"top_k": 5, "mean_active_experts": 2})
      for rest in ([], [f64(5)], [f64(5), f64(5)])),
    *(Case("experts", [X, f64(B, S, 3), f64(12, 6), f64(7, 12), *rest],
           {"act": act, "active": 2}, terms=24, size=8)
      for act, rest in (("silu", [f64(12, 6)]), ("relu", []), ("gelu", [None, f64(12)]),
                        ("silu", [f64(12, 6), f64(12), f64(12)]))),
    Case("linear", [X, f64(5, 6)], terms=6),
    Case("linear", [X, f64(5, 6), f64(5)], terms=7),
    *(Case("kronecker", [x, *factors], terms=6) for x, factors in (
        (X, [f64(2, 2), f64(3, 3)]), (X, [f64(3, 3)]), (X, [None, f64(2, 2)]),
        (X, [None, f64(6, 6)]), (X, [f64(6, 6)]), (Q, [None, f64(8, 8)]),
        (Q, [f64(2, 2), f64(4, 4)]),
    )),
    *(Case("rms_norm", [X, *gain], {"eps": 1e-3} | offset, 6)
      for gain in ([], [f64(6)], [f64(S, 6)]) for offset in ({}, {"offset": 1.0})),
    *(Case("mean_square", [x], {"features": 12}, 6, size=12) for x in (X, Q)),
    *(Case("rms_norm_by", [X, f64(B, S, 1), *gain], {"eps": 4.0} | offset, 2)
      for gain in ([], [f64(6)]) for offset in ({}, {"offset": 1.0})),
    *(Case("layer_norm", [X, *rest], {"eps": 1e-3}, 12)
      for rest in ([], [f64(6)], [f64(6), f64(6)], [None, f64(6)], [f64(S, 6), f64(S, 6)])),
    # Angles go up to 60 times three, and are known to that many roundings of 1.
    *(Case("rope_table", [i64(B, S), f64(3)], scale, size=60 * 3)
      for scale in ({}, {"scale": 1.3})),
    *(Case("axial_rope_table", [i64(*axes, B, S), f64(4)],
           {"time": 2, "height": 0, "width": 2} | scale, size=60 * 3)
      for axes in ((), (3,)) for scale in ({}, {"scale": 1.3})),
    *(Case("picture_mask", [i64(B, keys), i64(B, S)], {"window": window})
      for keys in (S, P + S) for window in (None, 2)),
    *(Case("by_length", [i64(B, S), kind, kind], {"length": length})
      for kind in (f64(3), f64(1)) for length in (1, 60)),
    *(Case("ntk_frequencies", [i64(B, S), f64(3)], {"base": 3.0, "factor": 2.0, "length": length},
           size=40**4)
      for length in (30, 60)),
    *(Case("rope", [x, TABLE, TABLE], {"interleaved": pairs, "heads_first": x is Q}, 2)
      for x in (Q, f64(B, S, 4, 6)) for pairs in (False, True)),
    *(Case("split_heads", [f64(B, S, 12)], {"head_dim": 4, "swap": swap})
      for swap in (True, False)),
    *(Case("merge_heads", [Q], {"swap": swap}) for swap in (True, False)),
    Case("transpose_heads", [Q]),
    *(Case("add_rms_norm", [X, y, *gain], {"eps": 1e-3} | offset, 7)
      for y in (X, f64(6)) for gain in ([], [f64(6)]) for offset in ({}, {"offset": 1.0})),
    Case("no_addend", [X]),
    *(Case("act_mul", [X, up], {"act": act}) for up in (X, f64(6)) for act in ("silu", "relu")),
    *(Case("rope_pair", [q, k, TABLE, TABLE], {"interleaved": pairs, "heads_first": q is Q}, 2)
      for q, k in ((Q, K), (f64(B, S, 4, 8), f64(B, S, 2, 8))) for pairs in (False, True)),
    Case("rope_pair", [Q, K, TABLE, TABLE, f64(8, 8), f64(8, 8)], {}, terms=10, size=4),
    Case("fused_linear", [X, f64(5, 6)], {"parts": 1}, terms=6),
    Case("fused_linear", [X, f64(5, 6), f64(2, 6), f64(1, 6)], {"parts": 3}, terms=6),
    Case("fused_linear", [X, f64(5, 6), f64(2, 6), f64(5), f64(2)], {"parts": 2}, terms=7),
    *(Case("moe", [X, f64(B, S, 3), f64(12, 6), f64(7, 12), *rest],
           {"act": act, "active": 2}, terms=24, size=8)
      for act, rest in (
          ("silu", [f64(12, 6)]),
          ("relu", [None, f64(12), None, f64(9, 6), f64(7, 9), None, f64(9), None, f64(7)]),
          ("silu", [f64(12, 6), f64(12), f64(12), f64(9, 6), f64(7, 9), f64(9, 6), f64(9),
                    f64(9), f64(7)]),
      )),
    *(Case("route", [X, f64(5, 6), *rest], {"top_k": top_k} | mean, terms=7)
      for top_k, mean, rest in (
          (2, {}, []), (3, {}, [f64(5), f64(5), f64(5)]),
          (5, {"mean_active_experts": 2}, [None, f64(5)]),
      )),
    *(Case("quantise_dequantise", [x, *clips], {"bits": bits, "symmetric": symmetric})
      for symmetric in (True, False) for x, bits, clips in (
          (X, 4, []), (X, 8, []), (X, 2, []), (X, 3, [f64(1), f64(1)]),
          (Q, 4, [None, f64(4, 1, 1)]), (Q, 5, [f64(1)]),
      )),
    *(Case(op, [*x, f64(5, 6), f64(2, 6), *biases], {"parts": 2}, terms=7, size=size)
      for op, size, x in (
          ("packed_linear", 1, [X]),
          ("integer_linear", 30, [Type((B, S, 6), torch.int8), f64(B, S)]),
      ) for biases in ([], [f64(5), f64(2)])),
    *(Case(op, [*x, f64(5, 6), f64(5, 6)], {"parts": 2, "act": "silu"}, terms=8, size=size)
      for op, size, x in (
          ("packed_linear", 2, [X]),
          ("integer_linear", 1000, [Type((B, S, 6), torch.int8), f64(B, S)]),
      )),
    *(Case("norm_packed_linear", [X, *rest], {"parts": 2, "eps": 1e-5} | more, terms=12, size=4)
      for rest, more in (
          ([X, f64(6), f64(5, 6), f64(2, 6), f64(5), f64(2)], {}),
          ([None, None, f64(5, 6), f64(5, 6)], {"act": "silu", "offset": 1.0}),
      )),
    *(Case("transformed_packed_linear", [X, *rest], {"parts": 2} | more, terms=12, size=8)
      for rest, more in (
          ([X, f64(6), f64(2, 2), f64(3, 3), f64(5, 6), f64(2, 6), f64(5), f64(2)],
           {"before": "norm", "eps": 1e-5, "total": True}),
          ([X, None, None, f64(3, 3), f64(5, 6), f64(5, 6)], {"before": "gelu", "act": "silu"}),
          ([None, None, f64(2, 2), None, f64(5, 6), f64(5, 6)], {}),
      )),
    *(Case("transformed", [X, *rest], attrs, terms=6, size=8)
      for attrs, rest in (
          ({"before": "norm", "eps": 1e-5, "total": True}, [X, f64(6), f64(2, 2), f64(3, 3)]),
          ({"before": "norm", "eps": 1e-5, "offset": 1.0}, [None, f64(6), f64(2, 2)]),
          ({"before": "silu"}, [X, None, None, f64(3, 3)]),
          ({"bits": 4}, []),
          ({"bits": 8, "before": "gelu"}, [X, None, f64(3, 3), None, f64(1), f64(1)]),
          ({"bits": 4, "before": "norm", "eps": 1e-5, "total": True}, [X]),
      )),
    attention(),
    attention(causal=False),
    attention(MASK, window=2),
    attention(MASK, chunk=3, softcap=1.0),
    attention(MASK, f64(B, 1, S, S), HEADS, HEADS),
    attention(PAST_MASK, None, None, HEADS, *PAST),
    attention(PAST_MASK, f64(1, 4, 1, P + S), None, None, *PAST, window=4),
    attention(None, None, None, None, *PAST, softcap=2.0),
    Case("policy_attention", [Q, K, V, PAST_MASK, None, None, HEADS, *PAST],
         {"scale": 0.35, "causal": True, "policy": SinkLocal(PageBudget(2, 2, 0, 1))}, 21),
]  # fmt: skip
SIZES = [{B: 2, S: 3, P: 2}, {B: 1, S: 5, P: 4}]


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(OPS), "a Case for every op: docs/add-an-op.md"


# References -------------------------------------------------------------------------------------


def logistic(x):
    return 0.5 * (1 + math.tanh(x / 2))


SCALARS = {
    "abs": lambda x: math.sqrt(x * x),
    "relu": lambda x: (x + abs(x)) / 2,
    "relu2": lambda x: x * x if x > 0 else 0.0,
    "silu": lambda x: x * logistic(x),
    "sigmoid": logistic,
    "tanh": lambda x: 1 - 2 / (math.exp(2 * x) + 1),
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * logistic(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: x * logistic(1.702 * x),
    "softcap": lambda x, cap: cap * (2 * logistic(2 * x / cap) - 1),
    "scale": lambda x, factor: factor * x,
}


def loops(function, *arrays, **attrs):
    """Apply a function of numbers to every element of arrays that broadcast."""
    return np.vectorize(lambda *items: function(*items, **attrs), otypes=[float])(*arrays)


def expect_embedding(ids, weight, offset=0):
    flat = [weight[int(i) + offset] for i in ids.reshape(-1)]
    return np.stack(flat).reshape(*ids.shape, -1)


def expect_linear(x, weight, bias=None):
    y = np.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


def expect_kronecker(x, left=None, right=None):
    """Entry by entry: y[j1 n2 + j2] is the sum of x[i1 n2 + i2] left[i1, j1] right[i2, j2]."""
    rows = len(left) if left is not None else x.shape[-1] // len(right)
    columns = len(right) if right is not None else x.shape[-1] // len(left)
    left = np.eye(rows) if left is None else left
    right = np.eye(columns) if right is None else right
    split = x.reshape(*x.shape[:-1], rows, columns)
    return np.einsum("...ab,ac,bd->...cd", split, left, right).reshape(x.shape)


def expect_top_k_gating(
    router_logits, selection_bias=None, gate_scale=None, top_k=0, mean_active_experts=0
):
    gates = np.zeros_like(router_logits)
    for place in np.ndindex(*router_logits.shape[:-1]):
        row = [math.exp(v) for v in router_logits[place]]
        probabilities = [v / sum(row) for v in row]
        rank = router_logits[place] if selection_bias is None else probabilities + selection_bias
        chosen = sorted(range(len(row)), key=lambda e: (-rank[e], e))[:top_k]
        if mean_active_experts:
            threshold = np.zeros(len(row)) if selection_bias is None else selection_bias
            chosen = [e for e in chosen if router_logits[place][e] + threshold[e] > 0]
        for e in chosen:
            gates[place][e] = 1.0 if gate_scale is None else 1 + probabilities[e] * gate_scale[e]
    return gates


def expect_experts(x, gates, up, down, gate=None, up_bias=None, gate_bias=None, act="", active=0):
    """Neuron by neuron."""
    y = np.zeros((*x.shape[:-1], len(down)))
    size = len(up) // gates.shape[-1]
    for place in np.ndindex(*x.shape[:-1]):
        for n in range(len(up)):
            first = up[n] @ x[place] + (0 if up_bias is None else up_bias[n])
            if gate is None:
                value = SCALARS[act](first)
            else:
                pre = gate[n] @ x[place] + (0 if gate_bias is None else gate_bias[n])
                value = SCALARS[act](pre) * first
            y[place] += gates[place][n // size] * value * down[:, n]
    return y


def expect_rms_norm(x, weight=None, eps=0.0, offset=0.0):
    y = np.empty_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        y[place] = x[place] / math.sqrt(sum(v * v for v in x[place]) / len(x[place]) + eps)
    return y if weight is None else y * (weight + offset)


def expect_mean_square(x, features=1):
    found = np.empty((*x.shape[:-1], 1))
    for place in np.ndindex(*x.shape[:-1]):
        found[place] = math.fsum(v * v for v in x[place]) / features
    return found


def expect_rms_norm_by(x, mean_square, weight=None, eps=0.0, offset=0.0):
    y = x / np.sqrt(mean_square + eps)
    return y if weight is None else y * (weight + offset)


def expect_layer_norm(x, weight=None, bias=None, eps=0.0):
    y = np.empty_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        y[place] = (x[place] - np.mean(x[place])) / math.sqrt(np.var(x[place]) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def expect_rope_table(positions, inv_freq, scale=1.0):
    turn = scale * np.exp(1j * positions[..., None] * inv_freq)
    return turn.real, turn.imag


def expect_axial_rope_table(positions, inv_freq, time=0, height=0, width=0, scale=1.0):
    axes = np.broadcast_to(positions, (3, *positions.shape[-2:]))
    own = np.repeat(np.arange(3), (time, height, width))
    turn = scale * np.exp(1j * np.moveaxis(axes[own], 0, -1) * inv_freq)
    return turn.real, turn.imag


def expect_picture_mask(pictures, tokens, window=None):
    keys, queries = pictures.shape[1], tokens.shape[1]
    place = np.arange(keys)
    both = (pictures[:, :, None] == pictures[:, None]) & (pictures[:, None] >= 0)
    seen = both | (place <= place[:, None])
    if window is not None:
        seen = seen & (place[:, None] - place < window)
    return np.where(seen, 0.0, -np.inf)[:, None, keys - queries :].astype(np.float32)


def expect_by_length(positions, short, long, length=0):
    return long if any(p + 1 > length for p in positions.reshape(-1)) else short


def expect_ntk_frequencies(positions, exponents, base=0.0, factor=0.0, length=0):
    """transformers' `_compute_dynamic_ntk_parameters`, in numbers."""
    rotated, n = 2 * len(exponents), max(length, *(p + 1 for p in positions.reshape(-1)))
    base *= (factor * n / length - (factor - 1)) ** (rotated / (rotated - 2))
    return np.array([1 / base**e for e in exponents])


def expect_rope(x, cos, sin, interleaved=False, heads_first=True):
    """A pair of features is a complex number, and rotating it a product."""
    y, half = x.copy(), cos.shape[-1]
    for place in np.ndindex(*x.shape[:-1]):
        token = (place[0], place[2] if heads_first else place[1])
        for f in range(half):
            a, b = (2 * f, 2 * f + 1) if interleaved else (f, half + f)
            turned = complex(x[place][a], x[place][b]) * complex(cos[token][f], sin[token][f])
            y[place][a], y[place][b] = turned.real, turned.imag
    return y


def expect_add_rms_norm(x, y, weight=None, eps=0.0, offset=0.0):
    return x + y, expect_rms_norm(x + y, weight, eps, offset)


def expect_no_addend(x):
    return np.zeros_like(x)


def expect_act_mul(gate, up, act=""):
    return loops(lambda g, u: SCALARS[act](g) * u, gate, up)


def expect_rope_pair(q, k, cos, sin, *factors, **attrs):
    turned = expect_rope(q, cos, sin, **attrs), expect_rope(k, cos, sin, **attrs)
    return tuple(x @ right for x, right in zip(turned, factors, strict=True)) if factors else turned


def expect_fused_linear(x, *factors, parts=0):
    return tuple(expect_linear(x, *factors[part::parts]) for part in range(parts))


def expect_packed_linear(x, *factors, parts=0, act=""):
    results = expect_fused_linear(x, *factors, parts=parts)
    return expect_act_mul(*results, act) if act else results


def expect_norm_packed_linear(
    x, y=None, norm_weight=None, *factors, parts=0, act="", eps=0.0, offset=0.0
):
    whole = x if y is None else x + y
    normed = expect_rms_norm(whole, norm_weight, eps, offset)
    product = expect_packed_linear(normed, *factors, parts=parts, act=act)
    return (whole, *product) if isinstance(product, tuple) else (whole, product)


def expect_integer_linear(codes, scales, *factors, parts=0, act=""):
    return expect_packed_linear(codes * scales[..., None], *factors, parts=parts, act=act)


def expect_transformed(
    x, y=None, norm_weight=None, left=None, right=None, clip_low=None, clip_high=None, *,
    before="", total=False, eps=0.0, offset=0.0, bits=0,
):  # fmt: skip
    whole = x if y is None else x + y
    if before == "norm":
        x = expect_rms_norm(whole, norm_weight, eps, offset)
    elif before:
        x = expect_act_mul(x, y, before)
    x = expect_kronecker(x, left, right) if left is not None or right is not None else x
    results = (whole,) if total else ()
    if not bits:
        return (*results, x)
    values = expect_quantise_dequantise(x, clip_low, clip_high, bits)
    low, high = (1.0 if clip is None else clip.item() for clip in (clip_low, clip_high))
    reach = np.maximum(high * x.max(-1).clip(0), -low * x.min(-1).clip(max=0))
    scales = reach / (2 ** (bits - 1) - 1)
    return (*results, (values / scales[..., None]).round().astype(np.int8), scales)


def expect_transformed_packed_linear(
    x, y=None, norm_weight=None, left=None, right=None, *factors, parts=0, act="", **front
):
    *whole, made = expect_transformed(x, y, norm_weight, left, right, **front)
    product = expect_packed_linear(made, *factors, parts=parts, act=act)
    return (*whole, *(product if isinstance(product, tuple) else (product,)))


def expect_moe(
    x, gates, up, down, gate=None, up_bias=None, gate_bias=None, shared_up=None, shared_down=None,
    shared_gate=None, shared_up_bias=None, shared_gate_bias=None, shared_down_bias=None, **attrs,
):  # fmt: skip
    y = expect_experts(x, gates, up, down, gate, up_bias, gate_bias, **attrs)
    if shared_up is None:
        return y
    # The shared part is one more expert, of gate 1.
    ones = np.ones((*x.shape[:-1], 1))
    shared = (shared_up, shared_down, shared_gate, shared_up_bias, shared_gate_bias)
    y = y + expect_experts(x, ones, *shared, **attrs)
    return y if shared_down_bias is None else y + shared_down_bias


def expect_route(x, weight, router_bias=None, selection_bias=None, gate_scale=None, **attrs):
    router_logits = expect_linear(x, weight, router_bias)
    return expect_top_k_gating(router_logits, selection_bias, gate_scale, **attrs)


def expect_quantise_dequantise(x, clip_low=None, clip_high=None, bits=0, symmetric=True):
    """The nearest of the values that a row's codes stand for, by trying them all."""
    y, largest = np.empty_like(x), 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    clips = [
        np.broadcast_to(1.0 if clip is None else clip, (*x.shape[:-1], 1))[..., 0]
        for clip in (clip_low, clip_high)
    ]
    for place in np.ndindex(*x.shape[:-1]):
        low, high = (
            clip[place] * bound
            for clip, bound in zip(clips, (min(*x[place], 0), max(*x[place], 0)), strict=True)
        )
        step = max(high, -low) / largest if symmetric else (high - low) / largest
        zero = 0 if symmetric else round(-low / step)
        codes = np.arange(-largest - 1 if symmetric else 0, largest + 1)
        values = (codes - zero) * step
        y[place] = [values[np.argmin(abs(values - v))] for v in x[place]]
    return y


def expect_split_heads(x, head_dim, swap=True):
    heads = x.shape[-1] // head_dim
    parts = [x[..., h * head_dim : (h + 1) * head_dim] for h in range(heads)]
    return np.stack(parts, 1 if swap else 2)


def expect_merge_heads(x, swap=True):
    axis = 1 if swap else 2
    return np.concatenate([np.take(x, h, axis) for h in range(x.shape[axis])], -1)


def expect_transpose_heads(x):
    return np.stack([x[:, i] for i in range(x.shape[1])], 2)


def expect_attention(
    q, k, v, mask=None, bias=None, slopes=None, sinks=None, past_k=None, past_v=None,
    *, scale, causal, window=None, chunk=None, softcap=None,
):  # fmt: skip
    """Query by query and key by key."""
    past = 0 if past_k is None else past_k.shape[2]
    if past_k is not None:
        k, v = np.concatenate((past_k, k), 2), np.concatenate((past_v, v), 2)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    mask = np.ones((batch, keys)) if mask is None else mask
    wide = None if bias is None else np.broadcast_to(bias, (batch, heads, queries, keys))
    out = np.zeros((batch, heads, queries, v.shape[3]))
    for b, h, i in np.ndindex(batch, heads, queries):
        group = h // (heads // k.shape[1])
        here = past + i
        scores = {}
        for j in range(keys):
            if not mask[b, j] or (causal and j > here):
                continue
            if window is not None and not (j > here - window):
                continue
            if chunk is not None and j // chunk != here // chunk:
                continue
            score = float(q[b, h, i] @ k[b, group, j]) * scale
            if softcap is not None:
                score = math.tanh(score / softcap) * softcap
            if slopes is not None:
                score += slopes[h] * sum(1 for other in range(j) if mask[b, other])
            if wide is not None:
                score += wide[b, h, i, j]
            scores[j] = score
        total = sum(map(math.exp, scores.values()))
        total += 0.0 if sinks is None else math.exp(sinks[h])
        for j, score in scores.items():
            out[b, h, i] += math.exp(score) / total * v[b, group, j]
    return out if past_k is None else (out, k, v)


def expect_policy_attention(*operands, policy, **attrs):
    """Several tokens see all keys; tests/ir/test_policy_attention.py has steps of one."""
    return expect_attention(*operands, **attrs)


EXPECTED = {
    **{name: functools.partial(loops, f) for name, f in SCALARS.items()},
    "add": lambda a, b: loops(lambda x, y: x + y, a, b),
    "mul": lambda a, b: loops(lambda x, y: x * y, a, b),
    **{name.removeprefix("expect_"): f for name, f in list(globals().items())
       if name.startswith("expect_")},
}  # fmt: skip


def expected(op, tensors, attrs):
    arrays = [None if t is None else t.numpy() for t in tensors]
    result = EXPECTED[op](*arrays, **attrs)
    parts = result if isinstance(result, tuple) else (result,)
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]


@pytest.mark.parametrize("sizes", SIZES, ids=["small", "long"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, sizes):
    tensors = case.tensors(sizes)
    found = get_op(case.op).reference(tensors, case.attrs)
    # Both sides round in fp64, on sums of at most a hundred terms of order 1.
    torch.testing.assert_close(
        list(found), expected(case.op, tensors, case.attrs), rtol=1e-13, atol=1e-13 * case.size
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fast_form_equals_the_reference(case):
    for seed, sizes in enumerate(SIZES):
        tensors = case.tensors(sizes, torch.float32, seed)
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
        found = get_op(case.op).torch(tensors, case.attrs)
        exact = get_op(case.op).reference(wide, case.attrs)
        for fast, plain in zip(found, exact, strict=True):
            assert fast.dtype == (torch.float32 if plain.is_floating_point() else plain.dtype)
            # A rounding (2^-24) a term of the longest sum, and 16 for the functions around it,
            # relative to the largest operand, of which 4 is a generous bound for normal numbers.
            bound = 2**-24 * (case.terms + 16) * 4 * case.size
            allowed = bound * max(1.0, float(plain.abs().max()))
            torch.testing.assert_close(fast.double(), plain.double(), rtol=0, atol=allowed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_types_are_those_of_the_results(case):
    op = get_op(case.op)
    kinds = op.infer(case.types, case.attrs)
    for sizes in SIZES:
        for form in (op.reference, op.torch):
            made = form(case.tensors(sizes), case.attrs)
            assert [tuple(t.shape) for t in made] == [kind.concrete(sizes) for kind in kinds]
            assert [t.dtype for t in made] == [kind.dtype for kind in kinds]


WITH_GRADIENTS = [
    case for case in CASES
    if case.op not in ("no_addend", "picture_mask")
    and not (case.op == "transformed" and "bits" in case.attrs)
]  # fmt: skip


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=str)
def test_gradients_flow_through_the_fast_form(case):
    op = get_op(case.op)
    tensors = case.tensors({B: 2, S: 3, P: 2}, seed=3)
    tensors = [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in tensors]
    places = [index for index, t in enumerate(tensors) if t is not None and t.requires_grad]

    def run(*moving):
        operands = list(tensors)
        for place, tensor in zip(places, moving, strict=True):
            operands[place] = tensor
        return op.torch(operands, case.attrs)

    assert torch.autograd.gradcheck(run, [tensors[place] for place in places], fast_mode=True)


# Attention --------------------------------------------------------------------------------------


@st.composite
def attentions(draw):
    """Operands and attributes of every combination of features, some with rows without a key."""
    batch, groups, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, past = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    head_dim, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape):
        return 2 * torch.randn(shape, generator=generator, dtype=F64)

    heads, keys = groups * share, past + queries
    bias_shape = draw(st.sampled_from([None, (1, 1, 1, keys), (batch, heads, queries, keys)]))
    mask = torch.tensor(draw(st.lists(st.lists(st.integers(0, 1), min_size=keys, max_size=keys),
                                      min_size=batch, max_size=batch)))  # fmt: skip
    operands = [
        random(batch, heads, queries, head_dim),
        random(batch, groups, queries, head_dim),
        random(batch, groups, queries, value_dim),
        mask if draw(st.booleans()) else None,
        None if bias_shape is None else random(*bias_shape),
        random(heads) if draw(st.booleans()) else None,
        random(heads) if draw(st.booleans()) else None,
    ]
    if past or draw(st.booleans()):
        operands += [
            random(batch, groups, past, head_dim),
            random(batch, groups, past, value_dim),
        ]
    attrs = {
        "scale": draw(st.sampled_from((0.5, 1.0))),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from((None, 1, 2, 9))),
        "chunk": draw(st.sampled_from((None, 1, 3))),
        "softcap": draw(st.sampled_from((None, 0.7))),
    }
    return operands, attrs


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(attentions())
def test_attention_of_any_features(drawn):
    operands, attrs = drawn
    wanted = expected("attention", operands, attrs)
    op = get_op("attention")
    for form in (op.reference, op.torch):
        # fp64, and scores up to about 20, of which the exponential amplifies the rounding.
        torch.testing.assert_close(list(form(operands, attrs)), wanted, rtol=1e-12, atol=1e-12)


def padded(dtype, extras=()):
    """Two rows, the first of them without one real token; the operands that take gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8)]
    moving = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    return [tensor.requires_grad_() for tensor in moving], [mask, None, None, *extras]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_a_key_give_zero_and_no_gradient(dtype, softcap, sinks):
    extras = [torch.randn(4, dtype=dtype)] if sinks else []
    moving, rest = padded(dtype, extras)
    attrs = {"scale": 0.3, "causal": True, "softcap": softcap}
    op = get_op("attention")
    for form in (op.reference, op.torch):
        (out,) = form([*moving, *rest], attrs)
        assert out[0].eq(0).all() and out[1, :, 0].eq(0).all()
        assert out[1, :, 1:].ne(0).all()
    for grad in torch.autograd.grad(out.square().sum(), moving):
        assert grad.isfinite().all() and grad[0].eq(0).all() and grad[1].ne(0).any()


def test_nan_is_not_taken_for_a_row_without_a_key():
    operands = attention(MASK).tensors({B: 2, S: 3, P: 0})
    operands[0][0, 0, 1, 0] = math.nan
    op = get_op("attention")
    for form in (op.reference, op.torch):
        (out,) = form(operands, {"scale": 1.0, "causal": True})
        assert out[0, 0, 1].isnan().all() and not out[0, 1].isnan().any()


def test_alibi_by_position_equals_alibi_by_distance():
    """The paper's form, arXiv 2108.12409: a bias of minus slope times the distance."""
    q, k, v, mask, _, slopes, *_ = attention(MASK, None, HEADS).tensors({B: 2, S: 6, P: 0})
    attrs = {"scale": 0.5, "causal": True}
    place = mask.cumsum(-1).double()
    distance = place[:, None, :, None] - place[:, None, None, :]
    bias = -slopes[None, :, None, None] * distance
    op = get_op("attention")
    (by_position,) = op.torch([q, k, v, mask, None, slopes], attrs)
    (by_distance,) = op.torch([q, k, v, mask, bias], attrs)
    torch.testing.assert_close(by_position, by_distance, rtol=1e-12, atol=1e-12)


ROUNDING = [
    {"bits": bits, "symmetric": symmetric} for bits in range(2, 9) for symmetric in (True, False)
]


def forms_of(name):
    return get_op(name).reference, get_op(name).torch


@pytest.mark.parametrize("attrs", ROUNDING, ids=str)
def test_rows_of_zeros_stay_zero_and_rows_with_a_nan_become_nan(attrs):
    x = torch.randn(5, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1, 3], x[2, 4], x[3, 5] = math.nan, math.inf, -math.inf
    for clips in ([], [torch.tensor([0.9]), torch.tensor([0.8])]):
        for form in forms_of("quantise_dequantise"):
            (y,) = form([x, *clips], attrs)
            assert y[0].eq(0).all()
            assert y[1:4].isnan().all() and y[4].isfinite().all()


def test_halves_are_rounded_to_even():
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    shifted = torch.tensor([[15.0, 0.5, 1.5, 2.5, 0.0, 13.5, 14.5]])
    for form in forms_of("quantise_dequantise"):
        (y,) = form([x], {"bits": 4, "symmetric": True})
        assert y.tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0]]
        (y,) = form([shifted], {"bits": 4, "symmetric": False})
        assert y.tolist() == [[15.0, 0.0, 2.0, 2.0, 0.0, 14.0, 14.0]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), st.sampled_from(ROUNDING))
def test_rounding_moves_no_element_by_more_than_half_a_step(row, attrs):
    """Without clips; and what is rounded once is not moved again, but for a rounding or two."""
    x = torch.tensor([row], dtype=torch.float32)
    (y,) = get_op("quantise_dequantise").torch([x], attrs)
    steps = 2 ** (attrs["bits"] - 1) - 1 if attrs["symmetric"] else 2 ** attrs["bits"] - 1
    reach = x.abs().max() if attrs["symmetric"] else x.max().clamp(min=0) - x.min().clamp(max=0)
    # A zero point is rounded too, and the last code may be cut off by that.
    most = 0.5 if attrs["symmetric"] else 1.0
    assert (y - x).abs().max() <= most * reach / steps * (1 + 1e-5)
    assert y.eq(0)[x.eq(0)].all()


def test_a_straight_through_rounding_has_the_gradient_of_the_identity():
    """Of a value that is not cut off, beside what reaches the row's extremes by the scale."""
    for symmetric in (True, False):
        attrs = {"bits": 4, "symmetric": symmetric}
        x = torch.tensor([[4.0, -3.0, 0.3, 1.2]], dtype=F64, requires_grad=True)
        clip = torch.ones(1, dtype=F64, requires_grad=True)
        straight = get_op("quantise_dequantise").torch(
            [x, clip, clip], attrs | {"straight_through": True}
        )[0]
        plain = get_op("quantise_dequantise").torch([x, clip, clip], attrs)[0]
        assert straight.equal(plain)
        grad, of_clip = torch.autograd.grad(straight[0, 2] + straight[0, 3], [x, clip])
        assert grad[0, 2:].tolist() == [1.0, 1.0] and of_clip.isfinite().all()
        (grad,) = torch.autograd.grad(plain[0, 2] + plain[0, 3], x)
        assert grad[0, 2:].tolist() == [0.0, 0.0]


def test_sixteen_bit_activations_are_rounded_wide():
    """In bf16 the scale itself would be known to 8 bits."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for attrs in ROUNDING:
        (y,) = get_op("quantise_dequantise").torch([x], attrs)
        (wide,) = get_op("quantise_dequantise").torch([x.float()], attrs)
        assert y.dtype == torch.bfloat16 and y.equal(wide.bfloat16())


def test_sixteen_bit_norms_are_computed_wide():
    """A row whose mean square overflows fp16: 300^2 is more than 65504."""
    x = torch.tensor([[300.0, -300.0, 300.0, -300.0]], dtype=torch.float16)
    for name in ("rms_norm", "layer_norm"):
        (y,) = get_op(name).torch([x], {"eps": 1e-5})
        assert y.dtype == torch.float16 and y.equal(x.sign())


# Refusals ---------------------------------------------------------------------------------------

REFUSED = {
    "add, sizes": ("add", [X, f64(5)], {}, "do not broadcast"),
    "add, symbols": ("add", [f64(B, S), f64(B, P + 2)], {}, "do not broadcast"),
    "add, absent": ("add", [X, None], {}, "operand 1 is missing"),
    "add, one": ("add", [X], {}, "operand 1 is missing"),
    "embedding, vector": ("embedding", [i64(B, S), f64(7)], {}, "embedding of"),
    "embedding, floats": ("embedding", [X, f64(7, 3)], {}, "embedding of"),
    "linear, width": ("linear", [X, f64(5, 7)], {}, "linear of"),
    "linear, rank": ("linear", [X, f64(6)], {}, "linear of"),
    "linear, bias": ("linear", [X, f64(5, 6), f64(6)], {}, "bias"),
    "kronecker, no factor": ("kronecker", [X], {}, "neither"),
    "kronecker, width": ("kronecker", [X, f64(2, 2), f64(2, 2)], {}, "left factor of 2 and right"),
    "kronecker, one width": ("kronecker", [X, f64(4, 4)], {}, "left factor of 4, whose"),
    "kronecker, oblong": ("kronecker", [X, f64(2, 3), f64(3, 3)], {}, "not square"),
    "rms_norm, gain": ("rms_norm", [X, f64(5)], {"eps": 0.1}, "broadcast"),
    "rms_norm, wide gain": ("rms_norm", [f64(6), f64(2, 6)], {"eps": 0.1}, "norm of"),
    "layer_norm, bias": ("layer_norm", [X, None, f64(3, 1, 1, 6)], {"eps": 0.1}, "norm of"),
    "rope_table, matrix": ("rope_table", [i64(B, S), f64(3, 3)], {}, "inv_freq"),
    "by_length, shapes": ("by_length", [i64(B, S), f64(3), f64(1)], {"length": 5}, "by_length of"),
    "by_length, none": ("by_length", [i64(B, S), f64(3), f64(3)], {"length": 0}, "by_length of"),
    "ntk_frequencies, one pair": (
        "ntk_frequencies",
        [i64(B, S), f64(1)],
        {"base": 2.0, "factor": 2.0, "length": 5},
        "exponents",
    ),
    "ntk_frequencies, base": (
        "ntk_frequencies",
        [i64(B, S), f64(2)],
        {"base": 0.0, "factor": 2.0, "length": 5},
        "base",
    ),
    "rope, rank": ("rope", [X, TABLE, TABLE], {}, "rope of"),
    "rope, too wide": ("rope", [f64(B, 4, S, 4), TABLE, TABLE], {}, "rope of"),
    "rope, sine": ("rope", [Q, TABLE, f64(B, S, 2)], {}, "rope of"),
    "rope, order": ("rope", [Q, TABLE, TABLE], {"heads_first": False}, "rope of"),
    "rope, table": ("rope", [Q, f64(S, 3), f64(S, 3)], {}, "rope of"),
    "split_heads, rank": ("split_heads", [Q], {"head_dim": 4}, "split_heads of"),
    "split_heads, width": ("split_heads", [X], {"head_dim": 4}, "split_heads of"),
    "split_heads, zero": ("split_heads", [X], {"head_dim": 0}, "split_heads of"),
    "merge_heads, rank": ("merge_heads", [X], {}, "merge_heads of"),
    "transpose_heads, rank": ("transpose_heads", [X], {}, "transpose_heads of"),
    "add_rms_norm, sizes": ("add_rms_norm", [X, f64(5)], {"eps": 0.1}, "do not broadcast"),
    "act_mul, absent": ("act_mul", [X, None], {"act": "silu"}, "operand 1 is missing"),
    "rope_pair, one factor": ("rope_pair", [Q, K, TABLE, TABLE, f64(8, 8)], {}, "alone"),
    "rope_pair, wide": ("rope_pair", [Q, K, TABLE, TABLE, f64(4, 4), f64(4, 4)], {}, "heads"),
    "rope_pair, order": ("rope_pair", [Q, f64(B, S, 2, 8), TABLE, TABLE], {}, "rope of"),
    "fused_linear, factors": ("fused_linear", [X, f64(5, 6)], {"parts": 2}, "2 parts with 1"),
    "fused_linear, width": ("fused_linear", [X, f64(5, 7)], {"parts": 1}, "linear of"),
    "moe, half a part": (
        "moe", [X, f64(B, S, 3), f64(12, 6), f64(7, 12), None, None, None, f64(9, 6)],
        {"act": "relu", "active": 1}, "lacks",
    ),
    "moe, another width": (
        "moe", [X, f64(B, S, 3), f64(12, 6), f64(7, 12), None, None, None, f64(9, 6), f64(6, 9)],
        {"act": "relu", "active": 1}, "shared_down",
    ),
    "quantise_dequantise, whole numbers": (
        "quantise_dequantise", [i64(B, S)], {"bits": 4, "symmetric": True},
        "quantise_dequantise of",
    ),
    "quantise_dequantise, clip": (
        "quantise_dequantise", [X, f64(6)], {"bits": 4, "symmetric": True}, "with a clip",
    ),
    "route, scores": ("route", [X, f64(5, 6)], {"top_k": 6}, "6 of 5 experts"),
}  # fmt: skip
BAD_ATTENTION = {
    "rank": ([X, K, V], "attention of"),
    "head size": ([Q, f64(B, 2, S, 7), V], "head sizes"),
    "value heads": ([Q, K, f64(B, 1, S, 5)], "head sizes or counts"),
    "groups": ([Q, f64(B, 3, S, 8), f64(B, 3, S, 5)], "4 query heads over 3"),
    "batch": ([Q, f64(1, 2, S, 8), f64(1, 2, S, 5)], "attention of"),
    "value length": ([Q, K, f64(B, 2, S + 1, 5)], "attention of"),
    "mask length": ([Q, K, V, i64(B, S + 1)], "mask"),
    "mask rank": ([Q, K, V, i64(S)], "mask"),
    "mask without past": ([Q, K, V, MASK, None, None, None, *PAST], "mask"),
    "bias": ([Q, K, V, None, f64(B, 3, S, S)], "broadcast"),
    "slopes": ([Q, K, V, None, None, f64(2)], "slopes"),
    "sinks": ([Q, K, V, None, None, None, f64(2)], "sinks"),
    "half a past": ([Q, K, V, None, None, None, None, PAST[0]], "past"),
    "past heads": ([Q, K, V, None, None, None, None, f64(B, 4, P, 8), PAST[1]], "past"),
    "past width": ([Q, K, V, None, None, None, None, PAST[0], f64(B, 2, P, 8)], "past"),
    "past length": ([Q, K, V, None, None, None, None, PAST[0], f64(B, 2, S, 5)], "past"),
}
REFUSED |= {
    f"attention, {name}": ("attention", types, {"scale": 1.0, "causal": True}, message)
    for name, (types, message) in BAD_ATTENTION.items()
}


@pytest.mark.parametrize(("op", "types", "attrs", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_operands_are_refused(op, types, attrs, message):
    with pytest.raises(ValueError, match=message):
        get_op(op).infer(types, attrs)
