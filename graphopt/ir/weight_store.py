"""The weights of a program, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from graphopt.ir.weights import Weight


@dataclass
class WeightStore:
    """The weights of a program by name, in a stable order."""

    _weights: dict[str, Weight] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<WeightStore: {len(self)} weights, {sum(w.nbytes for w in self):,} bytes>"

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[Weight]:
        return iter(self._weights.values())

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, weight: Weight) -> Weight:
        """Add `weight`.

        Raises:
            KeyError: The name is taken.
        """
        if weight.name in self._weights:
            raise KeyError(f"weight {weight.name!r} exists already")
        self._weights[weight.name] = weight
        return weight

    def replace(self, weight: Weight) -> None:
        """Put `weight` in the place of the one with its name."""
        if weight.name not in self._weights:
            raise KeyError(f"no weight {weight.name!r}")
        self._weights[weight.name] = weight

    def remove(self, name: str) -> None:
        del self._weights[name]

    def tensors(self) -> list[Weight]:
        """Return the dense tensors that hold all of them, in their order; see `Weight.tensors`."""
        return [tensor for weight in self for tensor in weight.tensors()]

    def copy(self) -> WeightStore:
        return WeightStore(dict(self._weights))
