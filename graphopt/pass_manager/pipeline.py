"""Recipes as values: which passes run, in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphopt.errors import PassError, SourceError, UsageError, unknown_name
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.simulated_ranks import as_one_program
from graphopt.ir.graph import Program
from graphopt.ir.ranks import is_sharded
from graphopt.ir.types import DTYPE_NAMES
from graphopt.pass_manager.contract import (
    PROPERTIES,
    Context,
    Pass,
    declared_passes,
    make_pass,
)
from graphopt.pass_manager.probe import PROBE_TEXT
from graphopt.pass_manager.quality import measure_quality
from graphopt.pass_manager.recipe import format_recipe, parse_recipe, read_recipe, recipe_to_yaml
from graphopt.pass_manager.run import OnPass, RecipeRun, checked_record, new_entry
from graphopt.pass_manager.run_options import RunOptions
from graphopt.report.quality import Quality
from graphopt.report.records import (
    CalibrationEntry,
    PassEntry,
    Report,
    SkipEntry,
    block_entries,
    machine,
    versions,
)
from graphopt.sources.windows import TokenText
from graphopt.storage.snapshot import Snapshots
from graphopt.support.boundary import users_pass
from graphopt.support.devices import usable_device
from graphopt.support.measure import Meter
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import here

if TYPE_CHECKING:
    from graphopt.vision.picture_stream import PictureStream

DEFAULT_RECIPE = (
    "canonicalise,common-subexpression-elimination,fold-constants,dead-code-elimination,"
    "insert-kv-cache"
)


@dataclass
class Pipeline:
    """Passes in the order they run.

    Attributes:
        passes: The recipe, as objects.
    """

    passes: list[Pass] = field(default_factory=list)

    def __init__(self, passes: Iterable[Pass | str] = ()) -> None:
        """Take `Pass` objects, or names of passes with all options at their defaults.

        Raises:
            UsageError: A name is unknown.
        """
        self.passes = [make_pass(p, {}) if isinstance(p, str) else p for p in passes]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Return the pipeline of a recipe's text form, such as `canonicalise,insert-kv-cache`.

        Raises:
            UsageError: With the position of what is wrong, or the nearest known name.
        """
        return cls(parse_recipe(text))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Pipeline:
        """Return the pipeline of a recipe file.

        Raises:
            UsageError: The file cannot be read, or its content is wrong.
        """
        return cls(read_recipe(Path(path)))

    @classmethod
    def default(cls) -> Pipeline:
        """Return the pipeline `graphopt compile` runs when none is given."""
        return cls.parse(DEFAULT_RECIPE)

    def within_default(self) -> Pipeline:
        """Return these passes between the default ones, in front of the KV cache.

        Those that need a cache stand behind it, from the first of them on. A recipe that names a
        default pass, or none at all, is returned as it is: who wrote it says where everything goes.
        So `prune-blocks{ratio=0.25}` alone gives a model that decodes with a cache.
        """
        default = Pipeline.default().passes
        names = {item.name for item in default}
        if not self.passes or any(item.name in names for item in self.passes):
            return self
        cached = [
            n
            for n, item in enumerate(self.passes)
            if "kv-cache" in item.requires or item.behind_cache
        ]
        cut = min(cached, default=len(self.passes))
        return Pipeline([*default[:-1], *self.passes[:cut], default[-1], *self.passes[cut:]])

    def __str__(self) -> str:
        return format_recipe(self.passes)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which `from_yaml` reads."""
        return recipe_to_yaml(self.passes)

    def until(self, name: str) -> Pipeline:
        """Return the pipeline up to and with the last pass called `name`.

        Raises:
            UsageError: It is not in the recipe.
        """
        names = [item.name for item in self.passes]
        if name not in names:
            known = declared_passes()
            if name in known:
                raise UsageError(
                    f"The recipe has no pass {name!r} to stop after.",
                    f"It runs {', '.join(names) or 'nothing'}.",
                )
            raise unknown_name("pass", name, known)
        last = len(names) - names[::-1].index(name)
        return Pipeline(self.passes[:last])

    def plan(
        self, program: Program, device: str | torch.device = "cpu"
    ) -> tuple[Program, list[PassEntry]]:
        """Check the recipe on the structure of `program`, reading no weight.

        Passes that need no weights are run on a copy. From the first that reads weights on,
        only prerequisites are checked; what it will change is not known yet.

        Args:
            device: Where the passes would compute, for the defaults of their options.

        Returns:
            The program as far as it is known, and an entry a pass without figures.

        Raises:
            PassError: A prerequisite does not hold, or a pass refuses the program.
        """
        self._check_order(program)
        current, known = program.copy(), True
        context = Context(device=torch.device(device))
        entries: list[PassEntry] = []
        for number, item in enumerate(self.passes):
            entry = new_entry(item, current, context.device)
            entry.verification = "planned"
            if known:
                self._check_properties(item, number, current)
                with users_pass(item.name, type(item).__module__):
                    item.check(current)
            if known and not item.reads_weights:
                with Meter() as meter, users_pass(item.name, type(item).__module__):
                    result = item.run(current, context)
                current = result.program
                entry.matched, entry.changed = result.matched, result.changed
                entry.skipped = [SkipEntry(s.where, s.reason) for s in result.skipped]
                entry.record = checked_record(item, result)
                entry.seconds, entry.peak_bytes = meter.seconds, meter.peak_bytes
            else:
                known = False
            entry.parameters_after = current.parameter_count()
            entries.append(entry)
        return current, entries

    def check(self, program: Program) -> None:
        """Refuse what this recipe can't do to `program`, before any weight is read.

        Raises:
            PassError: A prerequisite does not hold, or a pass refuses the program.
        """
        self.plan(program)

    def run(
        self,
        program: Program,
        options: RunOptions = RunOptions(),
        *,
        work: str | Path | None = None,
        progress: Progress = silent,
        on_pass: OnPass | None = None,
    ) -> tuple[Program, Report]:
        """Run the passes and verify each.

        Of several ranks each runs the passes, which share their text; the first one verifies,
        measures and keeps snapshots.

        Args:
            program: Left as it is; weights are shared with the result.
            work: Folder for snapshots, which the caller deletes when it has used the result;
                None to keep none.
            progress: Told about long work.
            on_pass: Told about every pass when it is done.

        Returns:
            The transformed program, and a report without target and artifact.

        Raises:
            UsageError: `stop_after` names no pass of the recipe.
            PassError: A pass can't run on this program; nothing was read.
            VerifyError: A pass broke the program or changed results beyond the tolerance.
            SourceError: A weight or the text cannot be used.
        """
        pipeline = self.until(options.stop_after) if options.stop_after is not None else self
        calib, seed, bos = options.calib, options.seed, options.bos
        device = usable_device(options.device)
        text = read_text(Path(calib)) if calib is not None else PROBE_TEXT
        pipeline.plan(program, device)
        pipeline._check_values(program)
        tokenizer = Path(program.tokenizer) if program.tokenizer else None
        folder = Path(work) if work is not None else None
        context = Context(
            text, calib is None, tokenizer, device, seed, progress, folder, bos=bos,
            memory=options.memory,
        )  # fmt: skip
        with Meter() as meter:
            stream = _look_at_pictures(program, context, options)
            run = RecipeRun(pipeline.passes, program, context, options.verify, on_pass)
            if options.dump_ir is not None:
                run.dump_to(Path(options.dump_ir))
            if folder is not None:
                settings = f"{seed} {options.verify} {options.device} {bos} {options.memory}"
                salt = f"{versions().get('graphopt')} {settings}\n{text}\n"
                if stream is not None:
                    salt += f"{stream.digest()}\n"
                run.snapshots = Snapshots(folder, program, salt)
                if options.resume:
                    run.restore()
                elif here().first:
                    run.snapshots.clear()
            run.all()
            quality, not_measured = pipeline._quality(program, run, options, device, progress)
        report = Report(
            source=program.source,
            name=program.name,
            recipe=str(pipeline),
            passes=run.entries,
            versions=versions(),
            machine=machine(),
            total_seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            parameters=run.program.parameter_count(),
            dtype=DTYPE_NAMES[run.program.checkpoint_dtype],
            probe=run.probe_entry(),
            windows=run.windows_entry(),
            blocks=block_entries(run.program),
            calibration=CalibrationEntry.of(
                "built-in text" if calib is None else str(calib),
                text,
                0 if context.written is None else context.written.numel(),
                "" if stream is None else str(stream),
            ),
            quality=quality,
            not_measured=not_measured,
        )
        fresh = [entry for entry in run.entries if not entry.resumed]
        report.stages = {
            "passes": sum(entry.seconds for entry in fresh),
            "verify": sum(entry.verify_seconds for entry in fresh),
        }
        if quality is not None:
            report.stages["quality"] = quality.seconds
        return run.program, report

    def _check_values(self, program: Program) -> None:
        """Refuse passes that read weights of a program without any."""
        reading = [item.name for item in self.passes if item.reads_weights]
        if reading and not program.has_values():
            raise PassError(
                f"{program.name} is a config without weights, and {reading[0]} reads them.",
                "Give a model folder, a .gguf file or 'demo'; --dry-run says what would be done.",
            )

    def _quality(
        self,
        source: Program,
        run: RecipeRun,
        options: RunOptions,
        device: torch.device,
        progress: Progress,
    ) -> tuple[Quality | None, str]:
        """Return how source and result compare on a text, or why that was not measured.

        What exact passes made was verified to be equal, so it is measured only on a given text.

        Raises:
            SourceError: A text was given, and it cannot be used.
        """
        pairs = zip(self.passes, run.entries, strict=True)
        lossy = [item for item, entry in pairs if entry.changed and not entry.exact]
        if (not lossy and options.text is None) or not here().first:
            return None, ""
        if not options.verify and options.text is None:
            return None, "verification is off (--no-verify)"
        if not source.has_values():
            return None, "the model has no weights"
        names = [item.name for item in self.passes]
        try:
            quality = measure_quality(
                source, as_one_program(run.program), options.text,
                bos=options.bos, device=device, advice=[item.milder(names) for item in lossy],
                progress=progress,
            )  # fmt: skip
        except SourceError as error:
            if options.text is not None:
                raise
            return None, error.message.rstrip(".")
        return quality, ""

    def _check_order(self, program: Program) -> None:
        """Check prerequisites that name passes."""
        known = declared_passes()
        for number, item in enumerate(self.passes):
            for wanted in item.requires:
                if wanted.lstrip("!") in PROPERTIES:
                    continue
                if wanted not in known:
                    raise PassError(
                        f"Pass {item.name!r} requires {wanted!r}, which is neither a pass nor a "
                        "property of programs."
                    )
                if wanted not in [earlier.name for earlier in self.passes[:number]]:
                    raise PassError(
                        f"Pass {item.name!r} must come after {wanted!r}.",
                        f"Put {wanted!r} before it in the recipe.",
                    )

    def _check_properties(self, item: Pass, number: int, program: Program) -> None:
        """Check prerequisites that name properties of the program `item` gets."""
        if is_sharded(program) and not item.takes_ranks:
            raise PassError(
                f"Pass {item.name!r}, number {number + 1} of the recipe, takes a program on one "
                "device, and this one is split over several.",
                "Put it before 'shard', or begin with the model before it was split.",
            )
        for wanted in item.requires:
            name, negated = wanted.lstrip("!"), wanted.startswith("!")
            holds = PROPERTIES[name](program) if name in PROPERTIES else not negated
            if holds != negated:
                continue
            where = f"number {number + 1} of the recipe"
            if negated:
                raise PassError(
                    f"Pass {item.name!r}, {where}, needs a program without {name}.",
                    f"Move it before the pass that makes it, or begin with a model without {name}.",
                )
            raise PassError(
                f"Pass {item.name!r}, {where}, needs a program with {name}.",
                f"Move it behind the pass that makes it, or begin with a model with {name}.",
            )


def _look_at_pictures(
    program: Program, context: Context, options: RunOptions
) -> PictureStream | None:
    """Put the calibration pictures of a run into its context; return them, None without any."""
    if options.calib_images is None:
        return None
    from graphopt.vision.picture_stream import calibration_rows, picture_stream
    from graphopt.vision.processor import Processor

    rows = calibration_rows(Path(options.calib_images))
    text = None
    if not context.built_in:
        text = TokenText.of(Processor(program).tokenizer, context.text, context.bos)
    stream = picture_stream(program, rows, text, context.device, context.progress)
    context.encoded, context.built_in = stream.text, False
    context.picture_rows, context.picture_tokens = stream.rows, stream.places
    return stream
