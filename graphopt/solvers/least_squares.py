"""Least squares with L2 regularisation, from sums over tokens: closed-form fits of projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.support.ranks import Ranks

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge (L2 regularisation) strengths that are tried, times the features' mean power."""


FACTORS_BYTES = 2**28
"""Of the factors that are held, one for each strength: solving by one takes a square, making it a
cube of the features' number."""


class LeastSquares:
    """What a fit of features [.., N] to targets [.., D] needs of them, summed over tokens.

    The sums are in fp32 and everything behind them is in fp64.
    """

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.square, self.count = 0.0, 0
        self._factors: dict[float, Tensor] = {}
        self._reduced = False

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add tokens."""
        rows = features.float().flatten(0, -2)
        gram = rows.t() @ rows
        self.gram = gram if self.gram is None else self.gram + gram
        self._factors.clear()
        self.add_targets(features, targets)

    def add_targets(self, features: Tensor, targets: Tensor) -> None:
        """Add targets of tokens whose features are in the sums already."""
        features, targets = features.float().flatten(0, -2), targets.float().flatten(0, -2)
        cross = features.t() @ targets
        self.cross = cross if self.cross is None else self.cross + cross
        self.square += float(targets.double().square().sum())
        self.count += len(targets)

    def retarget(self) -> LeastSquares:
        """Return a fit to the same features, which are not summed again, without targets so far."""
        other = LeastSquares()
        other.gram, other._factors, other._reduced = self.gram, self._factors, self._reduced
        return other

    def __add__(self, other: LeastSquares) -> LeastSquares:
        assert self.gram is not None and self.cross is not None
        assert other.gram is not None and other.cross is not None
        both = LeastSquares()
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.square, both.count = self.square + other.square, self.count + other.count
        return both

    def reduce(self, ranks: Ranks) -> None:
        """Add what other ranks have; sums of features that were added already stay as they are.

        Every rank must have added tokens, though there may be none in what it added.
        """
        if ranks.world == 1:
            return
        assert self.gram is not None and self.cross is not None
        if not self._reduced:
            self.gram, self._reduced = ranks.total(self.gram), True
        self.cross = ranks.total(self.cross)
        self.square, count = ranks.totals(self.square, self.count)
        self.count = int(count)

    def solve(self, ridge: float) -> Tensor:
        """Return the weights, transposed, [N, D] in fp64.

        Args:
            ridge: Strength of the L2 regularisation, times the features' mean power.
        """
        assert self.gram is not None and self.cross is not None
        if ridge not in self._factors:
            gram = self.gram.double()
            strength = ridge * gram.diagonal().mean().clamp(min=1e-12)
            gram.diagonal().add_(strength)
            if gram.nbytes * (len(self._factors) + 1) > FACTORS_BYTES:
                self._factors.clear()
            self._factors[ridge] = torch.linalg.cholesky(gram)
        return torch.cholesky_solve(self.cross.double(), self._factors[ridge])

    def error(self, weight: Tensor | None) -> float:
        """Return the squared error that weights [N, D] leave; without any, of nothing added."""
        return self.square if weight is None else self.square - float(self.explained(weight))

    def explained(self, weight: Tensor) -> Tensor:
        """Return by how much weights [N, D] lower the squared error, a scalar in fp64."""
        assert self.gram is not None and self.cross is not None
        explained = 2 * (weight * self.cross.double()).sum()
        own = (weight * (self.gram.double() @ weight)).sum()
        return explained - own


def best_ridge(
    learn: LeastSquares, held_out: LeastSquares, ridges: Sequence[float] = RIDGES
) -> tuple[float | None, float]:
    """Return the strength whose weights are best on held-out tokens, and their error there.

    They are tried from the strongest on until one is no better than the one before: every
    solution takes the cube of the features' number. None stands for no weights at all, where the
    strongest leave more than nothing added does.
    """
    best: float | None = None
    lowest = held_out.error(None)
    strengths = sorted(ridges, reverse=True)
    assert held_out.gram is not None
    # A GPU is asked once: it has solved for all of them before it has answered for one.
    together = len(strengths) if held_out.gram.device.type == "cuda" else 1
    for first in range(0, len(strengths), together):
        tried = strengths[first : first + together]
        gains = torch.stack([held_out.explained(learn.solve(ridge)) for ridge in tried]).tolist()
        for ridge, gain in zip(tried, gains, strict=True):
            error = held_out.square - gain
            if error >= lowest:
                return best, lowest
            best, lowest = ridge, error
    return best, lowest
