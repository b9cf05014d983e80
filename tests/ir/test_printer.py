"""What programs look like in print."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import tiny_program

from graphopt.ir import B, Call, Function, In, P, Param, Program, S, Type, Value
from graphopt.ir.printer import format_count, print_function, print_program
from graphopt.ir.text import format_attr

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("cached", {"cache": True, "window": 3, "layers": 5}),
        ("alibi", {"alibi": True, "tied": False, "norm": "layer", "bias": True, "softcap": 2.0}),
    ],
)
def test_a_whole_program(name, options):
    """The files under golden/ are the text as a person should see it; read them when it changes."""
    program = tiny_program(**options)
    assert print_program(program) + "\n" == (GOLDEN / f"{name}.txt").read_text()
    assert str(program) == print_program(program)


def calls(*values, **others):
    """The lines that say what is called, with what attributes."""
    f = Function("layer", params=[Value("x")])
    node = f.add("scale", [f.params[0]], {"factor": Param("by")}, ["y"])
    f.results = [node.output]
    program = Program("p", inputs={"x": Type((B, S, 4), torch.float32)}, functions={"layer": f})
    for index, value in enumerate(values):
        attrs = {"by": value} | {key: given[index] for key, given in others.items()}
        program.calls.append(Call("layer", ["x"], ["x"], attrs=attrs))
    lines = [line.strip() for line in print_program(program).splitlines()]
    return [line for line in lines if line.startswith("x = ")]


def test_calls_say_what_they_set():
    assert calls(2.0, 3.0) == ["x = layer[by=2.0](x)", "x = layer[by=3.0](x)"]
    assert calls(1, wide=[True], cap=[None]) == ["x = layer[by=1, cap=None, wide=True](x)"]


def test_notes_and_counts():
    program = tiny_program()
    program.notes = [("layers.0", "a reason")]
    assert '\n\nnotes:\n    "layers.0": "a reason"\n' in print_program(program)
    counts = {999: "999", 1000: "1.0K", 134_515_008: "134.5M", 7 * 10**9: "7.0B", 10**12: "1.0T"}
    assert {n: format_count(n) for n in counts} == counts


def test_attributes():
    assert format_attr(1 / 3) == "0.3333333333333333" and format_attr(1e-5) == "1e-05"
    assert format_attr([P + S, (1, None)]) == "[P+S, (1, None)]"
    assert format_attr(torch.bfloat16) == "bf16" and format_attr(Param("window")) == "window"


def body(function):
    return [line.strip() for line in print_function(function).splitlines()[1:]]


def test_values_used_once_are_written_where_they_are_used():
    f = Function("f", params=[Value("x"), Value("y")])
    x, y = f.params
    total = f.add("add", [x, y], names=["total"]).output
    product = f.add("mul", [f.add("silu", [total], names=["s"]).output, y], names=["m"]).output
    f.results = [f.add("tanh", [product], names=["t"]).output]
    assert body(f) == ["total = x + y", "t = tanh(silu(total) * y)", "return t"]
    # A value with two readers, or one that leaves the function, has a line of its own.
    f.results.append(product)
    assert body(f) == ["total = x + y", "m = silu(total) * y", "t = tanh(m)", "return t, m"]


def test_operands_behind_an_absent_one_are_named():
    f = Function("f", params=[Value("q"), Value("m"), Value("s")])
    q, m, s = f.params
    attrs = {"scale": 0.5, "causal": False, "window": None, "chunk": 4}
    f.results = [f.add("attention", [q, q, q, m, None, s], attrs, ["a"]).output]
    assert body(f)[0] == "a = attention(q, q, q, m, slopes=s, scale=0.5, causal=False, chunk=4)"


def test_aten_calls_read_as_in_torch():
    f = Function("f", params=[Value("x")])
    attrs = {"args": [[In(0), In(1)], -1], "kwargs": {"dtype": torch.float32}}
    w = f.weights["w.weight"] = Value("w_w")
    f.results = [f.add("aten.cat.default", [f.params[0], w], attrs, ["c"]).output]
    arange = f.add("aten.arange.start", [], {"args": [P, P + S]}, ["r"])
    f.results.append(arange.output)
    assert body(f) == [
        "c = aten.cat([x, w], -1, dtype=f32)",
        "r = aten.arange.start(P, P+S)",
        "return c, r",
    ]
