"""Placements: kept by everything that keeps a program, and refused by what cannot follow them."""

from __future__ import annotations

import json

import pytest
from programs import tiny_program

from graphopt.compiler import emit
from graphopt.errors import LoweringError, SourceError, VerifyError
from graphopt.ir import Placement, Program
from graphopt.ir.compare import first_difference
from graphopt.ir.imprint import Imprint
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.verify import verify

TWO = ("cuda:0", "cuda:1")
NAME = "layers.0.mlp.up_proj.weight"


def placed(weight=None, state=None, call=None) -> Program:
    program = tiny_program(cache=True)
    if weight is not None:
        old = program.weights[NAME]
        program.weights.replace(type(old)(old.name, old.producer, old.checkpoint, False, weight))
    program.states["kv.0"].placement = state
    program.calls[1].placement = call
    return program


def full() -> Program:
    return placed(Placement(TWO, 0), Placement(TWO, 1), Placement(TWO))


def test_nothing_is_placed_by_default():
    program = tiny_program(cache=True)
    assert all(w.placement is None for w in program.weights)
    assert all(item.placement is None for item in (*program.calls, *program.states.values()))


def test_copies_and_saved_programs_keep_placements():
    program = full()
    data = json.loads(json.dumps(program_to_json(program)))
    saved = program_from_json(data, {w.name: w.producer for w in program.weights})
    for copied in (program.copy(), saved):
        assert first_difference(program, copied) is None
        assert copied.weights[NAME].placement == Placement(TWO, 0)
        assert copied.states["kv.0"].placement == Placement(TWO, 1)
        assert copied.calls[1].placement == Placement(TWO)
    data["calls"][1]["placement"]["devices"] = ["a device"]
    with pytest.raises(SourceError, match="'a device' is no device"):
        program_from_json(data, {})


@pytest.mark.parametrize(
    ("where", "message"),
    [({"weight": Placement(TWO, 0)}, "weight"), ({"state": Placement(TWO)}, "state 'kv.0'"),
     ({"call": Placement(("cpu",))}, "layers.0: it is")],
)  # fmt: skip
def test_comparisons_see_placements(where, message):
    plain, other = tiny_program(cache=True), placed(**where)
    assert message in str(first_difference(other, plain))
    assert "unplaced" in str(first_difference(other, plain))
    assert Imprint(plain).difference(other) is not None


@pytest.mark.parametrize(
    ("placement", "text"),
    [(Placement(TWO, 0, 3), "axis=0, sections=3"), (Placement(TWO, summed=True), "summed"),
     (Placement((*TWO, "cuda:2", "cuda:3"), 1, copies=2), "axis=1, copies=2")],
)  # fmt: skip
def test_how_an_axis_is_split_is_written_and_saved(placement, text):
    program = placed(weight=placement)
    assert f"{', '.join(placement.devices)}, {text})" in print_program(program)
    saved = program_from_json(json.loads(json.dumps(program_to_json(program))), {})
    for again in (saved, parse_program(print_program(program))):
        assert again.weights[NAME].placement == placement


def test_a_weight_with_another_value_stays_where_it_is():
    weight = full().weights[NAME]
    assert weight.with_producer(tiny_program(seed=1).weights[NAME].producer).placement is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((),), "name each device once"), ((("cuda:0", "cuda:0"),), "once"), ((("GPU 1",),), "no dev"),
     ((("cpu",), 0), "split over 1"), ((TWO, -1), "axis -1"), ((TWO, None, 2), "no axis is split"),
     ((TWO, 0, 1, 1, True), "a whole tensor on each"), ((("cpu",), None, 1, 1, True), "several"),
     ((TWO, 0, 0), "0 sections"), ((TWO, 0, 1, 2), "2 copies"),
     ((("cpu:0", "cpu:1", "cpu:2"), 0, 1, 2), "2 copies of each part on 3")],
)  # fmt: skip
def test_placements_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Placement(*arguments)


@pytest.mark.parametrize(
    ("where", "message"),
    [({"weight": Placement(TWO, 2)}, "no axis 2"), ({"state": Placement(TWO, 2)}, "by their heads"),
     ({"weight": Placement(("cpu", *TWO, "cuda:2", "cuda:3"), 0)}, "in 5 parts"),
     ({"weight": Placement(TWO, 0, sections=5)}, "each of 5 sections in 2 parts"),
     ({"call": Placement(TWO, 0)}, "no axis 0")],
)  # fmt: skip
def test_what_does_not_split_evenly_is_refused(where, message):
    with pytest.raises(VerifyError, match=message):
        verify(placed(**where))


@pytest.mark.parametrize("emitter", ["gguf", "onnx", "hf"])
def test_emitters_write_for_one_device(emitter, tmp_path):
    for where in (
        {"weight": Placement(TWO, 0)},
        {"state": Placement(TWO)},
        {"call": Placement(TWO)},
    ):
        with pytest.raises(LoweringError, match=r"is placed\(cuda:0, cuda:1.*torch one alone"):
            emit(placed(**where), tmp_path / "out", target="cpu", emit=(emitter,))
