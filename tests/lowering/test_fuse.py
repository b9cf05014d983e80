"""Lowering passes: each fusion on a graph that it takes and on graphs that it must leave."""

from __future__ import annotations

import pytest
import torch
from carved import carved
from packed_programs import projections, with_packed
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.execute.interpreter import Runner
from graphopt.ir.encoding import Packed
from graphopt.ir.feed_forward import Split
from graphopt.ir.graph import Function, Program, Value
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_function
from graphopt.ir.verify import verify
from graphopt.lowering.torch import fuse
from graphopt.lowering.torch.fuse_quantised import (
    QUANTISED_RULES,
    fuse_gate_with_linears,
    fuse_norm_with_linears,
    fuse_rotations_with_transforms,
    fuse_rounding_with_cache,
    fuse_transform_with_linears,
)
from graphopt.lowering.torch.fuse_sums import fuse_attention_with_sum, fuse_linear_with_sum
from graphopt.lowering.torch.passes import lower, lowering_passes
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.rewrite import apply_rules
from graphopt.targets import get_target

EXPERTS = {"act": "silu", "active": 1}
FOUR, ZEROS = {"bits": 4, "symmetric": True}, {"bits": 4, "symmetric": False}
ONE, CAUSAL = {"parts": 1}, {"scale": 0.5, "causal": True}
RANKS = {"ranks": 2}


def function(*lines, params=("x", "y"), weights=("a", "b", "c"), results=("out",)):
    """Return a function of lines such as ("out", "add", "x y", {})."""
    made = Function("f", [Value(name) for name in params])
    made.weights = {name: Value(name) for name in weights}
    values = {value.name: value for value in made.values()}
    for names, op, operands, *attrs in lines:
        inputs = [values.get(name) for name in operands.split()]
        outputs = names.split()
        node = made.add(op, inputs, *attrs, names=outputs, outputs=len(outputs))
        values |= {value.name: value for value in node.outputs}
    made.results = [values[name] for name in results]
    return made


ATTENDED = [("o", "attention", "x y y", CAUSAL), ("h", "merge_heads", "o")]
GATED = [("g", "linear", "x a"), ("u", "linear", "x b"), ("s", "silu", "g")]
SHARED = [*GATED, ("h", "mul", "s u"), ("d", "linear", "h c")]
TAKEN = {
    "fuse_experts": (
        function(
            *SHARED, ("e", "experts", "x y k l m", EXPERTS), ("out", "add", "d e"),
            weights=("a", "b", "c", "k", "l", "m"),
        ),
        ["moe(x, y, k, l, m, shared_up=b, shared_down=c, shared_gate=a"],
    ),
    "fuse_routing": (
        function(("s", "linear", "x a b"), ("out", "top_k_gating", "s y", {"top_k": 2})),
        ["route(x, a, b, y, top_k=2)"],
    ),
    "fuse_activation_with_product": (
        function(("s", "silu", "x"), ("out", "mul", "y s")),
        ['act_mul(x, y, act="silu")'],
    ),
    "fuse_sum_with_norm": (
        function(
            ("t", "add", "x y"), ("n", "rms_norm", "t a", {"eps": 1e-5}), ("out", "add", "t n")
        ),
        ["t, n = add_rms_norm(x, y, a, eps=1e-05)"],
    ),
    "fuse_rotations": (
        function(
            ("q", "rope", "x cos sin"), ("k", "rope", "y cos sin"),
            params=("x", "y", "cos", "sin"), results=("q", "k"),
        ),
        ["q, k = rope_pair(x, y, cos, sin)"],
    ),
    "fuse_linears": (
        function(
            ("q", "linear", "x a"), ("n", "relu", "q"), ("k", "linear", "x b"), results=("n", "k")
        ),
        ["q, k = fused_linear(x, a, b, parts=2)"],
    ),
    "fuse_packed_linears": (
        function(
            ("q", "linear", "x p"), ("n", "relu", "q"), ("k", "linear", "x r"),
            weights=("p", "r"), results=("n", "k"),
        ),
        ["q, k = packed_linear(x, p, r, parts=2)"],
    ),
    "fuse_rounding_with_linears": (
        function(("r", "quantise_dequantise", "x", FOUR), ("out", "packed_linear", "r a", ONE)),
        ["r_codes, r_scales = transformed(x, bits=4)", "integer_linear(r_codes, r_scales, a"],
    ),
    "fuse_transform_with_rounding": (
        function(
            ("t", "kronecker", "x a b"), ("codes scales", "transformed", "t", {"bits": 4}),
            results=("codes", "scales"),
        ),
        ["codes, scales = transformed(x, left=a, right=b, bits=4)"],
    ),
    "fuse_front_with_transform": (
        function(
            ("t n", "add_rms_norm", "x y a", {"eps": 1e-5}),
            ("codes scales", "transformed", "n", {"bits": 4}), results=("t", "codes", "scales"),
        ),
        ['t, codes, scales = transformed(x, y, a, bits=4, before="norm"', "total"],
    ),
    "fuse_gate_with_linears": (
        function(
            ("up gate", "packed_linear", "x a b", {"parts": 2}),
            ("out", "act_mul", "gate up", {"act": "silu"}),
        ),
        ['out = packed_linear(x, b, a, parts=2, act="silu")'],
    ),
    "fuse_norm_with_linears": (
        function(
            ("t n", "add_rms_norm", "x y a", {"eps": 1e-5}),
            ("q k", "packed_linear", "n b c", {"parts": 2}), results=("t", "q", "k"),
        ),
        ["t, q, k = norm_packed_linear(x, y, a, b, c, eps=1e-05, parts=2)"],
    ),
    "fuse_transform_with_linears": (
        function(
            ("t n", "transformed", "x y - a", {"before": "norm", "eps": 1e-5, "total": True}),
            ("q k", "packed_linear", "n b c", {"parts": 2}), results=("t", "q", "k"),
        ),
        ["t, q, k = transformed_packed_linear(x, y, left=a, factors_0=b, factors_1=c", "total"],
    ),
    "fuse_rotations_with_transforms": (
        function(
            ("q k", "rope_pair", "x y cos sin"), ("r", "kronecker", "q - a"),
            ("s", "kronecker", "k - b"), params=("x", "y", "cos", "sin"), results=("r", "s"),
        ),
        ["r, s = rope_pair(x, y, cos, sin, a, b)"],
    ),
    "fuse_rounding_with_cache": (
        function(
            ("k", "quantise_dequantise", "x", ZEROS), ("v", "quantise_dequantise", "y", ZEROS),
            ("out c d", "attention", "q k v - - - - past_k past_v", CAUSAL),
            params=("x", "y", "q", "past_k", "past_v"), results=("out", "c", "d"),
        ),
        ["attention(q, x, y, past_k=past_k, past_v=past_v", "kv_bits=4"],
    ),
    "fuse_linear_with_sum": (
        function(("s", "linear", "x a b"), ("out", "all_reduce", "s", RANKS)),
        ["linear_all_reduce(x, a, b, ranks=2)"],
    ),
    "fuse_attention_with_sum": (
        function(*ATTENDED, ("out", "linear_all_reduce", "h a", RANKS)),
        ["o = attention(x, y, y", "attention_linear_all_reduce(o, a, ranks=2)"],
    ),
}  # fmt: skip
LEFT = {
    "fuse_experts": [],
    "fuse_routing": [
        (function(("out", "top_k_gating", "x", {"top_k": 2})), "not those of a linear"),
        (
            function(
                ("s", "linear", "x a"), ("out", "top_k_gating", "s", {"top_k": 2}),
                results=("out", "s"),
            ),
            "something else reads its scores",
        ),
    ],
    "fuse_activation_with_product": [
        (function(("out", "mul", "x y")), "neither factor is an activation"),
        (
            function(("s", "silu", "x"), ("m", "mul", "s y"), ("out", "add", "s m")),
            "something else reads the activation",
        ),
        (function(("s", "silu", "x"), ("out", "mul", "s s")), "something else reads the activ"),
    ],
    "fuse_sum_with_norm": [
        (function(("out", "rms_norm", "x a", {"eps": 0.1})), "what it norms is no sum"),
        (
            function(
                ("t", "add", "x y"), ("w", "abs", "a"), ("out", "rms_norm", "t w", {"eps": 0.1})
            ),
            "its gain is computed",
        ),
    ],
    "fuse_rotations": [
        (
            function(
                ("q", "rope", "x cos sin"), ("out", "rope", "q cos sin"), params=("x", "cos", "sin")
            ),
            "something reads it before the other",
        ),
        (
            function(
                ("q", "rope", "x cos sin"), ("k", "rope", "y cos sin", {"interleaved": True}),
                params=("x", "y", "cos", "sin"), results=("q", "k"),
            ),
            "nothing else is rotated",
        ),
    ],
    "fuse_linears": [
        (function(("out", "linear", "x a")), "nothing else multiplies its input"),
        (
            function(("q", "linear", "x a"), ("k", "linear", "x a"), results=("q", "k")),
            "read elsewhere",
        ),
        (
            function(("q", "linear", "x a"), ("k", "linear", "x b c"), results=("q", "k")),
            "nothing else multiplies its input",
        ),
    ],
    "fuse_packed_linears": [
        (function(("out", "linear", "x a")), "its weight is not packed"),
        (
            function(("out", "linear", "x t"), weights=("t",)),
            "its weight is packed(bits=3, group=32, axis=1, symmetric), and kernels read other",
        ),
    ],
    "fuse_rounding_with_linears": [
        (
            function(("r", "quantise_dequantise", "x", FOUR), ("out", "linear", "r a")),
            "something reads its values that does not read codes",
        ),
        (
            function(
                ("r", "quantise_dequantise", "x", ZEROS), ("out", "packed_linear", "r a", ONE)
            ),
            "its codes have zero points",
        ),
        (
            function(
                ("r", "quantise_dequantise", "x y", FOUR), ("out", "packed_linear", "r a", ONE)
            ),
            "its clips are no weights of one number",
        ),
    ],
    "fuse_transform_with_rounding": [
        (function(("w", "abs", "a"), ("out", "kronecker", "x w b")), "its factors are computed"),
        (function(("out", "kronecker", "x - b")), "it is one dense product"),
    ],
    "fuse_front_with_transform": [
        (
            function(("t", "abs", "x"), ("out", "transformed", "t a", {"before": "silu"})),
            "a norm or a gate is in it already",
        ),
        (
            function(("t", "abs", "x"), ("out s", "transformed", "t", {"bits": 4})),
            "made by neither a norm nor a gate",
        ),
        (
            function(
                ("n", "rms_norm", "x a", {"eps": 0.1}), ("out s", "transformed", "n", {"bits": 4}),
                results=("out", "n"),
            ),
            "something else reads what it transforms",
        ),
    ],
    "fuse_gate_with_linears": [
        (function(("out", "act_mul", "x y", {"act": "silu"})), "not both results of one product"),
        (
            function(
                ("gate up", "packed_linear", "x a b", {"parts": 2}),
                ("out", "act_mul", "gate up", {"act": "silu"}), results=("out", "up"),
            ),
            "something else reads the product",
        ),
    ],
    "fuse_norm_with_linears": [
        (function(("out", "packed_linear", "x a", ONE)), "made by no norm"),
        (
            function(
                ("n", "rms_norm", "x a", {"eps": 1e-5}), ("out", "packed_linear", "n b", ONE),
                results=("n", "out"),
            ),
            "something else reads the norm",
        ),
    ],
    "fuse_transform_with_linears": [
        (function(("out", "packed_linear", "x b", ONE)), "made by no transform"),
        (
            function(
                ("n", "transformed", "x - - a"), ("out", "packed_linear", "n b", ONE),
                results=("n", "out"),
            ),
            "something else reads the transform",
        ),
    ],
    "fuse_rotations_with_transforms": [
        (
            function(
                ("q k", "rope_pair", "x y cos sin"), ("r", "kronecker", "q - a"),
                params=("x", "y", "cos", "sin"), results=("r", "k"),
            ),
            "read by something else",
        ),
        (
            function(
                ("q k", "rope_pair", "x y cos sin"), ("r", "kronecker", "q - a"),
                ("s", "kronecker", "k b -"), params=("x", "y", "cos", "sin"), results=("r", "s"),
            ),
            "not by one factor",
        ),
    ],
    "fuse_rounding_with_cache": [
        (
            function(
                ("k", "quantise_dequantise", "x", ZEROS),
                ("out c d", "attention", "q k y - - - - past_k past_v", CAUSAL),
                params=("x", "y", "q", "past_k", "past_v"),
            ),
            "its keys and values are not both rounded",
        ),
        (
            function(
                ("k", "quantise_dequantise", "x", ZEROS), ("v", "quantise_dequantise", "y", ZEROS),
                ("out", "attention", "q k v", CAUSAL), params=("x", "y", "q"),
            ),
            "it has no cache",
        ),
    ],
    "fuse_linear_with_sum": [
        (function(("out", "all_reduce", "x", RANKS)), "not made by a linear"),
        (
            function(
                ("t", "linear", "x a"), ("s", "all_reduce", "t", RANKS), results=("s", "t")
            ),
            "something else reads what it sums",
        ),
        (
            function(
                ("t", "linear", "x p"), ("out", "all_reduce", "t", RANKS), weights=("p",)
            ),
            "the weight of what it sums is packed",
        ),
    ],
    "fuse_attention_with_sum": [
        (function(("out", "linear_all_reduce", "x a", RANKS)), "not made by an attention"),
        (
            function(*ATTENDED, ("out", "linear_all_reduce", "h a b", RANKS)),
            "a bias is added, for which a sum in chunks has no place",
        ),
        (
            function(
                *ATTENDED, ("g", "sigmoid", "b"), ("m", "mul", "h g"),
                ("out", "linear_all_reduce", "m a", RANKS),
            ),
            "mul stands between the attention and it",
        ),
        (
            function(
                *ATTENDED, ("l", "linear", "h b"), ("out", "linear_all_reduce", "l a", RANKS)
            ),
            "not made by an attention",
        ),
        (
            function(
                *ATTENDED, ("out", "linear_all_reduce", "h a", RANKS), results=("out", "o")
            ),
            "something else reads the attention's output",
        ),
        (
            function(
                ("o", "attention", "x y y - x", CAUSAL), ("h", "merge_heads", "o"),
                ("out", "linear_all_reduce", "h a", RANKS),
            ),
            "sees keys behind its own, or a bias",
        ),
        (
            function(
                ("o", "attention", "x y y", CAUSAL | {"causal": False}), ("h", "merge_heads", "o"),
                ("out", "linear_all_reduce", "h a", RANKS),
            ),
            "sees keys behind its own, or a bias",
        ),
        (
            function(
                ("o l", "attention", "x y y", CAUSAL | {"lse": True}), ("h", "merge_heads", "o"),
                ("out", "linear_all_reduce", "h a", RANKS), results=("out", "l"),
            ),
            "the attention reads selected pages, or gives statistics",
        ),
        (
            function(*ATTENDED, ("out", "linear_all_reduce", "h a", {"ranks": 4})),
            "for two ranks alone",
        ),
    ],
}  # fmt: skip
CODES = {"p": Packed(4, 32), "r": Packed(4, 32), "s": Packed(4, 64), "t": Packed(3, 32)}
RULES = {
    rule.name: rule
    for rule in (
        *fuse.RULES,
        fuse.fuse_linears({"a", "b", "c"}),
        fuse.fuse_packed_linears(CODES, {"p", "r"}),
        *QUANTISED_RULES,
        fuse_gate_with_linears,
        fuse_norm_with_linears,
        fuse_transform_with_linears(lambda shape: None),
        fuse_rotations_with_transforms,
        fuse_rounding_with_cache(lambda query, key, value, bits: None),
        fuse_linear_with_sum(CODES, get_target("hopper")),
        fuse_attention_with_sum(Program("p")),
    )
}


def test_every_rule_has_its_graphs():
    assert set(RULES) == set(TAKEN) == set(LEFT)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_its_graph(name):
    before, expected = TAKEN[name]
    after = before.clone()
    assert apply_rules(after, [RULES[name]]).counts == {name: 1}
    text = print_function(after)
    assert all(line in text for line in expected), text
    assert [v.name for v in after.results] == [v.name for v in before.results]
    assert apply_rules(after, [RULES[name]]).counts == {}


@pytest.mark.parametrize(
    ("name", "before", "reason"),
    [(name, before, reason) for name, rows in LEFT.items() for before, reason in rows],
)
def test_a_rule_leaves_what_it_must_and_says_why(name, before, reason):
    after = before.clone()
    result = apply_rules(after, [RULES[name]])
    assert result.counts == {} and print_function(after) == print_function(before)
    assert any(reason in refusal.reason for _, refusal in result.refused)
    assert all(refusal.node in after.nodes for _, refusal in result.refused)


def test_packed_weights_that_do_not_go_together_stay_apart():
    """Of another encoding, with a bias, read elsewhere too."""
    for weights, lines in (
        ("p s", [("q", "linear", "x p"), ("k", "linear", "x s")]),
        ("p r b", [("q", "linear", "x p"), ("k", "linear", "x r b")]),
        ("p", [("q", "linear", "x p"), ("k", "linear", "x p")]),
    ):
        made = function(*lines, weights=weights.split(), results=("q", "k"))
        assert apply_rules(made, [RULES["fuse_packed_linears"]]).counts == {
            "fuse_packed_linears": 2
        }
        assert print_function(made).count("parts=1)") == 2


def test_experts_with_another_part_stay_apart_from_it():
    """Another activation, another input, or a part without a gate."""
    for change in ({"act": "relu"}, None):
        part = [*SHARED] if change else [("s", "silu", "x"), ("d", "linear", "s c")]
        made = function(
            *part, ("e", "experts", "x y k l m", EXPERTS | (change or {})), ("out", "add", "d e"),
            weights=("a", "b", "c", "k", "l", "m"),
        )  # fmt: skip
        apply_rules(made, [fuse.fuse_experts])
        text = print_function(made)
        assert "moe(x, y, k, l, m" in text and "shared" not in text


PROGRAMS = {
    "plain": lambda: tiny_program(cache=True, head_dim=32),
    "biases": lambda: tiny_program(bias=True, rotary_dim=4, interleaved=True, tied=False),
    "layer norms": lambda: tiny_program(norm="layer", alibi=True),
    "experts": lambda: carved(tiny_program(cache=True, ffn=56), Split(24, 4, 2)),
    "experts alone": lambda: carved(tiny_program(ffn=56, bias=True), Split(0, 4, 2)),
    "some experts": lambda: carved(tiny_program(ffn=56), Split(24, 4, 2), None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_pipeline_verifies_lowering_like_any_pass(name):
    program = PROGRAMS[name]()
    lowered, report = go.Pipeline(lowering_passes("ampere")).run(program)
    names = [entry.name for entry in report.passes]
    assert names == ["defer-residual-adds", "fuse-layer-ops", "plan-kernels"]
    assert all(entry.exact for entry in report.passes)
    assert report.passes[1].verification == "passed"
    assert str(lowered) == str(lower(program, "ampere"))
    lines = [line for line in str(lowered).splitlines() if " kernels: " not in line]
    assert str(parse_program(str(lowered))).splitlines() == lines
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    for mode in ("reference", "torch"):
        found = Runner(lowered, dtype=torch.float64, mode=mode).logits({"input_ids": ids})
        # Sums in another order, in fp64.
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_lowering_makes_the_fused_ops_and_keeps_the_program(tmp_path):
    program = PROGRAMS["experts"]()
    text = str(program)
    lowered = lower(program, "hopper")
    verify(lowered)
    assert str(program) == text
    ops = {node.op for f in lowered.functions.values() for node in f.nodes}
    assert {"add_rms_norm", "rope_pair", "fused_linear", "moe", "route"} <= ops
    assert "no_addend" in ops and not {"experts", "top_k_gating", "rope"} & ops
    assert lower(program, "cpu") is program
    for target in ("volta", "ascend910b"):
        text = str(lower(program, target))
        assert "add_rms_norm" not in text and " kernels: prefill: " in text
        assert "head_dim is 8" in text and "by its reference" in text


def test_a_layer_hands_its_summands_to_the_norm_of_the_next():
    lowered = lower(tiny_program(layers=3), "ampere")
    first, *layers, head = lowered.calls
    assert first.results[1].endswith("_delta") and head.args[:2] == layers[-1].results[:2]
    for call in layers:
        function = lowered.functions[call.function]
        assert len(function.results) == 2
        assert not any(
            value.node is not None and value.node.op == "add" for value in function.results
        )


@pytest.mark.slow
def test_a_compile_verifies_lowering_and_tells_of_it(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", head_dim=32)
    report = go.compile_model(
        str(folder),
        tmp_path / "out",
        go.CompileOptions(target="ampere", dump_ir=tmp_path / "dumps"),
    )
    entries = {entry.name: entry for entry in report.passes}
    fused = entries["fuse-layer-ops"]
    assert list(entries)[-3:] == ["defer-residual-adds", "fuse-layer-ops", "plan-kernels"]
    assert fused.verification == "passed" and fused.details["rules"]["fuse_rotations"] == 2
    assert entries["plan-kernels"].details["families"] == ["triton"]
    dumps = sorted(path.name for path in (tmp_path / "dumps" / "lowering-torch").iterdir())
    assert dumps[1:] == [
        "01-defer-residual-adds.txt", "02-fuse-layer-ops.txt", "03-plan-kernels.txt",
    ]  # fmt: skip
    text = (tmp_path / "dumps" / "lowering-torch" / dumps[3]).read_text()
    assert "rope_pair(" in text and "kernels: prefill: triton BLOCK_M=" in text
    saved = (tmp_path / "out" / "program.txt").read_text()
    assert "rope_pair(" not in saved and "kernels:" not in saved
    assert "fuse-layer-ops" in (tmp_path / "out" / "report.html").read_text()


def test_norms_and_gates_of_products_are_split_as_what_they_are_made_of():
    """Layouts on ranks are derived of a node's parts."""
    sizes = {"hidden": 128, "ffn": 256, "heads": 8, "kv_heads": 4, "head_dim": 16, "vocab": 96}
    program = with_packed(tiny_program(cache=True, **sizes), projections(Packed(4, 32)))
    sharded = make_pass("shard", {"tp": 2}).run(program, Context()).program
    lowered = lower(sharded, "hopper")
    text = str(lowered)
    assert text.count("norm_packed_linear(") == 3 and 'parts=2, act="silu"' in text
    verify(lowered)


def test_transforms_in_front_of_products_are_split_as_what_they_are_made_of(monkeypatch):
    table = get_target("hopper").quantised
    monkeypatch.setitem(table["front"], "tokens", 1)
    sizes = {"hidden": 128, "ffn": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "vocab": 96}
    program = tiny_program(cache=True, **sizes)
    for name, options in (("insert-affine", {"kind": "hadamard"}), ("fold-affine", {})):
        program = make_pass(name, options).run(program, Context()).program
    program = with_packed(program, projections(Packed(4, 32)))
    lowered = lower(make_pass("shard", {"tp": 2}).run(program, Context()).program, "hopper")
    text = str(lowered)
    assert text.count("transformed_packed_linear(") == 4 and 'total, parts=2, act="silu"' in text
    verify(lowered)
