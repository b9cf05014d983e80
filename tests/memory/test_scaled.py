"""Sizes that were not run: their traces, and answers that are those of a search without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from families import captured
from programs import tiny_program
from torch import Tensor, nn

from graphopt.execute.memory_fit import predict_step
from graphopt.ir import Program
from graphopt.memory import capacity
from graphopt.memory.capacity import Fit, largest
from graphopt.memory.predict import Prediction, predict_peak, replay
from graphopt.memory.scaled import ScaledTrace
from graphopt.memory.workload import Workload
from graphopt.pass_manager.contract import Context, make_pass

MB = 2**20


def cached(family: str) -> Program:
    return make_pass("insert-kv-cache", {}).run(captured(family)[1], Context()).program


def both_ways(predict: Callable[[int, int], Prediction], memory: int, degree: int = 1) -> int:
    """Check that a search by traces finds what one without does; return what it saves."""
    counts: list[int] = []

    def search(**options: object) -> Fit:
        asked: list[int] = []

        def asking(size: int) -> Prediction:
            asked.append(size)
            return predict(size, memory)

        fit = largest(asking, memory, most=2**16, **options)  # type: ignore[arg-type]
        assert len(asked) == len(set(asked))
        counts.append(len(asked))
        return fit

    by_traces = search(serve=partial(replay, limit=memory), degree=degree)
    plain = search()
    assert (by_traces.value, by_traces.bounded) == (plain.value, plain.bounded)
    for name in ("allocated", "reserved", "live", "categories", "libraries", "short_of", "notes"):
        assert getattr(by_traces.prediction, name) == getattr(plain.prediction, name), name
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("family", "phase"),
    [pytest.param("tiny", "decode", marks=pytest.mark.slow),
     *(pytest.param(family, phase, marks=pytest.mark.exhaustive)
       for family in ("gemma2", "bloom") for phase in ("prefill", "decode", "train"))],
)  # fmt: skip
def test_answers_are_those_of_predictions_alone(family: str, phase: str) -> None:
    """For batches and lengths, of what grows with both, of windows, biases and soft-caps."""
    program = tiny_program(cache=True, layers=1) if family == "tiny" else cached(family)

    def of_batch(size: int, limit: int) -> Prediction:
        return predict_step(program, phase, batch=size, seq=24, limit=limit)

    def of_length(size: int, limit: int) -> Prediction:
        return predict_step(program, phase, batch=8, seq=size, limit=limit)

    saved = both_ways(of_batch, 100 * MB)
    if phase != "train":
        saved += both_ways(of_length, 100 * MB, degree=2)
    assert saved > 0


def layer(size: int, jump: int = 0) -> Callable[[torch.device], Workload]:
    """Return a step that makes [size, size] values, and beyond a size in two halves."""

    def make(device: torch.device) -> Workload:
        weight = torch.ones(256, 256, device=device)

        def step() -> Tensor:
            x = torch.ones(size, 256, device=device) @ weight
            scores = x @ x.t()
            if jump and size > jump:
                scores = scores * 1 + scores * 2
            return nn.functional.softmax(scores, -1)

        return Workload("layer", step, device)

    return make


def test_what_grows_with_the_square_is_worked_out_to_the_byte() -> None:
    traces = [predict_peak(layer(size)).trace for size in (2, 3, 4)]
    scaled = ScaledTrace.of(traces, 2)
    assert scaled is not None
    for size in (2, 3, 5, 100, 777):
        found = predict_peak(layer(size))
        assert scaled.agrees(size, found.trace)
        assert replay(scaled.at(size)).reserved == found.reserved
    # A line is not enough for it, and other steps are no others' size.
    line = ScaledTrace.of(traces[:2], 2)
    assert line is not None and line.agrees(3, traces[1]) and not line.agrees(4, traces[2])
    other = predict_peak(layer(9, jump=8)).trace
    assert ScaledTrace.of([traces[0], other], 2) is None
    assert not scaled.agrees(9, other)
    renamed = replace(traces[0], op=np.zeros_like(traces[0].op))
    assert ScaledTrace.of([traces[0], renamed], 2) is None


@pytest.mark.parametrize("jump", [0, 8, 1000])
def test_a_step_that_changes_on_the_way_is_searched_by_predictions(
    jump: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of float32 [size, size], beyond a size four of them at once and not two."""
    worked_out: list[bool] = []
    agrees = ScaledTrace.agrees

    def agreeing(self: ScaledTrace, *args: object) -> bool:
        worked_out.append(agrees(self, *args))  # type: ignore[arg-type]
        return worked_out[-1]

    monkeypatch.setattr(capacity.ScaledTrace, "agrees", agreeing)
    both_ways(lambda size, limit: predict_peak(layer(size, jump), limit=limit), 80 * MB, degree=2)
    # It is 1,900 or so: what changes in front of it is seen in its trace.
    assert worked_out == [jump == 0]
