"""The licence of a source, written along with what is made of it."""

from __future__ import annotations

from pathlib import Path

from graphopt.files.licence import licence_text
from graphopt.ir.graph import Program

NOTICE_NAME = "NOTICE"


def write_licence(program: Program, folder: Path) -> list[Path]:
    """Copy the licence and the notices of a program's source into a folder, if that is there.

    Where the source states a licence and brings no file, a notice says what it states.

    Returns:
        The files written.

    Raises:
        SourceError: A file cannot be read, or is larger than any licence.
    """
    if not folder.is_dir():
        return []
    texts = {Path(path).name: licence_text(path) for path in program.licence_files}
    if program.licence and not texts:
        notice = (
            f"This model was made by graphopt from {program.name}, whose source states the "
            f"licence: {program.licence}\n"
        )
        texts[NOTICE_NAME] = notice.encode()
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in texts]
