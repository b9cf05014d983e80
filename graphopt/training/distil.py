"""Training a program on the one it was made of: what every pass that distils has in common."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.calibration.text import (
    PERPLEXITY_WINDOWS,
    calibration_windows,
    held_out_perplexity,
    sample_windows,
    window_length,
)
from graphopt.calibration.vocabulary import narrow_head, tokens_to_compare
from graphopt.errors import PassError
from graphopt.execute.block_runner import BlockRunner, Parametrisation
from graphopt.execute.interpreter import resident
from graphopt.ir.blocks import block_name, find_blocks
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Call, Program
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Context, Skip
from graphopt.pass_manager.outside_blocks import outside_blocks
from graphopt.report.record import Step
from graphopt.storage.snapshot import resuming_from
from graphopt.support.devices import free_bytes
from graphopt.support.quantities import counted
from graphopt.support.ranks import here
from graphopt.training.distillation_data import DistillationData, HiddenStateCache
from graphopt.training.gradients import pass_gradients
from graphopt.training.kept_files import kept_file
from graphopt.training.losses import LogitObjective, Objective
from graphopt.training.memory import REMEDY, StepSizes
from graphopt.training.options import DEFAULT_SECONDS, TrainingOptions
from graphopt.training.parametrisations import assign, parametrisations_of
from graphopt.training.record import TrainedPart, TrainingRecord
from graphopt.training.schedule import Schedule, TrainingResult
from graphopt.training.tuner import Tuner
from graphopt.training.written_text import windows_to_write

RATE = 2.5e-3
"""By how much of a weight's scale a step moves it at most, for steps of `USUAL_TOKENS` or more; one
of fewer tokens is noisier, by the root of their number."""
USUAL_TOKENS = 8192


class Distiller:
    """One run of a pass that trains a program on the dense one.

    Args:
        options: The options of the pass.
        program: What is trained; it is not changed.
        rate: Learning rate where the options have none; None for one relative to the weights.
        reduce_on_plateau: Whether a rate that gets no further is lowered.
        least_held: Windows that checks need at least.

    Attributes:
        home: Where the weights of the two models lie.
        dense, program: The two models, in the memory of `home` where they fit.
        windows, checked: Text to learn from, and text for checks.
        record, skipped: What the pass's result tells, and what it left out.
        done: Stages that an interrupted run left behind it.
    """

    tells: ClassVar[type[TrainingRecord]] = TrainingRecord
    """The type of what the pass tells."""
    remedy: ClassVar[str] = REMEDY
    """What to do where no step of training fits the memory."""

    def __init__(
        self,
        options: TrainingOptions,
        program: Program,
        context: Context,
        *,
        rate: float | None = None,
        reduce_on_plateau: bool = True,
        least_held: int = 1,
    ) -> None:
        assert context.dense is not None
        self.options, self.context, self.device = options, context, context.device
        seqlen = self.seqlen = window_length(program, options.seqlen, self.device)
        self.started = here().clock()
        self.original = program
        self.home = self.home_of(program)
        self.dense = resident(context.dense, torch.float32, self.home)
        self.program = self._share(program)
        whole = [*self.dense.weights, *self.program.weights]
        self.origin = {weight.name: weight.producer for weight in whole}
        self.record, self.skipped = self.tells(), outside_blocks(program)
        windows = calibration_windows(self.dense, context, seqlen)
        held = max(least_held, min(PERPLEXITY_WINDOWS, len(windows) // 8))
        if len(windows) <= held:
            raise PassError(
                f"The calibration text has {counted(len(windows), 'window')} of {seqlen} tokens, "
                f"of which checks take {held}: none is left to learn from.",
                "Give a longer text with --calib, or a lower seqlen.",
            )
        self.windows, self.checked = windows[:-held], windows[-held:]
        sizes = StepSizes.of(
            self.program, self.dense, options.batch, windows, context, self.blocks_at_once(),
            by_logits=self.by_logits, divisible=self.divisible, streams=self.streams,
            remedy=self.remedy,
        )  # fmt: skip
        step = sizes.step
        self.tokens_ahead, self.record.batches = sizes.ahead.tokens, sizes.sentences()
        seconds = options.seconds
        if seconds is None and options.steps is None:
            seconds = DEFAULT_SECONDS
        usual_rate = self.usual_rate(step.windows * seqlen)
        alone = options.generated_windows == 0 or self.device.type != "cuda"
        self.schedule = Schedule(
            options.steps, seconds, patience=options.patience,
            batch=min(step.windows, len(self.windows)) if alone else step.windows,
            rate=options.rate or rate or usual_rate, reduce_on_plateau=reduce_on_plateau,
            memory=step.memory,
        )  # fmt: skip
        self.done, self._note_seconds = list[str](), 0.0
        self._resume()

    def blocks_at_once(self) -> int:
        """Return how many blocks are trained at once at most: all, unless a pass says otherwise."""
        return len(find_blocks(self.program))

    @property
    def by_logits(self) -> bool:
        """Whether logits are compared in any training, or hidden states alone."""
        return True

    @property
    def divisible(self) -> bool:
        """Whether the loss of a step is always the mean of its windows' losses."""
        return True

    def home_of(self, program: Program) -> torch.device:
        """Return where the weights of both models lie: on the host, where they fit no device."""
        assert self.context.dense is not None
        used = [*program.used_weights(), *self.context.dense.used_weights()]
        size = 4 * sum({id(weight.producer): weight.numel for weight in used}.values())
        return self.home_for(size, 0.5)

    def home_for(self, size: int, share: float) -> torch.device:
        """Return where weights lie: the device, if they take a share of what is free, or the host.

        Args:
            size: Their bytes.
            share: The share, which they have on every rank or on none.
        """
        fits = here().least(int(size <= share * free_bytes(self.device)))
        return self.device if fits else torch.device("cpu")

    @property
    def streams(self) -> bool:
        """Whether a block's weights are brought to the device each time, as all have no room."""
        return self.home != self.device

    @staticmethod
    def usual_rate(tokens: int) -> float:
        """Return the highest learning rate for steps of so many tokens."""
        return RATE * min(1.0, math.sqrt(tokens / USUAL_TOKENS))

    def _share(self, program: Program) -> Program:
        """Return a program in memory; what it has of the dense one is there once."""
        assert self.context.dense is not None
        program = program.copy()
        for weight in program.used_weights():
            dense = self.context.dense.weights
            if weight.name in dense and dense[weight.name].producer is weight.producer:
                value = self.dense.weights[weight.name].producer
            else:
                value = Array(weight.load(torch.float32).to(self.home))
            program.weights.replace(weight.with_producer(value))
        return program

    def note(self, what: str, program: Program) -> float:
        """Put a program's perplexity on held-out windows into the record, and return it."""
        started = here().clock()
        value = self.perplexity(program)
        self._note_seconds = here().clock() - started
        self.record.perplexity.append(Step(after=what, value=value))
        return value

    def perplexity(self, program: Program) -> float:
        """Return a program's perplexity on held-out windows."""
        kind = scoring_dtype(program, self.device)
        return held_out_perplexity(program, self.checked, self.device, kind)

    @property
    def changed(self) -> bool:
        """Whether any weight of the program is another one than it was given."""
        return any(
            weight.producer is not self.origin.get(weight.name)
            for weight in self.program.used_weights()
        )

    def say_if_useless(self) -> None:
        """Say loudly, among what was skipped, that the pass made no step or hardly helped."""
        if self.schedule.steps != 0:
            reason = self.record.shortcoming(self.schedule.seconds or 0)
            self.skipped += [Skip("training", reason)] if reason else []

    def clock(self, what: str, started: float) -> None:
        """Add the time since `started` to the record."""
        seconds = self.record.seconds
        seconds[what] = seconds.get(what, 0.0) + here().clock() - started

    def left(self) -> float | None:
        """Return the seconds that are left of the pass, but for those of its last measurement."""
        if self.schedule.seconds is None:
            return None
        spent = here().clock() - self.started
        return max(self.schedule.seconds - spent - self._note_seconds, 0.0)

    def training_windows(self) -> Tensor:
        """Return the windows to learn from: those of the text, and the dense model's own."""
        count, seconds = self._generated_windows()
        if not count:
            return self.windows
        path = self._kept_file("text")
        if path is not None and here().made_by_first(path.is_file):
            with resuming_from(path):
                own = torch.load(path, weights_only=True)
        else:
            started = here().clock()
            own = sample_windows(
                self.dense, self.windows, count, self.seqlen, seconds=seconds,
                begin=self.context.begin or (), device=self.device, seed=self.context.seed,
                progress=self.context.progress,
            )  # fmt: skip
            self.clock("writing text", started)
            if path is not None and here().first:
                # A training that goes on must find the text that it began with.
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(own, path)
        self.record.generated_windows = len(own)
        if not len(own) and seconds is not None:
            reason = f"in {seconds:.0f} s the dense model had not written a window"
            self.skipped.append(Skip("text of the model's own", reason))
        return torch.cat([self.windows, own])

    def _generated_windows(self) -> tuple[int, float | None]:
        """Return how many windows the dense model writes, and in how many seconds at most."""
        if self.options.generated_windows is not None:
            return self.options.generated_windows, None
        if self.device.type != "cuda" or self.options.steps == 0:
            return 0, None
        if self.streams:  # all weights would be brought to the device for every token
            return 0, None
        return windows_to_write(
            self.dense, self.schedule, self.seqlen, len(self.windows), self.device, self.left()
        )

    def hidden_states(
        self,
        program: Program,
        ids: Tensor,
        behind: int,
        first: int = 0,
        entry: HiddenStateCache | None = None,
    ) -> HiddenStateCache:
        """Return the hidden states behind a call of a program, given by its position.

        Args:
            first: The block from which on they are made of `entry`.
            entry: The hidden states in front of it; None to make them of the ids.
        """
        position = find_blocks(program)[first].position
        runner = BlockRunner(
            program, position, behind + 1, {}, self.device, keep_weights=not self.streams
        )
        return HiddenStateCache(runner, ids, entry, self.tokens_ahead)

    def parametrisations(self, program: Program, calls: list[Call]) -> dict[str, Parametrisation]:
        """Return what is trained of calls: every weight of theirs, but none used elsewhere."""
        found, left = parametrisations_of(
            program, calls, self.device, self.context.seed,
            rank=self.options.rank if self.options.train == "low-rank" else None,
        )  # fmt: skip
        self.skipped += left
        return found

    def tune(
        self,
        program: Program,
        parametrisations: dict[str, Parametrisation],
        first: int,
        stop: int,
        data: DistillationData,
        objective: Objective,
        schedule: Schedule,
        what: str,
    ) -> TrainingResult:
        """Train parametrisations and put their values into the program.

        Args:
            schedule: Its seconds are those of all that is done here.
        """
        started = here().clock()
        run = self.narrowed(program) if isinstance(objective, LogitObjective) else program
        if schedule.seconds is not None:
            spent = here().clock() - started
            schedule = replace(schedule, seconds=max(schedule.seconds - spent, 0.0))
        student = BlockRunner(
            run, first, stop, parametrisations, self.device, keep_weights=not self.streams
        )
        tuner = Tuner(
            student, data, objective, schedule, seed=self.context.seed,
            saved=self._kept_file(what), progress=self.context.progress, what=what,
        )  # fmt: skip
        tuned = tuner.run()
        if tuned.stopped:
            self.skipped.append(Skip(what, f"stopped early: {tuned.stopped}"))
        if tuned.made_smaller:
            reason = f"memory ran out, and from then on a step {tuned.made_smaller}"
            self.skipped.append(Skip(what, reason))
        if tuned.not_compiled:
            reason = f"its step is not compiled, and slower: {tuned.not_compiled}"
            self.skipped.append(Skip(what, reason))
        if tuned.steps:
            with torch.no_grad():
                for name, parametrisation in student.parametrisations.items():
                    assign(program, name, parametrisation().to(self.home))
        return tuned

    @functools.cached_property
    def compared_tokens(self) -> Tensor | None:
        """Tokens on which next-token distributions are compared; None for all."""
        dtype = scoring_dtype(self.dense, self.device)
        return tokens_to_compare(self.dense, self.windows, self.device, dtype)

    def narrowed(self, program: Program) -> Program:
        """Return a program that gives the logits on which distributions are compared."""
        tokens = self.compared_tokens
        narrowed = None if tokens is None else narrow_head(program, tokens)
        if tokens is None or narrowed is None:
            return program
        self.record.compared_tokens = len(tokens)
        return narrowed

    def _kept_file(self, what: str) -> Path | None:
        return kept_file(what, self.options, self.original, self.context)

    def checkpoint(self, stage: str) -> None:
        """Keep what the stages so far made, so that an interrupted compile goes on behind them."""
        self.done.append(stage)
        spent = here().clock() - self.started
        path = self._kept_file("stages")
        if path is None or not here().first:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        changed = {
            weight.name: weight.load().cpu()
            for weight in self.program.used_weights()
            if weight.producer is not self.origin.get(weight.name)
        }
        blocks = [block_name(self.program, block) for block in find_blocks(self.program)]
        torch.save(
            {
                "done": self.done,
                "blocks": blocks,
                "weights": changed,
                "record": self.record.model_dump_json(),
                "skipped": [(skip.where, skip.reason) for skip in self.skipped],
                "spent": spent,
            },
            fresh,
        )
        fresh.replace(path)

    def _resume(self) -> None:
        path = self._kept_file("stages")
        if path is None or not here().made_by_first(path.is_file):
            return
        with resuming_from(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.resume_structure(state["blocks"])
            for name, value in state["weights"].items():
                assign(self.program, name, value.to(self.home))
            self.done = state["done"]
            self.record = self.tells.model_validate_json(state["record"])
            self.skipped = [Skip(where, reason) for where, reason in state["skipped"]]
            self.started -= state["spent"]

    def resume_structure(self, blocks: list[str]) -> None:
        """Bring the program to the blocks it had when it was kept, for passes that change them."""

    def fold(self, structure: Program | None = None) -> Program:
        """Return the result: weights in their own dtype, on the CPU, where they changed.

        Args:
            structure: Its calls; by default those of the given program.
        """
        result = (structure or self.original).copy()
        assert self.context.dense is not None
        for weight in self.program.used_weights():
            names = self.original.weights if weight.name in self.original.weights else None
            source = (names or self.context.dense.weights)[weight.name]
            if weight.producer is self.origin[weight.name]:
                folded = source
            else:
                value = weight.load().to(source.dtype).cpu().contiguous()
                folded = Weight(weight.name, Array(value), source.checkpoint, source.constant)
            result.weights.replace(folded)
        pass_gradients(result, passes=False)
        return result

    def logit_data(self, first: int = 0) -> DistillationData:
        """Return what blocks are trained on to give the dense model's next-token distributions.

        Args:
            first: The first block that is trained; those in front of it are the dense model's.
        """
        ids = torch.cat([self.training_windows(), self.checked])
        positions = [block.position for block in find_blocks(self.dense)]
        entry = self.hidden_states(self.dense, ids, positions[first - 1]) if first else None
        targets = self.hidden_states(self.dense, ids, positions[-1], first, entry)
        return DistillationData(ids, targets, entry, held_out=len(self.checked))

    def distil(self, data: DistillationData, first: int = 0) -> None:
        """Train blocks on the dense model's next-token distributions.

        Args:
            data: What `logit_data` gives for the same `first`.
        """
        blocks = find_blocks(self.program)
        calls = [self.program.calls[block.position] for block in blocks[first:]]
        started = here().clock()
        tuned = self.tune(
            self.program,
            self.parametrisations(self.program, calls),
            blocks[first].position,
            blocks[-1].position + 1,
            data,
            LogitObjective(),
            replace(self.schedule, seconds=self.left()),
            "distilling",
        )
        self.clock("training", started)
        what = f"blocks {first} to {len(blocks) - 1}" if first else "all blocks"
        self.record.training = [TrainedPart.of(what, tuned)]
