"""Training weights between two places of a program."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import first_line
from graphopt.execute.block_runner import BlockRunner
from graphopt.ir.mixture import has_experts
from graphopt.storage.snapshot import resuming_from
from graphopt.support.boundary import out_of_memory
from graphopt.support.devices import must_fit
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import ALONE, here
from graphopt.training.distillation_data import DistillationData
from graphopt.training.gradients import SharedGradients, pass_gradients
from graphopt.training.held_out import held_out_loss
from graphopt.training.losses import Objective
from graphopt.training.schedule import Schedule, TrainingResult
from graphopt.training.step_memory import RecordedStep, learn_from, make_states

SAVE_EVERY = 30.0
"""Seconds between two saved states of a training."""


LOOK_EVERY = 20
"""Steps between two looks at the loss, which make a GPU wait."""


CHECK_EVERY = 0.1
"""The share of the schedule between two checks on held-out windows."""
CHECK_COST = 0.1
"""The share of a schedule's seconds that checks may take: they are fewer where one takes long."""


LR_PATIENCE = 3
"""Checks in a row, none of them the best so far, before a training goes back to its best state:
what starts near the dense model is spoilt by steps that suit what starts far from it. Where the
last of them fall so fast that they would be below the best long before the end, it goes on."""


LR_DECAY = 0.25
"""The factor by which the rate is multiplied there."""


WARM_UP = 3
"""Steps on a GPU before one is recorded: what is made at first use must not be in the record."""


def compile_from(kinds: int) -> tuple[float, int]:
    """Return the seconds and steps from which a training is worth the time to compile its step.

    A compiled step takes 0.8 of the time: on an H200 23 ms for 28 of SmolLM2, and 30 for 37 of
    Gemma 3, which has two kinds. Compiling takes 11 and 20 s in a process that had compiled
    nothing, and 5 and 7 s later.

    Args:
        kinds: Of blocks; those with experts count twice, as they take that long to compile.
    """
    return 20.0 + 40.0 * kinds, 1000 + 1000 * kinds


class Tuner:
    """A training of one student.

    Ranks share the windows of each step, where it has one for each, and add up their gradients:
    the steps are those of one process, but for the order in which fp32 numbers are added. Without a
    window for each, or with a loss that compares windows, every rank makes the whole step. The
    first rank's clock says when a training is over, and its numbers are what counts in the end.

    Args:
        student: Its parametrisations are trained in place. The roundings of its program, whichever
            pass put them there, have the gradient of the identity from here on.
        data: The windows, and what the student is to give for them.
        objective: The loss.
        schedule: How long and how fast to train.
        seed: The seed of the order of the windows.
        saved: File for the state of the training, so that an interrupted one goes on; read
            where it exists. None to keep none.
        progress: Called with `what`, and thousandths of the schedule.
    """

    def __init__(
        self,
        student: BlockRunner,
        data: DistillationData,
        objective: Objective,
        schedule: Schedule,
        *,
        seed: int = 0,
        saved: Path | None = None,
        progress: Progress = silent,
        what: str = "training",
    ) -> None:
        self.student, self.data, self.objective = student, data, objective
        pass_gradients(student.program)
        self.schedule, self.saved = schedule, saved
        self.progress, self.what = progress, what
        self.result = TrainingResult()
        self._order = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []
        self._best, self._best_state = math.inf, list[Tensor]()
        self._checked_at, self._worse = 0.0, 0
        self._check_seconds = 0.0
        self._rate = schedule.rate
        self._parameters = student.parameters
        whole = not objective.additive or schedule.batch < here().world
        self._ranks = ALONE if whole else here()
        self._own = self._ranks.share(schedule.batch)
        counted = [p for part in student.trained if part.counts for p in part.parameters()]
        self._gradients = None
        if self._ranks.world > 1:
            self._gradients = SharedGradients(
                self._parameters, counted, self._ranks, student.device
            )
        cuda = student.device.type == "cuda"
        by_rate: dict[float, list[nn.Parameter]] = {}
        for part in student.trained:
            for rate, parameters in part.rates():
                by_rate.setdefault(rate, []).extend(p for p in parameters if p.requires_grad)
        # On a GPU a rate is a tensor, which a recorded step reads anew.
        self._rates = {
            rate: torch.zeros((), device=student.device) if cuda else None for rate in by_rate
        }
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": self._rates[rate] if cuda else 1.0, "factor": rate}
             for rate, parameters in by_rate.items()],
            betas=schedule.betas, weight_decay=schedule.weight_decay,
            fused=True if cuda else None, capturable=cuda,
        )  # fmt: skip
        self._rated = [p for group in self._optimizer.param_groups for p in group["params"]]
        if cuda:
            make_states(self._optimizer, self._rated)
        self._memory = schedule.memory
        student.recomputes = self._memory.recomputes
        self._recorded: RecordedStep | None = None
        self._moving: RecordedStep | None = None
        # A record holds weights where they are: none can be brought to the device in it.
        self._recordable = cuda and student.keep_weights and self._memory.recorded
        self._recordable &= all(group.recordable for group in student.groups)
        self._eager = 0

    def run(self) -> TrainingResult:
        """Train to the end of the schedule, and leave the best state in the parametrisations.

        Raises:
            PassError: Memory does not suffice; the message says what lowers the need.
        """
        with must_fit(
            self.student.device, self.what,
            "Lower batch or seqlen, or take mode=local, which trains a few blocks at a time.",
        ):  # fmt: skip
            return self._run()

    def _run(self) -> TrainingResult:
        result, schedule = self._restore(), self.schedule
        if result.stopped:
            return result
        begun = self._clock() - result.seconds
        saved_at = result.seconds
        losses = _Mean(self.student.device)
        self.progress(self.what, 0, 1000)
        if not result.checks:
            self._check(0.0)
        result.preparing += self._prepare()
        result.seconds = self._clock() - begun
        while (done := self._done()) < 1 and not result.stopped:
            losses.add(self._step(self._rate * schedule.factor(done)))
            result.steps += 1
            result.tokens += schedule.batch * self.data.ids.shape[1]
            if losses.count >= LOOK_EVERY:
                loss = losses.take()
                result.losses.append((result.steps, loss))
                if not math.isfinite(loss):
                    result.stopped = f"the loss became {loss} before step {result.steps}"
                self.progress(self.what, int(done * 1000), 1000)
            if done - self._checked_at >= self._check_every() and not result.stopped:
                self._check(done)
                if schedule.patience and self._worse >= schedule.patience:
                    result.stopped = f"no better held-out loss in {self._worse} checks"
                elif schedule.reduce_on_plateau:
                    self._reduce_on_plateau()
            result.seconds = self._clock() - begun
            if self.saved is not None and here().first and result.seconds - saved_at >= SAVE_EVERY:
                saved_at = result.seconds
                self._save()
        if not result.stopped:
            self._check(1.0)
        self._go_back()
        here().take_from_first(self._parameters)
        result.seconds = self._clock() - begun
        self.progress(self.what, 1000, 1000)
        return result

    def _clock(self) -> float:
        """Return the time in seconds: the first rank's, where seconds end the training."""
        return time.perf_counter() if self.schedule.seconds is None else here().clock()

    def _done(self) -> float:
        """Return how far the training is; time that went into compiling has not moved it.

        The last check, and half of a step on average, come after the last question.
        """
        result, seconds = self.result, self.schedule.seconds
        if seconds is not None:
            seconds -= result.preparing + self._check_seconds
            if result.steps:
                seconds -= (result.seconds - result.preparing) / result.steps / 2
            seconds = max(seconds, 0.0)
        schedule = dataclasses.replace(self.schedule, seconds=seconds)
        return schedule.done(result.steps, result.seconds - result.preparing)

    def _check_every(self) -> float:
        """Return the share of the schedule between two checks."""
        seconds = self.schedule.seconds
        if not seconds:
            return CHECK_EVERY
        return max(CHECK_EVERY, self._check_seconds / seconds / CHECK_COST)

    def _prepare(self) -> float:
        """Compile the step, where that pays; return the seconds it took."""
        schedule, result = self.schedule, self.result
        if self.student.device.type != "cuda" or self.student.recomputes:
            return 0.0
        kinds = len(self.student.kinds)
        cost = sum(2 if has_experts(function) else 1 for function in self.student.kinds)
        seconds, steps = compile_from(cost)
        if (schedule.seconds is not None and schedule.seconds - result.seconds < seconds) or (
            schedule.steps is not None and schedule.steps - result.steps < steps
        ):
            if cost > 1:
                what = "blocks with experts take" if kinds == 1 else f"{kinds} kinds of blocks take"
                result.not_compiled = f"{what} longer to compile than it saves"
            return 0.0
        started = self._clock()
        self.progress("compiling the step", 0, 1)
        usable = len(self.data.ids) - self.data.held_out
        rows = [row % usable for row in range(schedule.batch)]
        batch = self.data.batch(rows, self.student.device, self._own)
        self.student.compiled = True
        try:
            learn_from(self.student, self.objective, batch, self._memory.at_once)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            # A compiler fails in its own ways, and the step works without it.
            self.student.compiled = False
            self.result.not_compiled = first_line(error)
        self._drop_gradients()
        self.progress("compiling the step", 1, 1)
        return self._clock() - started

    def _check(self, done: float) -> None:
        """Measure the held-out windows, and keep the state if it is the best so far."""
        started = self._clock()
        self._checked_at = done
        total = self._with_less_memory(
            lambda: held_out_loss(self.student, self.data, self.objective, self._at_once)
        )
        self.result.checks.append((self.result.steps, total))
        self._worse += 1
        if total < self._best:
            self._best, self._worse = total, 0
            self._best_state = [parameter.detach().clone() for parameter in self._parameters]
        self._check_seconds = self._clock() - started

    def _reduce_on_plateau(self) -> None:
        """Go on from the best state with a lower rate, where checks show no gain by this one."""
        if self._worse and self._worse % LR_PATIENCE == 0 and not self._recovers():
            self._go_back()
            self._rate *= LR_DECAY
            self.result.lr_decays.append((self.result.steps, self._rate))

    def _recovers(self) -> bool:
        """Return whether checks fall such that half of the steps left bring them below the best."""
        (first, before), (last, now) = self.result.checks[-LR_PATIENCE], self.result.checks[-1]
        left = last * (1 / self._checked_at - 1)
        return now - (before - now) / (last - first) * left / 2 < self._best

    def _go_back(self) -> None:
        for parameter, value in zip(self._parameters, self._best_state, strict=True):
            parameter.data.copy_(value)

    def _rows(self) -> list[int]:
        """Return the windows of the next step; every window comes once in an epoch."""
        usable = len(self.data.ids) - self.data.held_out
        while len(self._queue) < self.schedule.batch:
            self._queue += torch.randperm(usable, generator=self._order).tolist()
        rows, self._queue = self._queue[: self.schedule.batch], self._queue[self.schedule.batch :]
        return rows

    def _work(self, ids: Tensor, target: Tensor, entry: Tensor | None) -> Tensor:
        loss = self._learn(ids, target, entry)
        self._move()
        return loss

    def _learn(self, ids: Tensor, target: Tensor, entry: Tensor | None) -> Tensor:
        """Make the gradients of a batch; return its loss."""
        self._drop_gradients()
        batch = ids, target, entry
        return learn_from(self.student, self.objective, batch, self._memory.at_once)

    @property
    def _at_once(self) -> int:
        """Windows that are run at once."""
        return min(self._memory.at_once or self.schedule.batch, self.schedule.batch)

    def _with_less_memory(self, work: Callable[[], Any]) -> Any:
        """Return what work gives; where a GPU has no memory for it, it is done in smaller pieces.

        What it does before that must not count: it begins anew.
        """
        while True:
            try:
                return work()
            except Exception as error:
                less = self._memory.less(self._at_once, self.objective.additive)
                if less is None or out_of_memory(error) is None:
                    raise
            self._memory, self.result.made_smaller = less, less.describe()
            self.student.recomputes, self.student.compiled = less.recomputes, False
            self._recordable = False
            self._recorded = self._moving = None
            self._drop_gradients()
            gc.collect()
            torch.cuda.empty_cache()

    def _move(self) -> None:
        """Move the parameters by their gradients."""
        torch.nn.utils.clip_grad_norm_(self._rated, 1.0)
        self._optimizer.step()
        for part in self.student.trained:
            part.step()

    def _drop_gradients(self) -> None:
        if self._gradients is not None:
            self._gradients.clear()
            return
        for parameter in self._parameters:
            parameter.grad = None

    def _step(self, rate: float) -> Tensor:
        batch = self.data.batch(self._rows(), self.student.device, self._own)
        for group in self._optimizer.param_groups:
            tensor = self._rates[group["factor"]]
            if tensor is None:
                group["lr"] = rate * group["factor"]
            else:
                tensor.fill_(rate * group["factor"])
        loss = self._with_less_memory(lambda: self._gradients_of(batch))
        self._eager += 1
        if self._gradients is None:
            if not self._recorded:
                self._move()
            return loss
        loss = self._gradients.reduce(loss, len(self._own) / self.schedule.batch)
        if self._recorded:
            self._moving = self._moving or RecordedStep(self._move, ())
            self._moving.replay(())
        else:
            self._move()
        return loss

    def _gradients_of(self, batch: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """Make the gradients of a batch; return its loss.

        From the fourth step on a GPU does so by a record, which moves the parameters too, but for
        what ranks say to each other in between.
        """
        if not self._recordable or self._eager < WARM_UP:
            return self._learn(*batch)
        if self._recorded is None:
            self._drop_gradients()  # what they lie in has no room for the record
            alone = self._gradients is None
            self._recorded = RecordedStep(self._work if alone else self._learn, batch)
        loss: Tensor = self._recorded.replay(batch)
        return loss

    def _save(self) -> None:
        assert self.saved is not None
        self.saved.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.saved.with_suffix(".part")
        torch.save(
            {
                "parameters": [p.detach().cpu() for p in self._parameters],
                "optimizer": self._optimizer.state_dict(),
                "order": self._order.get_state(),
                "queue": self._queue,
                "best": (self._best, [value.cpu() for value in self._best_state]),
                "checks": (self._checked_at, self._worse),
                "rate": self._rate,
                "result": dataclasses.asdict(self.result),
            },
            fresh,
        )
        fresh.replace(self.saved)

    def _restore(self) -> TrainingResult:
        """Take up the saved state, if there is one; return the result so far."""
        if self.saved is None or not here().made_by_first(self.saved.is_file):
            return self.result
        with resuming_from(self.saved):
            state = torch.load(self.saved, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for parameter, value in zip(self._parameters, state["parameters"], strict=True):
                    parameter.copy_(value)
            self._optimizer.load_state_dict(state["optimizer"])
            for group in self._optimizer.param_groups:
                # Loading puts a copy in the group, and a rate is set through its own tensor.
                group["lr"] = self._rates[group["factor"]]
            self._order.set_state(state["order"])
            self._queue = state["queue"]
            self._best, kept = state["best"]
            self._best_state = [value.to(self.student.device) for value in kept]
            self._checked_at, self._worse = state["checks"]
            self._rate = state["rate"]
            self.result = TrainingResult(**state["result"])
        return self.result


class _Mean:
    """The mean of losses that are on a device, without waiting for each."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), device=device)
        self.count = 0

    def add(self, loss: Tensor) -> None:
        self._total += loss
        self.count += 1

    def take(self) -> float:
        mean = float(self._total) / self.count
        self._total.zero_()
        self.count = 0
        return mean
