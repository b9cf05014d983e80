"""Training of the KV policy `predictor` on traces of a model's attention.

A network is shown the history that decoding with a budget leaves: rows of which only the pages are
observed that another policy would have read (the moving average, with noise), at budgets of a
quarter, an eighth and a sixteenth of the text, with a calibration now and then. It learns the next
row of dense attention by the mean squared error, and which pages to take by the recall of the mass
that is selected. So that it has a gradient the choice of the best pages is softened, and still adds
up to as many pages: otherwise scores that are nearly equal would take half of all of them. The
network starts as the moving average and learns what else there is. How good it has become is
measured by following it over the held-out text: there its own choices make its history.

Layout letters as in `graphopt.training.kv_traces`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir.kv_policies import (
    Ema,
    KVPolicy,
    PageBudget,
    Predictor,
)
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent
from graphopt.training.kv_replay import pages_read, recall
from graphopt.training.kv_samples import Samples
from graphopt.training.kv_traces import PageTraces, record_traces

FRACTIONS = (4, 8, 16)
"""Budgets are one of so many tokens of a text."""

BATCH = PerDevice(cpu=16, gpu=128)
RATE = 1e-3
AVERAGED = 0.98
"""What is left of the average of the weights at each step; that average is what is checked."""

CHECK_EVERY = PerDevice(cpu=25, gpu=50)
COMPARED_STEPS = 256
"""Steps of the held-out text on which policies are compared in the end."""

CHECKED_STEPS, CHECKED_LAYERS = PerDevice(cpu=48, gpu=256), PerDevice(cpu=6, gpu=1000)
"""Steps of the held-out text, and about how many layers, on which training is followed."""

SQUARED_ERROR = 1.0
"""What the mean squared error counts beside the missing recall."""

PATIENCE = 10
"""Checks without a higher held-out recall before training stops."""

LEAST_GAIN = 1e-3
"""A recall that is higher by less than this is no better."""


@dataclass(frozen=True)
class KVTrainingResult:
    """What a training came to.

    Attributes:
        weights: Those of the highest held-out recall, fp32.
        group: Query heads of a KV head.
        steps: Training steps that were made.
        checks: (step, recall) along the way, on a part of the held-out text: the mean over the
            budgets.
        recalls: Of `ema` and `predictor` on the held-out text, by the fraction of the budget.
        seconds: By what they were spent on.
        stopped: Why training ended.
    """

    weights: Mapping[str, Tensor]
    group: int
    steps: int
    checks: list[tuple[int, float]]
    recalls: dict[str, dict[int, float]]
    seconds: dict[str, float]
    stopped: str

    @property
    def gain(self) -> float:
        """By how much the mean recall is above that of the moving average."""
        means = {kind: sum(of.values()) / len(of) for kind, of in self.recalls.items()}
        return means["predictor"] - means["ema"]

    @property
    def shortcoming(self) -> str | None:
        """What has to be known of a training that was of no use; None of one that was."""
        if self.gain > LEAST_GAIN:
            return None
        return (
            f"DOES NOT BEAT EMA on the held-out text: its recall is {self.gain:+.4f} beside that "
            "of the moving average, which costs next to nothing. Use the policy ema, or train on "
            "more text"
        )


def budgets(tokens: int, page: int) -> list[PageBudget]:
    """Return the budgets that are trained for in texts of so many tokens.

    Raises:
        UsageError: Texts are too short for a page to be chosen in the smallest.
    """
    always = max(1, 64 // page)
    chosen = []
    for fraction in FRACTIONS:
        pages = tokens // fraction // page
        sink = local = min(always, max(1, (pages - 1) // 3))
        if pages <= sink + local:
            raise UsageError(
                f"A sixteenth of {tokens} tokens is too little for sink, local and one page of "
                f"{page} tokens more.",
                f"Give --seqlen {3 * page * FRACTIONS[-1]} or more, or a smaller page.",
            )
        chosen.append(PageBudget(page, pages, sink, local))
    return chosen


def train_predictor(
    runner: Runner,
    windows: Tensor,
    *,
    page: int = 16,
    held_out: int = 1,
    recorded_steps: int = 1024,
    seed: int = 0,
    seconds: float = 600.0,
    most_steps: int = 2000,
    progress: Progress = silent,
) -> KVTrainingResult:
    """Train a predictor for a model on texts; nothing is learnt from the last `held_out` of them.

    With one seed the same network results, where it is not the time that ends training.

    Args:
        windows: int64 [texts, tokens], two or more.
        recorded_steps: How many tokens at the end of a text are steps to learn from.
        seconds: For training alone: recording and comparing come in addition.
        most_steps: Training steps at most.

    Raises:
        UsageError: There are too few texts, they are too short, or no attention qualifies.
    """
    tokens = windows.shape[1]
    several = budgets(tokens, page)
    policy = Predictor(several[0])
    if len(windows) <= held_out:
        raise UsageError(
            f"{len(windows)} texts of {tokens} tokens, of which {held_out} are held out.",
            "Give a longer text, or a smaller --seqlen.",
        )
    steps = policy.history + recorded_steps
    if steps >= tokens:
        raise UsageError(
            f"Texts of {tokens} tokens have no prompt in front of {steps} steps.",
            f"Give --seqlen {2 * steps} or more.",
        )
    clock = time.perf_counter
    spent, since = {}, clock()
    traces = record_traces(runner, windows, page, steps, progress=progress)
    spent["recording"] = clock() - since
    return train_on_traces(
        traces, policy, several, held_out=held_out, seed=seed, seconds=seconds,
        most_steps=most_steps, spent=spent, progress=progress,
    )  # fmt: skip


def train_on_traces(
    traces: PageTraces,
    policy: Predictor,
    several: list[PageBudget],
    *,
    held_out: int,
    seed: int,
    seconds: float,
    most_steps: int,
    spent: dict[str, float] | None = None,
    progress: Progress = silent,
) -> KVTrainingResult:
    """Train a predictor on traces; see `train_predictor`."""
    spent = {} if spent is None else spent
    since = time.perf_counter()
    texts = range(traces.probs_LBGSN.shape[1])
    device = traces.probs_LBGSN.device
    held = traces.texts(texts[-held_out:]).last(policy.history + COMPARED_STEPS)
    samples = Samples(traces.texts(texts[:-held_out]), policy, several, seed, progress)
    spent["preparing"] = time.perf_counter() - since
    since = time.perf_counter()
    layers = len(held.probs_LBGSN)
    some = range(0, layers, max(1, layers // CHECKED_LAYERS.on(device)))
    probe = held.layers(some).last(policy.history + CHECKED_STEPS.on(device))

    def check(weights: Mapping[str, Tensor]) -> float:
        recalls = _recalls(policy.with_weights(weights), probe, several, policy.history, silent)
        return sum(recalls.values()) / len(recalls)

    trained = _train(samples, check, policy, seed, seconds, most_steps, progress)
    spent["training"] = time.perf_counter() - since
    since = time.perf_counter()
    recalls = compare(held, policy.with_weights(trained.weights), several, progress)
    spent["comparing"] = time.perf_counter() - since
    return KVTrainingResult(
        {name: x.cpu() for name, x in trained.weights.items()}, traces.group, trained.steps,
        trained.checks, recalls, spent, trained.stopped,
    )  # fmt: skip


def compare(
    traces: PageTraces, predictor: Predictor, several: list[PageBudget], progress: Progress
) -> dict[str, dict[int, float]]:
    """Return the recall of the moving average and of a predictor, run step by step over traces."""
    ema = Ema(several[0], predictor.calibrate_every)
    return {
        policy.kind: _recalls(policy, traces, several, predictor.history, progress)
        for policy in (ema, predictor)
    }


def _recalls(
    policy: KVPolicy,
    traces: PageTraces,
    several: list[PageBudget],
    history: int,
    progress: Progress,
) -> dict[int, float]:
    """Return the recall of a policy at each budget, run over traces behind dense steps."""
    every, recalls = policy.calibrate_every, {}
    for fraction, budget in zip(FRACTIONS, several, strict=True):
        what = f"comparing {policy.kind} at 1/{fraction}"
        with_budget = replace(policy, budget=budget)
        read = pages_read(with_budget, traces, history, progress=progress, what=what)
        recalls[fraction] = recall(read, traces, history, every)
    return recalls


def starting_weights(policy: Predictor, seed: int) -> dict[str, Tensor]:
    """Return weights to train from: the score is the last row, the moving average.

    The last row is told by what is behind it: a feature that is 1 in every row, and 0 where the
    second convolution has zeros for the row behind the last, is taken off all other rows. Features
    drawn at random count nothing yet.
    """
    weights = new_weights(policy.channels, seed)
    weights["conv3.weight"][:], weights["conv3.bias"][:] = 0, 0
    value, one = 0, 1  # features of the first convolution
    for feature in (value, one):
        weights["conv1.weight"][feature], weights["conv1.bias"][feature] = 0, feature == one
    weights["conv1.weight"][value, 0, 1, 1] = 1
    last = 0  # feature of the second
    weights["conv2.weight"][last], weights["conv2.bias"][last] = 0, 0
    weights["conv2.weight"][last, value, 1, 1] = 1
    weights["conv2.weight"][last, one, 2, 1] = -1
    weights["conv3.weight"][0, last, 0] = policy.history
    return weights


@dataclass
class _Trained:
    weights: dict[str, Tensor]
    steps: int = 0
    checks: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""


def _train(
    samples: Samples,
    check: Callable[[Mapping[str, Tensor]], float],
    policy: Predictor,
    seed: int,
    seconds: float,
    most_steps: int,
    progress: Progress,
) -> _Trained:
    """Return the weights of the highest recall on the held-out text, by `check`.

    Those are averages of the weights along the way, which vary less than the last ones do: neither
    the rate nor the time that is left has to be known ahead.
    """
    device, generator = samples.device, torch.Generator().manual_seed(seed)
    weights = {name: x.to(device) for name, x in starting_weights(policy, seed).items()}
    average = {name: x.clone() for name, x in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    optimiser = torch.optim.Adam(weights.values(), RATE)
    best, trained, since = -1.0, _Trained({}), time.perf_counter()
    worse, every, batch = 0, CHECK_EVERY.on(device), BATCH.on(device)
    for step in range(most_steps + 1):
        late = time.perf_counter() - since > seconds
        if step % every == 0 or late or step == most_steps:
            mean = check(average)
            trained.checks.append((step, mean))
            worse += 1
            if mean > best:
                best, worse = mean, 0
                trained.weights = {name: x.clone() for name, x in average.items()}
            trained.steps = step
            if worse >= PATIENCE:
                trained.stopped = f"held-out recall was no higher in {PATIENCE} checks"
                break
            if late:
                trained.stopped = f"{seconds:g} seconds were over"
                break
        if step == most_steps:
            trained.stopped = f"all {most_steps} steps were made"
            break
        error, missing = samples.draw(batch, generator).losses(weights)
        optimiser.zero_grad()
        with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, deterministic=True):
            (SQUARED_ERROR * error + missing).backward()
        optimiser.step()
        with torch.no_grad():
            for name, weight in weights.items():
                average[name].lerp_(weight, 1 - AVERAGED)
        progress("training", step + 1, most_steps)
    return trained
