"""Accuracy on PIQA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
import torch

from graphopt.errors import SourceError, UsageError
from graphopt.sources.windows import prompt_ids, special_ends
from graphopt.support.inputs import OpenSchema, parse, parse_json, read_utf8
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from graphopt.execute.language_model import LanguageModel


@dataclass(frozen=True)
class PiqaRow:
    """One question: a goal, two solutions, and which of them (0 or 1) is right."""

    goal: str
    solutions: tuple[str, str]
    label: int


@dataclass(frozen=True)
class PiqaResult:
    """What `piqa_accuracy` measured: the share answered rightly, over how many, in what time."""

    accuracy: float
    rows: int
    seconds: float


class _PiqaLine(OpenSchema):
    """One line of a PIQA file; some copies write the label as text."""

    goal: str
    sol1: Annotated[str, pydantic.Field(min_length=1)]
    sol2: Annotated[str, pydantic.Field(min_length=1)]
    label: Literal[0, 1, "0", "1"]


def read_piqa(path: Path) -> list[PiqaRow]:
    """Read PIQA questions: JSON lines with `goal`, `sol1`, `sol2` and `label` (0 means sol1).

    Raises:
        SourceError: The file cannot be read or is empty, or a line is malformed; with its number.
    """
    remedy = 'Each line is {"goal": ..., "sol1": ..., "sol2": ..., "label": 0 or 1}.'
    rows = []
    for number, line in enumerate(read_utf8(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse(
            _PiqaLine,
            parse_json(line.encode(), where, remedy=remedy, one_line=True),
            where,
            remedy=remedy,
        )
        rows.append(PiqaRow(row.goal, (row.sol1, row.sol2), int(row.label)))
    if not rows:
        raise SourceError(f"{path} is empty.", "Give a file with one question a line.")
    return rows


def piqa_accuracy(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PiqaRow],
    *,
    batch: int | None = None,
    progress: Progress = silent,
) -> PiqaResult:
    """Measure how often the right solution is the likelier one, per character.

    Ranks share the questions.

    The prompt is "Question: {goal}\\nAnswer: {solution}". A solution's score is the log-probability
    of its tokens after the prompt, divided by its length in characters (`acc_norm` of the
    lm-evaluation-harness).

    Args:
        rows: See `read_piqa`.
        batch: Sequences that run at once; they are padded on the right, which changes no result.
            By default 8, and 256 of a model that reads its weights anew for each batch.

    Raises:
        UsageError: There are no rows, or `batch` is not positive.
    """
    batch = (256 if model.reads_weights else 8) if batch is None else batch
    if not rows or batch < 1:
        raise UsageError("PIQA needs at least one question and a batch of at least one.")
    started = time.perf_counter()
    ends = special_ends(tokenizer)
    sequences: list[list[int]] = []
    starts: list[int] = []
    for row in rows:
        prompt = f"Question: {row.goal}\nAnswer:"
        answer_at = len(prompt_ids(tokenizer, prompt, ends))
        for solution in row.solutions:
            sequences.append(prompt_ids(tokenizer, f"{prompt} {solution}", ends))
            starts.append(min(answer_at, len(sequences[-1]) - 1))
    model.check_ids(token for ids in sequences for token in ids)
    model.check_causal(torch.tensor(sequences[0]))
    if model.positions is not None:
        # What is too long loses the beginning of its text.
        n = len(ends[0])
        surplus = [max(len(ids) - model.positions, 0) for ids in sequences]
        sequences = [ids[:n] + ids[n + cut :] for ids, cut in zip(sequences, surplus, strict=True)]
        starts = [max(start - cut, n, 1) for start, cut in zip(starts, surplus, strict=True)]
    scores = torch.zeros(len(sequences), dtype=torch.float64)
    # Sequences of like length share a batch, so that little of it is padding.
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    # Ranks take turns, since later batches are longer.
    ranks = here()
    starts_of_batches = range(0, len(order), batch)[ranks.rank :: ranks.world]
    progress("piqa", 0, len(order))
    for first in starts_of_batches:
        members = order[first : first + batch]
        length = max(len(sequences[index]) for index in members)
        ids = torch.zeros(len(members), length, dtype=torch.long)
        for place, index in enumerate(members):
            ids[place, : len(sequences[index])] = torch.tensor(sequences[index])
        likelihoods = model.log_likelihoods(ids)
        for place, index in enumerate(members):
            answer = likelihoods[place, starts[index] - 1 : len(sequences[index]) - 1]
            solution = rows[index // 2].solutions[index % 2]
            scores[index] = float(answer.double().sum()) / len(solution)
        progress("piqa", min(first + batch, len(order)), len(order))
    progress("piqa", len(order), len(order))
    scores = ranks.total(scores)
    right = sum(
        int(scores[2 * number + 1] > scores[2 * number]) == row.label
        for number, row in enumerate(rows)
    )
    return PiqaResult(right / len(rows), len(rows), time.perf_counter() - started)
