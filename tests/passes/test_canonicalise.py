from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from small import check_text, function, one, programs, results, slot

from graphopt.ir import Call, Param
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.canonicalise import Canonicalise

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def small(statements, weights=""):
    """The text of a program of one call of a block that consists of statements."""
    lines = "".join(f"    {line}\n" for line in statements)
    section = f"weights:\n    {weights}\n" if weights else ""
    return f"""
program small
def block(x, y):
{lines}run(input_ids: i64[B,S], x: f64[B,S,8], y: f64[B,S,8]):
    r0 = block(x, y)
    return r0
{section}"""


def check(before, after, weights=""):
    """The names of the rules that make one block of another, and how often each was used."""
    result = check_text(Canonicalise(), small(before, weights), small(after, weights))
    return result.record.rules


def test_moves_of_heads_vanish_or_merge():
    rules = check(
        [
            "q = split_heads(x, head_dim=4, swap=False)",
            "t = tanh(transpose_heads(transpose_heads(transpose_heads(q))))",
            "back = merge_heads(split_heads(merge_heads(t), head_dim=4))",
            "z = scale(back, factor=1.0)",
            "return z",
        ],
        ["back = merge_heads(tanh(split_heads(x, head_dim=4)))", "return back"],
    )
    assert rules == {"absorb_swap": 3, "cancel_split_merge": 1, "drop_unit_scale": 1}


def test_two_swaps_are_none():
    rules = check(
        [
            "t = tanh(split_heads(x, head_dim=4))",
            "m = merge_heads(silu(transpose_heads(transpose_heads(t))))",
            "return m",
        ],
        ["m = merge_heads(silu(tanh(split_heads(x, head_dim=4))))", "return m"],
    )
    assert rules == {"cancel_swaps": 1}


def test_heads_come_first_before_rope():
    check(
        [
            "q = split_heads(x, head_dim=4, swap=False)",
            "m = merge_heads(transpose_heads(rope(q, cos, cos, heads_first=False)))",
            "return m",
        ],
        ["m = merge_heads(rope(split_heads(x, head_dim=4), cos, cos))", "return m"],
        "cos: f64[1,1,2] constant",
    )


def test_a_rope_that_something_else_reads_stays():
    f = function()
    cos, sin = slot(f, "cos"), slot(f, "sin")
    q = f.add("split_heads", [f.params[0]], {"head_dim": 4, "swap": False}).output
    r = f.add("rope", [q, cos, sin], {"heads_first": False}).output
    f.results = [f.add("transpose_heads", [r]).output, r]
    table = torch.ones(1, 1, 2, dtype=torch.float64)
    program = one(f, constants={"cos": table, "sin": table})
    text = str(program)
    assert Canonicalise().run(program, Context()).changed == 0
    assert str(program) == text


def test_factors_and_operand_order():
    check(
        [
            "a = scale(scale(x, factor=3.0), factor=2.0)",
            "b = y + a",
            "c = w * b",
            "return c",
        ],
        ["b = y + scale(x, factor=6.0)", "c = b * w", "return c"],
        "w: f64[8]",
    )


def test_aten_operators_that_do_nothing_are_dropped():
    check(
        [
            "a: f64[B,S,8] = aten.dropout(x, 0.5, False)",
            "b: f64[B,S,8] = aten.detach(a)",
            "c: f64[B,S,8] = aten.to.dtype(b, f64)",
            "d: f64[B,S,8] = aten.view(c, [B, S, 8])",
            "e: f64[B,S,8] = aten.add.Tensor(d, 0)",
            "f: f64[B,S,8] = aten.div.Tensor(e, 1)",
            "g: f64[B,S,8] = aten.dropout(f, 0.0, True)",
            "h: f32[B,S,8] = aten.to.dtype(g, f32)",
            "return h",
        ],
        ["h: f32[B,S,8] = aten.to.dtype(x, f32)", "return h"],
    )


def test_an_attribute_that_differs_between_calls_is_never_folded():
    f = function()
    inner = f.add("scale", [f.params[0]], {"factor": Param("by")}).output
    f.results = [f.add("scale", [inner], {"factor": 2.0}).output]
    program = one(f, attrs={"by": 1.0})
    second = Call("block", ["r0"], ["r1"], attrs={"by": 3.0})
    program.calls.append(second)
    program.outputs = ["r1"]
    assert Canonicalise().run(program, Context()).changed == 0
    second.attrs["by"] = 1.0
    result = Canonicalise().run(program, Context())
    assert result.changed == 2  # one place in each of two calls
    assert len(f.nodes) == 1


def test_a_split_of_other_size_is_no_inverse():
    f = function()
    heads = f.add("split_heads", [f.params[0]], {"head_dim": 4}).output
    merged = f.add("merge_heads", [f.add("tanh", [heads]).output]).output
    f.results = [f.add("merge_heads", [f.add("split_heads", [merged], {"head_dim": 2}).output],
                       {"swap": False}).output]  # fmt: skip
    program = one(f)
    assert Canonicalise().run(program, Context()).changed == 0


@pytest.mark.slow
@QUICK
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before = results(program)
    Canonicalise().run(program, Context())
    verify(program)
    torch.testing.assert_close(results(program), before, rtol=1e-12, atol=1e-12)
    text = str(program)
    assert Canonicalise().run(program, Context()).changed == 0
    assert str(program) == text


def test_no_weight_is_touched():
    f = function()
    f.results = [f.add("add", [slot(f, "w"), f.params[0]]).output]
    program = one(f, weights={"w": torch.ones(8, dtype=torch.float64)})
    held = program.weights["w"]
    assert Canonicalise().run(program, Context()).changed == 1
    assert program.weights["w"] is held
