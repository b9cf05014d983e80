"""A small model that sees, trained on drawn shapes and their captions, and pictures of those."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 24, 6
TOKENS = (SIDE // PATCH) ** 2
COLOURS = {"red": "#e02020", "green": "#20b020", "blue": "#2040e0", "yellow": "#e0d020",
           "white": "#f0f0f0", "purple": "#a020c0"}  # fmt: skip
SIZES = {"small": 3, "large": 5}
SHAPES = ("circle", "square", "triangle")
PLACES = {"left of": ((6, 12), (18, 12)), "right of": ((18, 12), (6, 12)),
          "above": ((12, 6), (12, 18)), "below": ((12, 18), (12, 6))}  # fmt: skip
PROMPT = "<image> caption :"
WORDS = ["<pad>", "<end>", "<image>", "caption", ":", "a", *SIZES, *COLOURS, *SHAPES,
         "left", "right", "of", "above", "below", "<unk>"]  # fmt: skip

IN_TEXT = 4
"""Captions of a text without pictures, in training."""

Scene = tuple[str, ...]
"""Size, colour and shape of one thing, how it lies to another, and that one's."""


def scenes(count: int, seed: int) -> Iterator[Scene]:
    """Yield random scenes."""
    draw = random.Random(seed)
    for _ in range(count):
        things = [
            (draw.choice([*SIZES]), draw.choice([*COLOURS]), draw.choice(SHAPES)) for _ in "ab"
        ]
        yield (*things[0], draw.choice([*PLACES]), *things[1])


def caption(scene: Scene) -> str:
    """Return what is said of a scene."""
    return f"a {' '.join(scene[:3])} {scene[3]} a {' '.join(scene[4:])}"


def alone(scene: Scene) -> str:
    """Return a caption as it stands in a text without pictures."""
    return f"caption : {caption(scene)} <end>"


def draw(scene: Scene) -> Image.Image:
    """Return the picture of a scene."""
    picture = Image.new("RGB", (SIDE, SIDE), "black")
    pen = ImageDraw.Draw(picture)
    for thing, (x, y) in zip((scene[:3], scene[4:]), PLACES[scene[3]], strict=True):
        size, colour, shape = thing
        half, fill = SIZES[size], COLOURS[colour]
        box = (x - half, y - half, x + half, y + half)
        if shape == "circle":
            pen.ellipse(box, fill=fill)
        elif shape == "square":
            pen.rectangle(box, fill=fill)
        else:
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)
    return picture


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """Write pictures, and `rows.jsonl` with their prompts and captions."""
    folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(scenes(count, seed)):
        draw(scene).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": PROMPT, "answer": caption(scene)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_text(path: Path, count: int, seed: int) -> None:
    """Write captions without pictures, as the model was trained on them."""
    path.write_text(" ".join(map(alone, scenes(count, seed))), encoding="utf-8")


def _processor() -> LlavaProcessor:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<pad>", "<end>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def train(
    folder: Path, *, steps: int, blocks: int = 8, width: int = 96, batch: int = 48, seed: int = 0
) -> list[float]:
    """Train a LLaVA on pictures and captions and write it; return the loss of every 50th step.

    A third of the captions come without their pictures, so that the model knows text alone too.
    """
    torch.manual_seed(seed)
    processor = _processor()
    token = WORDS.index("<image>")
    config = AutoConfig.for_model(
        "llava",
        text_config={
            "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": width,
            "intermediate_size": 2 * width, "num_hidden_layers": blocks, "num_attention_heads": 4,
            "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
            "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
            "patch_size": PATCH, "projection_dim": 64,
        },
        image_token_id=token, image_token_index=token, image_seq_length=TOKENS,
    )  # fmt: skip
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    samples = itertools.cycle([list(scenes(batch, 1000 + n)) for n in range(min(steps, 400))])
    losses = []
    for step in range(steps):
        loss = _loss(model, processor, next(samples), pictures=step % 3 != 2)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return losses


def _loss(model: Any, processor: Any, batch: list[Scene], *, pictures: bool) -> Tensor:
    """Return the cross-entropy of captions, behind their pictures or in a text of their own."""
    head = "<image>" * TOKENS + " caption :" if pictures else ""
    texts = [f"{head} {caption(scene)} <end>" for scene in batch]
    if not pictures:  # several behind one another, as in a text
        texts = [
            " ".join(map(alone, batch[n : n + IN_TEXT])) for n in range(0, len(batch), IN_TEXT)
        ]
    made = processor.tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = made["input_ids"], made["attention_mask"]
    given = {"input_ids": ids, "attention_mask": mask}
    if pictures:
        images = processor.image_processor([draw(scene) for scene in batch], return_tensors="pt")
        given["pixel_values"] = images["pixel_values"]
    logits = model(**given).logits[:, :-1]
    behind = len(processor.tokenizer(head)["input_ids"])
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    targets[:, : max(behind - 1, 0)] = -100
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
