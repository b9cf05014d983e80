"""How much each neuron of a feed-forward part adds to its output."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from graphopt.calibration.output_path import OutputNorm


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
