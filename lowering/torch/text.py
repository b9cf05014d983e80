"""Pieces of Python text: names, literals, sizes, lists, and lines that are not too long."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection, Iterator, Sequence

import sympy
import torch
from torch import nn

from graphopt.ir import functional
from graphopt.ir.graph import unique_name
from graphopt.ir.types import SYMBOLS

WIDTH = 100
"""Characters a line may have."""

ANSWERS_COLLECTED = """        for row, token in enumerate(tokens):
            ended[row] |= token in stop
            if not ended[row]:
                answers[row].append(token)
        if all(ended):
            break
    return answers if several else answers[0]
"""
"""How `generate` ends: answers take each step's `tokens` in front of those of `stop`."""

HELPERS = tuple(
    name
    for name, item in vars(functional).items()
    if getattr(item, "__module__", None) == functional.__name__
)
"""The functions of the runtime, in the order of their file."""

# What a local name must not hide: whatever the text around it may mention.
_GLOBALS = (
    "self", "torch", "nn", "F", "Tensor", "KV", "Any", "aten", "under", "pack", "weights",
    "agreed", "at", "all_gather", "all_reduce", "dist", "ranks", "reduce_scatter",
)  # fmt: skip
_SIZES = ("B", "S", "P", "device", "pictures")
RESERVED = frozenset([*dir(builtins), *keyword.kwlist, *HELPERS, *_GLOBALS, *_SIZES])
# What an attribute of a module must not replace.
ATTRIBUTES = frozenset([*dir(nn.Module()), *keyword.kwlist])


def identifier(name: str, taken: Collection[str]) -> str:
    """Return `name` as a Python name that is not reserved, nor in `taken`.

    What Python does not allow in a name becomes an underscore. A reserved name gets one at its
    end, a taken one a number.
    """
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    plain = re.sub(r"__+", "_", plain).lstrip("_") or "value"
    if plain[0].isdigit():
        plain = f"n{plain}"
    if plain in RESERVED:
        plain += "_"
    return unique_name(plain, set(taken))


def class_name(name: str, taken: Collection[str]) -> str:
    """Return `name` in CamelCase, with a number where that is in `taken`."""
    words = re.split(r"[\W_]+", name, flags=re.ASCII)
    camel = "".join(word[:1].upper() + word[1:] for word in words) or "Part"
    camel = camel if camel[0].isalpha() else f"Part{camel}"
    number, result = 1, camel
    while result in taken or result in RESERVED:
        result, number = f"{camel}{number}", number + 1
    return result


def attribute_names(slots: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Return a short attribute name for every weight slot.

    The shortest end of the dotted name that no other slot has; `.weight` is left out.
    """
    stems = {slot: slot.removesuffix(".weight").split(".") for slot in slots}

    def ends(parts: list[str]) -> Iterator[str]:
        # A lone "bias" says too little.
        least = 2 if parts[-1] in ("bias", "weight") else 1
        for count in range(min(least, len(parts)), len(parts) + 1):
            yield "_".join(parts[-count:])

    counts: dict[str, int] = {}
    for parts in stems.values():
        for end in ends(parts):
            counts[end] = counts.get(end, 0) + 1
    names: dict[str, str] = {}
    used = {*taken, *ATTRIBUTES}
    for slot, parts in stems.items():
        short = [end for end in ends(parts) if counts[end] == 1 and end[:1].isalpha()]
        wanted = identifier(short[0] if short else slot, ())
        names[slot] = unique_name(f"{wanted}_" if wanted in ATTRIBUTES else wanted, used)
        used.add(names[slot])
    return names


def joint_name(names: Sequence[str], taken: Collection[str]) -> str:
    """Return a name for several attributes in one: `gate_up_proj` for `gate_proj`, `up_proj`."""
    words = [name.split("_") for name in names]
    common = 0
    while all(len(w) > common + 1 and w[-common - 1] == words[0][-common - 1] for w in words):
        common += 1
    end = words[0][len(words[0]) - common :]
    parts = [word for w in words for word in w[: len(w) - common]]
    name = "_".join(dict.fromkeys(parts)) if common else "_".join(names)
    return unique_name("_".join([name, *end]), {*taken, *ATTRIBUTES})


def sizes_of(packed: str) -> str:
    """Return the attribute with the sizes of what lies in another one."""
    return f"{packed}_sizes"


def quoted(text: str) -> str:
    """Return a string literal in double quotes, of ASCII characters alone."""
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'


def prose(text: str) -> str:
    """Return text that comes from outside so that it can stand in a docstring and not end it."""
    return re.sub(r"[^ !#-\[\]-~]", "?", text)


def literal(value: object) -> str:
    """Return a plain value as Python text that reads back exactly.

    Raises:
        ValueError: It is of a type that has no such text.
    """
    if value is None or isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        text = repr(value).replace("e+", "e")
        return text if text[-1].isdigit() else f'float("{text}")'
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    raise ValueError(f"a value of type {type(value).__name__} cannot be written")


def size_text(size: object) -> str:
    """Return a size in B, S and P as whole-number arithmetic.

    Raises:
        ValueError: It holds something else than sums, products, quotients, floors, remainders,
            minima and maxima.
    """
    return _size(sympy.sympify(size))[0]


_SUM, _PRODUCT, _ATOM = 1, 2, 3


def _size(size: sympy.Expr) -> tuple[str, int]:
    """Return text and how tightly it binds."""
    if size.is_Integer:
        return str(size), _ATOM if size >= 0 else _SUM
    if size.is_Symbol and size.name in SYMBOLS:
        return size.name, _ATOM
    numerator, denominator = sympy.fraction(sympy.together(size))
    if denominator != 1:
        return f"{_bound(numerator, _PRODUCT)} // {_bound(denominator, _ATOM)}", _PRODUCT
    if isinstance(size, sympy.floor):
        return _size(size.args[0])
    if isinstance(size, sympy.ceiling):
        text, _ = _size(-size.args[0])
        return f"-({text})", _SUM
    if isinstance(size, sympy.Mod):
        return f"{_bound(size.args[0], _PRODUCT)} % {_bound(size.args[1], _ATOM)}", _PRODUCT
    if isinstance(size, sympy.Max | sympy.Min):
        items = ", ".join(_size(item)[0] for item in sorted(size.args, key=str))
        return f"{type(size).__name__.lower()}({items})", _ATOM
    if size.is_Add:
        first, *others = size.as_ordered_terms()
        text = _bound(first, _SUM)
        for term in others:
            negative = term.could_extract_minus_sign()
            text += f" - {_bound(-term, _PRODUCT)}" if negative else f" + {_bound(term, _SUM)}"
        return text, _SUM
    if size.is_Mul:
        return " * ".join(_bound(item, _ATOM) for item in size.as_ordered_factors()), _PRODUCT
    if size.is_Pow and size.exp.is_Integer and size.exp > 0:
        return f"{_bound(size.base, _ATOM)} ** {size.exp}", _PRODUCT
    raise ValueError(f"the size {size} cannot be written as whole-number arithmetic")


def _bound(size: sympy.Expr, least: int) -> str:
    text, binds = _size(size)
    return text if binds >= least else f"({text})"


def series(items: Sequence[str]) -> str:
    """Return a list as short as repetition makes it: `[a, b] * 3 + [a]`."""
    candidates = [_short(items)]
    for period in range(1, len(items) // 2 + 1):
        if all(items[i] == items[i - period] for i in range(period, len(items))):
            count, rest = divmod(len(items), period)
            head = _short(items[:period])
            head = f"({head})" if "]" in head[:-1] else head
            tail = f" + {_short(items[-rest:])}" if rest else ""
            candidates.append(f"{head} * {count}{tail}")
    return min(candidates, key=len)


def _short(items: Sequence[str]) -> str:
    return min(f"[{', '.join(items)}]", _runs(items), key=len)


def _runs(items: Sequence[str]) -> str:
    """Return a list with neighbours that are equal written once: `[a] * 3 + [b, c]`."""
    parts: list[tuple[list[str], int]] = []
    for item in items:
        if parts and parts[-1][0] == [item]:
            parts[-1] = ([item], parts[-1][1] + 1)
        else:
            parts.append(([item], 1))
    merged: list[tuple[list[str], int]] = []
    for values, count in parts:
        if count == 1 and merged and merged[-1][1] == 1:
            merged[-1][0].extend(values)
        else:
            merged.append((list(values), count))
    texts = [f"[{', '.join(v)}]" + (f" * {n}" if n > 1 else "") for v, n in merged]
    return " + ".join(texts)


def numbers(values: Sequence[int]) -> str:
    """Return something to iterate over that gives `values`: `range(4)`, `[0, *range(5, 12)]`."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    if len(runs) == 1:
        return _range(runs[0])
    items: list[str] = []
    for run in runs:
        items += [f"*{_range(run)}"] if len(run) > 3 else [str(value) for value in run]
    return f"[{', '.join(items)}]"


def _range(run: list[int]) -> str:
    start = f"{run[0]}, " if run[0] else ""
    return f"range({start}{run[-1] + 1})"


def wrap(text: str, indent: int, nested: bool = False) -> list[str]:
    """Return a statement as lines of at most `WIDTH`, broken inside its last brackets.

    Args:
        nested: It stands in brackets, so that it may also be broken before an operator.
    """
    pad = " " * indent
    group = _last_brackets(text)
    if indent + len(text) <= WIDTH or group is None:
        return [pad + text]
    if nested:
        left, *right = _split(text, "|")
        if right:
            return [pad + left, *(line for part in right for line in wrap(f"| {part}", indent))]
    start, end = group
    body = text[start + 1 : end]
    items = _split(body, ",")
    # A list, dict or set has its items one to a line; what is called may have them on one.
    display = text[start] in "[{" and not re.search(r"[\w)\]]$", text[:start])
    if indent + 4 + len(body) <= WIDTH and not (display and len(items) > 1):
        inner = [f"{pad}    {body}"]
    elif len(items) == 1 and not display:
        inner = wrap(body, indent + 4, nested=True)
    else:
        inner = [line for item in items for line in wrap(f"{item},", indent + 4, nested=True)]
    return [pad + text[: start + 1], *inner, pad + text[end:]]


def wrap_def(name: str, params: Sequence[str], returns: str, indent: int) -> list[str]:
    """Return the head of a function as lines of at most `WIDTH`."""
    pad, inside = " " * indent, ", ".join(params)
    whole = f"{pad}def {name}({inside}) -> {returns}:"
    if len(whole) <= WIDTH:
        return [whole]
    rows = [inside] if indent + 4 + len(inside) <= WIDTH else [f"{param}," for param in params]
    return [f"{pad}def {name}(", *(f"{pad}    {row}" for row in rows), f"{pad}) -> {returns}:"]


def _last_brackets(text: str) -> tuple[int, int] | None:
    """Return where the last outermost brackets with something in them open and close."""
    found: tuple[int, int] | None = None
    depth, start = 0, 0
    for index, character in _code(text):
        if character in "([{":
            start = index if depth == 0 else start
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0 and index > start + 1:
                found = (start, index)
    return found


def _split(text: str, sign: str) -> list[str]:
    """Return the parts of `text` between its outermost commas, or another sign."""
    parts, depth, start = [], 0, 0
    for index, character in _code(text):
        depth += (character in "([{") - (character in ")]}")
        if character == sign and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def _code(text: str) -> Iterator[tuple[int, str]]:
    """Yield the characters of `text` that are not in a string literal, with their places."""
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|.', text):
        if len(match.group()) == 1:
            yield match.start(), match.group()
