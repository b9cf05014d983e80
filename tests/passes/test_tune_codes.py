"""tune-codes: packed weights are trained as they will be read, and nothing else of them changes."""

from __future__ import annotations

import math

import pytest
import torch
from programs import tiny_program
from trained import book, trained_program

import graphopt as go
from graphopt.calibration.text import calibration_windows, held_out_perplexity
from graphopt.errors import PassError, UsageError
from graphopt.ir import Array, Dequantised, Packed, Weight
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.pass_manager.rounding_statements import RetunedCodes
from graphopt.passes.tune_codes import _Tuning
from graphopt.training.codes import CodeParametrisation
from graphopt.training.distil import Distiller


def parametrised(encoding, seed=0, source=True):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(6, 24, generator=generator)
    tensors = encoding.quantise(value, torch.float16)  # scales that are stored as they are
    tensors["scales"] = tensors["scales"].float()
    return value, tensors, CodeParametrisation(encoding, tensors, value if source else None, 1.0)


ENCODINGS = [
    Packed(bits, group, 1, symmetric)
    for bits in (2, 3, 4, 8) for group in (8, 24) for symmetric in (True, False)
]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("source", [True, False])
def test_training_begins_with_the_codes_that_there_are(encoding, source):
    _, tensors, weight = parametrised(encoding, source=source)
    assert torch.equal(weight(), encoding.dequantise(tensors))
    again = weight.tensors()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[suffix], tensors[suffix]) for suffix in tensors)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_what_is_trained_is_what_is_stored(encoding):
    """After steps that move codes and scales, the value is that of the tensors made of it."""
    _, tensors, weight = parametrised(encoding)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.05)
    goal = torch.randn(6, 24, generator=torch.Generator().manual_seed(9))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (weight() - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    made = weight.tensors()
    torch.testing.assert_close(encoding.dequantise(made), weight().detach(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(made["packed"], tensors["packed"])
    assert not torch.equal(made["scales"], tensors["scales"])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_trained_as_the_numbers_that_a_weight_stores(dtype):
    """Not as those of another dtype, which would be rounded once more behind the training."""
    encoding = Packed(4, 8)
    value = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    tensors = encoding.quantise(value, dtype)
    weight = CodeParametrisation(encoding, tensors, value, 1.0)
    with torch.no_grad():
        weight.log_scales += 0.0137
    made = weight.tensors()
    assert made["scales"].dtype == dtype
    wide = made | {"scales": made["scales"].float()}
    torch.testing.assert_close(encoding.dequantise(wide), weight().detach(), rtol=1e-6, atol=1e-7)


class Tuning(_Tuning):
    """A run of which the models alone are there."""

    def __init__(self, dense, program):
        self.dense, self.original, self.device = dense, program, torch.device("cpu")
        self.skipped, self.codes = [], {}


@pytest.mark.parametrize("method", ["rtn", "clip=False"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_elements_begin_at_what_was_rounded_and_at_nothing_else(method, bits):
    dense = tiny_program()
    options = {"w": bits, "method": "rtn", "clip": method == "rtn"}
    program = make_pass("quantize", options).run(dense, Context()).program
    weight = program.weights[UP]
    value, steps = weight.load(), weight.producer.scales.load()
    source = Tuning(dense, program)._source(UP, value, steps)
    assert torch.equal(source, dense.weights[UP].load())
    # Of the same name and shape, but what was rounded had its columns scaled.
    other = dense.copy()
    scales = torch.logspace(-1, 1, value.shape[1], base=4.0)
    other.weights.replace(Weight(UP, Array(dense.weights[UP].load() * scales)))
    assert Tuning(other, program)._source(UP, value, steps) is None


def test_codes_along_another_axis_are_left_with_the_reason(monkeypatch):
    program = tiny_program()
    weight = program.weights[UP]
    encoding = Packed(4, 16, axis=0)
    tensors = {s: Array(t) for s, t in encoding.quantise(weight.load()).items()}
    program.weights.replace(weight.with_producer(Dequantised(encoding, **tensors)))
    monkeypatch.setattr(Distiller, "parametrisations", lambda self, program, calls: {UP: None})
    tuning = Tuning(tiny_program(), program)
    assert tuning.parametrisations(program, []) == {}
    ((where, reason),) = [(skip.where, skip.reason) for skip in tuning.skipped]
    assert where == UP and "axis 1" in reason


def test_scales_have_the_gradient_of_what_elements_are_off():
    """LSQ's: sum of (code - place) where a place is a code's, and of the code where it is not."""
    encoding = Packed(3, 4, symmetric=True)
    tensors = encoding.pack(torch.tensor([[5, 2, 7, 0]]), torch.tensor([[0.5]]))
    source = torch.tensor([[0.6, -1.1, 1.5, -2.0]])
    weight = CodeParametrisation(encoding, tensors, source, 1.0)
    with torch.no_grad():
        weight.elements[0, 0, 3] = -3.0  # beyond the last code
    weight().sum().backward()
    places = torch.tensor([0.6, -1.1, 1.5]) / 0.5
    wanted = float((places.round() - places).sum() - 4) * 0.5
    assert float(weight.log_scales.grad) == pytest.approx(wanted, abs=1e-6)
    assert weight.elements.grad.tolist() == [[[1.0, 1.0, 1.0, 0.0]]]


@pytest.mark.slow
def test_a_model_of_two_bits_comes_nearer_to_what_it_was(tmp_path_factory):
    program = trained_program(tmp_path_factory, 2).copy()
    text = tmp_path_factory.mktemp("text") / "book.txt"
    text.write_text(book())
    recipe = (
        "quantize{w=2,group=16,a=8,method=rtn},tune-codes{steps=60,rate=6e-3,batch=4,seqlen=96}"
    )
    made, report = go.Pipeline.parse(recipe).run(program, go.RunOptions(calib=text))
    rounded, _ = go.Pipeline.parse(recipe.partition(",tune")[0]).run(program)
    windows = calibration_windows(program, Context(text=book(1300)), 96)[-16:]
    dense, before, after = (
        math.log(held_out_perplexity(p, windows, torch.device("cpu"), torch.float32))
        for p in (program, rounded, made)
    )
    assert after - dense < 0.25 * (before - dense)
    encodings = [{w.name: w.encoding for w in p.weights} for p in (rounded, made)]
    assert encodings[0] == encodings[1]
    record = report.passes[-1].details
    assert 0 < record["changed"] < 1 and record["training"][0]["steps"] > 0
    attrs = [n.attrs for f in made.functions.values() for n in f.nodes if "quantise" in n.op]
    assert attrs and not any(a.get("straight_through") for a in attrs)


def test_it_needs_codes():
    with pytest.raises(PassError, match="quantize"):
        go.Pipeline.parse("tune-codes").run(tiny_program())
    item = make_pass("tune-codes", {})
    with pytest.raises(PassError, match="needs a model whose weights quantize packed"):
        item.run(tiny_program(), Context(dense=tiny_program()))


def result_with(change):
    program = make_pass("quantize", {"method": "rtn"}).run(tiny_program(), Context()).program
    after = program.copy()
    change(after)
    return RetunedCodes().check(program, after)


UP, NORM = "layers.1.mlp.up_proj.weight", "norm.weight"


def other_encoding(program):
    weight = program.weights[UP]
    tensors = {s: Array(t) for s, t in Packed(4, 16).quantise(weight.load()).items()}
    program.weights.replace(weight.with_producer(Dequantised(Packed(4, 16), **tensors)))


def dense_again(program):
    weight = program.weights[UP]
    program.weights.replace(Weight(UP, Array(weight.load())))


def a_scale_that_is_none(program):
    weight = program.weights[UP]
    scales = weight.producer.scales.load() * torch.nan
    made = Dequantised(weight.encoding, weight.producer.packed, Array(scales))
    program.weights.replace(weight.with_producer(made))


def the_last_norm(program):
    weight = program.weights[NORM]
    program.weights.replace(weight.with_producer(Array(weight.load() * 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_encoding, "group=16.*not .*group=32"),
        (dense_again, "dense, not"),
        (a_scale_that_is_none, "holds NaN"),
        (the_last_norm, "something else than weights of blocks"),
    ],
)
def test_mistakes_are_found(change, message):
    import re

    assert re.search(message, result_with(change) or "")


def test_other_values_of_a_block_are_what_it_states():
    def scaled(program):
        weight = program.weights[UP]
        scales = Array(weight.producer.scales.load() * 1.5)
        made = Dequantised(weight.encoding, weight.producer.packed, scales)
        program.weights.replace(weight.with_producer(made))

    assert result_with(scaled) is None


@pytest.mark.parametrize("given", [{"train": "low-rank"}, {"rank": 4}])
def test_low_rank_terms_are_refused(given):
    with pytest.raises(UsageError, match="low-rank terms, and tune-codes trains scales and codes"):
        make_pass("tune-codes", given)
