"""Loops over experts that become one product of grouped rows, told by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.capture.grouped import grouped_products
from graphopt.errors import CaptureError
from graphopt.execute.language_model import ProgramModel

EXPERTS, WIDTH, INNER = 4, 6, 10


class _ByList(nn.Module):
    """Cuts the rows by a list of counts; weight [E, out, in]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, out, width))

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(x, w) for x, w in zip(parts, self.weight)])  # noqa: B905


class _ByTensor(nn.Module):
    """Cuts the rows at cumulative counts; weight [E, in, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, width, out))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        made = rows.new_zeros(len(rows), self.weight.shape[-1])
        start = 0
        for expert in range(EXPERTS):
            stop = start + int(counts[expert])
            made[start:stop] = rows[start:stop] @ self.weight[expert]
            start = stop
        return made


class _Backwards(_ByList):
    """The last expert takes the first rows, which no grouped product does."""

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        reversed_ = reversed(self.weight)
        return torch.cat([nn.functional.linear(x, w) for x, w in zip(parts, reversed_)])  # noqa: B905


class _Mixture(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = kind(WIDTH, INNER), kind(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        flat = x.flatten(0, 1)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        order = chosen.argsort()
        counts: Any = (chosen[:, None] == torch.arange(EXPERTS)).long().sum(0)
        if isinstance(self.up, _ByList):
            counts = counts.tolist()
        made = self.down(torch.tanh(self.up(flat[order], counts)), counts)
        placed = torch.zeros_like(flat).index_add(0, order, made * weight[order, None])
        return self.head(x + placed.view_as(x))


@pytest.mark.parametrize("kind", [_ByList, _ByTensor])
def test_a_loop_over_experts_is_captured(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = _Mixture(kind).eval()
    before = Tensor.tolist
    program = go.capture(model)
    assert Tensor.tolist is before
    assert "forward" not in vars(model.up)
    for shape in ((1, 1), (3, 7)):
        ids = torch.randint(0, 40, shape)
        with torch.no_grad():
            wanted = model(ids)
        torch.testing.assert_close(ProgramModel(program).logits(ids, None), wanted)


@pytest.mark.slow
def test_what_computes_something_else_is_left_as_it_is() -> None:
    model = _Mixture(_Backwards).eval()
    with grouped_products(model):
        assert "forward" not in vars(model.up)
    with pytest.raises(CaptureError):
        go.capture(model)
