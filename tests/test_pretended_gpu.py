"""Passes whose tensors lie on a GPU: nothing is mixed with what lies on the CPU.

The GPU is one that is pretended (`pretended_gpu`): tests on a real one are in test_gpu.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import CPU, GPU, OnGPU, moved, pretended_gpu
from rank_passes import CASES, prepare, run_cases

SAMPLED = ("fuse", "carve", "prune experts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    prepare(root)
    return root


def test_the_gpu_that_is_pretended() -> None:
    """It computes, differentiates and is strict: or the test below would find nothing."""
    with pretended_gpu():
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert x.device == GPU and (x + 1).sum().item() == 21 and x[1].tolist() == [3, 4, 5]
        assert torch.zeros_like(x).device == GPU and x.to("cpu").device == CPU
        assert torch.equal(x[torch.tensor([1])].cpu(), x.cpu()[1:])
        layer = torch.nn.Linear(3, 2).to("cuda")
        moved(layer(x), CPU).sum().backward()
        assert isinstance(layer.weight.grad, OnGPU)
        torch.optim.AdamW(layer.parameters()).step()
        for mixed in (lambda: x + torch.zeros(3), lambda: torch.cat((x, torch.zeros(1, 3)))):
            with pytest.raises(RuntimeError, match="lies on the CPU"):
                mixed()
    assert not torch.cuda.is_initialized()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which others run")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLED else pytest.mark.exhaustive)
        for name in CASES
        if name not in ("too few windows", "fuse by the clock")
    ],
)
def test_a_pass_computes_on_the_gpu(name: str, folder: Path) -> None:
    """It changes as much as on a CPU, and what it makes has numbers and lies on the CPU again."""
    here: dict[str, Any] = run_cases(folder, [name])[name]
    there = run_cases(folder, [name], pretend=True)[name]
    assert [p["changed"] for p in there["passes"]] == [p["changed"] for p in here["passes"]]
    assert there["weights"].keys() == here["weights"].keys()
    for key, value in there["weights"].items():
        assert not isinstance(value, OnGPU)
        assert value.shape == here["weights"][key].shape and bool(value.isfinite().all()), key
