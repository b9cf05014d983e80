"""How much each neuron of a feed-forward part adds to its output."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def neuron_energies(hidden_TN: Tensor, down: Tensor) -> Tensor:
    """Return the square of what each neuron adds to the output, fp32 [T, N].

    Args:
        down: The down projection [out, N].
    """
    return (hidden_TN.float() * down.float().norm(dim=0)).square()


def mean_magnitudes(energies: Iterable[Tensor]) -> Tensor:
    """Return what each neuron adds to the output on average, fp32 [N].

    Args:
        energies: From `neuron_energies`, a tensor [T, N] for every batch of tokens.
    """
    total, tokens = None, 0
    for energy_TN in energies:
        own = energy_TN.sqrt().sum(0)
        total, tokens = own if total is None else total + own, tokens + len(energy_TN)
    assert total is not None
    return total / tokens


def static_order(magnitudes_N: Tensor) -> Tensor:
    """Return all neurons, the ones of largest mean magnitude first; int64 [N]."""
    return magnitudes_N.sort(descending=True, stable=True).indices
