"""What a pass did to the results: logits, KL divergence and perplexity on a small probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.execute.checked import CheckedRunner
from graphopt.execute.interpreter import complete_inputs
from graphopt.ir.context import context_length
from graphopt.ir.graph import Program
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.stepping import CHOICES
from graphopt.sources.windows import Bos, TokenText, tokenizer_at
from graphopt.support.progress import Progress, silent

RELATIVE_TOLERANCE = 1e-4
"""Tolerance relative to the largest logit (at least 1): more than rounding in fp32, far less than
any wrong term."""

ROW, PADDED_ROW, SHORT_ROW = 56, 47, 7
"""Lengths of the probe's texts: a full row, a left-padded one beside it, and short batches."""


JUMPS = CHOICES | {"quantise_dequantise", "policy_attention"}
"""Ops whose results may be far apart where their operands differ by a rounding."""


@dataclass(frozen=True)
class Probe:
    """Token ids that verification runs, and how they are laid out.

    Attributes:
        batches: Program inputs; the first is two rows, the second of them left-padded.
        is_text: The ids are text, so perplexity means something.
        note: Why not, where they aren't.
        begin: Ids that every text of it begins with.
    """

    batches: tuple[dict[str, Tensor], ...]
    is_text: bool
    note: str = ""
    begin: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return int(sum(int(batch["attention_mask"].sum()) for batch in self.batches))


@dataclass(frozen=True)
class Measured:
    """Logits of one program on the probe.

    Attributes:
        logits: The logits of every batch, at real tokens only: [tokens, vocab] in fp32.
        continued: The logits of the first batch, run in two steps with a KV cache; None without
            a cache.
        perplexity: On the rows of the first batch; None where the probe is no text.
    """

    logits: tuple[Tensor, ...]
    continued: Tensor | None
    perplexity: float | None


@dataclass(frozen=True)
class Difference:
    """How far two programs are apart on the probe.

    Attributes:
        max_abs_logit_delta: Over all real tokens; NaN where one of them is NaN.
        tolerance: What an exact pass may reach.
        kl: Mean KL divergence KL(before || after) over real tokens, in nats.
    """

    max_abs_logit_delta: float
    tolerance: float
    kl: float

    @property
    def within_tolerance(self) -> bool:
        return self.max_abs_logit_delta <= self.tolerance


def jumps(program: Program) -> bool:
    """Return whether rounding may move a program's results far: it rounds or chooses on the way.

    An activation within an fp32 rounding of the middle between two codes becomes either, and of
    two experts that score alike a token runs either.
    """
    functions = program.functions.values()
    return any(node.op in JUMPS for function in functions for node in function.nodes)


def make_probe(
    program: Program, text: str, tokenizer: Path | None, seed: int = 0, bos: Bos = "every"
) -> Probe:
    """Return the probe for a program: the start of `text`, or random ids without a tokenizer.

    Args:
        bos: Whether every text of the probe begins with what the tokenizer puts before one.

    Raises:
        SourceError: The text is shorter than the probe, or the tokenizer cannot be read.
    """
    _, carried = infer_program(program)
    vocab = int(carried[program.outputs[0]].shape[-1])
    row = min(ROW, context_length(program) or ROW)
    lengths = (row, min(PADDED_ROW, row), min(SHORT_ROW, row), 1)
    note = "random tokens: the model has no tokenizer"
    if tokenizer is not None:
        # The first few thousand characters hold far more tokens than the probe takes.
        tokens = TokenText.of(tokenizer_at(tokenizer, program.name), text[:8192], bos)
        begin = tokens.begin.tolist()
        needed = sum(max(length - len(begin), 0) for length in lengths)
        if len(tokens.ids) < needed:
            raise SourceError(
                f"The text has {len(tokens.ids)} tokens, verification needs {needed}.",
                "Give a longer text, or none to use the built-in one.",
            )
        ids = tokens.ids[:needed].tolist()
        if max([*begin, *ids]) < vocab:
            return Probe(_lay_out(ids, lengths, begin), is_text=True, begin=tuple(begin))
        note = f"random tokens: the tokenizer has ids beyond the {vocab} logits"
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(0, vocab, (sum(lengths),), generator=generator).tolist()
    return Probe(_lay_out(random, lengths, []), is_text=False, note=note)


def _lay_out(
    ids: Sequence[int], lengths: Sequence[int], begin: Sequence[int]
) -> tuple[dict[str, Tensor], ...]:
    """Return the batches of a probe: texts of `lengths`, each `begin` and the next of `ids`."""
    parts: list[list[int]] = []
    start = 0
    for length in lengths:
        taken = max(length - len(begin), 0)
        parts.append([*begin[:length], *ids[start : start + taken]])
        start += taken
    full, padded, short, single = parts
    gap = len(full) - len(padded)
    first = complete_inputs(
        {
            "input_ids": torch.tensor([full, [0] * gap + padded]),
            "attention_mask": torch.tensor([[1] * len(full), [0] * gap + [1] * len(padded)]),
        }
    )
    others = [complete_inputs({"input_ids": torch.tensor([part])}) for part in (short, single)]
    return (first, *others)


def measure(
    programs: Sequence[Program],
    probe: Probe,
    *,
    steps_alone: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    progress: Progress = silent,
    what: str = "verifying",
) -> list[Measured]:
    """Run the probe through programs side by side, one layer in memory at a time.

    A weight that several programs have is read once. A program with a KV cache also runs the
    first batch in two steps.

    Args:
        steps_alone: Run the last program in steps alone; it has no `logits` then.
        dtype: Of weights and activations.

    Raises:
        SourceError: A weight holds NaN or Inf, or cannot be read.
    """
    device, shared = device or torch.device("cpu"), dict[int, Tensor]()
    last = len(programs) - 1
    measurements = [
        _Measurement(program, probe, not (steps_alone and number == last), dtype, device, shared)
        for number, program in enumerate(programs)
    ]
    total = max(len(program.calls) for program in programs)
    progress(what, 0, total)
    with torch.no_grad():
        streams = itertools.zip_longest(*(measurement.calls() for measurement in measurements))
        for done, _ in enumerate(streams, start=1):
            shared.clear()
            progress(what, done, total)
    return [measurement.result() for measurement in measurements]


class _SharingRunner(CheckedRunner):
    """Reads a weight once for all programs that have it, until `shared` is cleared."""

    shared: dict[int, Tensor]

    def weight(self, name: str) -> Tensor:
        place = id(self.program.weights[name].producer)
        if place not in self.shared:
            self.shared[place] = super().weight(name)
        return self.shared[place]


class _Measurement:
    """The probe on its way through one program."""

    def __init__(
        self,
        program: Program,
        probe: Probe,
        whole: bool,
        dtype: torch.dtype,
        device: torch.device,
        shared: dict[int, Tensor],
    ) -> None:
        self.program, self.probe, self.whole = program, probe, whole
        self.runner = _SharingRunner(program, dtype=dtype, device=device, keep_weights=False)
        self.runner.shared = shared
        self.batches = [_to(batch, device) for batch in (probe.batches if whole else ())]
        self.pasts = [self.runner.empty_cache(b["input_ids"].shape[0]) for b in self.batches]
        if program.states:
            first = _to(probe.batches[0], device)
            steps = _steps(first)
            self.batches += steps
            self.pasts += [self.runner.empty_cache(first["input_ids"].shape[0])] * len(steps)
        self.outputs: list[Tensor] = []

    def calls(self) -> Iterator[None]:
        """Run one call after the other, on all batches."""
        if not self.batches:
            return
        for call, environments in self.runner.stream(self.batches, self.pasts):
            if call is self.program.calls[-1]:
                output = self.program.outputs[0]
                self.outputs = [env[output].float().cpu() for env in environments]
            yield

    def result(self) -> Measured:
        """Return what came out."""
        real = [batch["attention_mask"].bool() for batch in self.probe.batches]
        whole = self.outputs[: len(real)] if self.whole else []
        stepped = self.outputs[len(whole) :]
        continued = torch.cat(stepped, 1)[real[0]] if stepped else None
        logits = tuple(out[mask] for out, mask in zip(whole, real, strict=bool(whole)))
        is_text = bool(whole) and self.probe.is_text
        perplexity = _perplexity(whole[0], self.probe.batches[0]) if is_text else None
        return Measured(logits, continued, perplexity)


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _steps(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split a batch in two steps; the second sees the first in the cache."""
    length = batch["input_ids"].shape[1]
    cut = max(1, length * 2 // 3)
    return [
        {
            "input_ids": batch["input_ids"][:, start:stop],
            "position_ids": batch["position_ids"][:, start:stop],
            "attention_mask": batch["attention_mask"][:, :stop],
        }
        for start, stop in ((0, cut), (cut, length))
        if stop > start
    ]


def _perplexity(logits: Tensor, batch: Mapping[str, Tensor]) -> float:
    """Return exp of the mean next-token loss over the rows of a batch."""
    loss, count = 0.0, 0
    for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
        places = mask.bool()
        row, ids = row[places], ids[places].cpu()
        log_probabilities = torch.log_softmax(row[:-1].double(), -1)
        loss -= float(log_probabilities.gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    return math.exp(min(loss / max(count, 1), 700.0)) if math.isfinite(loss) else math.nan


def compare(before: Measured, after: Measured) -> Difference:
    """Return how far `after` is from `before`."""
    delta, divergence, count, largest = 0.0, 0.0, 0, 1.0
    pairs = list(zip(before.logits, after.logits, strict=True))
    if after.continued is not None:
        pairs.append((before.logits[0], after.continued))
    for old, new in pairs:
        if old.shape != new.shape:
            raise UsageError(f"Logits of {tuple(old.shape)} became {tuple(new.shape)}.")
        largest = max(largest, float(old.abs().max()))
        difference = float((old - new).abs().max())
        delta = difference if math.isnan(difference) else max(delta, difference)
        if math.isnan(delta):
            break
    for old, new in pairs[: len(before.logits)]:
        if old is new:
            count += len(old)
            continue
        for old_row, new_row in zip(old.double(), new.double(), strict=True):
            p, q = torch.log_softmax(old_row, -1), torch.log_softmax(new_row, -1)
            divergence += float((p.exp() * (p - q)).sum())
            count += 1
    kl = divergence / count
    kl = kl if math.isnan(kl) else max(kl, 0.0)
    return Difference(delta, RELATIVE_TOLERANCE * largest, kl)
