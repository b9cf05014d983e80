"""Which forms of a program are written, in which dtype, and the folder that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoweringError, UsageError, unknown_name
from graphopt.ir.dtypes import AUTO, STORED_DTYPES, with_weights_in
from graphopt.ir.graph import Program
from graphopt.ir.printer import print_program
from graphopt.lowering import get_emitter
from graphopt.lowering.base import Emitted, Emitter, check_placements
from graphopt.lowering.gguf_types import GGUF_TYPES
from graphopt.lowering.onnx_accuracy import ACCURACY_LEVELS, EXACT, ROUNDING
from graphopt.lowering.sizes import (
    about_decoded_codes,
    in_order,
    planned_sizes,
    program_size,
    size_of_rest,
    written_size,
)
from graphopt.pass_manager.forecast import forecast_recipe, reading_seconds
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.pass_manager.run import OnPass
from graphopt.pass_manager.run_options import RunOptions
from graphopt.report.records import Estimate, FormSize, PassEntry, SkipEntry, versions
from graphopt.storage.artifact import save_program
from graphopt.storage.licence import write_licence
from graphopt.storage.shared_weights import readable_by_name
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.measure import peak_rss
from graphopt.support.progress import Progress, silent
from graphopt.targets import get_target

MANIFEST_VERSION = 1

WRITTEN_BYTES = 300e6
"""Bytes that a disk takes in a second, about."""

HELD_TENSORS = 3
"""Tensors that are in memory at once while weights are streamed: two that are read side by side,
and one in another layout. Verification has another two."""


def default_emit(target: str) -> tuple[str, ...]:
    """Return what is emitted for a target where nothing is named.

    Raises:
        UsageError: There is no such target.
    """
    return ("onnx",) if get_target(target).kind == "cpu" else ("torch",)


@dataclass
class Emission:
    """Which emitters write for which target; checked before any weight is read.

    Attributes:
        dtype: In which trained weights are stored; None for what the program holds, or what a
            package computes in.
    """

    target: str
    emitters: list[Emitter]
    strict: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        target: str,
        names: Sequence[str] | None,
        strict: bool,
        onnx_moe: bool,
        dtype: str = AUTO,
        *,
        onnx_policy_op: bool = False,
        onnx_accuracy: int = EXACT,
        gguf_type: str = AUTO,
    ) -> Emission:
        usual = default_emit(target)  # refuses an unknown target, whatever is named
        names = usual if names is None else names
        if not names:
            raise UsageError("Nothing to emit.", "Name at least one of onnx, torch, hf, gguf.")
        for option, given in (("--onnx-moe", onnx_moe), ("--onnx-policy-op", onnx_policy_op)):
            if given and "onnx" not in names:
                raise UsageError(
                    f"{option} is for the ONNX form, and what is emitted is {', '.join(names)}.",
                    "Leave it out, or name onnx after --emit as well.",
                )
        if onnx_accuracy not in ACCURACY_LEVELS:
            raise UsageError(
                f"--onnx-accuracy {onnx_accuracy} is none of MatMulNBits' levels that are written.",
                f"Give {EXACT} for products in fp32, or {ROUNDING} for products of integers.",
            )
        if onnx_accuracy != EXACT and "onnx" not in names:
            raise UsageError(
                f"--onnx-accuracy is for the ONNX form, and what is emitted is {', '.join(names)}.",
                "Leave it out, or name onnx after --emit as well.",
            )
        if gguf_type != AUTO and "gguf" not in names:
            raise UsageError(
                f"--gguf-type is for the GGUF form, and what is emitted is {', '.join(names)}.",
                "Leave it out, or name gguf after --emit as well.",
            )
        if gguf_type != AUTO and gguf_type not in GGUF_TYPES:
            raise unknown_name("GGUF type", gguf_type, [AUTO, *GGUF_TYPES])
        if dtype != AUTO and dtype not in STORED_DTYPES:
            raise unknown_name("dtype", dtype, [AUTO, *STORED_DTYPES])
        # A checkpoint has the layout that the torch form reads, and its file is nobody else's.
        shared = "torch" in names and "hf" not in names
        options: dict[str, dict[str, Any]] = {
            "onnx": {
                "moe": onnx_moe,
                "policy_op": onnx_policy_op,
                "shared": shared,
                "accuracy_level": onnx_accuracy,
            },
            "torch": {"in_compute_dtype": dtype == AUTO},
            "gguf": {"type": gguf_type},
        }
        unique = list(dict.fromkeys(names))
        emitters = [get_emitter(name, **options.get(name, {})) for name in unique]
        return cls(target, emitters, strict, STORED_DTYPES.get(dtype))

    def rounded(self, program: Program) -> Program:
        """Return the program with weights of the dtype in which they are stored."""
        return program if self.dtype is None else with_weights_in(program, self.dtype)

    def sizes(self, program: Program) -> list[FormSize]:
        """Return about how much room each form will take; no weight is read.

        The last entry is of the weights that the folder holds beside its forms, if it does.
        """
        sizes = planned_sizes(self.emitters, program, self.target)
        rest = program_size(self.emitters, program, self.target)
        return sizes if rest is None else [*sizes, rest]

    def estimate(
        self, program: Program, recipe: Pipeline, device: torch.device, *, verify: bool
    ) -> Estimate:
        """Return what passes and emission will do and take; no weight is read.

        Args:
            program: As it was captured.
            verify: Whether passes are verified.
        """
        expected = forecast_recipe(recipe.passes, program, device, verify=verify)
        forms = self.sizes(self.rounded(expected.program))
        reading = reading_seconds(expected.program)
        writing = sum(form.bytes for form in forms) / WRITTEN_BYTES
        seconds = expected.seconds | {
            "emit": reading * sum(form.bytes > form.shared_bytes for form in forms) + writing
        }
        largest = max((weight.numel for weight in expected.program.used_weights()), default=0)
        held = HELD_TENSORS + 2 * bool(expected.seconds["verify"])
        peak = peak_rss() + max(expected.memory, 4 * held * largest)
        return Estimate(seconds, peak, forms, expected.passes)

    def check(self, program: Program) -> None:
        for emitter in self.emitters:
            check_placements(program, ranks=emitter.for_ranks)
            emitter.check(program, self.target)
            if self.strict:
                self._refuse(emitter.fallbacks(program, self.target))

    def lower(
        self,
        program: Program,
        options: RunOptions,
        *,
        progress: Progress = silent,
        on_pass: OnPass | None = None,
    ) -> tuple[list[PassEntry], dict[str, float]]:
        """Run the passes of every emitter through a pipeline; return their entries and stages.

        The program is left as it is: what is saved is not what a target's kernels need.

        Args:
            options: As for the passes of the recipe. A subfolder `lowering-EMITTER` of `dump_ir`
                gets the programs as text.

        Raises:
            VerifyError: A pass broke the program or changed results beyond the tolerance.
        """
        entries: list[PassEntry] = []
        stages: dict[str, float] = {}
        dumps = options.dump_ir
        for emitter in self.emitters:
            passes = emitter.passes(self.target)
            if not passes:
                continue
            dump = None if dumps is None else Path(dumps) / f"lowering-{emitter.name}"
            _, report = Pipeline(passes).run(
                program,
                replace(options, dump_ir=dump, stop_after=None, resume=False),
                progress=progress,
                on_pass=on_pass,
            )
            entries += report.passes
            for stage, seconds in report.stages.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        return entries, stages

    @staticmethod
    def _refuse(fallbacks: list[tuple[str, str]]) -> None:
        for where, reason in fallbacks:
            raise LoweringError(
                f"{where}: {reason}", "Leave --strict out to go on without what is missing."
            )

    def write(
        self, program: Program, root: Path, recipe: str, progress: Progress
    ) -> tuple[list[str], list[SkipEntry], list[FormSize]]:
        """Write all but the report under `root`; return usage lines, notes and sizes."""
        made: dict[str, Emitted] = {}
        storage: dict[str, StoredWeight] = {}
        by_name: dict[str, StoredWeight] = {}
        for emitter in in_order(self.emitters):
            emitted = emitter.emit(program, root, self.target, progress, by_name)
            write_licence(program, root / emitter.name)
            if self.strict:
                self._refuse(emitted.fallbacks)
            made[emitter.name] = emitted
            for name, stored in emitted.storage.items():
                if readable_by_name(stored):
                    by_name.setdefault(name, stored)
                # The folder is opened again with the most exact values in it.
                if name not in storage or storage[name].dtype.itemsize < stored.dtype.itemsize:
                    storage[name] = stored
        usage: list[str] = []
        notes: list[SkipEntry] = []
        sizes: list[FormSize] = []
        for emitter in self.emitters:
            emitted = made[emitter.name]
            usage += emitted.usage
            notes += [
                SkipEntry(where, reason) for where, reason in emitted.notes + emitted.fallbacks
            ]
            sizes.append(written_size(emitter, emitted, program, self.target))
            blind = None if program.vision is None else emitter.without_pictures(program)
            notes += [] if blind is None else [SkipEntry(emitter.name, blind)]
        told = about_decoded_codes(program, sizes) if self.dtype is None else None
        notes += [SkipEntry("weights", told)] if told is not None else []
        rest = size_of_rest(program, storage)
        sizes += [rest] if rest is not None else []
        save_program(program, root, storage)
        write_licence(program, root)
        (root / "program.txt").write_text(print_program(program) + "\n", encoding="utf-8")
        (root / "recipe.yaml").write_text(recipe, encoding="utf-8")
        manifest = {
            "format": "graphopt-artifact",
            "version": MANIFEST_VERSION,
            "name": program.name,
            "source": program.source,
            "licence": program.licence,
            "target": self.target,
            "emit": [emitter.name for emitter in self.emitters],
            "versions": versions(),
            "files": {
                path.relative_to(root).as_posix(): path.stat().st_size for path in files_under(root)
            },
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (root / "manifest.json").write_text(text, encoding="utf-8")
        return usage, notes, sizes


def files_under(root: Path) -> list[Path]:
    """Return every file in a folder and those below it, in order."""
    return sorted(path for path in root.rglob("*") if path.is_file())
