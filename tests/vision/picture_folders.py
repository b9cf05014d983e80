"""Small models that see, with pictures to calibrate on beside them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from vision_models import save_with_processor

MARKS = {"llava": "<image>", "qwen2_vl": "<image>", "gemma3": "<boi>"}
"""Families, and what stands for a picture in their prompts."""


def write_pictures(images: Path, mark: str) -> None:
    """Write six pictures of three heights with prompts and answers, in every third prompt two."""
    from PIL import Image

    images.mkdir()
    noise = torch.Generator().manual_seed(0)
    lines = []
    for number in range(6):
        size = (16 + 8 * (number % 3), 24, 3)
        values = torch.randint(0, 256, size, generator=noise, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(images / f"{number}.png")
        row = {"image": f"{number}.png", "prompt": f"{mark}What is it?", "answer": f" a {number}"}
        if number % 3 == 2:
            two = {"image": [f"{number}.png", "0.png"], "prompt": f"Of {mark} and {mark}: what?"}
            row |= two
        lines.append(json.dumps(row))
    (images / "rows.jsonl").write_text("\n".join(lines))


def save_with_pictures(root: Path, family: str) -> Path:
    """Write `model`, `images` and `text.txt` into a folder, and return it."""
    save_with_processor(root / "model", family)
    write_pictures(root / "images", MARKS[family])
    (root / "text.txt").write_text("The harbour was quiet on the morning the survey began. " * 40)
    return root
