"""Targets: what a machine can do, as data. One TOML file each, beside this module.

Planners read sizes from here and from nowhere else. Every figure has its source in the file.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from graphopt.errors import unknown_name


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
class MeasuredTiles:
    """Tiles of a kernel that were measured to be the fastest.

    Attributes:
        kernel: Name of the kernel family.
        form: Fields of the attention that the measurement was made for, and their values.
        tiles: The fastest.
        device, date: Where and when.
    """

    kernel: str
    form: dict[str, Any]
    tiles: dict[str, int]
    device: str
    date: str

    def fits(self, spec: object) -> bool:
        """Return whether a description agrees in every field that the form names."""
        return all(getattr(spec, name) == value for name, value in self.form.items())


@dataclass(frozen=True)
class Target:
    """A machine to emit for.

    Attributes:
        name: What the command line calls it.
        title: What it is called in full.
        kind: `cpu`, `gpu` or `npu`.
        isa: Instruction set, such as `sm_70`.
        dtypes: Element types kernels may compute in, as IR dtype names.
        cores: Number of cores (streaming multiprocessors, cube cores); None where it varies.
        bandwidth: Bytes a second of the device memory; None where it varies.
        kernels: Families of attention kernels it has, the best first.
        layer_kernels: Families of kernels for the rest of a layer: norms, rotary positions, gates
            and cache writes.
        memories: On-chip and device memories.
        matrix_units: What its matrix instructions multiply.
        experts: Tiles of the experts' kernels: `many` and `few`, as the file has them; None where
            there are none, and experts run in plain torch.
        limits: Further limits of kernels, by name.
        runtime: Package -> version an artifact for it needs.
        sources: Figure, or group of figures -> where it was stated.
    """

    name: str
    title: str
    kind: str
    isa: str
    dtypes: tuple[str, ...]
    cores: int | None = None
    bandwidth: float | None = None
    kernels: tuple[str, ...] = ()
    layer_kernels: tuple[str, ...] = ()
    memories: tuple[Memory, ...] = ()
    matrix_units: tuple[MatrixUnit, ...] = ()
    experts: dict[str, Any] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    runtime: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, data: dict[str, Any]) -> Target:
        """Return the target a TOML file describes."""
        values = dict(data)
        values["dtypes"] = tuple(values["dtypes"])
        for name in ("kernels", "layer_kernels"):
            values[name] = tuple(values.get(name, ()))
        values["memories"] = tuple(
            Memory(m["name"], m.get("bytes"), m["per"]) for m in values.pop("memory", [])
        )
        values["matrix_units"] = tuple(
            MatrixUnit(u["m"], u["n"], u["k"], u["input"], tuple(u["accumulate"]))
            for u in values.pop("matrix_unit", [])
        )
        return cls(**values)

    def tuned(self, kernel: str) -> list[MeasuredTiles]:
        """Return the measured tiles of a kernel family, in the table's order."""
        return [row for row in _tuned(self.name) if row.kernel == kernel]


@cache
def _tuned(target: str) -> tuple[MeasuredTiles, ...]:
    """Read the table that `tools/tune_attention.py` writes; a target without one has no rows."""
    table = resources.files(__name__) / f"{target}.tuned.json"
    if not table.is_file():
        return ()
    data = json.loads(table.read_text(encoding="utf-8"))
    return tuple(
        MeasuredTiles(row["kernel"], row["form"], row["tiles"], data["device"], data["date"])
        for row in data["rows"]
    )


_REGISTERED: dict[str, Target] = {}


def register_target(text: str) -> Target:
    """Make the target that a TOML text describes known under its name, in this process.

    Raises:
        ValueError: The name is taken.
    """
    target = Target.from_toml(tomllib.loads(text))
    if target.name in all_targets():
        raise ValueError(f"target {target.name!r} is there already")
    _REGISTERED[target.name] = target
    return target


@cache
def _own_targets() -> tuple[Target, ...]:
    """Read the files that lie beside this module."""
    return tuple(
        Target.from_toml(tomllib.loads(entry.read_text(encoding="utf-8")))
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".toml")
    )


def all_targets() -> dict[str, Target]:
    """Return every target by name, the CPU first."""
    targets = [*_own_targets(), *_REGISTERED.values()]
    targets.sort(key=lambda target: (target.kind != "cpu", target.name))
    return {target.name: target for target in targets}


def get_target(name: str) -> Target:
    """Return the target called `name`.

    Raises:
        UsageError: There is none; the message has the nearest name.
    """
    targets = all_targets()
    if name not in targets:
        raise unknown_name("target", name, targets)
    return targets[name]
