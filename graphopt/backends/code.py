"""Running the Python files of a torch artifact, as what they were compared to be.

Whoever made a folder may have put compiled code beside its sources: Python's import would run a
`.pyc` in place of the file that was compared, and a driver whatever an image of a kernel holds. So
nothing is imported from a folder. The bytes that were compared are written to a private one, from
which they are compiled; images are compiled anew, where there is a compiler.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from graphopt.errors import LoweringError, SourceError
from graphopt.files.confined import files_inside, inside
from graphopt.ir.graph import Program

MODEL_NAME = "model.py"
ARENA, KERNELS, PICTURES, POLICIES, RANKS = "arena", "kernels", "pictures", "policies", "ranks"
_TRUSTED = (".py", ".cpp", ".cu", ".cubin", ".h", ".ptx")


class PrivateCode:
    """Files of code in a folder of their own, as long as this object lives.

    Args:
        files: Their bytes, by path.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-code-")
        self.root = Path(self._folder.name)
        for name, data in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def import_model(self) -> ModuleType:
        """Import `model.py`, under a name of its own."""
        return import_model(self.root / MODEL_NAME)


def import_model(path: Path) -> ModuleType:
    """Import a `model.py` from its text alone, under a name of its own."""
    module = ModuleType(f"graphopt_artifact_{uuid.uuid4().hex}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def checked_code(root: Path, program: Program, target: str, *, images: bool) -> PrivateCode:
    """Return the code of an artifact, which must be what graphopt writes for it.

    Args:
        root: The output folder.
        program: The program saved in it.
        target: What it was emitted for.
        images: Compile the images of kernels as well. Where there is no compiler, what would need
            them runs without.

    Raises:
        SourceError: A file differs.
    """
    from graphopt.lowering.torch import source_files

    files: dict[str, bytes] = {}
    for name, text in source_files(program, target).items():
        data = text.encode()
        if not _holds(root, name, data):
            raise SourceError(
                f"{root / name} is not the file that graphopt writes for "
                f"{root / 'program.json'} and {target}.",
                "Read it, and pass --trust-remote-code if you want it to run; or compile again.",
            )
        files[name] = data
    if images:
        from graphopt.lowering.torch.lowered_kernels import lower_attentions

        kernels = lower_attentions(program, target)
        with contextlib.suppress(LoweringError):
            compiled = {} if kernels is None else kernels.compile()
            files |= {f"{KERNELS}/{name}": data for name, data in compiled.items()}
    return PrivateCode(files)


def trusted_code(root: Path) -> PrivateCode:
    """Return the code of an artifact as it is, for a user who read it and trusts it.

    What Python compiled earlier and libraries, which nobody can read, stay behind.

    Raises:
        SourceError: A file cannot be read, or is a link out of the folder.
    """
    folders = (ARENA, KERNELS, PICTURES, POLICIES, RANKS)
    paths = [inside(root, MODEL_NAME)]
    for folder in (*folders, *(f"{folder}/kv_policies" for folder in folders)):
        paths += files_inside(root, f"{folder}/*")
    files: dict[str, bytes] = {}
    for path in paths:
        if path.suffix in _TRUSTED:
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    return PrivateCode(files)


def _holds(root: Path, name: str, data: bytes) -> bool:
    try:
        path = inside(root, name)
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except (SourceError, OSError):
        return False
