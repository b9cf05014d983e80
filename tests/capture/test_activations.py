"""Formulas of one variable: raised where they are a closed form everywhere, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.execute.interpreter import Runner

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3)))),
    "relu2": lambda x: F.relu(x).square(),
    "softcap": lambda x: torch.tanh(x / 30.0) * 30.0,
    "scale": lambda x: (x * 6.0) / 2.0,
}

NEAR_MISSES: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp at the edge of the trial": lambda x: x.clamp(max=7.0) + 0.5,
    "clamp far out": lambda x: x.clamp(min=-65504.0) * x,
    "clamped silu": lambda x: F.silu(x.clamp(max=1e3)),
    "leaky relu": lambda x: torch.where(x > 0, x, 0.001 * x),
    "nearly silu": lambda x: x * torch.sigmoid(1.001 * x),
    "shifted": lambda x: F.relu(x) + 1e-3,
}


class _Model(nn.Module):
    """Embedding, formula, head; the embedding holds values near zero and far out."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 10)
        self.formula = formula
        with torch.no_grad():
            magnitudes = torch.tensor([1.0, 5.0, 1e2, 2e3, 1e5]).repeat_interleave(16)
            self.embed.weight[:10] = torch.linspace(-1, 1, 80).mul(magnitudes).view(10, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.formula(self.embed(input_ids)))


def _ops_after_check(formula: Callable[[Tensor], Tensor]) -> list[str]:
    """Capture, compare with the module, and return the names of the ops."""
    model = _Model(formula).eval()
    program = capture(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids)
    actual = Runner(program).logits({"input_ids": ids})
    # Each row has its own magnitude; rounding is relative to it.
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1.0)
    assert float(((expected - actual).abs() / scale).max()) < 1e-5
    return [node.op for function in program.functions.values() for node in function.nodes]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_becomes_its_op(name: str) -> None:
    assert _ops_after_check(FORMULAS[name]) == ["embedding", name, "linear"]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_one_keeps_its_values(name: str) -> None:
    assert len(_ops_after_check(NEAR_MISSES[name])) > 3
