from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from small import X, check_text, function, one, programs, results

from graphopt.ir import Call, In, Program
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.common_subexpression_elimination import CommonSubexpressionElimination
from graphopt.passes.dead_code_elimination import DeadCodeElimination

ONES = torch.ones(8, dtype=torch.float64)


EQUAL_NODES = """
program small
def block(x, y):
    a = x * w
    b = v * x
    c = a + silu(y)
    t = silu(y)
    d = t + b
    e = c * d
    return e
run(input_ids: i64[B,S], x: f64[B,S,8], y: f64[B,S,8]):
    r0 = block(x, y; v=w)
    return r0
weights:
    w: f64[8]
"""
ONE_OF_EACH = """
program small
def block(x, y):
    a = x * w
    c = a + silu(y)
    e = c * c
    return e
run(input_ids: i64[B,S], x: f64[B,S,8], y: f64[B,S,8]):
    r0 = block(x, y)
    return r0
weights:
    w: f64[8]
"""


def test_equal_nodes_and_slots_merge():
    """In another order of operands, and in another slot that holds the same weight."""
    result = check_text(CommonSubexpressionElimination(), EQUAL_NODES, ONE_OF_EACH)
    assert result.record.merged == {"weight slots": 1, "nodes": 3}


def test_random_numbers_and_other_attributes_are_not_equal():
    f = function()
    kind = X
    made = [
        f.add("aten.rand_like.default", [f.params[0]], {"args": [In(0)], "types": [kind]}).output
        for _ in range(2)
    ]
    scaled = [f.add("scale", [f.params[0]], {"factor": k}).output for k in (2.0, 3.0)]
    f.results = [*made, *scaled]
    assert CommonSubexpressionElimination().run(one(f), Context()).changed == 0


def test_an_absent_attribute_equals_its_default():
    f = function()
    split = [
        f.add("split_heads", [f.params[0]], attrs).output
        for attrs in ({"head_dim": 4}, {"head_dim": 4, "swap": True})
    ]
    f.results = [f.add("merge_heads", [f.add("add", split).output]).output]
    assert CommonSubexpressionElimination().run(one(f), Context()).changed == 1


EQUAL_CALLS = """
program "two tables"
def table(x):
    t = tanh(x)
    return t
def block(x, p, q):
    m = x * p
    y = m + q
    return y
run(input_ids: i64[B,S], x: f64[B,S,8]):
    cos = table(x)
    cos2 = table(x)
    x = block(x, cos, cos2)
    x = block(x, cos, cos2)
    return x
"""
ONE_CALL = """
program "two tables"
def table(x):
    t = tanh(x)
    return t
def block(x, p):
    m = x * p
    y = m + p
    return y
run(input_ids: i64[B,S], x: f64[B,S,8]):
    cos = table(x)
    x = block(x, cos)
    x = block(x, cos)
    return x
"""


def test_equal_calls_merge_and_what_they_carry():
    result = check_text(CommonSubexpressionElimination(), EQUAL_CALLS, ONE_CALL)
    assert result.record.merged == {"calls": 1, "parameters": 2}


def test_a_name_that_is_rebound_between_equal_calls_gets_out_of_the_way():
    f = function("f", ("x",))
    f.results = [f.add("tanh", [f.params[0]]).output]
    program = Program("rebound", inputs={"input_ids": one(f).inputs["input_ids"], "x": X})
    program.functions = {"f": f}
    program.calls = [
        Call("f", ["x"], ["t"]),
        Call("f", ["t"], ["t"]),  # t is now another value
        Call("f", ["x"], ["u"]),  # equal to the first call
        Call("f", ["u"], ["v"]),  # equal to the second
    ]
    program.outputs = ["t", "u", "v"]
    before = results(program)
    CommonSubexpressionElimination().run(program, Context())
    verify(program)
    assert program.outputs == ["t", "u", "v"]
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before, outputs = results(program), list(program.outputs)
    CommonSubexpressionElimination().run(program, Context())
    verify(program)
    assert program.outputs == outputs
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)
    text = str(program)
    assert CommonSubexpressionElimination().run(program, Context()).changed == 0
    assert str(program) == text
    DeadCodeElimination().run(program, Context())
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)
