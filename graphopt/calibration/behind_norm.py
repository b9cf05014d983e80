"""Least squares for a projection whose output goes through a norm before it joins the stream.

With projection W, gain g and features x the stream gets g * n(W x), n(y) = y / rms(y). At a given W
the norm divides every token by a known number, so that a small change of W moves the stream
linearly: dW x g / rms. That is the ridge regression of `graphopt.solvers.least_squares` with
features x / rms, of which each channel's solution is divided by its gain. The gain, for which the
stream is linear anyway, is a regression of one number a channel. Both are solved in turns, from the
norm as it has become; a turn counts only as far as the stream comes nearer on held-out text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.output_path import OutputNorm
from graphopt.calibration.token_power import token_power
from graphopt.solvers.least_squares import LeastSquares, best_ridge
from graphopt.support.ranks import ALONE, Ranks

TURNS = 4
STEPS = (1.0, 0.5, 0.25)
"""Shares of a solution that are tried: it is exact only where the norm stays what it was."""
LEAST_GAIN = 1e-3
"""Channels whose gain is below this share of the largest are left as they are."""
GAIN_RIDGE = 1e-2
"""Strength by which a channel's gain is held where it is, times the mean power of all."""
LEAST_PROGRESS = 1e-2
"""Share of the error by which a turn has to lower it, or it is the last."""


@dataclass(frozen=True)
class NormFit:
    """The outcome of a fit.

    Attributes:
        before, after: Relative squared error of the residual stream on held-out windows.
        ridge: Strength of the regularisation; None where the projection stays as it was.
        matrix: The projection, fp32 [D, N].
        norm: The norm, with the gain as it has become.
    """

    before: float
    after: float
    ridge: float | None
    matrix: Tensor
    norm: OutputNorm


@dataclass(frozen=True)
class _Trial:
    """How much of a turn's change of the projection is made, and with which norm."""

    step: float
    norm: OutputNorm


class _Fit:
    """The tokens of a fit, walked batch by batch."""

    def __init__(
        self,
        matrix: Tensor,
        norm: OutputNorm,
        batches: Sequence[tuple[Tensor, Tensor]],
        targets: Sequence[Tensor],
        held_out: Sequence[bool],
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.matrix, self.norm = matrix, norm
        self.batches, self.targets, self.held_out = batches, targets, held_out

    def tokens(self, held_out: bool | None = None) -> Iterator[tuple[bool, Tensor, Tensor, Tensor]]:
        """Yield of every batch whether it is held out, and its tokens.

        They are features [T, N], what the projection has to add to the stream [T, D], and the
        weight [T, 1] by which a token's error is divided, as a square root.
        """
        for number, held in enumerate(self.held_out):
            if held_out is not None and held != held_out:
                continue
            features, behind = self.batches[number]
            goal = self.targets[number].to(behind.device).float()
            root = token_power(goal).rsqrt().flatten(0, -2)
            rows = features.float().flatten(0, -2)
            wanted = (goal - behind.float()).flatten(0, -2) + self.norm(rows @ self.matrix.t())
            yield held, rows, wanted, root

    def errors(
        self, matrix: Tensor, change: Tensor | None, trials: Sequence[_Trial]
    ) -> list[float]:
        """Return the relative squared error that each trial leaves on held-out tokens."""
        totals, count = [0.0] * len(trials), 0
        for _, rows, wanted, root in self.tokens(held_out=True):
            count += len(rows)
            output = rows @ matrix.t()
            moved = None if change is None else rows @ change.t()
            for number, trial in enumerate(trials):
                here = output if moved is None else output + trial.step * moved
                left = (wanted - trial.norm(here)) * root
                totals[number] += float(left.double().square().sum())
        tokens, *sums = self.ranks.totals(count, *totals)
        return [total / tokens for total in sums]

    def linearise(
        self, matrix: Tensor, norm: OutputNorm, features: LeastSquares | None
    ) -> tuple[LeastSquares, LeastSquares, Tensor]:
        """Return the sums of a change of the projection, learnt and held out, and a new slope.

        Args:
            features: The sums that an earlier turn learnt. Their products of features, which are
                most of the work, stand for those of this turn: roots of mean squares change
                little, and how far to go is tried anyway. No held-out sums are made then.
        """
        learn, held = LeastSquares() if features is None else features.retarget(), LeastSquares()
        slope = norm.slope(len(matrix), matrix.device)
        power, cross = torch.zeros_like(slope), torch.zeros_like(slope)
        for is_held, rows, wanted, root in self.tokens(None if features is None else False):
            output = rows @ matrix.t()
            normal, rms = norm.normalise(output)
            residual = (wanted - norm(output)) * root
            sums = held if is_held else learn
            (sums.add if features is None else sums.add_targets)(rows * (root / rms), residual)
            if not is_held:
                power += (normal * root).square().sum(0)
                cross += (normal * root * residual).sum(0)
        for summed in (learn, held) if features is None else (learn,):
            summed.reduce(self.ranks)
        power, cross = self.ranks.total(torch.stack([power, cross]))
        return learn, held, slope + cross / (power + GAIN_RIDGE * power.mean())


def fit_behind_norm(
    matrix: Tensor,
    norm: OutputNorm,
    batches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Tensor],
    held_out: Sequence[bool],
    ranks: Ranks = ALONE,
) -> NormFit:
    """Solve for a projection, and the gain of the norm behind it, in turns.

    Args:
        matrix: The projection, fp32 [D, N].
        norm: The norm behind it; its gain may change where `gain_weight` names its weight.
        batches: For each batch the features [..., N] and the residual stream behind the addition,
            [..., D], as the given projection and norm make it. They are walked several times.
        targets: For each batch the residual stream as it should be, [..., D].
        held_out: For each batch whether it only measures.
        ranks: Who shares the tokens.
    """
    fit = _Fit(matrix, norm, batches, targets, held_out, ranks)
    (before,) = fit.errors(matrix, None, [_Trial(0.0, norm)])
    best, moved = before, False
    features: LeastSquares | None = None
    ridge: float | None = None
    for turn in range(TURNS):
        learn, held, new_slope = fit.linearise(matrix, norm, features)
        slope = norm.slope(len(matrix), matrix.device)
        if turn == 0:
            features, (ridge, _) = learn, best_ridge(learn, held)
        gains = [norm]
        if norm.gain_weight is not None:
            gains.append(norm.with_slope(new_slope))
        trials = [_Trial(0.0, gain) for gain in gains[1:]]
        change: Tensor | None = None
        if ridge is not None:
            usable = slope.abs() > LEAST_GAIN * slope.abs().max()
            change = learn.solve(ridge).float().t() / torch.where(usable, slope, torch.inf)[:, None]
            trials += [_Trial(step, gain) for step in STEPS for gain in gains]
        if not trials:
            break
        errors = fit.errors(matrix, change, trials)
        lowest = min(errors)
        # NaN, where the sums overflow, is no progress.
        if not lowest < best * (1 - LEAST_PROGRESS):
            break
        best, chosen = lowest, trials[errors.index(lowest)]
        norm = chosen.norm
        if change is not None and chosen.step:
            matrix, moved = matrix + chosen.step * change, True
    return NormFit(before, best, ridge if moved else None, matrix, norm)
