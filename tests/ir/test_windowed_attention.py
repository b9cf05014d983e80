"""Attention with a short window: by blocks it is what it is of all keys at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretended_gpu import pretended_gpu
from torch import Tensor

from graphopt.ir.functional import attention
from graphopt.ir.ops import attention as op_module
from graphopt.ir.ops import get_op
from graphopt.ir.windowed_attention import attention_in_blocks

HEADS, SIZE = 4, 8


@pytest.mark.parametrize("window", [1, 100, 256, 300, 550])
@pytest.mark.parametrize("length", [200, 1024, 1100])
@pytest.mark.parametrize("groups", [2, HEADS])
def test_blocks_give_the_attention_and_its_gradients(window: int, length: int, groups: int) -> None:
    window = min(window, length)
    generator = torch.Generator().manual_seed(window)

    def drawn(heads: int, size: int) -> Tensor:
        return torch.randn(2, heads, length, size, generator=generator, dtype=torch.float64)

    leaves = [drawn(HEADS, SIZE), drawn(groups, SIZE), drawn(groups, 5)]
    slope, found = drawn(HEADS, 5), []
    for way in (attention_in_blocks, attention):
        given = [leaf.requires_grad_() for leaf in leaves]
        # A CPU's own parts of the queries are not asked for where something is added to scores.
        more = {"bias": torch.zeros(1, 1, 1, 1).double()} if way is attention else {}
        out = way(*given, **more, window=window, scale=0.3)
        found.append([out, *torch.autograd.grad(out, given, slope)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_a_gpu_runs_short_windows_in_blocks_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def in_blocks(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float) -> Tensor:
        asked.append(window)
        return attention_in_blocks(q, k, v, window=window, scale=scale)

    monkeypatch.setattr(op_module, "attention_in_blocks", in_blocks)
    op = get_op("attention")

    def run(window: int | None, queries: int = 1024, mask: Any = None, **attrs: Any) -> None:
        x = torch.randn(1, 2, 1024, 8, device=device)
        given = {"scale": 1.0, "causal": True, "window": window, **attrs}
        op.torch([x[:, :, -queries:], x[:, :, -queries:], x[:, :, -queries:], mask], given)

    device = "cpu"
    run(4)
    with pretended_gpu():
        device = "cuda"
        for window in (4, 512, 513, 1024, None):
            run(window)
        for more in ({"softcap": 5.0}, {"chunk": 64}, {"causal": False}):
            run(4, **more)
        run(4, mask=torch.ones(1, 1024, device=device))
        run(4, queries=511)
    assert asked == [4, 512]
