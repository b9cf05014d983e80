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

TURNS = 4
STEPS = (1.0, 0.5, 0.25)
"""Shares of a solution that are tried: it is exact only where the norm stays what it was."""
LEAST_GAIN = 1e-3
"""Channels whose gain is below this share of the largest are left as they are."""
GAIN_RIDGE = 1e-2
"""Strength by which a channel's gain is held where it is, times the mean power of all."""
LEAST_PROGRESS = 1e-3
"""Share of the error by which a turn has to lower it, or it is the last."""


@dataclass(frozen=True)
class NormFit:
    """The outcome of a fit.

    Attributes:
        before, after: Relative squared error of the residual stream on held-out windows.
        ridge: The strength of the first turn that changed the projection; None if none did.
        matrix: The projection, fp32 [D, N].
        norm: The norm, with the gain as it has become.
    """

    before: float
    after: float
    ridge: float | None
    matrix: Tensor
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
    ) -> None:
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

    def errors(self, forms: Sequence[tuple[Tensor, OutputNorm]]) -> list[float]:
        """Return the relative squared error that each of some projections leaves, held out."""
        totals, count = [0.0] * len(forms), 0
        for _, rows, wanted, root in self.tokens(held_out=True):
            count += len(rows)
            for number, (matrix, norm) in enumerate(forms):
                left = (wanted - norm(rows @ matrix.t())) * root
                totals[number] += float(left.double().square().sum())
        return [total / count for total in totals]

    def linearise(
        self, matrix: Tensor, norm: OutputNorm
    ) -> tuple[LeastSquares, LeastSquares, Tensor]:
        """Return the sums of a change of the projection, learnt and held out, and a new slope."""
        learn, held = LeastSquares(), LeastSquares()
        slope = norm.slope(len(matrix), matrix.device)
        power, cross = torch.zeros_like(slope), torch.zeros_like(slope)
        for is_held, rows, wanted, root in self.tokens():
            output = rows @ matrix.t()
            normal, rms = norm.normalise(output)
            residual = (wanted - norm(output)) * root
            (held if is_held else learn).add(rows * (root / rms), residual)
            if not is_held:
                power += (normal * root).square().sum(0)
                cross += (normal * root * residual).sum(0)
        return learn, held, slope + cross / (power + GAIN_RIDGE * power.mean())


def fit_behind_norm(
    matrix: Tensor,
    norm: OutputNorm,
    batches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Tensor],
    held_out: Sequence[bool],
) -> NormFit:
    """Solve for a projection, and the gain of the norm behind it, in turns.

    Args:
        matrix: The projection, fp32 [D, N].
        norm: The norm behind it; its gain may change where `gain_weight` names its weight.
        batches: For each batch the features [..., N] and the residual stream behind the addition,
            [..., D], as the given projection and norm make it. They are walked several times.
        targets: For each batch the residual stream as it should be, [..., D].
        held_out: For each batch whether it only measures.
    """
    fit = _Fit(matrix, norm, batches, targets, held_out)
    (before,) = fit.errors([(matrix, norm)])
    best, ridge_of_first = before, None
    for _ in range(TURNS):
        learn, held, new_slope = fit.linearise(matrix, norm)
        slope = norm.slope(len(matrix), matrix.device)
        ridge, _ = best_ridge(learn, held)
        forms: list[tuple[Tensor, OutputNorm]] = []
        gains = [norm]
        if norm.gain_weight is not None:
            gains.append(norm.with_slope(new_slope))
            forms.append((matrix, gains[1]))
        if ridge is not None:
            usable = slope.abs() > LEAST_GAIN * slope.abs().max()
            change = learn.solve(ridge).float().t() / torch.where(usable, slope, torch.inf)[:, None]
            forms += [(matrix + step * change, gain) for step in STEPS for gain in gains]
        if not forms:
            break
        errors = fit.errors(forms)
        lowest = min(errors)
        # NaN, where the sums overflow, is no progress.
        if not lowest < best * (1 - LEAST_PROGRESS):
            break
        chosen, norm = forms[errors.index(lowest)]
        if chosen is not matrix and ridge_of_first is None:
            ridge_of_first = ridge
        matrix, best = chosen, lowest
    return NormFit(before, best, ridge_of_first, matrix, norm)
