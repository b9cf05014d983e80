"""Recovery after depth pruning: what the removed blocks did is put back into those that stay."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphopt.calibrate import (
    calibration_windows,
    held_out_perplexity,
    pick,
    sample_windows,
)
from graphopt.devices import free_bytes, must_fit, scoring_dtype
from graphopt.errors import PassError
from graphopt.evaluate import ProgramModel
from graphopt.ir.blocks import block_name, find_blocks, remove_blocks
from graphopt.ir.execute import resident
from graphopt.ir.graph import Call, Program
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import evaluate
from graphopt.ir.weights import Array, Weight
from graphopt.passes.base import Context, Pass, PassResult, Skip, make_pass, register_pass
from graphopt.passes.prune_blocks import HELD_OUT, Chooser, PruneBlocks
from graphopt.repair import repair
from graphopt.scores import units_of
from graphopt.tune import (
    Form,
    Lessons,
    LogitObjective,
    LowRank,
    Objective,
    Schedule,
    StreamObjective,
    Streams,
    Student,
    Tuned,
    Tuner,
    Whole,
    batch_kl,
    kaiming,
    relative_mse,
)
from graphopt.verification import finite

MODES = ("distil", "local", "faithful")
DONORS = ("pruned", "self", "random", "none")
TRAIN = ("all", "low-rank")

WARM_TOKENS = (32768, 131072)
"""Tokens of the warm start, on a CPU and on a GPU."""

OWN_TEXT_SHARE = 0.25
"""Of a training's seconds, in which the dense model writes text for it."""

EPOCHS = 4
"""How often a training of a given number of steps reads what the dense model writes."""

FAITHFUL_RATE = 1e-3
FAITHFUL_OTHERS = 9.65e-6 / FAITHFUL_RATE
"""The paper's learning rates: of coefficients, and of everything else relative to them."""


@register_pass
@dataclass
class FuseBlocks(Pass):
    """Train the blocks that `prune-blocks` left to do what the dense model did.

    `mode=distil` (the default) first refits the projections into the stream in closed form
    (`graphopt.repair`; `warm_start=false` leaves it out) and then trains all remaining block
    weights on the dense model's next-token distributions. `mode=local` trains `group` blocks at
    a time on the dense model's stream behind them, which is kept; the last group learns the
    distributions. `mode=faithful` is FuseGPT (arXiv 2411.14507, equations 2 to 6 and algorithm
    1): a block is scored, removed and fused into its `group - 1` neighbours by low-rank
    coefficients, then the next; it repeats the choice of `prune-blocks` on the model fused so
    far, with that pass's options.

    Training lasts `seconds` or `steps`, whichever is given (150 seconds if neither), in all
    modes over all of their parts together. A step takes `batch` windows of `seqlen` tokens; by
    default 4 of 2048 on a GPU and 2 of 256 on a CPU. `own_text` is how many windows the dense
    model writes itself, behind beginnings from the calibration text; by default none on a CPU,
    and on a GPU as many as a quarter of the seconds allows, or as a quarter of the steps reads.

    `train=low-rank` trains matrices by terms of that `rank` instead of whole. `donor` is what
    coefficients of the faithful mode multiply: the `pruned` block, the neighbour's own weight
    (`self`), a `random` matrix of the pruned one's size, or nothing (`none`). With `controls`
    the first block is fused by each of the other donors too, in as many seconds or steps again,
    for the report alone.

    Legality:

    1. The recipe has `prune-blocks` before it, of whole blocks in the faithful mode.
    2. Blocks of a group have the same operations and weights of equal shapes.
    3. The calibration text has a window for training and one for checks.
    """

    name: ClassVar[str] = "fuse-blocks"
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("prune-blocks",)

    mode: str = "distil"
    seconds: float | None = None
    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    seqlen: int | None = None
    warm_start: bool = True
    own_text: int | None = None
    group: int = 8
    train: str = "all"
    rank: int = 128
    donor: str = "pruned"
    controls: bool = False
    patience: int = 0

    def check(self, program: Program) -> None:
        for option, known in (("mode", MODES), ("donor", DONORS), ("train", TRAIN)):
            if getattr(self, option) not in known:
                raise PassError(
                    f"fuse-blocks knows no {option} {getattr(self, option)!r}.",
                    f"Known: {', '.join(known)}.",
                )
        for option, least in (
            ("seconds", 0), ("steps", 0), ("rate", 0), ("batch", 1), ("seqlen", 2),
            ("own_text", 0), ("group", 2), ("rank", 1), ("patience", 0),
        ):  # fmt: skip
            value = getattr(self, option)
            if value is not None and not value >= least:
                raise PassError(
                    f"fuse-blocks: {option}={value} is below {least}.", f"Leave {option} out."
                )
        if self.controls and self.mode != "faithful":
            raise PassError(
                f"controls compares donors, and mode={self.mode} has none.",
                "Give mode=faithful, or leave controls out.",
            )
        if self.mode == "faithful" and (self.batch or 2) < 2:
            raise PassError(
                "The loss of mode=faithful compares the sequences of a batch, and batch=1 has one.",
                "Give batch=2 or more.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower batch or seqlen, give own_text=0, or take mode=local or --device cpu."
        with must_fit(context.device, "fuse-blocks", remedy):
            return _Fusion(self, program, context).run()


class _Fusion:
    """One run of the pass."""

    def __init__(self, options: FuseBlocks, program: Program, context: Context) -> None:
        if context.dense is None or "prune-blocks" not in context.earlier:
            raise PassError(
                "fuse-blocks needs the model from which prune-blocks removed blocks.",
                "Run both in one recipe: prune-blocks{ratio=0.25},fuse-blocks.",
            )
        self.options, self.context = options, context
        self.device = context.device
        gpu = self.device.type == "cuda"
        batch = options.batch if options.batch is not None else (4 if gpu else 2)
        usual = 2048 if gpu else 256
        seqlen = options.seqlen or min(usual, ProgramModel(program).positions or usual)
        seconds = options.seconds
        if seconds is None and options.steps is None:
            seconds = 150.0
        # A step of fewer tokens is a noisier one.
        rate = 5e-4 * min(1.0, math.sqrt(batch * seqlen / 8192))
        self.schedule = Schedule(
            options.steps, seconds, batch=batch, patience=options.patience,
            rate=options.rate or (FAITHFUL_RATE if options.mode == "faithful" else rate),
        )  # fmt: skip
        self.started = time.perf_counter()
        self.seqlen = seqlen
        self.given = program
        self.dense = resident(context.dense, torch.float32, self.device)
        self.program = self._share(program)
        whole = [*self.dense.weights, *self.program.weights]
        self.origin = {weight.name: weight.producer for weight in whole}
        self.details: dict[str, Any] = {"seconds": {}, "perplexity": []}
        self.skipped: list[Skip] = []
        windows = calibration_windows(self.dense, context, seqlen)
        # The loss of the faithful mode compares sequences, also in checks.
        held = max(2 if options.mode == "faithful" else 1, min(HELD_OUT, len(windows) // 8))
        if len(windows) <= held:
            raise PassError(
                f"The calibration text has {len(windows)} windows of {seqlen} tokens, of which "
                f"checks take {held}: none is left to learn from.",
                "Give a longer text with --calib, or a lower seqlen.",
            )
        self.windows, self.checked = windows[:-held], windows[-held:]
        if len(self.windows) < batch and (options.own_text == 0 or not gpu):
            self.schedule = replace(self.schedule, batch=len(self.windows))
        self.done: list[str] = []
        self._resume()

    def _share(self, program: Program) -> Program:
        """Return the pruned program in memory; what it has of the dense one is there once."""
        assert self.context.dense is not None
        program = program.copy()
        for weight in program.used_weights():
            dense = self.context.dense.weights
            if weight.name in dense and dense[weight.name].producer is weight.producer:
                value = self.dense.weights[weight.name].producer
            else:
                value = Array(weight.load(torch.float32).to(self.device))
            program.weights.replace(Weight(weight.name, value, weight.checkpoint, weight.constant))
        return program

    def run(self) -> PassResult:
        removed = self.context.earlier["prune-blocks"]["removed"]
        if not self.done:
            self._note("the whole model", self.dense)
            self._note("plain removal", self.program)
        if self.options.mode == "faithful":
            self._faithful()
        else:
            if self.options.warm_start and "warm start" not in self.done:
                self._warm_start()
                self._checkpoint("warm start")
            if self.options.mode == "distil":
                self._distil()
            else:
                self._local()
        self._note("trained", self.program)
        seconds = self.details["seconds"]
        seconds["all"] = time.perf_counter() - self.started + seconds.get("controls", 0.0)
        return PassResult(self._fold(), len(removed), len(removed), self.skipped, self.details)

    # ---- what all modes share ----

    def _note(self, what: str, program: Program) -> None:
        value = self._perplexity(program)
        self.details["perplexity"].append({"after": what, "value": finite(value)})

    def _perplexity(self, program: Program) -> float:
        kind = scoring_dtype(program, self.device)
        return held_out_perplexity(program, self.checked, self.device, kind)

    def _clock(self, what: str, started: float) -> None:
        seconds = self.details["seconds"]
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started

    def _left(self) -> float | None:
        """Return the seconds that are left of the whole pass."""
        if self.schedule.seconds is None:
            return None
        return max(self.schedule.seconds - (time.perf_counter() - self.started), 0.0)

    def _lessons_text(self) -> Tensor:
        """Return the windows to learn from: those of the text, and the dense model's own."""
        count, seconds = self._own_text()
        if not count:
            return self.windows
        path = self._saved("text")
        if path is not None and path.is_file():
            own = torch.load(path, weights_only=True)
        else:
            started = time.perf_counter()
            own = sample_windows(
                self.dense, self.windows, count, self.seqlen, seconds=seconds,
                device=self.device, seed=self.context.seed, progress=self.context.progress,
            )  # fmt: skip
            self._clock("writing text", started)
            if path is not None:
                # A training that goes on must find the text that it began with.
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(own, path)
        self.details["own_windows"] = len(own)
        return torch.cat([self.windows, own])

    def _own_text(self) -> tuple[int, float | None]:
        """Return how many windows the dense model writes, and in how many seconds at most."""
        if self.options.own_text is not None:
            return self.options.own_text, None
        if self.device.type != "cuda" or self.options.steps == 0:
            return 0, None
        behind = self.dense.calls[find_blocks(self.dense)[-1].position].results[0]
        width = evaluate(infer_program(self.dense)[1][behind].shape[-1], {})
        # The dense model's streams of them are kept, in 16 bits.
        most = free_bytes(self.device) // 4 // (2 * self.seqlen * width)
        left = self._left()
        if left is not None:
            return most, left * OWN_TEXT_SHARE
        assert self.schedule.steps is not None
        wanted = self.schedule.steps * self.schedule.batch // EPOCHS - len(self.windows)
        return min(max(wanted, 0), most), None

    def _streams(self, program: Program, ids: Tensor, behind: int) -> Streams:
        """Return the stream behind a call of a program, given by its position."""
        first = find_blocks(program)[0].position
        return Streams(Student(program, first, behind + 1, {}, self.device), ids)

    def _forms(self, program: Program, calls: list[Call]) -> dict[str, Form]:
        """Return what is trained of calls: every weight of theirs, but none used elsewhere."""
        owners: dict[str, set[int]] = {}
        for number, call in enumerate(program.calls):
            for name in call.weights.values():
                owners.setdefault(name, set()).add(number)
        inside = {number for number, call in enumerate(program.calls) if call in calls}
        generator = torch.Generator().manual_seed(self.context.seed)
        forms: dict[str, Form] = {}
        for call in calls:
            for name in call.weights.values():
                weight = program.weights[name]
                if weight.constant or name in forms or not weight.dtype.is_floating_point:
                    continue
                if not owners[name] <= inside:
                    self.skipped.append(Skip(name, "it is used outside the blocks too"))
                    continue
                value = weight.load(torch.float32).to(self.device)
                if self.options.train == "low-rank" and value.dim() == 2:
                    forms[name] = LowRank(value, self.options.rank, generator)
                else:
                    forms[name] = Whole(value)
        return forms

    def _tune(
        self,
        program: Program,
        forms: dict[str, Form],
        first: int,
        stop: int,
        lessons: Lessons,
        objective: Objective,
        schedule: Schedule,
        what: str,
    ) -> Tuned:
        """Train forms and put their values into the program."""
        student = Student(program, first, stop, forms, self.device)
        tuner = Tuner(
            student, lessons, objective, schedule, seed=self.context.seed,
            saved=self._saved(what), progress=self.context.progress, what=what,
        )  # fmt: skip
        tuned = tuner.run()
        if tuned.stopped:
            self.skipped.append(Skip(what, f"stopped early: {tuned.stopped}"))
        if tuned.not_compiled:
            reason = f"its step was not compiled, and is slower: {tuned.not_compiled}"
            self.skipped.append(Skip(what, reason))
        with torch.no_grad():
            for name, form in student.forms.items():
                _assign(program, name, form())
        return tuned

    def _saved(self, what: str) -> Path | None:
        """Return the file that keeps something between two runs of one compile."""
        if self.context.work is None:
            return None
        key = json.dumps([asdict(self.options), what, self.context.seed], sort_keys=True)
        paths = [call.path for call in self.given.calls]
        digest = hashlib.sha256(f"{key}\n{self.context.text}\n{paths}\n{self.given}".encode())
        return self.context.work / f"fuse-{digest.hexdigest()[:16]}.pt"

    def _checkpoint(self, stage: str) -> None:
        """Keep what the stages so far made, so that an interrupted compile goes on behind them."""
        self.done.append(stage)
        path = self._saved("stages")
        if path is None:
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
                "details": json.dumps(self.details),
                "skipped": [(skip.where, skip.reason) for skip in self.skipped],
                "spent": time.perf_counter() - self.started,
            },
            fresh,
        )
        fresh.rename(path)

    def _resume(self) -> None:
        path = self._saved("stages")
        if path is None or not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if self.options.mode == "faithful":
            self.program = self.dense.copy()
            names = [block_name(self.program, block) for block in find_blocks(self.program)]
            gone = [i for i, name in enumerate(names) if name not in state["blocks"]]
            remove_blocks(self.program, gone)
        for name, value in state["weights"].items():
            _assign(self.program, name, value.to(self.device))
        self.done, self.details = state["done"], json.loads(state["details"])
        self.skipped = [Skip(where, reason) for where, reason in state["skipped"]]
        self.started -= state["spent"]

    def _fold(self) -> Program:
        """Return the result: weights in their own dtype, on the CPU, where they changed."""
        result = self.given.copy()
        if self.options.mode == "faithful":
            result = self.program.copy()
        assert self.context.dense is not None
        for weight in self.program.used_weights():
            names = self.given.weights if weight.name in self.given.weights else None
            source = (names or self.context.dense.weights)[weight.name]
            if weight.producer is self.origin[weight.name]:
                folded = source
            else:
                value = weight.load().to(source.dtype).cpu().contiguous()
                folded = Weight(weight.name, Array(value), source.checkpoint, source.constant)
            result.weights.replace(folded)
        return result

    # ---- the modes ----

    def _warm_start(self) -> None:
        started = time.perf_counter()
        tokens = WARM_TOKENS[self.device.type == "cuda"]
        windows = pick(self.windows, max(2, tokens // self.seqlen), self.context.seed)
        refits, skipped = repair(
            self.program, self.dense, windows, device=self.device, progress=self.context.progress
        )
        self.skipped += [Skip(where, reason) for where, reason in skipped]
        self.details["refits"] = [asdict(refit) for refit in refits]
        self._clock("warm start", started)
        self._note("warm start", self.program)

    def _distil(self) -> None:
        ids = torch.cat([self._lessons_text(), self.checked])
        last = find_blocks(self.dense)[-1].position
        blocks = find_blocks(self.program)
        calls = [self.program.calls[block.position] for block in blocks]
        started = time.perf_counter()
        tuned = self._tune(
            self.program,
            self._forms(self.program, calls),
            blocks[0].position,
            blocks[-1].position + 1,
            Lessons(ids, self._streams(self.dense, ids, last), held_out=len(self.checked)),
            LogitObjective(),
            replace(self.schedule, seconds=self._left()),
            "distilling",
        )
        self._clock("training", started)
        self.details["training"] = [{"part": "all blocks", **_plain(tuned)}]

    def _local(self) -> None:
        ids = torch.cat([self._lessons_text(), self.checked])
        groups = self._groups()
        blocks = find_blocks(self.program)
        trained = self.details.setdefault("training", [])
        for number, (first, stop) in enumerate(groups):
            stage = f"group {number + 1} of {len(groups)}"
            if stage in self.done:
                continue
            started = time.perf_counter()
            calls = [self.program.calls[block.position] for block in blocks[first:stop]]
            targets = self._streams(self.dense, ids, self._behind(calls[-1]))
            entry = None
            if first:
                entry = self._streams(self.program.copy(), ids, blocks[first - 1].position)
            last = stop == len(blocks)
            left, share = self._left(), len(groups) - number
            schedule = replace(
                self.schedule,
                seconds=None if left is None else left / share,
                steps=None if self.schedule.steps is None else self.schedule.steps // len(groups),
            )
            tuned = self._tune(
                self.program,
                self._forms(self.program, calls),
                blocks[first].position,
                blocks[stop - 1].position + 1,
                Lessons(ids, targets, entry, held_out=len(self.checked)),
                LogitObjective() if last else StreamObjective(relative_mse),
                schedule,
                stage,
            )
            self._clock("training", started)
            trained.append({"part": f"blocks {first} to {stop - 1}", **_plain(tuned)})
            self._checkpoint(stage)

    def _behind(self, call: Call) -> int:
        """Return what ends, in the dense program, where a block of the pruned one should.

        That is the last of the removed blocks that follow it, or the same block.
        """
        kept = {self.program.calls[block.position].path for block in find_blocks(self.program)}
        blocks = [block.position for block in find_blocks(self.dense)]
        paths = [self.dense.calls[position].path for position in blocks]
        place = paths.index(call.path)
        while place + 1 < len(paths) and paths[place + 1] not in kept:
            place += 1
        return blocks[place]

    def _groups(self) -> list[tuple[int, int]]:
        """Return runs of blocks, from the first that follows a removed one to the last.

        The last run is as long as the others and may share blocks with the one before it: it is
        the one that learns what the model is for.
        """

        def named(program: Program) -> list[tuple[str, str]]:
            # A block that lost a part of its own runs another function.
            return [
                (block_name(program, block), program.calls[block.position].function)
                for block in find_blocks(program)
            ]

        kept, whole = named(self.program), named(self.dense)
        first = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a != b),
                     len(kept) - 1)  # fmt: skip
        # The block in front of the first cut takes part: it is the nearest to what is missing.
        first, size = max(first - 1, 0), self.options.group
        runs = [(start, start + size) for start in range(first, len(kept) - size, size)]
        return [*runs, (max(len(kept) - size, 0), len(kept))]

    def _faithful(self) -> None:
        pruning = self._pruning()
        removed = self.context.earlier["prune-blocks"]["removed"]
        if not self.done:
            self.program = self.dense.copy()
            self.details |= {"order": [], "training": []}
        names = [block_name(self.dense, block) for block in find_blocks(self.dense)]
        chooser = None if pruning.remove else Chooser(pruning, self.dense, self.context)
        for number in range(len(self.details["order"]), len(removed)):
            here = [block_name(self.program, block) for block in find_blocks(self.program)]
            if chooser is None:
                place = here.index(removed[number])
            else:
                units = units_of(self.program, ("block",))
                place = chooser.score(self.program, units, None).lowest().block
            what = f"fusing {here[place]}"
            schedule = self._part(len(removed) - number)
            pruned, tuned = self._fuse_one(place, what, schedule, self.options.donor)
            if self.options.controls and not number:
                self._compare(place, what, schedule, pruned, tuned)
            self.program = pruned
            self.details["training"].append({"part": what, **_plain(tuned)})
            self.details["order"].append(names.index(here[place]))
            self._note(what, self.program)
            self._checkpoint(what)

    def _compare(
        self, place: int, what: str, schedule: Schedule, pruned: Program, tuned: Tuned
    ) -> None:
        """Fuse a block by every other donor too, and put what came of each into the report."""
        started = time.perf_counter()
        fused = {self.options.donor: (pruned, tuned)}
        for donor in DONORS:
            if donor not in fused:
                named = f"{what} with donor={donor}"
                fused[donor] = self._fuse_one(place, named, schedule, donor)
        self.details["controls"] = [
            {
                "donor": donor,
                "loss": finite(min(loss for _, loss in tuned.checks)),
                "perplexity": finite(self._perplexity(program)),
            }
            for donor, (program, tuned) in fused.items()
        ]
        self._clock("controls", started)
        # What serves the report alone takes nothing from the other blocks.
        self.started += time.perf_counter() - started

    def _pruning(self) -> PruneBlocks:
        options = self.context.earlier["prune-blocks"].get("options", {})
        made = make_pass("prune-blocks", options)
        assert isinstance(made, PruneBlocks)
        if made.part != "block":
            raise PassError(
                f"mode=faithful fuses whole blocks, and prune-blocks removed part={made.part}.",
                "Use mode=distil, or prune-blocks with part=block.",
            )
        return made

    def _part(self, share: int) -> Schedule:
        """Return the schedule of the next of `share` fusions."""
        left, steps = self._left(), self.schedule.steps
        if steps is not None:
            done = sum(item["steps"] for item in self.details["training"])
            steps = (steps - done) // share
        seconds = None if left is None else left / share
        return replace(self.schedule, warm_up=0.0, seconds=seconds, steps=steps)

    def _fuse_one(
        self, place: int, what: str, schedule: Schedule, donor: str
    ) -> tuple[Program, Tuned]:
        """Return the program without a block, which is fused into its neighbours."""
        program = self.program
        blocks = find_blocks(program)
        first, last = group_of(place, self.options.group - 1, len(blocks))
        calls = [program.calls[block.position] for block in blocks]
        gone = calls[place]
        require_equal(program, calls[first : last + 1])
        ids = torch.cat([self.windows, self.checked])
        targets = self._streams(program, ids, blocks[last].position)
        entry = self._streams(program, ids, blocks[first - 1].position) if first else None
        pruned = program.copy()
        remove_blocks(pruned, [place])
        neighbours = [call for i, call in enumerate(calls[first : last + 1], first) if i != place]
        generator = torch.Generator().manual_seed(self.context.seed)
        forms: dict[str, Form] = {}
        for call in neighbours:
            for slot, name in call.weights.items():
                weight = program.weights[name]
                if weight.constant or name in forms:
                    continue
                value = weight.load(torch.float32).to(self.device)
                if value.dim() != 2:
                    forms[name] = Whole(value, FAITHFUL_OTHERS)
                    continue
                given = program.weights[gone.weights[slot]].load(torch.float32)
                forms[name] = Injection(
                    value, _donation(donor, value, given.to(self.device), generator),
                    self.options.rank, generator,
                )  # fmt: skip
        after = find_blocks(pruned)
        started = time.perf_counter()
        tuned = self._tune(
            pruned, forms, after[first].position, after[last - 1].position + 1,
            Lessons(ids, targets, entry, held_out=len(self.checked)),
            StreamObjective(batch_kl), schedule, what,
        )  # fmt: skip
        if donor == self.options.donor:
            self._clock("training", started)
        return pruned, tuned


def _donation(donor: str, own: Tensor, pruned: Tensor, generator: torch.Generator) -> Tensor | None:
    """Return what coefficients multiply; None for nothing."""
    if donor == "none":
        return None
    if donor == "self":
        return own
    if donor == "pruned":
        return pruned
    noise = torch.randn(pruned.shape, generator=generator).to(pruned.device)
    return noise * pruned.std()


class Injection(Form):
    """W + B A + (C_l C_r) * W_donor, elementwise: FuseGPT, arXiv 2411.14507, equations 3 and 4.

    C_l and B are 0 at first, so that the start is plain removal; W and W_donor stay as they are.
    Without a donor the coefficients' parameters go into a second low-rank term, so that both
    forms have as many.
    """

    def __init__(
        self, value: Tensor, donor: Tensor | None, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        out, width = value.shape
        self.base = nn.Buffer(value)
        self.donor = None if donor is None else nn.Buffer(donor)
        self.coefficients_left = nn.Parameter(value.new_zeros(out, rank))
        self.coefficients_right = nn.Parameter(kaiming((rank, width), generator).to(value.device))
        self.up = nn.Parameter(value.new_zeros(out, rank))
        self.down = nn.Parameter(kaiming((rank, width), generator).to(value.device))

    def forward(self) -> Tensor:
        coefficients = self.coefficients_left @ self.coefficients_right
        injected = coefficients if self.donor is None else coefficients * self.donor
        value: Tensor = self.base + self.up @ self.down + injected
        return value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        coefficients = [self.coefficients_left, self.coefficients_right]
        if self.donor is None:
            return [(FAITHFUL_OTHERS, [*coefficients, self.up, self.down])]
        return [(1.0, coefficients), (FAITHFUL_OTHERS, [self.up, self.down])]


def group_of(place: int, neighbours: int, count: int) -> tuple[int, int]:
    """Return the first and the last block of the group around one, from 0.

    Source: FuseGPT, arXiv 2411.14507, equation 2: `neighbours` + 1 consecutive blocks, half of
    the neighbours (rounded down) in front, moved to lie inside the model; all blocks where
    there are no more.
    """
    if count <= neighbours + 1:
        return 0, count - 1
    first = min(max(place - neighbours // 2, 0), count - neighbours - 1)
    return first, first + neighbours


def require_equal(program: Program, calls: list[Call]) -> None:
    """Refuse blocks that cannot be fused into each other.

    Raises:
        PassError: Naming the first pair and what differs.
    """
    first = calls[0]
    for call in calls[1:]:
        pair = f"{first.path or first.function!r} and {call.path or call.function!r}"
        remedy = "Use mode=distil, which needs no equal blocks, or a lower group."
        if call.function != first.function:
            raise PassError(
                f"{pair} are of different kinds ({first.function} and {call.function}) and cannot "
                "be fused.",
                remedy,
            )
        for slot, name in first.weights.items():
            ours, theirs = program.weights[name].shape, program.weights[call.weights[slot]].shape
            if ours != theirs:
                raise PassError(f"{pair} cannot be fused: {slot} is {ours} and {theirs}.", remedy)


def _plain(tuned: Tuned) -> dict[str, Any]:
    """Return what a training did as JSON has it."""
    found = asdict(tuned)
    for name in ("losses", "checks"):
        found[name] = [(step, finite(loss)) for step, loss in found[name]]
    return found


def _assign(program: Program, name: str, value: Tensor) -> None:
    weight = program.weights[name]
    array = Array(value.detach().to(torch.float32).clone())
    program.weights.replace(Weight(name, array, weight.checkpoint, weight.constant))
