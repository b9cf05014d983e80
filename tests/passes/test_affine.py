"""Transforms and their inverses: put in, multiplied into weights, in every family, to fp64."""

from __future__ import annotations

import onnx
import pytest
import torch
from families import FAMILIES, captured, sampled
from onnx_models import emit, run_in_steps, session
from programs import tiny_program

from graphopt.calibration.second_moments import SecondMoments
from graphopt.errors import PassError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Array
from graphopt.ir.affine import role_of
from graphopt.ir.affine_sites import find_sites
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.insert_affine import InsertAffine
from graphopt.passes.insert_kv_cache import InsertKVCache

BEFORE = """
program small
def block(x):
    h = rms_norm(x, norm, eps=1e-05)
    gated = silu(linear(h, gate)) * linear(h, up)
    y = x + linear(gated, down)
    return y
run(input_ids: i64[B,S], x: f64[B,S,8]):
    x = block(x) at layers.0
    return x
weights:
    layers.0.norm.weight: f64[8]
    layers.0.gate.weight: f64[12,8]
    layers.0.up.weight: f64[12,8]
    layers.0.down.weight: f64[8,12]
"""
INSERTED = """
    h = rms_norm(x, norm, eps=1e-05)
    h_t_1 = kronecker(h * norm.transform.scale, norm.transform.left, norm.transform.right)
    h_t_2 = kronecker(h_t_1, norm.transform.left_inverse, norm.transform.right_inverse)
    h_t_3 = h_t_2 * norm.transform.scale_inverse
    gated = silu(linear(h_t_3, gate)) * linear(h_t_3, up)
    gated_t_1 = kronecker(gated * down.transform.scale, down.transform.left, down.transform.right)
    gated_t_2 = kronecker(gated_t_1, down.transform.left_inverse, down.transform.right_inverse)
    linear_2 = linear(gated_t_2 * down.transform.scale_inverse, down)
    y = x + linear_2
"""
FOLDED = """
    h = rms_norm(x, norm, eps=1e-05)
    h_t_1 = kronecker(h, norm.transform.left, norm.transform.right)
    gated = silu(linear(h_t_1, gate)) * linear(h_t_1, up)
    gated_t_1 = kronecker(gated, down.transform.left, down.transform.right)
    y = x + linear(gated_t_1, down)
"""


def statements(program):
    """The lines of a program's block, without types."""
    text = print_program(program, facts=False).split("def block(x):")[1].split("return y")[0]
    return [line.split("#")[0].strip() for line in text.splitlines()[1:] if line.strip()]


def test_the_program_before_and_after():
    program = parse_program(BEFORE)
    values = {w.name: torch.ones(w.shape, dtype=w.dtype) for w in program.weights}
    inserted = InsertAffine(kind="kronecker").run(parse_program(BEFORE, values), Context())
    assert statements(inserted.program) == [line.strip() for line in INSERTED.split("\n")[1:-1]]
    assert (inserted.matched, inserted.changed) == (2, 2)
    folded = FoldAffine().run(inserted.program, Context())
    assert statements(folded.program) == [line.strip() for line in FOLDED.split("\n")[1:-1]]
    assert (folded.matched, folded.changed) == (4, 4)
    assert not [w.name for w in folded.program.weights if "inverse" in w.name or "scale" in w.name]


IDS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
INPUTS = complete_inputs({"input_ids": IDS})


def widened(program):
    """The same program with weights in fp64, so that folded ones are not rounded to fp32."""
    for weight in list(program.weights):
        if weight.dtype.is_floating_point:
            program.weights.replace(weight.with_producer(Array(weight.load().double())))
    return program


def transforms(program):
    """The role of every transform in the graph, function by function, in order."""
    return {
        name: [role for node in function.nodes if (role := role_of(function, node)) is not None]
        for name, function in program.functions.items()
    }


def difference(before, after):
    old, new = (Runner(program, dtype=torch.float64).logits(INPUTS) for program in (before, after))
    return float((old - new).abs().max() / old.abs().max())


SHAPES = {
    "groups": {},
    "no groups": {"kv_heads": 4},
    "one key head": {"kv_heads": 1},
    "biases": {"bias": True, "norm": "layer"},
    "no rotation": {"alibi": True},
    "untied": {"tied": False},
    "a prime width": {"hidden": 31, "heads": 4},
    "twice a prime": {"ffn": 46},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["kronecker", "hadamard", "random"])
def test_transforms_change_nothing_in_fp64(options, kind):
    """Of condition at most 1e3, with a relative error of at most 1e-9, folded too."""
    program = widened(tiny_program(**options))
    given = program.copy()
    inserted = InsertAffine(kind=kind).run(program, Context())
    worst = inserted.record.worst
    assert worst is not None and worst[1] < 1e3
    assert difference(given, inserted.program) < 1e-9
    folded = FoldAffine().run(inserted.program.copy(), Context())
    assert difference(given, folded.program) < 1e-9
    # The five of a layer; keys count twice.
    online = ["left", "queries", "keys", "left", "left", "left"]
    if options == {"hidden": 31, "heads": 4}:
        online = ["right", "queries", "keys", "left", "right", "left"]
    assert transforms(folded.program)["block"] == online
    assert FoldAffine().run(folded.program, Context()).changed == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_every_family_keeps_its_logits(family):
    """The pipeline holds each pass to fp64 by itself; in fp32 logits are those of the source."""
    _, program = captured(family)
    result, report = Pipeline([InsertAffine(kind="kronecker"), FoldAffine()]).run(program)
    assert [entry.verification for entry in report.passes] == ["passed", "passed"]
    for function in result.functions.values():
        roles = [role_of(function, node) for node in function.nodes]
        assert not {"left_inverse", "right_inverse", "scale", "values"} & set(roles)
    assert all(skip.where and skip.reason for entry in report.passes for skip in entry.skipped)


LEFT = {
    "olmo": "values of self_attn.o_proj: its attention's values are not heads",
    "mixtral": "mlp.gate: it chooses experts",
    "gpt_oss": "mlp.router: it chooses experts",
    "deepseek_v3": "not heads of a linear's output",
    "falcon": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LEFT)
def test_what_is_left_alone_is_said(family):
    _, program = captured(family)
    told = [f"{where}: {why}" for s in find_sites(program).values() for where, why in s.left]
    assert any(LEFT[family] in line for line in told) if LEFT[family] else not told


@pytest.mark.slow
def test_experts_of_a_mixture_share_a_transform():
    _, program = captured("mixtral")
    (sites,) = find_sites(program).values()
    stems = {site.stem: len(site.readers) for site in sites.inputs}
    assert stems["mlp.experts.gate_up_proj"] == 1 and stems["mlp.experts.down_proj"] == 1
    assert stems["input_layernorm"] == 3


@pytest.mark.parametrize("options", [{}, {"kv_heads": 1, "bias": True}], ids=str)
def test_transforms_are_functions_of_the_onnx_graph(options, tmp_path):
    program = tiny_program(**options)
    folded = FoldAffine().run(
        InsertAffine(kind="hadamard").run(program.copy(), Context()).program, Context()
    )
    cached = InsertKVCache().run(folded.program, Context()).program
    _, path = emit(cached, tmp_path)
    used = {node.op_type for node in onnx.load(path).graph.node if node.domain == "graphopt"}
    assert {"KroneckerTransform", "KroneckerTransformLeft", "KroneckerTransformRight"} <= used
    found = run_in_steps(session(path), INPUTS, (4, 7, 8, 11))
    expected = Runner(program, dtype=torch.float64).logits(INPUTS)
    # fp32 against fp64: some hundred roundings of 6e-8 on logits of order 1.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_activations_that_are_no_numbers_are_refused():
    moments = SecondMoments()
    moments.add(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(PassError, match=r"Activations of layers\.1 are not finite"):
        moments.mean("layers.1")
