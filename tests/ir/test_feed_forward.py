"""Feed-forward parts are found in every family, and divided into experts that add up to them."""

from __future__ import annotations

import pytest
import torch
from carved import carved
from families import LISTED, captured, cases, sampled

from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.feed_forward import Split, feed_forwards, read_split
from graphopt.ir.shapes import infer_program

CASE = cases((7,))[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", sampled(LISTED))
def test_with_all_experts_active_a_model_is_what_it_was(family):
    _, program = captured(family)
    expected = Runner(program).logits(CASE.inputs)
    for split in Split(32, 4, 4), Split(0, 4, 4):
        found = Runner(carved(program, split)).logits(CASE.inputs)
        # The acceptance line: 1e-5 of the largest logit, which sums in another order keep to.
        error = float((found - expected).abs().max())
        assert error < 1e-5 * max(1.0, float(expected.abs().max())), split


def test_with_one_expert_of_three_every_token_runs_its_own():
    _, program = captured("llama")
    split = Split(24, 3, 1)
    sparse = carved(program, split)
    block = find_blocks(sparse)[0]
    call = sparse.calls[block.position]
    function = sparse.functions[call.function]
    (gates,) = [node for node in function.nodes if node.op == "top_k_gating"]
    (routed,) = [node for node in function.nodes if node.op == "experts"]
    assert gates.attrs == {"top_k": 1} and routed.attrs == {"act": "silu", "active": 1}
    assert not torch.allclose(
        Runner(sparse).logits(CASE.inputs), Runner(program).logits(CASE.inputs), atol=1e-3
    )
    names = sorted(slot for slot in function.weights if slot.startswith("mlp."))
    assert "mlp.up_proj.weight.experts" in names and "mlp.router.weight" in names
    assert sum(sparse.weights[n].numel for n in set(call.weights.values()) if "up_proj.w" in n) == (
        program.weights["model.layers.0.mlp.up_proj.weight"].numel
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("apertus", "it is no projection of an activation, or of its product with a projection"),
        ("mixtral", "it is a mixture of experts already"),
    ],
)
def test_what_is_no_such_part_says_why(family, reason):
    _, program = captured(family)
    for block in find_blocks(program):
        function = program.functions[program.calls[block.position].function]
        parts = feed_forwards(function, block.stream)
        assert [part for part in parts if isinstance(part, str)] == [reason]


@pytest.mark.parametrize("router", ["linear", "neuron"])
@pytest.mark.parametrize(
    "split",
    [Split(32, 4, 2), Split(0, 8, 3), Split(64, 0, 0), Split(33, 4, 2, threshold=True)],
    ids=str,
)
def test_how_a_part_was_divided_can_be_read(split, router):
    _, program = captured("llama")
    (dense, *_), width = find_blocks(program), 96
    assert read_split(program, dense, infer_program(program)[0][dense.position], width) is None
    padded = 1 if split.shared % 2 else 0
    made = carved(program, split, router=router, padded=padded)
    kinds, _ = infer_program(made)
    for block in find_blocks(made):
        found = read_split(made, block, kinds[block.position], width)
        assert found == (split, router if split.experts else "linear", width + padded)
