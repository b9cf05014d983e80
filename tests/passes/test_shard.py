"""`shard`: what ranks run together is what one device computed, and what is left whole is said."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from carved import carved
from families import FAMILIES, FEATURES, LISTED, captured, cases, mostly_slow
from packed_programs import projections, with_packed
from programs import tiny_program
from ranks import run_program, run_ranks
from tiny_models import save_tiny

import graphopt as go
from graphopt import Pipeline
from graphopt.errors import PassError, UsageError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.execute.workloads import program_workload
from graphopt.inspection import inspect_program
from graphopt.ir import Array, KVLayout, Packed, Value, Weight
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.feed_forward import Split as Neurons
from graphopt.ir.kv_policies import policy_from_dict
from graphopt.ir.ops.collectives import COLLECTIVES
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.ranks import group_of, rank_program
from graphopt.ir.relayout import with_layouts
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.pass_manager.pipeline import DEFAULT_RECIPE
from graphopt.passes.shard.record import ShardedProgram
from graphopt.passes.shard.shard import Shard

ROUNDINGS = 1e-13
"""Allowed error in fp64, of the largest logit: a few hundred roundings one on another."""

DEEP = 4
"""Layers of the families' models."""

RUN_ALWAYS = {*LISTED, *FEATURES.values()}
"""Families that are not only for -m exhaustive."""


@functools.cache
def prepared(family):
    """Return a family's program with the default passes."""
    _, program = captured(family)
    for name in DEFAULT_RECIPE.split(","):
        program = make_pass(name, {}).run(program, Context()).program
    return program


def sharded(program, tp=2, device="cpu"):
    """Return the result of the pass on a copy, verified by its structure."""
    item = make_pass("shard", {"tp": tp, "device": device})
    item.check(program)
    result = item.run(program.copy(), Context())
    verify(result.program)
    return result


def logits(program, case):
    runner = Runner(program, dtype=torch.float64)
    outputs, cache = runner.run(case.inputs)
    return outputs[0], cache


def error(program, other, case):
    """Return how far logits and caches are apart, as a share of the largest."""
    (expected, kept), (found, left) = logits(program, case), logits(other, case)
    real = case.attention_mask.bool()
    worst = float((expected - found)[real].abs().max() / expected[real].abs().max())
    for name, pair in kept.items():
        for old, new in zip(pair, left[name], strict=True):
            worst = max(worst, float((old - new).abs().max() / old.abs().max()))
    return worst


def collectives(program):
    found = {}
    for call in program.calls:
        for node in program.function_of(call).nodes:
            if node.op in COLLECTIVES:
                found[node.op] = found.get(node.op, 0) + 1
    return found


# Every family

PARALLEL = {"gpt_neox", "falcon", "cohere", "phi", "cohere2", "gptj", "codegen"}
"""Families whose attention and feed-forward part add to the stream together: one sum a layer."""


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, rare=set(FAMILIES) - RUN_ALWAYS))
def test_ranks_compute_what_one_device_does(family):
    program = prepared(family)
    for tp in (2, 4):
        result = sharded(program, tp)
        for case in (cases((7,))[2], cases((1,))[0]):
            assert error(program, result.program, case) < ROUNDINGS
        if family in PARALLEL:
            assert collectives(result.program) == {"all_reduce": 1 + DEEP, "all_gather": 1}
        placements = [weight.placement for weight in matrices(result.program)]
        copied = sum(where.parts == 1 and not where.summed for where in placements)
        assert copied == sum(part.weights for part in result.record.whole)


def matrices(program):
    return [weight for weight in program.weights if len(weight.shape) > 1]


WHOLE_MATRICES = {
    "llama": set(), "gpt2": {"transformer.wpe"}, "gpt_neox": set(), "bloom": set(),
    "falcon": {"self_attention.query_key_value.k", "self_attention.query_key_value.v"},
    "phi3": set(), "gemma2": set(), "olmo2": set(), "cohere": set(), "gpt_oss": {"mlp.router"},
    "deepseek_v3": {
        "self_attn.q_a_proj", "mlp.gate", *(f"self_attn.kv_a_proj_with_mqa.{n}" for n in range(3)),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", mostly_slow(WHOLE_MATRICES))
def test_what_stays_whole_is_little(family):
    """Tables of positions, routers, a single key head, and the small side of latent attention."""
    record = sharded(prepared(family)).record
    assert {part.what for part in record.whole} == WHOLE_MATRICES[family]


@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt2", "gpt_oss", "gemma4_text"]))
def test_the_pipeline_verifies_it(family):
    _, report = Pipeline.parse("shard{tp=2,device=cpu}").within_default().run(captured(family)[1])
    entry = report.passes[-1]
    assert entry.name == "shard" and entry.verification == "passed"
    assert entry.max_abs_logit_delta < entry.tolerance and entry.kl < 1e-9


@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt_neox", "gpt_oss", "olmo2"]))
def test_every_collective_is_needed(family):
    program = sharded(prepared(family)).program
    for name, function in program.functions.items():
        for place, node in enumerate(function.nodes):
            if node.op not in COLLECTIVES:
                continue
            wrong = program.copy()
            copied = wrong.functions[name]
            without = copied.nodes.pop(place)
            copied.replace(without.output, without.inputs[0])
            with pytest.raises(VerifyError):
                verify(wrong)


def test_a_look_up_of_several_calls_is_divided_in_each():
    program = tiny_program(cache=True)
    first = program.calls[0]
    second = dataclasses.replace(first, results=["y", "cos_y", "sin_y"], path="embed_again")
    second.weights = dict(first.weights)
    program.calls.insert(1, second)
    result = sharded(program)
    assert error(program, result.program, cases((7,), 97)[2]) < ROUNDINGS


class Wrong(Shard):
    """Splits, and makes one mistake that no shape and no layout shows."""

    mistake: ClassVar[str]

    def run(self, program, context):
        result = super().run(program, context)
        weights = result.program.weights
        if self.mistake == "rows":
            name, value = "tensor_parallel.first_rows", torch.tensor([0, 48])
        else:
            name = "layers.1.self_attn.v_proj.weight"
            value = weights[name].load().flip(0)
        weights.replace(dataclasses.replace(weights[name], producer=Array(value)))
        return result


@pytest.mark.parametrize("mistake", ["rows", "order"])
def test_the_pipeline_finds_wrong_parts(mistake, monkeypatch):
    monkeypatch.setattr(Wrong, "mistake", mistake, raising=False)
    program = tiny_program(cache=True)
    with pytest.raises(VerifyError, match="'shard' is exact but moved the logits"):
        Pipeline([Wrong(tp=2, device="cpu")]).run(program)


# Structures that families do not have

STRUCTURES = {
    "a vocabulary that does not divide, tied": {},
    "the same untied, with biases": {"tied": False, "bias": True},
    "heads that do not divide": {"heads": 3, "kv_heads": 3},
    "key heads that do not divide": {"heads": 6, "kv_heads": 3},
    "one key head": {"heads": 8, "kv_heads": 1},
    "fewer key heads than ranks": {"heads": 8, "kv_heads": 2},
    "ALiBi and sinks": {"alibi": True, "sinks": True, "bias": True},
    "windows and soft-caps, parts of heads rotated": {
        "window": 3, "softcap": 2.0, "rotary_dim": 4, "interleaved": True, "norm": "layer",
    },
    "a width that does not divide": {"ffn": 50},
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_odd_structures(structure, tp):
    program = tiny_program(cache=True, **STRUCTURES[structure])
    result = sharded(program, tp)
    assert error(program, result.program, cases((7,), 97)[2]) < ROUNDINGS
    assert result.program.parameter_count() >= program.parameter_count()


def whole_reasons(result):
    return {part.what: part.reason for part in result.record.whole}


def test_heads_that_do_not_divide_stay_on_every_rank():
    result = sharded(tiny_program(cache=True, heads=3, kv_heads=3))
    why = "its attention is left whole: its 3 heads do not divide by 2 ranks"
    assert whole_reasons(result) == {f"self_attn.{p}_proj": why for p in "qkvo"}
    assert result.record.attentions == {"whole": 2}
    assert result.record.kv_bytes == (384, 384)
    assert [(s.where, s.reason) for s in result.skipped][:1] == [("layers.0.self_attn.q_proj", why)]
    assert all(state.placement.parts == 1 for state in result.program.states.values())
    by_key_heads = whole_reasons(sharded(tiny_program(cache=True, heads=6, kv_heads=3)))
    assert "3 key heads do not divide by 2 ranks, nor" in by_key_heads["self_attn.k_proj"]


def test_a_key_head_that_several_ranks_read_is_copied():
    result = sharded(tiny_program(cache=True, heads=8, kv_heads=2), 4)
    text = print_program(result.program)
    copies = "placed(cpu:0, cpu:1, cpu:2, cpu:3, axis={}, copies=2)"
    assert f"k_dim=8 v_dim=8 contiguous {copies.format(1)}" in text
    assert f"layers.{{i}}.self_attn.k_proj.weight: f32[16,32] {copies.format(0)}" in text
    assert result.record.attentions == {"copied": 2}
    assert result.record.kv_bytes == (256, 128)
    for rank in range(4):
        own = rank_program(result.program, rank)
        assert own.weights["layers.0.self_attn.k_proj.weight"].shape == (8, 32)
        assert own.states["kv.0"].heads == 1


def test_a_vocabulary_gets_rows_of_zeros_whose_logits_are_cut_off():
    result = sharded(tiny_program(cache=True))
    assert result.record.padded == {"embed.weight": 1}
    assert result.program.weights["embed.weight"].shape == (98, 32)
    text = print_program(result.program)
    assert "aten.slice.Tensor(all_gather(logits, axis=2, ranks=2), 2, 0, 97)" in text
    assert rank_program(result.program, 1).weights["tensor_parallel.first_rows"].load() == 49


# What passes made

PACKED = {
    "groups": Packed(4, 8), "zero points": Packed(4, 8, symmetric=False),
    "3 bits": Packed(3, 16, symmetric=False), "8 bits": Packed(8, 16),
    "a group a row": Packed(4, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_split_between_groups(name):
    choose = projections(PACKED[name])
    program = with_packed(tiny_program(cache=True, ffn=64, vocab=96), choose)
    result = sharded(program)
    assert error(program, result.program, cases((7,), 96)[2]) < ROUNDINGS
    how = {part.what: part.how for part in result.record.split}
    gathered = "rows, and what it gives is put together"
    assert how["self_attn.o_proj"] == (gathered if name == "a group a row" else "columns")
    whole, own = result.record.weight_bytes
    assert own < 0.55 * whole
    for weight in result.program.weights:
        if weight.encoding is not None:
            assert rank_program(result.program, 1).weights[weight.name].encoding is not None


def test_rows_of_codes_that_do_not_divide_stay():
    program = with_packed(tiny_program(cache=True), projections(Packed(4, 16)))
    assert whole_reasons(sharded(program))["embed"] == "97 rows of codes do not divide by 2"


@pytest.mark.parametrize("tp", [2, 4])
def test_carved_experts_are_divided_within_each(tp):
    program = carved(tiny_program(cache=True), Neurons(shared=16, experts=4, active=2))
    result = sharded(program, tp)
    assert error(program, result.program, cases((7,), 97)[2]) < ROUNDINGS
    how = {part.what: part.how for part in result.record.split}
    assert {h for w, h in how.items() if "experts" in w} == {
        "rows of each of 4 sections", "columns of each of 4 sections"
    }  # fmt: skip
    assert collectives(result.program)["all_reduce"] == 5  # shared and routed experts together


@pytest.mark.parametrize(
    ("policy", "kv_heads", "split"),
    [("last-row", 2, True), ("quest", 2, True), ("expected-attention", 4, True),
     ("snapkv", 2, True), ("ema", 1, False)],
)  # fmt: skip
def test_policies_select_pages_by_a_ranks_heads(policy, kv_heads, split):
    own = policy_from_dict({"kind": policy, "page": 4, "pages": 4, "sink": 1, "local": 2})
    program = tiny_program(cache=True, heads=4, kv_heads=kv_heads, vocab=96)
    program = with_policies(program, dict.fromkeys(program.states, own))
    result = sharded(program)
    assert result.record.attentions == {"split" if split else "whole": 2}
    runners = [Runner(p, dtype=torch.float64) for p in (program, result.program)]
    ids = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(0))
    caches, worst = [None, None], 0.0
    for start, stop in ((0, 24), *((n, n + 1) for n in range(24, 30))):
        found = []
        for number, runner in enumerate(runners):
            mask = torch.ones(2, stop, dtype=torch.long)
            inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask}
            outputs, caches[number] = runner.run(inputs, caches[number])
            found.append(outputs[0])
        worst = max(worst, float((found[0] - found[1]).abs().max() / found[0].abs().max()))
    assert worst < ROUNDINGS


@pytest.mark.parametrize("window", [5, 9])
def test_heads_of_rings_are_verified_with_shorter_ones(window):
    """The verifier runs rings of another length than those that ranks cut heads from."""
    recipe = "insert-kv-cache{ring=true},shard{tp=2,device=cpu}"
    _, report = Pipeline.parse(recipe).run(tiny_program(window=window))
    assert [entry.verification for entry in report.passes] == ["passed", "passed"]


def test_rings_and_pages_hold_a_ranks_heads():
    layouts = {"kv.0": KVLayout("ring", 4), "kv.1": KVLayout("paged", 4)}
    program = with_layouts(tiny_program(cache=True, window=3, layers=3), layouts)
    split = sharded(program).program
    assert split.states["kv.0"].layout == KVLayout("ring", 4)
    found = []
    for own in (program, split):
        runner, cache, steps = Runner(own, dtype=torch.float64), None, []
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            ids = torch.arange(start, stop).repeat(2, 1)
            mask = torch.ones(2, stop, dtype=torch.long)
            outputs, cache = runner.run({"input_ids": ids, "attention_mask": mask}, cache)
            steps.append(outputs[0])
        found.append(torch.cat(steps, 1))
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) < ROUNDINGS


def test_transforms_over_all_features_get_them_put_together():
    program = tiny_program(cache=False, ffn=64, vocab=96)
    recipe = "insert-affine,fold-affine,shard{tp=2,device=cpu}"
    result, report = Pipeline.parse(recipe).within_default().run(program)
    record = report.passes[-1].record
    how = {part.what: part.how for part in record.split}
    assert how["mlp.down_proj"] == how["self_attn.o_proj"]
    assert how["mlp.down_proj"] == "rows, and what it gives is put together"
    assert how["mlp.up_proj"] == "rows" and report.passes[-1].verification == "passed"
    assert (
        "every rank applies the transform"
        in whole_reasons_of(record)["mlp.down_proj.transform.left"]
    )
    assert group_of(result) == ("cpu:0", "cpu:1")


def whole_reasons_of(record):
    return {part.what: part.reason for part in record.whole}


def test_factors_of_a_matrix_exchange_parts_of_a_sum():
    """A matrix that reads a partial sum, and nothing else does, reads a rank's part of it."""
    program = tiny_program(cache=True, vocab=96)
    block = program.functions["block"]
    (node,) = (n for n in block.nodes if n.op == "linear" and n.output.name == "down")
    block.weights["mlp.low.weight"] = low = Value("low_w")
    inner = block.add("linear", [node.inputs[0], low], names=["low"], before=node)
    node.inputs = [inner.output, node.inputs[1]]
    for layer in range(2):
        for name, shape in (("low", (6, 48)), ("down_proj", (32, 6))):
            full = f"layers.{layer}.mlp.{name}.weight"
            weight = Weight(full, Array(torch.randn(shape) / 4))
            add = program.weights.replace if full in program.weights else program.weights.add
            add(weight)
        program.calls[1 + layer].weights["mlp.low.weight"] = f"layers.{layer}.mlp.low.weight"
    verify(program)
    result = sharded(program)
    assert collectives(result.program)["reduce_scatter"] == 2
    assert error(program, result.program, cases((7,), 96)[2]) < ROUNDINGS
    assert error(program, sharded(program, 4).program, cases((7,), 96)[2]) < ROUNDINGS


@pytest.fixture(scope="module")
def with_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return go.capture(str(folder))


COLUMNS, GATHERED = "columns", "rows, and what it gives is put together"
RECIPES = {
    "prune-blocks{blocks=1}": COLUMNS,
    "carve-moe{shared=1,active=1,experts=4}": COLUMNS,
    "quantize{w=4,group=16}": COLUMNS,
    "quantize{w=4,a=8,kv=8,group=16}": GATHERED,  # activations are rounded over all features
    "flatquant{w=4,a=4,kv=4,kind=closed,steps=0}": GATHERED,
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_passes_made_is_split(recipe, with_text):
    pipeline = Pipeline.parse(f"{recipe},shard{{tp=2,device=cpu}}").within_default()
    result, report = pipeline.run(with_text)
    entry = report.passes[-1]
    assert entry.verification == "passed"
    how = {part.what.split("self_attn.")[-1]: part.how for part in entry.record.split}
    assert how["o_proj"] == RECIPES[recipe]
    whole, own = entry.record.weight_bytes
    assert own < 0.55 * whole and entry.record.attentions == {"split": len(result.states)}


# Text, and what is told


def test_the_text_before_and_after():
    program = tiny_program(cache=True, layers=1, vocab=96, tied=False, bias=True)
    result = sharded(program)
    text = print_program(result.program)
    again = parse_program(text)
    verify(again)
    assert print_program(again) == text
    assert without_comments(text) == AFTER


def without_comments(text):
    lines = [re.sub(r"\s*#.*", "", line) for line in text.split("\nfacts:")[0].splitlines()]
    return "\n".join(lines).strip()


AFTER = """\
program tiny

def embed(input_ids, position_ids):
    x = vocab_parallel_embedding(input_ids, weight, tensor_parallel.first_rows, vocab=96)
    x_sum = all_reduce(x, ranks=2)
    cos, sin = rope_table(position_ids, rope.inv_freq)
    return x_sum, cos, sin

def block(x, attention_mask, cos, sin; kv: past_k, past_v -> present_k, present_v):
    h = rms_norm(x, input_layernorm, eps=1e-05)
    q = linear(h, self_attn.q_proj, self_attn.q_proj.bias)
    k = linear(h, self_attn.k_proj, self_attn.k_proj.bias)
    v = linear(h, self_attn.v_proj, self_attn.v_proj.bias)
    q_heads = split_heads(q, head_dim=8)
    k_heads = split_heads(k, head_dim=8)
    v_heads = split_heads(v, head_dim=8)
    q_rope = rope(q_heads, cos, sin)
    k_rope = rope(k_heads, cos, sin)
    a, present_k, present_v = attention(q_rope, k_rope, v_heads, attention_mask, past_k=past_k, past_v=past_v, scale=0.3535533905932738, causal)
    o = linear(merge_heads(a), self_attn.o_proj, self_attn.o_proj.bias)
    x_1 = x + all_reduce(o, ranks=2)
    h_1 = rms_norm(x_1, post_attention_layernorm, eps=1e-05)
    gate = linear(h_1, mlp.gate_proj, mlp.gate_proj.bias)
    m = silu(gate) * linear(h_1, mlp.up_proj, mlp.up_proj.bias)
    down_sum = all_reduce(linear(m, mlp.down_proj, mlp.down_proj.bias), ranks=2)
    x_2 = x_1 + down_sum
    return x_2

def head(x):
    logits = linear(rms_norm(x, norm, eps=1e-05), lm_head)
    logits_whole = all_gather(logits, axis=2, ranks=2)
    return logits_whole

run(input_ids: i64[B,S], attention_mask: i64[B,P+S], position_ids: i64[B,S]):
    x, cos, sin = embed(input_ids, position_ids) at embed
    x = block(x, attention_mask, cos, sin; kv=kv.0) at layers.0
    logits = head(x) at head
    return logits

states:
    kv.0: f32 heads=2 k_dim=8 v_dim=8 contiguous placed(cpu:0, cpu:1, axis=1)

weights:
    embed.weight: f32[96,32] placed(cpu:0, cpu:1, axis=0)
    rope.inv_freq: f32[4] constant placed(cpu:0, cpu:1)
    layers.0.input_layernorm.weight: f32[32] placed(cpu:0, cpu:1)
    layers.0.self_attn.q_proj.weight: f32[32,32] placed(cpu:0, cpu:1, axis=0)
    layers.0.self_attn.q_proj.bias: f32[32] placed(cpu:0, cpu:1, axis=0)
    layers.0.self_attn.k_proj.weight: f32[16,32] placed(cpu:0, cpu:1, axis=0)
    layers.0.self_attn.k_proj.bias: f32[16] placed(cpu:0, cpu:1, axis=0)
    layers.0.self_attn.v_proj.weight: f32[16,32] placed(cpu:0, cpu:1, axis=0)
    layers.0.self_attn.v_proj.bias: f32[16] placed(cpu:0, cpu:1, axis=0)
    layers.0.self_attn.o_proj.weight: f32[32,32] placed(cpu:0, cpu:1, axis=1)
    layers.0.self_attn.o_proj.bias: f32[32] placed(cpu:0, cpu:1, summed)
    layers.0.post_attention_layernorm.weight: f32[32] placed(cpu:0, cpu:1)
    layers.0.mlp.gate_proj.weight: f32[48,32] placed(cpu:0, cpu:1, axis=0)
    layers.0.mlp.gate_proj.bias: f32[48] placed(cpu:0, cpu:1, axis=0)
    layers.0.mlp.up_proj.weight: f32[48,32] placed(cpu:0, cpu:1, axis=0)
    layers.0.mlp.up_proj.bias: f32[48] placed(cpu:0, cpu:1, axis=0)
    layers.0.mlp.down_proj.weight: f32[32,48] placed(cpu:0, cpu:1, axis=1)
    layers.0.mlp.down_proj.bias: f32[32] placed(cpu:0, cpu:1, summed)
    norm.weight: f32[32] placed(cpu:0, cpu:1)
    lm_head.weight: f32[96,32] placed(cpu:0, cpu:1, axis=0)
    tensor_parallel.first_rows: i64[2] constant placed(cpu:0, cpu:1, axis=0)
""".strip()  # noqa: E501


def test_what_is_told():
    program = tiny_program(cache=True, vocab=96, tied=False)
    result = sharded(program)
    record = result.record
    whole = sum(weight.nbytes for weight in program.weights)
    own = [sum(w.nbytes for w in rank_program(result.program, rank).weights) for rank in (0, 1)]
    assert record.weight_bytes == (whole, own[0]) and own[0] == own[1]
    assert record.kv_bytes == (256, 128)
    # Five sums of [1, 32], of which a rank of two sends as many bytes, and half of 96 logits.
    assert record.sent_token == 5 * 128 + 48 * 4 and record.sent_logits == 48 * 4
    assert record.sent_prefill == 1024 * 5 * 128 + 48 * 4
    assert record.collectives == {"all_reduce": 5, "all_gather": 1}
    for part in ("2 ranks, each", "of KV a token", "a token sends 832 B"):
        assert part in record.line()
    assert "0 B" not in record.line()
    for part in ("vocabulary", "columns", "self_attn.o_proj", "cpu:0 to cpu:1"):
        assert part in record.card()
    assert "Left whole" not in record.card()
    left = sharded(tiny_program(cache=True, heads=3, kv_heads=3)).record
    assert "left whole" in left.line() and "3 heads do not divide" in left.card()
    assert ShardedProgram.model_validate_json(record.model_dump_json()) == record


def test_the_page_has_examples_that_run():
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    section = page.split("## What is checked")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    scope = {"program": tiny_program(vocab=96, tied=False)}
    exec(compile(code, "docs/devices.md", "exec", dont_inherit=True), scope)


def test_figures_and_memory_are_those_of_a_rank():
    program = tiny_program(cache=True, vocab=96, tied=False)
    split = sharded(program).program
    found, whole = inspect_program(split), inspect_program(program)
    assert (found["ranks"], whole["ranks"]) == (2, 1)
    assert found["parameters"] == whole["parameters"]
    weights, own = (f["bytes"]["weights"]["value"] for f in (whole, found))
    assert 0.5 < own / weights < 0.52
    assert found["bytes"]["kv_cache"]["value"] * 2 == whole["bytes"]["kv_cache"]["value"]
    peaks = []
    for other in (program, split):
        work = program_workload(other, "prefill", torch.device("cpu"), seq=64, dtype=torch.float32)
        peaks.append(work.record(1).peak().bytes)
    assert "one of 2 ranks" in work.name
    assert peaks[1] < 0.9 * peaks[0]


@pytest.mark.parametrize(("gpus", "here"), [(0, None), (1, 1), (2, None), (8, None)])
def test_a_machine_with_fewer_gpus_is_named(gpus, here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    record = sharded(tiny_program(cache=True), device="cuda").record
    assert record.here == here
    assert ("this machine has 1 of 2 devices" in record.line()) == (here is not None)
    assert ("has 1 of 2 devices" in record.card()) == (here is not None)


# Real ranks


@pytest.mark.parametrize("family", mostly_slow(["llama", "falcon", "gpt_oss"], quick=[]))
def test_processes_compute_what_simulated_ranks_do(family):
    program = prepared(family)
    result = sharded(program).program
    case = cases((7,))[2]
    expected, kept = logits(program, case)
    simulated, _ = logits(result, case)
    found = run_ranks(run_program, result, case.inputs)
    assert torch.equal(found[0][0], found[1][0])
    real = case.attention_mask.bool()
    for value in (expected, simulated):
        assert float((found[0][0] - value)[real].abs().max() / expected.abs().max()) < ROUNDINGS
    for name, (k, v) in kept.items():
        for place, whole in enumerate((k, v)):
            parts = [cache[name][place] for _, cache in found]
            joined = parts[0] if parts[0].shape == whole.shape else torch.cat(parts, 1)
            assert float((joined - whole).abs().max() / whole.abs().max()) < ROUNDINGS


# Bad input


@pytest.mark.parametrize("tp", [1, 0, -2])
def test_fewer_than_two_devices_are_refused(tp):
    with pytest.raises(UsageError, match=rf"over {tp} devices, and it takes two or more.*Leave"):
        make_pass("shard", {"tp": tp})


@pytest.mark.parametrize("options", [{"tp": 2000}, {"tp": "two"}, {"device": "tpu"}])
def test_options_that_are_none_are_refused(options):
    with pytest.raises(UsageError):
        make_pass("shard", options)


def test_a_model_of_which_nothing_splits_is_refused():
    program = tiny_program(cache=True, ffn=46, heads=3, kv_heads=3)
    program = with_packed(program, lambda name: Packed(4, 32) if name == "embed.weight" else None)
    with pytest.raises(PassError, match=r"Nothing of tiny splits over 5.*divides its heads"):
        sharded(program, 5)


def test_a_program_is_split_once():
    once = sharded(tiny_program(cache=True)).program
    with pytest.raises(PassError, match=r"split over 2 devices already.*the source model"):
        make_pass("shard", {}).check(once)
    with pytest.raises(PassError, match="split over 2 devices already"):
        Pipeline.parse("shard,shard").check(tiny_program(cache=True))


def test_passes_for_one_device_are_refused_behind_it():
    program = tiny_program()
    with pytest.raises(PassError, match=r"'fold-constants', number 3 .*one device.*before 'shard'"):
        Pipeline.parse("insert-kv-cache,shard,fold-constants").check(program)
    recipe = (
        "insert-kv-cache,shard{device=cpu},common-subexpression-elimination,dead-code-elimination"
    )
    result, report = Pipeline.parse(recipe).run(program)
    assert [e.verification for e in report.passes[1:]] == ["passed", "unchanged", "unchanged"]
    assert group_of(result)


def test_it_stands_behind_the_cache():
    names = [item.name for item in Pipeline.parse("shard").within_default().passes]
    assert names[-2:] == ["insert-kv-cache", "shard"]


def test_structure_alone_is_enough():
    """A program without weights is planned, and says what each rank would have."""
    program = parse_program(print_program(tiny_program(cache=True, vocab=96)))
    planned, entries = Pipeline.parse("shard{tp=4}").plan(program)
    assert group_of(planned) == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert entries[0].record.weight_bytes[1] < entries[0].record.weight_bytes[0] / 3
