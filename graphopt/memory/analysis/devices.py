"""The part of a trace that is on one device: what fills a GPU is no host memory."""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt.memory.trace import Trace
from graphopt.support.quantities import format_bytes


def of_device(trace: Trace, device: str) -> Trace:
    """Return the blocks of one device and their events; a note says what is left out.

    Args:
        device: Such as "cuda:0"; "cuda" means all GPUs.
    """
    kept = trace.where(lambda i: i.device == device or i.device.split(":")[0] == device)
    if kept.all():
        return trace
    number = np.cumsum(kept) - 1
    event = kept[trace.instance]
    place = np.cumsum(event) - 1
    instances = [
        dataclasses.replace(
            instance,
            index=int(number[instance.index]),
            born=0 if instance.external else int(place[instance.born]),
            died=None if instance.died is None else int(place[instance.died]),
        )
        for instance in trace.instances
        if kept[instance.index]
    ]
    # The number of kept events in front of each mark.
    before = np.concatenate([[0], np.cumsum(event)])
    left = format_bytes(int(trace.sizes[~kept].sum()))
    note = f"{int((~kept).sum()):,} blocks ({left}) that are not on {device} are left out."
    return dataclasses.replace(
        trace,
        instances=instances,
        kind=trace.kind[event],
        instance=number[trace.instance[event]].astype(np.int32),
        op=trace.op[event],
        call=trace.call[event],
        time_ns=trace.time_ns[event],
        notes=[*trace.notes, note],
        iteration_marks=[int(before[mark]) for mark in trace.iteration_marks],
    )
