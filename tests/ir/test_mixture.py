"""Mixtures of experts are read, and left with fewer experts: the model of a smaller config."""

from __future__ import annotations

import pytest
import torch
from checkpoints import CLOSE, loaded, padded_case
from families import eager_logits, error, mostly_slow, random_model
from family_sweep import batches, compare, eager
from mixtures import MIXTURES, drop, mixture
from torch import nn

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.torch_artifact import TorchArtifactModel
from graphopt.capture import capture
from graphopt.execute.interpreter import Runner
from graphopt.execute.language_model import ProgramModel
from graphopt.ir.graph import In
from graphopt.ir.layer_config import EXPERT_COUNTS
from graphopt.ir.mixture import Mixture, find_mixtures, least_experts
from graphopt.ir.shapes import infer_program
from graphopt.storage.artifact import load_program

KEPT = {1: [0, 2, 3, 5, 6, 7], 2: [0, 2, 3, 4, 6, 7]}
"""Experts that are left, by the number of groups."""


def smaller(model: nn.Module, kept: list[int]) -> nn.Module:
    """Return transformers' model of a config with fewer experts, on the rows that are left."""
    from transformers import AutoModelForCausalLM

    config = type(model.config).from_dict(model.config.to_dict())
    for name in EXPERT_COUNTS:
        if name in config.to_dict():
            setattr(config, name, len(kept))
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.config._attn_implementation = model.config._attn_implementation
    given, state = model.state_dict(), made.state_dict()
    for name, value in given.items():
        apart = [i for i, n in enumerate(value.shape) if n != state[name].shape[i]]
        given[name] = value.index_select(apart[0], torch.tensor(kept)) if apart else value
    made.load_state_dict(given)
    return made.eval()


# Their routers are those of others, as forms of routers are read by tests of their own: softmax in
# front of the choice or behind it, of all or of a group, with a shared expert beside (DeepSeek's).
LIKE_OTHERS = ("qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe",
               "granitemoe", "qwen2_moe", "phimoe")  # fmt: skip


FAMILIES = [
    # Old versions of transformers clamp the ids of its experts before they look up biases.
    pytest.param("gpt_oss", marks=[pytest.mark.slow, pytest.mark.oldest]),
    *mostly_slow([name for name in MIXTURES if name != "gpt_oss"], ("mixtral",), LIKE_OTHERS),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_are_the_smaller_configs_model(family, tmp_path):
    model, program = mixture(family)
    part = find_mixtures(program)[-1][1]
    assert isinstance(part, Mixture)
    assert (part.experts, part.top_k) == (8, 2)
    kept = KEPT[part.groups.count]
    case = padded_case()
    expected = eager_logits(smaller(model, kept), case)
    assert error(expected, eager_logits(model, case), case) > 0.01, "nothing is dropped"
    pruned = drop(program, kept)
    assert error(expected, Runner(pruned).logits(case.inputs), case) < CLOSE
    go.emit(pruned, tmp_path / "out", emit=("hf",))
    found = eager_logits(loaded(tmp_path / "out/hf"), case)
    assert error(expected, found, case) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_emitted_forms_of_fewer_experts_prefill_and_step(family, tmp_path):
    model, program = mixture(family)
    kept = KEPT[2 if family == "deepseek_v3" else 1]
    reference = smaller(model, kept)
    wanted = [eager(reference, batch) for batch in batches()]
    cached, _ = go.Pipeline.default().run(drop(program, kept), go.RunOptions(verify=False))
    out = tmp_path / "out"
    go.emit(cached, out, emit=("torch", "onnx"))
    for form in (
        ProgramModel(cached),
        TorchArtifactModel(out, load_program(out)),
        OnnxArtifactModel(out / "onnx"),
    ):
        errors = compare(form, wanted)
        assert len(errors) > 4 and max(errors.values()) < CLOSE, (type(form).__name__, errors)


@pytest.mark.slow
def test_rows_of_experts_that_are_looked_up_by_something_else_are_refused():
    program = mixture("gpt_oss")[1].copy()
    block, part = find_mixtures(program)[-1]
    assert isinstance(part, Mixture)
    call = program.calls[block.position]
    function = program.functions[call.function]
    lookup = next(node for node in function.nodes if node.op == "embedding")
    ids = infer_program(program)[0][block.position][part.expert_of_row]
    attrs = {"args": [In(0), None, 3], "kwargs": {}, "types": [ids]}
    clamped = function.add("aten.clamp.default", [part.expert_of_row], attrs, before=lookup)
    lookup.inputs[0] = clamped.output
    with pytest.raises(ValueError, match="gate_up_proj_bias has a row an expert, and x_"):
        drop(program, KEPT[1])


@pytest.mark.slow
def test_groups_of_experts_are_read():
    program = mixture("deepseek_v3")[1]
    ((_, part),) = find_mixtures(program)
    assert isinstance(part, Mixture)
    groups = part.groups
    assert (groups.count, groups.chosen, groups.ranked) == (2, 1, 2)
    assert least_experts(part) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "found"),
    [([0, 1, 2, 3, 4], "do not divide"), ([0, 4], "topk")],
)
def test_groups_stay_equal_and_large_enough(kept, found):
    program = mixture("deepseek_v3")[1]
    with pytest.raises(ValueError, match=found):
        drop(program, kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "reason"),
    [("llama4_text", "every expert computes every token"), ("jetmoe", "several mixtures")],
)
def test_other_mixtures_are_named(family, reason):
    ((_, part), *_) = find_mixtures(capture(random_model(family)))
    assert isinstance(part, str) and reason in part
