"""Perplexity of a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.sources.windows import Bos, TokenText
from graphopt.support.inputs import read_utf8
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import here, sharing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from graphopt.execute.language_model import LanguageModel
from graphopt.execute.likelihoods import TOKENS_TOGETHER
from graphopt.support.per_device import PerDevice

TOKENS_AT_ONCE = PerDevice(cpu=1, gpu=16384)
"""Tokens of a batch of windows. A CPU is busy with one window."""


def read_text(path: Path) -> str:
    """Return an evaluation text as papers prepare it: the lines of the file joined by blank lines.

    Raises:
        SourceError: The file cannot be read, is not UTF-8 or holds no text.
    """
    text = read_utf8(Path(path)).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise SourceError(f"{path} is empty.", "Give a file with text in the model's language.")
    return "\n\n".join(text.removesuffix("\n").split("\n"))


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: Tokens that were run: windows times seqlen.
        windows: How many windows.
        seqlen: Tokens of a window.
        seconds: Time it took, without opening the model.
        begin: Ids that every window begins with, which count among its tokens.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    begin: tuple[int, ...] = ()


def window_perplexity(
    log_likelihoods: Callable[[Tensor], Tensor],
    windows: Tensor,
    progress: Progress = silent,
    *,
    first: int = 1,
    at_once: int = 1,
) -> float:
    """Return the perplexity of windows of ids, the first token of each not predicted.

    Ranks share the batches.

    Args:
        log_likelihoods: From int64 [B, S] to the log-probability of each token but the first,
            [B, S - 1].
        windows: int64 [N, S].
        first: Place of the first token that is predicted, at least 1.
        at_once: Windows of a batch, at most.

    Returns:
        Infinity beyond e^700, where a broken model is sure of the wrong token.
    """
    batches = windows.split(at_once)
    if len(batches) < here().world:
        batches = windows.split(1)
    ranks = sharing(len(batches))
    own = [batches[number] for number in ranks.share(len(batches))]
    done, count = 0, sum(map(len, own))
    progress("perplexity", done, count)
    losses: list[float] = []
    for batch in own:
        losses.append(-float(log_likelihoods(batch)[:, first - 1 :].double().sum()))
        done += len(batch)
        progress("perplexity", done, count)
    # Added up in the same order, however many ranks there are.
    total = sum(ranks.gathered(torch.tensor(losses, dtype=torch.float64)).tolist())
    return of_mean_loss(total / (len(windows) * (windows.shape[1] - first)))


def of_mean_loss(mean: float) -> float:
    """Return the perplexity that a mean negative log-likelihood is: infinity beyond e^700."""
    return math.exp(mean) if mean < 700 else math.inf


def text_windows(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    windows: int | None,
    seqlen: int,
    bos: Bos,
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the windows of a text that a model is measured on, and what each begins with.

    Args:
        windows, seqlen, bos: As for `perplexity`.

    Returns:
        int64 [windows, seqlen], and the ids at the beginning of each.

    Raises:
        SourceError, UsageError: As `perplexity` does.
    """
    if windows is not None and windows < 1:
        raise UsageError(f"The number of windows must be at least 1, not {windows}.")
    if seqlen < 2:
        raise UsageError(f"The window length must be at least 2 tokens, not {seqlen}.")
    if model.positions is not None and seqlen > model.positions:
        raise UsageError(
            f"A window of {seqlen} tokens exceeds the {model.positions} that {model.name} takes.",
            f"Pass --seqlen {model.positions} or less.",
        )
    tokens = TokenText.of(tokenizer, text, bos)
    begin = tuple(tokens.begin.tolist())
    if seqlen <= len(begin):
        raise UsageError(
            f"A window of {seqlen} tokens has no room for text: the tokenizer puts {len(begin)} "
            "before it.",
            f"Pass --seqlen {len(begin) + 1} or more.",
        )
    count = tokens.count(seqlen)
    if count == 0:
        raise SourceError(
            f"The text is too short: its {len(tokens)} tokens fill no window of {seqlen}.",
            f"Give a longer text, or pass --seqlen {len(tokens)} or less."
            if len(tokens) > max(len(begin), 1)
            else "Give a longer text.",
        )
    count = count if windows is None else min(count, windows)
    model.check_ids([*begin, *tokens.ids.tolist()])
    rows = tokens.windows(seqlen)[:count]
    model.check_causal(rows[0])
    return rows, begin


def perplexity(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    windows: int | None = None,
    seqlen: int = 2048,
    bos: Bos = "every",
    progress: Progress = silent,
) -> PerplexityResult:
    """Measure perplexity over windows that do not overlap.

    The text is tokenised once, as a whole, and cut into windows of `seqlen` tokens, each of which
    begins with what the tokenizer puts before a text; a rest that fills no window is left out.
    Neither that beginning nor a window's first token is predicted. With `bos="first"` the
    procedure is that of compression papers (Frantar et al., GPTQ, arXiv 2210.17323, section 4),
    and the same for tokenizers that put nothing before a text.

    Args:
        text: See `read_text`.
        windows: How many at most, from the start of the text; None for all.
        seqlen: Tokens of a window, with its beginning.
        bos: Which windows begin with what the tokenizer puts before a text.

    Raises:
        SourceError: The text fills no window.
        UsageError: `windows` or `seqlen` is out of range for the model.
    """
    rows, begin = text_windows(model, tokenizer, text, windows=windows, seqlen=seqlen, bos=bos)
    count = len(rows)
    started = time.perf_counter()
    tokens = TOKENS_TOGETHER if model.reads_weights else TOKENS_AT_ONCE.on(model.device)
    first, at_once = max(len(begin), 1), max(1, tokens // seqlen)
    return PerplexityResult(
        perplexity=window_perplexity(
            model.log_likelihoods, rows, progress, first=first, at_once=at_once
        ),
        tokens=count * seqlen,
        windows=count,
        seqlen=seqlen,
        seconds=time.perf_counter() - started,
        begin=begin,
    )
