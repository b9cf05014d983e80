"""What is read back of the `report.json` of an output folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from graphopt.report.quality import MeasuredText
from graphopt.report.records import REPORT_NAME
from graphopt.support.inputs import OpenSchema, Size, parse, read_json


class SavedText(OpenSchema):
    """What is read of the text that quality was measured on; see `MeasuredText`."""

    name: str
    sha256: str
    tokens: Size
    window: Size
    begin: list[Size]
    first_token: Size
    first_text: str

    def measured(self) -> MeasuredText:
        """Return it as it was written."""
        names = [f.name for f in dataclasses.fields(MeasuredText)]
        return MeasuredText(**{name: getattr(self, name) for name in names})


class SavedQuality(OpenSchema):
    """What is read of figures of quality; see `Quality`."""

    text: SavedText
    perplexity_before: float | None
    perplexity_after: float | None
    times: float | None


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
    artifact: SavedArtifact | None
    quality: SavedQuality | None = None


def read_report(folder: Path) -> SavedReport:
    """Return the report of an output folder.

    Raises:
        SourceError: `report.json` cannot be read or is no report.
    """
    path, again = folder / REPORT_NAME, "Compile the model again."
    return parse(SavedReport, read_json(path, remedy=again), str(path), remedy=again)
