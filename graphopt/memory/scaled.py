"""Traces of sizes that were not run, from those of a few small sizes that were."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from graphopt.memory.trace import Trace


@dataclass(frozen=True, eq=False)
class ScaledTrace:
    """A trace whose storage instances have sizes that are polynomials of the workload's size.

    A step does the same at every size, with tensors that grow with the batch linearly and with the
    length of texts at most as its square. Whether that holds is seen by a trace of another size.

    Attributes:
        trace: Of the first size.
        first: That size.
        differences: int64 [points, instances]: bytes at the first size, and their forward
            differences up to the polynomial's degree.
    """

    trace: Trace
    first: int
    differences: npt.NDArray[np.int64]

    @classmethod
    def of(cls, traces: list[Trace], first: int) -> ScaledTrace | None:
        """Return what traces of neighbouring sizes say of others; None if a step does not do the
        same at each of them.

        Args:
            traces: Of the sizes from `first` on, one more than the polynomial's degree.
        """
        if not all(_do_the_same(traces[0], other) for other in traces[1:]):
            return None
        differences = [sizes := np.array([_bytes(trace) for trace in traces])]
        while len(sizes) > 1:
            differences.append(sizes := np.diff(sizes, axis=0))
        return cls(traces[0], first, np.array([rows[0] for rows in differences]))

    def at(self, size: int) -> Trace:
        """Return the trace of a size, not less than the first one."""
        sizes, weight = np.zeros(self.differences.shape[1], np.int64), 1
        for order, difference in enumerate(self.differences):
            sizes += weight * difference
            # Newton's forward differences: binomials of how far it is from the first size.
            weight = weight * (size - self.first - order) // (order + 1)
        instances = [
            instance if instance.size == known else replace(instance, size=known)
            for instance, known in zip(self.trace.instances, sizes.tolist(), strict=True)
        ]
        return replace(self.trace, instances=instances)

    def agrees(self, size: int, trace: Trace) -> bool:
        """Return whether the trace of a size is what it was taken for."""
        return _do_the_same(self.trace, trace) and bool(
            np.array_equal(_bytes(self.at(size)), _bytes(trace))
        )


def _bytes(trace: Trace) -> npt.NDArray[np.int64]:
    return np.array([instance.size for instance in trace.instances], np.int64)


def _do_the_same(one: Trace, other: Trace) -> bool:
    """Return whether two traces differ in nothing but sizes."""
    columns = ("kind", "instance", "op", "call")
    return (
        one.op_names == other.op_names
        and (one.notes, one.complete) == (other.notes, other.complete)
        and one.iteration_marks == other.iteration_marks
        and all(np.array_equal(getattr(one, c), getattr(other, c)) for c in columns)
        and all(
            (a.device, a.category, a.born, a.died, a.external)
            == (b.device, b.category, b.born, b.died, b.external)
            for a, b in zip(one.instances, other.instances, strict=True)
        )
    )
