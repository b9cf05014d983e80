"""Checkpoints as transformers reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Case, cases
from torch import nn
from transformers import AutoModelForCausalLM

CLOSE = 1e-5
"""The acceptance line, of the largest logit: sums of some hundred terms of fp32 in another order
move logits by some 1e-7 of it."""


def padded_case() -> Case:
    """Return three rows of seven tokens, some of them padding on the left."""
    return cases(lengths=(7,))[-1]


def loaded(folder: Path, **options: Any) -> nn.Module:
    """Return the model of a checkpoint, of which no key is missing and none is left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.float32} | options, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code of checkpoints before it runs it: to a folder of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
