"""The report of a compile: `report.json`, which is a contract (docs/report.md), and its page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pydantic

from graphopt.ir.graph import Program
from graphopt.ir.types import B, P, S
from graphopt.report.breakdown import breakdown, evaluate_cost
from graphopt.report.record import Record
from graphopt.support.inputs import OpenSchema, Schema, Size, parse, parse_entry, read_json
from graphopt.support.plain import shown

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

    def perplexity_change(self) -> str | None:
        """Return the perplexity before and after as a text; None where it was not measured."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        before, after = f"{self.perplexity_before:.2f}", f"{self.perplexity_after:.2f}"
        return after if before == after else f"{before} → {after}"

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
class ArtifactEntry:
    """What a compile wrote.

    Attributes:
        path: The output folder.
        bytes: The size of all files together.
        emit: Names of the emitters.
        usage: Lines that tell how to run it.
        notes: What an emitter could not do, and why.
    """

    path: str
    bytes: int
    emit: list[str]
    usage: list[str]
    notes: list[SkipEntry] = field(default_factory=list)


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

    def to_json(self) -> dict[str, Any]:
        """Return the content of `report.json`; a figure that is not finite is None there."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["passes"] = [entry.to_json() for entry in self.passes]
        content["blocks"] = [dataclasses.asdict(block) for block in self.blocks]
        if self.artifact is not None:
            content["artifact"] = dataclasses.asdict(self.artifact)
        finite: dict[str, Any] = _finite({"version": VERSION, **content})
        return finite

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.html` into `folder`."""
        from graphopt.report.page import render

        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        (folder / REPORT_NAME).write_text(text, encoding="utf-8")
        (folder / "report.html").write_text(render(self), encoding="utf-8")


REPORT_NAME = "report.json"


class SavedPass(OpenSchema):
    """What is read of a pass's entry."""

    perplexity_after: float | None


class SavedArtifact(OpenSchema):
    """What is read of what a compile wrote."""

    bytes: Size


class SavedReport(OpenSchema):
    """What is read of a `report.json` of this or an older version; see `Report`."""

    version: Literal[1, 2]
    recipe: str
    target: str | None
    parameters: Size
    total_seconds: float
    peak_bytes: Size
    passes: list[SavedPass]
    artifact: SavedArtifact | None


def read_report(folder: Path) -> SavedReport:
    """Return the report of an output folder.

    Raises:
        SourceError: `report.json` cannot be read or is no report.
    """
    path, again = folder / REPORT_NAME, "Compile the model again."
    return parse(SavedReport, read_json(path, remedy=again), str(path), remedy=again)


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
