"""The tuner: losses, schedules, training to a target, going on, and what goes wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from carved import carved
from programs import tiny_program
from torch import Tensor, nn

from graphopt.errors import PassError
from graphopt.execute.block_runner import BlockRunner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.feed_forward import Split
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.report.record import Step
from graphopt.training import tuner as tuner_module
from graphopt.training.distillation_data import DistillationData, HiddenStateCache
from graphopt.training.losses import HiddenStateObjective, LogitObjective, batch_kl, relative_mse
from graphopt.training.parametrisations import FullParametrisation, LowRankParametrisation
from graphopt.training.record import TrainedPart, TrainingRecord
from graphopt.training.schedule import Schedule
from graphopt.training.step_memory import learn_from, make_states
from graphopt.training.tuner import Tuner
from graphopt.training.written_text import windows_to_write

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (130, 12), generator=torch.Generator().manual_seed(0))


def student_of(program, forms=None, first=0, stop=None):
    blocks = find_blocks(program)
    last = blocks[-1 if stop is None else stop - 1].position
    return BlockRunner(program, blocks[first].position, last + 1, forms or {}, CPU)


def whole(program):
    names = {n for b in find_blocks(program) for n in program.calls[b.position].weights.values()}
    return {
        name: FullParametrisation(program.weights[name].load())
        for name in sorted(names)
        if not program.weights[name].constant
    }


def disturbed(program, by=0.05):
    """Return the forms of a program's weights, moved off their values."""
    generator = torch.Generator().manual_seed(1)
    forms = whole(program)
    for form in forms.values():
        form.value.data += by * torch.randn(form.value.shape, generator=generator)
    return forms


def tuner_of(program, forms, schedule, objective=None, saved=None):
    lessons = DistillationData(IDS, HiddenStateCache(student_of(program), IDS), held_out=10)
    return Tuner(student_of(program, forms), lessons, objective or LogitObjective(), schedule,
                 saved=saved)  # fmt: skip


@pytest.mark.parametrize(("left", "seconds"), [(20.0, None), (23.9, None), (60.0, 15.0)])
def test_no_text_is_written_in_seconds_that_only_make_the_writer_ready(left, seconds, monkeypatch):
    monkeypatch.setattr("graphopt.training.written_text.free_bytes", lambda device: 2**20)
    schedule = Schedule(seconds=left)
    most, share = windows_to_write(tiny_program(), schedule, 64, 9, torch.device("cuda"), left)
    assert share == seconds and (most > 0) == (seconds is not None)


@pytest.mark.parametrize(
    ("steps", "given", "trained", "told"),
    [(0, 20.0, 20.0, "NO STEP was made in 5 seconds"), (9, 20.0, 19.91, "HARDLY ANY GAIN in 9"),
     (9, 20.0, None, "HARDLY ANY GAIN"), (9, 20.0, 19.8, None), (9, None, 30.0, None)],
)  # fmt: skip
def test_a_training_of_no_use_says_so(steps, given, trained, told):
    part = TrainedPart(
        part="all", steps=steps, seconds=4.0, tokens=99, preparing=0.0, losses=[], checks=[],
        lr_decays=[], stopped="", not_compiled="",
    )  # fmt: skip
    noted = [("the whole model", 10.0), ("carving", given), ("trained", trained)]
    record = TrainingRecord(
        training=[part], perplexity=[Step(after=what, value=value) for what, value in noted]
    )
    reason = record.shortcoming(5.0)
    assert (reason is None) if told is None else (reason is not None and told in reason)


# ---- losses ----


def test_batch_kl_cannot_see_what_all_sequences_share_and_the_squared_error_can():
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(4, 5, 6, generator=generator)
    shifted = stream + torch.randn(1, 5, 6, generator=generator)
    assert float(batch_kl(shifted, stream)) < 1e-5
    assert float(relative_mse(shifted, stream)) > 0.1
    assert float(batch_kl(stream + torch.randn(4, 5, 6, generator=generator), stream)) > 0.1


def test_batch_kl_needs_two_sequences():
    with pytest.raises(PassError, match="there is one"):
        batch_kl(torch.ones(1, 2, 3), torch.ones(1, 2, 3))


def test_batch_kl_is_the_divergence_over_the_batch():
    ours, theirs = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)).double()
    p, q = torch.softmax(theirs, 0), torch.softmax(ours, 0)
    expected = float((p * (p / q).log()).sum()) / 3
    assert float(batch_kl(ours, theirs)) == pytest.approx(expected, rel=1e-5)


def test_tokens_of_huge_norm_do_not_decide_the_relative_error():
    theirs = torch.ones(1, 2, 4)
    theirs[0, 1] *= 1e4
    ours = theirs.clone()
    ours[0, 0] += 1.0  # an error as large as its target
    assert float(relative_mse(ours, theirs)) == pytest.approx(0.5)


def logits_of(program, stream: Tensor) -> Tensor:
    student = student_of(program)
    values = student.window_inputs(IDS[:3])
    values[student.exit] = stream
    student.run_range(values, student.stop, len(program.calls))
    return values[program.outputs[0]]


def test_the_logit_objective_is_the_divergence_and_so_is_its_gradient():
    program = tiny_program(layers=2)
    student = student_of(program)
    stream = HiddenStateCache(student, IDS).rows([0, 1, 2])
    moved = (stream + 0.3).requires_grad_()
    values = {**student.window_inputs(IDS[:3]), student.exit: moved}
    loss = LogitObjective().measure(student, values, stream, learn=True)
    again = (stream + 0.3).requires_grad_()
    p = torch.log_softmax(logits_of(program, stream), -1)
    q = torch.log_softmax(logits_of(program, again), -1)
    expected = (p.exp() * (p - q)).sum() / IDS[:3].numel()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4) and float(loss) > 1e-3
    assert torch.allclose(moved.grad, again.grad, atol=1e-6)


# ---- schedules ----


def test_the_rate_rises_and_falls_over_whichever_of_steps_and_seconds_is_nearer_its_end():
    schedule = Schedule(steps=100, seconds=10.0)
    assert schedule.done(50, 0.0) == schedule.done(0, 5.0) == 0.5
    assert schedule.done(10, 9.0) == 0.9 and schedule.done(1000, 0.0) == 1.0
    rates = [schedule.factor(step / 100) for step in range(101)]
    assert rates[0] < 0.1 and max(rates) <= 1.0 and rates[100] == pytest.approx(0.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    with pytest.raises(ValueError, match="steps or seconds"):
        Schedule()


# ---- training ----


@pytest.mark.slow
def test_a_disturbed_student_finds_back_to_its_teacher():
    program = tiny_program(layers=3)
    forms = disturbed(program)
    tuned = tuner_of(program, forms, Schedule(steps=150, batch=16, rate=3e-3)).run()
    first, last = tuned.checks[0][1], min(loss for _, loss in tuned.checks)
    assert tuned.steps == 150 and tuned.tokens == 150 * 16 * 12
    assert last < 0.5 * first
    # The best state is the one that is left.
    student = student_of(program, forms)
    values = student.window_inputs(IDS[-10:])
    student.run_range(values, 0, student.stop)
    target = HiddenStateCache(student_of(program), IDS).rows(range(120, 130))
    with torch.no_grad():
        left = LogitObjective().measure(student, values, target, learn=False)
    assert float(left) == pytest.approx(last, rel=1e-4)


def test_two_runs_are_the_same_bit_for_bit_and_only_forms_change():
    program = tiny_program(layers=2)
    before = {weight.name: weight.load().clone() for weight in program.weights}
    results = []
    for _ in range(2):
        forms = disturbed(program)
        tuner_of(program, forms, Schedule(steps=7)).run()
        results.append({name: form().detach().clone() for name, form in forms.items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(torch.equal(before[w.name], w.load()) for w in program.weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "schedule", "at"),
    [(0.05, Schedule(steps=10), 6), (0.005, Schedule(steps=40, batch=16, rate=1e-2), 21)],
    ids=["plain", "behind a lowered rate"],
)
def test_an_interrupted_training_goes_on_where_it_was(tmp_path, by, schedule, at):
    program = tiny_program(layers=2)
    straight = disturbed(program, by)
    whole = tuner_of(program, straight, schedule).run()
    assert all(step < at for step, _ in whole.lr_decays[:1]) and bool(whole.lr_decays) == (at > 10)
    pieces = disturbed(program, by)
    tuner = tuner_of(program, pieces, schedule, saved=tmp_path / "state.pt")
    real, count = tuner._step, 0

    def stops(rate):
        nonlocal count
        count += 1
        if count == at:
            tuner._save()
            raise KeyboardInterrupt
        return real(rate)

    tuner._step = stops
    with pytest.raises(KeyboardInterrupt):
        tuner.run()
    again = disturbed(program, by)
    tuned = tuner_of(program, again, schedule, saved=tmp_path / "state.pt").run()
    assert tuned.steps == schedule.steps and tuned.lr_decays == whole.lr_decays
    for name, form in straight.items():
        assert torch.allclose(form(), again[name](), atol=1e-6)


@pytest.mark.slow
def test_a_rate_that_spoils_what_is_nearly_right_is_lowered_from_the_best_state():
    program = tiny_program(layers=2)
    schedule = Schedule(steps=120, batch=16, rate=1e-2)
    tuner = tuner_of(program, disturbed(program, by=0.005), schedule)
    real, rates = tuner._step, []

    def step(rate):
        rates.append(rate)
        return real(rate)

    tuner._step = step
    tuned = tuner.run()
    start = tuned.checks[0][1]
    assert tuned.lr_decays and min(loss for _, loss in tuned.checks) < start
    checks = dict(tuned.checks)
    for number, (at, rate) in enumerate(tuned.lr_decays, start=1):
        assert rate == pytest.approx(1e-2 * 0.25**number)
        assert rates[at] == pytest.approx(rate * schedule.factor(at / 120))
        assert checks[at] > min(loss for earlier, loss in tuned.checks if earlier < at)
    # A paper's own schedule is left alone.
    fixed = dataclasses.replace(schedule, reduce_on_plateau=False)
    assert tuner_of(program, disturbed(program, by=0.005), fixed).run().lr_decays == []
    # One that starts far off keeps its rate.
    far = tuner_of(program, disturbed(program), Schedule(steps=60, batch=16, rate=3e-3)).run()
    assert far.lr_decays == []


@pytest.mark.parametrize(
    ("held_out", "lowered"),
    [
        # A recipe's first steps may cost what the later ones make good: measured, with experts.
        ([0.245, 0.308, 0.258, 0.252, 0.24, 0.23, 0.22, 0.21, 0.21, 0.21, 0.21], False),
        ([1.0, 3.0, 2.99, 2.98, 2.97, 2.96, 2.95, 2.94, 2.93, 2.92, 2.91], True),
        ([1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0], True),
    ],
    ids=["falls in time", "falls too slowly", "rises"],
)
def test_a_rate_is_lowered_where_the_best_would_not_be_reached_again(
    held_out, lowered, monkeypatch
):
    from graphopt.training import tuner

    losses = iter(held_out)
    monkeypatch.setattr(tuner, "held_out_loss", lambda *_: next(losses, held_out[-1]))
    program = tiny_program(layers=2)
    tuned = tuner_of(program, disturbed(program), Schedule(steps=40, batch=2, rate=1e-4)).run()
    assert bool(tuned.lr_decays) == lowered


@pytest.mark.slow
def test_a_part_is_trained_on_the_stream_behind_it():
    program = tiny_program(layers=4)
    forms = {n: f for n, f in disturbed(program).items() if ".1." in n or ".2." in n}
    assert forms
    student = student_of(program, forms, 1, 3)
    lessons = DistillationData(
        IDS,
        HiddenStateCache(student_of(program, None, 0, 3), IDS),
        HiddenStateCache(student_of(program, None, 0, 1), IDS),
        held_out=10,
    )
    objective = HiddenStateObjective(relative_mse)
    tuned = Tuner(student, lessons, objective, Schedule(steps=100, batch=16, rate=3e-3)).run()
    assert min(loss for _, loss in tuned.checks) < 0.5 * tuned.checks[0][1]


def test_roundings_of_earlier_passes_let_gradients_through():
    """Values reach the stream through the rounding of what the output projection reads alone."""
    plain = tiny_program(layers=2)
    rounding = make_pass("quantize", {"w": 16, "a": 8, "method": "rtn"})
    found = []
    for program in (plain, rounding.run(plain.copy(), Context()).program):
        forms = {name: form for name, form in disturbed(program).items() if "v_proj" in name}
        tuner = tuner_of(program, forms, Schedule(steps=1))
        learn_from(tuner.student, LogitObjective(), tuner.data.batch(range(4), CPU))
        found.append(torch.cat([form.value.grad.flatten() for form in forms.values()]))
    # 8 bits move what the gradient is taken at by about 1 %.
    assert torch.cosine_similarity(*found, 0) > 0.9


def test_patience_ends_a_training_that_does_not_get_better():
    program = tiny_program(layers=2)
    tuned = tuner_of(program, whole(program), Schedule(steps=200, patience=2)).run()
    assert "no better held-out loss" in tuned.stopped and tuned.steps < 200


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_state():
    program = tiny_program(layers=2)
    forms = disturbed(program)
    start = {name: form().detach().clone() for name, form in forms.items()}
    tuner = tuner_of(program, forms, Schedule(steps=100, rate=1e30))
    tuned = tuner.run()
    assert "the loss became" in tuned.stopped and tuned.steps < 100
    assert not math.isfinite(tuned.losses[-1][1])
    assert all(torch.equal(start[name], form()) for name, form in forms.items())


def test_a_low_rank_form_starts_as_its_weight_and_moves_within_its_rank():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(12, 20, generator=generator)
    form = LowRankParametrisation(value, 3, generator)
    assert torch.equal(form(), value)
    form.up.data.normal_()
    sizes = torch.linalg.svdvals((form() - value).double())
    assert sizes[2] > 0.1 and sizes[3] < 1e-5  # what fp32 rounds


def test_streams_are_made_once():
    program = tiny_program(layers=2)
    student = student_of(program)
    streams = HiddenStateCache(student, IDS)
    first = streams.rows([3, 1])
    student.run_calls = None  # would fail if called again
    assert torch.equal(streams.rows([1, 3]), first.flip(0))


def test_streams_that_fit_nowhere_are_made_anew(monkeypatch):
    from graphopt.training import distillation_data

    program = tiny_program(layers=2)
    kept = HiddenStateCache(student_of(program), IDS).rows([3, 1])
    monkeypatch.setattr(distillation_data, "room_for", lambda *_: None)
    streams = HiddenStateCache(student_of(program), IDS)
    for _ in range(2):
        assert torch.equal(streams.rows([3, 1]), kept)
    assert not streams._known


def kinds_of_blocks():
    return carved(tiny_program(layers=3, ffn=56), Split(8, 4, 2), Split(24, 4, 2), None)


def test_blocks_are_of_as_many_kinds_as_have_to_be_compiled():
    assert len(student_of(tiny_program(layers=3)).kinds) == 1
    assert len(student_of(kinds_of_blocks()).kinds) == 3
    assert len(student_of(kinds_of_blocks(), first=1).kinds) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_many_kinds_of_blocks_are_not_compiled_for_a_short_training():
    program, gpu = kinds_of_blocks(), torch.device("cuda")
    blocks = find_blocks(program)
    first, last = blocks[0].position, blocks[-1].position + 1
    student = BlockRunner(program, first, last, whole(program), gpu)
    lessons = DistillationData(
        IDS, HiddenStateCache(BlockRunner(program, first, last, {}, gpu), IDS), held_out=10
    )
    # Enough for one kind, and not for three.
    tuned = Tuner(student, lessons, LogitObjective(), Schedule(steps=400)).run()
    assert "3 kinds of blocks" in tuned.not_compiled and not student.compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_compiled_step_learns_what_the_step_itself_learns(monkeypatch):
    from graphopt.training import tuner

    gpu = torch.device("cuda")
    found = []
    for least in ((math.inf, 10**9), (0.0, 0)):
        monkeypatch.setattr(tuner, "compile_from", lambda kinds, least=least: least)
        program = tiny_program(layers=3)
        blocks = find_blocks(program)
        first, last = blocks[0].position, blocks[-1].position + 1
        streams = HiddenStateCache(BlockRunner(program, first, last, {}, gpu), IDS)
        student = BlockRunner(program, first, last, disturbed(program), gpu)
        lessons = DistillationData(IDS, streams, held_out=10)
        tuned = Tuner(student, lessons, LogitObjective(), Schedule(steps=40, rate=1e-3)).run()
        assert tuned.not_compiled == "" and (tuned.preparing > 0) == student.compiled
        found.append([loss for _, loss in tuned.checks])
    # Products are in bf16, with 8 bits: the losses of two orders of operations agree to 2 %.
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1][-1] < 0.8 * found[1][0]


def test_memory_that_does_not_suffice_is_said_with_what_lowers_it():
    program = tiny_program(layers=2)
    tuner = tuner_of(program, whole(program), Schedule(steps=3))

    def full(rate):
        raise torch.cuda.OutOfMemoryError("out of memory")

    tuner._step = full
    with pytest.raises(PassError, match="does not fit the memory of cpu") as caught:
        tuner.run()
    assert "mode=local" in caught.value.remedy


class Slow(LogitObjective):
    """An objective whose every measurement takes a second of a clock that tests turn."""

    def __init__(self, clock):
        object.__setattr__(self, "clock", clock)

    def measure(self, *arguments, **options):
        self.clock[0] += 1.0
        return super().measure(*arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [8.0, 21.0, 60.0])
def test_seconds_are_those_of_checks_and_steps_together(monkeypatch, seconds):
    clock = [100.0]
    monkeypatch.setattr(tuner_module.time, "perf_counter", lambda: clock[0])
    program = tiny_program()
    schedule = Schedule(seconds=seconds, batch=4)
    tuned = tuner_of(program, disturbed(program), schedule, Slow(clock)).run()
    # A step takes one second and a check of ten windows in batches of four takes three.
    assert clock[0] - 100.0 == tuned.seconds
    assert seconds - 1.0 <= tuned.seconds <= seconds + 1.0 + 3.0 * (len(tuned.checks) > 2)
    assert tuned.steps > 0


@pytest.mark.slow
def test_checks_that_take_long_are_few(monkeypatch):
    """A check takes three seconds of sixty: there is room for one beside the first and the last."""
    clock = [100.0]
    monkeypatch.setattr(tuner_module.time, "perf_counter", lambda: clock[0])
    program = tiny_program()
    tuner = tuner_of(program, disturbed(program), Schedule(seconds=60.0, batch=4), Slow(clock))
    tuned = tuner.run()
    assert len(tuned.checks) == 3 and tuned.steps == pytest.approx(60.0 - 9.0, abs=2.0)
    # A schedule of steps has checks at the same steps wherever it runs.
    objectives = (Slow(clock), LogitObjective())
    found = [
        tuner_of(program, disturbed(program), Schedule(steps=20, batch=4), objective).run()
        for objective in objectives
    ]
    assert found[0].checks == found[1].checks and len(found[0].checks) > 9


# ---- memory ----


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("objective", [LogitObjective(), HiddenStateObjective(relative_mse)])
def test_gradients_of_pieces_are_those_of_the_whole_batch(at_once, objective):
    program = tiny_program(layers=2)
    teacher = HiddenStateCache(student_of(program), IDS)
    found = []
    for pieces, recomputes in ((None, False), (at_once, False), (at_once, True)):
        student = student_of(program, disturbed(program))
        student.recomputes = recomputes
        loss = learn_from(student, objective, (IDS[:4], teacher.rows(range(4)), None), pieces)
        found.append((float(loss), [p.grad for p in student.parameters]))
    (whole_loss, whole_gradients), *others = found
    for loss, gradients in others:
        # Sums of a few thousand fp32 numbers, in another order.
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        for got, wanted in zip(gradients, whole_gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max())


def test_a_loss_that_compares_windows_is_not_divided():
    program = tiny_program(layers=2)
    target = HiddenStateCache(student_of(program), IDS).rows(range(4))
    objective = HiddenStateObjective(batch_kl, additive=False)
    losses = [
        float(learn_from(student_of(program, disturbed(program)), objective,
                         (IDS[:4], target, None), at_once))
        for at_once in (None, 1)
    ]  # fmt: skip
    assert losses[0] == losses[1] > 0


@pytest.mark.slow
def test_a_step_that_runs_out_of_memory_goes_on_in_smaller_pieces():
    program = tiny_program(layers=2)
    tuners = [tuner_of(program, disturbed(program), Schedule(steps=6, batch=4)) for _ in range(2)]
    objective, room = tuners[1].objective, 3

    class Short(LogitObjective):
        """A device on which no more than some windows fit, and one only if it is run again."""

        def measure(self, student, values, target, learn, share=1.0):
            if (learn and len(target) > room) or (learn and not student.recomputes):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return objective.measure(student, values, target, learn, share)

    tuners[1].objective = Short()
    plain, short = (tuner.run() for tuner in tuners)
    assert plain.made_smaller == ""
    assert "runs 1 at once" in short.made_smaller and "again" in short.made_smaller
    assert [step for step, _ in short.checks] == [step for step, _ in plain.checks]
    assert short.checks[-1][1] == pytest.approx(plain.checks[-1][1], rel=1e-3)


def test_states_made_in_front_change_no_step():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    found = []
    for ahead in (False, True):
        value = nn.Parameter(torch.ones(3, 4))
        optimizer = torch.optim.AdamW([value], lr=torch.zeros(()), weight_decay=0.1)
        if ahead:
            make_states(optimizer, [value])
            assert torch.equal(value, torch.ones(3, 4)) and value.grad is None
        for gradient in gradients:
            optimizer.param_groups[0]["lr"].fill_(0.1)
            value.grad = gradient
            optimizer.step()
        found.append(value.detach())
    assert torch.equal(*found)
