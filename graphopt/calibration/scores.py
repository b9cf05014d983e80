"""How much a block, or a part of one, matters: what leaving it out does to the results.

All candidates are scored in one walk over the program. Beside the stream of the whole model, a
stream is kept for every candidate passed so far; each block runs over all of them while its
weights are in memory, so that n blocks cost n (n + 1) / 2 block calls and every weight is read
once. The naive way, a run of the model for each candidate, costs about n^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import SourceError
from graphopt.evaluate.perplexity import token_log_likelihoods
from graphopt.execute.interpreter import Runner, complete_inputs, run_function
from graphopt.ir.blocks import Block, find_blocks, sub_blocks, without_sub_block
from graphopt.ir.graph import Call, Function, Program, Value
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, Dim, P, S
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

_AT_THE_END = ("mi", "kl", "ppl")
_TOKENS_AT_ONCE = 16384
_TOKENS_OF_CANDIDATES = PerDevice(cpu=4096, gpu=32768)
"""Tokens of several candidates that a block runs over at once: a GPU waits for launches else."""


@dataclass(frozen=True, order=True)
class Unit:
    """What may be left out: a whole block, or its attention or feed-forward part.

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
    """Scores of a walk.

    Attributes:
        values: Score of each candidate; not finite where the model without it is not.
        calls: Block calls it took, over one batch.
    """

    values: dict[Unit, float]
    calls: int

    def lowest(self) -> Unit:
        """Return the least important unit, the first of equals."""
        known = {unit: v for unit, v in self.values.items() if math.isfinite(v)}
        if not known:
            raise SourceError(
                "No candidate has a finite score: without it, the model gives NaN or Inf.",
                "Score with --device cpu, which computes in fp32, or with another score.",
            )
        return min(known, key=lambda unit: (known[unit], unit))


def units_of(program: Program, kinds: Sequence[str]) -> list[Unit]:
    """Return every candidate of these kinds, in order."""
    units: list[Unit] = []
    for index, block in enumerate(find_blocks(program)):
        function = program.functions[program.calls[block.position].function]
        parts = {part.kind for part in sub_blocks(function, block.stream)}
        for kind in kinds:
            if kind == "block" or kind in parts:
                units.append(Unit(index, kind))
    return units


def score_units(
    program: Program,
    units: Sequence[Unit],
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
        dtype: Of weights and activations; scores are computed in fp32.
        reference: What results are compared with: for every batch the last block's output (mi)
            or the logits (kl) of another model, from `final_results`; by default those of
            `program` itself.

    Raises:
        SourceError: A weight cannot be read.
    """
    walk = Walk(program, windows, device or torch.device("cpu"), dtype, progress)
    wanted: dict[int, list[Unit]] = {}
    for unit in units:
        wanted.setdefault(unit.block, []).append(unit)
    with torch.inference_mode():
        if metric in _AT_THE_END:
            values = walk.at_the_end(
                lambda index, run, before: {
                    unit: walk.without(unit, run, before) for unit in wanted.get(index, ())
                },
                metric,
                reference,
            )
        else:
            values = walk.at_the_block(wanted, metric)
    return Scores({unit: values[unit] for unit in units}, walk.calls // len(walk.ids))


def final_results(
    program: Program,
    windows: Tensor,
    metric: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return what `score_units` compares with, for every batch of windows."""
    walk = Walk(program, windows, device or torch.device("cpu"), dtype)
    with torch.inference_mode():
        streams = walk.through(lambda *_: None)
        return walk.results(streams, metric)


class RunBlock(Protocol):
    """Runs a block over a stream, [N, S, D] or as the model lays it out, N a multiple of the
    windows of a batch."""

    def __call__(
        self,
        batch: int,
        stream: Tensor,
        other: Function | None = None,
        *,
        changed: Mapping[str, Tensor] | None = None,
        watch: Callable[[Value, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the stream behind the block.

        Args:
            other: A variant of its function.
            changed: Weights, by slot, in the place of its own.
            watch: Called with every value inside the block as it is made.
        """


Candidate = TypeVar("Candidate", bound=Hashable)


class Walk:
    """One pass over the blocks with a stream for every batch of windows.

    Attributes:
        ids: The batches' windows, int64 [N, S].
        blocks: The program's.
        runner: Has their weights.
        calls: Block calls so far.
    """

    def __init__(
        self,
        program: Program,
        windows: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress = silent,
    ) -> None:
        self.program, self.progress = program, progress
        rows = max(1, _TOKENS_AT_ONCE // windows.shape[1])
        self.ids = [part.to(device) for part in windows.split(rows)]
        self.runner = Runner(program, dtype, device, keep_weights=False)
        self.blocks: list[Block] = find_blocks(program)
        self.calls = 0
        self.types = infer_program(program)[1]
        shape = self.types[self.stream_name].shape
        self._axis = shape.index(B) if B in shape else 0
        self._stacked: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.environments = [self._before_blocks(ids) for ids in self.ids]

    @property
    def stream_name(self) -> str:
        """What the first block's stream is called in the program."""
        first = self.blocks[0]
        return self.program.calls[first.position].args[first.stream]

    def _windows_of(self, stream: Tensor) -> int:
        """Return how many windows a stream holds: not all have the batch as their first axis."""
        return stream.shape[self._axis]

    def _before_blocks(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the program's inputs for windows, and what the calls before the blocks make."""
        environment = complete_inputs({"input_ids": ids})
        self._run_calls(0, self.blocks[0].position, [environment])
        return environment

    def _argument(self, name: str, batch: int, times: int) -> Tensor:
        """Return a value made before the blocks, for a batch's windows several times over.

        Most values have a row a window, or none. But a size may be any function of the batch's
        (a mixture of experts counts the tokens it routes, 2*B*S), and those are computed.
        """
        value = self.environments[batch][name]
        first, *rest = (*self.types[name].shape, 1)
        if times == 1 or not any(_depends_on_batch(size) for size in (first, *rest)):
            return value
        if first == B and not any(map(_depends_on_batch, rest)):
            return value.repeat(times, *[1] * (value.dim() - 1))
        if (batch, times) not in self._stacked:
            made = self._before_blocks(self.ids[batch].repeat(times, 1))
            self._stacked = {(batch, times): made}
        return self._stacked[batch, times][name]

    def _run_calls(self, start: int, stop: int, environments: Sequence[dict[str, Tensor]]) -> None:
        for call in self.program.calls[start:stop]:
            function = self.program.functions[call.function]
            weights = self.runner.call_weights(call)
            for environment in environments:
                args = [environment[name] for name in call.args]
                results = self._run(function, call, weights, args, environment["input_ids"].shape)
                environment.update(zip(call.results, results, strict=True))

    def _run(
        self,
        function: Function,
        call: Call,
        weights: Mapping[str, Tensor],
        args: list[Tensor],
        size: tuple[int, ...],
        watch: Callable[[Value, Tensor], None] | None = None,
    ) -> list[Tensor]:
        rows, length = size
        past = self.runner.empty_cache(rows) if function.caches else {}
        sizes = {B: rows, S: length, P: 0}
        return run_function(function, call, args, weights, sizes, past, watch=watch)[0]

    def through(
        self, behind: Callable[[int, RunBlock, list[Tensor], list[Tensor]], None]
    ) -> list[Tensor]:
        """Walk the blocks; return the stream behind the last one, for every batch.

        Args:
            behind: Called behind every block with its index, what runs it, and the streams
                before and behind it.
        """
        streams = [environment[self.stream_name] for environment in self.environments]
        self.progress("scoring blocks", 0, len(self.blocks))
        for index, block in enumerate(self.blocks):
            call = self.program.calls[block.position]
            function = self.program.functions[call.function]
            weights = self.runner.call_weights(call)

            def run(
                batch: int,
                stream: Tensor,
                other: Function | None = None,
                *,
                changed: Mapping[str, Tensor] | None = None,
                watch: Callable[[Value, Tensor], None] | None = None,
                block: Block = block,
                call: Call = call,
                function: Function = function,
                weights: Mapping[str, Tensor] = weights,
            ) -> Tensor:
                self.calls += 1
                rows, length = self.ids[batch].shape
                args = [
                    stream
                    if place == block.stream
                    else self._argument(name, batch, self._windows_of(stream) // rows)
                    for place, name in enumerate(call.args)
                ]
                own = {**weights, **(changed or {})}
                size = (self._windows_of(stream), length)
                return self._run(other or function, call, own, args, size, watch)[0]

            after = [run(batch, stream) for batch, stream in enumerate(streams)]
            behind(index, run, streams, after)
            streams = after
            self.progress("scoring blocks", index + 1, len(self.blocks))
        return streams

    def results(self, streams: Sequence[Tensor], metric: str) -> list[Tensor]:
        """Return what a metric compares, from the last block's outputs."""
        if metric == "mi":
            return list(streams)
        last = self.blocks[-1].position
        named = self.program.calls[last].results[0]
        environments = [
            {**environment, named: stream}
            for environment, stream in zip(self.environments, streams, strict=True)
        ]
        self._run_calls(last + 1, len(self.program.calls), environments)
        return [environment[self.program.outputs[0]] for environment in environments]

    def at_the_end(
        self,
        candidates: Callable[[int, RunBlock, list[Tensor]], Mapping[Candidate, list[Tensor]]],
        metric: str,
        reference: Sequence[Tensor] | None = None,
    ) -> dict[Candidate, float]:
        """Score candidates by what they come to behind the last block.

        Args:
            candidates: Called behind every block with its index, what runs it and the streams
                before it; returns for each candidate there the streams behind the block.
            metric: One of `METRICS` that is measured there.
            reference: As for `score_units`.
        """
        kept: dict[Candidate, list[Tensor]] = {}

        def behind(index: int, run: RunBlock, before: list[Tensor], after: list[Tensor]) -> None:
            known = list(kept)
            for batch, ids in enumerate(self.ids):
                size = max(1, _TOKENS_OF_CANDIDATES.on(ids.device) // ids.numel())
                for start in range(0, len(known), size):
                    part = known[start : start + size]
                    stacked = torch.cat([kept[candidate][batch] for candidate in part], self._axis)
                    found = run(batch, stacked).split(len(ids), self._axis)
                    self.calls += len(part) - 1
                    for candidate, stream in zip(part, found, strict=True):
                        kept[candidate][batch] = stream
            kept.update(candidates(index, run, before))

        streams = self.through(behind)
        base = self.results(streams, metric) if reference is None else list(reference)
        values: dict[Candidate, float] = {}
        count = len(kept)
        for done, candidate in enumerate(list(kept), start=1):
            values[candidate] = self._compare(
                self.results(kept.pop(candidate), metric), base, metric
            )
            self.progress("comparing results", done, count)
        return values

    def at_the_block(self, wanted: Mapping[int, Sequence[Unit]], metric: str) -> dict[Unit, float]:
        """Score units, by the index of their block, by the stream behind it."""
        values: dict[Unit, float] = {}

        def behind(index: int, run: RunBlock, before: list[Tensor], after: list[Tensor]) -> None:
            for unit in wanted.get(index, ()):
                values[unit] = self._compare(self.without(unit, run, before), after, metric)

        self.through(behind)
        return values

    def without(self, unit: Unit, run: RunBlock, before: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams behind a block that leaves the unit out."""
        block = self.blocks[unit.block]
        function = self.program.functions[self.program.calls[block.position].function]
        parts = {part.kind for part in sub_blocks(function, block.stream)}
        if unit.kind == "block" or parts == {unit.kind}:
            return list(before)
        twin = without_sub_block(function, block.stream, [unit.kind], function.name)
        return [run(batch, stream, twin) for batch, stream in enumerate(before)]

    def _compare(self, found: Sequence[Tensor], base: Sequence[Tensor], metric: str) -> float:
        total, count = 0.0, 0
        for ids, ours, theirs in zip(self.ids, found, base, strict=True):
            if metric == "ppl":
                likely = token_log_likelihoods(ours[:, :-1], ids[:, 1:])
                total, count = total - float(likely.double().sum()), count + likely.numel()
                continue
            for row, other in zip(ours, theirs, strict=True):
                total += float(_distances(row.float(), other.float(), metric).double().sum())
                count += len(row)
        mean = total / max(count, 1)
        return math.exp(min(mean, 700.0)) if metric == "ppl" and math.isfinite(mean) else mean


def _depends_on_batch(size: Dim) -> bool:
    return not isinstance(size, int) and B in size.free_symbols


def _distances(ours: Tensor, theirs: Tensor, metric: str) -> Tensor:
    """Return how far rows [tokens, N] are apart, fp32 [tokens]."""
    if metric == "kl":
        p, q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
        return (p.exp() * (p - q)).sum(-1)
    # 1 - cos as half the squared distance of unit vectors, and the angle from its chord: both
    # are exact where the rows nearly agree.
    apart = (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).square().sum(-1) / 2
    if metric == "angular":
        return 2 * torch.arcsin((apart / 2).clamp(max=1).sqrt()) / math.pi
    return apart
