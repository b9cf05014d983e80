"""Words of a printed program: names, literals, types, and lines that repeat.

`graphopt.ir.printer` writes with them what `graphopt.ir.parse` reads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import sympy
import torch

from graphopt.ir.algebra import FUNCTIONS
from graphopt.ir.graph import Param
from graphopt.ir.kv_policies import KVPolicy, policy_to_dict
from graphopt.ir.types import DTYPE_NAMES, SYMBOLS, Type

NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*", flags=re.ASCII)
"""A name that is written as it is: words with dots between them."""

RESERVED = frozenset(
    [
        "None", "True", "False", "inf", "nan", "device", "torch", "def", "run", "return", "at",
        "for", "in", "constant", "from", "placed", "packed", "param", "dtype",
        *SYMBOLS, *FUNCTIONS, *DTYPE_NAMES.values(),
    ]
)  # fmt: skip
"""Words that mean something else than the value or attribute of that name."""


def quoted(text: str) -> str:
    """Return a text in double quotes, in ASCII characters alone."""
    return json.dumps(text)


def name_text(name: str) -> str:
    """Return a name of a function, weight, state or path: quoted where it is no plain one."""
    plain = NAME.fullmatch(name) and name not in RESERVED
    return name if plain else quoted(name)


def value_text(name: str) -> str:
    """Return a name of a value: a word without dots, or quoted behind a percent sign."""
    plain = NAME.fullmatch(name) and "." not in name and name not in RESERVED
    return name if plain else f"%{quoted(name)}"


def format_attr(value: Any) -> str:
    """Return an attribute so that it reads back as what it is.

    What no program can be saved with is `unprintable("...")`, which does not read back.
    """
    if isinstance(value, Param):
        plain = NAME.fullmatch(value.name) and "." not in value.name and value.name not in RESERVED
        return value.name if plain else f"param({quoted(value.name)})"
    if value is None or isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value) or f"dtype({str(value).removeprefix('torch.')})"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, sympy.Expr):
        text = str(value).replace(" ", "")
        return f"1*{text}" if text.startswith("(") else text  # a bracket would begin a tuple
    if isinstance(value, Type):
        return str(value)
    if isinstance(value, tuple):
        items = ", ".join(map(format_attr, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, list):
        return f"[{', '.join(map(format_attr, value))}]"
    if isinstance(value, dict):
        items = ", ".join(f"{quoted(key)}: {format_attr(item)}" for key, item in value.items())
        return f"{{{items}}}"
    if isinstance(value, KVPolicy):
        return policy_text(value)
    return f"unprintable({quoted(repr(value))})"


def policy_text(policy: KVPolicy) -> str:
    """Return a policy as `policy("KIND", page=16, ...)`, which reads back without its weights."""
    kind, *fields = policy_to_dict(policy).items()
    given = [f"{name}={format_attr(value)}" for name, value in fields]
    return f"policy({', '.join([quoted(kind[1]), *given])})"


# Lines that repeat -------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")
_LONGEST_PERIOD = 128


def fold(lines: Sequence[str], indent: str = "    ") -> list[str]:
    """Return lines with repetitions as loops: what layers share is written once.

    Neighbouring runs of lines that are the same but for numbers which grow evenly become

        for i in range(START, END):
            line with {i}, {i+2} or {2*i+1} in the place of such a number

    which `unfold` takes apart again.
    """
    split = [_split(line) for line in lines]
    folded: list[str] = []
    place = 0
    while place < len(lines):
        period, count = _longest_repeat(split, place)
        if count < 2:
            folded.append(indent + lines[place])
            place += 1
            continue
        folded += _loop(split, place, period, count, indent)
        place += period * count
    return folded


def _split(line: str) -> tuple[list[str], list[int]] | None:
    """Return the text between the numbers of a line, and the numbers; None if it has a brace."""
    if "{" in line or "}" in line:
        return None
    numbers = [int(match.group()) for match in _NUMBER.finditer(line)]
    return _NUMBER.split(line), numbers


def _steps(a: Any, b: Any, most: int) -> list[int] | None:
    """Return by how much the numbers of a line grow from one turn to the next; None if it differs.

    A number grows by no more than the lines of a turn, as layers of several kinds do.
    """
    if a is None or b is None or a[0] != b[0]:
        return None
    steps = [new - old for old, new in zip(a[1], b[1], strict=True)]
    return steps if all(0 <= step <= most for step in steps) else None


def _longest_repeat(split: Sequence[Any], place: int) -> tuple[int, int]:
    """Return the period and the number of turns of the repetition that covers most lines."""
    best, covered = (1, 1), 1
    for period in range(1, min(_LONGEST_PERIOD, (len(split) - place) // 2) + 1):
        steps = [_steps(split[place + n], split[place + period + n], period) for n in range(period)]
        if any(step is None for step in steps) or not any(any(step or ()) for step in steps):
            continue
        count = 2
        while (end := place + period * count) + period <= len(split) and all(
            _steps(split[end + n - period], split[end + n], period) == steps[n]
            for n in range(period)
        ):
            count += 1
        # A loop takes a line of its own.
        if period * count > max(covered, period + 1):
            best, covered = (period, count), period * count
    return best


def _loop(split: Sequence[Any], place: int, period: int, count: int, indent: str) -> list[str]:
    steps = [
        _steps(split[place + n], split[place + period + n], period) or [] for n in range(period)
    ]
    starts = [
        number
        for n in range(period)
        for number, step in zip(split[place + n][1], steps[n], strict=True)
        if step == 1
    ]
    start = max(dict.fromkeys(starts), key=starts.count) if starts else 0
    bounds = f"{count}" if start == 0 else f"{start}, {start + count}"
    lines = [f"{indent}for i in range({bounds}):"]
    for n in range(period):
        texts, numbers = split[place + n]
        line = texts[0]
        for number, step, text in zip(numbers, steps[n], texts[1:], strict=True):
            shift = number - step * start
            turn = f"{'' if step == 1 else f'{step}*'}i{f'{shift:+d}' if shift else ''}"
            line += (f"{{{turn}}}" if step else str(number)) + text
        lines.append(f"{indent}    {line}")
    return lines


_LOOP = re.compile(r"for i in range\((?:(\d{1,9}), )?(\d{1,9})\):")
_TURN = re.compile(r"\{(?:(\d{1,9})\*)?i([+-]\d{1,9})?\}")
MAX_LINES = 2_000_000
"""Lines of a whole text; 126 layers with a hundred weights each have a hundredth of it."""


def _at_turn(turn: int, match: re.Match[str]) -> str:
    return str(int(match[1] or 1) * turn + int(match[2] or 0))


def unfold(lines: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the lines (number, text) of a section with loops written out.

    Raises:
        ValueError: A loop is none that `fold` makes; the arguments are a message and the number
            of the line.
    """
    found: list[tuple[int, str]] = []
    turns: range | None = None
    body: list[tuple[int, str]] = []

    def finish() -> None:
        nonlocal turns, body
        if turns is not None and len(turns) * len(body) + len(found) > MAX_LINES:
            raise ValueError("a loop of fewer turns", body[0][0] if body else 0)
        for turn in turns or ():
            for number, text in body:
                found.append((number, _TURN.sub(partial(_at_turn, turn), text)))
        turns, body = None, []

    for number, text in lines:
        if turns is not None and text.startswith("        "):
            body.append((number, text))
            continue
        finish()
        if text.strip().startswith("for "):
            match = _LOOP.fullmatch(text.strip())
            if match is None:
                raise ValueError("for i in range(START, END):", number)
            turns = range(int(match[1] or 0), int(match[2]))
        else:
            found.append((number, text))
    finish()
    return found
