"""Targets: what a machine can do, as data. One TOML file each, beside this module.

Planners read sizes from here and from nowhere else. Every figure has its source in the file. What
a file may say is checked by `graphopt.targets.schema`; a file that says something else is a target
that cannot be had, and the others can.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from graphopt.errors import UsageError, unknown_name
from graphopt.targets.schema import TargetFile, parse_target_file


@dataclass(frozen=True)
class Memory:
    """A memory a kernel can place data in.

    Attributes:
        name: Such as `shared` or `L0A`.
        bytes: Size; None where it depends on the machine.
        per: What has one: `core`, `vector core`, `device`.
    """

    name: str
    bytes: int | None
    per: str


@dataclass(frozen=True)
class MatrixUnit:
    """A shape that one matrix instruction multiplies: [m, k] by [k, n].

    Attributes:
        input: Element type of both operands, as IR dtype names.
        accumulate: Element types the sum may have.
    """

    m: int
    n: int
    k: int
    input: str
    accumulate: tuple[str, ...]


@dataclass(frozen=True)
class DecodeFigures:
    """What the time of a decoding step is predicted by.

    Attributes:
        bandwidth: Bytes a second at which attention of one query token reads keys and values.
        launch: Seconds of a kernel, or of an op, that has next to nothing to do.
        flops: Operations a second of small convolutions in fp32.
    """

    bandwidth: float
    launch: float
    flops: float


@dataclass(frozen=True)
class HostFigures:
    """What the host of a device takes to read keys that lie in its memory.

    Attributes:
        link: Bytes a second from pinned host memory to the device.
        attention: Bytes a second at which the host's processors attend to keys.
        link_beside, attention_beside: The same while both go on.
        call: Seconds from the device to the host's processors and back, without anything to read.
    """

    link: float
    attention: float
    link_beside: float
    attention_beside: float
    call: float


@dataclass(frozen=True)
class MeasuredTiles:
    """Tiles of a kernel that were measured to be the fastest.

    Attributes:
        kernel: Name of the kernel family.
        attention: Fields of the `AttentionSpec` that was measured, and their values.
        tiles: The fastest.
        device, date: Where and when.
    """

    kernel: str
    attention: dict[str, Any]
    tiles: dict[str, int]
    device: str
    date: str

    def fits(self, spec: object) -> bool:
        """Return whether a description agrees in every field that was measured."""
        return all(getattr(spec, name) == value for name, value in self.attention.items())


@dataclass(frozen=True)
class Target:
    """A machine to emit for.

    Attributes:
        name: What the command line calls it.
        title: What it is called in full.
        kind: `cpu`, `gpu` or `npu`.
        isa: Instruction set: of a GPU `sm_` and the compute capability, such as `sm_70`.
        dtypes: Element types kernels may compute in, as IR dtype names.
        features: What it can do beyond its figures. `wgmma`: matrix products of 64 rows by four
            warps together, operands in shared memory. `programmatic-launch`: a kernel may be
            launched before the end of the one in front, and wait for it inside.
        cores: Number of cores (streaming multiprocessors, cube cores); None where it varies.
        bandwidth: Bytes a second of the device memory; None where it varies. It is the most that
            there can be: times are predicted by what was reached, which `decode` has.
        flops: Element type -> operations a second of matrix products, by data sheet.
        kernels: Families of attention kernels it has, the best first.
        layer_kernels: Families of kernels for the rest of a layer: norms, rotary positions, gates
            and cache writes.
        memories: On-chip and device memories.
        matrix_units: What its matrix instructions multiply.
        experts: Tiles of the experts' kernels: `many` and `few`, as the file has them; None where
            there are none, and experts run in plain torch.
        quantised: Tiles of the kernels of quantised weights: `packed`, `integer_packed` and
            `integer`, as the file has them; None where there are none.
        decode: What a decoding step's time is predicted by; None where nothing is stated.
        reductions: What sums over ranks are planned by, and their tiles, as the file has them; None
            where torch.distributed does them.
        host_link: Bytes a second from pinned host memory to the device; None where it is not
            stated, or there is no such link.
        host: What keys in its host's memory take, the link included; None where nothing is stated.
        limits: Further limits of kernels, by name.
        emit: Package -> version that a compile for it needs; `nvrtc` is CUDA's compiler, however it
            was installed.
        runtime: Package -> version an artifact for it needs.
        sources: Figure, or group of figures -> where it was stated.
    """

    name: str
    title: str
    kind: str
    isa: str
    dtypes: tuple[str, ...]
    features: tuple[str, ...] = ()
    cores: int | None = None
    bandwidth: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    layer_kernels: tuple[str, ...] = ()
    memories: tuple[Memory, ...] = ()
    matrix_units: tuple[MatrixUnit, ...] = ()
    experts: dict[str, Any] | None = None
    quantised: dict[str, Any] | None = None
    decode: DecodeFigures | None = None
    reductions: dict[str, Any] | None = None
    host_link: float | None = None
    host: HostFigures | None = None
    limits: dict[str, int] = field(default_factory=dict)
    emit: dict[str, str] = field(default_factory=dict)
    runtime: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_file(cls, file: TargetFile) -> Target:
        """Return the target that a file describes."""
        return cls(
            name=file.name,
            title=file.title,
            kind=file.kind,
            isa=file.isa,
            dtypes=tuple(file.dtypes),
            features=tuple(file.features),
            cores=file.cores,
            bandwidth=file.bandwidth,
            flops={str(dtype): rate for dtype, rate in file.flops.items()},
            kernels=tuple(file.kernels),
            layer_kernels=tuple(file.layer_kernels),
            memories=tuple(Memory(m.name, m.bytes, m.per) for m in file.memory),
            matrix_units=tuple(
                MatrixUnit(u.m, u.n, u.k, u.input, tuple(u.accumulate)) for u in file.matrix_unit
            ),
            experts=None if file.experts is None else file.experts.model_dump(),
            quantised=None if file.quantised is None else file.quantised.model_dump(),
            decode=None if file.decode is None else DecodeFigures(**file.decode.model_dump()),
            reductions=None if file.reductions is None else file.reductions.model_dump(),
            host_link=None if file.host is None else file.host.link,
            host=_host_figures(file),
            limits=file.limits,
            emit=file.emit,
            runtime=file.runtime,
            sources=file.sources,
        )

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The major and minor number behind `sm_`; None where it is no GPU."""
        return divmod(int(self.isa.removeprefix("sm_")), 10) if self.kind == "gpu" else None

    def limit(self, name: str) -> int:
        """Return a limit that a planner needs.

        Raises:
            UsageError: The target's file does not state it.
        """
        if name not in self.limits:
            raise self._unstated(f"limits.{name}", name, self.limits)
        return self.limits[name]

    def memory_bytes(self, name: str) -> int:
        """Return the size of a memory that a planner needs.

        Raises:
            UsageError: The target's file does not state it.
        """
        sizes = {memory.name: memory.bytes for memory in self.memories}
        size = sizes.get(name)
        if size is None:
            known = [other for other, bytes_ in sizes.items() if bytes_ is not None]
            raise self._unstated(f"bytes of a memory called {name!r}", name, known)
        return size

    def _unstated(self, what: str, name: str, stated: Iterable[str]) -> UsageError:
        near = difflib.get_close_matches(name, list(stated), n=1)
        hint = f" It has {near[0]!r}: is that the one?" if near else ""
        return UsageError(
            f"{self.name}.toml states no {what}, and its kernels are planned by that.",
            f"Add it, with its source.{hint}",
        )

    def tuned(self, kernel: str) -> list[MeasuredTiles]:
        """Return the measured tiles of a kernel family, in the table's order."""
        return [row for row in _tuned(self.name) if row.kernel == kernel]


def _host_figures(file: TargetFile) -> HostFigures | None:
    """Return the figures of a file's host, where it states more than its link."""
    stated = {} if file.host is None else file.host.model_dump(exclude_none=True)
    return HostFigures(**stated) if len(stated) > 1 else None


@cache
def _tuned(target: str) -> tuple[MeasuredTiles, ...]:
    """Read the table that `tools/bench_attention.py --tune` writes; no rows where there is none."""
    table = resources.files(__name__) / f"{target}.tuned.json"
    if not table.is_file():
        return ()
    data = json.loads(table.read_text(encoding="utf-8"))
    return tuple(
        MeasuredTiles(row["kernel"], row["attention"], row["tiles"], data["device"], data["date"])
        for row in data["rows"]
    )


_REGISTERED: dict[str, Target] = {}


def register_target(text: str) -> Target:
    """Make the target that a TOML text describes known under its name, in this process.

    Raises:
        UsageError: The text is not that of a target; see `graphopt.targets.schema`.
        ValueError: The name is taken.
    """
    target = Target.from_file(parse_target_file(text, "The target's text"))
    if target.name in all_targets():
        raise ValueError(f"target {target.name!r} is there already")
    _REGISTERED[target.name] = target
    return target


@cache
def _own_files() -> dict[str, Target | UsageError]:
    """Read the files that lie beside this module: what each describes, or why it is no target."""
    entries = sorted(resources.files(__name__).iterdir(), key=lambda entry: entry.name)
    return {
        entry.name.removesuffix(".toml"): _own_target(entry)
        for entry in entries
        if entry.name.endswith(".toml")
    }


def _own_target(entry: Traversable) -> Target | UsageError:
    where = f"targets/{entry.name}"
    try:
        file = parse_target_file(entry.read_text(encoding="utf-8"), where)
    except UsageError as error:
        return error
    except OSError as error:
        # Of a file that was renamed or removed, an editable install keeps a link.
        return UsageError(f"{where} cannot be read: {error.strerror}.", "Install graphopt again.")
    except UnicodeDecodeError as error:
        return UsageError(f"{where} is not UTF-8 text: {error.reason}.", "Convert it to UTF-8.")
    if f"{file.name}.toml" != entry.name:
        return UsageError(
            f"{where}: the entry 'name' is {file.name!r}, and it should be as the file is called.",
            "Rename one of the two.",
        )
    return Target.from_file(file)


def all_targets() -> dict[str, Target]:
    """Return every target by name, the CPU first; `broken_targets` has the files that are none."""
    own = [target for target in _own_files().values() if isinstance(target, Target)]
    targets = [*own, *_REGISTERED.values()]
    targets.sort(key=lambda target: (target.kind != "cpu", target.name))
    return {target.name: target for target in targets}


def broken_targets() -> dict[str, UsageError]:
    """Return why files beside this module describe no target, by their name without `.toml`."""
    return {name: file for name, file in _own_files().items() if isinstance(file, UsageError)}


def _unknown_target(name: str, targets: Iterable[Target]) -> UsageError:
    """Return the refusal of a name, which may be that of a card, such as A100, or of a kind."""
    word = name.lower()
    near = [t.name for t in targets if len(word) > 2 and word in re.split(r"\W+", t.title.lower())]
    if word in ("gpu", "cuda"):
        near = [target.name for target in targets if target.kind == "gpu"]
    if near:
        meant = " or ".join(near)
        remedy = f"A target is called by its architecture: {meant}. See `graphopt targets`."
        return UsageError(f"Unknown target {name!r}.", remedy)
    return unknown_name("target", name, [target.name for target in targets])


def newest_gpu(*stated: str) -> Target:
    """Return the GPU of the highest compute capability whose file has some figures.

    It stands for a GPU where none is named.

    Args:
        stated: Attributes of `Target` that it has to have, beside `decode`.
    """
    known = [
        target
        for target in all_targets().values()
        if all(getattr(target, name) for name in ("decode", *stated))
    ]
    return max(known, key=lambda target: target.compute_capability or (0, 0))


def get_target(name: str) -> Target:
    """Return the target called `name`.

    Raises:
        UsageError: There is none, and the message has the nearest name; or its file is broken,
            and the message has the reason.
    """
    targets, broken = all_targets(), broken_targets()
    if name in broken and name not in targets:
        raise broken[name]
    if name not in targets:
        raise _unknown_target(name, targets.values())
    return targets[name]
