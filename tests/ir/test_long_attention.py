"""Attention of more queries than are computed at once gives what it gives of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampling import exhaustive_but

from graphopt.ir.functional import attention, cached_attention

S, HEADS, GROUPS, SIZE = 1100, 4, 2, 8
"""More than two parts, the last one short."""


def operands(past: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(past)
    shapes = ((2, HEADS, S, SIZE), (2, GROUPS, past + S, SIZE), (2, GROUPS, past + S, SIZE))
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def padding(past: int) -> torch.Tensor:
    mask = torch.ones(2, past + S, dtype=torch.long)
    mask[0, :700] = 0  # more than a part, in front
    mask[1, -40:] = 0
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("past", [0, 37])
@pytest.mark.parametrize(
    "options",
    exhaustive_but(
        [
            {}, {"window": 1}, {"window": 300}, {"window": 600}, {"window": 5000},
            {"softcap": 3.0}, {"softcap": 3.0, "window": 300}, {"sinks": True},
            {"slopes": True, "window": 700},
        ],
        {}, {"window": 1}, {"window": 300}, {"window": 600}, {"window": 5000}, {"sinks": True},
        {"slopes": True, "window": 700},
    ),
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_the_queries_give_what_all_do(
    past: int, options: dict[str, Any], masked: bool
) -> None:
    q, k, v = operands(past)
    given: dict[str, Any] = {
        name: torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=q.dtype) if value is True else value
        for name, value in options.items()
    }
    mask = padding(past) if masked else None
    # What is added to the scores keeps the queries together.
    expected = attention(q, k, v, mask, torch.zeros(1, 1, 1, 1, dtype=q.dtype), scale=0.3, **given)
    got = attention(q, k, v, mask, scale=0.3, **given)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_tokens_behind_a_full_ring_see_what_the_ring_holds() -> None:
    """A ring keeps fewer keys than there are: the window says how many."""
    q, k, v = operands(0)
    window = 64
    cut = 1000  # so that a part of more than two parts' queries goes on behind a cache
    whole = attention(q, k, v, scale=0.3, window=window)
    _, past = cached_attention(
        q[:, :, : S - cut], k[:, :, : S - cut], v[:, :, : S - cut], None,
        scale=0.3, window=window, ring=window,
    )  # fmt: skip
    rest = (q[:, :, S - cut :], k[:, :, S - cut :], v[:, :, S - cut :])
    got, _ = cached_attention(*rest, past, scale=0.3, window=window, ring=window)
    torch.testing.assert_close(got, whole[:, :, S - cut :], rtol=0, atol=1e-12)
