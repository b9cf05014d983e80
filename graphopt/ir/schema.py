"""The schema of `program.json`: what a saved program may say, before a program is made of it.

It says what kind each entry is of and how many there may be. What names refer to is checked when
the program is put together, attributes by their ops' own declarations, and types by inference.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from graphopt.ir.types import DTYPES
from graphopt.support.inputs import Schema, Size

MAX_WORK = 400_000
"""Nodes of all calls together. 126 layers of a thousand nodes, more than any model has, are a
third of it."""

Name = Annotated[str, pydantic.Field(min_length=1, max_length=1000)]
Dtype = Annotated[str, pydantic.Field(pattern=f"^({'|'.join(DTYPES)})$")]
Shape = Annotated[list[Size], pydantic.Field(max_length=16)]
Names = Annotated[list[Name], pydantic.Field(max_length=10_000)]


class NodeEntry(Schema):
    """One operation: the values it reads, None for an absent operand, and those it makes."""

    model_config = pydantic.ConfigDict(populate_by_name=True)

    op: Name
    inputs: Annotated[list[Name | None], pydantic.Field(alias="in", max_length=1000)]
    attrs: dict[str, Any]
    out: Annotated[list[Name], pydantic.Field(min_length=1, max_length=1000)]


class FunctionEntry(Schema):
    """One function; a cache is (slot, past_k, past_v, present_k, present_v).

    Behind those come what a policy reads of its state, and as many names of what it leaves.
    """

    name: Name
    params: Names
    weights: dict[Name, Name]
    caches: list[Annotated[list[Name], pydantic.Field(min_length=5, max_length=69)]]
    nodes: Annotated[list[NodeEntry], pydantic.Field(max_length=100_000)]
    results: Names


class PlacementEntry(Schema):
    """The devices of something; `graphopt.ir.placement` refuses what is no placement."""

    devices: Annotated[list[Name], pydantic.Field(min_length=1, max_length=10_000)]
    axis: Annotated[int, pydantic.Field(ge=0, le=16)] | None
    sections: Annotated[int, pydantic.Field(ge=1, le=2**31)] = 1
    copies: Annotated[int, pydantic.Field(ge=1, le=10_000)] = 1
    summed: bool = False


class CallEntry(Schema):
    """One call of a function."""

    function: Name
    args: Names
    results: Names
    weights: dict[Name, Name]
    attrs: dict[str, Any]
    caches: dict[Name, Name]
    path: str
    placement: PlacementEntry | None = None


class EncodingEntry(Schema):
    """How a packed weight is stored; `graphopt.ir.encoding` refuses what is none."""

    bits: Annotated[int, pydantic.Field(ge=1, le=8)]
    group: Annotated[int, pydantic.Field(ge=1, le=2**31)]
    axis: Annotated[int, pydantic.Field(ge=0, le=1)]
    symmetric: bool


class WeightEntry(Schema):
    """One weight, without its value; `encoding` is None where it is dense."""

    name: Name
    shape: Shape
    dtype: Dtype
    checkpoint: str | None
    constant: bool
    encoding: EncodingEntry | None = None
    placement: PlacementEntry | None = None


class LayoutEntry(Schema):
    """Where the keys and values of a state lie; `graphopt.ir.kv` refuses what is no layout."""

    kind: Literal["contiguous", "ring", "paged"] = "contiguous"
    size: Annotated[int, pydantic.Field(ge=1, le=2**31)] | None = None


class HostEntry(Schema):
    """A state's parts on the device and the host; `graphopt.ir.kv_host` refuses what is none."""

    context: Annotated[int, pydantic.Field(ge=1, le=2**40)]
    batch: Annotated[int, pydantic.Field(ge=1, le=2**31)]
    resident: Annotated[int, pydantic.Field(ge=0, le=2**40)]
    streamed: Annotated[int, pydantic.Field(ge=0, le=2**40)]


class StateEntry(Schema):
    """The KV cache of one layer; `graphopt.ir.kv_policies` refuses what is no policy."""

    name: Name
    heads: Annotated[int, pydantic.Field(ge=1, le=2**16)]
    k_dim: Annotated[int, pydantic.Field(ge=1, le=2**16)]
    v_dim: Annotated[int, pydantic.Field(ge=1, le=2**16)]
    dtype: Dtype
    layout: LayoutEntry = LayoutEntry()
    placement: PlacementEntry | None = None
    policy: dict[Name, Any] | None = None
    query_heads: Annotated[int, pydantic.Field(ge=1, le=2**16)] | None = None
    host: HostEntry | None = None


class VisionEntry(Schema):
    """What a model that sees has beside its decoder; see `graphopt.ir.vision`."""

    carried: list[WeightEntry]
    image_token: Annotated[int, pydantic.Field(ge=0, le=2**31)]
    embedding_scale: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
    sections: (
        Annotated[
            list[Annotated[int, pydantic.Field(ge=0, le=2**16)]],
            pydantic.Field(min_length=3, max_length=3),
        ]
        | None
    )
    both_ways: bool


class ProgramEntry(Schema):
    """A whole program."""

    format: Literal["graphopt-program"]
    version: int
    name: str
    source: str
    checkpoint_dtype: Dtype
    inputs: dict[Name, Any]
    outputs: Names
    functions: Annotated[list[FunctionEntry], pydantic.Field(max_length=10_000)]
    calls: Annotated[list[CallEntry], pydantic.Field(max_length=10_000)]
    weights: list[WeightEntry]
    states: list[StateEntry]
    config: dict[str, Any]
    generation: dict[str, Any] = pydantic.Field(default_factory=dict)
    notes: list[Annotated[list[str], pydantic.Field(min_length=2, max_length=2)]]
    max_length: Annotated[int, pydantic.Field(ge=1, lt=2**31)] | None = None
    licence: Annotated[str, pydantic.Field(max_length=1000)] = ""
    vision: VisionEntry | None = None

    @pydantic.field_validator("states", mode="before")
    @classmethod
    def _named_fields(cls, value: Any) -> Any:
        """Version 1 has a state as the list of its first fields."""
        names = list(StateEntry.model_fields)[:5]
        if not isinstance(value, list):
            return value
        return [
            dict(zip(names, item, strict=True))
            if isinstance(item, list) and len(item) == len(names)
            else item
            for item in value
        ]
