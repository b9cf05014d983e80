"""Reading what users' folders hold: bounded, of regular files, and parsed by a schema.

Everything that did not come with graphopt passes through here: configs, headers, saved programs,
reports, recipes and texts. A file is opened only where it is a regular one, read only up to a
limit, and parsed only to a bounded depth and size of numbers; and what was parsed is checked
against a schema before code looks into it. Whatever is wrong is one sentence that names the file,
the place in it and what to do.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from graphopt.errors import GraphoptError, SourceError
from graphopt.support.near_paths import path_remedy
from graphopt.support.plain import shown

MAX_TEXT_BYTES = 128 * 2**20
"""The largest text to calibrate with or to measure on: a hundred times WikiText-2."""

MAX_JSON_BYTES = 64 * 2**20
"""The largest JSON file: twice the largest tokenizer known."""

MAX_DEPTH = 64
"""How deep lists and objects may be nested; code that walks them recurses as deep."""

MAX_VALUES = 2_000_000
"""How many values one JSON file may hold; a schema that all of them break keeps an error each."""

MAX_DIGITS = 40
"""The most digits of a whole number. Tokenizers state 1e30 for "no limit"; sizes have bounds."""

Error = type[GraphoptError]
Model = TypeVar("Model", bound=pydantic.BaseModel)
Item = TypeVar("Item")

Size = Annotated[int, pydantic.Field(ge=0, le=2**48)]
"""A size, offset or count of anything in a file: no model comes near the bound."""


class Schema(pydantic.BaseModel):
    """Base of what files are parsed by: no value is converted, and no unknown entry passes."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="forbid", protected_namespaces=()
    )


class OpenSchema(Schema):
    """A schema of the entries that graphopt reads, among others that it does not know."""

    model_config = pydantic.ConfigDict(extra="ignore")


def shown_path(path: str | Path) -> str:
    """Return a path as text that can be printed, also where its bytes are no text."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "no regular file"


@contextlib.contextmanager
def open_regular(path: Path, *, error: Error = SourceError) -> Iterator[io.FileIO]:
    """Open a regular file for reading, unbuffered.

    A pipe would hang whoever opens it, a device may never end, and opening either can have
    effects; so what is no regular file is refused before and after it is opened.

    Raises:
        error: It is missing, may not be read, or is no regular file.
    """
    path = Path(path)
    try:
        _check_regular(path, path.stat().st_mode, error)
        # Should a pipe have taken its place since, opening must not wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = io.FileIO(os.open(path, flags))
    except (OSError, ValueError) as problem:
        # A name with a zero byte in it is a ValueError.
        reason = getattr(problem, "strerror", None) or problem
        raise error(
            f"{shown_path(path)} cannot be read: {reason}.", path_remedy(path, problem)
        ) from problem
    with file:
        try:
            _check_regular(path, os.fstat(file.fileno()).st_mode, error)
            yield file
        except OSError as problem:
            raise error(
                f"{shown_path(path)} cannot be read: {problem.strerror or problem}.",
                path_remedy(path, problem),
            ) from problem


def _check_regular(path: Path, mode: int, error: Error) -> None:
    if not stat.S_ISREG(mode):
        raise error(f"{shown_path(path)} is {_kind(mode)}.", "Give a regular file.")


def read_bytes(path: Path, limit: int, *, error: Error = SourceError) -> bytes:
    """Return the content of a regular file.

    Raises:
        error: It cannot be read, is no regular file, or has more than `limit` bytes.
    """
    with open_regular(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        parts: list[bytes] = []
        left = limit + 1
        # The size may be wrong (files of /proc state none) or change while it is read.
        while size <= limit and left > 0 and (part := file.read(min(left, 2**24))):
            parts.append(part)
            left -= len(part)
    if size > limit or left <= 0:
        raise error(
            f"{shown_path(path)} has {max(size, limit + 1)} bytes, and graphopt reads at most "
            f"{limit} of such a file.",
            "Check that it is the right one, or give a shorter one.",
        )
    return b"".join(parts)


def read_utf8(path: Path, limit: int = MAX_TEXT_BYTES, *, error: Error = SourceError) -> str:
    """Return the content of a regular file that is UTF-8 text.

    Raises:
        error: See `read_bytes`; or it is not UTF-8.
    """
    data = read_bytes(path, limit, error=error)
    return _decode(data, shown_path(path), "Convert it to UTF-8.", error)


def _decode(data: bytes, where: str, remedy: str, error: Error) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{where} is not UTF-8 text: byte {problem.start} is {data[problem.start]:#04x}.",
            remedy,
        ) from problem


class RefusedText(ValueError):
    """What a hook of a parser refuses; the text says it."""


def whole_number(text: str) -> int:
    """Return the integer of a text.

    Raises:
        RefusedText: It has more digits than any size needs.
    """
    digits = len(text.lstrip("+-"))
    if digits > MAX_DIGITS:
        raise RefusedText(f"the number {text[:12]}... has {digits} digits")
    return int(text)


def finite_number(text: str) -> float:
    """Return the number of a text.

    Raises:
        RefusedText: It is beyond the largest float.
    """
    value = float(text)
    if math.isinf(value):
        raise RefusedText(f"the number {text[:20]} is too large")
    return value


_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _entries(pairs: list[tuple[str, Any]]) -> Any:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RefusedText(f"the key {shown(key)} occurs twice in one object")
            seen.add(key)
    if len(pairs) == 1 and pairs[0][0] == "__float__" and isinstance(pairs[0][1], str):
        # transformers writes floats that JSON has no word for in this way.
        if pairs[0][1] not in _SPECIAL_FLOATS:
            raise RefusedText(f'{{"__float__": {shown(pairs[0][1])}}} is no number')
        return _SPECIAL_FLOATS[pairs[0][1]]
    return result


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(
    data: bytes,
    where: str,
    *,
    remedy: str = "Download it again.",
    max_values: int = MAX_VALUES,
    error: Error = SourceError,
    one_line: bool = False,
) -> Any:
    """Return the value of a JSON text.

    Numbers that JSON has no word for are read as transformers writes them: `NaN`, `Infinity`, or
    `{"__float__": "Infinity"}`.

    Args:
        data: UTF-8 text.
        where: What error messages call it, such as its file name.
        remedy: What to do where it is malformed.
        max_values: How many values it may hold.
        one_line: Whether it is a line of a file, whose number `where` has.

    Raises:
        error: It is not UTF-8 or not JSON; an object has a key twice; a text holds half a
            surrogate pair; or it is nested too deeply, has a number too large or too many values.
    """
    text = _decode(data, where, remedy, error)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_entries,
            parse_int=whole_number,
            parse_float=finite_number,
        )
    except json.JSONDecodeError as problem:
        line = "" if one_line else f", line {problem.lineno}"
        raise error(
            f"{where}{line}, column {problem.colno}, is not valid JSON: {problem.msg}.", remedy
        ) from problem
    except RefusedText as problem:
        raise error(f"{where} is malformed: {problem}.", remedy) from problem
    except RecursionError as problem:
        raise error(f"{where} is nested deeper than {MAX_DEPTH} levels.", remedy) from problem
    structure = _STRING.sub(b"", data).translate(None, _NO_STRUCTURE)
    count = structure.count(b",") + structure.count(b"[") + structure.count(b"{")
    if count > max_values:
        raise error(f"{where} holds {count} values, more than {max_values}.", remedy)
    brackets = structure.translate(bytes.maketrans(b"{}", b"[]"), b",")
    for _ in range(MAX_DEPTH):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"")  # the innermost ones
    if brackets:
        raise error(f"{where} is nested deeper than {MAX_DEPTH} levels.", remedy)
    if _ESCAPED_SURROGATE.search(data):
        refuse_surrogates(value, where, remedy, error)
    return value


def refuse_surrogates(value: Any, where: str, remedy: str, error: Error) -> None:
    """Refuse texts with half a surrogate pair, which can neither be printed nor written."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                plain = item.encode("ascii", errors="backslashreplace").decode()
                raise error(f"{where}: the text {shown(plain)} is not valid Unicode.", remedy)
        elif isinstance(item, dict):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list):
            left += item


def read_json(
    path: Path,
    *,
    limit: int = MAX_JSON_BYTES,
    remedy: str = "Download it again.",
    max_values: int = MAX_VALUES,
    error: Error = SourceError,
) -> Any:
    """Return the value in a JSON file; see `parse_json`.

    Raises:
        error: See `read_bytes` and `parse_json`.
    """
    data = read_bytes(path, limit, error=error)
    return parse_json(data, shown_path(path), remedy=remedy, max_values=max_values, error=error)


def _as_clause(found: re.Match[str]) -> str:
    return "it should" if found[0].endswith("should") else ""


def parse(
    schema: type[Model],
    data: Any,
    where: str,
    *,
    prefix: str = "",
    remedy: str = "Download it again.",
    error: Error = SourceError,
) -> Model:
    """Return JSON or YAML data as an object of `schema`.

    Args:
        where: What error messages call it, such as its file name.
        prefix: What the names of entries begin with in the file, and not in `data`.

    Raises:
        error: Naming the first entry that does not fit, what it is and what it should be.
    """
    try:
        return schema.model_validate(data)
    except pydantic.ValidationError as problem:
        raise misfit(problem, where, prefix=prefix, remedy=remedy, error=error) from problem


def parse_entry(
    schema: pydantic.TypeAdapter[Item],
    data: Any,
    where: str,
    *,
    remedy: str = "Download it again.",
    error: Error = SourceError,
) -> Item:
    """Return JSON data as an object of a dataclass or another type; see `parse`."""
    try:
        return schema.validate_python(data)
    except pydantic.ValidationError as problem:
        raise misfit(problem, where, remedy=remedy, error=error) from problem


def misfit(
    problem: pydantic.ValidationError,
    where: str,
    *,
    prefix: str = "",
    remedy: str,
    error: Error = SourceError,
) -> GraphoptError:
    """Return the error for data that do not fit a schema: the first entry, and what it should be.

    Args:
        where, prefix: See `parse`.
    """
    first = problem.errors(include_url=False, include_context=False)[0]
    # What is wrong, in pydantic's words: "Input should be a valid integer", "Field required".
    said = re.sub(r"^(Value error, |\w+ should)", _as_clause, first["msg"])
    place = ".".join(str(part) for part in first["loc"])
    entry = f": the entry {shown(prefix + place)}" if place else ""
    if first["type"] == "missing":
        return error(f"{where}{entry} is missing.", remedy)
    if first["type"] == "extra_forbidden":
        said = "no such entry is known"
    return error(f"{where}{entry} is {shown(first['input'])}, and {said}.", remedy)
