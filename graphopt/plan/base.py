"""What a plan is: the sizes of a kernel's tiles, and the inequalities they were found by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.plan.spec import HEAD_SIZES, AttentionSpec
from graphopt.targets import Target

BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Inequality:
    """value <= limit, or the reason why a candidate is none.

    Attributes:
        name: What is counted.
        formula: How `value` comes about, over the plan's tiles and the head sizes D and Dv.
        value, limit: Both in `unit`.
        source: Where the limit stands in the target's file.
    """

    name: str
    formula: str
    value: int
    limit: int
    unit: str
    source: str

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.holds else ">"
        return (
            f"{self.name}: {self.formula} = {self.value:,} {sign} {self.limit:,} {self.unit} "
            f"({self.source})"
        )


@dataclass(frozen=True)
class AttentionPlan:
    """How one attention runs on one target.

    Attributes:
        kernel: Name of the kernel family.
        tiles: Sizes by name, such as `BLOCK_M`; kernels take them as constants.
        inequalities: All that the tiles were checked against.
        choice: Why these tiles among those that fit.
        passed_over: Kernels that the target would rather have had, with the reason against each.
    """

    spec: AttentionSpec
    target: str
    kernel: str
    tiles: dict[str, int]
    inequalities: tuple[Inequality, ...]
    choice: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """Return the plan as text, for people and for the head of an emitted source."""
        return [
            f"attention  {self.spec.describe()}",
            f"target     {self.target}",
            f"kernel     {self.kernel}",
            "tiles      " + ", ".join(f"{name}={size}" for name, size in self.tiles.items()),
            f"choice     {self.choice}",
            *(f"limit      {inequality}" for inequality in self.inequalities),
            *(f"not taken  {kernel}: {reason}" for kernel, reason in self.passed_over),
        ]


class Planner(ABC):
    """Finds the tiles of one kernel family."""

    kernel: ClassVar[str]
    reads_codes: ClassVar[bool] = False
    """Whether the kernels read caches of 4 and 8 bits."""

    def refuses(self, spec: AttentionSpec, target: Target) -> str | None:
        """Return why this kernel cannot do the attention on the target; None where it can."""
        if spec.dtype not in target.dtypes:
            return f"{target.title} has no {spec.dtype} (it has {', '.join(target.dtypes)})"
        if spec.dtype == "f32":
            return "its matrix units take 16-bit operands: convert the model to f16 or bf16"
        if not any(unit.input == spec.dtype for unit in target.matrix_units):
            return f"no matrix unit of {target.title} takes {spec.dtype}"
        low, high = HEAD_SIZES
        for name, size in (("head_dim", spec.head_dim), ("value_dim", spec.values)):
            if not low <= size <= high or size % 8:
                return f"{name} is {size}: only multiples of 8 from {low} to {high} are lowered"
        if spec.kv_bits != 16 and not self.reads_codes:
            return f"a cache of {spec.kv_bits} bits is not read by it, only one of 16"
        return self.limits(spec, target)

    def limits(self, spec: AttentionSpec, target: Target) -> str | None:
        """Return what this family in particular cannot do."""
        return None

    @abstractmethod
    def candidates(self, spec: AttentionSpec, target: Target) -> Sequence[dict[str, int]]:
        """Return sets of tiles, the best first."""

    @abstractmethod
    def inequalities(
        self, spec: AttentionSpec, target: Target, tiles: dict[str, int]
    ) -> list[Inequality]:
        """Return what the tiles have to satisfy."""

    def choose(
        self, spec: AttentionSpec, target: Target
    ) -> tuple[dict[str, int], list[Inequality], str] | str:
        """Return tiles, inequalities and why these; or why no tiles fit."""
        nearest: list[Inequality] = []
        for tuned, tiles in self._ordered(spec, target):
            found = self.inequalities(spec, target, tiles)
            broken = [inequality for inequality in found if not inequality.holds]
            if not broken:
                return tiles, found, tuned
            if not nearest or len(broken) < len(nearest):
                nearest = broken
        return "no tiles fit: " + "; ".join(map(str, nearest))

    def _ordered(self, spec: AttentionSpec, target: Target) -> list[tuple[str, dict[str, int]]]:
        ordered = [
            (f"measured on {row.device}, {row.date}", dict(row.tiles))
            for row in target.tuned(self.kernel)
            if row.fits(spec)
        ]
        return ordered + [("by the model", tiles) for tiles in self.candidates(spec, target)]


def form_constants(spec: AttentionSpec, *, ring: int = 0) -> dict[str, int | float | bool]:
    """Return what every kernel takes of a description as constants, by the names kernels share.

    Args:
        ring: Slots of the ring, where the cache is one and the description leaves them open.
    """
    return {
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.values,
        "GROUP": spec.group,
        "CAUSAL": spec.causal,
        "TOP_LEFT": spec.align == "top-left",
        "WINDOW": spec.window or 0,
        "CHUNK": spec.chunk or 0,
        "SOFTCAP": float(spec.softcap or 0.0),
        "PADDING_MASK": spec.padding_mask,
        "BIAS": spec.bias,
        "ALIBI": spec.alibi,
        "SINKS": spec.sinks,
        "VARLEN": spec.varlen,
        "KV_LENS": spec.kv_lens,
        "RING": ring or spec.slots or 0,
        "PAGE": spec.page or 0,
        "SELECTED": spec.selected_blocks,
        "LSE": spec.lse,
        "PAGE_MAX": spec.page_max,
        "KV_BITS": spec.kv_bits,
    }


def power_above(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def split_size(size: int) -> tuple[int, int]:
    """Return a head size as a power of two and the power of two that holds the rest, or 0.

    Kernels of power-of-two tiles then waste less: 80 is 64 + 16 rather than 128.
    """
    first = 1 << (size.bit_length() - 1)
    rest = size - first
    return first, 0 if rest == 0 else max(16, power_above(rest))
