"""Transforms and their inverses: put in, multiplied into weights, in every family, to fp64."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, captured, mostly_slow
from programs import tiny_program

from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Array
from graphopt.ir.affine import role_of
from graphopt.ir.affine_sites import find_sites
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.insert_affine import InsertAffine

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


@pytest.mark.parametrize("family", mostly_slow(FAMILIES))
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
