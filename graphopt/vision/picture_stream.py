"""Pictures with prompts and answers as a stream of tokens that passes calibrate and train on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.execute.language_model import ProgramModel
from graphopt.ir.functional import picture_numbers
from graphopt.ir.graph import Program
from graphopt.ir.ops.pictures import AXES
from graphopt.ir.picture_table import table_of
from graphopt.ir.sighted import EMBEDS
from graphopt.ir.vision import PictureTokens, Vision
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


@dataclass(frozen=True)
class PictureStream:
    """Prompts, answers and pictures as tokens.

    Attributes:
        text: All of it, with a text in between where there was one. Ids from the number of the
            table's rows on stand for tokens of pictures.
        rows: What these are looked up as, fp32 [K, D].
        places: Where they stand, for a model whose pictures have positions of three axes or are
            seen both ways; None for others.
        pictures: How many pictures.
        tokens: How many tokens of pictures, prompts and answers.
    """

    text: TokenText
    rows: Array
    places: PictureTokens | None
    pictures: int
    tokens: int

    def digest(self) -> str:
        """Return a hash of the tokens and of what pictures became."""
        made = hashlib.sha256(self.text.ids.numpy().tobytes())
        made.update(self.rows.load().numpy().tobytes())
        if self.places is not None:
            for numbers in (self.places.pictures, self.places.places, self.places.steps):
                made.update(numbers.numpy().tobytes())
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
        UsageError: The model takes no pictures, or prompts do not fit theirs.
        SourceError: A picture cannot be read, or the processor fails.
    """
    processor, tower = Processor(program), VisionTower(program, device=device)
    vision = tower.vision
    begin, _ = special_ends(processor.tokenizer)
    first, pictures = table_of(program).shape[0], 0
    parts: list[Tensor] = []
    seen: list[_Seen] = []
    rest = torch.empty(0, dtype=torch.long) if text is None else text.ids
    # Ids beyond the vocabulary are pictures' from here on.
    ProgramModel(program).check_ids(rest.tolist())
    for done, row in enumerate(rows):
        progress("looking at pictures", done, len(rows))
        prompt = processor.inputs(row.prompt, row.images, row.where)
        inputs, _ = processor.with_answer(prompt, row.answer)
        given = tower.inputs(**{name: value.to(device) for name, value in inputs.items()})
        found = _Seen.of(given, vision, row.where)
        ids, own = given["input_ids"][0].cpu(), found.own
        behind = first + sum(len(other.rows) for other in seen)
        ids[own] = torch.arange(behind, behind + len(found.rows))
        seen.append(found)
        pictures += len(row.images)
        if ids[: len(begin)].tolist() == begin:
            ids = ids[len(begin) :]
        parts += [ids, rest[: len(ids)]]
        rest = rest[len(ids) :]
    progress("looking at pictures", len(rows), len(rows))
    tokens = sum(map(len, parts[::2]))
    start = torch.tensor(begin, dtype=torch.long) if text is None else text.begin
    stream = TokenText(torch.cat([*parts, rest]), start)
    vectors = Array(torch.cat([found.rows for found in seen]))
    more = vision.sections is not None or vision.both_ways
    places = _joined(first, seen) if more else None
    return PictureStream(stream, vectors, places, pictures, tokens)


@dataclass(frozen=True)
class _Seen:
    """What the tokens of one prompt's pictures became.

    Attributes:
        own: bool [S], which tokens they are.
        rows: fp32 [K, D].
        pictures, places, steps: As in `PictureTokens`, pictures counted from 0.
    """

    own: Tensor
    rows: Tensor
    pictures: Tensor
    places: Tensor
    steps: Tensor

    @classmethod
    def of(cls, given: Mapping[str, Tensor], vision: Vision, where: str) -> _Seen:
        """Return it by what the tower made of a prompt.

        Raises:
            UsageError: Positions are not those of a text with pictures in it.
        """
        own = (given["input_ids"][0] == vision.image_token).cpu()
        # The program multiplies what it looks up; what is a picture's is not to be.
        rows = given[EMBEDS][0].cpu()[own].float() / vision.embedding_scale
        numbers = picture_numbers(own)
        positions = given["position_ids"].cpu().expand(AXES, 1, -1)[:, 0]
        places, steps = torch.zeros_like(positions), torch.ones_like(numbers)
        steps[own] = 0
        for number in range(int(numbers.max()) + 1):
            (run,) = (numbers == number).nonzero(as_tuple=True)
            before = positions[:, : run[0]]
            start = int(before.max()) + 1 if before.numel() else 0
            places[:, run] = positions[:, run] - start
            steps[run[-1]] = int(positions[:, run].max()) + 1 - start
        made = cls(own, rows, numbers[own], places[:, own], steps[own])
        ids = torch.where(own, own.cumsum(0) - 1, -1)
        if not torch.equal(_joined(0, [made]).positions(ids[None])[:, 0], positions):
            raise UsageError(
                f"{where}: the model counts positions around pictures in a way that windows of "
                "calibration tokens do not hold.",
                "Leave --calib-images out: passes are calibrated on text alone.",
            )
        return made


def _joined(first: int, seen: Sequence[_Seen]) -> PictureTokens:
    """Return where the tokens of all prompts' pictures stand, ids of which begin at `first`."""
    pictures, count = [], 0
    for found in seen:
        pictures.append(found.pictures + count)
        count += int(found.pictures.max()) + 1 if found.pictures.numel() else 0
    return PictureTokens(
        first,
        torch.cat(pictures),
        torch.cat([found.places for found in seen], 1),
        torch.cat([found.steps for found in seen]),
    )
