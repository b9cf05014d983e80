"""What every weight is checked for while it is streamed."""

from __future__ import annotations

import torch

from graphopt.errors import SourceError


def check_finite(name: str, tensor: torch.Tensor, *, constant: bool = False) -> None:
    """Refuse a weight that holds NaN or Inf.

    Args:
        name: What the message calls the weight.
        tensor: Its value, or a part of it. Integer tensors pass.
        constant: It was not trained, and may hold infinity on purpose, as masks do; NaN it may
            not.

    Raises:
        SourceError: Naming the weight and how many of its elements are not finite.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    value = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    # aminmax propagates NaN and needs one pass without a mask as large as the weight.
    low, high = torch.aminmax(value)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    if constant and not bool(low.isnan()):
        return
    nans, infs = int(value.isnan().sum()), int(value.isinf().sum())
    raise SourceError(
        f"Weight {name!r} holds {nans} NaN and {infs} Inf among {tensor.numel()} elements.",
        "The checkpoint is damaged or its training diverged; take another one.",
    )
