from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from small import X, check_text, function, one, programs, results, slot

from graphopt.errors import UsageError
from graphopt.ir import B, Call, In, Param, S, Type
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.dead_code_elimination import DeadCodeElimination
from graphopt.passes.fold_constants import FoldConstants

THREE = torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)


BEFORE = """
program small
def block(x):
    half = scale(c, factor=0.5)
    y = x * tanh(half)
    return y
run(input_ids: i64[B,S], x: f64[B,S,8]):
    r0 = block(x)
    return r0
weights:
    c: f64[8] constant
"""
AFTER = """
program small
def block(x):
    y = x * folded.tanh
    return y
run(input_ids: i64[B,S], x: f64[B,S,8]):
    r0 = block(x; c=c, folded.tanh=block.folded.tanh)
    return r0
weights:
    c: f64[8] constant
    block.folded.tanh: f64[8] constant
"""


def test_what_depends_on_constants_alone_becomes_a_weight():
    result = check_text(FoldConstants(), BEFORE, AFTER, {"c": THREE})
    program = result.program
    assert (result.matched, result.changed, result.skipped) == (1, 1, [])
    weight = program.weights["block.folded.tanh"]
    assert weight.constant and weight.checkpoint is None
    assert weight.load().equal(torch.tanh(THREE / 2))
    assert program.parameter_count() == 0
    DeadCodeElimination().run(program, Context())
    assert [weight.name for weight in program.weights] == ["block.folded.tanh"]


def test_a_trained_weight_is_never_folded():
    f = function()
    gain = f.add("tanh", [slot(f, "w")]).output
    f.results = [f.add("mul", [f.params[0], gain]).output]
    assert FoldConstants().run(one(f, weights={"w": THREE}), Context()).matched == 0


def test_a_large_result_stays_computed_with_the_reason():
    f = function()
    gain = f.add("tanh", [slot(f, "c")], names=["gain"]).output
    f.results = [f.add("mul", [f.params[0], gain]).output]
    program = one(f, constants={"c": THREE})
    text = str(program)
    result = FoldConstants(max_bytes=63).run(program, Context())
    assert (result.matched, result.changed) == (1, 0)
    (skip,) = result.skipped
    assert skip.where == "block: gain"
    assert skip.reason == "its value has 64 bytes, more than max_bytes=63"
    assert str(program) == text


def test_sizes_and_random_numbers_are_not_constant():
    f = function()
    row = {"args": [S], "types": [Type((S,), torch.int64)]}
    f.add("aten.arange.default", [], row)
    noise = {"args": [In(0)], "types": [Type((8,), torch.float64)]}
    random = f.add("aten.rand_like.default", [slot(f, "c")], noise).output
    f.results = [f.add("add", [f.params[0], random]).output]
    assert FoldConstants().run(one(f, constants={"c": THREE}), Context()).matched == 0


def test_calls_with_other_attributes_get_other_values():
    f = function()
    gain = f.add("scale", [slot(f, "c")], {"factor": Param("by")}, ["gain"]).output
    f.results = [f.add("mul", [f.params[0], gain]).output]
    program = one(f, constants={"c": THREE}, attrs={"by": 2.0})
    program.calls.append(Call("block", ["r0"], ["r0"], {"c": "c"}, {"by": 3.0}))
    program.calls.append(Call("block", ["r0"], ["r0"], {"c": "c"}, {"by": 2.0}))
    before = results(program)
    FoldConstants().run(program, Context())
    verify(program)
    names = [call.weights["folded.gain"] for call in program.calls]
    assert names == ["block.folded.gain", "block.folded.gain_1", "block.folded.gain"]
    torch.testing.assert_close(results(program), before, rtol=1e-15, atol=0)


def test_a_senseless_cap_is_refused():
    with pytest.raises(UsageError, match="max_bytes=0 is below 1"):
        FoldConstants(max_bytes=0)
    assert X.shape[0] == B


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before = results(program)
    FoldConstants().run(program, Context())
    verify(program)
    torch.testing.assert_close(results(program), before, rtol=1e-12, atol=1e-12)
    text = str(program)
    assert FoldConstants().run(program, Context()).changed == 0
    assert str(program) == text
