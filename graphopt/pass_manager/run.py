"""One run of a recipe: passes in order, each verified, with snapshots to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from graphopt.errors import PassError, SourceError, VerifyError
from graphopt.execute.simulated_ranks import as_one_program
from graphopt.ir.graph import Program
from graphopt.ir.imprint import Imprint
from graphopt.ir.picture_table import with_picture_rows, without_picture_rows
from graphopt.ir.printer import print_program
from graphopt.ir.verify import verify as verify_structure
from graphopt.ir.weights import Producer
from graphopt.pass_manager.agreement import agree
from graphopt.pass_manager.claims import check_claims
from graphopt.pass_manager.contract import (
    Context,
    Earlier,
    Pass,
    PassResult,
    Skip,
)
from graphopt.pass_manager.lockstep import compare_calls
from graphopt.pass_manager.numbering import same_outputs
from graphopt.pass_manager.recipe import format_recipe
from graphopt.pass_manager.verification import (
    Difference,
    Measured,
    Probe,
    compare,
    jumps,
    make_probe,
    measure,
)
from graphopt.report.record import Record, finite_or_none
from graphopt.report.records import (
    PassEntry,
    SavedFigures,
    SkipEntry,
)
from graphopt.storage.snapshot import Snapshots
from graphopt.support.boundary import users_pass
from graphopt.support.inputs import parse
from graphopt.support.measure import Meter
from graphopt.support.ranks import here

OnPass: TypeAlias = Callable[[PassEntry], None]


def new_entry(item: Pass, program: Program, device: torch.device) -> PassEntry:
    """Return the entry of a pass that has not run: its options on a device, and the sizes."""
    options = item.values(device)
    count = program.parameter_count()
    return PassEntry(
        item.name, options, item.exact, parameters_before=count, parameters_after=count
    )


def checked_record(item: Pass, result: PassResult) -> Record | None:
    """Return what a pass told.

    Raises:
        PassError: It is of another type than the pass declares.
    """
    declared = item.record
    if not isinstance(result.record, declared or type(None)):
        raise PassError(
            f"Pass {item.name!r} returned a {type(result.record).__name__} as its record, and "
            f"declares {declared.__name__ if declared is not None else 'none'}.",
            "This is a bug in the pass: `record` must name the type of what `run` returns.",
        )
    return result.record


_MOST_NAMED = 4


def _wrong_pass(item: Pass, imprint: Imprint, after: Program) -> str:
    """Return what to do about an exact pass that changed results, and where its error may lie."""
    names = imprint.changed_weights(after)
    shown = ", ".join(map(repr, names[:_MOST_NAMED]))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    weights = f"it put other values in {shown}{more}" if names else "no weight has another value"
    return (
        f"Leave {item.name!r} out of the recipe; --no-verify would keep the error. To its "
        f"developer: {weights}; --dump-ir FOLDER writes the program before and after it."
    )


class RecipeRun:
    """One run of a recipe: the program as it stands, and what verification knows of it."""

    def __init__(
        self,
        passes: Sequence[Pass],
        program: Program,
        context: Context,
        verify: bool,
        on_pass: OnPass | None,
    ) -> None:
        self.passes = passes
        self.source = self.program = program
        self.context = context
        self.verify = verify
        self.on_pass = on_pass
        self.entries: list[PassEntry] = []
        self.snapshots: Snapshots | None = None
        self._dump: Path | None = None
        self._probe: Probe | None = None
        # What a snapshot that was taken up says of the probe and of the windows.
        self._figures: dict[str, Any] = {}
        # What exact passes are held to, and what the program as it stands gives.
        self._reference: Measured | None = None
        self._latest: Measured | None = None
        self._picture_tables: dict[int, Producer] = {}

    def dump_to(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._dump = folder
        self._write_dump("00-capture", self.program)

    def _write_dump(self, name: str, program: Program) -> None:
        if self._dump is not None and here().first:
            text = print_program(program) + "\n"
            (self._dump / f"{name}.txt").write_text(text, encoding="utf-8")

    def _prefix(self, count: int) -> str:
        return format_recipe(self.passes[:count])

    def restore(self) -> None:
        """Go to the latest snapshot of this run, if there is one."""
        assert self.snapshots is not None
        for count in range(len(self.passes), 0, -1):
            # Ranks take up what the first one finds, in a folder that all of them see.
            if not here().made_by_first(partial(self.snapshots.has, self._prefix(count), count)):
                continue
            found = self.snapshots.load(self._prefix(count), count)
            if found is not None:
                self.program, entries, figures = found
                what = "What a snapshot keeps of the report"
                kept = parse(SavedFigures, figures, what, remedy="Leave --resume out.")
                self._figures = kept.model_dump()
                self.entries = self._entries_of(count, entries)
                self._restore_context()
                for entry in self.entries:
                    entry.resumed = True
                    if self.on_pass is not None:
                        self.on_pass(entry)
                return

    def _entries_of(self, count: int, saved: list[dict[str, Any]]) -> list[PassEntry]:
        """Return the entries of the first `count` passes, as a snapshot holds them.

        Raises:
            SourceError: They are of other passes, or hold what these do not tell.
        """
        passes = self.passes[:count]
        names = [item.name for item in passes]
        if [entry.get("name") for entry in saved] != names:
            raise SourceError(
                f"A snapshot after {', '.join(names)} holds the entries of other passes.",
                "Leave --resume out.",
            )
        return [
            PassEntry.from_json(entry, item.record)
            for item, entry in zip(passes, saved, strict=True)
        ]

    def _restore_context(self) -> None:
        """Put what later passes learn of the restored ones into the context."""
        assert self.snapshots is not None
        for number, entry in enumerate(self.entries):
            self.context.earlier.append(Earlier(self.passes[number], entry.record))
            if not entry.exact and self.context.dense is None:
                kept = self.snapshots.load(self._prefix(number), number) if number else None
                dense = kept[0] if kept is not None else self.source.copy()
                self.context.dense = self._with_pictures(dense)

    def _with_pictures(self, program: Program) -> Program:
        """Return a program that looks up the tokens of calibration pictures too, if any."""
        rows, tokens = self.context.picture_rows, self.context.picture_tokens
        if rows is None:
            return program
        return with_picture_rows(program, rows, tokens, self._picture_tables)

    def all(self) -> None:
        """Run what is left of the recipe."""
        for number in range(len(self.entries), len(self.passes)):
            entry = self._one(self.passes[number])
            self.entries.append(entry)
            self._write_dump(f"{number + 1:02d}-{entry.name}", self.program)
            if self.snapshots is not None and here().first:
                saved = [done.to_json() for done in self.entries]
                figures = {"probe": self.probe_entry(), "windows": self.windows_entry()}
                prefix = self._prefix(number + 1)
                self.snapshots.save(self.program, prefix, number + 1, saved, figures)
            if self.on_pass is not None:
                self.on_pass(entry)

    def _one(self, item: Pass) -> PassEntry:
        before, ranks = self.program, here()
        # What the pass is given, and held to: the program, with pictures if it is to learn.
        learns = item.reads_weights and not item.exact
        given = self._with_pictures(before) if learns else before
        imprint = Imprint(given)
        entry = new_entry(item, before, self.context.device)
        self.context.progress(item.name, 0, 1)
        if self.snapshots is not None:
            self.context.origin = self.snapshots.key(self._prefix(len(self.entries)))
        with Meter() as meter, users_pass(item.name, type(item).__module__):
            item.check(before)
            if not item.exact and self.context.dense is None:
                self.context.dense = self._with_pictures(before)
            result = item.run(given.copy(), self.context)
            after = result.program
            if given is not before:
                after = without_picture_rows(after, before)
        entry.seconds, entry.peak_bytes = meter.seconds, meter.peak_bytes
        rounded = agree(ranks, item.name, before, after) if result.changed else []
        if rounded:
            reason = "ranks had rounded it differently: the first one's numbers are taken"
            result.skipped += [Skip(name, reason) for name in rounded]
        entry.matched, entry.changed = result.matched, result.changed
        entry.skipped = [SkipEntry(skip.where, skip.reason) for skip in result.skipped]
        entry.record = checked_record(item, result)
        entry.parameters_after = after.parameter_count()
        self.context.earlier.append(Earlier(item, entry.record))
        self.context.progress(item.name, 1, 1)
        with Meter() as meter:
            try:
                verify_structure(after)
            except VerifyError as error:
                raise VerifyError(
                    f"Pass {item.name!r} made a malformed program: {error.message}",
                    f"Leave {item.name!r} out of the recipe; this is a bug in the pass.",
                ) from error
            if not ranks.first:  # which verifies for all, and ends all by what it finds
                self.program = after
                return entry
            check_claims(item, result, imprint, given)
            if result.changed == 0:
                entry.verification = "unchanged"
                self._latest = self._latest or self._reference
                if self._latest is not None:
                    self._fill_unchanged(entry, self._latest)
            elif self.verify:
                self._verify_numbers(item, before, after, entry, imprint)
        entry.verify_seconds = meter.seconds
        self.program = after
        return entry

    @staticmethod
    def _fill_unchanged(entry: PassEntry, measured: Measured) -> None:
        """An equal program has equal results, and they are known."""
        entry.perplexity_before = entry.perplexity_after = finite_or_none(measured.perplexity)

    def _verify_numbers(
        self, item: Pass, before: Program, after: Program, entry: PassEntry, imprint: Imprint
    ) -> None:
        # The programs of all ranks in lockstep stand for one that is split.
        before, after = as_one_program(before), as_one_program(after)
        if item.exact and same_outputs(before, after):
            entry.verification = "proved"
            if self._latest is not None:
                self._fill_unchanged(entry, self._latest)
            return
        if not before.has_values() or not after.has_values():
            entry.verification = "no weights to verify with"
            return
        if item.exact:
            self._verify_exact(item, before, after, entry, imprint)
        else:
            self._measure_loss(item, before, after, entry)

    def _verify_exact(
        self, item: Pass, before: Program, after: Program, entry: PassEntry, imprint: Imprint
    ) -> None:
        """Hold what the pass changed to fp64, call by call, and the whole program to fp32."""
        self.context.progress(f"comparing {item.name}", 0, 1)
        comparison = compare_calls(
            before, after, device=self.context.device, seed=self.context.seed
        )
        self.context.progress(f"comparing {item.name}", 1, 1)
        entry.not_run = comparison.not_run
        changed = f"Pass {item.name!r} is exact but changed results: {comparison.error}."
        same_whole = same_outputs(before, after, without_past=True)
        try:
            latest, measured = self._measure_both(before, after, f"verify {item.name}", same_whole)
        except (RuntimeError, IndexError, ValueError, AssertionError) as failure:
            if comparison.error is None:
                raise
            raise VerifyError(changed, _wrong_pass(item, imprint, after)) from failure
        self._reference = self._reference or latest
        difference = compare(self._reference, measured)
        if not difference.within_tolerance and comparison.error is None and jumps(before):
            # In fp32 roundings alone may have done that; in fp64 they cannot.
            assert self._probe is not None
            difference = compare(
                *measure(
                    [before, after],
                    self._probe,
                    dtype=torch.float64,
                    device=self.context.device,
                    progress=self.context.progress,
                    what=f"verify {item.name}",
                )
            )
        self._fill(entry, difference, latest, measured)
        entry.tolerance = difference.tolerance
        because = "" if comparison.error is None else f": {comparison.error}"
        if not difference.within_tolerance:
            raise VerifyError(
                f"Pass {item.name!r} is exact but moved the logits by "
                f"{difference.max_abs_logit_delta:.3g}, more than {difference.tolerance:.3g} "
                f"(1e-4 of the largest logit){because}.",
                _wrong_pass(item, imprint, after),
            )
        if comparison.error is not None:
            raise VerifyError(changed, _wrong_pass(item, imprint, after))
        entry.verification = "passed"
        self._latest = measured

    def _measure_loss(self, item: Pass, before: Program, after: Program, entry: PassEntry) -> None:
        latest, measured = self._measure_both(before, after, f"measure {item.name}")
        self._fill(entry, compare(latest, measured), latest, measured)
        if entry.max_abs_logit_delta is None:
            raise VerifyError(
                f"Pass {item.name!r} made logits that are not finite.",
                "Give it milder options, or leave it out of the recipe.",
            )
        entry.verification = "measured"
        # From here on, exact passes are held to what this one made.
        self._reference = self._latest = measured

    @staticmethod
    def _fill(entry: PassEntry, difference: Difference, before: Measured, after: Measured) -> None:
        entry.max_abs_logit_delta = finite_or_none(difference.max_abs_logit_delta)
        entry.kl = finite_or_none(difference.kl)
        entry.perplexity_before = finite_or_none(before.perplexity)
        entry.perplexity_after = finite_or_none(after.perplexity)

    def _measure_both(
        self, before: Program, after: Program, what: str, same_whole: bool = False
    ) -> tuple[Measured, Measured]:
        """Run the probe through both programs, as far as it is not known what they give.

        Args:
            same_whole: Whether both are proved to give the same for texts that are run whole.
        """
        context = self.context
        if self._probe is None:
            self._probe = make_probe(
                before, context.text, context.tokenizer, context.seed, context.bos
            )
        programs = [after] if self._latest is not None else [before, after]
        *first, measured = measure(
            programs,
            self._probe,
            steps_alone=same_whole,
            device=context.device,
            progress=context.progress,
            what=what,
        )
        latest = self._latest or first[0]
        if same_whole:
            measured = replace(latest, continued=measured.continued)
        return latest, measured

    def probe_entry(self) -> dict[str, Any] | None:
        if self._probe is None:
            return self._figures.get("probe")
        probe = self._probe
        return {"tokens": probe.tokens, "is_text": probe.is_text, "note": probe.note}

    def windows_entry(self) -> dict[str, Any] | None:
        """Return how windows of text began, if any were cut."""
        begin = self.context.begin
        if begin is None and self._probe is not None and self._probe.is_text:
            begin = self._probe.begin
        if begin is None:
            return self._figures.get("windows")
        return {"bos": self.context.bos, "begin": list(begin)}
