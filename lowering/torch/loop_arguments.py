"""Loop-varying arguments: what differs between the calls of a loop, as its variables."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from graphopt.ir.graph import unique_name
from graphopt.lowering.torch.text import numbers, quoted, series


class LoopArguments:
    """The loop-varying arguments of calls, as variables of the loop.

    Args:
        count: How often the loop runs.
        taken: Names no variable may have.
    """

    def __init__(self, count: int, taken: Collection[str]) -> None:
        self.count = count
        self.taken = taken
        self._variables: dict[str, str] = {}
        self._counted = False

    def add(self, name: str, texts: Sequence[str]) -> str:
        """Return the variable that takes these values, or the value where there is but one."""
        if len(set(texts)) == 1:
            return texts[0]
        return self._variable(name, series(texts))

    def _variable(self, name: str, iterable: str) -> str:
        for known, other in self._variables.items():
            if other == iterable:
                return known
        name = unique_name(name, {*self._variables, *self.taken})
        self._variables[name] = iterable
        return name

    def add_names(self, name: str, names: Sequence[str]) -> str:
        """Return string literals that differ in one number as one literal with a variable."""
        parts = [re.split(r"(\d+)", text) for text in names]
        plain = re.fullmatch(r"[\w.]*", "".join(names), flags=re.ASCII)
        differing: list[int] = []
        if plain and len({len(row) for row in parts}) == 1:
            columns = enumerate(zip(*parts, strict=True))
            differing = [place for place, column in columns if len(set(column)) > 1]
        # Every second part is a number.
        if len(differing) == 1 and differing[0] % 2:
            place = differing[0]
            values = [row[place] for row in parts]
            if all(len(value) < 10 and str(int(value)) == value for value in values):
                index = self._variable("i", numbers([int(value) for value in values]))
                head, tail = "".join(parts[0][:place]), "".join(parts[0][place + 1 :])
                return f'f"{head}{{{index}}}{tail}"'
        return self.add(name, [quoted(text) for text in names])

    def add_place(self, places: Sequence[int]) -> str:
        """Return an index that runs through `places`; it may be computed from a counter `i`."""
        start = places[0]
        step = places[1] - start if self.count > 1 else 0
        if step < 1 or any(place != start + step * n for n, place in enumerate(places)):
            return self.add("place", [str(place) for place in places])
        self._counted = True
        return ("i" if step == 1 else f"{step} * i") + (f" + {start}" if start else "")

    def loop(self) -> str:
        """Return the `for` of a comprehension over the variables."""
        if not self._variables:
            return f"for _ in range({self.count})"
        names, iterables = ", ".join(self._variables), ", ".join(self._variables.values())
        return f"for {names} in " + (f"zip({iterables})" if len(self._variables) > 1 else iterables)

    def over(self, modules: str) -> str:
        """Return the `for` of a loop over `modules`, without the word itself."""
        names = ", ".join(["layer", *self._variables])
        text = (
            f"zip({', '.join([modules, *self._variables.values()])})"
            if self._variables
            else modules
        )
        if not self._counted:
            return f"{names} in {text}"
        names = f"({names})" if self._variables else names
        return f"i, {names} in enumerate({text})"
