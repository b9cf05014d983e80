"""Neurons are divided by what the residual stream loses by them."""

from __future__ import annotations

import itertools

import pytest
import torch

from graphopt.calibration.neuron_energy import mean_energies, relative_energies, static_order
from graphopt.calibration.output_path import OutputNorm
from graphopt.calibration.token_power import token_power
from graphopt.passes.carve_moe.division import Tokens, divide_by_fit

NEURONS, FEATURES = 24, 16


def test_relative_energies_pick_the_neurons_by_which_the_stream_loses_least() -> None:
    generator = torch.Generator().manual_seed(0)
    # Of each neuron the output is its own channel, so that what is lost is a plain sum.
    down, gain = torch.eye(8), torch.logspace(-2, 2, 8)
    hidden = torch.randn(400, 8, generator=generator)
    hidden[:, :4] *= 30.0
    front = torch.randn(400, 8, generator=generator) * 300
    # One token is larger by three orders, in its stream and in two neurons, as attention sinks are.
    front[7] *= 1000.0
    hidden[7, :2] = 3e4
    norm = OutputNorm(gain, None, 1e-6)
    behind = front + norm(hidden @ down.t())
    relative = relative_energies(hidden, token_power(behind), down, norm)
    plain = (hidden * down.norm(dim=0)).square()

    def lost(kept: torch.Tensor) -> float:
        """Return the relative error of the stream where a token's norm stays what it was."""
        rest = torch.ones(8).index_fill(0, kept, 0.0)
        root = hidden.square().mean(-1, keepdim=True).sqrt()
        error = (hidden * rest) / root * gain
        return float((error.square().sum(-1, keepdim=True) / token_power(behind)).mean())

    best = min((torch.combinations(torch.arange(8), 4)), key=lost)
    order = static_order(mean_energies([relative[:150], relative[150:]]))
    assert sorted(order[:4].tolist()) == best.tolist()
    # Neither the gains, over four orders, nor the one token may be left out of account.
    assert sorted(static_order(plain.mean(0))[:4].tolist()) == [0, 1, 2, 3] != best.tolist()


class Part:
    """Energies that a token's input tells, but for one neuron that is large at random."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.towards = self.draw(NEURONS, FEATURES)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def tokens(self, count: int) -> Tokens:
        x = self.draw(count, FEATURES)
        energy = (x @ self.towards.t()).clamp(min=0).square() / FEATURES
        rare = torch.rand(count, generator=self.generator) < 0.04
        energy[:, 11] = torch.where(rare, 60.0, 0.0)
        return Tokens(
            [x[: count // 3], x[count // 3 :]], [energy[: count // 3], energy[count // 3 :]]
        )


@pytest.mark.parametrize("seed", range(3))
def test_a_neuron_that_the_router_cannot_foresee_is_shared(seed: int) -> None:
    part = Part(seed)
    division = divide_by_fit(part.tokens(600), part.tokens(200), 6, 3, 1, 12)
    assert 11 in division.order[:6]


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_more_turns_keep_no_less_energy_of_held_out_tokens(seed: int, threshold: bool) -> None:
    part = Part(seed)
    # Few tokens for the features, so that some turns are worse than the one before.
    learn, held_out = part.tokens(40), part.tokens(90)
    x, energy = torch.cat(list(held_out.x)), torch.cat(list(held_out.energy))

    def kept(rounds: int) -> float:
        made = divide_by_fit(learn, held_out, 6, 3, 1, rounds, threshold=threshold)
        scores = x @ made.router["router"].t() + made.router["router.bias"]
        runs = scores > 0 if threshold else scores == scores.amax(-1, keepdim=True)
        experts = energy[:, made.order[6:]].unflatten(1, (3, 6)).sum(-1)
        return float(energy[:, made.order[:6]].sum() + (experts * runs).sum())

    after = [kept(rounds) for rounds in range(9)]
    for fewer, more in itertools.pairwise(after):
        assert more >= fewer * (1 - 1e-5)
