"""Programs saved between passes, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch

from graphopt.errors import GraphoptError, SourceError, VerifyError, first_line
from graphopt.files.config_schema import check_saved_config
from graphopt.files.raw import RawTensor
from graphopt.files.safetensors import WEIGHTS_NAME, SafetensorsWriter, read_header
from graphopt.ir.graph import Program
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.shapes import infer_program
from graphopt.ir.verify import verify
from graphopt.ir.weights import Array, Producer
from graphopt.support.boundary import out_of_memory
from graphopt.support.inputs import Schema, parse, read_json
from graphopt.support.plain import shown
from graphopt.support.tensor_bytes import tensor_bytes

SNAPSHOT_NAME = "snapshot.json"


class _Snapshot(Schema):
    """What a snapshot holds; its weights lie beside it.

    Attributes:
        program: See `program_to_json`.
        origin: The program's weight -> the source's.
        stored: The program's weight -> the snapshot that holds it, and its name there.
        entries: Report entries of the passes so far.
        figures: See `Snapshots.save`.
    """

    program: dict[str, Any]
    origin: dict[str, str]
    stored: dict[str, Annotated[list[str], pydantic.Field(min_length=2, max_length=2)]]
    entries: list[dict[str, Any]]
    figures: dict[str, Any]


@contextlib.contextmanager
def resuming_from(path: Path) -> Iterator[None]:
    """Give what is wrong with the saved state of an interrupted run its sentence.

    A state is read by torch's own reader, which has assorted errors for damaged files.

    Raises:
        SourceError: The body could not take up what `path` holds.
    """
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise SourceError(
            f"{path} is damaged: {first_line(error)}.", "Leave --resume out to start again."
        ) from error


def fingerprint(program: Program) -> str:
    """Return a hash of a program's structure and of where its weights come from.

    Files count by path, size and time of change: their content is not read.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(program_to_json(program), sort_keys=True, default=str).encode())
    for weight in program.weights:
        _feed(digest, weight.name)
        _feed(digest, weight.producer)
    return digest.hexdigest()


def _signature(program: Program) -> tuple[dict[str, tuple[int, torch.dtype]], list[int]]:
    """Return what every pass keeps of inputs and outputs: a cache makes masks longer."""
    carried = infer_program(program)[1]
    inputs = {name: (len(kind.shape), kind.dtype) for name, kind in program.inputs.items()}
    return inputs, [len(carried[name].shape) for name in program.outputs]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Array):
        tensor = value.value
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor).numpy().tobytes())
    elif isinstance(value, Producer) and dataclasses.is_dataclass(value):
        digest.update(type(value).__qualname__.encode())
        for part in dataclasses.fields(value):
            _feed(digest, getattr(value, part.name))
    elif isinstance(value, Path):
        digest.update(str(value).encode())
        with contextlib.suppress(OSError):
            status = value.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    else:
        digest.update(repr(value).encode())


class Snapshots:
    """The folder with the snapshots of a run.

    A snapshot holds the structure, and of the weights only those that neither are the source's
    own nor lie in an earlier snapshot.

    Args:
        folder: Made when the first snapshot is saved.
        source: The program before the first pass.
        salt: What beside source and recipe decides the result, such as seed and text.
    """

    def __init__(self, folder: Path, source: Program, salt: str) -> None:
        self.folder = folder
        self._source = source
        self._salt = salt + fingerprint(source)
        # Producers by identity, kept alive so that an id stays one producer's.
        self._origin = {id(t.producer): (t.name, t.producer) for t in source.stored_tensors()}
        self._stored: dict[int, tuple[str, str, Producer]] = {}

    def key(self, recipe: str) -> str:
        """Return a hash of all that a recipe's result hangs on: source, salt and the recipe."""
        return hashlib.sha256(f"{self._salt}\n{recipe}".encode()).hexdigest()[:16]

    def _name(self, recipe: str, number: int) -> str:
        return f"{number:02d}-{self.key(recipe)}"

    def save(
        self,
        program: Program,
        recipe: str,
        number: int,
        entries: list[dict[str, Any]],
        figures: dict[str, Any],
    ) -> None:
        """Keep `program`, the result of the first `number` passes.

        Args:
            recipe: Text form of those passes.
            entries: Their report entries.
            figures: What else the report says of the run, by its names there.
        """
        name = self._name(recipe, number)
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            self._write(program, name, fresh, entries, figures)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            fresh.rename(self.folder / name)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise

    def _write(
        self,
        program: Program,
        name: str,
        fresh: Path,
        entries: list[dict[str, Any]],
        figures: dict[str, Any],
    ) -> None:
        tensors = program.stored_tensors()
        own = [t for t in tensors if id(t.producer) not in self._origin]
        unsaved = [w for w in own if id(w.producer) not in self._stored]
        if unsaved:
            announced = {weight.name: (weight.shape, weight.dtype) for weight in unsaved}
            with SafetensorsWriter(fresh / WEIGHTS_NAME, announced) as writer:
                for weight in unsaved:
                    if weight.constant:  # may hold infinities, which a trained weight may not
                        writer.write(weight.name, weight.load())
                    else:
                        writer.copy(weight.name, weight.producer)
        for weight in unsaved:
            self._stored[id(weight.producer)] = (name, weight.name, weight.producer)
        state = {
            "program": program_to_json(program),
            "origin": {
                t.name: self._origin[id(t.producer)][0]
                for t in tensors
                if id(t.producer) in self._origin
            },
            "stored": {w.name: self._stored[id(w.producer)][:2] for w in own},
            "entries": entries,
            "figures": figures,
        }
        (fresh / SNAPSHOT_NAME).write_text(json.dumps(state), encoding="utf-8")

    def has(self, recipe: str, number: int) -> bool:
        """Return whether there is a snapshot after the first `number` passes."""
        return (self.folder / self._name(recipe, number) / SNAPSHOT_NAME).exists()

    def load(
        self, recipe: str, number: int
    ) -> tuple[Program, list[dict[str, Any]], dict[str, Any]] | None:
        """Return the snapshot after the first `number` passes, its entries and figures, if there.

        Raises:
            SourceError: It is damaged, or its program is none that a pass makes of the source.
        """
        path = self.folder / self._name(recipe, number) / SNAPSHOT_NAME
        if not path.exists():
            return None
        again = "Leave --resume out to start again."
        state = parse(_Snapshot, read_json(path, remedy=again), str(path), remedy=again)
        producers: dict[str, Producer] = {}
        given = {tensor.name: tensor.producer for tensor in self._source.stored_tensors()}
        for name, source in state.origin.items():
            if source not in given:
                raise SourceError(f"{path}: the source has no weight {shown(source)}.", again)
            producers[name] = given[source]
        files: dict[str, dict[str, RawTensor]] = {}
        for name, (folder, stored) in state.stored.items():
            if Path(folder).name != folder:
                raise SourceError(f"{path} names {shown(folder)}, which is no snapshot.", again)
            if folder not in files:
                files[folder] = read_header(self.folder / folder / WEIGHTS_NAME)
            if stored not in files[folder]:
                raise SourceError(f"{path}: the snapshots lack the weight {shown(stored)}.", again)
            producer = files[folder][stored]
            producers[name] = producer
            self._stored[id(producer)] = (folder, stored, producer)
        program = program_from_json(state.program, producers)
        for tensor in program.stored_tensors():
            if tensor.name not in producers:
                raise SourceError(f"{path} does not say where {shown(tensor.name)} is.", again)
        program.tokenizer = self._source.tokenizer
        program.licence_files = list(self._source.licence_files)
        self._check(program, path)
        return program, state.entries, state.figures

    def _check(self, program: Program, path: Path) -> None:
        """Refuse what no pass makes of the source.

        Raises:
            SourceError: It is malformed, or takes or returns something else.
        """
        again = "Leave --resume out to start again."
        try:
            verify(program)
        except VerifyError as error:
            raise SourceError(
                f"{path} holds a malformed program: {error.message}", again
            ) from error
        if _signature(program) != _signature(self._source):
            raise SourceError(
                f"{path} holds a program of other inputs or outputs than the source.", again
            )
        if program.config:
            check_saved_config(path, program.config)

    def clear(self) -> None:
        """Delete every snapshot."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class KeptWork:
    """What an interrupted compile left to go on with.

    Attributes:
        folder: Where it lies.
        passes: How many passes the latest snapshot stands behind.
        within: Whether the pass behind them kept what it had trained or written.
        bytes: The size of all files.
    """

    folder: Path
    passes: int
    within: bool
    bytes: int


def kept_work(folder: Path) -> KeptWork | None:
    """Return what lies in the folder of snapshots of a compile; None where there is nothing."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    saved = [path for path in files if path.name == SNAPSHOT_NAME]
    latest = max(saved, key=lambda path: path.stat().st_mtime_ns, default=None)
    # Whatever a pass keeps for itself lies in the folder, snapshots in folders of their own.
    own = [path for path in files if path.parent == folder]
    if latest is None and not own:
        return None
    number = latest.parent.name.partition("-")[0] if latest is not None else "0"
    size = sum(path.stat().st_size for path in files)
    newest = max((path.stat().st_mtime_ns for path in own), default=0)
    within = bool(own) and (latest is None or newest > latest.stat().st_mtime_ns)
    return KeptWork(folder, int(number) if number.isdigit() else 0, within, size)
