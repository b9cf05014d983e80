"""What batch and what length of a model fit a GPU's memory, said before anything runs there."""

from __future__ import annotations

import torch

from graphopt.execute.memory_fit import MOST_TOKENS, largest_batch, largest_seq
from graphopt.ir.context import stated_length
from graphopt.ir.graph import Program
from graphopt.report.fits import FitEntry
from graphopt.support.progress import Progress, silent


def what_fits(
    program: Program, memory: int, *, batch: int, seq: int, progress: Progress = silent
) -> list[FitEntry]:
    """Return the largest batch of texts of `seq` tokens, and the longest texts of a batch.

    Steps are those of a prompt (prefill), of a token behind so many (decode, where the program has
    a KV cache) and of training all weights (the batch alone), in 16 bits as GPU packages compute:
    bf16, or fp16 where the checkpoint is that.

    Args:
        program: With a KV cache, if it can have one.
        memory: Bytes that torch may reserve on the GPU. What the driver takes is not in it.
        batch: Texts of which the length is looked for.
        seq: Tokens of texts whose batch is looked for; at most as many as the model takes.
    """
    dtype = torch.float16 if program.checkpoint_dtype == torch.float16 else torch.bfloat16
    longest = min(program.max_length or stated_length(program.config) or MOST_TOKENS, MOST_TOKENS)
    phases = ["prefill", *["decode"] * bool(program.states), "train"]
    seq = min(seq, longest)
    found = []
    progress("what fits", 0, len(phases))
    for done, phase in enumerate(phases, start=1):
        fit = largest_batch(program, memory, phase=phase, seq=seq, dtype=dtype)
        bound = "as many as are asked for" if fit.bounded else ""
        found.append(FitEntry(phase, "batch", fit.value, seq, fit.prediction.reserved, bound))
        if phase != "train":
            fit = largest_seq(program, memory, phase=phase, batch=batch, dtype=dtype, most=longest)
            bound = "as long as the model takes" if fit.bounded else ""
            found.append(FitEntry(phase, "seq", fit.value, batch, fit.prediction.reserved, bound))
        progress("what fits", done, len(phases))
    return found
