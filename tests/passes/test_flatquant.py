"""Rounding behind trained transforms: what is left in the graph, what is learnt, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import captured
from programs import tiny_program
from sampling import exhaustive_but
from tiny_models import byte_tokenizer
from trained import book

from graphopt.calibration.affine_factors import FactorMaker, check_condition
from graphopt.calibration.affine_plan import plan_transforms
from graphopt.capture import capture
from graphopt.errors import GraphoptError, PassError, UsageError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Array, Call, Function, Value
from graphopt.ir.affine import Factors, role_of
from graphopt.ir.blocks import NO_BLOCK, find_blocks
from graphopt.ir.encoding import Packed
from graphopt.ir.encoding import group_of as group_of_row
from graphopt.ir.ops.attention import KEY, VALUE
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.rounding_statements import ROUNDED
from graphopt.passes.flatquant.flatquant import FlatQuant
from graphopt.passes.flatquant.run import FlatQuantising
from graphopt.passes.flatquant.structure import (
    Bits,
    RoundedFunction,
    base_values,
    insert_roundings,
    trained_sites,
    transform,
)
from graphopt.passes.fold_affine import FoldAffine
from graphopt.passes.insert_affine import InsertAffine
from graphopt.passes.quantize.places import find_places, round_kv
from graphopt.passes.quantize.quantize import Quantize
from graphopt.training.affine import BlockTransforms, InvertibleFactor, Rounding

IDS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(3))
INPUTS = complete_inputs({"input_ids": IDS})
CPU = torch.device("cpu")


def with_tokenizer(folder, **options):
    byte_tokenizer().save_pretrained(folder)
    program = tiny_program(vocab=512, **options)
    program.tokenizer = str(folder)
    return program


def logits(program):
    return Runner(program, dtype=torch.float64).logits(INPUTS)


SHAPES = {
    "plain": {},
    "biases": {"bias": True, "norm": "layer"},
    "one key head": {"kv_heads": 1},
    "a prime width": {"hidden": 31},
}


WHOLE = Bits(16, 16, 16)


def group_of(program, kind="kronecker", bits=WHOLE, **options):
    """The first block's transforms while they are trained, and the folded program."""
    folded = program.copy()
    maker = FactorMaker(kind, folded, torch.Generator().manual_seed(0))
    plan = plan_transforms(folded, maker)
    transform(folded, plan)
    rounded, _ = insert_roundings(folded, bits)
    position = find_blocks(folded)[0].position
    call = folded.calls[position]
    sites, keys = trained_sites(folded, plan.functions[0], 0)
    own = rounded.get(call.function, RoundedFunction())
    base = base_values(program, program.calls[position], sites, own, CPU)
    clips = {slot: torch.full((1,), 0.9) for slot in own.clips}
    given = {"learn": True, "learn_clips": True} | options
    return folded, BlockTransforms(call.weights, base, sites, keys, own.linears, clips, **given)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_what_is_trained_folds_as_the_pass_does(options):
    """Two ways to the same weights: the graph's, by fold-affine, and that of the parameters."""
    program = tiny_program(**options)
    folded, group = group_of(program)
    made = group.folded()
    assert group.names == set(made)
    for name, value in made.items():
        expected = folded.weights[name].load(torch.float64)
        # Both begin with factors that are rounded to fp32, of condition below 10.
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_folded_weights_are_exact_wherever_training_leads():
    program = tiny_program(bias=True)
    folded, group = group_of(program, bits=WHOLE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in group.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    for name, value in group.folded().items():
        folded.weights.replace(folded.weights[name].with_producer(Array(value)))
    old, new = logits(program), logits(folded)
    # Weights of other blocks are folded in fp32.
    assert float((old - new).abs().max() / old.abs().max()) < 1e-5
    assert all(bool(matrix.isfinite().all()) for matrix in group.trained_factors()[1])


@pytest.mark.parametrize("size", [2, 7, 24])
def test_a_factor_begins_where_it_should_and_stays_invertible(size):
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    factor = InvertibleFactor(start)
    matrix, inverse = factor()
    assert torch.allclose(matrix.double(), start, atol=1e-5)
    with torch.no_grad():
        factor.turns += torch.randn(2, size, size, generator=generator)
        factor.log_scales += torch.randn(size, generator=generator)
    matrix, inverse = factor()
    eye = torch.eye(size, dtype=torch.float64)
    matrix, inverse = matrix.detach(), inverse.detach()
    condition = float(torch.linalg.cond(matrix.double()))
    left = matrix.double() @ inverse.double().T - eye
    assert float(left.abs().max()) < 1e-6 * size * condition
    # Rounded to fp16 each, as a runtime would have them.
    half = matrix.half().double() @ inverse.half().double().T - eye
    assert float(half.abs().max()) < 2**-10 * size * condition


def test_codes_hold_what_was_trained():
    """Clipped and rounded while training, and packed in the end: the same values."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    for group in (0, 8):
        rounding = Rounding(4, group)
        rows = rounding.rows(weight)
        clip = torch.full((*rows.shape[:-1], 1), 0.7)
        clipped = rounding.clipped(weight, clip)
        rounded = rounding.rounded(clipped)
        assert torch.equal(rounding.rounded(rounded), rounded)
        limit = 0.7 * rows.abs().amax(-1, keepdim=True)
        step = limit / 7
        error = (rounding.rows(rounded) - rows.clamp(-limit, limit)).abs()
        assert bool((error <= step / 2 + 1e-6).all())


def test_options_that_nothing_computes_with_are_refused():
    for given, said in (
        ({"w": 5}, "w=5 bits"), ({"a": 9}, "a=9 bits"), ({"kv": 12}, "kv=12 bits"),
        ({"method": "published", "kind": "hadamard"}, "kind=hadamard are fixed"),
        ({"method": "published", "clip": False}, "trains clips, and clip=false leaves them out"),
        ({"method": "published", "start": "hadamard"}, "start=hadamard does not"),
        ({"method": "published", "distil": 0.2}, "distil=0.2 would"),
        ({"method": "published", "generated_windows": 4}, "generated_windows=4 are written"),
        ({"kind": "random", "start": "hadamard"}, "kind=random are not trained"),
        ({"kind": "scale", "scale": False}, "nothing but scales, and scale=false"),
        ({"train": "low-rank"}, "train=low-rank is for low-rank terms"),
        ({"rank": 8}, "rank=8 is for low-rank terms"),
        ({"w": 1}, "w"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            FlatQuant(**given)
    FlatQuant(method="published", start="random", distil=0, generated_windows=0)


def test_a_singular_transform_stops_with_the_name_of_its_layer():
    with pytest.raises(PassError, match=r"layers\.3\.mlp is singular: its condition number is inf"):
        check_condition(torch.zeros(3, 3), "layers.3.mlp")
    with pytest.raises(PassError, match="singular"):
        check_condition(torch.full((2, 2), torch.nan), "layers.3.mlp")
    with pytest.raises(PassError, match="singular"):
        check_condition(torch.tensor([1.0, 1e-9]), "layers.3.mlp")


@pytest.mark.parametrize(("length", "group"), [(31, 31), (48, 16), (64, 64), (96, 32)])
def test_weights_are_trained_on_the_grid_that_they_are_packed_in(length, group):
    """Groups of 64: where they do not divide a row, the same smaller ones in both places."""
    weight = torch.randn(5, length, generator=torch.Generator().manual_seed(length))
    assert group_of_row(64, length) == group
    encoding = Packed(4, group)
    stored = encoding.dequantise(encoding.quantise(weight))
    torch.testing.assert_close(Rounding(4, 64).rounded(weight), stored, rtol=0, atol=1e-6)


def test_groups_that_do_not_divide_a_row_are_halved_in_training_too(tmp_path):
    program = with_tokenizer(tmp_path, hidden=48)
    item = FlatQuant(kind="none", clip=False, steps=0, seqlen=16, windows=2, group=32)
    context = Context(text=book(60), dense=program)
    run = FlatQuantising(item, program.copy(), context)
    group = run._group(find_blocks(run.program)[0].position)
    for slot, rounding in group.roundings.items():
        width = group.base(slot).shape[1]
        assert rounding.rows(group.base(slot)).shape[-1] == {48: 16, 32: 32}[width]
    result = run.run()
    packed = [w.encoding for w in result.program.used_weights() if w.encoding is not None]
    assert {encoding.group for encoding in packed} == {16, 32}
    assert any("48 features are no multiple of 32" in skip.reason for skip in result.skipped)
    assert result.statement.check(program, result.program) is None


def test_codes_are_chosen_of_what_was_distilled_not_of_its_nearest_codes(tmp_path):
    """By GPTQ, on as many windows as were asked for: not every element becomes the nearest code."""
    program = with_tokenizer(tmp_path)
    item = FlatQuant(
        kind="none", clip=False, steps=2, seqlen=16, windows=4, distil=0.5, rounding="gptq",
        w=3, batch=2,
    )  # fmt: skip
    run = FlatQuantising(item, program.copy(), Context(text=book(60), dense=program))
    result = run.run()
    names = [name for name, _ in run._rounded_weights(run.program)]
    assert names
    for name in names:
        learnt = run.program.weights[name].load(torch.float32)
        nearest = Rounding(3).rounded(learnt)
        assert not torch.allclose(nearest, learnt, atol=1e-4)
    stated = result.statement.packing.weights
    assert {matrix.name for matrix in stated} == set(names)
    assert all(matrix.error > 1e-3 for matrix in stated)
    assert result.statement.check(program, result.program) is None


@pytest.mark.slow
def test_going_on_behind_the_blocks_tells_what_a_whole_run_does(tmp_path, monkeypatch):
    program = with_tokenizer(tmp_path / "model", hidden=31)
    item = FlatQuant(
        start="hadamard", scale=False, steps=2, seqlen=16, windows=4, distil=0.5, batch=2
    )

    def run(work=None):
        return item.run(program.copy(), Context(text=book(60), dense=program, work=work))

    def interrupted(self, data, first=0):
        raise GraphoptError("The power failed.")

    whole = run()
    with monkeypatch.context() as patched:
        patched.setattr(FlatQuantising, "distil", interrupted)
        with pytest.raises(GraphoptError, match="power"):
            run(tmp_path / "work")
        # Weights of a model that is too large for its device lie where its others do.
        patched.setattr(FlatQuantising, "home_of", lambda self, program: CPU)
        meta = Context(text=book(60), dense=program, work=tmp_path / "work")
        meta.device = torch.device("meta")
        resumed = FlatQuantising(item, program.copy(), meta)
        assert resumed.done == ["blocks"]
        places = {weight.load().device.type for weight in resumed.program.used_weights()}
        assert places == {"cpu"}
    resumed = run(tmp_path / "work")
    assert resumed.skipped == whole.skipped and len(set(whole.skipped)) == len(whole.skipped)
    told = [[step.after for step in result.record.perplexity] for result in (whole, resumed)]
    assert told[0] == told[1] == ["the whole model", "blocks", "distilled"]


@pytest.mark.slow
def test_keys_and_values_of_another_layer_are_rounded_as_quantize_does():
    program = captured("gemma4_text")[1]
    other = program.copy()
    rounded, left = insert_roundings(program, Bits(16, 16, 4))
    assert not left
    places = find_places(other)
    for name, attentions in places.attentions.items():
        round_kv(other.functions[name], attentions, 4)
    shared = 0
    for name in places.attentions:
        sides = [[n for n in p.functions[name].nodes if n.op == "attention"]
                 for p in (program, other)]  # fmt: skip
        for ours, theirs in zip(*sides, strict=True):
            for place in (KEY, VALUE):
                pair = [node.inputs[place].node for node in (ours, theirs)]
                assert [node.op for node in pair] == [ROUNDED, ROUNDED]
                assert pair[0].inputs[0].name == pair[1].inputs[0].name
                assert pair[0].attrs["symmetric"] is pair[1].attrs["symmetric"] is False
                shared += pair[0].inputs[0].node is None
        assert len(rounded[name].clips) == 2 * len(sides[0])
    assert shared


def test_a_model_that_is_rounded_already_is_rounded_again(tmp_path):
    """The clips of the first pass stay as they are."""
    program = with_tokenizer(tmp_path)
    item = FlatQuant(kind="hadamard", steps=0, seqlen=16, windows=2, a=8, distil=0)
    once = item.run(program.copy(), Context(text=book(60), dense=program)).program
    clips = {w.name: w.load() for w in once.weights if w.name.endswith("clip")}
    twice = item.run(once.copy(), Context(text=book(60), dense=program))
    assert twice.statement.check(once, twice.program) is None
    assert clips and all(torch.equal(twice.program.weights[n].load(), v) for n, v in clips.items())


def test_transforms_that_are_not_folded_yet_are_refused():
    program = tiny_program()
    inserted = InsertAffine(kind="hadamard").run(program.copy(), Context()).program
    with pytest.raises(PassError, match="inverses behind them") as caught:
        FlatQuant(steps=0).check(inserted)
    assert "fold-affine" in caught.value.remedy
    FlatQuant(steps=0).check(FoldAffine().run(inserted, Context()).program)


@pytest.mark.parametrize(
    "item",
    [
        FlatQuant(kind="hadamard", steps=0, seqlen=16, windows=2, distil=0),
        Quantize(method="rtn", a=8, kv=4),
    ],
)
def test_a_function_that_a_call_behind_the_blocks_has_too_is_rounded_in_blocks_alone(
    item, tmp_path
):
    """As of Gemma 3n, whose projections into the layers and out of them are one function."""
    program = with_tokenizer(tmp_path, layers=3)
    function = program.functions["both"] = Function("both")
    x = Value("x")
    function.params = [x]
    function.results = [x, function.add("add", [x, x], names=["twice"]).output]
    program.calls.insert(-2, Call("both", ["x"], ["x", "twice"]))
    made = item.run(program.copy(), Context(text=book(60), dense=program))
    assert made.statement.check(program, made.program) is None
    assert len(find_blocks(made.program)) == 2
    rounded = [
        any(node.op == ROUNDED for node in made.program.function_of(call).nodes)
        for call in made.program.calls
    ]
    assert rounded == [False, True, True, False, False, False]
    assert any(skip.reason == NO_BLOCK and "layers.2" in skip.where for skip in made.skipped)


def test_layers_that_give_keys_to_others_are_no_blocks_and_said_to_be_left():
    program = captured("gemma4_text")[1]
    maker = FactorMaker("hadamard", program, torch.Generator().manual_seed(0))
    plan = plan_transforms(program, maker, blocks_alone=True)
    blocks = {program.calls[block.position].path for block in find_blocks(program)}
    assert blocks == {call.path for part in plan.functions for call in part.calls}
    left = {where for where, reason in plan.left if reason == NO_BLOCK}
    assert left and left == {skip.where for skip in find_places(program).skipped}
    assert not left & blocks


def test_widths_without_factors_are_said():
    program = tiny_program(hidden=31)
    maker = FactorMaker("hadamard", program, torch.Generator().manual_seed(0))
    told = plan_transforms(program, maker).left
    assert any("31 features have no two useful factors" in reason for _, reason in told)


def test_a_cache_alone_needs_no_transform_of_what_matrices_read():
    program = tiny_program()
    given = logits(program)
    folded = program.copy()
    generator = torch.Generator().manual_seed(0)
    plan = plan_transforms(folded, FactorMaker("random", folded, generator, inputs=False))
    transform(folded, plan)
    nodes = folded.functions["block"].nodes
    found = [role for node in nodes if (role := role_of(folded.functions["block"], node))]
    assert found == ["queries", "keys"]
    name = "layers.0.self_attn.v_proj.weight"
    assert not torch.equal(program.weights[name].load(), folded.weights[name].load())
    # Weights are folded in fp64 and rounded to fp32.
    assert float((logits(folded) - given).abs().max() / given.abs().max()) < 1e-5


def test_tokens_of_zeros_stay_zeros():
    program = tiny_program()
    folded, _ = group_of(program, bits=Bits(4, 4, 4))
    embed = folded.weights["embed.weight"]
    folded.weights.replace(embed.with_producer(Array(torch.zeros(embed.shape))))
    assert bool(logits(folded).isfinite().all())


def test_factors_have_a_condition_for_each_part():
    weights = Factors(scale=torch.tensor([1.0, 2.0]), right=torch.eye(2)).weights()
    assert set(weights) == {"scale", "scale_inverse", "right", "right_inverse"}
    assert torch.equal(weights["scale_inverse"], torch.tensor([1.0, 0.5], dtype=torch.float64))


TRAINED = Path(__file__).parents[2] / "benchmarks" / "models"


# Norms behind with windows; parallel parts with biases; experts.
SHOWN = ("gemma3", "gpt_neox", "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", exhaustive_but(("gemma3", "gpt_neox", "llama", "mixtral", "opt", "qwen3"), *SHOWN)
)
def test_blocks_of_every_family_err_less_behind_the_closed_form(family):
    """On trained models; what is said of experts is that they are no matrices."""
    program = capture(str(TRAINED / family))
    text = book(200)

    def run(**options):
        options |= {"steps": 0, "windows": 4, "seqlen": 64, "clip": False}
        return FlatQuant(**options).run(program.copy(), Context(text=text, dense=program))

    plain, closed = run(kind="none"), run(kind="closed")
    errors = [sum(block.after for block in r.record.blocks) for r in (plain, closed)]
    assert errors[1] < errors[0]
    assert plain.record.worst is None and closed.record.worst[0] < 1e3
    said = {skip.reason for skip in closed.skipped}
    assert any("grouped_mm" in reason for reason in said) == (family == "mixtral")
    packed = [w.name for w in closed.program.weights if w.encoding is not None]
    assert len(packed) >= 4 * len(closed.record.blocks)
