"""Which keys lie on a device and which on its host, and how a step attends to the latter.

A step of one token reads each layer's keys and values once. Those on the device take next to no
time; those on the host either cross the link to the device or are read by the host's processors,
or some of each at the same time, by rates that are lower then since both read the same memory. A
layer none of whose keys are on the host has no such call at all, so that whole layers on the device
come first, and what room is left holds the front of one more.

`published` is the split of FastAttention (arXiv 2410.16663, section 4.4), by whole layers:

    L_device = clamp(floor((n (memory - reserve) - weights - activations) / layer), 0, L)

Layout letters: N tokens on the host, b bytes of a token's keys and values in a layer, of all texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from graphopt.ir.kv_host import HostShare, piece_tokens, prefill_chunk
from graphopt.targets import HostFigures

Way = Literal["device", "host", "streamed", "split"]

_MOST_COMBINATIONS = 20_000
_MERGING = 6
"""Kernels that merge the parts of an attention."""

_WORTH_DIVIDING = 1.02
"""Times that the better way alone takes, below which keys are not divided between both."""

FRONT_TOKENS = 64
"""Tokens at the front of a text that lie on the device come in multiples of it."""


@dataclass(frozen=True)
class HostedLayer:
    """A layer whose keys may lie on the host.

    Attributes:
        name: Of its state.
        token_bytes: Of a token of one text, keys and values.
        computes: Whether the host's kernel reads such keys; they can be copied in any case.
    """

    name: str
    token_bytes: int
    computes: bool = True


@dataclass(frozen=True)
class LayerPlan:
    """Where the keys of one layer lie.

    Attributes:
        layer: The layer.
        resident, streamed, computed: Tokens of a text on the device, copied to it in a step, and
            attended to by the host.
        seconds: What attention to all of them takes in a step.
        others: What the ways that were not chosen would take, by name.
    """

    layer: HostedLayer
    resident: int
    streamed: int
    computed: int
    seconds: float
    others: dict[str, float]

    @property
    def way(self) -> Way:
        """`device`, `host`, `streamed`, or `split` for more than one of them."""
        ways: list[tuple[Way, int]] = [
            ("device", self.resident), ("streamed", self.streamed), ("host", self.computed),
        ]  # fmt: skip
        used = [way for way, tokens in ways if tokens]
        return used[0] if len(used) == 1 else "split"

    def share(self, context: int, batch: int) -> HostShare | None:
        """Return what a state says of it; None where all lies on the device."""
        if self.way == "device":
            return None
        return HostShare(context, batch, self.resident, self.streamed)


@dataclass(frozen=True)
class Machine:
    """What a step's time and room are counted by.

    Attributes:
        figures: Rates of the host and its link.
        bandwidth: Bytes a second at which the device's attention reads keys.
        launch: Seconds of a kernel with next to nothing to do.
        rest: Seconds of a layer beside its attention, in which pieces of the next one come.
    """

    figures: HostFigures
    bandwidth: float
    launch: float
    rest: float = 0.0


@dataclass(frozen=True)
class KVPlan:
    """Where the keys of all layers lie.

    Attributes:
        layers: In the order of the model.
        context, batch: Tokens of a text, and texts.
        room: Bytes of the device that keys may take.
    """

    layers: tuple[LayerPlan, ...]
    context: int
    batch: int
    room: int

    @property
    def seconds(self) -> float:
        """What attention takes in a step, in all layers that may lie on the host."""
        return sum(plan.seconds for plan in self.layers)

    def device_bytes(self) -> int:
        """Return the bytes of keys on the device, with room for a part of a prompt."""
        return sum(
            _device_bytes(p.layer, p.resident, self.context, self.batch) for p in self.layers
        )

    def host_bytes(self) -> int:
        """Return the bytes of host memory, whole pieces."""
        return sum(
            plan.layer.token_bytes * self.batch * _whole(tokens, self.batch)
            for plan in self.layers
            if (tokens := self.context - plan.resident)
        )

    def moved_bytes(self) -> int:
        """Return the bytes that a step copies to the device."""
        return sum(plan.layer.token_bytes * self.batch * plan.streamed for plan in self.layers)

    def read_bytes(self) -> int:
        """Return the bytes that the host's processors read in a step."""
        return sum(plan.layer.token_bytes * self.batch * plan.computed for plan in self.layers)


def _whole(tokens: int, batch: int) -> int:
    piece = piece_tokens(tokens, batch)
    return -(-tokens // piece) * piece


def _device_bytes(layer: HostedLayer, resident: int, context: int, batch: int) -> int:
    if resident == 0:
        return 0
    room = 0 if resident == context else min(prefill_chunk(batch), context)
    return layer.token_bytes * batch * (resident + room)


def buffer_bytes(layers: Iterable[HostedLayer], context: int, batch: int) -> int:
    """Return the bytes of the two buffers that pieces pass through."""
    piece = piece_tokens(context, batch)
    return 2 * max((layer.token_bytes for layer in layers), default=0) * batch * piece


def host_seconds(streamed: float, computed: float, figures: HostFigures) -> float:
    """Return the time of bytes that are copied to the device and of others that the host reads.

    As long as both go on they have the rates of both; what is longer goes on alone.
    """
    if computed == 0:
        return streamed / figures.link
    if streamed == 0:
        return figures.call + computed / figures.attention
    copying = streamed / figures.link_beside
    reading = computed / figures.attention_beside
    if copying <= reading:
        return figures.call + copying + (computed - copying * figures.attention_beside) / (
            figures.attention
        )  # fmt: skip
    alone = (streamed - reading * figures.link_beside) / figures.link
    return max(figures.call + reading, reading + alone)


def layer_seconds(
    layer: HostedLayer, resident: int, streamed: int, context: int, batch: int, machine: Machine
) -> float:
    """Return what attention to one layer's keys takes in a step, divided in a given way.

    Args:
        resident, streamed: Tokens of a text on the device, and those copied to it; the host's
            processors attend to the others.

    Returns:
        Seconds; infinity where they cannot attend to such keys.
    """
    token, computed = layer.token_bytes * batch, context - resident - streamed
    on_device = 2 * machine.launch + token * resident / machine.bandwidth
    if resident == context:
        return on_device
    if computed and not layer.computes:
        return float("inf")
    taken = host_seconds(streamed * token, computed * token, machine.figures)
    if computed == 0:
        # What two buffers hold has come while the layer in front computed.
        piece = piece_tokens(context - resident, batch) * token
        ahead = min(machine.rest, 2 * piece / machine.figures.link)
        taken = max(0.0, taken - ahead) + 2 * machine.launch
    return max(taken, on_device) + _MERGING * machine.launch


def layer_plan(
    layer: HostedLayer, resident: int, context: int, batch: int, machine: Machine
) -> LayerPlan:
    """Return how a step attends fastest to what of a layer is not on the device."""
    tokens = context - resident
    if tokens == 0:
        seconds = layer_seconds(layer, resident, 0, context, batch, machine)
        return LayerPlan(layer, resident, 0, 0, seconds, {})
    piece = piece_tokens(tokens, batch)
    found = {
        streamed: layer_seconds(layer, resident, streamed, context, batch, machine)
        for streamed in (*range(0, tokens, piece), tokens)
    }
    best = min(found, key=lambda streamed: found[streamed])
    alone = min((0, tokens), key=lambda streamed: found[streamed])
    if found[alone] <= _WORTH_DIVIDING * found[best]:
        best = alone
    ways = {"host": found[0], "streamed": found[tokens]}
    chosen = {0: "host", tokens: "streamed"}.get(best)
    others = {way: s for way, s in ways.items() if way != chosen and s < float("inf")}
    return LayerPlan(layer, resident, best, tokens - best, found[best], others)


def fastest(
    layers: Sequence[HostedLayer], context: int, batch: int, room: int, machine: Machine
) -> KVPlan:
    """Return the plan of the least time whose keys on the device fit `room` bytes.

    Layers of one size are alike, so that only how many of each lie on the device is tried; the
    front of one more takes what is left. The first of alike layers are those on the device.
    """
    kinds: dict[tuple[int, bool], list[int]] = {}
    for number, layer in enumerate(layers):
        kinds.setdefault((layer.token_bytes, layer.computes), []).append(number)
    members = list(kinds.values())
    sizes = [_device_bytes(layers[of[0]], context, context, batch) for of in members]
    on_device = [layer_plan(layers[of[0]], context, context, batch, machine) for of in members]
    on_host = [layer_plan(layers[of[0]], 0, context, batch, machine) for of in members]

    def tried(counts: Sequence[int]) -> tuple[float, tuple[int, ...], int, LayerPlan | None]:
        left = room - sum(n * size for n, size in zip(counts, sizes, strict=True))
        time = sum(
            n * there.seconds + (len(of) - n) * here.seconds
            for n, of, there, here in zip(counts, members, on_device, on_host, strict=True)
        )
        best: tuple[float, tuple[int, ...], int, LayerPlan | None] = (time, tuple(counts), -1, None)
        for kind, of in enumerate(members):
            if counts[kind] == len(of):
                continue
            front = _front(layers[of[0]], context, batch, left)
            if front:
                plan = layer_plan(layers[of[0]], front, context, batch, machine)
                better = time - on_host[kind].seconds + plan.seconds
                if better < best[0]:
                    best = (better, tuple(counts), kind, plan)
        return best

    ranges = [
        range(min(len(of), room // size) + 1) for of, size in zip(members, sizes, strict=True)
    ]
    combinations = 1
    for numbers in ranges:
        combinations *= len(numbers)
    if combinations > _MOST_COMBINATIONS:
        choices: Iterable[tuple[int, ...]] = [_filled(members, sizes, on_device, on_host, room)]
    else:
        choices = itertools.product(*ranges)
    fitting = (
        counts
        for counts in choices
        if sum(n * size for n, size in zip(counts, sizes, strict=True)) <= room
    )
    _, counts, front_kind, front_plan = min((tried(c) for c in fitting), key=lambda each: each[0])
    plans: list[LayerPlan | None] = [None] * len(layers)
    for kind, of in enumerate(members):
        for place, number in enumerate(of):
            plan = on_device[kind] if place < counts[kind] else on_host[kind]
            if place == counts[kind] and kind == front_kind and front_plan is not None:
                plan = front_plan
            plans[number] = replace(plan, layer=layers[number])
    return KVPlan(tuple(plan for plan in plans if plan is not None), context, batch, room)


def _front(layer: HostedLayer, context: int, batch: int, left: int) -> int:
    """Return how many tokens at the front of a text fit, with room for a part of a prompt."""
    tokens = left // (layer.token_bytes * batch) - min(prefill_chunk(batch), context)
    return max(0, min(tokens, context - 1)) // FRONT_TOKENS * FRONT_TOKENS


def _filled(
    members: Sequence[Sequence[int]],
    sizes: Sequence[int],
    on_device: Sequence[LayerPlan],
    on_host: Sequence[LayerPlan],
    room: int,
) -> tuple[int, ...]:
    """Return how many layers of each kind lie on the device, most time saved by a byte first."""
    saved = [
        (here.seconds - there.seconds) / size
        for here, there, size in zip(on_host, on_device, sizes, strict=True)
    ]
    counts = [0] * len(members)
    for kind in sorted(range(len(members)), key=lambda k: -saved[k]):
        counts[kind] = max(0, min(len(members[kind]), room // sizes[kind]))
        room -= counts[kind] * sizes[kind]
    return tuple(counts)


def published_layers(
    devices: int, memory: int, reserve: int, weights: int, activations: int, layer: int, layers: int
) -> int:
    """Return how many layers' keys lie on the devices, as FastAttention divides them.

    Args:
        devices: n, of `memory` bytes each, of which `reserve` stay free.
        weights, activations: Bytes of all devices together.
        layer: Bytes of one layer's keys and values, of all texts.
        layers: L.
    """
    return max(0, min((devices * (memory - reserve) - weights - activations) // layer, layers))


def published(
    layers: Sequence[HostedLayer], context: int, batch: int, room: int, machine: Machine
) -> KVPlan:
    """Return the plan of whole layers, by the largest of them; the first lie on the device.

    The others' keys are attended to on the host where its memory is faster than the link, else
    they are streamed.

    Args:
        room: What `published_layers` divides: memory less reserve, weights and activations.
    """
    size = max(layer.token_bytes for layer in layers) * batch * context
    count = published_layers(1, room, 0, 0, 0, size, len(layers))
    streams = machine.figures.link >= machine.figures.attention
    plans = []
    for number, layer in enumerate(layers):
        plan = layer_plan(layer, context if number < count else 0, context, batch, machine)
        if number >= count:
            plan = whole_layer(layer, context, batch, machine, streams or not layer.computes)
        plans.append(plan)
    return KVPlan(tuple(plans), context, batch, room)


def whole_layer(
    layer: HostedLayer, context: int, batch: int, machine: Machine, streams: bool
) -> LayerPlan:
    """Return the plan of a layer all on the host, copied to the device or read by the host."""
    parts = (context, 0) if streams else (0, context)
    taken = layer_seconds(layer, 0, parts[0], context, batch, machine)
    return LayerPlan(layer, 0, *parts, taken, {})


def streamed(layers: Sequence[HostedLayer], context: int, batch: int, machine: Machine) -> KVPlan:
    """Return the plan of all layers on the host and copied to the device in every step."""
    plans = tuple(whole_layer(layer, context, batch, machine, True) for layer in layers)
    return KVPlan(plans, context, batch, 0)
