"""The convolutional network that predicts the next row of attention from the last ones.

Two convolutions over rows and pages, a mean over the rows, and a weighted sum of features. A row of
features depends on two rows of input on either side. As there are zeros in front of the first row
and behind the last, the features of the outer two rows differ from what the same rows have farther
inside; nothing else does, so that the mean can be kept as a sum that slides.

Source: Yang et al., arXiv 2502.04077; the shapes are those of its published weights.

Layout letters as in `graphopt.ir.kv_policies.pages`; C channels of input, F of features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 32
"""F, of the second convolution."""

HALO = 2
"""How many rows, and pages, on either side a feature depends on."""


def weight_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights, by the names of the published form.

    Args:
        channels: C, 1 in the published form.
    """
    return {
        "conv1.weight": (16, channels, 3, 3),
        "conv1.bias": (16,),
        "conv2.weight": (FEATURES, 16, 3, 3),
        "conv2.bias": (FEATURES,),
        "conv3.weight": (1, FEATURES, 1),
        "conv3.bias": (1,),
    }


def row_features(
    x: Tensor, inside: Tensor, weights: Mapping[str, Tensor], *, top: bool, bottom: bool
) -> Tensor:
    """Return the features of rows: [n, F, rows, N].

    Args:
        x: [n, C, R, N], neighbouring rows, the oldest first.
        inside: [n, N], 1 for the pages that the network sees and 0 for those that it has zeros for,
            as it has beyond the edges.
        top: Whether the first row is the oldest of all: then its features and those of the next
            are among the results, with zeros in front. Otherwise they begin at the third row.
        bottom: Whether the last row is the newest of all; as `top`.
    """
    inside = inside[:, None, None].to(x.dtype)
    edges = (0, 0, int(top), int(bottom))
    first, second = (
        (weights[f"{name}.weight"].to(x.dtype), weights[f"{name}.bias"].to(x.dtype))
        for name in ("conv1", "conv2")
    )
    # In the digits of fp32: which page is the better one is told by small differences.
    with torch.backends.cudnn.flags(
        torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False
    ):
        hidden = F.conv2d(F.pad(x * inside, edges), *first, padding=(0, 1)).relu() * inside
        return F.conv2d(F.pad(hidden, edges), *second, padding=(0, 1)).relu()


def score(mean: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the prediction [n, N] of features [n, F, N] that are a mean over all rows."""
    weight, bias = (weights[f"conv3.{name}"].to(mean.dtype) for name in ("weight", "bias"))
    return F.conv1d(mean, weight, bias)[:, 0]


def predict(x: Tensor, inside: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the prediction [n, N] of the row behind all rows [n, C, R, N]: the batch form."""
    return score(row_features(x, inside, weights, top=True, bottom=True).mean(2), weights)


def new_weights(channels: int, seed: int) -> dict[str, Tensor]:
    """Return weights to train from, drawn as torch initialises convolutions."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    shapes = weight_shapes(channels)
    for name, shape in shapes.items():
        fan_in = torch.Size(shapes[f"{name.split('.')[0]}.weight"][1:]).numel()
        weights[name] = (torch.rand(shape, generator=generator) * 2 - 1) * fan_in**-0.5
    return weights
