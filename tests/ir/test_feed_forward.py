"""Feed-forward parts are found in every family, and divided into experts that add up to them."""

from __future__ import annotations

import pytest
import torch
from carved import carved
from families import FAMILIES, LISTED, cases, random_model

from graphopt.capture import capture
from graphopt.ir.blocks import find_blocks
from graphopt.ir.execute import Runner
from graphopt.ir.feed_forward import Split, feed_forwards, read_split
from graphopt.ir.shapes import infer_program

CASE = cases((7,))[0]


@pytest.mark.parametrize("family", LISTED)
@pytest.mark.parametrize("split", [Split(32, 4, 4), Split(0, 4, 4)], ids=str)
def test_with_all_experts_active_a_model_is_what_it_was(family, split):
    program = capture(random_model(family))
    expected = Runner(program).logits(CASE.inputs)
    found = Runner(carved(program, split)).logits(CASE.inputs)
    # The acceptance line: 1e-5 of the largest logit, which sums in another order keep to.
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_with_one_expert_of_three_every_token_runs_its_own():
    program = capture(random_model("llama"))
    split = Split(24, 3, 1)
    sparse = carved(program, split)
    block = find_blocks(sparse)[0]
    call = sparse.calls[block.position]
    function = sparse.functions[call.function]
    (gates,) = [node for node in function.nodes if node.op == "top_gates"]
    (routed,) = [node for node in function.nodes if node.op == "experts"]
    assert gates.attrs == {"count": 1} and routed.attrs == {"act": "silu", "active": 1}
    assert not torch.allclose(
        Runner(sparse).logits(CASE.inputs), Runner(program).logits(CASE.inputs), atol=1e-3
    )
    names = sorted(slot for slot in function.weights if slot.startswith("mlp."))
    assert "mlp.up_proj.weight.experts" in names and "mlp.router.weight" in names
    assert sum(sparse.weights[n].numel for n in set(call.weights.values()) if "up_proj.w" in n) == (
        program.weights["model.layers.0.mlp.up_proj.weight"].numel
    )


def test_what_is_no_such_part_says_why():
    reasons = set()
    for family in sorted(set(FAMILIES) - set(LISTED)):
        program = capture(random_model(family))
        for block in find_blocks(program):
            function = program.functions[program.calls[block.position].function]
            for part in feed_forwards(function, block.stream):
                if isinstance(part, str):
                    reasons.add(part)
    assert reasons and all(len(reason) > 20 for reason in reasons)


@pytest.mark.parametrize("router", ["linear", "neuron"])
@pytest.mark.parametrize(
    "split",
    [Split(32, 4, 2), Split(0, 8, 3), Split(64, 0, 0), Split(33, 4, 2, threshold=True)],
    ids=str,
)
def test_how_a_part_was_divided_can_be_read(split, router):
    program = capture(random_model("llama"))
    (dense, *_), width = find_blocks(program), 96
    assert read_split(program, dense, infer_program(program)[0][dense.position], width) is None
    padded = 1 if split.shared % 2 else 0
    made = carved(program, split, router=router, padded=padded)
    kinds, _ = infer_program(made)
    for block in find_blocks(made):
        found = read_split(made, block, kinds[block.position], width)
        assert found == (split, router if split.experts else "linear", width + padded)
