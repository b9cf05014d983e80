"""Traces of dense attention over pages, which KV policies are trained on and compared by.

Layout letters: L layers of one head layout, B texts, G key heads, S steps, N pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.page_attention import AttentionLayer, CausalAttention, attention_layers
from graphopt.ir.graph import Program
from graphopt.ir.kv_policies import Filled
from graphopt.support.progress import Progress, silent

STORED = torch.float16
"""What traces are kept in. Probabilities below its least number, 6e-8, are no reason to read."""


@dataclass(frozen=True)
class PageTraces:
    """What every step of some texts attends to, were attention dense.

    Attributes:
        first: The token of the first step; those in front of it are a prompt.
        page: Tokens of a page.
        group: Query heads of a key head.
        probs_LBGSN: The largest probability in each page, over its query heads too (fp16).
        mass_LBGSN: The attention mass of each page, a mean over its query heads (fp16).
    """

    first: int
    page: int
    group: int
    probs_LBGSN: Tensor
    mass_LBGSN: Tensor

    @property
    def steps(self) -> int:
        return self.probs_LBGSN.shape[3]

    def lengths(self, step: int, rows: int) -> Filled:
        """Return where the keys of a step lie, in each of some rows: texts begin at slot 0."""
        last = torch.full((rows,), self.first + step, device=self.probs_LBGSN.device)
        return Filled(torch.zeros_like(last), last, self.probs_LBGSN.shape[4] * self.page)

    def texts(self, numbers: Sequence[int]) -> PageTraces:
        """Return the traces of some of the texts; one may be named several times."""
        chosen = list(numbers)
        return replace(
            self,
            probs_LBGSN=self.probs_LBGSN[:, chosen],
            mass_LBGSN=self.mass_LBGSN[:, chosen],
        )

    def layers(self, numbers: Sequence[int]) -> PageTraces:
        """Return the traces of some of the layers."""
        chosen = list(numbers)
        return replace(
            self, probs_LBGSN=self.probs_LBGSN[chosen], mass_LBGSN=self.mass_LBGSN[chosen]
        )

    def last(self, steps: int) -> PageTraces:
        """Return the traces of the last steps, so many at most."""
        kept = min(steps, self.steps)
        return replace(
            self,
            first=self.first + self.steps - kept,
            probs_LBGSN=self.probs_LBGSN[:, :, :, -kept:],
            mass_LBGSN=self.mass_LBGSN[:, :, :, -kept:],
        )


def qualifying_layers(program: Program) -> list[AttentionLayer]:
    """Return the attentions that can read selected pages.

    Raises:
        UsageError: There is none.
    """
    layers = attention_layers(program)
    chosen = [layer for layer in layers if layer.left_alone is None]
    if not chosen:
        why = "; ".join(sorted({str(layer.left_alone) for layer in layers})) or "it has none"
        raise UsageError(
            f"No attention of {program.name} can follow a KV policy: {why}.",
            "Give a model with causal attention over all its tokens.",
        )
    return chosen


@torch.no_grad()
def record_traces(
    runner: Runner,
    windows: Tensor,
    page: int,
    steps: int,
    *,
    progress: Progress = silent,
) -> PageTraces:
    """Walk a program over texts once, and keep what the last tokens of each attend to.

    Layers of the most frequent head layout are recorded: a predictor is for one. Traces lie where
    the program runs.

    Args:
        windows: int64 [B, tokens], without padding.
        steps: How many tokens at the end of a text are steps; fewer than there are.

    Raises:
        UsageError: No attention can follow a policy.
    """
    layers = qualifying_layers(runner.program)
    stream = HiddenStateStream(
        runner, windows, progress=progress, what="recording attention", tokens_at_once=1
    )
    by_position: dict[int, list[AttentionLayer]] = {}
    for layer in layers:
        by_position.setdefault(layer.position, []).append(layer)
    first = windows.shape[1] - steps
    recorded: list[tuple[tuple[int, int], Tensor, Tensor]] = []
    for block in stream:
        for layer in by_position.get(block.block.position, ()):
            wanted = CausalAttention.wanted(layer.node)
            parts = []
            for batch in range(len(stream.ids)):
                values = dict(zip(wanted, block.values(batch, wanted), strict=True))
                attention = CausalAttention.of_values(layer.node, block.call, values)
                scores = attention.page_scores(first, page)
                parts.append([x.to(STORED) for x in (scores.probabilities(), scores.mass())])
            probs, mass = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            recorded.append(((probs.shape[1], scores.groups), probs, mass))
    layout, _ = Counter(heads for heads, _, _ in recorded).most_common(1)[0]
    probs, mass = (
        torch.stack([tensors[n] for heads, *tensors in recorded if heads == layout]) for n in (0, 1)
    )
    return PageTraces(first, page, layout[1], probs, mass)
