"""Bounded reads: what is no regular file, too large, too deep or not of the schema is refused."""

from __future__ import annotations

import json
import math
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import SourceError, UsageError
from graphopt.support import inputs
from graphopt.support.yaml_text import parse_yaml

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1), inner),
)  # fmt: skip


def refuse_json(text, match):
    with pytest.raises(SourceError, match=match) as caught:
        inputs.parse_json(text.encode("utf-8", errors="surrogatepass"), "file")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@settings(max_examples=30)
@given(JSON_VALUES)
def test_json_is_read_as_json(value):
    text = json.dumps(value)
    if "\\ud" not in text:
        assert inputs.parse_json(text.encode(), "file") == json.loads(text)


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"[": ', "}]")])
def test_depth_of_json(opening, closing):
    levels = len(opening.translate(str.maketrans("", "", '"a: '))) - opening.count('"[')
    for depth, fits in ((inputs.MAX_DEPTH, True), (inputs.MAX_DEPTH + 2, False), (100_000, False)):
        count = depth // levels
        text = opening * count + "0" + closing * count
        if fits:
            inputs.parse_json(text.encode(), "file")
        else:
            refuse_json(text, "file is nested deeper than 64 levels")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1, column 1, is not valid JSON"),
        ('{"a": 1,\n}', "line (1|2), column .*, is not valid JSON"),
        ("1" * 41, "has 41 digits"),
        ("[" + "9" * 5000 + "]", "has 5000 digits"),
        ("-1e999", "is too large"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        (r'{"a": "\ud800x"}', r"the text .*ud800x' is not valid Unicode"),
        (r'{"\udfff": 1}', "is not valid Unicode"),
        ('{"__float__": "many"}', "is no number"),
        ("\ufeff{}", "not valid JSON"),
        ('"\ud800"', "is not UTF-8 text: byte 1 is 0xed"),
    ],
)
def test_json_that_is_refused(text, match):
    refuse_json(text, match)


def test_json_numbers_of_transformers():
    text = b'{"a": {"__float__": "Infinity"}, "b": NaN, "c": -Infinity, "d": 1e30, "e": 5e-324}'
    value = inputs.parse_json(text, "file")
    assert value["a"] == math.inf and math.isnan(value["b"]) and value["c"] == -math.inf
    assert inputs.parse_json(str(10**30).encode(), "file") == 10**30
    pair = json.dumps("\U0001f600").encode()  # both halves of a pair
    assert inputs.parse_json(pair, "file") == "\U0001f600"


def test_values_of_json_are_counted():
    text = "[" + ",".join(["[]"] * 10) + "]"
    with pytest.raises(SourceError, match="holds 20 values, more than 19"):
        inputs.parse_json(text.encode(), "file", max_values=19)
    inputs.parse_json(text.encode(), "file", max_values=20)
    inputs.parse_json(json.dumps([",[" * 30]).encode(), "file", max_values=2)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.integers(-(10**39), 10**39)
    | st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs"))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner),
))  # fmt: skip
def test_yaml_is_read_as_yaml(value):
    text = json.dumps(value, ensure_ascii=False)  # which YAML is a superset of
    assert parse_yaml(text, "file") == value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: &x [1]\nb: *x", "line 2, column 4, is not YAML: aliases are not read"),
        ("[" * 70 + "]" * 70, "deeper than 64"),
        ("- " * 70 + "x", "deeper than 64"),
        ("[" * 30_000, "YAML"),
        ("a: 1\na: 2", "the key 'a' occurs twice"),
        ("? [1]\n: 2", "a key is a list"),
        ("!!python/object/apply:os.system [ls]", "values of kind .* are not read"),
        ("!!timestamp 2001-12-14", "are not read"),
        ("!!binary aGk=", "are not read"),
        ("!!int many", "a value is malformed"),
        ("!!bool 3", "a value is malformed"),
        ("!!map 3", "YAML"),
        ("!!seq {a: 1}", "YAML"),
        ("9" * 50, "has 50 digits"),
        ("1e999", "is too large"),
        ('"\\ud800"', "not valid Unicode"),
        ('"\\U00110000"', "YAML"),
        ("a: \x00", "character 4, is not YAML"),
        ("a: 1\n--- 2", "line 2"),
        ("%YAML 9.9\n--- 1", "YAML"),
        ("a: [", "line 1, column 5"),
        ("a" * 300_000, "has 300000 characters"),
    ],
)
def test_yaml_that_is_refused(text, match):
    with pytest.raises(UsageError, match=match) as caught:
        parse_yaml(text, "file", error=UsageError)
    assert "\n" not in str(caught.value)


def test_scalars_of_yaml():
    text = "[2001-12-14, 1:30, 0x10, 010, yes, off, 1_000, 1e3, 1.5, .inf, ~, '7', <<, =]"
    found = parse_yaml(text, "file")
    assert found == [
        "2001-12-14", "1:30", "0x10", 10, "yes", "off", "1_000", 1000.0, 1.5, math.inf, None,
        "7", "<<", "=",
    ]  # fmt: skip


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, match in {
        "pipe": "is a named pipe", "socket": "is a socket", "link": "is a device",
        "": "is a folder", "loop": "cannot be read: Too many levels",
        "absent": "cannot be read: No such file", "a\0b": "cannot be read: embedded null",
        "x" * 300: "cannot be read: File name too long",
    }.items():  # fmt: skip
        with pytest.raises(SourceError, match=match):
            inputs.read_utf8(tmp_path / name)


def test_sizes_of_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert inputs.read_bytes(path, 5) == b"12345"
    with pytest.raises(SourceError, match="has 5 bytes, and graphopt reads at most 4"):
        inputs.read_bytes(path, 4)
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    with pytest.raises(SourceError, match=f"has {2**40} bytes"):
        inputs.read_json(path)


class Inner(inputs.Schema):
    sizes: list[inputs.Size]


class Outer(inputs.OpenSchema):
    name: str
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], r"file is \[\], and it should be a valid dictionary"),
        ({}, "file: the entry 'name' is missing"),
        ({"name": 3}, "file: the entry 'name' is 3, and it should be a valid string"),
        ({"name": "a", "inner": {"sizes": [1, True]}}, r"'inner\.sizes\.1' is True"),
        ({"name": "a", "inner": {"sizes": [1, 2.0]}}, r"'inner\.sizes\.1' is 2\.0"),
        ({"name": "a", "inner": {"sizes": [2**70]}}, r"'inner\.sizes\.0' is 118059"),
        ({"name": "a", "inner": {"sizes": [-1]}}, "is -1, and it should be greater"),
        ({"name": "a", "inner": {"sizes": [], "more": 1}}, r"'inner\.more' is 1"),
        ({"name": "a", "inner": {"sizes": ["x" * 9**5]}}, "is 'x{20,30}"),
    ],
)
def test_schemas(data, match):
    with pytest.raises(SourceError, match=match) as caught:
        inputs.parse(Outer, data, "file")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert inputs.parse(Outer, {"name": "a", "other": 1}, "file") == Outer(name="a")
