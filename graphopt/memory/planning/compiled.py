"""The exact search in C, compiled for this machine when it is first needed.

It is C and not Python, since ten million states are looked at in ten seconds. It is plain C for
the system's compiler, which Triton needs as well, rather than numba, which would add 200 MB to the
installation for this one function. Where there is no compiler, plans are greedy ones, and say so.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from importlib.resources import files
from typing import Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.memory.planning.problem import Int64, Problem
from graphopt.memory.planning.sections import sections_of
from graphopt.support.native_library import NoLibrary, native_library

SOURCES = ("search_state.c", "search.c")
OPTIONS = ("-std=c11", "-O2", "-fPIC", "-shared")
MAX_THREADS = 8
MAX_TABLE_BYTES = 2**30
"""Of the bits that say which block lives in which section, for each thread."""
STACK_BYTES, STACK_BYTES_PER_BLOCK = 2**24, 2**11
"""Of a thread: the search is as deep as there are blocks, by two frames of some 200 bytes."""


class NoSearch(GraphoptError):
    """The exact search cannot run here, or not on this problem."""


class Found(IntEnum):
    """How a search ended; the values are those of the C function."""

    OFFSETS = 1
    INFEASIBLE = 0
    UNDECIDED = -1
    NO_MEMORY = -2


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        found: How it ended; INFEASIBLE is a proof by exhaustion.
        offsets: int64 [blocks], where it found some.
        nodes: Decisions looked at, by all threads.
    """

    found: Found
    offsets: Int64 | None
    nodes: int


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the compiled search, or the reason why there is none."""
    folder = files("graphopt.memory.planning")
    texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in SOURCES]
    try:
        library = native_library({"search.c": "".join(texts)}, "search.c", OPTIONS, "c")
    except NoLibrary as problem:
        return str(problem)
    search = library.graphopt_search
    i32s, i64s = (np.ctypeslib.ndpointer(t, flags="C") for t in (np.int32, np.int64))
    search.restype = ctypes.c_int
    search.argtypes = [
        ctypes.c_int, ctypes.c_int, i32s, i32s, i64s, i32s, ctypes.c_int64, ctypes.c_uint64,
        ctypes.c_double, ctypes.POINTER(ctypes.c_int), i64s, i64s,
    ]  # fmt: skip
    return library


def threads_here() -> int:
    """Return how many searches run side by side: the cores that this process may use, to 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def search(
    problem: Problem, capacity: int, seconds: float, *, threads: int | None = None, seed: int = 0
) -> Searched:
    """Search for offsets of blocks that all take room, with ends no higher than `capacity`.

    Threads search the same problem in different orders, and the first that ends ends all.

    Args:
        seconds: After which the search gives up.
        threads: By default those of `threads_here`.

    Raises:
        NoSearch: No C compiler works here, or the problem is too large.
    """
    library = _library()
    if isinstance(library, str):
        raise NoSearch(f"The exact search cannot run: {library}.", "Install one, or name it in CC.")
    sections = sections_of(problem)
    if len(problem) * sections.total // 8 > MAX_TABLE_BYTES:
        raise NoSearch(
            f"The exact search cannot run: {len(problem)} blocks in {sections.total} sections of "
            "time are too many.",
        )
    unit = int(np.gcd.reduce(problem.padded))
    order = np.argsort(sections.first, kind="stable")
    first, end = sections.first[order], sections.end[order]
    size = problem.padded[order] // unit
    begun = np.searchsorted(first, np.arange(sections.total + 1)).astype(np.int32)
    stop = ctypes.c_int(0)
    ended: list[tuple[Found, Int64]] = []
    nodes: list[int] = []

    def run(number: int) -> None:
        offsets, told = np.zeros(len(order), np.int64), np.zeros(2, np.int64)
        found = Found(
            library.graphopt_search(
                len(order), sections.total, first, end, size, begun, capacity // unit,
                seed * MAX_THREADS + number * 5, seconds, ctypes.byref(stop), offsets, told,
            )
        )  # fmt: skip
        ended.append((found, offsets))
        nodes.append(int(told[0]))
        if found in (Found.OFFSETS, Found.INFEASIBLE):
            stop.value = 1

    stack = STACK_BYTES + STACK_BYTES_PER_BLOCK * len(problem)
    _in_threads(run, threads or threads_here(), stop, -(-stack // 4096) * 4096)
    found, sorted_offsets = max(ended, key=lambda each: each[0] + (each[0] >= 0) * 10)
    offsets: Int64 | None = None
    if found is Found.OFFSETS:
        offsets = np.empty(len(order), np.int64)
        offsets[order] = sorted_offsets * unit
    return Searched(found, offsets, sum(nodes))


def _in_threads(run: Any, count: int, stop: ctypes.c_int, stack_bytes: int) -> None:
    """Run a function in threads, by number; an interruption ends them."""
    before = threading.stack_size(stack_bytes)
    try:
        threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(count)]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(before)
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.002)
    finally:
        stop.value = 1
        for thread in threads:
            thread.join()
