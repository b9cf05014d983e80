"""The report of a compile: `report.json`, which is a contract (docs/report.md), and its page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pydantic

from graphopt.ir.graph import Program
from graphopt.ir.types import DTYPE_NAMES, B, P, S
from graphopt.report.breakdown import breakdown, evaluate_cost
from graphopt.report.fits import FitEntry
from graphopt.report.quality import Quality, Verdict, judge
from graphopt.report.record import Record
from graphopt.support.inputs import Schema, Size, parse, parse_entry
from graphopt.support.plain import shown
from graphopt.support.quantities import format_bytes

VERSION = 2
"""Version 1 had null for options left at a default that depends on the device."""

SIZES = {B: 1, S: 128, P: 0}
"""The sizes for which FLOPs by part are counted: one prompt of 128 tokens."""

_PACKAGES = ("graphopt", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")


@dataclass
class SkipEntry:
    """A place a pass left alone."""

    where: str
    reason: str


@dataclass
class PassEntry:
    """What one pass did; figures are measured in this run or None.

    Attributes:
        verification: `proved` (exact: the same expressions as before, nothing to run), `passed`
            (exact, within tolerance), `measured` (lossy), `unchanged` (the program is as it was),
            `off`, or why there was none.
        not_run: What of an exact pass's changes was not compared in fp64, and why.
        tolerance: What `max_abs_logit_delta` had to stay within; None for a lossy pass.
        seconds, peak_bytes: How long the pass itself took, and its peak memory.
        verify_seconds: How long its verification took.
        resumed: It ran before an interruption, and its result was taken from there.
    """

    name: str
    options: dict[str, Any]
    exact: bool
    matched: int = 0
    changed: int = 0
    skipped: list[SkipEntry] = field(default_factory=list)
    record: Record | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    verification: str = "off"
    max_abs_logit_delta: float | None = None
    tolerance: float | None = None
    kl: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    seconds: float = 0.0
    verify_seconds: float = 0.0
    peak_bytes: int = 0
    resumed: bool = False
    not_run: list[str] = field(default_factory=list)

    def perplexity_times(self) -> float | None:
        """Return the probe's perplexity after a lossy pass, times that before it; else None."""
        if self.verification != "measured" or not self.perplexity_before:
            return None
        after = self.perplexity_after
        return None if after is None else after / self.perplexity_before

    @property
    def idle(self) -> bool:
        """Whether it ran and there is nothing to tell of it."""
        return not (self.changed or self.skipped) and self.verification == "unchanged"

    @property
    def details(self) -> dict[str, Any]:
        """What the pass told, as it stands in `report.json`."""
        return {} if self.record is None else self.record.to_json()

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it stands in `report.json` and in snapshots."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["skipped"] = [dataclasses.asdict(skip) for skip in self.skipped]
        content["record"] = self.details
        return {"details" if name == "record" else name: v for name, v in content.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], record: type[Record] | None) -> PassEntry:
        """Return the entry of a snapshot.

        Args:
            record: What the pass tells.

        Raises:
            SourceError: It is no entry, or its details are no such record.
        """
        again = "Leave --resume out."
        plain = {name: value for name, value in data.items() if name != "details"}
        entry = parse_entry(pydantic.TypeAdapter(cls), plain, "A pass in a snapshot", remedy=again)
        if record is not None:
            where = f"The details of {shown(entry.name)} in a snapshot"
            entry.record = parse(record, data.get("details"), where, remedy=again)
        return entry


class SavedProbe(Schema):
    """What verification ran; see `Report.probe`."""

    tokens: Size
    is_text: bool
    note: str


class SavedWindows(Schema):
    """How windows of text began; see `Report.windows`."""

    bos: str
    begin: list[Size]


class SavedFigures(Schema):
    """What a snapshot keeps of a report beside its passes."""

    probe: SavedProbe | None = None
    windows: SavedWindows | None = None


@dataclass
class CalibrationEntry:
    """The text that verification ran, and that passes measured and learned from.

    Attributes:
        name: Path of the file as it was given, or "built-in text".
        sha256: Of the text, in UTF-8.
        self_generated_tokens: How many tokens the model wrote in its place, for passes that need
            more than the built-in text has.
        pictures: Which pictures passes measured and learned from beside it; "" for none.
    """

    name: str
    sha256: str
    self_generated_tokens: int = 0
    pictures: str = ""

    @classmethod
    def of(
        cls, name: str, text: str, self_generated_tokens: int, pictures: str = ""
    ) -> CalibrationEntry:
        """Return the entry of a text."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(name, digest, self_generated_tokens, pictures)


@dataclass
class FormSize:
    """How much room a form of the model takes.

    Attributes:
        name: The emitter's.
        bytes: Of its own files; in a dry run, of the weights in them.
        dtype: In which most of its trained weights are stored.
        shared_bytes: Of the weights that it reads from the files of other forms.
        shared_files: Those files, relative to the output folder.
    """

    name: str
    bytes: int
    dtype: str
    shared_bytes: int = 0
    shared_files: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return it as a text, such as `269.2 MB, bf16`."""
        text = f"{format_bytes(self.bytes)}, {self.dtype}"
        if not self.shared_bytes:
            return text
        where = ", ".join(self.shared_files) or "another form"
        return f"{text}; reads {format_bytes(self.shared_bytes)} in {where}"


@dataclass
class ArtifactEntry:
    """What a compile wrote.

    Attributes:
        path: The output folder.
        bytes: The size of all files together.
        emit: Names of the emitters.
        usage: Lines that tell how to run it.
        notes: What an emitter could not do, and why.
        forms: The size of each form.
    """

    path: str
    bytes: int
    emit: list[str]
    usage: list[str]
    notes: list[SkipEntry] = field(default_factory=list)
    forms: list[FormSize] = field(default_factory=list)


@dataclass
class ForecastEntry:
    """What a pass that reads weights will do, in words."""

    name: str
    what: str


@dataclass
class Estimate:
    """What a compile will take, in a dry run; nothing of it was measured.

    Attributes:
        seconds: By stage.
        peak_bytes: Of resident memory.
        forms: How much room each form will take.
        passes: What passes will do.
        memory: Bytes of the GPU's memory for which it was asked what fits; None if it was not.
        fits: The largest batches and the longest texts that fit it.
    """

    seconds: dict[str, float]
    peak_bytes: int
    forms: list[FormSize]
    passes: list[ForecastEntry]
    memory: int | None = None
    fits: list[FitEntry] = field(default_factory=list)


@dataclass
class BlockEntry:
    """Parameters and FLOPs of one call of the final program, by part."""

    name: str
    parameters: dict[str, int]
    flops: dict[str, int]


@dataclass
class Report:
    """A whole run.

    Attributes:
        source: What the user named.
        name: Short name of the model.
        target: Name of the target; None where nothing was emitted.
        recipe: Text form of the passes of the recipe.
        passes: Those of the recipe, and behind them those that lowering for the target ran.
        stages: Seconds of `capture`, `passes`, `verify` and `emit`.
        peak_bytes: Most resident memory of the whole run.
        probe: The probe of verification: `tokens`, `is_text`, `note`; None with verification off.
        windows: How windows of text began, for calibration and verification: `bos`, and in
            `begin` the ids; None where no text was used.
        artifact: None where nothing was emitted.
        blocks: Parameters and FLOPs by part, for B=1, S=128, P=0.
        command: What was typed; None where it was no command.
        calibration: The text of verification and calibration; None where nothing was run.
        quality: Source and result on one text, where a pass that is not exact changed something
            or a text was given.
        not_measured: Why there is no `quality` though such a pass changed something.
        licence: What the source states of its licence; "" for nothing.
        licence_files: Names of its licence and notices, which lie in the output folder.
    """

    source: str
    name: str
    recipe: str
    target: str | None = None
    passes: list[PassEntry] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    peak_bytes: int = 0
    parameters: int = 0
    dtype: str = ""
    probe: dict[str, Any] | None = None
    windows: dict[str, Any] | None = None
    artifact: ArtifactEntry | None = None
    blocks: list[BlockEntry] = field(default_factory=list)
    dry_run: bool = False
    command: str | None = None
    calibration: CalibrationEntry | None = None
    quality: Quality | None = None
    not_measured: str = ""
    licence: str = ""
    licence_files: list[str] = field(default_factory=list)
    estimate: Estimate | None = None

    def verdict(self) -> Verdict | None:
        """Return what became of the model's quality; None after a dry run."""
        if self.dry_run:
            return None
        passes, rounded = self._verdict_on_passes(), self._rounded()
        return Verdict(passes.grade, f"{passes.sentence} {rounded}") if rounded else passes

    def _rounded(self) -> str:
        """Return the sentence on forms whose weights have fewer bits than the source's."""
        bits = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
        forms = [] if self.artifact is None else self.artifact.forms
        fewer: dict[str, list[str]] = {}
        for form in forms:
            if form.dtype in bits and bits[form.dtype] < bits.get(self.dtype, 0):
                fewer.setdefault(form.dtype, []).append(form.name)
        if not fewer:
            return ""
        told = ", ".join(f"{dtype} in {' and '.join(names)}" for dtype, names in fewer.items())
        return f"Weights are rounded to {told}, which is not part of these figures."

    def _verdict_on_passes(self) -> Verdict:
        if self.quality is not None:
            return judge(self.quality)
        changed = [entry for entry in self.passes if entry.changed]
        if self.not_measured:
            return Verdict("not measured", f"Not measured: {self.not_measured}.")
        open_ = [e.name for e in changed if e.verification not in ("proved", "passed")]
        if open_:
            names = ", ".join(dict.fromkeys(open_))
            return Verdict(
                "not measured", f"Not measured: nothing was compared before and after {names}."
            )
        ran = [e for e in changed if e.max_abs_logit_delta is not None and e.tolerance]
        if not ran:
            return Verdict("unchanged", "Unchanged: what the passes did is proved to be equal.")
        worst = max(ran, key=lambda e: (e.max_abs_logit_delta or 0.0) / (e.tolerance or 1.0))
        return Verdict(
            "unchanged",
            "Unchanged: every pass is exact, and was verified. No logit moved by more than "
            f"{worst.max_abs_logit_delta:.2g}, where rounding may move one by "
            f"{worst.tolerance:.2g}.",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `report.json`; a figure that is not finite is None there."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["passes"] = [entry.to_json() for entry in self.passes]
        content["blocks"] = [dataclasses.asdict(block) for block in self.blocks]
        for name in ("artifact", "calibration", "estimate"):
            entry = content[name]
            content[name] = None if entry is None else dataclasses.asdict(entry)
        content["quality"] = None if self.quality is None else self.quality.to_json()
        verdict = self.verdict()
        content["verdict"] = None if verdict is None else dataclasses.asdict(verdict)
        finite: dict[str, Any] = _finite({"version": VERSION, **content})
        return finite

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.html` into `folder`."""
        from graphopt.report.page import render

        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        (folder / REPORT_NAME).write_text(text, encoding="utf-8")
        (folder / PAGE_NAME).write_text(render(self), encoding="utf-8")


REPORT_NAME, PAGE_NAME = "report.json", "report.html"


def _finite(value: Any) -> Any:
    """Return JSON data with None for Inf and NaN, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what kind of machine this is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.system(), "processor": platform.machine(), "cores": cores}


def block_entries(program: Program) -> list[BlockEntry]:
    """Return parameters and FLOPs by part of every call, for the sizes in `SIZES`."""
    evaluated: dict[int, dict[str, int]] = {}
    entries: list[BlockEntry] = []
    for block in breakdown(program):
        if id(block.flops) not in evaluated:
            flops = {part: evaluate_cost(cost, SIZES) for part, cost in block.flops.items()}
            evaluated[id(block.flops)] = {part: count for part, count in flops.items() if count}
        entries.append(BlockEntry(block.name, block.parameters, evaluated[id(block.flops)]))
    return entries
