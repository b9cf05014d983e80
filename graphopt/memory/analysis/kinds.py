"""What blocks hold: shares of memory by category, and the published rule by data flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from graphopt.memory.trace import CATEGORIES, READ, WRITE, Category, Trace

Kind = Literal["input", "parameter", "intermediate", "end", "untouched"]
KINDS: tuple[Kind, ...] = get_args(Kind)

OF_CATEGORY: Mapping[Category, Kind] = {
    "input": "input",
    "weight": "parameter",
    "optimizer": "parameter",
    "kv": "parameter",
    "activation": "intermediate",
    "gradient": "intermediate",
    "workspace": "intermediate",
}
"""The kind by data flow that one expects of a category."""


def data_flow_kinds(trace: Trace) -> npt.NDArray[np.uint8]:
    """Return the kind of each instance by what is done with it, uint8 [instances] into `KINDS`.

    The rule of Li et al. (ISPASS 2021): what is read first is an input, and a parameter if it is
    written later; what is written first is an end, and an intermediate if it is read later. A
    weight that is never updated in the trace is an input by this rule.
    """
    count, events = len(trace.instances), len(trace)

    def extremes(kind: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        places = np.flatnonzero(trace.kind == kind)
        first, last = np.full(count, events), np.full(count, -1)
        np.minimum.at(first, trace.instance[places], places)
        np.maximum.at(last, trace.instance[places], places)
        return first, last

    first_read, last_read = extremes(READ)
    first_write, last_write = extremes(WRITE)
    # An operation that updates in place reads before it writes.
    read_first = first_read < first_write
    written_first = first_write < first_read
    found = np.full(count, KINDS.index("untouched"), np.uint8)
    found[read_first] = KINDS.index("input")
    found[read_first & (last_write > first_read)] = KINDS.index("parameter")
    found[written_first] = KINDS.index("end")
    found[written_first & (last_read > first_write)] = KINDS.index("intermediate")
    return found


def bytes_by_category(trace: Trace, event: int) -> dict[Category, int]:
    """Return the bytes of each category that are alive after an event."""
    alive = trace.where(
        lambda i: (i.external or i.born <= event) and (i.died is None or i.died > event)
    )
    sizes = np.where(alive, trace.sizes, 0)
    named = np.array([i.category for i in trace.instances], object)
    found = {category: int(sizes[named == category].sum()) for category in CATEGORIES}
    return {category: size for category, size in found.items() if size}


def bytes_by_kind(trace: Trace, event: int) -> dict[Kind, int]:
    """Return the bytes of each kind by data flow that are alive after an event."""
    alive = trace.where(
        lambda i: (i.external or i.born <= event) and (i.died is None or i.died > event)
    )
    sums = np.bincount(data_flow_kinds(trace), np.where(alive, trace.sizes, 0), len(KINDS))
    return {kind: int(size) for kind, size in zip(KINDS, sums, strict=True) if size}


def disagreements(trace: Trace) -> dict[tuple[Category, Kind], int]:
    """Return how many instances have a kind by data flow that their category does not expect.

    Those that are not touched, and those of the category "other", are left out; so is an "end"
    that is expected to be read behind the trace's end.
    """
    found: dict[tuple[Category, Kind], int] = {}
    for instance, number in zip(trace.instances, data_flow_kinds(trace), strict=True):
        kind = KINDS[number]
        expected = OF_CATEGORY.get(instance.category)
        if expected is None or kind in (expected, "untouched", "end"):
            continue
        found[instance.category, kind] = found.get((instance.category, kind), 0) + 1
    return found
