from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from small import function, one, programs, results, slot

from graphopt.ir import B, Call, In, Param, S, Type
from graphopt.ir.printer import print_function
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.normalise import Normalise

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def body(owner):
    """The statements of a function as text."""
    return [line.strip() for line in print_function(owner).splitlines()[1:]]


def test_moves_of_heads_vanish_or_merge():
    f = function()
    x = f.params[0]
    split = f.add("split_heads", [x], {"head_dim": 4, "swap": False}, ["q"]).output
    swapped = f.add("swap_heads", [split], names=["qt"]).output
    twice = f.add("swap_heads", [f.add("swap_heads", [swapped]).output]).output
    merged = f.add("merge_heads", [f.add("tanh", [twice]).output], names=["m"]).output
    back = f.add("merge_heads", [f.add("split_heads", [merged], {"head_dim": 4}).output]).output
    f.results = [f.add("scale", [back], {"factor": 1.0}).output]
    program = one(f)
    before = results(program)
    result = Normalise().run(program, Context())
    assert body(f) == [
        "merge_heads = merge_heads(tanh(split_heads(x, head_dim=4)))",
        "return merge_heads",
    ]
    assert result.record.rules == {
        "absorb_swap": 3,
        "cancel_split_merge": 1,
        "drop_unit_scale": 1,
    }
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


def test_two_swaps_are_none():
    f = function()
    heads = f.add("tanh", [f.add("split_heads", [f.params[0]], {"head_dim": 4}).output]).output
    twice = f.add("swap_heads", [f.add("swap_heads", [heads]).output]).output
    f.results = [f.add("merge_heads", [f.add("silu", [twice]).output], names=["m"]).output]
    result = Normalise().run(one(f), Context())
    assert body(f) == ["m = merge_heads(silu(tanh(split_heads(x, head_dim=4))))", "return m"]
    assert result.record.rules == {"cancel_swaps": 1}


def test_heads_come_first_before_rope():
    f = function()
    cos, sin = slot(f, "cos"), slot(f, "sin")
    q = f.add("split_heads", [f.params[0]], {"head_dim": 4, "swap": False}, ["q"]).output
    r = f.add("rope", [q, cos, sin], {"heads_first": False}, ["r"]).output
    s = f.add("swap_heads", [r], names=["s"]).output
    f.results = [f.add("merge_heads", [s], names=["m"]).output]
    table = torch.tensor([[[0.5, 0.25]]], dtype=torch.float64)
    program = one(f, constants={"cos": table, "sin": table})
    before = results(program)
    Normalise().run(program, Context())
    assert body(f) == [
        "m = merge_heads(rope(split_heads(x, head_dim=4), cos, sin))",
        "return m",
    ]
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


def test_a_rope_that_something_else_reads_stays():
    f = function()
    cos, sin = slot(f, "cos"), slot(f, "sin")
    q = f.add("split_heads", [f.params[0]], {"head_dim": 4, "swap": False}).output
    r = f.add("rope", [q, cos, sin], {"heads_first": False}).output
    f.results = [f.add("swap_heads", [r]).output, r]
    table = torch.ones(1, 1, 2, dtype=torch.float64)
    program = one(f, constants={"cos": table, "sin": table})
    text = str(program)
    assert Normalise().run(program, Context()).changed == 0
    assert str(program) == text


def test_factors_and_operand_order():
    f = function(params=("x", "y"))
    w = slot(f, "w")
    x, y = f.params
    a = f.add("scale", [f.add("scale", [x], {"factor": 3.0}).output], {"factor": 2.0}, ["a"]).output
    f.results = [f.add("mul", [w, f.add("add", [y, a], names=["b"]).output], names=["c"]).output]
    program = one(f, weights={"w": torch.ones(8, dtype=torch.float64)})
    Normalise().run(program, Context())
    assert body(f) == ["b = y + scale(x, factor=6)", "c = b * w", "return c"]


def test_aten_operators_that_do_nothing_are_dropped():
    f = function()
    x = f.params[0]
    kind = Type((B, S, 8), torch.float64)

    def aten(op, value, args, out=kind):
        attrs = {"args": [In(0), *args], "kwargs": {}, "types": [out]}
        return f.add(f"aten.{op}", [value], attrs).output

    value = aten("dropout.default", x, [0.5, False])
    for op, args in (
        ("detach.default", []),
        ("to.dtype", [torch.float64]),
        ("view.default", [[B, S, 8]]),
        ("add.Tensor", [0]),
        ("div.Tensor", [1]),
    ):
        value = aten(op, value, args)
    kept = aten("dropout.default", value, [0.0, True])
    narrow = aten("to.dtype", kept, [torch.float32], Type((B, S, 8), torch.float32))
    f.results = [narrow]
    program = one(f)
    Normalise().run(program, Context())
    assert body(f) == [f"{narrow.name} = aten.to.dtype(x, f32)", f"return {narrow.name}"]


def test_an_attribute_that_differs_between_calls_is_never_folded():
    f = function()
    inner = f.add("scale", [f.params[0]], {"factor": Param("by")}).output
    f.results = [f.add("scale", [inner], {"factor": 2.0}).output]
    program = one(f, attrs={"by": 1.0})
    twin = Call("block", ["r0"], ["r1"], attrs={"by": 3.0})
    program.calls.append(twin)
    program.outputs = ["r1"]
    assert Normalise().run(program, Context()).changed == 0
    twin.attrs["by"] = 1.0
    result = Normalise().run(program, Context())
    assert result.changed == 2  # one place in each of two calls
    assert len(f.nodes) == 1


def test_a_split_of_other_size_is_no_inverse():
    f = function()
    heads = f.add("split_heads", [f.params[0]], {"head_dim": 4}).output
    merged = f.add("merge_heads", [f.add("tanh", [heads]).output]).output
    f.results = [f.add("merge_heads", [f.add("split_heads", [merged], {"head_dim": 2}).output],
                       {"swap": False}).output]  # fmt: skip
    program = one(f)
    assert Normalise().run(program, Context()).changed == 0


@QUICK
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before = results(program)
    Normalise().run(program, Context())
    verify(program)
    torch.testing.assert_close(results(program), before, rtol=1e-12, atol=1e-12)
    text = str(program)
    assert Normalise().run(program, Context()).changed == 0
    assert str(program) == text


def test_no_weight_is_touched():
    f = function()
    f.results = [f.add("add", [slot(f, "w"), f.params[0]]).output]
    program = one(f, weights={"w": torch.ones(8, dtype=torch.float64)})
    held = program.weights["w"]
    assert Normalise().run(program, Context()).changed == 1
    assert program.weights["w"] is held
