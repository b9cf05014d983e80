"""Files of pictures with prompts and answers, and pictures themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic

from graphopt.errors import SourceError
from graphopt.files.confined import inside
from graphopt.support.inputs import OpenSchema, parse, parse_json, read_utf8

REMEDY = (
    'Each line is {"image": FILE, "prompt": TEXT, "answer": TEXT}, with files beside it, or a list '
    "of files for several pictures."
)


@dataclass(frozen=True)
class PictureRow:
    """Pictures with what is asked of them, and the answer.

    Attributes:
        images: Files, in the order in which the prompt speaks of them.
        where: The file and the line it stands in, for messages.
    """

    images: tuple[Path, ...]
    prompt: str
    answer: str
    where: str


_File = Annotated[str, pydantic.Field(min_length=1, max_length=1000)]


class _Line(OpenSchema):
    image: _File | Annotated[list[_File], pydantic.Field(min_length=1, max_length=64)]
    prompt: str
    answer: Annotated[str, pydantic.Field(min_length=1)]


def read_picture_rows(path: Path, folder: Path | None = None) -> list[PictureRow]:
    """Read JSON lines with `image`, `prompt` and `answer`.

    Args:
        folder: Where the pictures lie; by default beside the file.

    Raises:
        SourceError: The file cannot be read or is empty, a line is malformed, or a picture is not
            there or leads out of the folder.
    """
    path = Path(path)
    root = path.parent if folder is None else Path(folder)
    rows = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = parse(
            _Line,
            parse_json(line.encode(), where, remedy=REMEDY, one_line=True),
            where,
            remedy=REMEDY,
        )
        names = [entry.image] if isinstance(entry.image, str) else entry.image
        for name in names:
            if not (root / name).is_file():
                raise SourceError(f"{where}: there is no picture {root / name}.", REMEDY)
        images = tuple(inside(root, name) for name in names)
        rows.append(PictureRow(images, entry.prompt, entry.answer, where))
    if not rows:
        raise SourceError(f"{path} is empty.", REMEDY)
    return rows
