"""How much a block, or a part of one, matters: what leaving it out does to the results.

All candidates are scored in one walk over the blocks (`graphopt.execute.hidden_states`). Beside the
hidden states of the whole model, those of every candidate passed so far are kept; each block runs
over all of them while its weights are in memory, so that n blocks cost n (n + 1) / 2 block calls
and every weight is read once. The naive way, a run of the model for each candidate, costs about
n^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.calibration.vocabulary import vocabulary_size
from graphopt.errors import SourceError
from graphopt.execute.hidden_states import TOKENS_AT_ONCE, BlockStep, HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.likelihoods import predicted, token_log_likelihoods
from graphopt.ir.blocks import find_blocks, sub_blocks, without_sub_block
from graphopt.ir.graph import Function, Program
from graphopt.support.devices import free_bytes
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
_LOGITS_AT_ONCE = PerDevice(cpu=2**27, gpu=2**30)
"""Logits of a batch, at most: 262,144 for each token of some models."""
_BYTES_OF_A_LOGIT = 12
"""What comparing takes for each logit of a batch: a candidate's and the whole model's in up to four
bytes, and, a window at a time, what a divergence makes of them."""


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


Removal: TypeAlias = frozenset[PruningUnit]
"""Units that are removed together."""


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
    removed: Collection[PruningUnit] = (),
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
        removed: Units that are missing already, in the model that candidates are compared with too.
        dtype: The dtype of weights and activations; scores are computed in fp32.
        reference: What results are compared with, where it is another model's: its hidden states
            behind the last block for every batch, from `final_hidden`.

    Raises:
        SourceError: A weight cannot be read.
    """
    gone = frozenset(removed)
    stream = scoring_stream(program, windows, device=device, dtype=dtype, progress=progress)
    with torch.inference_mode():
        if metric in _FINAL_OUTPUT_METRICS:
            removals = {unit: gone | {unit} for unit in units}
            of_sets = removal_metric(stream, list(removals.values()), metric, gone, reference)
            values = {unit: of_sets[removal] for unit, removal in removals.items()}
        else:
            values = block_output_metric(stream, units, gone, metric)
    return Scores(values, stream.block_calls // len(stream.ids))


def score_removals(
    program: Program,
    removals: Sequence[Removal],
    windows: Tensor,
    metric: str = "kl",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    reference: Sequence[Tensor] | None = None,
    progress: Progress = silent,
) -> dict[Removal, float]:
    """Score sets of units that are removed together, by what is behind the last block.

    Args:
        removals: Sets of units; each is compared with the whole model.
        windows, dtype, reference: As for `score_units`.
        metric: One of `METRICS` that is measured behind the last block.
    """
    stream = scoring_stream(program, windows, device=device, dtype=dtype, progress=progress)
    with torch.inference_mode():
        return removal_metric(stream, removals, metric, frozenset(), reference)


def final_hidden(
    program: Program,
    windows: Tensor,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return what candidates are compared with: every batch's hidden states behind the blocks."""
    stream = scoring_stream(program, windows, device=device, dtype=dtype)
    with torch.inference_mode():
        stream.run_to(len(stream.blocks))
        return stream.hidden


def scoring_stream(
    program: Program,
    windows: Tensor,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> HiddenStateStream:
    """Return the stream that scores are taken from: all of it in one dtype.

    Its batches are so small that their logits fit the memory, also of a large vocabulary. Streams
    of candidates take up to half of what is free (`removal_metric`): logits get the other half.
    """
    runner = Runner(program, dtype, device or torch.device("cpu"), keep_weights=False)
    usual, logits = TOKENS_AT_ONCE.on(runner.device), _LOGITS_AT_ONCE.on(runner.device)
    room = free_bytes(runner.device) // 2 // _BYTES_OF_A_LOGIT
    logits = min(logits, room) if room else logits
    return HiddenStateStream(
        runner,
        windows,
        tokens_at_once=min(usual, logits // (vocabulary_size(program) or 1)),
        progress=progress,
        what="scoring blocks",
    )


Candidate = TypeVar("Candidate", bound=Hashable)


def final_output_metric(
    stream: HiddenStateStream,
    candidates: Callable[[BlockStep], Mapping[Candidate, list[Tensor]]],
    metric: str,
) -> dict[Candidate, float]:
    """Score candidates by what they come to behind the last block.

    Args:
        stream: In front of the first block.
        candidates: Called at every block; returns for each candidate there the hidden states of
            every batch behind the block.
        metric: One of `METRICS` that is measured behind the last block.
    """
    kept: dict[Candidate, list[Tensor]] = {}
    for block in stream:
        kept = _behind(block, kept)
        kept.update(candidates(block))
    return _compared(stream, kept, stream.hidden, metric)


def removal_metric(
    stream: HiddenStateStream,
    removals: Sequence[Removal],
    metric: str,
    base: Removal,
    reference: Sequence[Tensor] | None = None,
) -> dict[Removal, float]:
    """Score sets of units that are removed together.

    Sets that agree on the blocks passed so far share one stream. As many sets are walked at a time
    as their streams take half of the memory that is free.

    Args:
        stream: In front of the first block.
        metric: One of `METRICS` that is measured behind the last block.
        base: The removal that all are compared with, unless a reference is given.
        reference: As for `score_units`.
    """
    first = list(stream.hidden)
    values: dict[Removal, float] = {}
    # Neighbours in this order agree on most of their first blocks.
    ordered = sorted(dict.fromkeys(removals), key=sorted)
    size = sum(hidden.nbytes for hidden in first)
    # What runs a block holds its input, its output and both again stacked.
    at_once = stream.ranks.least(max(1, free_bytes(stream.device) // 2 // (4 * size)))
    for start in range(0, len(ordered), at_once):
        several = ordered[start : start + at_once]
        stream.skip_to(0, first)
        compared = reference is None and metric != "ppl"
        kept = _walked(stream, [*several, *[base] * compared])
        against = kept[base] if compared else reference
        kept = {removal: kept[removal] for removal in several}
        values.update(_compared(stream, kept, against, metric))
    return {removal: values[removal] for removal in removals}


def _walked(stream: HiddenStateStream, removals: Sequence[Removal]) -> dict[Removal, list[Tensor]]:
    """Return the hidden states behind the last block without the units of each set."""
    kept: dict[Removal, list[Tensor]] = {frozenset(): list(stream.hidden)}
    for block in stream:
        by_kinds: dict[frozenset[str], dict[Removal, list[Tensor]]] = {}
        for removal in removals:
            here = frozenset(unit for unit in removal if unit.block == block.index)
            before = frozenset(unit for unit in removal if unit.block < block.index)
            kinds = frozenset(unit.kind for unit in here)
            by_kinds.setdefault(kinds, {})[before | here] = kept[before]
        kept = {}
        for kinds, streams in by_kinds.items():
            kept.update(_behind(block, streams, kinds))
        stream.skip_to(block.index + 1, stream.hidden)
    return kept


def _behind(
    block: BlockStep,
    streams: Mapping[Candidate, list[Tensor]],
    kinds: Collection[str] = (),
) -> dict[Candidate, list[Tensor]]:
    """Return several streams behind a block, of which parts of some kinds are left out."""
    function = _without(block, kinds)
    known = list(streams)
    if function is None:
        return {candidate: list(streams[candidate]) for candidate in known}
    stream = block.stream
    behind: dict[Candidate, list[Tensor]] = {candidate: [] for candidate in known}
    for batch, ids in enumerate(stream.ids):
        size = max(1, _TOKENS_OF_CANDIDATES.on(ids.device) // ids.numel())
        for start in range(0, len(known), size):
            several = known[start : start + size]
            stacked = torch.cat(
                [streams[candidate][batch] for candidate in several], stream.batch_axis
            )
            results = block.run(batch, stacked, function=function)
            for candidate, hidden in zip(
                several, results.split(len(ids), stream.batch_axis), strict=True
            ):
                behind[candidate].append(stream.offload(hidden))
    return behind


def _without(block: BlockStep, kinds: Collection[str]) -> Function | None:
    """Return what a block runs where parts of some kinds are left out; None for nothing at all."""
    if not kinds:
        return block.function
    parts = {part.kind for part in sub_blocks(block.function, block.block.stream)}
    if "block" in kinds or (parts and parts <= set(kinds)):
        return None
    return without_sub_block(block.function, block.block.stream, kinds, block.function.name)


def block_output_metric(
    stream: HiddenStateStream,
    units: Sequence[PruningUnit],
    removed: Removal,
    metric: str,
) -> dict[PruningUnit, float]:
    """Score units by the hidden states behind their block, where others are removed already."""
    values: dict[PruningUnit, float] = {}
    for block in stream:
        gone = {unit.kind for unit in removed if unit.block == block.index}
        before = {None: list(block.hidden)}
        behind = _behind(block, before, gone)[None]
        for unit in units:
            if unit.block == block.index:
                hidden = _behind(block, before, {*gone, unit.kind})[None]
                values[unit] = _compared(stream, {unit: hidden}, behind, metric)[unit]
        block.advance(behind)
    return {unit: values[unit] for unit in units}


def _compared(
    stream: HiddenStateStream,
    streams: Mapping[Candidate, list[Tensor]],
    reference: Sequence[Tensor] | None,
    metric: str,
) -> dict[Candidate, float]:
    """Return the score of each of several streams.

    Args:
        streams: The hidden states of every batch.
        reference: Those that they are compared with; None where the metric compares with the text.
    """
    totals, count = dict.fromkeys(streams, 0.0), 0.0
    for batch, ids in enumerate(stream.ids):
        stream.progress("comparing results", batch, len(stream.ids))
        base = None if reference is None else _results(stream, batch, reference[batch], metric)
        for candidate, hidden in streams.items():
            results = _results(stream, batch, hidden[batch], metric)
            if metric == "ppl":
                lost = -token_log_likelihoods(results[:, :-1], ids[:, 1:])
                terms = int(predicted(ids[:, 1:], results.shape[-1]).sum())
            else:
                assert base is not None
                # A window at a time: in fp32, logits take as much memory again.
                pairs = zip(results, base, strict=True)
                lost = torch.stack([_distances(row, other, metric) for row, other in pairs])
                terms = lost.numel()
            totals[candidate] += float(lost.double().sum())
            del results
        count += terms if streams else 0
    count, *sums = stream.ranks.totals(count, *totals.values())
    totals = dict(zip(totals, sums, strict=True))
    stream.progress("comparing results", len(stream.ids), len(stream.ids))
    means = {candidate: total / max(count, 1) for candidate, total in totals.items()}
    if metric != "ppl":
        return means
    return {
        candidate: math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean
        for candidate, mean in means.items()
    }


def _results(stream: HiddenStateStream, batch: int, hidden: Tensor, metric: str) -> Tensor:
    """Return what a metric compares, from a batch's hidden states."""
    hidden = hidden.to(stream.device)
    return stream.output(batch, hidden) if metric in ("kl", "ppl") else hidden


def _distances(candidate: Tensor, reference: Tensor, metric: str) -> Tensor:
    """Return how far rows [tokens, N] are apart, fp32 [tokens]."""
    candidate, reference = candidate.float(), reference.float()
    if metric == "kl":
        p, q = torch.log_softmax(reference, -1), torch.log_softmax(candidate, -1)
        return (p.exp() * (p - q)).sum(-1)
    # 1 - cos as half the squared distance of unit vectors, and the angle from its chord: both
    # are exact where the rows nearly agree.
    apart = (F.normalize(candidate, dim=-1) - F.normalize(reference, dim=-1)).square().sum(-1) / 2
    if metric == "angular":
        return 2 * torch.arcsin((apart / 2).clamp(max=1).sqrt()) / math.pi
    return apart
