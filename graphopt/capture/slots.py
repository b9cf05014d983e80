"""Weight slots made of others: a transpose or some rows of a checkpoint tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from graphopt.capture.rewriting import Raiser
from graphopt.ir.cuts import rows_of, transposed
from graphopt.ir.graph import Value
from graphopt.ir.weights import Producer

Index = slice | tuple[int, ...]
Step = Callable[[Producer], Producer]


@dataclass
class SlotSources:
    """How the derived slots of a function follow from the slots of the checkpoint.

    Attributes:
        derived: New slot -> (checkpoint slot it is made of, the steps from there).
    """

    derived: dict[str, tuple[str, tuple[Step, ...]]] = field(default_factory=dict)
    _made: dict[tuple[str, object], Value] = field(default_factory=dict)

    def transposed(self, raiser: Raiser, weight: Value) -> Value:
        """Return the slot of `weight` [in, out] as [out, in]."""
        shape = tuple(int(size) for size in raiser.types[weight].shape)[::-1]
        return self._derive(raiser, weight, "transposed", "t", transposed, shape)

    def rows(self, raiser: Raiser, weight: Value, index: Index) -> Value:
        """Return the slot of some rows of `weight`."""
        first, *rest = (int(size) for size in raiser.types[weight].shape)
        count = len(range(*index.indices(first))) if isinstance(index, slice) else len(index)
        slot = raiser.slot(weight)
        part = sum(1 for made, key in self._made if made == slot and key != "transposed")
        return self._derive(
            raiser, weight, str(index), str(part), lambda p: rows_of(p, index), (count, *rest)
        )

    def _derive(
        self,
        raiser: Raiser,
        weight: Value,
        key: object,
        suffix: str,
        step: Step,
        shape: tuple[int, ...],
    ) -> Value:
        slot = raiser.slot(weight)
        assert slot is not None
        if (slot, key) in self._made:
            return self._made[slot, key]
        stem, dot, leaf = slot.rpartition(".")
        name = f"{stem}{dot}{suffix}.{leaf}"
        value = raiser.add_weight(name, shape, raiser.types[weight].dtype)
        origin, steps = self.derived.get(slot, (slot, ()))
        self.derived[name] = (origin, (*steps, step))
        self._made[slot, key] = value
        return value

    def producer(self, slot: str, base: Callable[[str], Producer]) -> Producer:
        """Return the producer of a slot, given those of the checkpoint's slots."""
        origin, steps = self.derived.get(slot, (slot, ()))
        producer = base(origin)
        for step in steps:
            producer = step(producer)
        return producer

    def origin(self, slot: str) -> str:
        """Return the checkpoint slot a slot is made of."""
        return self.derived[slot][0] if slot in self.derived else slot

    def rename(self, old: str, new: str) -> None:
        """Follow a slot that got another name."""
        if old in self.derived:
            self.derived[new] = self.derived.pop(old)
