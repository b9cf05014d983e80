"""Batches and lengths that fit a memory, as commands and passes take them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from command_line import runner
from event_lists import EventList
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_program
from tiny_models import save_tiny

from graphopt.cli.commands import app
from graphopt.errors import GraphoptError, PassError
from graphopt.execute import batch_sizes
from graphopt.execute.batch_sizes import SHARE, BatchSize, sized, walk_size
from graphopt.execute.what_fits import what_fits
from graphopt.memory.caching_allocator import OutOfMemory
from graphopt.memory.predict import Prediction, predict_peak
from graphopt.report.fits import FitEntry
from graphopt.training.memory import training_size, training_workload
from graphopt.training.record import TrainingRecord

TRACE = EventList().trace()


def needing(each: int, fixed: int = 0):
    """Return a prediction by which every window needs so many bytes."""

    def predict(windows: int, limit: int) -> Prediction:
        size = fixed + each * windows
        short = OutOfMemory(size, 0) if size > limit else None
        return Prediction(size, size, size, {}, {}, short, TRACE)

    return predict


@given(st.integers(1, 64), st.integers(1, 100), st.integers(0, 1000), st.integers(200, 10_000))
def test_the_usual_batch_or_the_largest_that_fits(usual, each, fixed, memory):
    most = (int(SHARE * memory) - fixed) // each
    if most < 1:
        with pytest.raises(PassError, match="One window of 7 tokens is predicted to need more"):
            sized(needing(each, fixed), usual, 7, memory, "Give more.")
        return
    size = sized(needing(each, fixed), usual, 7, memory, "Give more.")
    assert size.windows == min(most, usual) and size.tokens == 7 * size.windows
    assert size.bytes == fixed + each * size.windows
    assert ("would not fit" in size.describe("A batch")) == (most < usual)


def test_what_cannot_be_predicted_keeps_the_usual_batch_and_says_so():
    def refuses(windows: int, limit: int) -> Prediction:
        raise GraphoptError("experts are routed by values.")

    size = sized(refuses, 4, 16, 10**9, "")
    assert size.windows == 4
    assert "not predicted: experts are routed by values." in size.describe("A batch")
    part = dataclasses.replace(TRACE, complete=False, notes=["It failed."])
    failed = sized(
        lambda windows, limit: dataclasses.replace(needing(1)(windows, limit), trace=part),
        4, 16, 10**9, "",
    )  # fmt: skip
    assert "It failed." in failed.describe("A batch")


def test_on_a_cpu_nothing_is_sized():
    size = walk_size(tiny_program(), 16, 64, torch.device("cpu"), 10)
    assert size == BatchSize(4, 4, 16) and size.describe("A batch") == ""


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(batch_sizes, "memory_of", lambda device, given: given)
    monkeypatch.setattr("graphopt.training.memory.memory_of", lambda device, given: given)


@pytest.mark.slow
def test_a_walk_takes_as_many_windows_as_fit(on_a_gpu):
    program, cpu = tiny_program(), torch.device("cpu")
    roomy = walk_size(program, 256, 2**18, cpu, 10**12)
    assert roomy.windows == 1024
    tight = walk_size(program, 256, 2**18, cpu, int(roomy.bytes * 0.7))
    assert 0 < tight.windows < 1024 and tight.bytes <= SHARE * tight.memory
    again = walk_size(program, 256, 2**18, cpu, tight.memory)
    assert again == tight


def test_a_training_step_holds_weights_states_and_a_copy(on_a_gpu):
    program = tiny_program()
    size = training_size(program, 8, 32, torch.device("cpu"), 10**12, blocks=1, resident=0, kept=0)
    assert size.windows == 8
    more = training_size(
        program, 8, 32, torch.device("cpu"), 10**12, blocks=1, resident=2**26, kept=2**24
    )
    assert more.bytes >= size.bytes + 2**26 + 2**24
    whole = predict_peak(
        lambda device: training_workload(program, device, windows=2, seq=32, blocks=2)
    )
    assert whole.trace.complete, whole.trace.notes
    blocks = 4 * sum(
        program.weights[name].numel
        for call in program.calls
        if "layers" in call.path
        for name in set(call.weights.values())
        if not program.weights[name].constant
    )
    # Adam's two states; beside them the values twice over, and the best so far.
    assert whole.categories["optimizer"] == pytest.approx(2 * blocks, rel=0.01)
    every = 4 * sum(weight.numel for weight in program.used_weights())
    assert whole.categories["weight"] == pytest.approx(every + 2 * blocks, rel=0.01)


def test_a_record_says_what_is_taken_at_once():
    said = BatchSize(2, 4, 512, 24 * 10**9, 20 * 10**9).describe("A training step")
    assert said == (
        "A training step takes 2 windows of 512 tokens, which is predicted to need 20.0 GB of "
        "24.0 GB. 4 would not fit."
    )
    assert said in TrainingRecord(batches=[said]).card()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_inspect_and_a_dry_run_say_what_fits(tiny, monkeypatch):
    done = runner().invoke(app, ["inspect", str(tiny), "--memory", "40MB", "--seq", "64", "--json"])
    assert done.exit_code == 0, done.output
    sizes = json.loads(done.stdout)["fits"]["sizes"]
    assert [(s["phase"], s["size"]) for s in sizes] == [
        ("prefill", "batch"), ("prefill", "seq"), ("decode", "batch"), ("decode", "seq"),
        ("train", "batch"),
    ]  # fmt: skip
    prefill, _, decode, *_ = (size["value"] for size in sizes)
    assert 0 < prefill < decode
    asked = []

    def fits(program, memory, *, batch, seq, progress):
        asked.append((bool(program.states), memory, batch))
        return [FitEntry("prefill", "batch", 3, seq, 5)]

    monkeypatch.setattr("graphopt.compiler.what_fits", fits)
    done = runner().invoke(app, ["compile", str(tiny), "--dry-run", "--memory", "40MB"])
    assert done.exit_code == 0 and asked == [(True, 40_000_000, 1)]
    assert "prefill of 2,048 tokens: batch 3" in done.stdout and "40.0 MB of a GPU" in done.stdout
    refused = runner().invoke(app, ["inspect", str(tiny), "--memory", "plenty"])
    assert refused.exit_code == 2 and "--memory 'plenty' is no size" in refused.stderr


def test_a_memory_that_holds_no_step_says_that_none_fits():
    found = what_fits(tiny_program(), 2**21, batch=1, seq=16)
    assert all(entry.value == 0 and "none fits" in entry.describe() for entry in found)


def test_operators_that_need_values_leave_the_usual_batch(on_a_gpu):
    def refuses(windows: int, limit: int) -> Prediction:
        raise RuntimeError("Tensor on device meta is not on the expected device.\nand more")

    size = sized(refuses, 3, 16, 10**9, "")
    assert (
        size.windows == 3 and size.unknown == "Tensor on device meta is not on the expected device"
    )
