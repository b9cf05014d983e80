"""Ways to damage input files, by format; `tools/fuzz_inputs.py` throws the results at commands.

Every mutator takes a random generator and the content of a good file and returns a bad one (or
one that is good by accident). They go by the kinds of damage that files have: a byte, an entry of
another type, a size that nothing has, a structure without end.
"""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

ODD_VALUES: list[Any] = [
    0,
    -1,
    -2,
    1,
    3,
    7,
    255,
    65_537,
    10**5,
    2**31 - 1,
    2**31,
    2**53,
    2**63,
    2**64,
    2**70,
    10**39,
    0.0,
    -0.5,
    0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    False,
    None,
    "",
    " ",
    "0",
    "yes",
    "none",
    "null",
    "float99",
    "../../../etc/passwd",
    "/dev/zero",
    "x" * 5000,
    "\x1b[2J\x07",
    "a\x00b",
    "\u202e",
    "\ud800",
    "a\udfffb",
    "é中\U0001f600",
    "{{ 1 }}",
    "eager",
    "cuda",
    "os.system",
    "__class__",
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": {}},
    {"": 0},
    [2**70],
    [-1],
    {"__float__": "Infinity"},
    {"__float__": "x"},
    {"__float__": 1},
    {"\ud800": 0},
    ["float32"],
    [0.5, float("nan")],
    ["\x1b[2J"],
    [[[[[[[[[[]]]]]]]]]],
    [0] * 600,
    {str(number): number for number in range(600)},
    "2024-01-01",
]
"""What an entry may hold that it should not."""


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places of all entries in JSON data, but for the root."""
    found: list[tuple[Any, ...]] = []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:40])
    for key, item in items:
        found += [(*at, key), *paths(item, (*at, key))]
    return found


_ODD_KEYS = ("auto_map", "x", "", "rope_scaling", "text_config", "\ud800", "x" * 9000, "__class__")


def mutate_json(random: Random, data: Any) -> Any:
    """Return a copy of JSON data with one to three entries changed."""
    data = copy.deepcopy(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = paths(data)
        if not places:
            return random.choice(ODD_VALUES)
        # Entries near the root say more than those of long lists.
        several = random.choice((1, 3))
        place = min(random.sample(places, min(several, len(places))), key=len)
        holder = data
        for key in place[:-1]:
            holder = holder[key]
        key, old = place[-1], holder[place[-1]]
        match random.randrange(9):
            case 0:
                del holder[key]
            case 1 if isinstance(old, int | float) and not isinstance(old, bool):
                holder[key] = random.choice((old + 1, -old, old * 2, old * 10**6, old / 2, old**5))
            case 1 | 2 if isinstance(old, list) and old:
                holder[key] = random.choice((old[1:], old * 2, old[::-1], old[0], old * 1000))
            case 2 if isinstance(old, bool):
                holder[key] = not old
            case 2 if isinstance(old, dict):
                holder[key] = list(old.items())
            case 3 if isinstance(holder, dict):
                holder[random.choice(_ODD_KEYS)] = old
            case 4:
                other = random.choice(places)
                value = data
                for step in other:
                    try:
                        value = value[step]
                    except (KeyError, IndexError, TypeError):
                        break
                holder[key] = copy.deepcopy(value)
            case 5:
                holder[key] = [old]
            case 6 if isinstance(old, str):
                cut = random.randrange(len(old) + 1)
                holder[key] = old[:cut] + random.choice(("", "\x7f", "é", "/", "." * 3)) + old[cut:]
            case _:
                holder[key] = copy.deepcopy(random.choice(ODD_VALUES))
    return data


def json_text(data: Any) -> bytes:
    return json.dumps(data).encode()


def mutate_text(random: Random, text: bytes) -> bytes:
    """Return a text file damaged as text, whatever its format."""
    at = random.randrange(len(text) + 1)
    insert = random.choice(
        (
            b"\x00",
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"\\ud800",
            b"\xef\xbb\xbf",
            b"\x1b[31m",
            b"{",
            b"]",
            b'"',
            b",",
            b"9" * 5000,
            b"1e999",
            b"\n",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"-",
            b"&a ",
            b"*a",
            b"!!python/object/apply:os.system [ls]",
            b"NaN",
            b"\t",
            b"\r",
            b"#",
            b":",
        )
    )
    match random.randrange(7):
        case 0:
            return text[:at]
        case 1:
            return text.decode("utf-8", errors="replace").encode("utf-16")
        case 2:
            return text[:at] + text
        case 3 if b'"' in text:  # an object with a key twice, or a text where none belongs
            first = text.index(b'"')
            return text[:first] + b'"a": 1, "a": 2, ' + text[first:]
        case _:
            return text[:at] + insert + text[at + random.choice((0, 1, 5)) :]


def mutate_plain(random: Random, text: bytes) -> bytes:
    """Return a text to calibrate with or to measure on that is none, or is much."""
    return random.choice(
        (
            b"",
            b"a",
            b"the",
            b" ",
            b"\n" * 5000,
            b"\xef\xbb\xbf",
            b"<end>" * 400,
            bytes(4000),
            random.randbytes(4000),
            text.decode().encode("utf-16"),
            text[:2000].replace(b"a", b"\xff"),
            b"the cat " * 40_000,
            b"x" * 300_000,
            "\U0001f600\u202e".encode() * 2000,
            b"\x1b[2J" * 900,
            mutate_text(random, text),
        )
    )


def mutate_json_file(random: Random, text: bytes) -> bytes:
    if random.random() < 0.25:
        return mutate_text(random, text)
    if random.random() < 0.04:
        deep = random.choice((50, 70, 900, 100_000))
        return b'{"model_type": "llama", "x": ' + b"[" * deep + b"]" * deep + b"}"
    return json_text(mutate_json(random, json.loads(text)))


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Return a binary file with bytes changed, mostly near its beginning."""
    reach = min(len(data), random.choice((16, 200, 5000, len(data)))) or 1
    at = random.randrange(reach)
    value = bytearray(data)
    match random.randrange(6):
        case 0:
            return data[: random.randrange(len(data) + 1)]
        case 1:
            return data + bytes(random.choice((1, 8, 5000)))
        case 2:
            value[at : at + 8] = struct.pack(
                "<Q", random.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
            )
        case 3:
            value[at : at + 4] = random.randbytes(4)
        case 4:
            del value[at : at + random.choice((1, 4, 100))]
        case _:
            for _ in range(random.choice((1, 3, 20))):
                value[random.randrange(reach)] ^= 1 << random.randrange(8)
    return bytes(value)


_CODES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U64",
    "BOOL",
    "C64",
    "f32",
    "",
    3,
    None,
)
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4}


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """Return a safetensors file whose header or bytes are damaged, or whose tensors are others."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    match random.randrange(7):
        case 0:
            return mutate_bytes(random, data)
        case 5:  # bytes that lie elsewhere, overlap, or are none
            places = header[random.choice(names)]["data_offsets"]
            other = header[random.choice(names)]["data_offsets"]
            far = random.choice(
                (0, -1, -8, 4, 2**31, 2**63, 2**64, 2**70, len(body), len(body) + 8)
            )
            places[:] = random.choice(
                (
                    other,
                    places[::-1],
                    [far, far],
                    [0, far],
                    [p + far for p in places],
                    [],
                    places[:1],
                )
            )
            text = json_text(header)
            if random.random() < 0.2:
                return struct.pack("<Q", random.choice((0, 2, 2**40, 2**63, 2**64 - 1))) + text
        case 1:
            text = mutate_json_file(random, data[8 : 8 + length].strip())
        case 2:  # a tensor, or all, in another dtype, in a file that is right
            code = random.choice(_CODES[:17])
            width = _WIDTHS.get(str(code), 2 if "16" in str(code) else 1)
            chosen = set(names if random.random() < 0.5 else [random.choice(names)])
            parts: list[bytes] = []
            end = 0
            for name in sorted(names, key=lambda n: header[n]["data_offsets"]):
                start, stop = header[name]["data_offsets"]
                part = body[start:stop]
                if name in chosen:
                    count = 1
                    for size in header[name]["shape"]:
                        count *= size
                    part = random.randbytes(count * width)
                    header[name]["dtype"] = code
                header[name]["data_offsets"] = [end, end + len(part)]
                end += len(part)
                parts.append(part)
            text, body = json_text(header), b"".join(parts)
        case 3:  # a tensor of another shape with as many elements, or a scalar
            name = random.choice(names)
            shape = header[name]["shape"]
            header[name]["shape"] = random.choice((shape[::-1], [1, *shape], [*shape, 1], [], [0]))
            text = json_text(header)
        case 4:  # two tensors change names, or one gets another's
            a, b = random.choice(names), random.choice(names)
            renamed = {a: b, b: a} if random.random() < 0.5 else {a: a + random.choice("x.0")}
            text = json_text({renamed.get(name, name): entry for name, entry in header.items()})
        case _:  # values that no weight has
            text, cut = data[8 : 8 + length], random.randrange(0, len(body) - 8, 4)
            bad = random.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
            body = body[:cut] + bad + body[cut + 4 :]
    if random.random() < 0.7:
        # As long as it was, so that every tensor lies where other files say.
        with contextlib.suppress(ValueError, RecursionError):
            text = json.dumps(json.loads(text), separators=(",", ":")).encode()
        text = text.ljust(length)
    return struct.pack("<Q", len(text)) + text + body


TEMPLATES = [
    "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 9**9**9 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include 'x' %}",
    "{% for m in messages %}{{ m.content }",
    "{{ messages[7].content }}",
    "{{ raise_exception('no') }}",
    "{{ undefined.thing.other }}",
    "\x1b[2J{{ messages[0].content }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ messages | map(attribute='content') | join | center(10**9) }}",
    "{" * 10_000,
    "{{ " + "(" * 5000,
    "{{ range(10**9) | list | length }}",
    "",
    "plain",
    "{% set x = cycler %}{{ x }}",
    "\ufeff{{ 1 }}",
]
"""Chat templates that fail, never end, or fill the memory."""

RECIPES = [
    "version: 1\npasses: [canonicalise, dead-code-elimination]\n",
    "version: 1\npasses:\n- canonicalise\n- prune-blocks: {blocks: 1}\n- insert-kv-cache\n",
    "version: 1\npasses:\n- fuse-blocks: {steps: 1}\n",
    "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\npasses: [*b,*b]\n",
    "version: 2024-01-01\npasses: []\n",
    "version: 0x1\npasses: []\n",
    "passes: 1:30\n",
    "passes: [prune-blocks: {ratio: .nan}]\n",
    "passes: [prune-blocks: {ratio: 1e400}]\n",
    "passes: [prune-blocks: {ratio: 2024-13-45}]\n",
    "passes: !!set {a}\n",
    "passes: [{1: 2}]\n",
    "? [a]\n: b\n",
    "<<: {passes: []}\n",
    "passes: [prune-blocks: {blocks: 99999999999999999999}]\n",
    "passes: [prune-blocks: {ratio: -1}]\n",
    "passes: [prune-blocks: {ratio: []}]\n",
    "passes: [prune-blocks: {remove: [0, 0]}]\n",
    "passes: [~]\n",
    "--- 1\n--- 2\n",
    "%YAML 3.7\n---\n",
    'passes: ["\\U00110000"]\n',
    'passes: ["\\ud800"]\n',
    "passes:\n" + "- " * 3000 + "x\n",
]

Mutator = Callable[[Random, bytes], bytes]


def mutate_template(random: Random, text: bytes) -> bytes:
    if random.random() < 0.7:
        return random.choice(TEMPLATES).encode()
    return mutate_text(random, text)


def mutate_yaml(random: Random, text: bytes) -> bytes:
    chosen = random.choice(RECIPES).encode()
    return mutate_text(random, chosen) if random.random() < 0.5 else chosen
