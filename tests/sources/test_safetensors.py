"""Reading and writing safetensors, and refusing every kind of damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from graphopt.errors import GraphoptError, SourceError
from graphopt.files import safetensors as ours
from graphopt.files.finite import check_finite
from graphopt.files.raw import RawTensor
from graphopt.files.safetensors import (
    SafetensorsWriter,
    blocks,
    read_checkpoint,
    read_header,
)
from graphopt.ir.weights import Array, Transposed

pytestmark = pytest.mark.oldest

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(7, dtype=torch.int8),
    "flags": torch.tensor([True, False]),
}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name], tensor)


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with SafetensorsWriter(path, {n: (t.shape, t.dtype) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in read_header(path).items()}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", TENSORS)
    assert_same(safetensors.torch.load_file(tmp_path / "ours"), TENSORS)
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs")
    assert_same(load(tmp_path / "theirs"), TENSORS)


def test_tensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    write_file(tmp_path / "file", TENSORS)
    for tensor in read_header(tmp_path / "file").values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_rows_are_read_alone(tmp_path: Path) -> None:
    write_file(tmp_path / "file", TENSORS)
    tensor = read_header(tmp_path / "file")["matrix"]
    assert torch.equal(tensor.load_rows(1, 3), TENSORS["matrix"][1:3])
    assert tensor.load_rows(2, 2).shape == (0, 4)


def test_copy_streams_blocks_and_casts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", 32)
    value = torch.randn(9, 4)
    announced = {"w": ((9, 4), torch.float16), "t": ((4, 9), torch.float32)}
    with SafetensorsWriter(tmp_path / "file", announced) as writer:
        writer.copy("t", Transposed(Array(value)))
        writer.copy("w", Array(value))
    assert_same(load(tmp_path / "file"), {"w": value.half(), "t": value.t()})
    assert [b.shape[0] for b in blocks(Array(value), limit=64)] == [4, 4, 1]


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="announced"),
        SafetensorsWriter(tmp_path / "f", {"a": ((2,), torch.float32)}) as writer,
    ):
        writer.write("a", torch.zeros(3))
    with (
        pytest.raises(ValueError, match="'a' was not written"),
        SafetensorsWriter(tmp_path / "f", {"a": ((2,), torch.float32)}),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_sentence() -> None:
    with (
        pytest.raises(GraphoptError, match=r"No space left.*Free some space"),
        SafetensorsWriter(Path("/dev/full"), {"a": ((200_000,), torch.float32)}) as writer,
    ):
        writer.write("a", torch.zeros(200_000))


@pytest.mark.parametrize("size", [0, 5, 30, -1])
def test_truncated(tmp_path: Path, size: int) -> None:
    write_file(tmp_path / "whole", TENSORS)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:size])
    with pytest.raises(SourceError, match=r"cut is truncated.*Download the file again"):
        read_header(tmp_path / "cut")


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    write_file(tmp_path / "file", TENSORS)
    tensors = read_header(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="truncated"):
        tensors["matrix"].load()
    (tmp_path / "file").unlink()
    with pytest.raises(SourceError, match="No such file"):
        tensors["matrix"].load()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all", "header, line 1, column 1, is not valid JSON"),
        (b"[1, 2]", "header is .*, and it should be a valid dictionary"),
        (b'{"a": {"dtype": "F32"}}', "'a': the entry 'shape' is missing"),
        (b'{"a": 1, "a": 2}', "malformed"),
        ({"a": entry(0, 8, [2.5])}, "'shape.0' is 2.5, and it should be a valid integer"),
        ({"a": entry(0, 8, [-2])}, "'shape.0' is -2, and it should be greater"),
        ({"a": entry(0, 8, [2], "F5")}, "unknown dtype 'F5'"),
        ({"a": entry(0, 8, [3])}, "takes 8 bytes"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "'b' overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, "gap before 'b'"),
        ({"a": entry(0, 4, [1])}, "8 bytes follow the last"),
        ({"a": entry(0, 16, [4])}, "truncated: tensor 'a'"),
    ],
)
def test_corrupt_header(tmp_path: Path, header: Any, message: str) -> None:
    path = write_raw(tmp_path / "file", header, bytes(12))
    with pytest.raises(SourceError, match=message):
        read_header(path)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "file", b"{}", length=2**60)
    with pytest.raises(SourceError, match="is not a safetensors file"):
        read_header(path)


def sharded(folder: Path) -> Path:
    write_file(folder / "one.safetensors", {"a": torch.ones(2)})
    write_file(folder / "two.safetensors", {"b": torch.zeros(2)})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / ours.INDEX_NAME).write_text(json.dumps(index))
    return folder


def test_shards(tmp_path: Path) -> None:
    tensors = read_checkpoint(sharded(tmp_path))
    assert_same(
        {n: t.load() for n, t in tensors.items()}, {"a": torch.ones(2), "b": torch.zeros(2)}
    )


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(SourceError, match=r"Shard two\.safetensors .* is missing"):
        read_checkpoint(tmp_path)


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    write_file(sharded(tmp_path) / "two.safetensors", {"c": torch.zeros(2)})
    with pytest.raises(SourceError, match="places tensor 'b' in two"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../outside.safetensors"}}'])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    (tmp_path / ours.INDEX_NAME).write_text(text)
    with pytest.raises(SourceError, match="malformed"):
        read_checkpoint(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds neither"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_and_inf_are_counted(dtype: torch.dtype) -> None:
    value = torch.ones(3, 4)
    check_finite("w", value.to(dtype))
    value[1, 2] = value[0, 0] = torch.nan
    if dtype.itemsize > 1:
        value[2, 3] = -torch.inf
    infs = int(dtype.itemsize > 1)
    with pytest.raises(SourceError, match=f"'w' holds 2 NaN and {infs} Inf among 12"):
        check_finite("w", value.to(dtype))


def test_integers_and_empty_tensors_are_finite() -> None:
    check_finite("w", torch.tensor([1, 2]))
    check_finite("w", torch.zeros(0))


def test_copy_refuses_nan(tmp_path: Path) -> None:
    value = Array(torch.tensor([1.0, torch.inf]))
    with (
        pytest.raises(SourceError, match="0 NaN and 1 Inf"),
        SafetensorsWriter(tmp_path / "f", {"a": ((2,), torch.float32)}) as writer,
    ):
        writer.copy("a", value)


def test_raw_tensor_of_an_odd_offset(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" + struct.pack("<3f", 1, 2, 3))
    tensor = RawTensor(tmp_path / "file", 1, (3,), torch.float32)
    assert tensor.load().tolist() == [1, 2, 3]
    assert tensor.nbytes == 12
