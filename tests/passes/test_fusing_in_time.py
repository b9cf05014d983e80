"""How `fuse-blocks` divides its seconds, and what it leaves out, by a clock that tests turn."""

from __future__ import annotations

import time

import pytest
import torch
from programs import tiny_program
from tiny_models import save_tiny
from torch.utils.flop_counter import FlopCounterMode
from trained import book

import graphopt as go
from graphopt.calibration import vocabulary
from graphopt.execute.block_runner import BlockRunner
from graphopt.ir.blocks import find_blocks, remove_blocks
from graphopt.pass_manager.contract import Context, Earlier, make_pass
from graphopt.passes.fuse_blocks import fusion as fusion_module
from graphopt.passes.fuse_blocks.fusion import Fusion
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.report.record import Step
from graphopt.support.per_device import PerDevice
from graphopt.training import distil
from graphopt.training.losses import LogitObjective
from graphopt.training.schedule import Schedule, TrainingResult

LENGTH = 32
REMOVED = (2, 4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return go.capture(str(save_tiny(tmp_path_factory.mktemp("untrained"), num_hidden_layers=6)))


def fusion_of(dense, perplexity=(), seqlen=LENGTH, **options):
    """Return a run of the pass behind one that removed two blocks and told perplexities."""
    pruned = dense.copy()
    remove_blocks(pruned, REMOVED)
    context = Context(book()[:6000])
    context.dense = dense
    record = PrunedBlocks(
        order=[str(block) for block in REMOVED],
        removed=[f"model.layers.{block}" for block in REMOVED],
        perplexity=[Step(after=f"step {n}", value=value) for n, value in enumerate(perplexity)],
    )
    earlier = make_pass("prune-blocks", {"remove": list(REMOVED), "seqlen": seqlen})
    context.earlier.append(Earlier(earlier, record))
    return Fusion(make_pass("fuse-blocks", {"seqlen": LENGTH, **options}), pruned, context)


def weights_of(program):
    return {weight.name: weight.load() for weight in program.used_weights()}


def test_what_is_prepared_for_a_training_is_taken_from_its_seconds(dense, monkeypatch):
    fusion = fusion_of(dense, seconds=60)
    clock, schedules = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def narrowed(program):
        clock[0] += 7.0
        return program

    class Tuner:
        def __init__(self, student, data, objective, schedule, **_):
            schedules.append(schedule)

        def run(self):
            return TrainingResult()

    monkeypatch.setattr(fusion, "narrowed", narrowed)
    monkeypatch.setattr(distil, "Tuner", Tuner)
    fusion.tune(
        fusion.program, {}, find_blocks(fusion.program)[0].position, 2, fusion.logit_data(),
        LogitObjective(), Schedule(seconds=20.0), "training",
    )  # fmt: skip
    assert [schedule.seconds for schedule in schedules] == [13.0]


@pytest.mark.parametrize("speed", [20.0, 100.0, 2000.0])
def test_the_closed_form_has_half_of_the_seconds_and_as_many_tokens_as_they_allow(
    dense, monkeypatch, speed
):
    """The dense model takes in `speed` tokens a second; 40 seconds are left.

    Where they allow more than is of use to the widest projection, it has no more.
    """
    fusion = fusion_of(dense, seconds=60)
    fusion.started = 0.0
    clock, given = [20.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    data = fusion.logit_data(1)
    real = data.targets.rows

    def rows(wanted):
        clock[0] += len(wanted) * LENGTH / speed
        return real(wanted)

    def reconstruct(program, dense, windows, *, cuts_only, until, **_):
        given.append((len(windows), cuts_only, until))
        return [], []

    monkeypatch.setattr(data.targets, "rows", rows)
    monkeypatch.setattr(fusion_module, "reconstruct_behind_cuts", reconstruct)
    monkeypatch.setattr(fusion_module, "WARM_LEAST", 1)
    fusion.record.perplexity.append(Step(after="plain removal", value=100.0))
    fusion._warm_start(data)
    widest = max(
        weight.shape[1] for weight in dense.used_weights()
        if len(weight.shape) == 2 and ".layers." in weight.name
    )  # fmt: skip
    tokens = min(20.0 * speed / fusion_module.WARM_RUNS, 8 * widest)
    count = min(int(tokens) // LENGTH, len(fusion.windows))
    assert given == [(count, True, 20.0 + 20.0)]


def test_a_closed_form_that_is_worse_on_other_text_is_left_out_and_named(dense, monkeypatch):
    fusion = fusion_of(dense, perplexity=(10.0, 20.0), steps=0)
    plain = weights_of(fusion.program)
    fusion._note_removal()
    monkeypatch.setattr(fusion, "perplexity", lambda program: 20.5)
    fusion._warm_start(fusion.logit_data())
    assert all(torch.equal(plain[n], value) for n, value in weights_of(fusion.program).items())
    assert [
        (skip.where, "20.5 with it and 20 without" in skip.reason) for skip in fusion.skipped
    ] == [("warm start", True)]
    assert fusion.record.reconstructions and not fusion.changed
    # One that is better is kept.
    monkeypatch.setattr(fusion, "perplexity", lambda program: 19.5)
    fusion._warm_start(fusion.logit_data())
    assert fusion.changed and len(fusion.skipped) == 1


def test_perplexities_that_the_removal_measured_on_the_same_windows_are_told_again(
    dense, monkeypatch
):
    told = fusion_of(dense, perplexity=(10.0, 15.0, 20.0), steps=0)
    monkeypatch.setattr(told, "perplexity", lambda program: pytest.fail("measured again"))
    told._note_removal()
    assert [(step.after, step.value) for step in told.record.perplexity] == [
        ("the whole model", 10.0), ("plain removal", 20.0)
    ]  # fmt: skip
    # On others they are measured.
    other = fusion_of(dense, perplexity=(10.0, 20.0), seqlen=2 * LENGTH, steps=0)
    other._note_removal()
    values = [step.value for step in other.record.perplexity]
    assert values == [other.perplexity(other.dense), other.perplexity(other.program)]


def test_no_step_is_said_loudly_and_changes_nothing(dense):
    fusion = fusion_of(dense, seconds=0.0, warm_start=False)
    result = fusion.run()
    assert result.changed == 0
    assert any("NO STEP was made in 0 seconds" in skip.reason for skip in result.skipped)


def test_a_training_from_the_cut_on_leaves_what_is_in_front_and_sees_the_same_stream(dense):
    fusion = fusion_of(dense, steps=2, warm_start=False)
    before = weights_of(fusion.program)
    fusion.run()
    changed = {
        name for name, value in weights_of(fusion.program).items()
        if not torch.equal(value, before[name])
    }  # fmt: skip
    assert {name.split(".")[2] for name in changed} == {"1", "3", "5"}


def test_a_step_costs_no_more_multiplications_for_a_larger_vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "KEPT", PerDevice(cpu=16, gpu=16))
    ids = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(0))

    def flops(vocab):
        program = tiny_program(vocab=vocab)
        tokens = vocabulary.tokens_to_compare(program, ids, CPU, torch.float32)
        program = vocabulary.narrow_head(program, tokens)
        blocks = find_blocks(program)
        student = BlockRunner(program, blocks[0].position, blocks[-1].position + 1, {}, CPU)
        values = student.window_inputs(ids)
        with FlopCounterMode(display=False) as counter:
            student.run_range(values, 0, student.stop)
            stream = values[student.exit].detach()
            values[student.exit] = stream.clone().requires_grad_()
            LogitObjective().measure(student, values, stream, learn=True)
        return counter.get_total_flops()

    assert flops(97) == flops(970) > 0


def test_the_published_loss_has_the_two_sequences_that_it_compares(dense):
    assert fusion_of(dense, steps=1).schedule.batch == 1
    assert fusion_of(dense, steps=1, mode="published").schedule.batch == 2
    assert fusion_of(dense, steps=1, mode="published", batch=3).schedule.batch == 3
