"""Pictures with prompts and answers as a stream of tokens that passes calibrate and train on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.ir.graph import Program
from graphopt.ir.picture_table import table_of
from graphopt.ir.sighted import EMBEDS
from graphopt.ir.weights import Array
from graphopt.sources.windows import TokenText, special_ends
from graphopt.support.progress import Progress, silent
from graphopt.vision.picture_rows import PictureRow, read_picture_rows
from graphopt.vision.processor import Processor
from graphopt.vision.tower import VisionTower


def calibration_rows(folder: Path) -> list[PictureRow]:
    """Return the rows of a folder with pictures and one file of JSON lines.

    Raises:
        SourceError: There is no such file, or several; or as `read_picture_rows`.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if len(files) != 1:
        what = f"holds {len(files)} .jsonl files" if folder.is_dir() else "is no folder"
        raise SourceError(
            f"{folder} {what}, and one says which prompts and answers go with its pictures.",
            'Put {"image": FILE, "prompt": TEXT, "answer": TEXT} into a line for each.',
        )
    return read_picture_rows(files[0], folder)


def check_pictures_as_tokens(program: Program) -> None:
    """Refuse a model whose pictures are more than vectors among those of a text.

    Raises:
        UsageError: It takes none, its positions have three axes, or its pictures are seen both
            ways.
    """
    vision, why = program.vision, ""
    if vision is None:
        raise UsageError(
            f"{program.name} is a model of text alone and takes no pictures.",
            "Leave --calib-images out.",
        )
    if vision.sections is not None:
        why = "has positions of three axes"
    elif vision.both_ways:
        why = "lets the tokens of a picture see each other both ways"
    if why:
        raise UsageError(
            f"{program.name} {why}, which windows of calibration tokens do not hold.",
            "Leave --calib-images out: passes are calibrated on text alone.",
        )


@dataclass(frozen=True)
class PictureStream:
    """Prompts, answers and pictures as tokens.

    Attributes:
        text: All of it, with a text in between where there was one. Ids from the number of the
            table's rows on stand for tokens of pictures.
        rows: What these are looked up as, fp32 [K, D].
        pictures: How many pictures.
        tokens: How many tokens of pictures, prompts and answers.
    """

    text: TokenText
    rows: Array
    pictures: int
    tokens: int

    def digest(self) -> str:
        """Return a hash of the tokens and of what pictures became."""
        made = hashlib.sha256(self.text.ids.numpy().tobytes())
        made.update(self.rows.load().numpy().tobytes())
        return made.hexdigest()

    def __str__(self) -> str:
        own = self.rows.shape[0]
        return f"{self.pictures} pictures ({own} tokens) with {self.tokens - own} tokens of prompts"


def picture_stream(
    program: Program,
    rows: Sequence[PictureRow],
    text: TokenText | None,
    device: torch.device,
    progress: Progress = silent,
) -> PictureStream:
    """Return pictures, prompts and answers as a stream; the tower sees each picture once.

    Each prompt is as `graphopt generate` puts it, its answer follows, and then as many tokens of
    the text, as long as there are any: both are in every part of the stream.

    Args:
        text: The calibration text; None for pictures alone.

    Raises:
        UsageError: As `check_pictures_as_tokens`, and where prompts do not fit their pictures.
        SourceError: A picture cannot be read, or the processor fails.
    """
    check_pictures_as_tokens(program)
    vision = program.vision
    assert vision is not None
    processor, tower = Processor(program), VisionTower(program, device=device)
    begin, _ = special_ends(processor.tokenizer)
    first, found = table_of(program).shape[0], 0
    parts: list[Tensor] = []
    vectors: list[Tensor] = []
    rest, pictures = torch.empty(0, dtype=torch.long) if text is None else text.ids, 0
    for done, row in enumerate(rows):
        progress("looking at pictures", done, len(rows))
        prompt = processor.inputs(row.prompt, row.images, row.where)
        inputs, _ = processor.with_answer(prompt, row.answer)
        given = tower.inputs(**{name: value.to(device) for name, value in inputs.items()})
        ids, own = given["input_ids"][0].cpu(), given["input_ids"][0] == vision.image_token
        # The program multiplies what it looks up; what is a picture's is not to be.
        vectors.append(given[EMBEDS][0][own].float().cpu() / vision.embedding_scale)
        ids[own.cpu()] = torch.arange(first + found, first + found + len(vectors[-1]))
        found, pictures = found + len(vectors[-1]), pictures + len(row.images)
        if ids[: len(begin)].tolist() == begin:
            ids = ids[len(begin) :]
        parts += [ids, rest[: len(ids)]]
        rest = rest[len(ids) :]
    progress("looking at pictures", len(rows), len(rows))
    tokens = sum(map(len, parts[::2]))
    start = torch.tensor(begin, dtype=torch.long) if text is None else text.begin
    return PictureStream(
        TokenText(torch.cat([*parts, rest]), start), Array(torch.cat(vectors)), pictures, tokens
    )
