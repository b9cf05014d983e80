"""Text that passes learn from, as windows of tokens: a file's, or of the model's own making."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.calibration.writer import make_writer
from graphopt.errors import PassError
from graphopt.evaluate.perplexity import of_mean_loss
from graphopt.execute.interpreter import Runner
from graphopt.execute.language_model import ProgramModel, load_tokenizer
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.ir.graph import Program
from graphopt.ir.picture_table import TABLE
from graphopt.pass_manager.contract import Context
from graphopt.sources.windows import Bos, TokenText
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import here, sharing

PASSAGE, PROMPT = 512, 16
"""Tokens of a text that a model writes, and how many of them it is given."""

PERPLEXITY_WINDOWS = 2
"""Windows, the last ones, on which perplexity is followed; nothing is learnt from them."""

WRITTEN = PerDevice(cpu=(16, 256), gpu=(64, 2048))
"""Windows that a model writes where no text is given, and their tokens."""


def window_length(program: Program, seqlen: int | PerDevice[int], device: torch.device) -> int:
    """Return the tokens of a window: those asked for, or the default where the model takes them."""
    if not isinstance(seqlen, PerDevice):
        return seqlen
    usual = seqlen.on(device)
    return min(usual, ProgramModel(program).positions or usual)


def text_windows(program: Program, text: str, length: int, bos: Bos = "every") -> Tensor:
    """Return a text as int64 [windows, length] token ids; what is left over is dropped.

    Args:
        bos: Which windows begin with what the tokenizer puts before a text.

    Raises:
        PassError: The text has fewer than `length` tokens, or the model takes fewer.
        SourceError: The model has no tokenizer.
    """
    return _windows(program, _tokens(program, text, bos), length)


def calibration_windows(program: Program, context: Context, length: int) -> Tensor:
    """Return the calibration text of a compile as int64 [windows, length].

    The built-in text has a few hundred tokens. Where it is all there is, the model writes on
    behind beginnings from it. `context.begin` says afterwards what every window begins with.

    Args:
        program: The whole model; it writes for all passes, when the first of them asks.

    Raises:
        PassError: As for `text_windows` and `sample_windows`.
        SourceError: The model has no tokenizer.
    """
    if context.encoded is None:
        context.encoded = _tokens(program, context.text, context.bos)
    text = context.encoded
    context.begin = tuple(text.begin.tolist())
    if not context.built_in:
        return _windows(program, text, length)
    if context.written is None:
        count, tokens = WRITTEN.on(context.device)
        windows = sample_windows(
            program, text.windows(len(text)), count,
            min(tokens, ProgramModel(program).positions or tokens), begin=context.begin,
            device=context.device, seed=context.seed, progress=context.progress,
        )  # fmt: skip
        context.written = windows[:, len(context.begin) :].flatten()
    return _windows(program, TokenText(context.written, text.begin), length)


def _tokens(program: Program, text: str, bos: Bos) -> TokenText:
    return TokenText.of(load_tokenizer(ProgramModel(program)), text, bos)


def _windows(program: Program, text: TokenText, length: int) -> Tensor:
    model = ProgramModel(program)
    model.check_ids([*text.begin.tolist(), *text.ids.tolist()])
    positions = model.positions
    if positions is not None and length > positions:
        raise PassError(
            f"Windows of {length} tokens are longer than the {positions} that the model was made "
            "for.",
            f"Give seqlen={positions} or less.",
        )
    if text.room(length) < 1:
        raise PassError(
            f"Windows of {length} tokens have no room for text: the tokenizer puts "
            f"{len(text.begin)} before it.",
            f"Give seqlen={len(text.begin) + 1} or more.",
        )
    if not text.count(length):
        what, more = "text has", "a longer text with --calib"
        if TABLE in program.weights:
            what, more = "pictures and prompts have", "more pictures with --calib-images"
        raise PassError(
            f"The calibration {what} {len(text)} tokens, and a window takes {length}.",
            f"Give {more}, or seqlen={len(text)} or less.",
        )
    return text.windows(length)


def pick(windows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the windows from random places, in order; all where there are fewer."""
    return pick_apart(windows, count, 0, seed)[0]


def pick_apart(windows: Tensor, count: int, more: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return what `pick` does, and up to `more` other windows, from random places too."""
    if count >= len(windows):
        return windows, windows[:0]
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(windows), generator=generator)
    first, others = places[:count], places[count : count + more]
    return windows[first.sort().values], windows[others.sort().values]


def sample_windows(
    program: Program,
    text: Tensor,
    count: int,
    length: int,
    *,
    begin: Sequence[int] = (),
    device: torch.device,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Return windows of text that a model writes, each token drawn from its distribution.

    The text is passages of `PASSAGE` tokens, each begun with a few tokens from a random place of a
    given text; many passages are written at once, in bf16 where the device has it. Of several
    ranks the first writes, and all get the same text.

    Args:
        text: int64 [N, S], windows of text to begin with.
        count: How many windows to make.
        length: The number of tokens of a window.
        begin: n ids that each of the given windows begins with. So does each of the new ones, and
            each passage as it is written.
        seconds: Stop after about so many; there are fewer windows then, and passages may be
            shorter; those of which less was written than given are left out.

    Returns:
        int64 [count, length] on the CPU.

    Raises:
        PassError: The model can have no KV cache.
    """
    n = len(begin)
    passage = min(PASSAGE, length)
    prompt = min(PROMPT, (passage - n) // 2, text.shape[1] - n)
    if prompt < 1:
        raise PassError(
            f"Windows of {length} tokens are too short for a model to write text in.",
            f"Give seqlen={n + 2} or more.",
        )

    def write() -> Tensor:
        return _written(
            program, text, count * (length - n), passage, prompt, begin, device, seconds, seed,
            progress,
        )  # fmt: skip

    # One generator draws every token.
    written = here().made_by_first(write)
    return TokenText(written, torch.tensor(begin, dtype=torch.long)).windows(length)


def _written(
    program: Program,
    text: Tensor,
    wanted: int,
    passage: int,
    prompt: int,
    begin: Sequence[int],
    device: torch.device,
    seconds: float | None,
    seed: int,
    progress: Progress,
) -> Tensor:
    """Return what a model writes, int64 [wanted], fewer where the seconds are over.

    Args:
        passage, prompt: Tokens of a passage, and how many of them the text gives.
    """
    begun, n = time.perf_counter(), len(begin)
    least = n + 2 * prompt  # of a passage that is kept
    deadline = math.inf if seconds is None else begun + seconds
    first = torch.tensor(begin, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    writer = make_writer(program, device, seed, seconds)
    most = writer.at_once(passage, n + prompt)
    passages: list[Tensor] = []
    done = 0
    while done < wanted and time.perf_counter() < deadline:
        part = min(most, -(-(wanted - done) // (passage - n)))
        rows = torch.randint(len(text), (part,), generator=generator)
        places = n + torch.randint(text.shape[1] - n - prompt + 1, (part,), generator=generator)
        prompts = text[rows[:, None], places[:, None] + torch.arange(prompt)]
        prompts = torch.cat([first.expand(part, n), prompts], 1)

        def tell(step: int, done: int = done, part: int = part) -> bool:
            now = time.perf_counter()
            text_share = (done + part * (step - n)) / wanted
            share = max(text_share, (now - begun) / max(deadline - begun, 1e-9))
            progress("writing text", int(min(share, 1.0) * 1000), 1000)
            return now < deadline

        made = writer.write(prompts, passage, tell)
        if made.shape[1] < least:
            break
        passages.append(made[:, n:].flatten())
        done += len(passages[-1])
    progress("writing text", 1000, 1000)
    return torch.cat([text.new_empty(0), *passages])[:wanted]


def held_out_perplexity(
    program: Program, windows: Tensor, device: torch.device, dtype: torch.dtype, at_once: int = 1
) -> float:
    """Return the perplexity of windows of ids [N, S] under a program; infinite beyond e^700.

    Ranks share the windows, where each gets one.

    Args:
        at_once: Windows of a batch, at most.
    """
    likelihoods = ProgramLikelihoods(Runner(program, dtype, device, keep_weights=False))
    ranks = sharing(len(windows))
    found = ranks.gathered(likelihoods.of(ranks.part(windows), at_once=at_once))
    return of_mean_loss(-float(found.double().sum()) / max(likelihoods.count_predicted(windows), 1))


def forward_speed(
    program: Program, windows: Tensor, device: torch.device, dtype: torch.dtype
) -> float:
    """Return how many tokens a second a forward pass over a window takes in, the best of three."""
    runner = Runner(program, dtype, device, keep_weights=False)
    batch = {"input_ids": windows[:1].to(device)}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        float(runner.logits(batch)[0, -1, 0])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return windows.shape[1] / min(times)
