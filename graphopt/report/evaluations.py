"""What `graphopt eval` measured of an output folder, put into its report afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pydantic

from graphopt.report.kv_policies import PolicyFigures, policies_section
from graphopt.report.pictures import table
from graphopt.report.records import PAGE_NAME, REPORT_NAME
from graphopt.support.inputs import OpenSchema, parse, read_json, read_utf8

_BEGIN, _END = "<!-- evaluations -->", "<!-- end of evaluations -->"
_AGAIN = "Compile the model again."


class Evaluation(OpenSchema):
    """One run of `graphopt eval`.

    Attributes:
        model: What was named: the output folder, or another model beside it, such as its source.
        form: How it was run: "program", "torch" or "onnx".
        device: Where.
        text: Name of the text; None without one.
        text_sha256: Of the text, in UTF-8.
        perplexity, tokens: On the text.
        piqa_accuracy, piqa_rows: On questions of PIQA, from 0 to 1.
        picture_perplexity, picture_answers: Of answers given pictures.
        tokens_per_second: How many tokens of the text were run in a second.
        kv_policies: What KV policies did on the text; the model as it is comes first.
    """

    model: str
    form: str
    device: str
    text: str | None = None
    text_sha256: str | None = None
    perplexity: float | None = None
    tokens: int = 0
    piqa_accuracy: float | None = None
    piqa_rows: int = 0
    picture_perplexity: float | None = None
    picture_answers: int = 0
    tokens_per_second: float | None = None
    kv_policies: list[PolicyFigures] = pydantic.Field(default_factory=list, max_length=1_000)


class _Saved(OpenSchema):
    """What is read of a `report.json` to add an evaluation."""

    evaluations: list[Evaluation] = pydantic.Field(default_factory=list, max_length=10_000)


def add_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write an evaluation into `report.json` and the page of an output folder.

    Raises:
        SourceError: The folder has no report, or it cannot be read.
    """
    path, page = folder / REPORT_NAME, folder / PAGE_NAME
    data = read_json(path, remedy=_AGAIN)
    every = [*parse(_Saved, data, str(path), remedy=_AGAIN).evaluations, evaluation]
    data["evaluations"] = [one.model_dump() for one in every]
    section = evaluations_section(every)
    between = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    html = between.sub(lambda _: section, read_utf8(page), count=1)
    page.write_text(html, encoding="utf-8")
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def evaluations_section(evaluations: Sequence[Evaluation]) -> str:
    """Return the cards of evaluations, between marks by which they are replaced; none for none."""
    if not evaluations:
        return f"{_BEGIN}{_END}"
    texts = {one.text: (one.text_sha256 or "")[:12] for one in evaluations if one.text is not None}
    measured = "; ".join(f"{name}, SHA-256 {digest}…" for name, digest in texts.items())
    note = f"Perplexity on {measured}. " if measured else ""
    headings = ["model", "form", "device", "perplexity", "PIQA", "tokens a second"]
    rows = [[escape(cell) for cell in _cells(one)] for one in evaluations]
    if any(one.picture_answers for one in evaluations):
        headings.append("perplexity of answers given pictures")
        for row, one in zip(rows, evaluations, strict=True):
            row.append(_given_pictures(one))
    return (
        f'{_BEGIN}<section class="card"><h2>Evaluated</h2><p class="dim">{escape(note)}'
        "Rows on one text, form and device compare with each other.</p>"
        f"{table(headings, rows)}</section>{_policies(evaluations)}{_END}"
    )


def _policies(evaluations: Sequence[Evaluation]) -> str:
    """Return the cards of what KV policies did."""
    return "".join(
        policies_section(one.kv_policies, f"{one.text} ({one.model})")
        for one in evaluations
        if one.kv_policies
    )


def _given_pictures(one: Evaluation) -> str:
    if one.picture_perplexity is None:
        return "–"
    return f"{one.picture_perplexity:.3f} ({one.picture_answers:,} answers)"


def _cells(one: Evaluation) -> list[str]:
    perplexity, piqa, speed = "–", "–", "–"
    if one.perplexity is not None:
        perplexity = f"{one.perplexity:.3f} ({one.tokens:,} tokens of {one.text})"
    if one.piqa_accuracy is not None:
        piqa = f"{one.piqa_accuracy:.1%} of {one.piqa_rows:,}"
    if one.tokens_per_second is not None:
        speed = f"{one.tokens_per_second:,.0f}"
    return [one.model, one.form, one.device, perplexity, piqa, speed]
