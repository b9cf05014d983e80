"""Ways to damage GGUF files: entries of other types, tensors of other sizes, counts that lie."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from fuzz_mutations import mutate_bytes

FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""The format's types of numbers; 8 is text and 9 a list."""

TEXT, LIST = 8, 9
HUGE = (0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)


def read_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in FORMATS:
        form = "<" + FORMATS[kind]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if kind == TEXT:
        (length,) = struct.unpack_from("<Q", data, at)
        return data[at + 8 : at + 8 + length], at + 8 + length
    inner, count = struct.unpack_from("<IQ", data, at)
    values, at = [], at + 12
    for _ in range(count):
        value, at = read_value(data, at, inner)
        values.append(value)
    return (inner, values), at


def value_bytes(kind: int, value: Any) -> bytes:
    """Return a value as the format writes it; bytes in the place of a list are its own."""
    if kind in FORMATS:
        form = FORMATS[kind]
        if form in "fd":
            return struct.pack("<" + form, value)
        if form == "?":
            return struct.pack("<B", int(value) & 0xFF)
        bits = 8 * struct.calcsize("<" + form)
        return (int(value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
    if isinstance(value, bytes) and kind != TEXT:
        return value
    if kind == TEXT:
        return struct.pack("<Q", len(value)) + value
    inner, values = value
    return struct.pack("<IQ", inner, len(values)) + b"".join(value_bytes(inner, v) for v in values)


def _odd_list(random: Random, inner: int, values: list[Any]) -> tuple[int, Any]:
    match random.randrange(8):
        case 0:
            return inner, values[: len(values) // 2]
        case 1 if values:
            return inner, [values[0]] * len(values)
        case 2 if values:
            return inner, values + values[-1:]
        case 3:
            return 4, [random.choice((0, 1, 2**31)) for _ in values]
        case 4 if values:
            values = list(values)
            odd: Any = random.choice((b"", b"\xff", b"\x00", b"a" * 9000, b"<0x41>"))
            values[random.randrange(len(values))] = odd if inner == TEXT else random.choice((0, 1))
            return inner, values
        case 5:
            return 6, [random.choice((0.0, float("nan"), -1e38, float("inf"))) for _ in values]
        case 6:
            return LIST, [(4, [1, 2]), (LIST, [(8, [b"a"])])]
        case _:
            return TEXT, [random.choice((b"", b"\xff", b"a b c", b"<0x41>")) for _ in values]


def odd_entry(random: Random, kind: int, value: Any) -> tuple[int, Any]:
    """Return another type and value for an entry."""
    if kind == LIST and random.random() < 0.7:
        return LIST, _odd_list(random, *value)
    if kind in FORMATS and random.random() < 0.4:
        # Another number of the same type, or the same number of another type.
        if FORMATS[kind] in "fd":
            return kind, random.choice((0.0, -1.0, 1e-38, 3e38, float("nan"), float("inf"), value))
        numbers = (0, 1, 2, 3, 7, 255, 2**31 - 1, 2**32 - 1, 2**63, -1, value + 1, value * 2)
        return random.choice((kind, 10, 11, 0)), random.choice(numbers)
    return random.choice(
        (
            (8, b"x"),
            (8, b"\xff\xfe"),
            (8, b""),
            (8, b"\x1b[2J"),
            (4, 0),
            (4, 2**32 - 1),
            (5, -1),
            (10, 2**63),
            (6, float("nan")),
            (6, 0.0),
            (6, -1e30),
            (7, 1),
            (7, 7),
            (9, (4, [])),
            (9, (6, [1.0, 2.0])),
            (9, (8, [b"a"])),
            (9, (9, [(9, [(4, [1])])])),
            (9, (9, [])),
            (9, (13, [])),
            (9, struct.pack("<IQ", 4, 2**60)),
            (9, struct.pack("<IQ", 9, 1) * 500 + struct.pack("<IQ", 4, 0)),
            (12, float("inf")),
            (4, 3),
            (11, -(2**63)),
            (8, b"{% for a in range(9**9) %}"),
        )
    )


ODD_KEYS = (
    (b"general.alignment", 4, 0),
    (b"general.alignment", 4, 1),
    (b"general.alignment", 4, 2**31),
    (b"general.alignment", 8, b"32"),
    (b"general.architecture", 8, b"nothing"),
    (b"general.architecture", 8, b"mamba"),
    (b"", 4, 1),
    (b"\xff", 4, 1),
    (b"x" * 70_000, 4, 1),
    (b"split.count", 2, 2),
    (b"tokenizer.ggml.pre", 8, b"nothing"),
    (b"tokenizer.chat_template", 8, b"{{ 9**9**9 }}"),
)
"""Entries that are put in, beside or instead of what is there."""


def _parts(data: bytes) -> tuple[int, list[list[Any]], list[list[Any]], bytes]:
    """Return a file's version, entries [key, type, value], tensors [name, shape, type, offset]."""
    version, tensors, count = struct.unpack_from("<IQQ", data, 4)
    at, entries = 24, []
    for _ in range(count):
        key, at = read_value(data, at, TEXT)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = read_value(data, at + 4, kind)
        entries.append([key, kind, value])
    infos = []
    for _ in range(tensors):
        name, at = read_value(data, at, TEXT)
        (rank,) = struct.unpack_from("<I", data, at)
        shape = list(struct.unpack_from(f"<{rank}Q", data, at + 4))
        infos.append([name, shape, *struct.unpack_from("<IQ", data, at + 4 + 8 * rank)])
        at += 4 + 8 * rank + 12
    return version, entries, infos, data[-(-at // 32) * 32 :]


def mutate_gguf(random: Random, data: bytes) -> bytes:
    """Return a GGUF file with bytes changed, or with a part of its header changed or gone."""
    if random.random() < 0.2:
        return mutate_bytes(random, data)
    version, entries, infos, body = _parts(data)
    counts = [len(infos), len(entries)]
    for _ in range(random.choice((1, 1, 1, 2))):
        number = random.randrange(len(entries))
        info = random.choice(infos)
        match random.randrange(12):
            case 0:
                del entries[number]
            case 1:
                entries.append(entries[number])
            case 2 | 3:
                shapes = ([], [0], info[1][::-1], [2**40, 2**40], [1, 1, 1, 1, 1], [2**63, 2])
                info[1] = random.choice((*shapes, [*info[1], 1], info[1][:1], [0, *info[1]]))
            case 4:
                codes = (0, 1, 2, 4, 5, 8, 24, 26, 28, 30, 36, 39, 40, 99, 2**31)
                info[2] = random.choice(codes)
            case 5:
                info[3] = random.choice(
                    (0, 1, 32, 2**40, 2**63, 2**64 - 32, random.choice(infos)[3])
                )
            case 6:
                names = (
                    random.choice(infos)[0],
                    b"",
                    b"\xff",
                    b"x" * 200,
                    b"blk.999.attn_q.weight",
                )
                info[0] = random.choice(names)
            case 7:
                entries.insert(number, list(random.choice(ODD_KEYS)))
            case 8 if random.random() < 0.5:
                version = random.choice((0, 1, 2, 4, 2**31, 2**32 - 1))
            case 8:
                infos.remove(info) if random.random() < 0.5 else infos.append(list(info))
            case _:
                entries[number][1:] = odd_entry(random, *entries[number][1:])
    if random.random() < 0.05:
        counts[random.randrange(2)] = random.choice(HUGE)
    else:
        counts = [len(infos), len(entries)]
    out = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for key, kind, value in entries:
        out += value_bytes(TEXT, key) + struct.pack("<I", kind) + value_bytes(kind, value)
    for name, shape, code, offset in infos:
        out += value_bytes(TEXT, name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", code, offset)
    return out + bytes(-len(out) % 32) + body
