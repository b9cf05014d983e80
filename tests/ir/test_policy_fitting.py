"""What KV policies are told of a model: rotary angles, and weights that were trained for it."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.errors import UsageError
from graphopt.execute.page_attention import attention_layers
from graphopt.ir.kv_policies import Ema, ExpectedAttention, PageBudget, Predictor
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.ir.kv_policies.checkpoint import PredictorCheckpoint
from graphopt.ir.ops import get_op
from graphopt.ir.policy_fitting import fitted_policy, query_rotation

BUDGET = PageBudget(4, 4, 1, 1)


def attentions(program):
    return [(program.calls[layer.position], layer.node) for layer in attention_layers(program)]


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("rotary_dim", (None, 4))
def test_the_angles_are_those_by_which_queries_turn(interleaved, rotary_dim):
    """Turned by them, queries are where the model's own rotation brings them."""
    program = tiny_program(interleaved=interleaved, rotary_dim=rotary_dim)
    call, node = attentions(program)[0]
    rotation = query_rotation(program, call, node)
    assert rotation.interleaved == interleaved
    assert len(rotation.frequencies) == (rotary_dim or 8) // 2
    table = next(n for f in program.functions.values() for n in f.nodes if n.op == "rope_table")
    rope = next(n for f in program.functions.values() for n in f.nodes if n.op == "rope")
    (frequencies,) = (
        program.weights[name].load()
        for each in program.calls
        for slot, name in each.weights.items()
        if program.function_of(each).weights[slot] is table.inputs[1]
    )
    tables = get_op("rope_table").torch([torch.tensor([[5]]), frequencies], table.attrs)
    q = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    (expected,) = get_op("rope").torch([q, *tables], rope.attrs)
    # The first of five rows stands four positions in front of the last, and one is ahead of that.
    policy = ExpectedAttention(BUDGET, rotation.frequencies, interleaved, ahead=1)
    turned = policy._of_positions_ahead(q.expand(-1, -1, 5, -1))[:, :, :1]
    # A few roundings of numbers below 4, and of angles below 8.
    assert (turned - expected).abs().max() < 1e-5


def test_expected_attention_is_told_the_angles_of_a_model():
    program = tiny_program()
    policy = fitted_policy(program, ExpectedAttention(BUDGET), attentions(program))
    (call, node), *_ = attentions(program)
    assert policy.frequencies == query_rotation(program, call, node).frequencies
    assert fitted_policy(program, Ema(BUDGET), attentions(program)) == Ema(BUDGET)
    without = tiny_program(alibi=True)
    assert fitted_policy(without, ExpectedAttention(BUDGET), attentions(without)).frequencies == ()


def test_a_predictor_is_given_its_weights_or_refused(tmp_path):
    program = tiny_program()
    path = str(tmp_path / "p.safetensors")
    numbers = {"page": 4, "group": 2, "history": 64, "channels": 2}
    PredictorCheckpoint(new_weights(2, 0), **numbers, about={}).write(tmp_path / "p.safetensors")
    policy = fitted_policy(program, Predictor(BUDGET), attentions(program), path)
    assert torch.equal(policy.weights["conv1.bias"], new_weights(2, 0)["conv1.bias"])
    with pytest.raises(UsageError, match="Name a checkpoint with weights="):
        fitted_policy(program, Predictor(BUDGET), attentions(program))
    with pytest.raises(UsageError, match="the KV policy ema is not trained"):
        fitted_policy(program, Ema(BUDGET), attentions(program), path)
    other = tiny_program(kv_heads=4)
    with pytest.raises(UsageError, match="2 query heads a KV head, and here there are 1"):
        fitted_policy(other, Predictor(BUDGET), attentions(other), path)
