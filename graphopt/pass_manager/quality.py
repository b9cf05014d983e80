"""What passes that are not exact did to a model: source and result on one text, side by side.

Nothing is learned from this text by a pass, so that what it shows holds for others too.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.errors import SourceError
from graphopt.evaluate.perplexity import of_mean_loss, read_text
from graphopt.execute.checked import CheckedRunner
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import ProgramModel
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.ir.context import context_length
from graphopt.ir.graph import Program
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.report.quality import MeasuredText, Quality, Sample
from graphopt.report.record import finite_or_none
from graphopt.sources.tokenizer import decode
from graphopt.sources.windows import Bos, TokenText, prompt_ids, tokenizer_at
from graphopt.support.devices import free_bytes
from graphopt.support.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "built-in text"
"""What the text is called that is used where none is given: a story written for this purpose."""

TOKENS, WINDOW = 2048, 512
"""Tokens that are run, at most, and those of a window. The ratio of two perplexities on so many is
known to a few percent, for as much time as two prompts of that length take."""

CORRELATED = 32
"""Tokens over which losses are averaged before they are taken for independent of each other."""

PROMPT, CONTINUED = 16, 24
"""Tokens of a sample's beginning, and of what is written behind it."""


def built_in_text() -> str:
    """Return the text that quality is measured on where the user gives none."""
    file = resources.files("graphopt.evaluate").joinpath("measured_text.txt")
    return file.read_text(encoding="utf-8")


def measure_quality(
    source: Program,
    result: Program,
    text: str | Path | None = None,
    *,
    bos: Bos = "every",
    device: torch.device | None = None,
    advice: Sequence[str] = (),
    progress: Progress = silent,
) -> Quality:
    """Measure source and result on the beginning of a text, in fp32.

    Args:
        text: The file; None for the built-in text.
        bos: Which windows begin with what the tokenizer puts before a text.
        advice: See `Quality.advice`.

    Raises:
        SourceError: The source has no tokenizer, the text cannot be read or is too short, or a
            weight cannot be used.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    content = built_in_text() if text is None else read_text(Path(text))
    folder = Path(source.tokenizer) if source.tokenizer else None
    tokenizer = tokenizer_at(folder, source.name)
    tokens = TokenText.of(tokenizer, content, bos)
    ProgramModel(source).check_ids([*tokens.begin.tolist(), *tokens.ids.tolist()])
    length = min(WINDOW, context_length(source) or WINDOW, len(tokens))
    windows = tokens.windows(length)[: max(TOKENS // length, 1)]
    first = max(len(tokens.begin), 1)
    if not len(windows) or length <= first:
        raise SourceError(
            f"The text to measure on has {len(tokens)} tokens, which is too few.",
            "Give a longer one with --text.",
        )
    programs = (source, result)
    before, after = (
        token_losses(program, windows, first, device, progress, f"measuring the {which}")
        for program, which in zip(programs, ("source", "result"), strict=True)
    )
    samples, why = _samples(programs, tokenizer, content, device, progress)
    return Quality(
        text=MeasuredText(
            name=BUILT_IN if text is None else str(text),
            sha256=hashlib.sha256(content.encode()).hexdigest(),
            tokens=windows.numel(),
            window=length,
            begin=tokens.begin.tolist(),
            first_token=int(tokens.ids[0]),
            first_text=decode(tokenizer, tokens.ids[:1].tolist()),
        ),
        perplexity_before=finite_or_none(of_mean_loss(float(before.mean()))),
        perplexity_after=finite_or_none(of_mean_loss(float(after.mean()))),
        counted=counted_perplexity(windows[:, first:], _vocabulary(source)),
        relative_error=relative_error(after - before),
        advice=list(advice),
        samples=samples,
        not_sampled=why,
        unmeasured=_about_policies(result),
        seconds=time.perf_counter() - started,
    )


def _about_policies(program: Program) -> str:
    """Return that steps which read selected pages are not measured here; "" where none does."""
    policies = {s.policy: s.policy.budget for s in program.states.values() if s.policy is not None}
    if not policies:
        return ""
    policy, budget = next(iter(policies.items()))
    written = f"{policy.kind}{{budget={budget.tokens},page={budget.page}}}"
    return (
        "Not measured here: steps of one token, which read selected keys where prompts read all. "
        f"graphopt eval MODEL --text FILE --kv-policy '{written}' measures them, on the model "
        "before this pass."
    )


def _vocabulary(program: Program) -> int:
    return int(infer_program(program)[1][program.outputs[0]].shape[-1])


def token_losses(
    program: Program,
    windows: Tensor,
    first: int,
    device: torch.device,
    progress: Progress = silent,
    what: str = "measuring quality",
) -> Tensor:
    """Return the negative log-likelihood of every token of windows.

    One layer's weights are in memory at a time, and logits of one window at most.

    Args:
        windows: int64 [N, S].
        first: Place of the first token that is predicted, at least 1.
        what: The work's name for `progress`.

    Returns:
        fp64 [N, S - first] on the CPU.
    """
    likelihoods = ProgramLikelihoods(CheckedRunner(program, device=device, keep_weights=False))
    found = likelihoods.of(windows, at_once=1, progress=progress, what=what)
    return -found[:, first - 1 :].double().cpu()


def counted_perplexity(ids: Tensor, vocabulary: int) -> float:
    """Return the perplexity of ids for one who knows how often each has occurred so far.

    Behind n tokens, d of them different, one that occurred c times has c / (n + d), and d / (n + d)
    is for all others together: Moffat, "Implementing the PPM data compression scheme", IEEE
    Transactions on Communications 38 (11), 1990, method C, without contexts.

    Args:
        ids: int64, in their order.
        vocabulary: How many tokens there are.
    """
    counts: dict[int, int] = {}
    loss = 0.0
    for n, token in enumerate(ids.flatten().tolist()):
        d = len(counts)
        if token in counts:
            loss -= math.log(counts[token] / (n + d))
        else:
            loss += math.log(max(vocabulary - d, 1)) - (math.log(d / (n + d)) if n else 0.0)
        counts[token] = counts.get(token, 0) + 1
    return of_mean_loss(loss / max(ids.numel(), 1))


def relative_error(differences: Tensor) -> float | None:
    """Return the standard error of a mean difference of losses; None for too few.

    As the ratio of perplexities is its exponential, this is the ratio's error as a share of it.
    Losses of neighbouring tokens depend on each other, so means of some at a time are taken
    for independent.

    Args:
        differences: fp64 [N, S], of the same tokens under two models.
    """
    rows = [part.mean() for row in differences for part in row.split(CORRELATED)]
    if len(rows) < 8:
        return None
    return finite_or_none(float(torch.stack(rows).std() / len(rows) ** 0.5))


def _samples(
    programs: Sequence[Program],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Sample], str]:
    """Return what each of two programs writes behind beginnings of a text, or why there is none."""
    prompts = _prompts(tokenizer, text)
    room = context_length(programs[0])
    if not len(prompts) or (room is not None and room < prompts.shape[1] + CONTINUED):
        return [], "the text, or the model's context, is too short for samples"
    # All weights are held, as each token needs all of them.
    need = 4 * max(program.parameter_count() for program in programs)
    if need > free_bytes(device) // 2:
        return [], "the weights in fp32 do not fit into half of the free memory"
    ends = {tokenizer.eos_token_id} - {None}
    written = [
        [decode(tokenizer, _until(row, ends)) for row in greedy(program, prompts, device, progress)]
        for program in programs
    ]
    begun = [decode(tokenizer, row.tolist()) for row in prompts]
    return [Sample(*texts) for texts in zip(begun, *written, strict=True)], ""


def _prompts(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the beginnings of a text's first paragraph and of one in its middle, int64 [N, S]."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    ids = [prompt_ids(tokenizer, part[:1000]) for part in paragraphs[:64]]
    long = [part[:PROMPT] for part in ids if len(part) >= PROMPT]
    chosen = [long[0], long[len(long) // 2]] if len(long) > 1 else long
    return torch.tensor(chosen, dtype=torch.long)


def _until(row: Tensor, ends: set[int]) -> list[int]:
    ids: list[int] = row.tolist()
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def greedy(
    program: Program, prompts: Tensor, device: torch.device, progress: Progress = silent
) -> Tensor:
    """Return the `CONTINUED` tokens that follow prompts [N, S], each the likeliest: int64 [N, T].

    With a KV cache, where the program can have one.
    """
    cached = program
    if not program.states:
        cached = make_pass("insert-kv-cache", {}).run(program.copy(), Context()).program
    model = ProgramModel(cached, device=device)
    cache, new, written = model.start(len(prompts)), prompts, list[Tensor]()
    past = 0
    for number in range(CONTINUED):
        progress("writing samples", number, CONTINUED)
        logits, cache = model.step(complete_inputs({"input_ids": new}, past), cache)
        past += new.shape[1]
        new = logits[:, -1:].argmax(-1)
        written.append(new)
    progress("writing samples", CONTINUED, CONTINUED)
    return torch.cat(written, 1)
