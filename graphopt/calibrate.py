"""Text that passes learn from, as windows of tokens: a file's, or of the model's own making."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.evaluate import ProgramModel, load_tokenizer, window_perplexity
from graphopt.ir.dataflow import mask_is_for_attention_alone
from graphopt.ir.execute import Runner, complete_inputs
from graphopt.ir.graph import Program
from graphopt.progress import Progress, silent


def text_windows(program: Program, text: str, length: int) -> Tensor:
    """Return a text as int64 [windows, length] token ids; what is left over is dropped.

    Raises:
        PassError: The text has fewer than `length` tokens, or the model takes fewer.
        SourceError: The model has no tokenizer.
    """
    model = ProgramModel(program)
    if model.positions is not None and length > model.positions:
        raise PassError(
            f"Windows of {length} tokens are longer than the {model.positions} that the model "
            "was made for.",
            f"Give seqlen={model.positions} or less.",
        )
    ids = load_tokenizer(model)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // length
    if not count:
        raise PassError(
            f"The calibration text has {len(ids)} tokens, and a window takes {length}.",
            f"Give a longer text with --calib, or seqlen={len(ids)} or less.",
        )
    return ids[: count * length].view(count, length)


def pick(windows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the windows from random places, in order; all where there are fewer."""
    if count >= len(windows):
        return windows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:count].sort().values
    return windows[chosen]


PIECE, PROMPT = 512, 16
"""Tokens of a text that a model writes, and how many of them it is given."""

PIECES_AT_ONCE = 1024


def sample_windows(
    program: Program,
    windows: Tensor,
    count: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Return windows of text that a model writes, each token drawn from its distribution.

    A window is made of pieces of `PIECE` tokens, each begun with a few tokens from a random
    place of a given window; many pieces are written at once.

    Args:
        windows: int64 [N, S], text to begin with.
        count: How many windows to make.

    Returns:
        int64 [count, S] on the CPU.

    Raises:
        PassError: The model can have no KV cache.
    """
    length = windows.shape[1]
    piece = min(PIECE, length)
    prompt = min(PROMPT, piece // 2)
    pieces = count * -(-length // piece)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(windows), (pieces,), generator=generator)
    places = torch.randint(length - prompt + 1, (pieces,), generator=generator)
    prompts = windows[rows[:, None], places[:, None] + torch.arange(prompt)]
    writer = _Writer(program, device, dtype, seed)
    made: list[Tensor] = []
    for start in range(0, pieces, PIECES_AT_ONCE):
        done = sum(map(len, made))

        def tell(what: str, step: int, steps: int, done: int = done) -> None:
            progress(what, done * steps + (pieces - done) * step, pieces * steps)

        made.append(writer.write(prompts[start : start + PIECES_AT_ONCE], piece, tell))
    return torch.cat(made).view(count, -1)[:, :length].contiguous()


class _Writer:
    """A model that writes on."""

    def __init__(
        self, program: Program, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        # Imported here: passes import this module.
        from graphopt.passes.base import Context
        from graphopt.passes.insert_kv_cache import InsertKVCache

        if not program.states:
            result = InsertKVCache().run(program.copy(), Context())
            if not result.program.states:
                reason = result.skipped[0].reason if result.skipped else "it has no attention"
                raise PassError(
                    f"{program.name} cannot write calibration text of its own: {reason}.",
                    "Leave own_text out.",
                )
            program = result.program
        self.runner = Runner(program, dtype, device)
        self.unmasked = mask_is_for_attention_alone(program)
        self.generator = torch.Generator(device).manual_seed(seed)

    @torch.inference_mode()
    def write(self, prompts: Tensor, length: int, progress: Progress) -> Tensor:
        """Return int64 [texts, length] on the CPU, behind prompts [texts, P]."""
        runner = self.runner
        ids = new = prompts.to(runner.device)
        cache = runner.empty_cache(len(ids))
        while ids.shape[1] < length:
            values: dict[str, Any] = complete_inputs(
                {"input_ids": new}, ids.shape[1] - new.shape[1]
            )
            if self.unmasked:
                values["attention_mask"] = None
            for _, (environment,) in runner.stream([values], [cache]):
                logits = environment.get(runner.program.outputs[0])
            assert logits is not None
            odds = torch.softmax(logits[:, -1].float(), -1)
            new = torch.multinomial(odds, 1, generator=self.generator)
            ids = torch.cat([ids, new], 1)
            progress("writing text", ids.shape[1], length)
        return ids.cpu()


def held_out_perplexity(
    program: Program, windows: Tensor, device: torch.device, dtype: torch.dtype
) -> float:
    """Return the perplexity of windows of ids [N, S] under a program; infinite beyond e^700."""
    runner = Runner(program, dtype, device, keep_weights=False)
    return window_perplexity(lambda ids: runner.logits({"input_ids": ids}), windows.to(device))


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
