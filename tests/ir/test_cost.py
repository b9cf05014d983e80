"""FLOPs and bytes, against counts by hand."""

from __future__ import annotations

import json

import pytest
import sympy
import torch
from carved import carved
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.capture import capture
from graphopt.ir import Array, B, P, S, Type, Weight, cost
from graphopt.ir.cost import call_cost, program_costs, total_cost, weight_products
from graphopt.ir.feed_forward import Split
from graphopt.ir.ops import get_op
from graphopt.ir.shapes import infer_program

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
QUICK = settings(max_examples=20, deadline=None, derandomize=True)


def number(expression, b, s, p):
    value = sympy.sympify(expression).subs({B: b, S: s, P: p})
    assert value.is_Integer
    return int(value)


def of_op(name, types, attrs=None):
    """FLOPs and bytes of one op."""
    op, attrs = get_op(name), attrs or {}
    outputs = op.infer(types, attrs)
    return op.flops(types, outputs, attrs), op.bytes(types, outputs, attrs)


def f32(*shape):
    return Type(shape, torch.float32)


@QUICK
@given(SIZES)
def test_linear(sizes):
    b, s, p = sizes
    flops, moved = of_op("linear", [f32(B, S, 6), Type((5, 6), torch.bfloat16), f32(5)])
    # A product and a sum for each of 6 inputs of each output; the bias is not counted.
    assert number(flops, b, s, p) == sum(2 * 6 for _ in range(b * s * 5))
    assert number(moved, b, s, p) == 4 * b * s * 6 + 2 * 5 * 6 + 4 * 5 + 4 * b * s * 5


@QUICK
@given(SIZES, st.booleans())
def test_attention(sizes, cached):
    b, s, p = sizes
    q, k, v = f32(B, 4, S, 8), f32(B, 2, S, 8), f32(B, 2, S, 3)
    extra = [None, None, None, None, f32(B, 2, P, 8), f32(B, 2, P, 3)] if cached else []
    flops, moved = of_op("attention", [q, k, v, *extra], {"scale": 1.0, "causal": True})
    keys = p + s if cached else s
    # A score takes 8 multiply-adds, its value row 3, its exponential and scaling 5.
    pairs = sum(1 for _ in range(b * 4 * s * keys))
    assert number(flops, b, s, p) == pairs * (2 * 8 + 2 * 3 + 5)
    operands = b * 4 * s * 8 + b * 2 * s * (8 + 3)
    cache = b * 2 * (p + p + s) * (8 + 3) if cached else 0  # read, and written longer
    assert number(moved, b, s, p) == 4 * (operands + cache + b * 4 * s * 3)


@QUICK
@given(SIZES)
def test_embedding_reads_the_rows_it_looks_up(sizes):
    b, s, p = sizes
    flops, moved = of_op("embedding", [Type((B, S), torch.int64), f32(10**6, 6)])
    assert number(flops, b, s, p) == 0
    assert number(moved, b, s, p) == 8 * b * s + 2 * 4 * b * s * 6


@pytest.mark.parametrize("name", ["split_heads", "merge_heads", "transpose_heads"])
def test_moves_cost_no_arithmetic(name):
    x = f32(B, S, 12) if name == "split_heads" else f32(B, 3, S, 4)
    flops, moved = of_op(name, [x], {"head_dim": 4} if name == "split_heads" else {})
    assert flops == 0 and moved == 2 * 4 * 12 * B * S


@QUICK
@given(SIZES)
def test_a_whole_program(sizes):
    """hidden 32, 4 heads and 2 key heads of 8, feed-forward 48, 97 words, 2 layers."""
    b, s, p = sizes
    total = total_cost(tiny_program(tied=False, cache=True))
    projections = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    linear = 2 * b * s * (2 * projections + 32 * 97)
    attention = 2 * b * 4 * s * (p + s) * (2 * 8 + 2 * 8 + 5)
    by_op = {name: number(flops, b, s, p) for name, flops in total.by_op.items()}
    assert by_op["linear"] == linear and by_op["attention"] == attention
    assert number(total.flops, b, s, p) == sum(by_op.values())
    # Every weight once, but of the embedding only the rows that are looked up; 4 inverse
    # frequencies are read too.
    weights = 2 * (projections + 2 * 32) + 32 + 32 * 97 + 4
    assert number(total.weight_bytes, b, s, p) == 4 * weights
    assert total.bytes == total.weight_bytes + total.activation_bytes


def test_the_total_is_the_sum_over_calls_and_equal_calls_are_computed_once(monkeypatch):
    program = tiny_program(layers=6, window=3)
    types, _ = infer_program(program)
    alone = [call_cost(program, c, t) for c, t in zip(program.calls, types, strict=True)]
    computed = []

    def counted(program, call, types):
        computed.append(call.path)
        return call_cost(program, call, types)

    monkeypatch.setattr(cost, "call_cost", counted)
    costs = program_costs(program)
    assert costs == alone
    # Layers alternate between a window and none.
    assert computed == ["embed", "layers.0", "layers.1", "head"]
    total = total_cost(program)
    for part in ("flops", "weight_bytes", "activation_bytes"):
        assert sympy.expand(getattr(total, part) - sum(getattr(c, part) for c in alone)) == 0
    assert total.by_op["silu"] == sum(c.by_op.get("silu", 0) for c in alone)


def test_layers_of_another_dtype_count_by_their_own_bytes():
    program = tiny_program(layers=2, cache=True)
    name = "layers.1.mlp.up_proj.weight"
    narrow = Array(program.weights[name].load().bfloat16())
    program.weights.replace(Weight(name, narrow))
    program.states["kv.1"].dtype = torch.bfloat16
    _, first, second, _ = program_costs(program)
    assert first.weight_bytes - second.weight_bytes == 2 * 32 * 48
    # Past keys and values of two heads of 8, at two bytes less an element.
    assert first.activation_bytes - second.activation_bytes == 2 * (2 * 2 * 8) * B * P


LLAMA_2_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.slow
def test_a_carved_llama_2_7b_takes_the_products_that_the_paper_counts(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
    dense = capture(f"config:{path}")

    def giga(program):
        return number(weight_products(program), 1, 128, 0) / 1e9

    # CMoE, arXiv 2502.04416, table 7; to three digits more, 32 blocks and a head of 32,000 rows.
    assert giga(dense) == pytest.approx(845.706, abs=5e-4)
    split = Split(3 * 1376, 5, 3)
    assert giga(carved(dense, split, router="neuron")) == pytest.approx(707.361, abs=5e-4)
    # A linear router has one matrix [5, 4096] a block and not two.
    linear = giga(carved(dense, split))
    assert linear == pytest.approx(707.361 - 32 * 128 * 5 * 4096 / 1e9, abs=5e-4)
    # The share of a block's products that the formula gives, all in all.
    mlp, attention = 3 * 4096 * 11008, 4 * 4096**2
    saved = 2 / 8 * mlp / (attention + mlp) - 5 * 4096 / (attention + mlp)
    head = 128 * 32000 * 4096 / 1e9
    assert 1 - (linear - head) / (giga(dense) - head) == pytest.approx(saved, abs=1e-9)
    # With a mean number of experts the cost is that of the mean.
    assert giga(carved(dense, Split(3 * 1376, 5, 3, threshold=True))) == pytest.approx(linear)
