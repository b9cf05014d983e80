"""Programs from their text: nothing is lost, and what is no program is said to be none."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program
from same_programs import plain
from test_encoding import MIXED, with_packed

from graphopt.errors import ParseError
from graphopt.execute.interpreter import Runner
from graphopt.ir import (
    B,
    Call,
    Function,
    In,
    KVLayout,
    P,
    Param,
    Placement,
    Program,
    S,
    Type,
    Value,
    Weight,
)
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.relayout import with_layouts
from graphopt.ir.scan import Line
from graphopt.ir.text import fold, format_attr, unfold
from graphopt.ir.verify import verify
from graphopt.ir.weights import Missing


def again(program: Program) -> Program:
    """Return a program read from its text, which has all of it and prints as it did."""
    text = print_program(program)
    parsed = parse_program(text)
    assert plain(parsed) == plain(program)
    assert print_program(parsed) == text
    return parsed


OPTIONS = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 4),
        "window": st.sampled_from((None, 3)),
        "softcap": st.sampled_from((None, 2.0)),
        "alibi": st.booleans(),
        "sinks": st.booleans(),
        "interleaved": st.booleans(),
        "tied": st.booleans(),
        "bias": st.booleans(),
        "norm": st.sampled_from(("rms", "layer")),
        "cache": st.booleans(),
    }
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(OPTIONS)
def test_a_decoder_reads_back_and_computes_the_same(options):
    program = tiny_program(**options)
    again(program)
    values = {weight.name: weight.load() for weight in program.weights}
    parsed = parse_program(print_program(program), values)
    verify(parsed)
    ids = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])}
    assert Runner(parsed).logits(ids).equal(Runner(program).logits(ids))


def test_encodings_layouts_placements_and_statistics():
    program = with_packed(tiny_program(layers=3, window=3, cache=True), MIXED.get)
    program = with_layouts(program, {"kv.1": KVLayout("paged", 16)})
    program.states["kv.2"].placement = Placement(("cuda:0", "cuda:1"))
    program.states["kv.2"].dtype = torch.float16
    program.calls[1].placement = Placement(("cpu",))
    weight = program.weights["layers.0.mlp.down_proj.weight"]
    program.weights.replace(
        Weight(weight.name, weight.producer, "other", False, Placement(("cuda:0", "cuda:1")))
    )
    function = program.functions["block"]
    (node,) = (node for node in function.nodes if node.op == "attention")
    node.attrs |= {"lse": True, "page_max": Param("pages")}
    for name in ("lse", "top"):
        node.outputs.append(Value(name, node, len(node.outputs)))
    for call in program.calls[1:4]:
        call.attrs["pages"] = 8
    verify(program)
    parsed = again(program)
    verify(parsed)
    text = print_program(program)
    for part in (
        "embed.weight: f32[97,32] packed(bits=4, group=32, axis=1)\n",
        "kv.1: f32 heads=2 k_dim=8 v_dim=8 paged(page=16)\n",
        "v_dim=8 contiguous placed(cuda:0, cuda:1)\n",
        " at layers.0 placed(cpu)\n",
        ": f32[32,48] from other placed(cuda:0, cuda:1)\n",
        "a, present_k, present_v, lse, top = attention(",
        "def block(x, attention_mask, cos, sin; kv: past_k, past_v -> present_k, present_v):",
    ):
        assert part in text, part


def test_rings():
    layouts = {"kv.0": KVLayout("ring", 4)}
    program = with_layouts(tiny_program(layers=2, window=3, cache=True), layouts)
    verify(program)
    verify(again(program))
    assert "kv.0: f32 heads=2 k_dim=8 v_dim=8 ring(slots=4)\n" in print_program(program)


def test_everything_a_program_knows():
    program = tiny_program(cache=True)
    program.name, program.source = 'a "näme"', "somewhere\nelse # {i}"
    program.checkpoint_dtype = torch.bfloat16
    program.config = {"rope": {"theta": 1e5, "list": [1, None, True, "ä"]}, "b": math.inf}
    program.generation = {"eos_token_id": [1, 2]}
    program.max_length, program.licence = 77, "mit"
    program.notes = [("layers.0 x", 'why: "so"'), ("", "\x1b[31m")]
    program.functions["never called"] = Function("never called", params=[Value("x")])
    again(program)
    assert "config" not in print_program(program, facts=False)


ODD = [
    "S",
    "f32",
    "None",
    "return",
    "causal",
    "a.b",
    "a b",
    "{i}",
    "1",
    "%",
    '"',
    "ä",
    "device",
    "x",
]


@pytest.mark.parametrize("odd", ODD)
def test_names_that_mean_something_else(odd):
    f = Function(odd, params=[Value(odd), Value("y")])
    w, unread = Value("weight"), Value("unread")
    f.weights = {odd: w, f"{odd}.weight": Value("other"), "unread": unread}
    total = f.add("mul", [f.params[0], w], names=["total"]).output
    scaled = f.add("scale", [total], {"factor": Param(odd)}, [f"{odd}_1"]).output
    torch_attrs = {"args": [[In(0), In(1)], odd], "kwargs": {"value": In(1)}}
    cat = f.add("aten.cat.default", [scaled, f.weights[f"{odd}.weight"]], torch_attrs, ["c"])
    f.results = [cat.output, f.params[0]]
    program = Program(odd, inputs={odd: Type((B, 4), torch.float32)}, functions={odd: f})
    for name in (odd, f"{odd}!", "unread"):
        program.weights.add(Weight(name, Missing((4,), torch.float32, name)))
    weights = {odd: odd, f"{odd}.weight": f"{odd}!", "unread": "unread"}
    program.calls = [Call(odd, [odd, odd], [odd, "last"], weights, {odd: 2.0}, path=odd)]
    program.outputs = ["last", odd]
    again(program)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from(
        [
            Param("window"), Param("S"), Param("a b"), torch.bfloat16, torch.complex128,
            torch.strided, torch.contiguous_format, Type((B, 1, P + S), torch.float16),
            Type((), torch.int64), S, -S, P + S, (P + S) * B, (P + S) ** 2, S // 2,
            sympy.Mod(P, 4), sympy.Max(S - 4, P), sympy.ceiling(S / 3), (S + 3) / 4, 2 * P,
        ]
    ),
)  # fmt: skip
ATTRIBUTES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(ATTRIBUTES)
def test_attributes_read_back_as_what_they_are(value):
    line = Line(1, format_attr(value))
    found = line.literal()
    line.end()
    assert found == value and repr(found) == repr(value)


def test_not_a_number_and_devices():
    assert math.isnan(Line(1, format_attr(math.nan)).literal())
    assert Line(1, format_attr(torch.device("meta"))).literal() == torch.device("cpu")


PIECES = st.sampled_from(["a.0.b: f32[4]", "a.{n}.b", "x{n} = f(x{m})", "k{e} {n}", "{{i}}", "007"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PIECES, st.integers(1, 6), st.integers(0, 9)), max_size=6))
def test_loops_write_out_what_they_fold(runs):
    lines = [
        piece.format(n=start + turn, m=start + turn + 3, e=2 * turn)
        for piece, count, start in runs
        for turn in range(count)
    ]
    folded = fold(lines)
    assert len(folded) <= len(lines)
    assert [text.strip() for _, text in unfold(enumerate(folded, 1))] == lines


def test_layers_are_written_once():
    lines = [f"x{n + 1} = f(x{n}) at layers.{n}" for n in range(30)]
    assert fold(lines) == ["    for i in range(30):", "        x{i+1} = f(x{i}) at layers.{i}"]
    pairs = [text for n in range(5, 8) for text in (f"kv.{2 * n}", f"kv.{2 * n + 1} w{n}")]
    assert fold(pairs) == [
        "    for i in range(5, 8):",
        "        kv.{2*i}",
        "        kv.{2*i+1} w{i}",
    ]


def test_values_are_written_where_they_are_read_only_in_their_order():
    f = Function("f", params=[Value("x"), Value("y")])
    x, y = f.params
    a = f.add("silu", [x], names=["a"]).output
    b = f.add("tanh", [y], names=["b"]).output
    f.results = [f.add("mul", [b, a], names=["c"]).output]
    program = Program("p", functions={"f": f}, calls=[Call("f", ["x", "y"], ["z"])])
    program.inputs = dict.fromkeys(("x", "y"), Type((B, S), torch.float32))
    program.outputs = ["z"]
    again(program)
    assert "    c = tanh(y) * a" not in print_program(program)
    (product,) = (node for node in f.nodes if node.op == "mul")
    product.inputs.reverse()
    assert "    c = silu(x) * tanh(y)" in print_program(program)
    again(program)


def test_sums_and_products_keep_their_brackets():
    f = Function("f", params=[Value("x"), Value("y")])
    x, y = f.params
    inner = f.add("mul", [x, y]).output
    outer = f.add("mul", [y, inner]).output
    f.results = [f.add("mul", [outer, x]).output]
    program = Program("p", functions={"f": f}, calls=[Call("f", ["x", "y"], ["z"])])
    program.inputs = dict.fromkeys(("x", "y"), Type((B, S), torch.float32))
    program.outputs = ["z"]
    again(program)
    assert "= y * (x * y) * x" in print_program(program)


def test_a_malformed_program_has_a_text():
    program = tiny_program(layers=1)
    program.functions["block"].nodes[0].op = "silu"
    program.calls[-1].function = "gone"
    text = print_program(program)
    assert "def block(" in text and "gone(x;" in text


TEXT = """
program p
def f(x; kv: k, v -> x_1, x_2):
    x_1, x_2 = rope_table(x, w)
    y = attention(x, x, x, scale=0.5, causal)
    return y
run(x: f32[B,S,4]):
    for i in range(2):
        y{i} = f[a=1](x; kv=kv.{i}) at layers.{i}
    return y0
states:
    kv.0: f32 heads=2 k_dim=8 v_dim=8 ring(slots=4)
weights:
    w: f32[4] constant
    m: f16[4,32] packed(bits=4, group=16, axis=1) placed(cpu)
notes:
    "a": "b"
facts:
    dtype = f32
""".strip()


def test_the_text_of_the_errors_below_is_none():
    program = parse_program(TEXT)
    assert list(program.functions) == ["f"] and len(program.calls) == 2


ERRORS = [
    ("program p", "", 2, 1, "'program'"),
    ("def f(x", "def f(x, x", 2, 10, "a value of another name"),
    ("-> x_1, x_2", "-> x_1, x_3", 2, 27, "a value that the function makes"),
    ("rope_table(x, w)", "rope_tables(x, w)", 3, 16, "an op or a value"),
    ("rope_table(x, w)", "rope_table(x, w", 3, 31, "')'"),
    ("rope_table(x, w)", "w", 3, 16, "an operation, and not a value alone"),
    ("y = attention(", "y = = attention(", 4, 9, "a value"),
    ("scale=0.5", "scale=!", 4, 34, "a word or sign"),
    ("scale=0.5", "scale=", 4, 34, "a literal"),
    ("scale=0.5", "scale=1/0", 4, 34, "a size: algebra in B, S and P"),
    ("scale=0.5", "scale=1, scale=2", 4, 37, "another attribute"),
    ("causal)", "causal, x)", 4, 47, "an attribute of attention"),
    ("x, scale", "x, q=x, scale", 4, 28, "an operand that is not given yet"),
    ("    return y\n", "", 4, 5, "'return'"),
    ("run(x: f32[B,S,4])", "run(x: f33[B,S,4])", 6, 8, "a type such as f32[B,S,64]"),
    ("range(2)", "range(x)", 7, 5, "for i in range(START, END):"),
    ("range(2)", "range(99999999)", 8, 5, "a loop of fewer turns"),
    ("f[a=1]", "g[a=1]", 8, 14, "the name of a function that is defined here"),
    ("    return y0\n", "", 8, 5, "a last line return"),
    ("heads=2", "heads=x", 11, 21, "the number for heads"),
    ("slots=4", "slots=0", 11, 39, "a layout"),
    ("w: f32[4] constant", "w: f32[S] constant", 13, 8, "a shape of whole numbers"),
    ("m: f16", "w: f16", 14, 5, "a weight of another name"),
    ("bits=4", "bits=5", 14, 18, "an encoding (codes of 5 bits"),
    ("group=16", "group=24", 14, 8, "a matrix that is packed so"),
    ("placed(cpu)", "placed(cpu, cpu)", 14, 51, "a placement"),
    ('"a": "b"', '"a" "b"', 16, 9, "':'"),
    ("dtype = f32", "dtype = f33", 18, 13, "a dtype"),
    ("dtype = f32", "config = {", 18, 14, "JSON"),
    ("states:", "stages:", 10, 1, "def, run, states, weights, notes or facts"),
]


@pytest.mark.parametrize(("old", "new", "line", "column", "expected"), ERRORS)
def test_errors_name_line_column_and_what_is_expected(old, new, line, column, expected):
    assert TEXT.count(old) == 1
    with pytest.raises(ParseError) as caught:
        parse_program(TEXT.replace(old, new))
    assert (caught.value.line, caught.value.column) == (line, column), caught.value.message
    assert f"expected {expected}" in caught.value.message


PRINTED = print_program(tiny_program(layers=3, window=3, cache=True, sinks=True))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, len(PRINTED) - 1), st.integers(0, 3), st.sampled_from(["", "(", '"', "0", "\n"])
)
def test_damage_gives_an_error_with_a_place_or_a_program(place, count, instead):
    try:
        parse_program(PRINTED[:place] + instead + PRINTED[place + count :])
    except ParseError as error:
        assert 1 <= error.line <= PRINTED.count("\n") + 3 and error.column >= 1
