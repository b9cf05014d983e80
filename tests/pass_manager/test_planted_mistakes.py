"""Mistakes planted behind exact passes are found, each for what it is; honest passes are not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from planted import (
    BASES,
    LARGE_SWITCH,
    LARGE_WINDOW,
    SWITCH,
    WINDOW,
    Mistake,
    attr,
    change,
    clamp,
    drop_layer,
    drop_operand,
    drop_residual,
    first,
    half_states,
    last_token,
    layer_call,
    lose_sum,
    of,
    older_summand,
    one_state,
    past_swapped,
    placed,
    positions_in_the_step,
    present_swapped,
    read_instead,
    router,
    rows_off_by_one,
    scaled,
    set_op,
    short_ring,
    skip,
    slot,
    stream_before_attention,
    swap_layers,
    swap_operands,
    swap_slots,
    swapped,
    transform_before_rotation,
    transpose,
    unrotated_keys,
    untie,
    weight,
    window,
)
from sampling import slow_but

from graphopt.errors import VerifyError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Program
from graphopt.lowering.torch.passes import lowering_passes
from graphopt.pass_manager.contract import Context, Pass, PassResult, declared_passes, make_pass
from graphopt.pass_manager.pipeline import DEFAULT_RECIPE, Pipeline
from graphopt.passes.place_kv.place_kv import PlaceKV
from graphopt.passes.place_kv.record import PlacedKV

EXACT = DEFAULT_RECIPE.split(",")
CANONICALISE, SUBEXPRESSION, FOLD, DEAD, CACHE = EXACT
LOWERING = {item.name: item for item in lowering_passes("ampere")}
DEFER, FUSE, PLAN = LOWERING

FREQUENCIES = "rope.inv_freq"
Q, K, OUT = (f"layers.1.self_attn.{kind}_proj.weight" for kind in "qko")
UP, SINKS = "layers.1.mlp.up_proj.weight", "layers.1.self_attn.sinks"
BIAS = "layers.0.self_attn.v_proj.bias"
GAIN, OTHER_GAIN = "input_layernorm.weight", "post_attention_layernorm.weight"

# fmt: off
WEIGHTS = [
    Mistake("a head's queries off by 1e-3", FOLD, "plain", weight(Q, scaled(1.001, slice(8)))),
    Mistake("a block's projection off by 1e-4", FOLD, "plain", weight(OUT, scaled(1.0001))),
    Mistake("one neuron off by 1e-3", DEAD, "plain", weight(UP, scaled(1.001, 3))),
    Mistake("one neuron is gone", DEAD, "plain", weight(UP, scaled(0.0, 5))),
    Mistake("a matrix rounded to bf16", FOLD, "plain", weight(OUT, lambda w: w.bfloat16().float())),
    Mistake("a square matrix transposed", CANONICALISE, "plain", of(transpose, OUT)),
    Mistake("two key heads swapped", SUBEXPRESSION, "plain",
            weight(K, swapped(slice(0, 8), slice(8, 16)))),
    Mistake("rows off by one", SUBEXPRESSION, "plain", of(rows_off_by_one, UP)),
    Mistake("gate and up swapped", CANONICALISE, "plain",
            of(swap_slots, 1, "mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Mistake("gains of two norms swapped", SUBEXPRESSION, "plain",
            of(swap_slots, 0, GAIN, OTHER_GAIN)),
    Mistake("another layer's gain", SUBEXPRESSION, "plain", slot(2, GAIN, f"layers.0.{GAIN}")),
    Mistake("all weights of two layers swapped", SUBEXPRESSION, "plain", swap_layers),
    Mistake("a rare token's row", DEAD, "plain", weight("embed.weight", scaled(1.01, 93)),
            length=97),
    Mistake("rows of two tokens swapped", SUBEXPRESSION, "untied",
            weight("embed.weight", swapped(89, 96)), length=97),
    Mistake("the head's last row", FOLD, "untied", weight("lm_head.weight", scaled(1.001, 96))),
    Mistake("a tied head untied, one row another", SUBEXPRESSION, "plain", untie, length=97),
    Mistake("two heads that are not tied, tied", SUBEXPRESSION, "untied",
            slot(-1, "lm_head.weight", "embed.weight")),
    Mistake("a learned position", FOLD, "positions",
            weight("positions.weight", scaled(1.01, 400)), length=600),
    Mistake("learned positions off by one from 60 on", CANONICALISE, "positions",
            of(rows_off_by_one, "positions.weight", 60), length=100),
    Mistake("a frequency", FOLD, "plain", weight(FREQUENCIES, scaled(1.0001, 2))),
    Mistake("frequencies rounded to fp16", FOLD, "plain",
            weight(FREQUENCIES, lambda w: w.half().float()), length=97),
    Mistake("frequencies of another base", FOLD, "plain", weight(FREQUENCIES, lambda w: w**1.01)),
    Mistake("long frequencies are the short ones", SUBEXPRESSION, "switch",
            slot(0, "rope.long", FREQUENCIES), length=400),
    Mistake("short frequencies are the long ones", SUBEXPRESSION, "switch",
            slot(0, FREQUENCIES, "rope.long")),
    Mistake("slopes in another order", CANONICALISE, "alibi",
            weight("slopes", lambda w: w.flip(0))),
    Mistake("a head's slope", FOLD, "alibi", weight("slopes", scaled(1.001, 3))),
    Mistake("a head's sink", FOLD, "sinks", weight(SINKS, scaled(1.01, 2))),
    Mistake("a bias halved", FOLD, "biased", weight(BIAS, scaled(0.5))),
    Mistake("an expert's router", FOLD, "experts", router(scaled(1.001, 2)),
            "operand 0 of top_k_gating", length=None),
    Mistake("two experts' routers swapped", SUBEXPRESSION, "experts", router(swapped(0, 1))),
    Mistake("an edge of a threshold", FOLD, "thresholds", router(scaled(1.001), "router.bias"),
            "operand . of top_k_gating", length=None),
]

ATTRIBUTES = [
    Mistake("a window one shorter", CANONICALISE, "window", window(0, WINDOW - 1), length=120),
    Mistake("a window one longer", CACHE, "window", window(0, WINDOW + 1), length=120),
    Mistake("a window lost", DEAD, "window", window(0, None), length=120),
    Mistake("a window in every layer", CANONICALISE, "window", window(1, WINDOW), length=120),
    Mistake("a large window one shorter", CACHE, "large window", window(0, LARGE_WINDOW - 1),
            length=None),
    Mistake("a chunk one longer", CANONICALISE, "chunk", attr("attention", chunk=WINDOW + 1),
            length=120),
    Mistake("a chunk is a window", CANONICALISE, "chunk",
            attr("attention", chunk=None, window=WINDOW), length=220),
    Mistake("a chunk lost", CACHE, "chunk", attr("attention", chunk=None), length=120),
    Mistake("later tokens are seen", CANONICALISE, "plain", attr("attention", causal=False)),
    Mistake("a soft-cap lost", CANONICALISE, "softcap", attr("attention", softcap=None)),
    Mistake("a soft-cap off by 1e-3", FOLD, "softcap", attr("attention", softcap=2.002)),
    Mistake("scores off by 1e-3", CANONICALISE, "plain", attr("attention", scale=8**-0.5 * 1.001)),
    Mistake("another eps", SUBEXPRESSION, "plain", first("rms_norm", eps=1.001e-5)),
    Mistake("gains and 1", CANONICALISE, "plain", first("rms_norm", offset=1.0)),
    Mistake("pairs of neighbours", CANONICALISE, "plain", first("rope", interleaved=True)),
    Mistake("tables off by 1e-3", FOLD, "plain", attr("rope_table", scale=1.001)),
    Mistake("a switch one later", CANONICALISE, "switch", attr("by_length", length=SWITCH + 1),
            length=4, start=SWITCH - 3),
    Mistake("a switch one earlier", CACHE, "switch", attr("by_length", length=SWITCH - 1),
            length=4, start=SWITCH - 4),
    Mistake("a large switch one later", FOLD, "large switch",
            attr("by_length", length=LARGE_SWITCH + 1), length=4, start=LARGE_SWITCH - 3),
    Mistake("a base that grows later", CANONICALISE, "growing",
            attr("ntk_frequencies", length=SWITCH + 1), length=30, start=SWITCH),
    Mistake("a base that grows faster", FOLD, "growing", attr("ntk_frequencies", factor=4.1),
            length=30, start=SWITCH),
    Mistake("tanh in a gelu", CANONICALISE, "gelu", of(set_op, "gelu", "gelu_tanh")),
    Mistake("another activation", CANONICALISE, "plain", of(set_op, "silu", "quick_gelu")),
    Mistake("positions from the second row", FOLD, "last position", attr("embedding", offset=1)),
    Mistake("one expert more", SUBEXPRESSION, "experts", lambda program: (
        attr("top_k_gating", top_k=3)(program), attr("experts", active=3)(program))),
]

GRAPH = [
    Mistake("a residual dropped in one block", DEAD, "plain", of(drop_residual, 1, "attention")),
    Mistake("the last residual dropped", DEAD, "plain", of(drop_residual, 0, "mlp")),
    Mistake("the stream from before attention", SUBEXPRESSION, "plain", stream_before_attention),
    Mistake("a norm skipped in one block", DEAD, "plain", of(skip, "rms_norm", "h", 1)),
    Mistake("queries not rotated", CANONICALISE, "plain", of(skip, "rope", "q_rope")),
    Mistake("sines for cosines", SUBEXPRESSION, "plain", of(swap_operands, "rope", "k_rope", 1, 2)),
    Mistake("values for keys", SUBEXPRESSION, "plain",
            of(read_instead, "rope", "k_rope", 0, "v_heads")),
    Mistake("keys for values", SUBEXPRESSION, "plain",
            of(read_instead, "attention", "a", 2, "k_heads")),
    Mistake("an activation skipped", DEAD, "plain", of(skip, "silu", "act")),
    Mistake("padding is seen", DEAD, "plain", of(drop_operand, "attention", "a", 3)),
    Mistake("sinks lost", DEAD, "sinks", of(drop_operand, "attention", "a", 6)),
    Mistake("slopes lost", DEAD, "alibi", of(drop_operand, "attention", "a", 5)),
    Mistake("a bias dropped", DEAD, "biased", of(drop_operand, "linear", "v", 2)),
    Mistake("the last token's row", CANONICALISE, "plain", last_token),
    Mistake("a layer lost", DEAD, "plain", of(drop_layer, 1)),
    Mistake("a layer twice", SUBEXPRESSION, "plain",
            lambda program: program.calls.insert(2, replace(layer_call(program, 0)))),
    Mistake("positions no further than 60", CANONICALISE, "plain", of(clamp, "position_ids", 60),
            length=80),
    Mistake("positions no further than 500", FOLD, "positions", of(clamp, "position_ids", 500),
            length=600),
    Mistake("tokens no further than 90", CANONICALISE, "plain", of(clamp, "input_ids", 90),
            length=97),
]

CACHES = [
    Mistake("positions counted in the step", CACHE, "positions", positions_in_the_step),
    Mistake("two layers in one state", CACHE, "plain", one_state, "is kept by"),
    Mistake("old keys for old values", CACHE, "plain", past_swapped),
    Mistake("new keys for new values", CACHE, "plain", present_swapped),
    Mistake("states of 16 bits", CACHE, "plain", half_states, "is torch.float16", length=None),
    Mistake("keys in the cache not rotated", CACHE, "plain", unrotated_keys),
    Mistake("padding is seen behind a cache", CACHE, "plain",
            of(drop_operand, "attention", "a", 3)),
    Mistake("a ring that keeps too little", CACHE, "plain", of(short_ring, WINDOW), length=120),
]

LOWERED = [
    Mistake("the first summand lost", DEFER, "plain", of(lose_sum, 1)),
    Mistake("the second summand lost", DEFER, "plain", of(lose_sum, 0)),
    Mistake("the summand of the layer before", DEFER, "plain", older_summand),
    Mistake("another eps behind a sum", FUSE, "plain", attr("add_rms_norm", eps=1.001e-5)),
    Mistake("keys and values of a product", FUSE, "plain",
            of(swap_operands, "fused_linear", "q", 2, 3)),
    Mistake("biases of keys and values", FUSE, "biased",
            of(swap_operands, "fused_linear", "q", 5, 6)),
    Mistake("gate and up of a product", FUSE, "plain",
            of(swap_operands, "fused_linear", "gate", 1, 2)),
    Mistake("another activation in a product", FUSE, "plain", attr("act_mul", act="gelu")),
    Mistake("sines for cosines of a pair", FUSE, "plain",
            of(swap_operands, "rope_pair", "q_rope", 2, 3)),
    Mistake("a pair of neighbours", FUSE, "plain", attr("rope_pair", interleaved=True)),
    Mistake("a fused router", FUSE, "experts", router(scaled(1.001, 2)),
            "operand 0 of top_k_gating", length=None),
    Mistake("one fused expert fewer", FUSE, "experts", attr("route", top_k=1)),
    Mistake("up and gate of experts", FUSE, "experts", of(swap_operands, "moe", "add", 2, 4)),
    Mistake("the shared part's activation", FUSE, "experts", attr("moe", act="gelu")),
    Mistake("a window one shorter, planned", PLAN, "window", window(0, WINDOW - 1), length=120),
]

INSERT, MULTIPLY = "insert-affine", "fold-affine"
QUERIES = "layers.1.self_attn.q_proj.transform.queries"
TRANSFORMS = [
    Mistake("keys and queries transformed before the rotation", INSERT, "plain",
            transform_before_rotation),
    Mistake("an inverse lost", INSERT, "plain", of(skip, "kronecker", "m_t_1")),
    Mistake("a factor off by 1e-3", INSERT, "plain",
            weight("layers.0.mlp.down_proj.transform.left", scaled(1.001))),
    Mistake("an inverse that is not transposed for queries", INSERT, "plain",
            weight(QUERIES, lambda w: w.T)),
    Mistake("the map of values lost", INSERT, "plain", of(skip, "kronecker", "v_t")),
    Mistake("another inverse in a column", MULTIPLY, "transformed",
            weight("layers.0.mlp.down_proj.weight", scaled(1.001, (slice(None), 3)))),
    Mistake("a scale not folded", MULTIPLY, "transformed",
            weight(f"layers.1.{OTHER_GAIN}", scaled(1.001, 3))),
    Mistake("a row of the values off by 1e-3", MULTIPLY, "transformed",
            weight("layers.1.self_attn.v_proj.weight", scaled(1.001, 5))),
    Mistake("a transform lost", MULTIPLY, "transformed", of(skip, "kronecker", "m_t_1")),
    Mistake("a transform before the rotation, folded", MULTIPLY, "transformed",
            transform_before_rotation),
]

SHARD = "shard"
SPLIT = [
    Mistake("values of other heads on a rank", SHARD, "plain",
            weight("layers.1.self_attn.v_proj.weight", lambda w: w.roll(8, 0))),
    Mistake("neurons of a gate that are another's", SHARD, "plain",
            weight("layers.0.mlp.gate_proj.weight", lambda w: w.roll(24, 0))),
    Mistake("columns that read another rank's heads", SHARD, "untied",
            weight(OUT, lambda w: w.roll(16, 1))),
    Mistake("first rows of a smaller vocabulary", SHARD, "plain",
            weight("tensor_parallel.first_rows", lambda w: w - (w > 0).long()), length=60),
    Mistake("slopes of other heads", SHARD, "alibi", weight("slopes", lambda w: w.flip(0))),
    Mistake("a row that was to be cut off", SHARD, "untied",
            weight("lm_head.weight", lambda w: w.roll(1, 0))),
    Mistake("a bias on every rank", SHARD, "biased",
            placed("layers.1.self_attn.o_proj.bias"), "malformed program: layers.1: o = linear"),
    Mistake("a partial sum that is not added up", SHARD, "plain", of(skip, "all_reduce", "o_sum"),
            "reads o, a partial sum"),
]

PLACE = "place-kv"
PLACED = [
    Mistake("keys on the host in another layer's state", PLACE, "cached", one_state, "is kept by"),
    Mistake("keys on the host for values", PLACE, "cached", past_swapped),
    Mistake("keys that go to the host not rotated", PLACE, "cached", unrotated_keys),
    Mistake("keys on the host in 16 bits", PLACE, "cached", half_states, "is torch.float16",
            length=None),
]

CONTRACT = [
    Mistake("the config", CANONICALISE, "plain", lambda program: program.config.update(eps=5.0),
            "exact but changed the program's config", length=None),
    Mistake("the tokenizer", DEAD, "plain", lambda program: setattr(program, "tokenizer", "other"),
            "exact but changed the program's tokenizer", length=None),
    Mistake("how text is generated", DEAD, "plain",
            lambda program: program.generation.update(top_k=1),
            "exact but changed the program's generation", length=None),
    Mistake("how long texts are", FOLD, "plain", lambda program: setattr(program, "max_length", 7),
            "exact but changed the program's max length", length=None),
    Mistake("an input more", DEAD, "plain",
            lambda program: program.inputs.update(more=program.inputs["input_ids"]),
            "exact but changed which inputs", length=None),
]
# fmt: on

MISTAKES = [
    *WEIGHTS,
    *ATTRIBUTES,
    *GRAPH,
    *CACHES,
    *LOWERED,
    *TRANSFORMS,
    *SPLIT,
    *PLACED,
    *CONTRACT,
]


def options_of(name: str, program: Program) -> dict[str, object]:
    """Return the options with which a pass changes the program."""
    if name != PLACE:
        return {}
    large = PlaceKV(gpu="9GB", context=20_000)
    record = large.run(program.copy(), Context()).record
    assert isinstance(record, PlacedKV)
    return {"gpu": str(record.gpu - record.room), "context": large.context}


@dataclass
class Planted(Pass):
    """An exact pass with a mistake behind it."""

    name: ClassVar[str] = "test-planted"
    reads_weights: ClassVar[bool] = True
    mistake: ClassVar[Mistake]

    def run(self, program: Program, context: Context) -> PassResult:
        behind = self.mistake.behind
        exact = LOWERING.get(behind) or make_pass(behind, options_of(behind, program))
        result = exact.run(program, context)
        self.mistake.act(result.program)
        return replace(result, changed=result.changed + 1, record=None)


def shown(before: Program, after: Program, length: int, start: int) -> float:
    """Return by how much a mistake moves a logit of a text, in fp64, as a share of the largest."""
    ids = torch.arange(2 * length).reshape(2, length) % 97
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : min(3, length - 1)] = 0
    inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
    inputs["position_ids"] += start
    old = Runner(before, dtype=torch.float64).logits(inputs)[mask.bool()]
    runner = Runner(after, dtype=torch.float64)
    try:
        texts = [runner.logits(inputs)]
        if after.states:
            parts, past = [], None
            for begin, stop in ((0, length // 2), (length // 2, length)):
                step = {k: v[:, begin:stop] for k, v in inputs.items()}
                step["attention_mask"] = mask[:, :stop]
                outputs, past = runner.run(step, past)
                parts.append(outputs[0])
            texts.append(torch.cat(parts, 1))
    except (RuntimeError, IndexError):
        return float("inf")
    moved = max(float((text[mask.bool()] - old).abs().max()) for text in texts)
    return moved / float(old.abs().max())


@pytest.mark.parametrize(
    "mistake", slow_but(MISTAKES, *MISTAKES[::4]), ids=lambda m: f"{m.behind}: {m.what}"
)
def test_a_mistake_is_found(mistake: Mistake):
    program = BASES[mistake.base]()
    Planted.mistake = mistake
    if mistake.length is not None:
        after = Planted().run(program.copy(), Context()).program
        assert shown(program, after, mistake.length, mistake.start) > 1e-7, "it is no mistake"
    with pytest.raises(VerifyError, match=mistake.found) as caught:
        Pipeline([Planted()]).run(program)
    assert "as it was" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_honest_passes_are_not_refused(base: str):
    _, report = Pipeline([*EXACT, *LOWERING.values()]).run(BASES[base]())
    assert {entry.verification for entry in report.passes} <= {"unchanged", "proved", "passed"}
    assert not any(entry.not_run for entry in report.passes)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (weight(OUT, scaled(1.01)), f"it put other values in {OUT!r}; --dump-ir"),
        (lambda program: [change(program, w.name, scaled(1.01)) for w in [*program.weights][1:7]],
         " and 2 more; --dump-ir"),
        (window(0, WINDOW - 1), "no weight has another value; --dump-ir"),
    ],
)  # fmt: skip
def test_a_passs_developer_is_told_which_weights_it_changed(act, said):
    Planted.mistake = Mistake("any", DEAD, "window", act)
    with pytest.raises(VerifyError) as caught:
        Pipeline([Planted()]).run(BASES["window"]())
    assert "Leave 'test-planted' out of the recipe" in caught.value.remedy
    assert "To its developer: " in caught.value.remedy and said in caught.value.remedy


def test_there_are_mistakes_behind_every_exact_pass():
    """Those of the default recipe, and whatever exact pass comes to be beside them."""
    own = {
        name
        for name, declared in declared_passes().items()
        if declared.exact and declared.__module__.startswith("graphopt.passes.")
    }
    assert set(EXACT) <= own and len(MISTAKES) >= 60
    for name in own:
        count, needed = sum(m.behind == name for m in MISTAKES), 8 if name in EXACT else 3
        assert count >= needed, f"{name} needs {needed} mistakes in MISTAKES: docs/passes.md"
