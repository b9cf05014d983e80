"""Traces written down by hand, for tests of what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphopt.memory.trace import FREE, MALLOC, READ, WRITE, Category, Clock, Instance, Trace


class EventList:
    """A trace in the making: events are added in order, at times that only grow."""

    def __init__(self, clock: Clock = "cost model") -> None:
        self.clock: Clock = clock
        self.instances: list[Instance] = []
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.ops: list[str] = [""]
        self.time = 0
        self.call = -1
        self.marks: list[int] = []

    def external(self, size: int, category: Category = "weight", dtype: str = "float32") -> int:
        """Add a block that existed before; return its index."""
        index = len(self.instances)
        self.instances.append(
            Instance(index, size, dtype, (size,), "cpu", category, "", 0, None, external=True)
        )
        return index

    def op(
        self,
        name: str,
        reads: Sequence[int] = (),
        sizes: Sequence[int] = (),
        writes: Sequence[int] = (),
        takes: int = 10,
        category: Category = "activation",
    ) -> list[int]:
        """Add a call that reads blocks, makes others of the given sizes and writes to some."""
        if name not in self.ops:
            self.ops.append(name)
        self.call += 1
        op = self.ops.index(name)
        for index in reads:
            self._event(READ, index, op)
        made = []
        for size in sizes:
            index = len(self.instances)
            self.instances.append(
                Instance(
                    index, size, "float32", (size,), "cpu", category, name, len(self.rows), None
                )
            )
            self._event(MALLOC, index, op)
            made.append(index)
        for index in (*made, *writes):
            self._event(WRITE, index, op)
        self.time += takes
        return made

    def free(self, *indices: int) -> None:
        """Add releases."""
        for index in indices:
            self.instances[index] = replace(self.instances[index], died=len(self.rows))
            self._event(FREE, index, self.rows[-1][2] if self.rows else 0)

    def wait(self, time: int) -> None:
        """Let time pass."""
        self.time += time

    def mark(self) -> None:
        """Begin an iteration."""
        self.marks.append(len(self.rows))

    def _event(self, kind: int, index: int, op: int) -> None:
        self.rows.append((kind, index, op, self.call, self.time))

    def trace(self) -> Trace:
        """Return what was added, checked."""
        kind, instance, op, call, time = np.array(self.rows, np.int64).reshape(-1, 5).T
        trace = Trace(
            self.instances, kind.astype(np.uint8), instance.astype(np.int32), op.astype(np.int32),
            call.astype(np.int32), time, self.clock, self.ops, iteration_marks=self.marks,
        )  # fmt: skip
        trace.check()
        return trace


def training(
    iterations: int, layers: int = 3, *, warm_up: int = 0, marks: bool = True, size: int = 1000
) -> Trace:
    """Return a trace of training steps: forward, backward and an update in place.

    Args:
        warm_up: Operations before the first step, of which no two are alike.
    """
    events = EventList()
    weights = [events.external(size * (n + 1)) for n in range(layers)]
    for n in range(warm_up):
        (scratch,) = events.op(f"setup{n}", sizes=[n + 1])
        events.free(scratch)
    for _ in range(iterations):
        if marks:
            events.mark()
        (x,) = events.op("load", sizes=[size], category="input")
        kept = [x]
        for weight in weights:
            kept += events.op("mm", [kept[-1], weight], [size])
        (grad,) = events.op("loss", [kept[-1]], [8])
        for weight, kept_x in zip(reversed(weights), reversed(kept[:-1]), strict=True):
            (next_grad,) = events.op("mm_backward", [grad, weight, kept_x], [size])
            events.op("sgd", [weight, grad], writes=[weight])
            events.free(grad, kept_x)
            grad = next_grad
        events.free(grad, kept[-1])
    return events.trace()
