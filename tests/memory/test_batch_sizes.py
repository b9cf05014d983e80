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
from graphopt.ir.graph import Program
from graphopt.memory.caching_allocator import CachingAllocator, OutOfMemory
from graphopt.memory.predict import Prediction, predict_peak
from graphopt.report.fits import FitEntry
from graphopt.training.memory import step_size, training_workload
from graphopt.training.record import TrainingRecord
from graphopt.training.step_memory import StepMemory

TRACE = EventList().trace()


def needing(each: int, fixed: int = 0):
    """Return a prediction by which every window needs so many bytes."""

    def predict(windows: int, length: int, limit: int) -> Prediction:
        size = fixed + each * windows
        short = OutOfMemory(size, 0) if size > limit else None
        return Prediction(size, size, size, {}, {}, short, TRACE)

    return predict


@given(st.integers(1, 64), st.integers(1, 100), st.integers(0, 1000), st.integers(200, 10_000))
def test_the_usual_batch_or_the_largest_that_fits(usual, each, fixed, memory):
    most = (int(SHARE * memory) - fixed) // each
    if most < 1:
        with pytest.raises(PassError, match="One window of 7 tokens is predicted to need"):
            sized(needing(each, fixed), usual, 7, memory, "Give more.")
        return
    size = sized(needing(each, fixed), usual, 7, memory, "Give more.")
    assert size.windows == min(most, usual) and size.tokens == 7 * size.windows
    assert size.bytes == fixed + each * size.windows
    assert ("would not fit" in size.describe("A batch")) == (most < usual)


@pytest.mark.parametrize(("memory", "length"), [(3_000, 256), (500, 32), (250, None)])
def test_where_no_window_fits_a_shorter_one_is_named(memory, length):
    def predict(windows: int, length: int, limit: int) -> Prediction:
        return needing(10 * length, fixed=100)(windows, length, limit)

    with pytest.raises(PassError, match=r"One window of 512 tokens .* 5\.2 kB") as refused:
        sized(predict, 2, 512, memory, "Give more.")
    told = "seqlen" if length is None else f"One of {length} fits (seqlen={length})."
    assert (told in str(refused.value)) == (length is not None)


def test_what_cannot_be_predicted_keeps_the_usual_batch_and_says_so():
    def refuses(windows: int, length: int, limit: int) -> Prediction:
        raise GraphoptError("experts are routed by values.")

    size = sized(refuses, 4, 16, 10**9, "")
    assert size.windows == 4
    assert "not predicted: experts are routed by values." in size.describe("A batch")
    part = dataclasses.replace(TRACE, complete=False, notes=["It failed."])
    failed = sized(
        lambda *asked: dataclasses.replace(needing(1)(*asked), trace=part),
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


def step_of(program, memory, **options):
    return step_size(
        program, 4, 32, torch.device("cpu"), memory, **{
            "blocks": 2, "by_logits": True, "resident": 0, "kept": 0, **options,
        },
    )  # fmt: skip


def test_a_training_step_holds_weights_states_and_a_copy(on_a_gpu):
    program = tiny_program()
    size = step_of(program, 10**12)
    assert (size.windows, size.memory) == (4, StepMemory())
    more = step_of(program, 10**12, resident=2**26, kept=2**24)
    assert more.fit.bytes >= size.fit.bytes + 2**26 + 2**24
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


def larger() -> Program:
    """A program whose activations count beside the workspaces of libraries."""
    return tiny_program(layers=6, hidden=256, heads=8, head_dim=32, ffn=1024, vocab=4000)


@pytest.mark.slow
def test_a_step_is_made_smaller_until_it_fits(on_a_gpu):
    program, asked = larger(), {"blocks": 6}

    def needs(memory: StepMemory, windows: int = 4) -> int:
        return predict_peak(
            lambda device: training_workload(
                program, device, windows=windows, seq=512, memory=memory, **asked
            ),
            recorded=0 if memory.recorded else None,
        ).reserved

    forms = [
        StepMemory(), StepMemory(at_once=2), StepMemory(at_once=1),
        StepMemory(at_once=1, recomputes=True),
        StepMemory(at_once=1, recomputes=True, recorded=False),
    ]  # fmt: skip
    sizes = [needs(form) for form in forms]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    for form, bytes_needed in zip(forms[1:3], sizes[1:3], strict=True):
        found = step_size(
            program, 4, 512, torch.device("cpu"), int(bytes_needed / SHARE) + 2**22,
            by_logits=True, resident=0, kept=0, **asked,
        )  # fmt: skip
        assert (found.windows, found.memory) == (4, form)
        assert "To fit, it runs" in found.describe("A step")
    found = step_size(
        program, 4, 512, torch.device("cpu"), int(sizes[1] / SHARE),
        by_logits=True, resident=0, kept=0, divisible=False, **asked,
    )  # fmt: skip
    assert 0 < found.windows < 4 and found.memory == StepMemory()
    with pytest.raises(PassError, match="One window of 512 tokens is predicted to need"):
        step_size(
            program, 4, 512, torch.device("cpu"), int(sizes[-1] * 0.8 / SHARE),
            by_logits=True, resident=0, kept=0, **asked,
        )  # fmt: skip


def test_a_record_has_segments_of_its_own_and_gives_none_back():
    allocator = CachingAllocator(limit=100 * 2**20)
    block = allocator.malloc(40 * 2**20)
    allocator.free(block)
    allocator.begin_recording()
    assert allocator.reserved == 0  # what is free goes back first
    inside = allocator.malloc(40 * 2**20)
    allocator.free(inside)
    assert allocator.malloc(40 * 2**20) is inside
    allocator.free(inside)
    with pytest.raises(OutOfMemory):
        allocator.malloc(80 * 2**20)
    allocator.end_recording()
    other = allocator.malloc(40 * 2**20)
    assert other is not inside and allocator.reserved == 80 * 2**20
    allocator.free(other)
    allocator.release_cached()
    assert allocator.reserved == 40 * 2**20


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
    def refuses(windows: int, length: int, limit: int) -> Prediction:
        raise RuntimeError("Tensor on device meta is not on the expected device.\nand more")

    size = sized(refuses, 3, 16, 10**9, "")
    assert (
        size.windows == 3 and size.unknown == "Tensor on device meta is not on the expected device"
    )
