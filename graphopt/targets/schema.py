"""What a target's file may say: tables, keys, types of values, and what goes together."""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import Annotated, Any, Literal

import pydantic

from graphopt.errors import UsageError
from graphopt.support.inputs import Schema, misfit

Text = Annotated[str, pydantic.Field(min_length=1)]
Size = Annotated[int, pydantic.Field(ge=1, le=2**48)]
DType = Literal["f64", "f32", "f16", "bf16", "i64", "i32", "i8"]
"""An element type, by its name in the IR."""
Feature = Literal["wgmma", "programmatic-launch"]
"""What some machines can do and planners ask for; `Target` says what each is."""

_ISAS = {
    "cpu": (r"\w+", "a word, such as host"),
    "gpu": (r"sm_[1-9]\d+", "sm_ and the compute capability, such as sm_80"),
    "npu": (r"dav-\w+", "what the compiler calls it, such as dav-c220"),
}
_REMEDY = "Mend the file: docs/add-a-target.md says what stands in it, and hopper.toml has it all."


class MemoryTable(Schema):
    """A `[[memory]]`; without `bytes` where they depend on the machine."""

    name: Text
    bytes: Size | None = None
    per: Text


class MatrixUnitTable(Schema):
    """A `[[matrix_unit]]`."""

    m: Size
    n: Size
    k: Size
    input: DType
    accumulate: Annotated[list[DType], pydantic.Field(min_length=1)]


class ProductTiles(Schema):
    """Tiles of a product of sorted tokens: `graphopt.runtime.expert_tiles.Tiles`."""

    rows: Size
    columns: Size
    depth: Size
    warps: Size
    stages: Size
    group: Size = 8


class ManyTokensTable(Schema):
    """An `[[experts.many]]`: the tiles from so many tokens an expert on."""

    tokens: Annotated[int, pydantic.Field(ge=0)]
    expand: ProductTiles
    reduce: ProductTiles


class RowTiles(Schema):
    """What a program reads of a weight for one token: `graphopt.runtime.expert_tiles.FewTokens`."""

    rows: Size
    depth: Size
    warps: Size


class FewTokensTable(Schema):
    """The `[experts.few]`."""

    expand: RowTiles
    reduce: RowTiles


class ExpertsTable(Schema):
    """The `[experts]`: tiles of the kernels of experts."""

    many: Annotated[list[ManyTokensTable], pydantic.Field(min_length=1)]
    few: FewTokensTable

    @pydantic.field_validator("many")
    @classmethod
    def _fewer_and_fewer_down_to_0(cls, many: list[ManyTokensTable]) -> list[ManyTokensTable]:
        tokens = [row.tokens for row in many]
        if tokens[-1] != 0 or tokens != sorted(set(tokens), reverse=True):
            raise ValueError("it should have the most tokens first, and tokens = 0 last")
        if any(row.expand.rows != row.reduce.rows for row in many):
            raise ValueError("its expand and reduce should have the same rows")
        return many


class PackedTable(Schema):
    """A row of `[quantised]`'s `packed`: `graphopt.runtime.quantised_tiles.PackedTiles`."""

    tokens: Size
    # A weight has a counter for as many of its outputs: `packed_codes.FEWEST_ROWS`.
    rows: Annotated[Size, pydantic.Field(ge=16)]
    columns: Size
    warps: Size
    stages: Size
    programs: Size
    unroll: Literal[0, 1, 2, 4] = 0

    @pydantic.field_validator("rows", "columns")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("it should be a power of two")
        return size

    @pydantic.model_validator(mode="after")
    def _one_tile_of_one_warp(self) -> PackedTable:
        if self.unroll and (self.tokens > self.columns or self.warps != 1):
            raise ValueError(
                "it should have tokens up to its columns and warps = 1, since it has unroll"
            )
        return self


class IntegerTable(Schema):
    """The `[quantised.integer]`: `graphopt.runtime.quantised_tiles.IntegerTiles`."""

    rows: Size
    columns: Size
    depth: Size
    warps: Size
    stages: Size
    group: Size = 8
    persistent: bool = False


Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
"""So many bytes or operations a second."""


Seconds = Annotated[float, pydantic.Field(ge=0, le=1)]
"""A time, short as those of kernels are."""


class FewTable(Schema):
    """A row of `[quantised]`'s `few`: `graphopt.runtime.quantised_tiles.FewTiles`."""

    tokens: Annotated[Size, pydantic.Field(le=16)]
    warps: Size
    row_tiles: Size
    ahead: Size
    near: Annotated[int, pydantic.Field(ge=0)] = 0


class FrontTable(Schema):
    """The `[quantised.front]`: `graphopt.runtime.quantised_tiles.FrontFigures`."""

    # Of more a block has no room for norms either: `packed_few.MOST_HELD`.
    tokens: Annotated[int, pydantic.Field(ge=0, le=4)]
    launch: Seconds
    start: Seconds
    product: Seconds
    feature: Seconds


class QuantisedTable(Schema):
    """The `[quantised]`: tiles of the kernels of quantised weights."""

    few: list[FewTable] = pydantic.Field(default_factory=list)
    front: FrontTable | None = None
    packed: Annotated[list[PackedTable], pydantic.Field(min_length=1)]
    integer_packed: Annotated[list[PackedTable], pydantic.Field(min_length=1)]
    integer: IntegerTable

    @pydantic.field_validator("integer_packed")
    @classmethod
    def _through_shared_memory(cls, rows: list[PackedTable]) -> list[PackedTable]:
        if any(row.unroll for row in rows):
            raise ValueError("it should have no unroll, which is of products of 16 bits")
        return rows

    @pydantic.field_validator("few", "packed", "integer_packed")
    @classmethod
    def _more_and_more(cls, rows: list[Any]) -> list[Any]:
        tokens = [row.tokens for row in rows]
        if tokens != sorted(set(tokens)):
            raise ValueError("it should have the fewest tokens first")
        return rows


class DecodeTable(Schema):
    """The `[decode]`: `graphopt.targets.DecodeFigures`."""

    bandwidth: Rate
    launch: Seconds
    flops: Rate


class LinearTilesTable(Schema):
    """Tiles of a linear that is summed: `graphopt.runtime.reduction_plan.LinearTiles`."""

    rows: Size
    columns: Size
    depth: Size
    warps: Size
    stages: Size
    flops: Rate
    beside: Seconds
    group: Size = 8
    programs: Size = 1

    @pydantic.field_validator("rows", "columns", "depth")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("it should be a power of two")
        return size


class ReductionsTable(Schema):
    """The `[reductions]`: `graphopt.runtime.reduction_plan.ReductionFigures`."""

    flops: Rate
    launch: Seconds
    link: Rate
    push: Rate
    copy_engine: Rate
    copy_start: Seconds
    signal: Seconds
    library: Rate
    library_start: Seconds
    one_shot_bytes: Size
    one_shot: Seconds
    programs: Size
    attention_flops: Rate
    chunk_launch: Seconds | None = None
    attention_chunk_launch: Seconds | None = None
    least_gain: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    tiles: Annotated[list[LinearTilesTable], pydantic.Field(min_length=1)]


class HostTable(Schema):
    """The `[host]`: `graphopt.targets.HostFigures`, or the link alone."""

    link: Rate
    attention: Rate | None = None
    link_beside: Rate | None = None
    attention_beside: Rate | None = None
    call: Seconds | None = None

    @pydantic.model_validator(mode="after")
    def _link_alone_or_all(self) -> HostTable:
        given = self.model_dump(exclude_none=True)
        if len(given) > 1:
            missing = [name for name in type(self).model_fields if name not in given]
            if missing:
                raise ValueError(f"it should have {', '.join(missing)} as well, or link alone")
        return self


class TargetFile(Schema):
    """A target's file as a whole; `graphopt.targets.Target` says what each entry means."""

    name: Annotated[str, pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    title: Text
    kind: Literal["cpu", "gpu", "npu"]
    isa: str
    dtypes: Annotated[list[DType], pydantic.Field(min_length=1)]
    features: list[Feature] = pydantic.Field(default_factory=list)
    kernels: list[Text] = pydantic.Field(default_factory=list)
    layer_kernels: list[Text] = pydantic.Field(default_factory=list)
    cores: Size | None = None
    bandwidth: Rate | None = None
    flops: dict[DType, Rate] = pydantic.Field(default_factory=dict)
    memory: list[MemoryTable] = pydantic.Field(default_factory=list)
    matrix_unit: list[MatrixUnitTable] = pydantic.Field(default_factory=list)
    experts: ExpertsTable | None = None
    quantised: QuantisedTable | None = None
    decode: DecodeTable | None = None
    reductions: ReductionsTable | None = None
    host: HostTable | None = None
    limits: dict[str, Size] = pydantic.Field(default_factory=dict)
    emit: dict[str, Text] = pydantic.Field(default_factory=dict)
    runtime: dict[str, Text] = pydantic.Field(default_factory=dict)
    sources: dict[str, Text] = pydantic.Field(default_factory=dict, validate_default=True)

    @pydantic.field_validator("isa")
    @classmethod
    def _of_its_kind(cls, isa: str, info: pydantic.ValidationInfo) -> str:
        pattern, expected = _ISAS[info.data.get("kind", "cpu")]
        if not re.fullmatch(pattern, isa):
            raise ValueError(f"it should be {expected}")
        return isa

    @pydantic.field_validator("sources")
    @classmethod
    def _of_every_figure(
        cls, sources: dict[str, str], info: pydantic.ValidationInfo
    ) -> dict[str, str]:
        figures = (
            "features", "cores", "bandwidth", "flops", "memory", "matrix_unit", "experts",
            "quantised", "decode", "reductions", "host", "limits",
        )  # fmt: skip
        missing = [name for name in figures if info.data.get(name) and name not in sources]
        if missing:
            raise ValueError(f"it should say where these are from: {', '.join(missing)}")
        return sources


def parse_target_file(text: str, where: str) -> TargetFile:
    """Return what the text of a target's file says.

    Args:
        where: What messages call the file.

    Raises:
        UsageError: It is not TOML; or an entry is unknown, missing or not of its type.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise UsageError(f"{where} is not valid TOML: {problem}.", _REMEDY) from problem
    try:
        return TargetFile.model_validate(data)
    except pydantic.ValidationError as problem:
        raise misfit(problem, where, remedy=_remedy(problem), error=UsageError) from problem


def _remedy(problem: pydantic.ValidationError) -> str:
    """Return what to do, with the nearest key where one is unknown."""
    first = problem.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return _REMEDY
    whole = TargetFile.model_json_schema()
    tables = [whole, *whole["$defs"].values()]
    keys = {key for table in tables for key in table["properties"]}
    near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
    return f"Did you mean {near[0]!r}? {_REMEDY}" if near else _REMEDY
