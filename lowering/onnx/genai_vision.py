"""What onnxruntime-genai needs of a model that sees: sections of its config, and how pictures are
made into what the tower takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.capture.vision_export import GRIDS, PIXELS, SIZES
from graphopt.files.onnx_file import EMBEDDING_NAME, VISION_NAME
from graphopt.ir.embedder import FEATURES
from graphopt.ir.graph import Program
from graphopt.ir.sighted import EMBEDS
from graphopt.lowering.onnx.sighted import Parts
from graphopt.sources.tokenizer import PROCESSOR_FILES
from graphopt.support.inputs import parse_json, read_utf8

PROCESSOR_NAME = "genai_processor.json"
"""Steps from a file of a picture to the tower's input; transformers' own file has another form."""

TYPES = {
    "gemma3": "gemma3", "mistral3": "mistral3", "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_5_vl",
}  # fmt: skip
"""transformers' type -> the one by which onnxruntime-genai 0.18 feeds the same graphs.

What tells Qwen2-VL from 2.5 is inside the tower.
"""

_RESAMPLING = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}
"""Pillow's numbers."""


def vision_sections(program: Program, parts: Parts) -> dict[str, Any] | None:
    """Return what a genai_config.json says of tower and embedding; None for other types."""
    kind = TYPES.get(str(program.config.get("model_type")))
    if kind is None or parts.tower is None:
        return None
    seen = program.config.get("vision_config") or {}
    inputs = {PIXELS: PIXELS}
    if GRIDS in parts.tower.inputs:
        inputs[GRIDS] = GRIDS
    elif kind == "mistral3":
        inputs[SIZES] = SIZES
    vision: dict[str, Any] = {
        "filename": VISION_NAME,
        "config_filename": PROCESSOR_NAME,
        "inputs": inputs,
        "outputs": {FEATURES: FEATURES},
    }
    merge = seen.get("spatial_merge_size", program.config.get("spatial_merge_size"))
    for name, value in (
        ("patch_size", seen.get("patch_size")), ("spatial_merge_size", merge),
        ("tokens_per_second", seen.get("tokens_per_second")),
    ):  # fmt: skip
        if isinstance(value, int | float):
            vision[name] = value
    embedding = {
        "filename": EMBEDDING_NAME,
        "inputs": {"input_ids": "input_ids", FEATURES: FEATURES},
        "outputs": {EMBEDS: EMBEDS},
    }
    assert program.vision is not None
    tokens = {"image_token_id": program.vision.image_token}
    for name in ("video_token_id", "vision_start_token_id"):
        if isinstance(program.config.get(name), int):
            tokens[name] = program.config[name]
    return {"type": kind, "vision": vision, "embedding": embedding, **tokens}


def with_vision(config: dict[str, Any], sections: Mapping[str, Any]) -> None:
    """Make the config of a decoder on token ids that of one on embeddings."""
    config["model"] |= sections
    inputs = config["model"]["decoder"]["inputs"]
    config["model"]["decoder"]["inputs"] = {"inputs_embeds": EMBEDS, **inputs}


def why_text_alone(program: Program, parts: Parts) -> str:
    """Return why onnxruntime-genai gets the decoder on token ids."""
    if parts.tower is None:
        return f"onnxruntime-genai reads text alone, since there is no {VISION_NAME}"
    kind = program.config.get("model_type")
    return (
        f"onnxruntime-genai has no type for {kind} and reads text alone; `graphopt generate "
        f"--image` runs {VISION_NAME}, {EMBEDDING_NAME} and the decoder"
    )


def write_processor(program: Program, folder: Path) -> list[Path]:
    """Write the steps by which onnxruntime-genai makes pictures into the tower's input.

    Returns:
        The file; none where the model states no image processor, or leaves out what is needed.

    Raises:
        SourceError: The processor's file cannot be read.
    """
    steps = _steps(program, _image_processor(program))
    if steps is None:
        return []
    name = "qwen2_5_image_processor" if steps[-1][0] == "PatchImage" else "image_processor"
    transforms = []
    for kind, attrs in steps:
        operation: dict[str, Any] = {"name": kind.lower(), "type": kind}
        transforms.append({"operation": operation | ({"attrs": attrs} if attrs else {})})
    path = folder / PROCESSOR_NAME
    text = json.dumps({"processor": {"name": name, "transforms": transforms}}, indent=2)
    path.write_text(text + "\n", "utf-8")
    return [path]


def _image_processor(program: Program) -> dict[str, Any]:
    """Return what the model's files say of its image processor; {} where nothing does."""
    for name in PROCESSOR_FILES if program.tokenizer is not None else ():
        path = Path(program.tokenizer or "") / name
        if path.is_file():
            found = parse_json(read_utf8(path).encode(), str(path))
            inner = found.get("image_processor", found)
            if isinstance(inner, dict) and "image_mean" in inner:
                return inner
    return {}


def _steps(program: Program, said: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the operations of onnxruntime-extensions, in order, with their attributes."""
    mean, deviation = said.get("image_mean"), said.get("image_std")
    if mean is None or deviation is None:
        return None
    size = said.get("size") or {}
    resize: dict[str, Any] = {"interpolation": _RESAMPLING.get(said.get("resample", 3), "CUBIC")}
    seen = program.config.get("vision_config") or {}
    kind = TYPES[program.config["model_type"]]
    if kind == "gemma3":
        edge = seen.get("image_size")
        width, height = size.get("width", edge), size.get("height", edge)
        resize |= {"width": width, "height": height, "keep_aspect_ratio": 0}
        last = [("Permute3D", {"dims": [2, 0, 1]})]
    else:
        patch = said.get("patch_size", seen.get("patch_size"))
        patch = patch.get("height") if isinstance(patch, dict) else patch
        merge = said.get("merge_size", program.config.get("spatial_merge_size", 2))
        unit = patch * merge
        longest = size.get("longest_edge", unit**2)
        least = said.get("min_pixels", size.get("shortest_edge", unit**2))
        # Pixtral's longest edge is one of a square, Qwen's a count of pixels.
        most = said.get("max_pixels", longest if kind == "qwen2_5_vl" else longest**2)
        resize |= {
            "width": unit, "height": unit, "smart_resize": 1, "patch_size": patch,
            "merge_size": merge, "min_pixels": least or unit**2, "max_pixels": most,
        }  # fmt: skip
        last = [("Permute3D", {"dims": [2, 0, 1]}), ("PixtralImageSizes", {})]
        if kind == "qwen2_5_vl":
            frames = said.get("temporal_patch_size", seen.get("temporal_patch_size", 2))
            cut = {"patch_size": patch, "temporal_patch_size": frames, "merge_size": merge}
            last = [("PatchImage", cut)]
    return [
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", resize),
        ("Rescale", {"rescale_factor": said.get("rescale_factor", 1 / 255)}),
        ("Normalize", {"mean": mean, "std": deviation}),
        *last,
    ]
