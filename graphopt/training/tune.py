"""Distillation: weights of a program are trained to give what another program gives.

A pass hands over which weights change and in what form (`Form`): whole, by a low-rank term, or
by a term of its own. The tuner trains them between two places of the program, with the residual
stream or the logits of the dense model as the target, and folds the result into weights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import PassError, reason
from graphopt.execute.compiled import kind, run_compiled
from graphopt.execute.interpreter import Runner, complete_inputs, run_function
from graphopt.ir.blocks import find_blocks
from graphopt.ir.dataflow import mask_is_for_attention_alone
from graphopt.ir.graph import Call, Program, Value
from graphopt.ir.types import B, P, S
from graphopt.storage.snapshot import taking_up
from graphopt.support.devices import free_bytes, must_fit
from graphopt.support.progress import Progress, silent

TOKENS_OF_LOGITS = 2048
"""Tokens whose logits are in memory at once."""

TOKENS_AHEAD = 32768
"""Tokens over which a GPU runs the dense model at once: with fewer it waits for launches."""

SAVE_EVERY = 30.0
"""Seconds between two saved states of a training."""

LOOK_EVERY = 20
"""Steps between two looks at the loss, which make a GPU wait."""

CHECK_EVERY = 0.1
"""Of the schedule, between two checks on held-out windows."""

FRUITLESS = 3
"""Checks in a row, none of them the best so far, before a training goes back to its best state:
what starts near the dense model is spoilt by steps that suit what starts far from it."""

LOWERED = 0.25
"""Of the rate, with which it goes on from there."""

WARM_UP = 3
"""Steps on a GPU before one is recorded: what is made at first use must not be in the record."""

COMPILE_FROM = (30.0, 300)
"""Seconds and steps from which a training on a GPU is worth the time to compile its step, for every
kind of block in it."""


FOLLOWED = 0.1
"""Of its gradient that a bias of thresholds takes in a step: a batch's is noisy."""


class Form(nn.Module, ABC):
    """A weight while it is trained."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the weight's value in fp32, differentiable in the form's parameters."""

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return the parameters, with what the schedule's learning rate is times for each."""
        return [(1.0, list(self.parameters()))]

    def step(self) -> None:
        """Move parameters that have no rate, by their gradients; called once a training step."""


class Whole(Form):
    """Every element of the weight is trained.

    Args:
        rate: What the schedule's learning rate is times.
    """

    def __init__(self, value: Tensor, rate: float = 1.0) -> None:
        super().__init__()
        self.value, self.rate = nn.Parameter(value.clone()), rate

    def forward(self) -> Tensor:
        return self.value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(self.rate, [self.value])]


class LowRank(Form):
    """W + B A, B [out, rank] from 0 and A [rank, in] (Hu et al., arXiv 2106.09685, section 4)."""

    def __init__(self, value: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, width = value.shape
        self.base = nn.Buffer(value)
        self.down = nn.Parameter(kaiming((rank, width), generator).to(value.device))
        self.up = nn.Parameter(value.new_zeros(out, rank))

    def forward(self) -> Tensor:
        return self.base + self.up @ self.down


class Balance(Form):
    """The bias by which a choice of experts is balanced: it moves by `gamma` against its gradient.

    Only the gradient's sign counts. `top_gates` makes it the excess of every expert's load
    (`graphopt.ir.ops.experts.TopGates`), so that an expert of more than the mean load is chosen
    less often from then on. Source: CMoE, arXiv 2502.04416, section 4.4.

    With `gamma=None`, for thresholds, it follows its gradient, of which a step takes a part.
    """

    def __init__(self, value: Tensor, gamma: float | None) -> None:
        super().__init__()
        self.value, self.gamma = nn.Parameter(value.clone()), gamma

    def forward(self) -> Tensor:
        return self.value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return []

    def step(self) -> None:
        gradient = self.value.grad
        if gradient is not None:
            by = FOLLOWED * gradient if self.gamma is None else self.gamma * gradient.sign()
            self.value.data.sub_(by)


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix uniform in +-1/sqrt(columns): He et al.'s for a slope of sqrt(5)."""
    bound = 1 / math.sqrt(shape[1])
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Most steps; None for as many as the seconds allow.
        seconds: Most seconds; None for as many as the steps take.
        rate: Highest learning rate. It falls to 0 by a cosine, over whichever of steps and
            seconds is nearer its end.
        warm_up: Of the schedule, in which the rate rises from 0.
        batch: Windows of a step.
        betas: Of Adam.
        patience: Stop after this many checks without a better held-out loss; 0 never stops.
        lowers: Whether a rate that gets no further is lowered, from the best state on.
    """

    steps: int | None = None
    seconds: float | None = None
    rate: float = 5e-4
    warm_up: float = 0.02
    batch: int = 4
    betas: tuple[float, float] = (0.9, 0.95)
    patience: int = 0
    lowers: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("a schedule needs steps or seconds")

    def done(self, step: int, elapsed: float) -> float:
        """Return how far a training is, from 0 to 1."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(step / self.steps if self.steps else 1.0)
        if self.seconds is not None:
            parts.append(elapsed / self.seconds if self.seconds else 1.0)
        return min(max(parts), 1.0)

    def factor(self, done: float) -> float:
        """Return what the learning rate is times."""
        rise = 1.0 if done >= self.warm_up else (done + 1e-3) / (self.warm_up + 1e-3)
        return rise * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Tuned:
    """What a training did.

    Attributes:
        steps, seconds, tokens: Of all its pieces together.
        preparing: Of the seconds, those that compiling the step took.
        losses: (step, mean training loss since the entry before) pairs.
        checks: (step, loss on held-out windows) pairs, the first before any step.
        lowered: (step, highest rate from there on) pairs, where the one before got no further.
        stopped: Why it ended before its schedule did, or "".
        not_compiled: Why its step was not compiled though it would have been worth it, or "".
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    preparing: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    lowered: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    not_compiled: str = ""


def relative_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of every token, in units of its target's square, averaged over tokens.

    Without the division a few tokens of huge norm, which most models have, decide the loss.
    """
    ours, theirs = ours.float(), theirs.float()
    error = (ours - theirs).square().sum(-1)
    return (error / theirs.square().sum(-1).clamp(min=1e-12)).mean()


def batch_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(softmax(theirs) || softmax(ours)) over the batch, summed and divided by it.

    Source: FuseGPT, arXiv 2411.14507, equations 5 and 6. Each (token, feature) is a distribution
    over the sequences of the batch, so that an error which all sequences share costs nothing.

    Raises:
        PassError: The batch has one sequence: the loss would be 0 whatever the student gives.
    """
    if ours.shape[0] < 2:
        raise PassError(
            "The loss batch_kl compares the sequences of a batch, and there is one.",
            "Give batch=2 or more, or another loss.",
        )
    p = torch.log_softmax(theirs.float(), 0)
    q = torch.log_softmax(ours.float(), 0)
    return (p.exp() * (p - q)).sum() / ours.shape[0]


class Student:
    """A part of a program, run differentiably with some of its weights in trained forms.

    Args:
        program: The model.
        first, stop: The blocks that are run, as positions of calls, from `first` to before
            `stop`. Calls in front of the first block of the program are run without gradient.
        forms: What is trained, by weight name.
        device: Where to compute. On CUDA products are in bf16 where it has it, weights in fp32.
        keep_weights: Hold every weight after its first use, instead of reading it again.
    """

    def __init__(
        self,
        program: Program,
        first: int,
        stop: int,
        forms: Mapping[str, Form],
        device: torch.device,
        *,
        keep_weights: bool = True,
    ) -> None:
        self.program, self.device = program, device
        self.first, self.stop = first, stop
        blocks = find_blocks(program)
        self.embedding = blocks[0].position
        self._stream = {block.position: block.stream for block in blocks}
        self.entry = self.stream_into(first)
        self.forms = {name: form.to(device) for name, form in forms.items()}
        self._runner = Runner(program, torch.float32, device, keep_weights)
        self._half = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        self._unmasked = mask_is_for_attention_alone(program)
        self._inputs = {"input_ids", *program.inputs}
        self._last_use = {
            name: position for position, call in enumerate(program.calls) for name in call.args
        }
        self.compiled = False
        """Whether blocks that take a gradient are run by compiled functions."""

    @property
    def kinds(self) -> int:
        """How many different functions its blocks are, each of which is compiled."""
        return len(
            {
                kind(
                    self.program.functions[call.function],
                    call,
                    [self.program.weights[name] for name in call.weights.values()],
                )
                for at in self._stream
                if self.first <= at < self.stop
                for call in [self.program.calls[at]]
            }
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [p for form in self.forms.values() for p in form.parameters() if p.requires_grad]

    def stream_into(self, position: int) -> str:
        """Return the program value that is the stream in front of the block at a position."""
        return self.program.calls[position].args[self._stream[position]]

    @property
    def kept_dtype(self) -> torch.dtype:
        """What its streams are kept in."""
        return torch.bfloat16 if self._half else torch.float32

    @property
    def exit(self) -> str:
        """The program value that the last call makes."""
        return self.program.calls[self.stop - 1].results[0]

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return the program's inputs for windows of token ids [B, S] without padding."""
        values: dict[str, Any] = dict(complete_inputs({"input_ids": ids}))
        if self._unmasked:
            # Nothing is padded, and attention without a mask is several times faster.
            values["attention_mask"] = None
        return values

    def run(
        self,
        values: dict[str, Any],
        first: int,
        stop: int,
        watch: Callable[[Value, Tensor], None] | None = None,
    ) -> None:
        """Run calls; what they make is added to `values`.

        Without gradients, what no later call reads is taken out again.

        Args:
            watch: Called with every value inside a call as it is made.
        """
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._half, cache_enabled=False
        ):
            for position, call in enumerate(self.program.calls[first:stop], first):
                compiled = self.compiled and position in self._stream and watch is None
                results = self._call(call, values, watch, compiled)
                values.update(zip(call.results, results, strict=True))
                if not torch.is_grad_enabled():
                    for name in call.args:
                        if self._last_use[name] == position and name not in self._inputs:
                            values.pop(name, None)

    def _call(
        self,
        call: Call,
        values: Mapping[str, Any],
        watch: Callable[[Value, Tensor], None] | None,
        compiled: bool,
    ) -> list[Tensor]:
        batch, length = values["input_ids"].shape
        function = self.program.functions[call.function]
        with torch.autocast(self.device.type, enabled=False):
            weights = {
                slot: self.forms[name]() if name in self.forms else self._runner.weight(name)
                for slot, name in call.weights.items()
            }
        past = self._runner.empty_cache(batch) if function.caches else {}
        sizes = {B: batch, S: length, P: 0}
        args = [values[name] for name in call.args]
        if compiled and torch.is_grad_enabled() and not past:
            return run_compiled(function, call, args, weights, sizes)
        return run_function(function, call, args, weights, sizes, past, watch=watch)[0]


class Objective(ABC):
    """What a student is held to."""

    @abstractmethod
    def measure(
        self, student: Student, values: dict[str, Any], target: Tensor, learn: bool
    ) -> Tensor:
        """Return the loss of a batch, in fp32 without gradient.

        Args:
            values: What `Student.run` left.
            target: [B, S, D], what the dense model has in the place of the student's exit.
            learn: Also add to the gradients of the student's parameters.
        """


@dataclass(frozen=True)
class StreamObjective(Objective):
    """The stream itself, by `relative_mse`, `batch_kl` or another loss of two streams."""

    loss: Callable[[Tensor, Tensor], Tensor]

    def measure(
        self, student: Student, values: dict[str, Any], target: Tensor, learn: bool
    ) -> Tensor:
        loss = self.loss(values[student.exit], target)
        if learn:
            loss.backward()
        return loss.detach()


class LogitObjective(Objective):
    """KL(dense || student) of the next token's distribution, averaged over tokens.

    Both models share the calls behind the student's exit, so the dense model's stream there
    stands for its logits, and only a few thousand tokens' logits are in memory at a time.
    Source: Hinton et al., arXiv 1503.02531, section 2, at temperature 1.
    """

    def measure(
        self, student: Student, values: dict[str, Any], target: Tensor, learn: bool
    ) -> Tensor:
        stream = values[student.exit]
        batch, length, _ = stream.shape
        rows = max(1, TOKENS_OF_LOGITS // length)
        total = stream.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        for start in range(0, batch, rows):
            part = stream[start : start + rows].detach().requires_grad_(learn)
            logits = self._logits(student, values, part, start, rows)
            with torch.no_grad():
                theirs = self._logits(student, values, target[start : start + rows], start, rows)
                compare = _compiled_divergence() if student.compiled else _divergence
                loss, gradient = compare(logits.detach(), theirs, batch * length)
                total += loss
            if learn:
                logits.backward(gradient)
                assert part.grad is not None
                gradients.append(part.grad)
        if learn:
            stream.backward(torch.cat(gradients).to(stream.dtype))
        return total

    @staticmethod
    def _logits(
        student: Student, values: Mapping[str, Any], stream: Tensor, start: int, rows: int
    ) -> Tensor:
        count = len(values["input_ids"])
        part = {
            name: value[start : start + rows]
            if isinstance(value, Tensor) and value.dim() and len(value) == count
            else value
            for name, value in values.items()
        }
        part[student.exit] = stream
        student.run(part, student.stop, len(student.program.calls))
        logits: Tensor = part[student.program.outputs[0]]
        return logits


def _divergence(ours: Tensor, theirs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return KL(theirs || ours) of logits [.., V], summed over `count`, and its gradient in ours.

    The gradient is the difference of the odds.
    """
    wanted = torch.log_softmax(theirs.float(), -1)
    found = torch.log_softmax(ours.float(), -1)
    p = wanted.exp()
    loss = (p * wanted.sub_(found)).sum() / count
    return loss, found.exp_().sub_(p).div_(count).to(ours.dtype)


@functools.cache
def _compiled_divergence() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    return torch.compile(_divergence, dynamic=False)


class Streams:
    """The stream at one place of a model on windows of text, made when first asked for and kept.

    Kept in bf16 where the model computes in it. On the device, as long as that takes no more
    than half of what is free there, and else in half of what is free in the host's memory; what
    fits neither is made anew each time.

    Args:
        student: The model; its calls are run from the start to its last one.
        ids: int64 [N, S].
    """

    def __init__(self, student: Student, ids: Tensor) -> None:
        self._student, self._ids = student, ids
        self._known: dict[int, Tensor] = {}
        self._place: torch.device | None = None
        self._begun = False

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Return the streams of some windows, [len(rows), S, D] on the model's device."""
        missing = [row for row in rows if row not in self._known]
        if missing:
            if self._place is not None and self._student.device.type == "cuda":
                others = (row for row in range(len(self._ids)) if row not in self._known)
                ahead = itertools.islice(others, TOKENS_AHEAD // self._ids.shape[1])
                missing = list(dict.fromkeys([*missing, *ahead]))
            made = self._make(missing)
            if not self._begun:
                self._begun, self._place = True, self._roomy(made[0].nbytes * len(self._ids))
            if self._place is None:
                return made
            self._known |= dict(zip(missing, made.to(self._place).unbind(), strict=True))
        return torch.stack([self._known[row] for row in rows]).to(self._student.device)

    def _make(self, rows: Sequence[int]) -> Tensor:
        student = self._student
        values = student.inputs(self._ids[torch.tensor(rows)].to(student.device))
        with torch.no_grad():
            student.run(values, 0, student.stop)
        return values[student.exit].to(student.kept_dtype)

    def _roomy(self, size: int) -> torch.device | None:
        """Return where so many bytes fit; None where they do nowhere."""
        for device in (self._student.device, torch.device("cpu")):
            if size <= free_bytes(device) // 2:
                return device
        return None


@dataclass(frozen=True)
class Lessons:
    """What a student learns from.

    Attributes:
        ids: int64 [N, S], windows of tokens.
        targets: The dense model's stream in the place of the student's exit.
        entry: The stream in front of the student's first call; None where it starts from the
            ids.
        held_out: How many windows, the last ones, are for checks alone. One at least: the best
            state is chosen by them, and it is what a training that fails falls back to.
    """

    ids: Tensor
    targets: Streams
    entry: Streams | None = None
    held_out: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.held_out < len(self.ids):
            raise ValueError(f"{self.held_out} of {len(self.ids)} windows are held out")


class Tuner:
    """A training of one student.

    Args:
        student: Its forms are trained in place.
        lessons: What from.
        objective: What for.
        schedule: How long.
        seed: Of the order of the windows.
        saved: File for the state of the training, so that an interrupted one goes on; taken up
            where it exists. None to keep none.
        progress: Called with `what`, and thousandths of the schedule.
    """

    def __init__(
        self,
        student: Student,
        lessons: Lessons,
        objective: Objective,
        schedule: Schedule,
        *,
        seed: int = 0,
        saved: Path | None = None,
        progress: Progress = silent,
        what: str = "training",
    ) -> None:
        self.student, self.lessons, self.objective = student, lessons, objective
        self.schedule, self.saved = schedule, saved
        self.progress, self.what = progress, what
        self.result = Tuned()
        self._order = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []
        self._best, self._best_state = math.inf, list[Tensor]()
        self._checked_at, self._worse = 0.0, 0
        self._rate = schedule.rate
        self._parameters = student.parameters
        cuda = student.device.type == "cuda"
        by_rate: dict[float, list[nn.Parameter]] = {}
        for form in student.forms.values():
            for rate, parameters in form.rates():
                by_rate.setdefault(rate, []).extend(p for p in parameters if p.requires_grad)
        # On a GPU a rate is a tensor, which a recorded step reads anew.
        self._rates = {
            rate: torch.zeros((), device=student.device) if cuda else None for rate in by_rate
        }
        self._optimizer = torch.optim.Adam(
            [{"params": parameters, "lr": self._rates[rate] if cuda else 1.0, "factor": rate}
             for rate, parameters in by_rate.items()],
            betas=schedule.betas, fused=True if cuda else None, capturable=cuda,
        )  # fmt: skip
        self._rated = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._recorded: _Recorded | None = None
        self._eager = 0

    def run(self) -> Tuned:
        """Train to the end of the schedule, and leave the best state in the forms.

        Raises:
            PassError: Memory does not suffice; the message says what lowers the need.
        """
        with must_fit(
            self.student.device, self.what,
            "Lower batch or seqlen, or take mode=local, which trains a few blocks at a time.",
        ):  # fmt: skip
            return self._run()

    def _run(self) -> Tuned:
        result, schedule = self._restore(), self.schedule
        if result.stopped:
            return result
        begun = time.perf_counter() - result.seconds
        saved_at = result.seconds
        losses = _Mean(self.student.device)
        self.progress(self.what, 0, 1000)
        if not result.checks:
            self._check(0.0)
        result.preparing += self._prepare()
        result.seconds = time.perf_counter() - begun
        while (done := self._done()) < 1 and not result.stopped:
            losses.add(self._step(self._rate * schedule.factor(done)))
            result.steps += 1
            result.tokens += schedule.batch * self.lessons.ids.shape[1]
            if losses.count >= LOOK_EVERY:
                loss = losses.take()
                result.losses.append((result.steps, loss))
                if not math.isfinite(loss):
                    result.stopped = f"the loss became {loss} before step {result.steps}"
                self.progress(self.what, int(done * 1000), 1000)
            if done - self._checked_at >= CHECK_EVERY and not result.stopped:
                self._check(done)
                if schedule.patience and self._worse >= schedule.patience:
                    result.stopped = f"no better held-out loss in {self._worse} checks"
                elif schedule.lowers:
                    self._look_back()
            result.seconds = time.perf_counter() - begun
            if self.saved is not None and result.seconds - saved_at >= SAVE_EVERY:
                saved_at = result.seconds
                self._save()
        if not result.stopped:
            self._check(1.0)
        self._go_back()
        result.seconds = time.perf_counter() - begun
        self.progress(self.what, 1000, 1000)
        return result

    def _done(self) -> float:
        """Return how far the training is; time that went into compiling has not moved it."""
        result, seconds = self.result, self.schedule.seconds
        if seconds is not None:
            seconds -= result.preparing
        schedule = dataclasses.replace(self.schedule, seconds=seconds)
        return schedule.done(result.steps, result.seconds - result.preparing)

    def _prepare(self) -> float:
        """Compile the step, where that pays; return the seconds it took."""
        schedule, result = self.schedule, self.result
        if self.student.device.type != "cuda":
            return 0.0
        kinds = self.student.kinds
        seconds, steps = (kinds * least for least in COMPILE_FROM)
        if (schedule.seconds is not None and schedule.seconds - result.seconds < seconds) or (
            schedule.steps is not None and schedule.steps - result.steps < steps
        ):
            if kinds > 1:
                result.not_compiled = (
                    f"{kinds} kinds of blocks take longer to compile than it saves"
                )
            return 0.0
        started = time.perf_counter()
        self.progress("compiling the step", 0, 1)
        usable = len(self.lessons.ids) - self.lessons.held_out
        batch = self._batch([row % usable for row in range(schedule.batch)])
        self.student.compiled = True
        try:
            self.objective.measure(*self._forward(*batch), learn=True)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            # A compiler fails in its own ways, and the step works without it.
            self.student.compiled = False
            self.result.not_compiled = reason(error)
        self._drop_gradients()
        self.progress("compiling the step", 1, 1)
        return time.perf_counter() - started

    def _check(self, done: float) -> None:
        """Measure the held-out windows, and keep the state if it is the best so far."""
        count, size, total = self.lessons.held_out, self.schedule.batch, 0.0
        self._checked_at = done
        for start in range(len(self.lessons.ids) - count, len(self.lessons.ids), size):
            rows = list(range(start, min(start + size, len(self.lessons.ids))))
            with torch.no_grad():
                loss = self.objective.measure(*self._forward(*self._batch(rows)), learn=False)
            total += float(loss) * len(rows) / count
        self.result.checks.append((self.result.steps, total))
        self._worse += 1
        if total < self._best:
            self._best, self._worse = total, 0
            self._best_state = [parameter.detach().clone() for parameter in self._parameters]

    def _look_back(self) -> None:
        """Go on from the best state with a lower rate, where checks show no gain by this one."""
        if self._worse and self._worse % FRUITLESS == 0:
            self._go_back()
            self._rate *= LOWERED
            self.result.lowered.append((self.result.steps, self._rate))

    def _go_back(self) -> None:
        for parameter, value in zip(self._parameters, self._best_state, strict=True):
            parameter.data.copy_(value)

    def _rows(self) -> list[int]:
        """Return the windows of the next step; every window comes once in an epoch."""
        usable = len(self.lessons.ids) - self.lessons.held_out
        while len(self._queue) < self.schedule.batch:
            self._queue += torch.randperm(usable, generator=self._order).tolist()
        rows, self._queue = self._queue[: self.schedule.batch], self._queue[self.schedule.batch :]
        return rows

    def _batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        lessons = self.lessons
        return (
            lessons.ids[torch.tensor(rows)].to(self.student.device),
            lessons.targets.rows(rows),
            None if lessons.entry is None else lessons.entry.rows(rows),
        )

    def _forward(
        self, ids: Tensor, target: Tensor, entry: Tensor | None
    ) -> tuple[Student, dict[str, Any], Tensor]:
        student = self.student
        values = student.inputs(ids)
        with torch.no_grad():
            student.run(values, 0, student.embedding)
        if entry is not None:
            values[student.entry] = entry
        first = student.embedding if entry is None else student.first
        if student.compiled and torch.is_grad_enabled():
            # As the other blocks' streams do: with one that does not, it is another function.
            stream = student.stream_into(first)
            values[stream] = values[stream].detach().requires_grad_()
        student.run(values, first, student.stop)
        return student, values, target

    def _work(self, ids: Tensor, target: Tensor, entry: Tensor | None) -> Tensor:
        self._drop_gradients()
        loss = self.objective.measure(*self._forward(ids, target, entry), learn=True)
        torch.nn.utils.clip_grad_norm_(self._rated, 1.0)
        self._optimizer.step()
        for form in self.student.forms.values():
            form.step()
        return loss

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _step(self, rate: float) -> Tensor:
        batch = self._batch(self._rows())
        for group in self._optimizer.param_groups:
            tensor = self._rates[group["factor"]]
            if tensor is None:
                group["lr"] = rate * group["factor"]
            else:
                tensor.fill_(rate * group["factor"])
        if self.student.device.type != "cuda":
            return self._work(*batch)
        if self._recorded is None:
            self._eager += 1
            if self._eager <= WARM_UP:
                return self._work(*batch)
            self._recorded = _Recorded(self._work, batch)
        return self._recorded.replay(batch)

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
        fresh.rename(self.saved)

    def _restore(self) -> Tuned:
        """Take up the saved state, if there is one; return the result so far."""
        if self.saved is None or not self.saved.is_file():
            return self.result
        with taking_up(self.saved):
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
            self.result = Tuned(**state["result"])
        return self.result


class _Recorded:
    """A step of a training as a CUDA graph: its thousands of kernels are launched at once."""

    def __init__(self, work: Callable[..., Tensor], batch: Sequence[Tensor | None]) -> None:
        self._places = [None if value is None else value.clone() for value in batch]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._loss = work(*self._places)

    def replay(self, batch: Sequence[Tensor | None]) -> Tensor:
        for place, value in zip(self._places, batch, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self._graph.replay()
        return self._loss


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
