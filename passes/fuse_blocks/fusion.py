"""One run of `fuse-blocks`: the closed form, distillation, and FuseGPT's own loop."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from graphopt.calibration.reconstruction import reconstruct_behind_cuts
from graphopt.calibration.text import PERPLEXITY_WINDOWS, pick, window_length
from graphopt.errors import PassError
from graphopt.execute.block_runner import Parametrisation
from graphopt.ir.blocks import block_name, find_blocks, remove_blocks
from graphopt.ir.graph import Call, Program
from graphopt.pass_manager.contract import Context, PassResult, Skip
from graphopt.pass_manager.statements import ChangedBlocks
from graphopt.passes.fuse_blocks.donor import Donor
from graphopt.passes.fuse_blocks.injection import (
    PUBLISHED_OTHERS,
    PUBLISHED_RATE,
    Injection,
    donation,
    group_of,
    require_equal,
)
from graphopt.passes.fuse_blocks.record import Ablation, FusedBlocks
from graphopt.passes.prune_blocks.chooser import Chooser
from graphopt.passes.prune_blocks.prune_blocks import PruneBlocks
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.report.record import Step
from graphopt.support.per_device import PerDevice
from graphopt.support.plain import shown
from graphopt.support.ranks import here
from graphopt.training.distil import Distiller
from graphopt.training.distillation_data import DistillationData
from graphopt.training.losses import HiddenStateObjective, LogitObjective, batch_kl, relative_mse
from graphopt.training.parametrisations import FullParametrisation
from graphopt.training.record import TrainedPart
from graphopt.training.schedule import Schedule, TrainingResult

if TYPE_CHECKING:
    from graphopt.passes.fuse_blocks.fuse_blocks import FuseBlocks

TRAIN_IN_FRONT = PerDevice(cpu=False, gpu=True)
"""Whether blocks in front of the first cut are trained too. Without them a step costs a part, since
their hidden states are the dense model's, and a CPU has few steps."""

WARM_TOKENS = PerDevice(cpu=32768, gpu=131072)
"""Tokens of the warm start at most."""
WARM_SHARE = 0.5
"""Of the seconds of a training, those that the warm start may take, and that its tokens are chosen
for. In a minute of two cores half gave Gemma 3 270M a lower divergence than a quarter."""
WARM_RUNS = 2
"""How long its tokens take, about, in times that the dense model's blocks take for them."""
WARM_TOKENS_PER_FEATURE = 8
"""Tokens of the warm start where seconds are few, for each feature of the widest projection. What a
fit to n tokens leaves beyond the best is about a share features / n of it, so that more tokens
bring little, and a step learns from others."""
WARM_LEAST = 1024
"""Tokens of which fewer say too little about a projection."""


class Fusion(Distiller):
    """One run of the pass."""

    options: FuseBlocks
    record: FusedBlocks
    tells = FusedBlocks
    remedy = "Give a lower seqlen, fewer blocks at a time (mode=local), or --device cpu."

    def __init__(self, options: FuseBlocks, program: Program, context: Context) -> None:
        pruned, pruning = context.record(PrunedBlocks), context.options_of(PruneBlocks)
        if context.dense is None or pruned is None or pruning is None:
            raise PassError(
                "fuse-blocks needs the model from which prune-blocks removed blocks.",
                "Run both in one recipe: prune-blocks{ratio=0.25},fuse-blocks.",
            )
        self.pruned, self.pruning = pruned, pruning
        published = options.mode == "published"
        if published and isinstance(options.batch, PerDevice):
            # Its loss compares the sequences of a batch.
            options = replace(options, batch=PerDevice(cpu=2, gpu=options.batch.gpu))
        super().__init__(
            options, program, context,
            rate=PUBLISHED_RATE if published else None, reduce_on_plateau=not published,
            # The loss of the published mode compares sequences, also in checks.
            least_held=2 if published else 1,
        )  # fmt: skip

    def blocks_at_once(self) -> int:
        if self.options.mode == "distil":
            return super().blocks_at_once()
        return min(self.options.group, super().blocks_at_once())

    @property
    def by_logits(self) -> bool:
        return self.options.mode != "published"

    @property
    def divisible(self) -> bool:
        return self.options.mode != "published"

    def resume_structure(self, blocks: list[str]) -> None:
        if self.options.mode != "published":
            return
        self.program = self.dense.copy()
        names = [block_name(self.program, block) for block in find_blocks(self.program)]
        remove_blocks(self.program, [i for i, name in enumerate(names) if name not in blocks])

    def run(self) -> PassResult:
        if not self.done:
            self._note_removal()
        if self.options.mode == "published":
            self._published()
        else:
            first = 0 if TRAIN_IN_FRONT.on(self.device) else self._in_front_of_cut()
            data = self.logit_data(first)
            if self._warm and "warm start" not in self.done:
                self._warm_start(data)
                self.checkpoint("warm start")
            if self.options.mode == "distil":
                self.distil(data, first)
            else:
                self._local(data.ids)
        self.note("trained", self.program)
        seconds = self.record.seconds
        seconds["all"] = here().clock() - self.started + seconds.get("ablations", 0.0)
        self.say_if_useless()
        folded = self.fold(self.program if self.options.mode == "published" else None)
        removed = len(self.pruned.removed)
        changed = removed if self.changed else 0
        return PassResult(folded, removed, changed, self.skipped, self.record, ChangedBlocks())

    def _note_removal(self) -> None:
        """Put into the record what perplexity was before and behind the removal.

        That is known where the pass that pruned followed it on the same windows.
        """
        length = window_length(self.original, self.pruning.seqlen, self.device)
        known = self.pruned.perplexity
        if len(known) > 1 and length == self.seqlen and len(self.checked) == PERPLEXITY_WINDOWS:
            before, after = known[0].value, known[-1].value
            self.record.perplexity += [
                Step(after="the whole model", value=before),
                Step(after="plain removal", value=after),
            ]
        else:
            self.note("the whole model", self.dense)
            self.note("plain removal", self.program)

    @property
    def _warm(self) -> bool:
        """Whether the closed form comes first.

        Training that sees millions of tokens ends better without it: what fits the few tokens of
        the closed form exactly is a worse place to start from than the dense model's own weights.
        """
        warm_start = self.options.warm_start
        if isinstance(warm_start, PerDevice):
            return warm_start.on(self.device) or self.schedule.steps == 0
        return warm_start

    def _warm_start(self, data: DistillationData) -> None:
        started, until = here().clock(), None
        tokens = WARM_TOKENS.on(self.device)
        left = self.left()
        alone = self.schedule.steps == 0
        if left is not None and not alone:
            # What is left of the seconds is for training.
            until = started + WARM_SHARE * left
            data.targets.rows(range(len(data.ids) - data.held_out, len(data.ids)))
            speed = self.checked.numel() / max(here().clock() - started, 1e-9)
            tokens = min(
                tokens,
                int(WARM_SHARE * left * speed / WARM_RUNS),
                WARM_TOKENS_PER_FEATURE * self._widest(),
            )
        if tokens < WARM_LEAST:
            self.skipped.append(
                Skip("warm start", f"there is time for {tokens} tokens, fewer than {WARM_LEAST}")
            )
            return
        windows = pick(self.windows, max(2, tokens // self.seqlen), self.context.seed)
        solved = self.program.copy()
        reconstructions, skipped = reconstruct_behind_cuts(
            solved, self.dense, windows, cuts_only=not alone,
            device=self.device, until=until, progress=self.context.progress,
        )  # fmt: skip
        self.skipped += [Skip(where, reason) for where, reason in skipped]
        self.record.reconstructions = reconstructions
        self.clock("warm start", started)
        (*_, before) = self.record.perplexity
        after = self.note("warm start", solved)
        if before.value is None or after < before.value:
            self.program = solved
        else:
            self.skipped.append(
                Skip(
                    "warm start",
                    f"held-out perplexity is {after:.4g} with it and {before.value:.4g} without: "
                    "it is left out",
                )
            )

    def _widest(self) -> int:
        """Return the number of features of the widest projection of any block."""
        program = self.program
        calls = [program.calls[block.position] for block in find_blocks(program)]
        names = {name for call in calls for name in call.weights.values()}
        shapes = [program.weights[name].shape for name in names]
        return max((shape[1] for shape in shapes if len(shape) == 2), default=0)

    def _local(self, ids: Tensor) -> None:
        groups = self._groups()
        blocks = find_blocks(self.program)
        for number, (first, stop) in enumerate(groups):
            stage = f"group {number + 1} of {len(groups)}"
            if stage in self.done:
                continue
            started = here().clock()
            calls = [self.program.calls[block.position] for block in blocks[first:stop]]
            targets = self.hidden_states(self.dense, ids, self._behind(calls[-1]))
            entry = None
            if first:
                entry = self.hidden_states(self.program.copy(), ids, blocks[first - 1].position)
            last = stop == len(blocks)
            left, share = self.left(), len(groups) - number
            schedule = replace(
                self.schedule,
                seconds=None if left is None else left / share,
                steps=None if self.schedule.steps is None else self.schedule.steps // len(groups),
            )
            tuned = self.tune(
                self.program,
                self.parametrisations(self.program, calls),
                blocks[first].position,
                blocks[stop - 1].position + 1,
                DistillationData(ids, targets, entry, held_out=len(self.checked)),
                LogitObjective() if last else HiddenStateObjective(relative_mse),
                schedule,
                stage,
            )
            self.clock("training", started)
            self.record.training.append(TrainedPart.of(f"blocks {first} to {stop - 1}", tuned))
            self.checkpoint(stage)

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

        count, size = len(find_blocks(self.program)), self.options.group
        starts = range(self._in_front_of_cut(), count - size, size)
        return [*((start, start + size) for start in starts), (max(count - size, 0), count)]

    def _in_front_of_cut(self) -> int:
        """Return the block in front of the first cut, which is the nearest to what is missing."""

        def named(program: Program) -> list[tuple[str, str]]:
            # A block that lost a part of its own runs another function.
            return [
                (block_name(program, block), program.calls[block.position].function)
                for block in find_blocks(program)
            ]

        kept, whole = named(self.program), named(self.dense)
        pairs = zip(kept, whole, strict=False)
        changed = (index for index, (a, b) in enumerate(pairs) if a != b)
        return max(next(changed, len(kept) - 1) - 1, 0)

    def _published(self) -> None:
        pruning = self._pruning()
        removed = self._removed()
        if not self.done:
            self.program = self.dense.copy()
        names = [block_name(self.dense, block) for block in find_blocks(self.dense)]
        chooser = None if pruning.remove else Chooser.of(pruning, self.dense, self.context)
        for number in range(len(self.record.order), len(removed)):
            here = [block_name(self.program, block) for block in find_blocks(self.program)]
            if chooser is None:
                place = here.index(removed[number])
            else:
                place = chooser.lowest(self.program).block
            what = f"fusing {here[place]}"
            schedule = self._part(len(removed) - number)
            pruned, tuned = self._fuse_one(place, what, schedule, self.options.donor)
            if self.options.ablations and not number:
                self._compare(place, what, schedule, pruned, tuned)
            self.program = pruned
            self.record.training.append(TrainedPart.of(what, tuned))
            self.record.order.append(names.index(here[place]))
            self.note(what, self.program)
            self.checkpoint(what)

    def _compare(
        self, place: int, what: str, schedule: Schedule, pruned: Program, tuned: TrainingResult
    ) -> None:
        """Fuse a block by every other donor too, and put what came of each into the report."""
        started = here().clock()
        fused: dict[Donor, tuple[Program, TrainingResult]] = {self.options.donor: (pruned, tuned)}
        for donor in get_args(Donor):
            if donor not in fused:
                named = f"{what} with donor={donor}"
                fused[donor] = self._fuse_one(place, named, schedule, donor)
        self.record.ablations = [
            Ablation(
                donor=donor,
                loss=min(loss for _, loss in tuned.checks),
                perplexity=self.perplexity(program),
            )
            for donor, (program, tuned) in fused.items()
        ]
        self.clock("ablations", started)
        # What serves the report alone takes nothing from the other blocks.
        self.started += here().clock() - started

    def _removed(self) -> list[str]:
        """Return the names of the blocks that were removed, in the order of removal."""
        removed = self.pruned.removed
        names = {block_name(self.dense, block) for block in find_blocks(self.dense)}
        for name in removed:
            if name not in names:  # of a snapshot that is damaged
                raise PassError(
                    f"prune-blocks says that it removed {shown(name)}, and the model has no such "
                    "block.",
                    "Leave --resume out.",
                )
        return removed

    def _pruning(self) -> PruneBlocks:
        """Return the options of the pass that pruned, which removed whole blocks."""
        if self.pruning.part != "block":
            raise PassError(
                "mode=published fuses whole blocks, and prune-blocks removed "
                f"part={self.pruning.part}.",
                "Use mode=distil, or prune-blocks with part=block.",
            )
        return self.pruning

    def _part(self, share: int) -> Schedule:
        """Return the schedule of the next of `share` fusions."""
        left, steps = self.left(), self.schedule.steps
        if steps is not None:
            done = sum(trained.steps for trained in self.record.training)
            steps = (steps - done) // share
        seconds = None if left is None else left / share
        return replace(self.schedule, warmup=0.0, seconds=seconds, steps=steps)

    def _fuse_one(
        self, place: int, what: str, schedule: Schedule, donor: Donor
    ) -> tuple[Program, TrainingResult]:
        """Return the program without a block, which is fused into its neighbours."""
        program = self.program
        blocks = find_blocks(program)
        first, last = group_of(place, self.options.group - 1, len(blocks))
        calls = [program.calls[block.position] for block in blocks]
        gone = calls[place]
        require_equal(program, calls[first : last + 1])
        ids = torch.cat([self.windows, self.checked])
        targets = self.hidden_states(program, ids, blocks[last].position)
        entry = self.hidden_states(program, ids, blocks[first - 1].position) if first else None
        pruned = program.copy()
        remove_blocks(pruned, [place])
        neighbours = [call for i, call in enumerate(calls[first : last + 1], first) if i != place]
        generator = torch.Generator().manual_seed(self.context.seed)
        parametrisations: dict[str, Parametrisation] = {}
        for call in neighbours:
            for slot, name in call.weights.items():
                weight = program.weights[name]
                if weight.constant or name in parametrisations:
                    continue
                value = weight.load(torch.float32).to(self.device)
                if value.dim() != 2:
                    parametrisations[name] = FullParametrisation(value, PUBLISHED_OTHERS)
                    continue
                given = program.weights[gone.weights[slot]].load(torch.float32)
                parametrisations[name] = Injection(
                    value, donation(donor, value, given.to(self.device), generator),
                    self.options.rank, generator,
                )  # fmt: skip
        after = find_blocks(pruned)
        started = here().clock()
        tuned = self.tune(
            pruned, parametrisations, after[first].position, after[last - 1].position + 1,
            DistillationData(ids, targets, entry, held_out=len(self.checked)),
            HiddenStateObjective(batch_kl, additive=False), schedule, what,
        )  # fmt: skip
        if donor == self.options.donor:
            self.clock("training", started)
        return pruned, tuned
