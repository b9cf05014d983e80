"""Towers and projectors as programs, run by ONNX Runtime: what transformers' own parts make."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sampling import exhaustive_but
from vision_models import FAMILIES, pixels, vision_model

from graphopt.capture.packed_attention import patch_places
from graphopt.capture.vision_export import tower_of, tower_program
from graphopt.errors import CaptureError
from graphopt.lowering.onnx.external import DataFile
from graphopt.lowering.onnx.graph import Graph
from graphopt.support.progress import silent

# The one with most to compute of sizes; the folders of others are run whole in test_onnx_folders.
SAMPLED = exhaustive_but(FAMILIES, "qwen2_5_vl")


@pytest.fixture(scope="module")
def towers(vision_program, tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            program, folder = tower_program(vision_program(family)), tmp_path_factory.mktemp(family)
            data = DataFile(folder / "vision.data", folder)
            model = Graph(program, data).build()
            data.write(silent)
            ir.save(model, folder / "vision.onnx")
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            made[family] = program, ort.InferenceSession(str(folder / "vision.onnx"), options)
        return made[family]

    return of


def eager(family, **given):
    """Return what the projector of transformers' model makes, [rows, D]."""
    model, made = vision_model(family), []
    tower_of(model).last.register_forward_hook(
        lambda part, args, output: made.append(getattr(output, "pooler_output", output))
    )
    with torch.no_grad():
        model.model.get_image_features(**given)
    return made[0].flatten(0, -2)


def run(session, **given):
    return torch.from_numpy(session.run(None, {n: v.numpy() for n, v in given.items()})[0])


def close(found, want):
    """Both compute in fp32, in other orders."""
    assert found.shape == want.shape
    assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_features_are_those_of_transformers(towers, family):
    program, session = towers(family)
    given = pixels(family, [1, 2])
    want = eager(family, **given)
    values = given["pixel_values"]
    if family in ("llava_next", "llava_onevision"):
        given["pixel_values"] = values.flatten(0, 1)
    if family in ("idefics3", "smolvlm"):
        values = values.flatten(0, 1)
        given["pixel_values"] = values[values.flatten(1).any(1)]  # without those that pad
    if family == "mistral3":
        found = torch.cat([run(session, pixel_values=value[None]) for value in values])
    else:
        found = run(session, **{name: given[name] for name in program.inputs})
    close(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(("qwen2_vl", "qwen2_5_vl"), "qwen2_5_vl"))
@pytest.mark.parametrize("grids", [[[1, 8, 10], [1, 4, 6], [2, 12, 2]], [[1, 2, 2]], [[3, 4, 4]]])
def test_pictures_of_other_sizes_in_patches(towers, family, grids):
    """Windows are 4 x 4 patches: some are cut off, some pictures have one."""
    grid = torch.tensor(grids)
    count = int(grid.prod(-1).sum())
    values = torch.rand(count, 96, generator=torch.Generator().manual_seed(1))
    _, session = towers(family)
    want = eager(family, pixel_values=values, image_grid_thw=grid)
    close(run(session, pixel_values=values, image_grid_thw=grid), want)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("height", "width"), [(24, 40), (8, 16), (64, 16)])
def test_pictures_of_other_sizes_by_themselves(towers, height, width):
    values = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[height, width]])
    want = eager("mistral3", pixel_values=values, image_sizes=sizes)
    close(run(towers("mistral3")[1], pixel_values=values), want)


def test_places_of_patches():
    """Two frames of 4 x 2 patches and one of 2 x 4, in squares of 2 x 2."""
    grids = torch.tensor([[2, 4, 2], [1, 2, 4]])
    found = patch_places(24, grids, 2)
    tall = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    wide = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    places = list(zip(found["row"].tolist(), found["column"].tolist(), strict=True))
    assert places == [*tall, *tall, *wide]
    frames = found["frame"].tolist()
    assert [len(set(frames[start : start + 8])) for start in (0, 8, 16)] == [1, 1, 1]
    assert len(set(frames)) == 3
    assert found["height"].tolist() == [4] * 16 + [2] * 8


def test_parts_that_are_arranged_otherwise():
    model = vision_model("llava")
    model.model.another = torch.nn.Linear(2, 2)
    with pytest.raises(CaptureError, match="which of its parts are tower and projector"):
        tower_of(model)
