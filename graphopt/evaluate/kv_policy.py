"""What a KV policy costs in quality: perplexity behind a prompt, and recall of attention.

On a text that is given, all tokens are known. So a model is not decoded step by step: it is walked
layer by layer, over all tokens of all texts (`graphopt.execute.hidden_states`). In each layer the
queries of the steps are scored against all pages of keys, the policy is run over the steps on
these scores (`graphopt.evaluate.policy_steps`), and attention is computed over what each step
reads. The next layer sees the hidden states that this gives. It is what decoding step by step
gives, in a fraction of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.evaluate.perplexity import of_mean_loss
from graphopt.evaluate.policy_steps import pages_read
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.execute.page_attention import (
    AttentionLayer,
    CausalAttention,
    PageScores,
    attention_layers,
)
from graphopt.ir.graph import Program, Value
from graphopt.ir.kv_policies import KVPolicy, PageBudget
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import Ranks, sharing

TOKENS_AT_ONCE = PerDevice(cpu=8192, gpu=65536)
"""Tokens of the texts whose scores of one layer are in memory at once."""

BUCKETS = 8
"""Parts of a text whose perplexities are told one by one."""

GRID = (24, 48)
"""Rows and columns of a picture of the pages that are read: steps and pages, in groups."""


@dataclass(frozen=True)
class LayerReads:
    """What the steps of one attention read.

    Attributes:
        layer: Its number among the attentions of the program.
        name: Where it is.
        recall_G: Of each KV head the attention mass of the pages that a step selected, over that of
            all pages, a mean over query heads and steps. Steps that read all pages are left out.
        oracle_recall_G: The same of the best pages, as many, with the same sink and local ones.
        pages_read: Pages that a step reads for a KV head: a mean over all steps.
        grid: Share of the KV heads and steps that read a page, by time and place: a row for some
            steps, a number for some neighbouring pages.
    """

    layer: int
    name: str
    recall_G: list[float]
    oracle_recall_G: list[float]
    pages_read: float
    grid: list[list[float]]

    @property
    def recall(self) -> float:
        """The mean over the KV heads."""
        return sum(self.recall_G) / len(self.recall_G)

    @property
    def oracle_recall(self) -> float:
        """The mean over the KV heads."""
        return sum(self.oracle_recall_G) / len(self.oracle_recall_G)


@dataclass(frozen=True)
class PolicyResult:
    """What a policy did to a model on some texts.

    Attributes:
        tokens: Tokens of a text.
        prompt: How many of them were read at once; each behind them is a step of its own.
        texts: How many texts.
        perplexity: Of the tokens that steps predict.
        by_position: The perplexity of each of `BUCKETS` equal parts of the text that is scored.
        layers: The attentions that followed the policy.
        left_alone: Those that did not, as (name, reason).
        seconds: Time it took.
    """

    tokens: int
    prompt: int
    texts: int
    perplexity: float
    by_position: list[float]
    layers: list[LayerReads] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def recall(self) -> float | None:
        """The mean over layers and KV heads; None where no layer follows a policy."""
        return _mean([layer.recall for layer in self.layers])

    @property
    def oracle_recall(self) -> float | None:
        """That of the best pages, as many."""
        return _mean([layer.oracle_recall for layer in self.layers])

    @property
    def pages_read(self) -> float | None:
        """Pages that a step reads for a KV head of a layer that follows the policy."""
        return _mean([layer.pages_read for layer in self.layers])


StepObserver = Callable[[AttentionLayer, int, PageScores, Tensor], None]
"""Is called with an attention, the number of a batch, its scores, and bool [B, G, S, N]: which
pages its steps read."""


def policy_layers(
    program: Program, dense_layers: int = 0, dense: Sequence[str] = ()
) -> tuple[list[AttentionLayer], list[tuple[str, str]]]:
    """Return the attentions that follow a policy, and the others as (name, reason).

    Args:
        dense_layers: How many attentions at the front are left alone.
        dense: Others that are, by the module paths of their layers, or as the KV states that they
            have or would get: `kv.0` for the first.

    Raises:
        SourceError: None is left to follow it.
        UsageError: A name of `dense` is that of no attention.
    """
    layers = attention_layers(program)
    names = {
        layer.index: {layer.name, program.calls[layer.position].path, f"kv.{layer.index}"}
        for layer in layers
    }
    unknown = [name for name in dense if not any(name in own for own in names.values())]
    if unknown:
        known = [layer.name for layer in layers]
        raise UsageError(
            f"dense={unknown[0]!r} is no attention of {program.name}.",
            f"Give names such as {known[0]!r}, or `kv.0` to `kv.{len(known) - 1}`."
            if known
            else "Leave dense out.",
        )
    reasons = {
        layer.index: f"it is among the first {dense_layers} layers"
        if layer.index < dense_layers
        else "it is to stay dense"
        if names[layer.index] & set(dense)
        else layer.left_alone
        for layer in layers
    }
    left = [(layer.name, reason) for layer in layers if (reason := reasons[layer.index])]
    following = [layer for layer in layers if reasons[layer.index] is None]
    if not following:
        why = "; ".join(sorted({reason for _, reason in left})) or "it has no attention"
        raise SourceError(
            f"No attention of {program.name} can follow a KV policy: {why}.",
            "Give a model with causal attention over all its tokens, and fewer dense layers.",
        )
    return following, left


def walk_policy(
    stream: HiddenStateStream,
    policy: KVPolicy,
    prompt: int,
    layers: Sequence[AttentionLayer],
    observe: StepObserver | None = None,
) -> None:
    """Move a stream of hidden states behind all blocks, with a policy in the steps of some layers.

    Args:
        stream: In front of the first block.
        prompt: Tokens at the front of every text that are read at once.
        layers: The attentions that follow the policy.
        observe: Called for each of them and each batch.
    """
    by_position: dict[int, list[AttentionLayer]] = {}
    for layer in layers:
        by_position.setdefault(layer.position, []).append(layer)
    for block in stream:
        here = by_position.get(block.block.position)
        if here is None:
            continue
        hidden = [
            stream.offload(_with_policy(block, batch, policy, prompt, here, observe))
            for batch in range(len(stream.ids))
        ]
        block.advance(hidden)


@torch.no_grad()
def _with_policy(
    block: BlockStep,
    batch: int,
    policy: KVPolicy,
    prompt: int,
    layers: Sequence[AttentionLayer],
    observe: StepObserver | None,
) -> Tensor:
    """Return a batch's hidden states behind a block whose attentions follow a policy."""
    page = policy.budget.page
    outputs: dict[Value, Tensor] = {}
    for layer in layers:
        wanted = CausalAttention.wanted(layer.node)
        values = dict(zip(wanted, block.values(batch, wanted, outputs), strict=True))
        attention = CausalAttention.of_values(layer.node, block.call, values)
        scores = attention.page_scores(prompt, page)
        read_BGSN = pages_read(policy, attention, scores, layer.index)
        if observe is not None:
            observe(layer, batch, scores, read_BGSN)
        steps = attention.over_pages(read_BGSN, prompt, page)
        outputs[layer.node.outputs[0]] = torch.cat((attention.dense(0, prompt), steps), 2)
    return block.values(batch, [block.function.results[0]], outputs)[0]


def measure_policy(
    runner: Runner,
    windows: Tensor,
    policy: KVPolicy | None,
    *,
    prompt: int | None = None,
    dense_layers: int = 0,
    dense: Sequence[str] = (),
    begin: int = 0,
    progress: Progress = silent,
) -> PolicyResult:
    """Measure a policy on texts: the front of each is a prompt, and each token behind it a step.

    Ranks share the texts.

    Args:
        runner: Runs the program.
        windows: int64 [texts, S], without padding.
        policy: None for the model as it is.
        prompt: Tokens that are read at once, attention dense; half of a text by default.
        dense_layers, dense: Which attentions are left alone; see `policy_layers`.
        begin: Tokens that every text begins with and that count in no perplexity.

    Raises:
        SourceError: No attention of the program can follow a policy.
        UsageError: The prompt leaves no step, or the texts are too short.
    """
    tokens = windows.shape[1]
    prompt = tokens // 2 if prompt is None else prompt
    if not 1 <= prompt <= tokens - 2:
        raise UsageError(
            f"A prompt of {prompt} tokens in texts of {tokens} leaves no step that predicts a "
            "token of the text.",
            f"Give a prompt of 1 to {tokens - 2} tokens, or longer texts.",
        )
    started = time.perf_counter()
    likelihoods = ProgramLikelihoods(runner)
    if policy is None:
        ranks = sharing(len(windows))
        at_once = rows_at_once(runner, tokens)
        own = likelihoods.of(ranks.part(windows), at_once=at_once, progress=progress, what="dense")
        return _result(-ranks.gathered(own).cpu(), prompt, begin, [], [], started)
    layers, left_alone = policy_layers(runner.program, dense_layers, dense)
    stream = HiddenStateStream(
        runner,
        windows,
        tokens_at_once=rows_at_once(runner, tokens) * tokens,
        progress=progress,
        what=policy.kind,
    )
    reads = {layer.index: _Reads(layer, policy) for layer in layers}
    walk_policy(
        stream, policy, prompt, layers,
        lambda layer, _, scores, read: reads[layer.index].add(scores, read),
    )  # fmt: skip
    parts = [
        likelihoods.of_values(ids, *stream.behind_blocks(batch, stream.hidden[batch]))
        for batch, ids in enumerate(stream.ids)
    ]
    losses = -stream.ranks.gathered(torch.cat(parts)).cpu()
    found = [reads[layer.index].result(stream.ranks) for layer in layers]
    return _result(losses, prompt, begin, found, left_alone, started)


def rows_at_once(runner: Runner, tokens: int) -> int:
    """Return how many texts of so many tokens are a batch."""
    return max(1, TOKENS_AT_ONCE.on(runner.device) // tokens)


class _Reads:
    """What the steps of one attention read, batch by batch."""

    def __init__(self, layer: AttentionLayer, policy: KVPolicy) -> None:
        self._layer, self._policy = layer, policy
        self._recalls: list[Tensor] = []
        self._oracle: list[Tensor] = []
        self._read: list[Tensor] = []

    def add(self, scores: PageScores, read_BGSN: Tensor) -> None:
        """Count the steps of a batch."""
        mass_BGSN, step = scores.mass(), torch.arange(read_BGSN.shape[2])
        every = self._policy.calibrate_every
        selecting = torch.ones_like(step, dtype=torch.bool)
        if every is not None and every > 1:
            selecting = (step + 1 + self._layer.index) % every != 0
        best_BGSN = best_pages(self._policy.budget, scores.first, mass_BGSN, read_BGSN.sum(-1))
        for read, recalls in ((read_BGSN, self._recalls), (best_BGSN, self._oracle)):
            recalls.append((mass_BGSN * read).sum(-1).cpu()[:, :, selecting].double())
        self._read.append(read_BGSN.cpu())

    def result(self, ranks: Ranks) -> LayerReads:
        """Return the means over what all ranks counted."""
        read_BGSN, recalls, oracle = (
            ranks.gathered(torch.cat(parts)) for parts in (self._read, self._recalls, self._oracle)
        )
        return LayerReads(
            self._layer.index,
            self._layer.name,
            recalls.mean((0, 2)).tolist(),
            oracle.mean((0, 2)).tolist(),
            float(read_BGSN.sum(-1).double().mean()),
            grid_of(read_BGSN),
        )


def best_pages(budget: PageBudget, first: int, mass_BGSN: Tensor, counts_BGS: Tensor) -> Tensor:
    """Return the pages that hold most attention, the sink and the local ones among them.

    Args:
        budget: Which pages are always read.
        first: The token of the first step.
        mass_BGSN: The attention mass of each page.
        counts_BGS: How many pages are taken.

    Returns:
        bool [B, G, S, N].
    """
    steps, pages = mass_BGSN.shape[2:]
    number = torch.arange(pages, device=mass_BGSN.device)
    last = torch.arange(first, first + steps, device=mass_BGSN.device)[:, None] // budget.page
    always = (number < budget.sink) | (number > last - budget.local)
    rank = torch.where(always, float("inf"), mass_BGSN).masked_fill(number > last, float("-inf"))
    order = rank.argsort(-1, descending=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(
        -1, order, number < counts_BGS[..., None]
    )


def grid_of(read_BGSN: Tensor) -> list[list[float]]:
    """Return the picture of the pages that steps read; see `LayerReads.grid`."""
    shares_SN = read_BGSN.float().mean((0, 1))
    size = (min(GRID[0], shares_SN.shape[0]), min(GRID[1], shares_SN.shape[1]))
    groups = F.adaptive_avg_pool2d(shares_SN[None, None], size)[0, 0]
    return [[round(share, 3) for share in row] for row in groups.tolist()]


def _result(
    losses: Tensor,
    prompt: int,
    begin: int,
    layers: list[LayerReads],
    left_alone: list[tuple[str, str]],
    started: float,
) -> PolicyResult:
    """Return the result of losses [texts, S - 1], of each token but the first."""
    texts, predicted = losses.shape
    scored = losses[:, max(begin, 1) - 1 :].double()
    parts = [part for part in scored.tensor_split(BUCKETS, 1) if part.numel()]
    return PolicyResult(
        tokens=predicted + 1,
        prompt=prompt,
        texts=texts,
        perplexity=of_mean_loss(float(losses[:, prompt:].double().mean())),
        by_position=[of_mean_loss(float(part.mean())) for part in parts],
        layers=layers,
        left_alone=left_alone,
        seconds=time.perf_counter() - started,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
