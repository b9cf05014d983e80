"""Models as users write them: whole, in steps on a past and padded, against their own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from custom_models import MASKS, NEIGHBOURS, PLACES, Decoder
from families import mostly_slow, randomise
from family_sweep import batches, compare
from torch import Tensor

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.execute.language_model import ProgramModel

TOLERANCE = 2e-5


def captured(kind: str) -> tuple[go.Program, list[Tensor]]:
    """Return the program of a kind, with a cache where it can have one, and eager's logits."""
    model = Decoder(kind).eval()
    randomise(model)
    with torch.no_grad():
        wanted = [model(*batch) for batch in batches()]
    program, _ = go.Pipeline.default().run(go.capture(model), go.RunOptions(verify=False))
    return program, wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly_slow(PLACES, PLACES[:1]))
def test_what_counts_tokens_goes_on_behind_the_cache(kind: str) -> None:
    program, wanted = captured(kind)
    assert program.states
    found = compare(ProgramModel(program), wanted)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly_slow(NEIGHBOURS, NEIGHBOURS[:1]))
def test_what_mixes_tokens_has_no_cache(kind: str) -> None:
    """Rows of padding are left out: what attention makes of them is read by their neighbours."""
    program, wanted = captured(kind)
    assert not program.states
    found = compare(ProgramModel(program), wanted)
    assert max(v for k, v in found.items() if k.endswith("batch 1")) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly_slow(MASKS, MASKS[:1]))
def test_masks_and_scores_made_by_hand(kind: str) -> None:
    program, wanted = captured(kind)
    found = compare(ProgramModel(program), wanted)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slice of a parameter", "rotation by table", "documents"])
def test_in_onnx(kind: str, tmp_path: Path) -> None:
    program, wanted = captured(kind)
    go.emit(program, tmp_path / "out", emit=("onnx",))
    found = compare(OnnxArtifactModel(tmp_path / "out" / "onnx"), wanted)
    assert max(found.values()) < TOLERANCE, found
