"""How much each neuron of a feed-forward part adds to its output."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from graphopt.calibration.output_path import OutputNorm
from graphopt.support.ranks import ALONE, Ranks


def neuron_energies(hidden_TN: Tensor, down: Tensor, norm: OutputNorm | None = None) -> Tensor:
    """Return the square of what each neuron adds to the output, fp32 [T, N].

    Args:
        down: The down projection [out, N].
        norm: What the output goes through before it is added to the residual stream. Then a neuron
            counts by what it adds there: a token's output is divided by its root mean square, and
            a channel is times its gain.
    """
    hidden_TN, down = hidden_TN.float(), down.float()
    if norm is not None:
        _, root = norm.normalise(hidden_TN @ down.t())
        hidden_TN = hidden_TN / root
        down = down * norm.slope(len(down), down.device)[:, None]
    return (hidden_TN * down.norm(dim=0)).square()


def relative_energies(
    hidden_TN: Tensor, power_T1: Tensor, down: Tensor, norm: OutputNorm | None = None
) -> Tensor:
    """Return the energies of neurons in units of the residual stream's power, fp32 [T, N].

    So tokens can be added up: most models have a few whose activations, and whose stream, are
    larger than all others' by orders, and an error of theirs means no more.

    Args:
        power_T1: From `token_power`, of the residual stream behind the part.
        down, norm: As for `neuron_energies`.
    """
    return neuron_energies(hidden_TN, down, norm) / power_T1


def mean_energies(energies: Iterable[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """Return the mean energy of each neuron, fp32 [N].

    Args:
        energies: From `relative_energies`, a tensor [T, N] for every batch of tokens.
        ranks: Who shares the tokens.
    """
    total, tokens = None, 0
    for energy_TN in energies:
        own = energy_TN.sum(0)
        total, tokens = own if total is None else total + own, tokens + len(energy_TN)
    assert total is not None
    return ranks.total(total) / ranks.totals(tokens)[0]


def static_order(energies_N: Tensor) -> Tensor:
    """Return all neurons, the ones of largest mean energy first; int64 [N].

    The first n of them are the n neurons that keep most energy if every token runs the same ones.
    """
    return energies_N.sort(descending=True, stable=True).indices
