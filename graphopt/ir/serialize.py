"""Programs as JSON: the versioned form in which graphopt saves and loads them.

Weights are not part of the JSON; `program_to_json` lists their names, shapes and dtypes, and
the values lie beside it as safetensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphopt.errors import SourceError
from graphopt.ir.attribute_json import (
    AGAIN,
    malformed,
    pack_attribute,
    unpack_attribute,
    unpack_policy,
)
from graphopt.ir.encoding import Packed
from graphopt.ir.graph import (
    Cache,
    Call,
    Function,
    KVLayout,
    KVState,
    Node,
    Program,
    Value,
)
from graphopt.ir.kv_host import HostShare
from graphopt.ir.kv_policies import policy_to_dict
from graphopt.ir.placement import Placement
from graphopt.ir.schema import MAX_WORK, FunctionEntry, PlacementEntry, ProgramEntry, WeightEntry
from graphopt.ir.types import DTYPE_NAMES, DTYPES, Type
from graphopt.ir.vision import Vision
from graphopt.ir.weight_store import WeightStore
from graphopt.ir.weights import Dequantised, Missing, Producer, Weight
from graphopt.support.inputs import parse
from graphopt.support.plain import shown

FORMAT_VERSION = 5
READ_VERSIONS = (1, 2, 3, 4, 5)
"""Version 1 knew dense weights alone, and version 3 no policies of KV caches; what they lack has
the defaults of `graphopt.ir.schema`. In version 4 a look-up in a rank's rows did not say how many
rows all ranks have."""

_RENAMED_OPS: dict[str, tuple[str, dict[str, str]]] = {
    "top_gates": ("top_k_gating", {"count": "top_k", "mean": "mean_active_experts"}),
    "experts": ("experts", {"mean": "mean_active_experts"}),
    "swap_heads": ("transpose_heads", {}),
}
"""Ops of versions 1 and 2: what they are called now, and their attributes that have new names."""


def _pack_placement(placement: Placement | None) -> dict[str, Any] | None:
    if placement is None:
        return None
    packed: dict[str, Any] = {"devices": list(placement.devices), "axis": placement.axis}
    if (placement.sections, placement.copies) != (1, 1):
        packed |= {"sections": placement.sections, "copies": placement.copies}
    return packed | ({"summed": True} if placement.summed else {})


def _placement(entry: PlacementEntry | None, where: str) -> Placement | None:
    try:
        if entry is None:
            return None
        split = entry.axis, entry.sections, entry.copies
        return Placement(tuple(entry.devices), *split, entry.summed)
    except ValueError as error:
        raise malformed(f"{where}: {error}") from error


def _pack_function(function: Function) -> dict[str, Any]:
    names = {value: value.name for value in function.values()}
    return {
        "name": function.name,
        "params": [value.name for value in function.params],
        "weights": {slot: value.name for slot, value in function.weights.items()},
        "caches": [
            [
                c.slot,
                *(names[v] for v in (c.past_k, c.past_v, c.present_k, c.present_v)),
                *(names[v] for v in (*c.past_state, *c.present_state)),
            ]
            for c in function.caches
        ],
        "nodes": [
            {
                "op": node.op,
                "in": [None if v is None else v.name for v in node.inputs],
                "attrs": {key: pack_attribute(attr) for key, attr in node.attrs.items()},
                "out": [v.name for v in node.outputs],
            }
            for node in function.nodes
        ],
        "results": [value.name for value in function.results],
    }


def _policy_values(cache: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of what a policy keeps, as it is read and as it is left.

    Raises:
        SourceError: There are not as many of one as of the other.
    """
    names = cache[5:]
    if len(names) % 2:
        raise malformed(f"the cache {shown(cache[0])} reads another state than it leaves")
    return names[: len(names) // 2], names[len(names) // 2 :]


def _unpack_function(entry: FunctionEntry) -> Function:
    where = f"function {shown(entry.name)}"
    values: dict[str, Value] = {}

    def make(name: str) -> Value:
        if name in values:
            raise malformed(f"in {where}, two values are called {shown(name)}")
        values[name] = Value(name)
        return values[name]

    def find(name: str, reader: str) -> Value:
        # Values are made in order, so that nothing reads itself by whatever way.
        if name not in values:
            raise malformed(f"in {where}, {reader} reads {shown(name)} before it is made")
        return values[name]

    function = Function(entry.name)
    function.params = [make(name) for name in entry.params]
    function.weights = {slot: make(name) for slot, name in entry.weights.items()}
    pasts = [[make(name) for name in (*c[1:3], *_policy_values(c)[0])] for c in entry.caches]
    for item in entry.nodes:
        reader = f"{shown(item.out[0])} = {shown(item.op)}"
        node = Node(
            item.op,
            [None if name is None else find(name, reader) for name in item.inputs],
            {key: unpack_attribute(attr) for key, attr in item.attrs.items()},
        )
        for index, name in enumerate(item.out):
            value = make(name)
            value.node, value.index = node, index
            node.outputs.append(value)
        function.nodes.append(node)
    for c, (k, v, *past_state) in zip(entry.caches, pasts, strict=True):
        reader = f"the cache {c[0]!r}"
        present_k, present_v, *present_state = (
            find(name, reader) for name in (*c[3:5], *_policy_values(c)[1])
        )
        function.caches.append(Cache(c[0], k, v, present_k, present_v, past_state, present_state))
    function.results = [find(name, "its end") for name in entry.results]
    return function


def program_to_json(program: Program) -> dict[str, Any]:
    """Return the program, without weight values, as plain JSON data."""
    return {
        "format": "graphopt-program",
        "version": FORMAT_VERSION,
        "name": program.name,
        "source": program.source,
        "checkpoint_dtype": DTYPE_NAMES[program.checkpoint_dtype],
        "inputs": {name: pack_attribute(kind) for name, kind in program.inputs.items()},
        "outputs": program.outputs,
        "functions": [_pack_function(f) for f in program.functions.values()],
        "calls": [
            {
                "function": c.function,
                "args": c.args,
                "results": c.results,
                "weights": c.weights,
                "attrs": {key: pack_attribute(attr) for key, attr in c.attrs.items()},
                "caches": c.caches,
                "path": c.path,
                "placement": _pack_placement(c.placement),
            }
            for c in program.calls
        ],
        "weights": [_pack_weight(weight) for weight in program.weights],
        "states": [
            {
                "name": s.name,
                "heads": s.heads,
                "k_dim": s.k_dim,
                "v_dim": s.v_dim,
                "dtype": DTYPE_NAMES[s.dtype],
                "layout": dataclasses.asdict(s.layout),
                "placement": _pack_placement(s.placement),
                "policy": None if s.policy is None else policy_to_dict(s.policy),
                "query_heads": s.query_heads,
                "host": None if s.host is None else dataclasses.asdict(s.host),
            }
            for s in program.states.values()
        ],
        "config": program.config,
        "generation": program.generation,
        "notes": [list(note) for note in program.notes],
        "max_length": program.max_length,
        "licence": program.licence,
        "vision": None if program.vision is None else _pack_vision(program.vision),
    }


def _pack_weight(weight: Weight) -> dict[str, Any]:
    return {
        "name": weight.name,
        "shape": list(weight.shape),
        "dtype": DTYPE_NAMES[weight.dtype],
        "checkpoint": weight.checkpoint,
        "constant": weight.constant,
        "encoding": None if weight.encoding is None else dataclasses.asdict(weight.encoding),
        "placement": _pack_placement(weight.placement),
    }


def _pack_vision(vision: Vision) -> dict[str, Any]:
    return {
        "carried": [_pack_weight(weight) for weight in vision.carried],
        "image_token": vision.image_token,
        "embedding_scale": vision.embedding_scale,
        "sections": None if vision.sections is None else list(vision.sections),
        "both_ways": vision.both_ways,
    }


def _producer(w: WeightEntry, producers: Mapping[str, Producer]) -> Producer:
    """Return where the value of a weight comes from, put together from its stored tensors."""
    shape, dtype = tuple(w.shape), DTYPES[w.dtype]
    if w.encoding is None:
        return _stored(w.name, shape, dtype, producers)
    try:
        encoding = Packed(**w.encoding.model_dump())
        tensors = encoding.stored(shape, dtype)
    except ValueError as error:
        raise malformed(f"weight {shown(w.name)}: {error}") from error
    parts = {
        suffix: _stored(f"{w.name}.{suffix}", *kind, producers) for suffix, kind in tensors.items()
    }
    return Dequantised(encoding, **parts)


def _stored(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, producers: Mapping[str, Producer]
) -> Producer:
    """Return the producer of a tensor, if it is of the shape and dtype that the program has."""
    producer = producers.get(name, Missing(shape, dtype, name))
    if (tuple(producer.shape), producer.dtype) != (shape, dtype):
        raise SourceError(
            f"program.json: weight {shown(name)} is stored as {list(producer.shape)} in "
            f"{DTYPE_NAMES.get(producer.dtype, producer.dtype)}, the program has it as "
            f"{list(shape)} in {DTYPE_NAMES[dtype]}.",
            AGAIN,
        )
    return producer


def _rename_ops(function: Function) -> None:
    """Give the ops of an older file, and their attributes, the names that they have now."""
    for node in function.nodes:
        node.op, attributes = _RENAMED_OPS.get(node.op, (node.op, {}))
        node.attrs = {attributes.get(name, name): value for name, value in node.attrs.items()}


def _count_rows(program: Program) -> None:
    """Let look-ups of older files in a rank's rows know how many rows there are: their table's."""
    for call in program.calls:
        function = program.function_of(call)
        slots = function.slots_by_value()
        for node in function.nodes:
            if node.op == "vocab_parallel_embedding" and (table := node.operand(1)) in slots:
                table_rows = program.weights[call.weights[slots[table]]].shape[0]
                node.attrs = {"vocab": table_rows, **node.attrs}


def _add_weights(
    store: WeightStore, entries: Sequence[WeightEntry], producers: Mapping[str, Producer]
) -> None:
    for w in entries:
        if w.name in store:
            raise malformed(f"two weights are called {shown(w.name)}")
        where = f"weight {shown(w.name)}"
        placement = _placement(w.placement, where)
        store.add(Weight(w.name, _producer(w, producers), w.checkpoint, w.constant, placement))


def program_from_json(data: dict[str, Any], producers: Mapping[str, Producer]) -> Program:
    """Return the program saved as `data`; weights take their values from `producers`.

    Args:
        producers: By the names of the tensors that weights are stored as (`Weight.tensors`).

    Raises:
        SourceError: The data is of another format or version, or is malformed.
    """
    if not isinstance(data, dict) or data.get("format") != "graphopt-program":
        raise SourceError("program.json is not a saved graphopt program.")
    if data.get("version") not in READ_VERSIONS:
        raise SourceError(
            f"program.json has version {data.get('version')}, this graphopt reads "
            f"{READ_VERSIONS[0]} to {READ_VERSIONS[-1]}.",
            "Compile the model again with this version.",
        )
    entry = parse(ProgramEntry, data, "program.json", remedy=AGAIN)
    functions: dict[str, Function] = {}
    for item in entry.functions:
        if item.name in functions:
            raise malformed(f"two functions are called {shown(item.name)}")
        functions[item.name] = _unpack_function(item)
        if data["version"] < 3:
            _rename_ops(functions[item.name])
    lengths = {name: len(function.nodes) for name, function in functions.items()}
    if sum(lengths.get(call.function, 0) for call in entry.calls) > MAX_WORK:
        raise malformed(f"its calls have more than {MAX_WORK} nodes together")
    inputs = {name: unpack_attribute(kind) for name, kind in entry.inputs.items()}
    for name, kind in inputs.items():
        if not isinstance(kind, Type):
            raise malformed(f"the input {shown(name)} has no type")
    program = Program(
        name=entry.name,
        source=entry.source,
        inputs=inputs,
        outputs=entry.outputs,
        functions=functions,
        config=entry.config,
        generation=entry.generation,
        checkpoint_dtype=DTYPES[entry.checkpoint_dtype],
        notes=[(where, reason) for where, reason in entry.notes],
        max_length=entry.max_length,
        licence=entry.licence,
    )
    for c in entry.calls:
        attrs = {key: unpack_attribute(attr) for key, attr in c.attrs.items()}
        placement = _placement(c.placement, f"the call at {shown(c.path)}")
        program.calls.append(
            Call(c.function, c.args, c.results, c.weights, attrs, c.caches, c.path, placement)
        )
    _add_weights(program.weights, entry.weights, producers)
    if data["version"] < 5:
        _count_rows(program)
    if (seen := entry.vision) is not None:
        sections = None if seen.sections is None else tuple(seen.sections)
        program.vision = Vision(
            image_token=seen.image_token,
            embedding_scale=seen.embedding_scale,
            sections=sections,  # type: ignore[arg-type]
            both_ways=seen.both_ways,
        )
        _add_weights(program.vision.carried, seen.carried, producers)
        twice = [w.name for w in program.vision.carried if w.name in program.weights]
        if twice:
            raise malformed(f"two weights are called {shown(twice[0])}")
    for s in entry.states:
        try:
            layout = KVLayout(s.layout.kind, s.layout.size)
            host = None if s.host is None else HostShare(**s.host.model_dump())
        except ValueError as error:
            raise malformed(f"state {shown(s.name)}: {error}") from error
        where = f"state {shown(s.name)}"
        program.states[s.name] = KVState(
            s.name, s.heads, s.k_dim, s.v_dim, DTYPES[s.dtype], layout,
            _placement(s.placement, where),
            None if s.policy is None else unpack_policy(s.policy, where),
            s.query_heads,
            host,
        )  # fmt: skip
    return program
