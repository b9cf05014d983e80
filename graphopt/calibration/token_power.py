"""What errors in the residual stream are measured in: the power of the target, token by token."""

from __future__ import annotations

from torch import Tensor


def token_power(target: Tensor) -> Tensor:
    """Return ||target||^2 of every token of hidden states [..., D], fp32 [..., 1], never 0.

    A squared error is divided by it wherever tokens are added up: most models have a few tokens
    of huge norm, which would decide every sum.
    """
    return target.float().square().sum(-1, keepdim=True).clamp(min=1e-12)
