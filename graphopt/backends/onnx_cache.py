"""Caches of ONNX graphs that select pages: buffers with room, changed where they lie."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUMPY_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

_SIZES = re.compile(r"(room_multiple|pages)_of_([1-9]\d{0,6})")


def page_of(size: Any) -> int | None:
    """Return the page of a size that counts pages, such as `pages_of_16`; None for others."""
    found = _SIZES.fullmatch(size) if isinstance(size, str) else None
    return int(found[2]) if found is not None and found[1] == "pages" else None


def room_of(size: Any) -> int | None:
    """Return what divides a number of slots, such as `room_multiple_of_16`; None for others."""
    found = _SIZES.fullmatch(size) if isinstance(size, str) else None
    return int(found[2]) if found is not None and found[1] != "pages" else None


class RoomyCache:
    """Keys, values and what policies remember of some texts, in buffers of one room.

    A buffer is bound as what comes in and as what goes out, so that a step writes new tokens where
    they belong, and copies nothing. Where the room does not suffice, larger buffers are made.

    Args:
        inputs: The graph's inputs for what a step left, by name, each with its `shape` and `type`.
        after: The output that each is given back by.
        batch: How many texts.
        room: Tokens of a text to make room for at first.

    Attributes:
        buffers: By the names of inputs.
    """

    def __init__(
        self, inputs: Mapping[str, Any], after: Mapping[str, str], batch: int, room: int = 0
    ) -> None:
        self._inputs, self._after, self._batch = inputs, after, batch
        sizes = [size for value in inputs.values() for size in value.shape]
        self._page = math.lcm(*(page_of(size) or room_of(size) or 1 for size in sizes))
        self._room = -1
        self.buffers: dict[str, np.ndarray[Any, Any]] = {}
        self._make(room)

    @property
    def room(self) -> int:
        """Slots of each text."""
        return self._room

    def hold(self, tokens: int) -> None:
        """Make sure that there is room for so many tokens of a text."""
        if tokens > self._room:
            # A quarter more each time, so that buffers are seldom copied.
            self._make(tokens if self._room == 0 else max(tokens, self._room * 5 // 4))

    def _make(self, tokens: int) -> None:
        room = -(-tokens // self._page) * self._page
        before, self._room = self.buffers, room
        self.buffers = {}
        for name, value in self._inputs.items():
            shape = [self._size(size) for size in value.shape]
            buffer: np.ndarray[Any, Any] = np.zeros(shape, NUMPY_DTYPES[value.type])
            if name in before:
                buffer[tuple(slice(size) for size in before[name].shape)] = before[name]
            self.buffers[name] = buffer

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        page = page_of(size)
        if page is not None:
            return self._room // page
        return self._batch if room_of(size) is None else self._room

    def run(
        self, session: Any, given: Mapping[str, np.ndarray[Any, Any]], wanted: Sequence[str]
    ) -> list[np.ndarray[Any, Any]]:
        """Run a step, which changes the cache, and return some other outputs of the graph."""
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in wanted:
            binding.bind_output(name)
        for name, buffer in self.buffers.items():
            place = "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data
            binding.bind_input(name, *place)
            binding.bind_output(self._after[name], *place)
        session.run_with_iobinding(binding)
        return [made.numpy() for made in binding.get_outputs()[: len(wanted)]]
