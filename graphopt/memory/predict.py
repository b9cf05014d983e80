"""How much memory a step will take on a GPU, known before anything runs there.

The step is run on tensors without values that stand for those of the GPU (`StandIn`), and recorded;
what it allocated and released is then served by a model of torch's caching allocator. Libraries'
workspaces that stay allocated are added where their first user runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from graphopt.memory.caching_allocator import Block, CachingAllocator, OutOfMemory
from graphopt.memory.operators import words
from graphopt.memory.stand_in import StandIn
from graphopt.memory.trace import FREE, MALLOC, READ, WRITE, Category, Trace
from graphopt.memory.workload import Workload
from graphopt.memory.workspaces import kernel_workspace, unknown_workspaces

HOPPER = (9, 0)
"""The compute capability of H100 and H200."""

_PRODUCTS = words("mm addmm bmm baddbmm mv addmv dot vdot linear _addmm_activation _scaled_mm")


@dataclass(frozen=True)
class Prediction:
    """What a step will take of a GPU's memory, in bytes.

    Attributes:
        allocated: What `torch.cuda.max_memory_allocated` will say.
        reserved: What `torch.cuda.max_memory_reserved` will say: the GPU must have so much.
        live: The bytes that tensors and workspaces ask for at the peak, without rounding.
        categories: The same by what they hold, without `libraries`.
        libraries: Workspaces that libraries keep, by name; the sums above have them.
        short_of: The request that did not fit the limit; None where all did.
        trace: What happened.
        notes: What is not known, a sentence each.
    """

    allocated: int
    reserved: int
    live: int
    categories: dict[Category, int]
    libraries: dict[str, int]
    short_of: OutOfMemory | None
    trace: Trace = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether all requests fit the limit."""
        return self.short_of is None


def cublas_workspace(capability: tuple[int, int]) -> int:
    """Return the bytes that torch gives cuBLAS for each thread and stream that uses it.

    See `getChosenWorkspaceSize` in torch's CublasHandlePool.cpp; cuBLASLt uses the same.
    """
    return 32 * 2**20 if capability[0] in (9, 10, 12) else 8 * 2**20 + 128 * 2**10


def predict_peak(
    make: Callable[[torch.device], Workload],
    *,
    steps: int | None = None,
    recorded: int | None = None,
    capability: tuple[int, int] = HOPPER,
    limit: int | None = None,
) -> Prediction:
    """Return what steps of a workload will take on a GPU; nothing is computed, no GPU is needed.

    Args:
        make: Makes the workload on the device that it is given.
        steps: How many steps; by default as many as it takes until everything that stays exists,
            and one more.
        recorded: The number of a step, from 0, that is recorded as a CUDA graph; None for none.
        capability: The GPU's compute capability.
        limit: Bytes that all of torch may reserve there; None for no limit.

    Raises:
        UsageError: A step needs the value of a tensor.
    """
    with StandIn(capability, limit if limit is not None else 2**40) as stand_in:
        workload = make(stand_in.device)
        count = workload.warm_up + 1 if steps is None else steps
        trace = workload.record(count, workspaces=kernel_workspace)
        return replay(
            trace, str(stand_in.device), recorded=recorded, capability=capability, limit=limit
        )


def replay(
    trace: Trace,
    device: str = "cuda:0",
    *,
    recorded: int | None = None,
    capability: tuple[int, int] = HOPPER,
    limit: int | None = None,
) -> Prediction:
    """Return what a trace takes of a GPU's memory, by the rules of torch's allocator.

    Args:
        trace: Of a run on the GPU, or on tensors that stand for its. Where its allocator's history
            is part of it, which has the workspaces of libraries, they are not added again.
        device: What the trace calls the GPU.
        recorded, capability, limit: See `predict_peak`.
    """
    here = trace.where(lambda i: i.device == device)
    allocator = CachingAllocator(limit)
    blocks: dict[int, Block | None] = {}
    libraries: dict[str, int] = {}
    backward = {i.index for i in trace.instances if i.category == "gradient"}
    products = [
        name.split(".")[1 if name.count(".") else 0] in _PRODUCTS for name in trace.op_names
    ]
    shared = added_in_place(trace)
    reused = set(shared.values())
    twice = 0  # bytes that the trace has twice for the moment
    complete = any(i.external and i.category == "workspace" for i in trace.instances)
    live = trace.live_bytes(here)
    most, peak = 0, -1
    short_of: OutOfMemory | None = None
    try:
        for index in np.flatnonzero(here & trace.external):
            blocks[int(index)] = allocator.malloc(trace.instances[index].size)
        begin = end = -1
        if recorded is not None and recorded < len(trace.iteration_marks):
            begin, end = [*trace.iteration_marks, len(trace.kind)][recorded : recorded + 2]
        stream, users = "", set[str]()
        columns = zip(trace.kind.tolist(), trace.instance.tolist(), trace.op.tolist(), strict=True)
        for event, (kind, index, op) in enumerate(columns):
            if event == begin:
                allocator.begin_recording()
                stream, users = ", recorded", set()  # each stream has workspaces of its own
            elif event == end:
                allocator.end_recording()
            if not here[index]:
                continue
            if kind == MALLOC and index in shared:
                blocks[index] = blocks[shared[index]]
                twice = trace.instances[index].size
            elif kind == MALLOC:
                blocks[index] = allocator.malloc(trace.instances[index].size)
            elif kind == FREE and index in reused:
                del blocks[index]
                twice = 0
            elif kind == FREE:
                allocator.free(blocks.pop(index))
            elif kind == WRITE and products[op] and not complete and len(users) < 2:
                # A backward pass has a thread of its own, and a workspace of its own with it.
                where = f"cuBLAS{', backward' * (index in backward)}{stream}"
                if where not in libraries:
                    users.add(where)
                    libraries[where] = cublas_workspace(capability)
                    allocator.malloc(libraries[where])
            if (now := int(live[event]) - twice + sum(libraries.values())) > most:
                most, peak = now, event
    except OutOfMemory as problem:
        short_of = problem
    notes = [*trace.notes, *unknown_workspaces(trace.op_names)]
    return Prediction(
        allocator.peak_allocated,
        allocator.peak_reserved,
        most,
        _categories_at(trace, here, peak),
        libraries,
        short_of,
        trace,
        notes,
    )


def added_in_place(trace: Trace) -> dict[int, int]:
    """Return the sums of gradients that torch would put where their first term is.

    Where a value is used twice, autograd adds the second gradient to the first in place if nobody
    else holds that, but not while something watches operators, as a recorder does
    (`can_accumulate_inplace` in torch's input_buffer.cpp).

    Returns:
        The instance of each sum -> that of its first term, which is let go of behind the sum.
    """
    found: dict[int, int] = {}
    named = [name.startswith("aten.add.Tensor") for name in trace.op_names]
    sums = np.array(named, bool)[trace.op] & (trace.kind == MALLOC)
    for event in np.flatnonzero(sums).tolist():
        kinds = trace.kind[event : event + 4].tolist()
        if kinds != [MALLOC, READ, READ, WRITE]:
            continue
        total, first, second = (trace.instances[i] for i in trace.instance[event : event + 3])
        gradients = {i.category for i in (total, first, second)} == {"gradient"}
        gone = first.died is not None and trace.call[first.died] == trace.call[event]
        if gradients and gone and first.size == total.size and first is not second:
            found[total.index] = first.index
    return found


def _categories_at(trace: Trace, here: np.ndarray, event: int) -> dict[Category, int]:
    """Return the bytes of each category that are alive behind an event."""
    found: dict[Category, int] = {}
    for instance in trace.instances:
        born = -1 if instance.external else instance.born
        if (
            here[instance.index]
            and born <= event
            and (instance.died is None or instance.died > event)
        ):
            found[instance.category] = found.get(instance.category, 0) + instance.size
    return found
