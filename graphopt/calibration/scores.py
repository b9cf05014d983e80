"""How much a block, or a part of one, matters: what leaving it out does to the results.

All candidates are scored in one walk over the blocks (`graphopt.execute.hidden_states`). Beside the
hidden states of the whole model, those of every candidate passed so far are kept; each block runs
over all of them while its weights are in memory, so that n blocks cost n (n + 1) / 2 block calls
and every weight is read once. The naive way, a run of the model for each candidate, costs about
n^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import SourceError
from graphopt.evaluate.perplexity import token_log_likelihoods
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks, sub_blocks, without_sub_block
from graphopt.ir.graph import Program
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent

METRICS = {
    "mi": "macro influence: 1 - cosine of the last block's outputs with and without the candidate",
    "bi": "block influence: 1 - cosine of the stream behind the block with and without it",
    "angular": "the angle of that cosine, in units of pi",
    "kl": "KL divergence of the logits without the candidate from those with it, in nats",
    "ppl": "perplexity of the text without the candidate",
}
"""What a score is; the lowest is the least important."""

_FINAL_OUTPUT_METRICS = ("mi", "kl", "ppl")
_TOKENS_OF_CANDIDATES = PerDevice(cpu=4096, gpu=32768)
"""Tokens of several candidates that a block runs over at once: a GPU waits for launches else."""


@dataclass(frozen=True, order=True)
class PruningUnit:
    """What may be ablated: a whole block, or its attention or feed-forward part.

    Attributes:
        block: Index among `find_blocks`.
        kind: `block`, `attention` or `ffn`.
    """

    block: int
    kind: str = "block"

    def __str__(self) -> str:
        return str(self.block) if self.kind == "block" else f"{self.block}.{self.kind}"


@dataclass
class Scores:
    """Scores of candidates.

    Attributes:
        values: Score of each candidate; not finite where the model without it is not.
        calls: Block calls it took, over one batch.
    """

    values: dict[PruningUnit, float]
    calls: int

    def lowest(self) -> PruningUnit:
        """Return the least important unit, the first of equals."""
        known = {unit: v for unit, v in self.values.items() if math.isfinite(v)}
        if not known:
            raise SourceError(
                "No candidate has a finite score: without it, the model gives NaN or Inf.",
                "Score with --device cpu, which computes in fp32, or with another score.",
            )
        return min(known, key=lambda unit: (known[unit], unit))


def units_of(program: Program, kinds: Sequence[str]) -> list[PruningUnit]:
    """Return every candidate of these kinds, in order."""
    units: list[PruningUnit] = []
    for index, block in enumerate(find_blocks(program)):
        function = program.functions[program.calls[block.position].function]
        parts = {part.kind for part in sub_blocks(function, block.stream)}
        for kind in kinds:
            if kind == "block" or kind in parts:
                units.append(PruningUnit(index, kind))
    return units


def score_units(
    program: Program,
    units: Sequence[PruningUnit],
    windows: Tensor,
    metric: str = "mi",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    reference: Sequence[Tensor] | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score candidates on text.

    Args:
        units: See `units_of`.
        windows: int64 [windows, tokens].
        metric: One of `METRICS`.
        dtype: The dtype of weights and activations; scores are computed in fp32.
        reference: What results are compared with: for every batch the last block's output (mi)
            or the logits (kl) of another model, from `final_results`; by default those of
            `program` itself.

    Raises:
        SourceError: A weight cannot be read.
    """
    stream = scoring_stream(program, windows, device=device, dtype=dtype, progress=progress)
    wanted: dict[int, list[PruningUnit]] = {}
    for unit in units:
        wanted.setdefault(unit.block, []).append(unit)
    with torch.inference_mode():
        if metric in _FINAL_OUTPUT_METRICS:
            values = final_output_metric(
                stream,
                lambda block: {unit: ablated(block, unit) for unit in wanted.get(block.index, ())},
                metric,
                reference,
            )
        else:
            values = block_output_metric(stream, wanted, metric)
    calls = stream.block_calls // len(stream.ids)
    return Scores({unit: values[unit] for unit in units}, calls)


def final_results(
    program: Program,
    windows: Tensor,
    metric: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return what `score_units` compares with, for every batch of windows."""
    stream = scoring_stream(program, windows, device=device, dtype=dtype)
    with torch.inference_mode():
        stream.run_to(len(stream.blocks))
        return _results(stream, stream.hidden, metric)


def scoring_stream(
    program: Program,
    windows: Tensor,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> HiddenStateStream:
    """Return the stream that scores are taken from: all of it in one dtype."""
    runner = Runner(program, dtype, device or torch.device("cpu"), keep_weights=False)
    return HiddenStateStream(runner, windows, progress=progress, what="scoring blocks")


Candidate = TypeVar("Candidate", bound=Hashable)


def final_output_metric(
    stream: HiddenStateStream,
    candidates: Callable[[BlockStep], Mapping[Candidate, list[Tensor]]],
    metric: str,
    reference: Sequence[Tensor] | None = None,
) -> dict[Candidate, float]:
    """Score candidates by what they come to behind the last block.

    Args:
        stream: In front of the first block.
        candidates: Called at every block; returns for each candidate there the hidden states of
            every batch behind the block.
        metric: One of `METRICS` that is measured behind the last block.
        reference: As for `score_units`.
    """
    kept: dict[Candidate, list[Tensor]] = {}
    for block in stream:
        known = list(kept)
        for batch, ids in enumerate(stream.ids):
            size = max(1, _TOKENS_OF_CANDIDATES.on(ids.device) // ids.numel())
            for start in range(0, len(known), size):
                several = known[start : start + size]
                stacked = torch.cat(
                    [kept[candidate][batch] for candidate in several], stream.batch_axis
                )
                behind = block.run(batch, stacked).split(len(ids), stream.batch_axis)
                for candidate, hidden in zip(several, behind, strict=True):
                    kept[candidate][batch] = hidden
        kept.update(candidates(block))
    base = _results(stream, stream.hidden, metric) if reference is None else list(reference)
    values: dict[Candidate, float] = {}
    count = len(kept)
    for done, candidate in enumerate(list(kept), start=1):
        results = _results(stream, kept.pop(candidate), metric)
        values[candidate] = _distance(stream, results, base, metric)
        stream.progress("comparing results", done, count)
    return values


def block_output_metric(
    stream: HiddenStateStream, wanted: Mapping[int, Sequence[PruningUnit]], metric: str
) -> dict[PruningUnit, float]:
    """Score units, by the index of their block, by the hidden states behind it."""
    values: dict[PruningUnit, float] = {}
    for block in stream:
        without = {unit: ablated(block, unit) for unit in wanted.get(block.index, ())}
        behind = block.advance()
        for unit, hidden in without.items():
            values[unit] = _distance(stream, hidden, behind, metric)
    return values


def ablated(block: BlockStep, unit: PruningUnit) -> list[Tensor]:
    """Return every batch's hidden states behind a block that leaves a unit out."""
    kinds = {part.kind for part in sub_blocks(block.function, block.block.stream)}
    if unit.kind == "block" or kinds == {unit.kind}:
        return list(block.hidden)
    function = without_sub_block(
        block.function, block.block.stream, [unit.kind], block.function.name
    )
    return [block.run(batch, function=function) for batch in range(len(block.hidden))]


def _results(stream: HiddenStateStream, hidden: Sequence[Tensor], metric: str) -> list[Tensor]:
    """Return what a metric compares, from every batch's hidden states behind the last block."""
    return list(hidden) if metric == "mi" else stream.outputs(hidden)


def _distance(
    stream: HiddenStateStream, results: Sequence[Tensor], base: Sequence[Tensor], metric: str
) -> float:
    total, count = 0.0, 0
    for ids, candidate, reference in zip(stream.ids, results, base, strict=True):
        if metric == "ppl":
            likely = token_log_likelihoods(candidate[:, :-1], ids[:, 1:])
            total, count = total - float(likely.double().sum()), count + likely.numel()
            continue
        for row, other in zip(candidate, reference, strict=True):
            row, other = row.to(stream.device).float(), other.to(stream.device).float()
            total += float(_distances(row, other, metric).double().sum())
            count += len(row)
    mean = total / max(count, 1)
    return math.exp(min(mean, 700.0)) if metric == "ppl" and math.isfinite(mean) else mean


def _distances(candidate: Tensor, reference: Tensor, metric: str) -> Tensor:
    """Return how far rows [tokens, N] are apart, fp32 [tokens]."""
    if metric == "kl":
        p, q = torch.log_softmax(reference, -1), torch.log_softmax(candidate, -1)
        return (p.exp() * (p - q)).sum(-1)
    # 1 - cos as half the squared distance of unit vectors, and the angle from its chord: both
    # are exact where the rows nearly agree.
    apart = (F.normalize(candidate, dim=-1) - F.normalize(reference, dim=-1)).square().sum(-1) / 2
    if metric == "angular":
        return 2 * torch.arcsin((apart / 2).clamp(max=1).sqrt()) / math.pi
    return apart
