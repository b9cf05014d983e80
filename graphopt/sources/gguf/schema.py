"""Metadata entries of a GGUF file, checked against a schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, FailFast, Field

from graphopt.errors import SourceError
from graphopt.support.inputs import Schema, parse, shown_path
from graphopt.support.plain import shown

CHECKPOINT = "Give the safetensors checkpoint of the model."


class Entries(Schema):
    """Metadata entries of known names, types and ranges; any other entry is an error."""

    model_config = ConfigDict(allow_inf_nan=False)

    @classmethod
    def names(cls) -> set[str]:
        """Return the names that the entries have in a file."""
        return {field.alias or name for name, field in cls.model_fields.items()}


Read = TypeVar("Read", bound=Entries)


def _one_for_all_blocks(value: Any) -> Any:
    """Return the number that a list holds once for every block, where it is the same one."""
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("it names no block")
    for block, number in enumerate(value):
        if number != value[0]:
            raise ValueError(
                f"differs from block to block ({shown(value[0])} in block 0, {shown(number)} in "
                f"block {block}), while in the model's class all blocks have the same"
            )
    return value[0]


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _utf8(value: str) -> str:
    if not _is_utf8(value):
        raise ValueError("it is not UTF-8 text")
    return value


def _all_utf8(values: list[str]) -> list[str]:
    if not _is_utf8("".join(values)):
        number = next(n for n, value in enumerate(values) if not _is_utf8(value))
        raise ValueError(f"number {number} is not UTF-8 text")
    return values


Size = Annotated[int, Field(ge=1, le=1 << 24)]
SizeOfAllBlocks = Annotated[int, BeforeValidator(_one_for_all_blocks), Field(ge=1, le=1 << 24)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, AfterValidator(_utf8)]
Texts = Annotated[list[str], FailFast(), AfterValidator(_all_utf8)]


def read_entries(path: Path, schema: type[Read], entries: Mapping[str, Any], prefix: str) -> Read:
    """Return the entries as `schema`.

    Args:
        path: The file, for messages.
        schema: What is read.
        entries: By name without `prefix`.
        prefix: What the names begin with in the file.

    Raises:
        SourceError: One is missing, of another type, out of range or unknown.
    """
    known = schema.names()
    for name, value in entries.items():
        if name not in known:
            raise SourceError(
                f"{shown_path(path)}: the entry {shown(prefix + name)} is {shown(value)}, which "
                "may change what the model computes and is not read for it.",
                CHECKPOINT,
            )
    return parse(schema, dict(entries), shown_path(path), prefix=prefix, remedy=CHECKPOINT)
