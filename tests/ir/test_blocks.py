"""Blocks: found by dataflow, taken out as transformers would without those layers."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import onnx
import pytest
import torch
from families import LISTED, captured, mostly_slow, random_model, sampled
from programs import tiny_program
from sampling import exhaustive_but
from tiny_models import tiny_model

import graphopt as go
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import (
    block_name,
    find_blocks,
    private_results,
    remove_blocks,
    remove_sub_blocks,
    sub_blocks,
    without_sub_block,
)
from graphopt.ir.verify import verify

IDS = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama": {"num_hidden_layers": 5},
    "qwen2": {"num_hidden_layers": 5},
    "qwen3": {"num_hidden_layers": 5},
    "gemma2": {"num_hidden_layers": 5, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_inner": 48, "n_layer": 5, "n_head": 4,
             "n_positions": 128},
    "gpt_neox": {"num_hidden_layers": 5, "num_key_value_heads": None, "head_dim": None},
    **{family: {"num_hidden_layers": 5, "num_key_value_heads": None, "head_dim": None,
                "intermediate_size": None, "rotary_dim": 4} for family in ("gptj", "codegen")},
}  # fmt: skip


def model_of(family):
    return tiny_model(family, **FAMILIES[family])


@pytest.mark.slow
def test_all_blocks_of_a_mixture_in_bf16_are_found(tmp_path):
    """The first one takes a bf16 stream and gives fp32, which its traced operators say."""
    tiny_model("mixtral", num_hidden_layers=3).bfloat16().save_pretrained(tmp_path)
    program = go.capture(str(tmp_path))
    names = [block_name(program, block) for block in find_blocks(program)]
    assert names == [f"model.layers.{layer}" for layer in range(3)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a function that gives a family's model and a program of its saved folder."""

    @functools.cache
    def captured_folder(family):
        model = model_of(family)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return model, go.capture(str(folder))

    def model_and_program(family):
        model, program = captured_folder(family)
        return model, program.copy()

    return model_and_program


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else next(
        m for n, m in model.named_modules() if n.endswith("layers")
    )  # fmt: skip


def without(model, removed):
    """Return transformers' own model with layers deleted."""
    copied = copy.deepcopy(model)
    layers = layers_of(copied)
    for index in sorted(removed, reverse=True):
        del layers[index]
    config = copied.config
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if getattr(config, "layer_types", None):
        kept = [t for i, t in enumerate(config.layer_types) if i not in removed]
        config.num_hidden_layers, config.layer_types = len(layers), kept
    config.num_hidden_layers = len(layers)
    return copied


def close(ours, theirs):
    return float((ours - theirs).abs().max()) < 1e-4 * max(float(theirs.abs().max()), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("removed", [{0}, {4}, {1, 2}, {0, 2, 4}])
@pytest.mark.parametrize(
    "family", mostly_slow(FAMILIES, rare=("qwen2", "qwen3", "gptj", "codegen"))
)
def test_a_program_without_blocks_is_the_model_without_those_layers(opened, family, removed):
    model, program = opened(family)
    assert len(find_blocks(program)) == 5
    remove_blocks(program, removed)
    verify(program)
    assert len(find_blocks(program)) == 5 - len(removed)
    with torch.no_grad():
        theirs = without(model, removed)(IDS, use_cache=False).logits
    assert close(Runner(program).logits({"input_ids": IDS}), theirs)


@pytest.mark.slow
def test_configs_follow(opened):
    for family, key in (("llama", "num_hidden_layers"), ("gpt2", "n_layer")):
        _, program = opened(family)
        remove_blocks(program, [1, 3])
        assert program.config[key] == 3
    _, program = opened("gemma2")
    kinds = list(program.config["layer_types"])
    remove_blocks(program, [0, 3])
    assert program.config["layer_types"] == [kinds[1], kinds[2], kinds[4]]


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow(["llama", "gemma2", "gpt2"], rare=("gpt2",)))
def test_the_checkpoint_of_a_shortened_program_loads_and_says_the_same(opened, family, tmp_path):
    from transformers import AutoModelForCausalLM

    model, program = opened(family)
    remove_blocks(program, [1, 2])
    go.emit(program, tmp_path / "out", emit=("hf",))
    # By default, transformers 5.17 runs Gemma 2 without its cap on the scores.
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = loaded(IDS).logits
        brute = without(model, {1, 2})(IDS, use_cache=False).logits
    assert close(Runner(program).logits({"input_ids": IDS}), theirs) and close(theirs, brute)


def test_lists_that_are_not_per_layer_stay_and_indices_of_layers_follow():
    program = tiny_program(layers=4)
    program.config = {
        "num_hidden_layers": 4,
        "eos_token_id": [1, 2, 3, 4],
        "layer_types": ["a", "b", "c", "d"],
        "first_k_dense_replace": 2,
        "moe_layers": [1, 3],
    }
    remove_blocks(program, [0, 2])
    assert program.config == {
        "num_hidden_layers": 2,
        "eos_token_id": [1, 2, 3, 4],
        "layer_types": ["b", "d"],
        "first_k_dense_replace": 1,
        "moe_layers": [0, 1],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", exhaustive_but(["deepseek_v3", "gpt_neo", "smollm3"], "deepseek_v3")
)
def test_families_with_blocks_of_two_kinds_make_checkpoints(family, tmp_path):
    from transformers import AutoModelForCausalLM

    random_model(family).save_pretrained(tmp_path / "whole")
    program = go.capture(str(tmp_path / "whole"))
    remove_blocks(program, [0, 2])
    go.emit(program, tmp_path / "out", emit=("hf",))
    # By default, transformers 5.17 runs Gemma 2 without its cap on the scores.
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = IDS % 128
    with torch.no_grad():
        assert close(Runner(program).logits({"input_ids": ids}), loaded(ids).logits)


@pytest.mark.slow
def test_an_exported_graph_has_the_operators_of_the_blocks_that_are_left(opened, tmp_path):
    def operators(program, folder):
        go.emit(program, folder, emit=("onnx",))
        graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)

    sizes = {}
    for removed in ((), (1,), (0, 1, 2)):
        _, program = opened("llama")
        remove_blocks(program, removed)
        program, _ = go.Pipeline.parse("insert-kv-cache").run(program)
        sizes[len(removed)] = operators(program, tmp_path / str(len(removed)))
    # A block's operators are what one removal takes away; three take three times as many.
    block = sizes[0] - sizes[1]
    assert block["MatMul"] and sizes[0]["MatMul"] == 5 * block["MatMul"] + 1  # and the head's
    assert sizes[0] - sizes[3] == Counter({kind: 3 * n for kind, n in block.items()})
    assert not sizes[3] - sizes[0]


def test_caches_are_numbered_anew_and_steps_agree_with_the_whole():
    program, _ = go.Pipeline.parse("insert-kv-cache").run(tiny_program(layers=5))
    remove_blocks(program, [0, 3])
    verify(program)
    assert list(program.states) == ["kv.0", "kv.1", "kv.2"]
    assert [state.name for state in program.states.values()] == list(program.states)
    runner = Runner(program)
    ids = IDS % 97
    whole = runner.logits({"input_ids": ids})
    first, cache = runner.run({"input_ids": ids[:, :6]})
    second, _ = runner.run({"input_ids": ids[:, 6:]}, cache)
    assert torch.allclose(torch.cat((first[0], second[0]), 1), whole, atol=1e-5)


# ---- found in every family ----


UNUSUAL = ("codegen", "ctrl", "deepseek_v3", "gpt_neo", "gptj", "llama4_text", "mixtral", "mpt")


@pytest.mark.parametrize("family", sampled([*LISTED, *UNUSUAL]))
def test_blocks_are_the_layers_alone(family):
    _, program = captured(family)
    blocks = find_blocks(program)
    assert [block.position for block in blocks] == [1, 2, 3, 4]
    assert len(program.calls) == 6 and private_results(program, blocks) is None
    names = [block_name(program, block) for block in blocks]
    assert [int(name.rsplit(".", 1)[1]) for name in names] == [0, 1, 2, 3]
    for block in blocks:
        function = program.functions[program.calls[block.position].function]
        kinds = [part.kind for part in sub_blocks(function, block.stream)]
        assert kinds.count("attention") == 1 and kinds.count("ffn") == len(kinds) - 1 >= 1


# ---- parts of blocks ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize(
    "family",
    mostly_slow(["llama", "gpt2", "gpt_neox", "gptj", "codegen"], rare=("gptj", "codegen")),
)
def test_a_program_without_a_part_is_the_model_whose_part_adds_nothing(opened, family, kind):
    model, program = opened(family)
    remove_sub_blocks(program, [(1, kind), (3, kind)])
    verify(program)
    assert len(find_blocks(program)) == 5
    copied = copy.deepcopy(model)
    for index in (1, 3):
        layer = layers_of(copied)[index]
        part = {"attention": ("o_proj", "attn.c_proj", "attention.dense", "attn.out_proj"),
                "ffn": ("down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out")}  # fmt: skip
        (last,) = [m for n, m in layer.named_modules() if n.endswith(part[kind])]
        for parameter in last.parameters():
            parameter.data.zero_()
    with torch.no_grad():
        theirs = copied(IDS, use_cache=False).logits
    assert close(Runner(program).logits({"input_ids": IDS}), theirs)


def test_a_block_that_loses_all_its_parts_goes_whole():
    parts, whole = tiny_program(layers=4), tiny_program(layers=4)
    remove_sub_blocks(parts, [(2, "attention"), (2, "ffn")])
    remove_blocks(whole, [2])
    assert str(parts) == str(whole)


def test_a_part_taken_out_with_a_cache_takes_its_cache_along():
    program, _ = go.Pipeline.parse("insert-kv-cache").run(tiny_program(layers=3))
    remove_sub_blocks(program, [(1, "attention")])
    verify(program)
    assert list(program.states) == ["kv.0", "kv.1"] and len(find_blocks(program)) == 3


@pytest.mark.slow
def test_no_checkpoint_is_made_of_a_program_that_no_config_makes(opened, tmp_path):
    _, program = opened("llama")
    remove_sub_blocks(program, [(1, "ffn")])
    with pytest.raises(LoweringError, match="no transformers checkpoint"):
        go.emit(program, tmp_path / "out", emit=("hf",))


def test_a_norm_behind_the_sum_hides_the_parts():
    program = tiny_program(layers=2)
    function = program.functions["block"]
    normed = function.add("rms_norm", [function.results[0]], {"eps": 1e-6})
    function.results[0] = normed.output
    assert sub_blocks(function, 0) == []
    with pytest.raises(ValueError, match="not a stream to which parts are added"):
        without_sub_block(function, 0, ["ffn"], "twin")


def test_a_result_with_two_readers_is_not_private():
    program = tiny_program(layers=3)
    blocks = find_blocks(program)
    assert private_results(program, blocks) is None
    program.outputs.append(program.calls[blocks[2].position].results[0])
    reason = private_results(program, blocks)
    assert reason == "the result of layers.2 is read by later blocks too"
