"""Every activation a config can name, captured and run by ONNX Runtime beside transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_models import emit, run, session
from torch import Tensor, nn
from transformers.activations import ACT2FN

import graphopt as go
from graphopt.execute.interpreter import complete_inputs

NAMES = sorted(ACT2FN)


class _Activations(nn.Module):
    """One curve of every kind side by side, so that one trace and one graph hold them all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 12, generator=torch.Generator().manual_seed(0)))
        self.curves = nn.ModuleDict({name: ACT2FN[name] for name in NAMES}).float()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = 6 * nn.functional.embedding(input_ids, self.table)
        return torch.cat([self.curves[name](x) for name in NAMES], -1)


@pytest.mark.slow
def test_every_activation_of_transformers(tmp_path: Path) -> None:
    model = _Activations().eval()
    ids = torch.arange(50).view(2, 25)
    with torch.no_grad():
        wanted = model(ids)
    program, _ = go.Pipeline.default().run(go.capture(model), go.RunOptions(verify=False))
    _, path = emit(program, tmp_path)
    found, _ = run(session(path), complete_inputs({"input_ids": ids}))
    for name, ours, theirs in zip(NAMES, found.split(12, -1), wanted.split(12, -1), strict=True):
        # A few roundings of values up to 20, squares of them up to 400.
        atol = 4 * 6e-8 * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(
            ours, theirs, rtol=4e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
