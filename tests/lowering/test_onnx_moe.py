"""Experts as com.microsoft::MoE: numerics of kernel and body, and what stays in plain operators."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import torch
from carved import carved
from expert_parts import OUT, SPLITS, TOKENS, WIDTH, Part, random
from onnx.reference import ReferenceEvaluator
from programs import tiny_program

import graphopt as go
from graphopt.errors import LoweringError
from graphopt.ir import Array, Weight
from graphopt.ir.feed_forward import Split
from graphopt.ir.ops import get_op
from graphopt.lowering.onnx import OnnxEmitter, moe
from graphopt.support.progress import silent

PARTS = {
    "gated": ("silu", (4,)),
    "gated, biases": ("silu", (4, 5, 6)),
    "relu": ("relu", ()),
    "relu, bias": ("relu", (5,)),
    "silu": ("silu", ()),
    "gelu_tanh, bias": ("gelu_tanh", (5,)),
}


def model_of(built):
    return onnx.load(built.path)


def ops_of(built):
    return [node.op_type for node in model_of(built).graph.node]


def unit_gates(scores, active):
    (gates,) = get_op("top_k_gating").reference([scores], {"top_k": active})
    return gates


@pytest.fixture
def untested():
    """Verdicts on kernels are those of the test, and forgotten behind it."""
    moe.why_not.cache_clear()
    yield
    moe.why_not.cache_clear()


# Numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", PARTS)
def test_chosen_experts(split, part, tmp_path):
    count, active = SPLITS[split]
    built = Part(tmp_path, count, active, *PARTS[part], routed=(), moe=True)
    assert not built.emitted.fallbacks and not built.emitted.notes[1:]
    assert ops_of(built).count("MoE") == 1 and "NonZero" not in ops_of(built)
    for batch, length in TOKENS:
        scores = random(batch, length, count, seed=1)
        built.check(random(batch, length, WIDTH), scores, unit_gates(scores, active))


def test_experts_that_no_token_runs(tmp_path):
    count, active = SPLITS["S2A2E16"]
    built = Part(tmp_path, count, active, *PARTS["gated"], routed=(), moe=True)
    scores = random(count).sort().values.expand(2, 30, count).contiguous()
    gates = unit_gates(scores, active)
    assert int((gates.sum((0, 1)) > 0).sum()) == active
    built.check(random(2, 30, WIDTH), scores, gates)


GATES = torch.tensor([-0.9, 2.0, -0.5, 1.0, 3.0, 0.0])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_gates_other_than_one(part, with_bias, tmp_path):
    count, active = len(GATES), 2
    bias = 0.1 * random(count) if with_bias else None
    built = Part(tmp_path, count, active, *PARTS[part], routed=(bias, GATES), moe=True)
    assert "MoE" in ops_of(built)
    seen = []
    for batch, length in TOKENS:
        scores = random(batch, length, count, seed=1)
        wide = [v if v is None else v.double() for v in (scores, bias, GATES)]
        (gates,) = get_op("top_k_gating").reference(wide, {"top_k": active})
        sizes = (gates != 0) * (1 + GATES.double().abs())
        built.check(random(batch, length, WIDTH), scores, gates, sizes)
        seen.append(gates[gates != 0])
    assert bool((torch.cat(seen) < 0.8).any()) and bool((torch.cat(seen) > 2).any())


# The body --------------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [(), (None, GATES)], ids=["unit", "general"])
@pytest.mark.parametrize("part", PARTS)
def test_a_runtime_without_the_operator_runs_its_body(part, routed, tmp_path):
    """One that runs function bodies, and one that is given the graph with the body in it."""
    count, active = len(GATES), 3
    built = Part(tmp_path, count, active, *PARTS[part], routed=routed, moe=True)
    model = model_of(built)
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.name) for item in model.functions] == [("com.microsoft", "MoE")]
    assert {node.domain for node in model.functions[0].node} == {""}
    inlined = onnx.inliner.inline_local_functions(model)
    assert {node.domain for node in inlined.graph.node} == {""} and not inlined.functions
    session = ort.InferenceSession(inlined.SerializeToString())
    for batch, length in TOKENS:
        scores = random(batch, length, count, seed=1)
        gate_scale = [] if not routed else [None, GATES.double()]
        (gates,) = get_op("top_k_gating").reference(
            [scores.double(), *gate_scale], {"top_k": active}
        )
        sizes = (gates != 0) * (1 + GATES.double().abs()) if routed else None
        x = random(batch, length, WIDTH)
        for run in (ReferenceEvaluator(model).run, session.run):
            built.check(x, scores, gates, sizes, lambda feeds, run=run: run(None, feeds)[0])


def test_a_runtime_with_the_operator_leaves_its_body_alone(tmp_path):
    built = Part(tmp_path, 5, 2, *PARTS["gated"], routed=(), moe=True)
    model = model_of(built)
    (product,) = (node for node in model.functions[0].node if node.op_type == "Sigmoid")
    product.op_type = "Neg"
    scores, x = random(1, 9, 5), random(1, 9, WIDTH)
    gates = unit_gates(scores, 2)
    kernel = ort.InferenceSession(model.SerializeToString())
    built.check(x, scores, gates, run=lambda feeds: kernel.run(None, feeds)[0])
    with pytest.raises(AssertionError):
        body = ReferenceEvaluator(model)
        built.check(x, scores, gates, run=lambda feeds: body.run(None, feeds)[0])


# Weights ---------------------------------------------------------------------------------------


def test_weights_lie_once_as_the_operator_reads_them(tmp_path):
    built = Part(tmp_path, 5, 2, *PARTS["gated, biases"], routed=(), neurons=64, moe=True)
    model = model_of(built)
    (node,) = (node for node in model.graph.node if node.op_type == "MoE")
    held = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    first, bias, last = (held[name] for name in node.input[2:])
    weights = {index: value.numpy() for index, value in built.weights.items()}
    for expert in range(5):
        rows = slice(64 * expert, 64 * expert + 64)
        for place, index in ((0, 4), (1, 2)):
            assert np.array_equal(first[expert, place::2], weights[index][rows])
        for place, index in ((0, 6), (1, 5)):
            assert np.array_equal(bias[expert, place::2], weights[index][rows])
        assert np.array_equal(last[expert], weights[3][:, rows])
    assert set(built.emitted.storage) == {"w2", "w3", "w4", "w5", "w6"}
    size = built.path.with_name("model.onnx.data").stat().st_size
    assert size < 4 * sum(w.numel() for w in built.weights.values()) + 3 * 4096


# What stays in plain operators -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "options", "reason"),
    [
        (("gelu", ()), {"routed": ()}, "it has no gelu"),
        (("gelu_tanh", (4,)), {"routed": ()}, "it has no gated gelu_tanh"),
        (("silu", (4, 6)), {"routed": ()}, "one of two projections has a bias"),
        (("silu", (4,)), {"routed": (), "out": OUT}, "it gives what it takes"),
        (("silu", (4,)), {"routed": (None, torch.tensor([1.0, -1.0, 0.5, 1.0, 1.0]))},
         "needs gates above 0"),
        (("silu", (4,)), {}, "the same number of experts for every token"),
    ],
)  # fmt: skip
def test_what_the_operator_cannot_take_stays_plain(part, options, reason, tmp_path):
    built = Part(tmp_path, 5, 2, *part, moe=True, **options)
    assert "MoE" not in ops_of(built) and not model_of(built).functions
    ((where, found),) = built.emitted.fallbacks
    assert where == "part" and reason in found and "experts in plain operators" in found
    routed = options.get("routed")
    scores, x = random(2, 6, 5), random(2, 6, WIDTH)
    gates = scores if routed is None else unit_gates(scores, 2)
    sizes = None
    if routed:
        wide = [scores.double(), None, routed[1].double()]
        (gates,) = get_op("top_k_gating").reference(wide, {"top_k": 2})
        sizes = (gates != 0) * (1 + routed[1].double().abs())
    built.check(x, scores, gates, sizes)


def layers_of(program):
    return [call for call in program.calls if call.path.startswith("layers.")]


def test_experts_that_share_matrices_or_differ_stay_plain(tmp_path):
    """A layer on another's weights, and one with an activation that the body does not have."""
    program = carved(tiny_program(layers=4), Split(18, 5, 3))
    first, second, third, fourth = layers_of(program)
    for slot, name in first.weights.items():
        if slot.endswith(".experts"):
            second.weights[slot] = name
    program.prune_unused()
    other = program.functions[fourth.function].clone("other")
    program.functions["other"] = other
    (node,) = (node for node in other.nodes if node.op == "experts")
    node.attrs = {**node.attrs, "act": "relu"}
    gate = node.inputs[4]
    node.inputs[4] = None
    slots = {value: slot for slot, value in other.weights.items()}
    del fourth.weights[slots[gate]], other.weights[slots[gate]]
    fourth.function = "other"
    program.prune_unused()
    emitted = OnnxEmitter(moe=True).emit(program, tmp_path, "cpu", silent)
    reasons = dict(emitted.fallbacks)
    assert set(reasons) == {"layers.0 and 1 more", "layers.3"}
    assert "something else reads its matrices" in reasons["layers.0 and 1 more"]
    assert "a file has one body" in reasons["layers.3"]
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert [node.op_type for node in model.graph.node].count("MoE") == 1
    assert third.path in next(n.name for n in model.graph.node if n.op_type == "MoE").replace(
        "/", "."
    )


def test_matrices_that_are_constants_stay_plain(tmp_path):
    program = carved(tiny_program(), Split(18, 5, 3))
    for weight in list(program.weights):
        if weight.name.endswith("up_proj.weight.experts"):
            program.weights.replace(Weight(weight.name, Array(weight.load()), constant=True))
    emitted = OnnxEmitter(moe=True).emit(program, tmp_path, "cpu", silent)
    ((where, reason),) = emitted.fallbacks
    assert where == "layers.0 and 1 more" and "not weights of the model" in reason


# The test of the kernel ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("activation_alpha", 1.702, r"gives other values for silu, off by 0\.\d+"),
        ("activation_beta", 1.0, r"gives other values for silu, off by"),
        ("swiglu_limit", 7.0, r"gives other values for silu, off by"),
        ("activation_type", "none of these", r"does not run it: .*none of these"),
    ],
)
def test_another_swiglu_is_found_out(attribute, value, reason, untested, monkeypatch):
    own = moe.Kind.attributes
    monkeypatch.setattr(moe.Kind, "attributes", lambda kind: {**own(kind), attribute: value})
    found = moe.why_not(moe.Kind("silu", True, False))
    assert f"ONNX Runtime {ort.__version__}" in found and re.search(reason, found)


def test_a_kernel_that_fails_its_test_is_not_used(untested, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(moe, "_error", lambda kind, unit: asked.append(kind) or float("nan"))
    program = carved(tiny_program(cache=True, layers=3), Split(18, 5, 3))
    report = go.emit(program, tmp_path / "out", emit=("onnx",), onnx_moe=True)
    (note,) = (note for note in report.artifact.notes if "com.microsoft::MoE" in note.reason)
    assert note.where == "layers.0 and 2 more" and "gives other values for silu" in note.reason
    assert asked == [moe.Kind("silu", True, False)]
    plain = go.emit(program, tmp_path / "plain", emit=("onnx",))
    assert not [note for note in plain.artifact.notes if "MoE" in note.reason]
    for name in ("model.onnx", "model.onnx.data"):
        found, expected = (tmp_path / out / "onnx" / name for out in ("out", "plain"))
        assert found.read_bytes() == expected.read_bytes()
    with pytest.raises(LoweringError, match=r"gives other values.*Leave --strict out"):
        go.emit(program, tmp_path / "no", emit=("onnx",), onnx_moe=True, strict=True)
    assert len(asked) == 1 and not (tmp_path / "no").exists()


# The option ------------------------------------------------------------------------------------


def test_a_program_without_experts_is_told_so(tmp_path):
    report = go.emit(tiny_program(), tmp_path / "out", emit=("onnx",), onnx_moe=True)
    assert any("no experts for com.microsoft::MoE" in note.reason for note in report.artifact.notes)
