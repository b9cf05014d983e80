"""Linears that are summed over ranks: the fused op, and the plans that it is annotated with."""

from __future__ import annotations

import pytest
import torch
from test_fuse import function

from graphopt.ir.ops import get_op
from graphopt.ir.printer import print_function
from graphopt.ir.types import B, S, Type
from graphopt.lowering.torch.fuse_sums import TOKENS, annotate_sums, fuse_linear_with_sum
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
