"""Linears that are summed over ranks: the fused op, and the plans that it is annotated with."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program
from sharded import VOCAB, sharded, sharded_tiny
from test_fuse import function

from graphopt.execute.interpreter import Runner
from graphopt.execute.simulated_ranks import rank_alone
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv_policies import policy_from_dict
from graphopt.ir.ops import get_op
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_function
from graphopt.ir.types import B, S, Type
from graphopt.ir.verify import verify
from graphopt.lowering.torch.fuse import FuseLayerOps
from graphopt.lowering.torch.fuse_sums import TOKENS, annotate_sums, fuse_linear_with_sum
from graphopt.pass_manager.contract import Context
from graphopt.rewrite import apply_rules
from graphopt.targets import get_target

F64, RANKS = torch.float64, {"ranks": 2}
OP = get_op("linear_all_reduce")


def test_it_is_a_linear_and_a_sum():
    x, weight = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    for bias in (None, torch.randn(5, dtype=F64)):
        (found,) = OP.reference([x, weight, bias], RANKS)
        expected = x @ weight.t() + (0 if bias is None else bias)
        torch.testing.assert_close(found, 2 * expected, rtol=1e-14, atol=1e-14)
    types = [Type((B, S, 4), F64), Type((5, 4), F64)]
    assert OP.infer(types, RANKS) == [Type((B, S, 5), F64)]
    # Two operations a product, and one of two ranks' additions for each sum, shared out.
    assert OP.flops(types, OP.infer(types, RANKS), RANKS) == B * S * 5 * 8 + B * S * 5 / 2
    with pytest.raises(ValueError, match="linear"):
        OP.infer([Type((B, S, 3), F64), types[1]], RANKS)


def test_with_attention_it_merges_heads_in_front():
    op = get_op("attention_linear_all_reduce")
    x, weight = torch.randn(2, 4, 3, 5, dtype=F64), torch.randn(7, 20, dtype=F64)
    (found,) = op.reference([x, weight], RANKS)
    expected = 2 * x.transpose(1, 2).flatten(2) @ weight.t()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    types = [Type((B, 4, S, 5), F64), Type((7, 20), F64)]
    assert op.infer(types, RANKS) == [Type((B, S, 7), F64)]
    merged = [Type((B, S, 20), F64), types[1]]
    assert op.flops(types, op.infer(types, RANKS), RANKS) == OP.flops(
        merged, OP.infer(merged, RANKS), RANKS
    )
    with pytest.raises(ValueError, match="merge_heads"):
        op.infer([Type((B, S, 20), F64), types[1]], RANKS)


def left_of(program):
    """Return the functions of a program on Hopper as text, and what its fusions left alone."""
    made = FuseLayerOps("hopper").run(program, Context())
    verify(made.program)
    return str(made.program), made.record.left, made.program


def test_attention_is_joined_with_the_sum_behind_it():
    program = sharded_tiny()
    before = "all_reduce(linear(merge_heads(a), self_attn.o_proj), ranks=2)"
    assert before in str(program)
    text, left, lowered = left_of(program)
    assert "merge_heads" not in text
    assert "attention_linear_all_reduce(a, self_attn.o_proj, ranks=2)" in text
    assert "linear_all_reduce(act_mul(gate, up" in text
    assert left["fuse_attention_with_sum: what it multiplies is not made by an attention"] == 2
    assert parse_program(text).functions.keys() == lowered.functions.keys()
    assert " sums: 4096 tokens: " in text and "attention" in text.split(" sums: 4096 tokens: ")[1]
    # One rank's program, for looking at memory, and all ranks in lockstep.
    ids = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])}
    expected = Runner(sharded_tiny(), dtype=F64).logits(ids)
    torch.testing.assert_close(
        Runner(lowered, dtype=F64).logits(ids), expected, rtol=1e-12, atol=1e-12
    )
    ops = [
        node.op for function in rank_alone(lowered).functions.values() for node in function.nodes
    ]
    assert "merge_heads" in ops and not any("all_reduce" in op for op in ops)


def test_what_has_no_rows_is_left_with_the_reason():
    policy = policy_from_dict({"kind": "ema", "page": 4, "pages": 3, "sink": 1, "local": 1})
    tiny = tiny_program(cache=True, vocab=VOCAB)
    for program, reason in (
        (sharded_tiny(bias=True), "a bias is added, for which a sum in chunks has no place"),
        (sharded_tiny(ranks=4), "a sum is cut into chunks for two ranks alone"),
        (
            sharded(with_policies(tiny, {"kv.1": policy}, {})),
            "policies of the program's cache choose what attentions read",
        ),
    ):
        text, left, _ = left_of(program)
        assert "attention_linear_all_reduce" not in text and "linear_all_reduce" in text
        assert left[f"fuse_attention_with_sum: {reason}"] >= 1


def test_it_is_annotated_with_plans_by_tokens():
    made = function(("s", "linear", "x a"), ("out", "all_reduce", "s", RANKS), weights=("a",))
    hopper = get_target("hopper")
    apply_rules(made, [fuse_linear_with_sum((), hopper)])
    types = {made.params[0]: Type((B, S, 4096), F64), made.weights["a"]: Type((8192, 4096), F64)}
    annotate_sums(made, [types], hopper)
    (node,) = made.nodes
    lines = str(node.annotations["sums"]).splitlines()
    assert [line.split(" tokens: ")[0] for line in lines] == [str(rows) for rows in TOKENS]
    assert lines[0].startswith("1 tokens: one-shot, ")
    assert all(" us predicted (" in line for line in lines)
    assert "linear_all_reduce(x, a, ranks=2)" in print_function(made)


def test_a_target_without_figures_leaves_it_and_says_why():
    made = function(("s", "linear", "x a"), ("out", "all_reduce", "s", RANKS), weights=("a",))
    result = apply_rules(made, [fuse_linear_with_sum((), get_target("ampere"))])
    assert result.counts == {}
    assert [refusal.reason for _, refusal in result.refused] == [
        "ampere.toml does not say what sums over ranks take"
    ]
