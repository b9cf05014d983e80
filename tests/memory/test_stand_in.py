"""The part of a trace that is on one device."""

from __future__ import annotations

import dataclasses

from event_lists import training

from graphopt.memory.analysis.devices import of_device


def test_blocks_of_other_devices_and_their_events_are_left_out():
    trace = training(3, 2)
    instances = [
        dataclasses.replace(i, device="cpu" if i.category == "input" else "cuda:1")
        for i in trace.instances
    ]
    mixed = dataclasses.replace(trace, instances=instances)
    for name in ("cuda", "cuda:1"):
        part = of_device(mixed, name)
        part.check()
        assert len(part.instances) == len(instances) - 3
        on = mixed.where(lambda i: i.device == "cuda:1")
        assert part.peak().bytes == mixed.peak(on).bytes
        assert [part.describe(n).split(" ", 2)[2] for n in range(len(part))] == [
            mixed.describe(n).split(" ", 2)[2] for n in range(len(mixed)) if on[mixed.instance[n]]
        ]
        assert "3 blocks (3.0 kB) that are not on" in part.notes[-1]
        # Each iteration begins with what is loaded, which is left out: with its first product.
        assert [part.kind[m] for m in part.iteration_marks] == [2, 2, 2]
    assert of_device(trace, "cpu") is trace
    assert not of_device(trace, "cuda").instances
