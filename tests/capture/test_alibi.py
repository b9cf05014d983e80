"""ALiBi that is added into the causal mask, as Falcon adds it, and beside it, as Bloom does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import TOLERANCE, cases, eager_logits, error, random_model

from graphopt.capture import capture
from graphopt.execute.interpreter import Runner


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {"alibi": True, "num_attention_heads": 4}),
        # Slopes of heads that are no power of two, and keys that groups of heads share.
        pytest.param(
            "falcon",
            {
                "alibi": True, "new_decoder_architecture": True, "multi_query": False,
                "hidden_size": 72, "num_attention_heads": 6, "num_kv_heads": 2,
            },
            marks=pytest.mark.exhaustive,
        ),
        ("bloom", {"n_head": 4}),
        ("mpt", {"n_heads": 4}),
    ],
    ids=["falcon", "falcon of 6 heads in groups", "bloom", "mpt"],
)  # fmt: skip
def test_scores_are_biased_and_causal(family: str, changes: dict[str, Any]) -> None:
    model = random_model(family, **changes)
    program = capture(model)
    attentions = [
        node
        for function in program.functions.values()
        for node in function.nodes
        if node.op == "attention"
    ]
    # Slopes and a causal mask in closed form, and no bias of [S, T] numbers.
    assert attentions
    for node in attentions:
        assert node.attrs["causal"] is True and node.inputs[4] is None
        assert node.inputs[3] is not None and node.inputs[5] is not None
    runner = Runner(program)
    with torch.no_grad():
        for case in cases(vocab=128):
            expected = eager_logits(model, case)
            assert error(expected, runner.logits(case.inputs), case) < TOLERANCE, str(case)
