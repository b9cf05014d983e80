"""Models as users write them: whole, in steps on a past and padded, against their own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from custom_models import MASKS, NEIGHBOURS, PLACES, Decoder
from families import randomise
from family_sweep import batches, compare
from sampling import exhaustive_but
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


# Places looked up and computed, positions of a rotation, and factors by the length.
COUNTING = ("slice of a parameter", "buffer of numbers", "rotation by number", "log of the length")
# A token beside its neighbour, ids, products with a triangle, and within attention.
MIXING = ("shift by padding", "ids before", "product with tril", "keys shifted")
IN_ONNX = ("slice of a parameter", "documents")


@pytest.mark.slow
@pytest.mark.parametrize("kind", exhaustive_but(PLACES, *COUNTING))
def test_what_counts_tokens_goes_on_behind_the_cache(kind: str) -> None:
    program, wanted = captured(kind)
    assert program.states
    found = compare(ProgramModel(program), wanted)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", exhaustive_but(NEIGHBOURS, *MIXING))
def test_what_mixes_tokens_has_no_cache(kind: str) -> None:
    """Rows of padding are left out: what attention makes of them is read by their neighbours."""
    program, wanted = captured(kind)
    assert not program.states
    found = compare(ProgramModel(program), wanted)
    assert max(v for k, v in found.items() if k.endswith("batch 1")) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", exhaustive_but(MASKS, "documents", "slopes by distance", "quantile")
)
def test_masks_and_scores_made_by_hand(kind: str) -> None:
    program, wanted = captured(kind)
    found = compare(ProgramModel(program), wanted)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", exhaustive_but(["slice of a parameter", "rotation by table", "documents"], *IN_ONNX)
)
def test_in_onnx(kind: str, tmp_path: Path) -> None:
    program, wanted = captured(kind)
    go.emit(program, tmp_path / "out", emit=("onnx",))
    found = compare(OnnxArtifactModel(tmp_path / "out" / "onnx"), wanted)
    assert max(found.values()) < TOLERANCE, found
