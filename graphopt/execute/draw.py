"""Tokens drawn from what a model says of the next one: by one kernel on a GPU, else in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.execute.takes_kernels import takes_kernels

BLOCK, WARPS = 1024, 8
"""A quarter of the logits that a program of the kernel has at once, and its warps."""


class Draw:
    """Draws tokens, each as softmax says.

    The largest of logits with Gumbel noise is one. torch writes and reads the noise five times for
    it, which of a large vocabulary takes as long as a small model; the kernel, which GPUs from
    Ampere on run, makes it where it is added.

    Args:
        device: Where the logits lie.
        seed: Of all that is drawn. Kernel and torch draw different numbers by it.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._seeds = torch.Generator().manual_seed(seed)
        self._noise = torch.empty(0, device=device)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token of each row, and a number that is none where one of its logits is none.

        Args:
            logits: [T, V].

        Returns:
            int64 [T, 1], and fp32 [T].
        """
        if takes_kernels(logits):
            # Each row has the next seed; those of two calls are too far apart to meet.
            return launch_draw(logits, int(torch.randint(2**62, (), generator=self._seeds)))
        if self._noise.shape != logits.shape:
            self._noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        noise = self._noise
        noise.exponential_(generator=self._generator).log_()
        torch.sub(logits, noise, out=noise)
        tokens = noise.argmax(-1, keepdim=True)
        return tokens, noise.gather(-1, tokens)[:, 0]


def launch_draw(logits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; see `Draw`.

    Args:
        seed: Of the first row, below 2**63 less the number of rows.
    """
    from graphopt.runtime.kernels.draw import draw_tokens

    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens = logits.new_empty(len(logits), 1, dtype=torch.long)
    scores = logits.new_empty(len(logits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        draw_tokens[(len(logits),)](
            logits, tokens, scores, logits.stride(0), logits.shape[1], seed,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return tokens, scores
