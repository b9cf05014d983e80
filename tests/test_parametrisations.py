"""How large a step of training is for each weight, and what is trained of a model that was cut."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.execute.block_runner import BlockRunner
from graphopt.ir.blocks import find_blocks
from graphopt.training.distillation_data import DistillationData, HiddenStateCache
from graphopt.training.losses import LogitObjective
from graphopt.training.parametrisations import (
    LEAST_SCALE,
    FullParametrisation,
    LowRankParametrisation,
    weight_scale,
)
from graphopt.training.schedule import Schedule
from graphopt.training.tuner import Tuner

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (30, 12), generator=torch.Generator().manual_seed(0))
HALF_OCTAVE = 2**0.25
"""What rounding to powers of the root of two changes at most."""


@pytest.mark.parametrize("size", [1e-2, 0.2, 30.0])
def test_the_scale_is_the_deviation_of_normal_elements(size: float) -> None:
    value = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * size
    # The median of n magnitudes is off by some 1.2 / sqrt(n) of its size: 3 % of 2,000, thrice.
    scale = weight_scale(value)
    assert size / HALF_OCTAVE / 1.08 < scale < size * HALF_OCTAVE * 1.08
    # A few huge elements, as norms have, change nothing, and neither does a factor but by itself.
    value[0, :10] = 1e4 * size
    assert scale / 1.42 < weight_scale(value) < scale * 1.42
    assert weight_scale(value * 4) == pytest.approx(4 * weight_scale(value))


def test_a_weight_that_begins_at_zero_can_leave_it() -> None:
    scale = weight_scale(torch.zeros(3, 5))
    assert LEAST_SCALE / HALF_OCTAVE <= scale <= LEAST_SCALE * HALF_OCTAVE


def test_a_step_moves_every_weight_by_the_same_share_of_its_scale() -> None:
    """Adam's first step moves each element by the rate, so that shares are exact."""
    program = tiny_program(layers=2)
    blocks = find_blocks(program)
    stop = blocks[-1].position + 1
    names = list(program.calls[blocks[0].position].weights.values())
    names = [name for name in names if not program.weights[name].constant]
    values = {name: program.weights[name].load() for name in names}
    scales = {name: weight_scale(value) for name, value in values.items()}
    assert len(set(scales.values())) > 1
    trained = {name: FullParametrisation(values[name], scales[name]) for name in names}
    # The teacher is another model: every element has a gradient.
    teacher = tiny_program(layers=2, seed=1)
    cache = HiddenStateCache(BlockRunner(teacher, blocks[0].position, stop, {}, CPU), IDS)
    student = BlockRunner(program, blocks[0].position, stop, trained, CPU)
    Tuner(student, DistillationData(IDS, cache), LogitObjective(),
          Schedule(steps=1, rate=0.01, warmup=0.0))._step(0.01)  # fmt: skip
    for name in names:
        moved = (trained[name]().detach() - values[name]).abs()
        # Where a gradient is not far above Adam's 1e-8 the step is smaller, never larger.
        assert float(moved.max()) == pytest.approx(0.01 * scales[name], rel=1e-2)


def test_both_factors_of_a_low_rank_term_have_the_weights_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    term = LowRankParametrisation(torch.randn(8, 12, generator=generator), 2, generator, 0.25)
    ((rate, parameters),) = term.rates()
    assert rate == 0.25 and {id(p) for p in parameters} == {id(term.up), id(term.down)}


def test_hidden_states_of_known_ones_are_those_of_the_ids() -> None:
    program = tiny_program(layers=4)
    blocks = find_blocks(program)
    first, stop = blocks[2].position, blocks[3].position + 1
    front = HiddenStateCache(BlockRunner(program, blocks[0].position, first, {}, CPU), IDS)
    runner = BlockRunner(program, first, stop, {}, CPU)
    whole = HiddenStateCache(BlockRunner(program, blocks[0].position, stop, {}, CPU), IDS)
    rows = [4, 0, 7]
    assert torch.equal(HiddenStateCache(runner, IDS, front).rows(rows), whole.rows(rows))
