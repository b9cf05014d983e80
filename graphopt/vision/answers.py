"""Perplexity of answers given pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.evaluate.perplexity import of_mean_loss
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import sharing
from graphopt.vision.picture_rows import PictureRow
from graphopt.vision.processor import Processor
from graphopt.vision.sighted_model import SightedModel, answer_log_likelihoods


@dataclass(frozen=True)
class AnswersResult:
    """What `answer_perplexity` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the answers' tokens.
        answers, tokens: How many answers, and how many tokens they have together.
        seconds: Time it took, without opening the model.
    """

    perplexity: float
    answers: int
    tokens: int
    seconds: float


def answer_perplexity(
    model: SightedModel,
    processor: Processor,
    rows: Sequence[PictureRow],
    progress: Progress = silent,
) -> AnswersResult:
    """Measure the perplexity of answers, each given its pictures and its prompt.

    A prompt is as `graphopt generate` puts it to the model; the answer's tokens stand directly
    behind it, and each counts alike. Ranks share the rows.

    Raises:
        UsageError: A prompt has another number of image tokens than pictures.
        SourceError: A picture cannot be read.
    """
    started = time.perf_counter()
    ranks = sharing(len(rows))
    own = ranks.share(len(rows))
    sums: list[list[float]] = []
    for done, number in enumerate(own):
        progress("answers", done, len(own))
        row = rows[number]
        prompt = processor.inputs(row.prompt, row.images, row.where)
        inputs, count = processor.with_answer(prompt, row.answer)
        losses = -answer_log_likelihoods(model, inputs, count).double()
        sums.append([float(losses.sum()), float(count)])
    progress("answers", len(own), len(own))
    every = ranks.gathered(torch.tensor(sums, dtype=torch.float64).reshape(-1, 2))
    total, tokens = every.sum(0).tolist()
    return AnswersResult(
        of_mean_loss(total / tokens), len(rows), int(tokens), time.perf_counter() - started
    )
