"""A rank's part of a weight: the parts make up the whole, and no other part is read."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.files import raw
from graphopt.files.safetensors import SafetensorsWriter, read_header
from graphopt.ir import Array, Dequantised, Packed, Padded, Placement, Rows, Transposed, Weight
from graphopt.ir.parts import check_split, rank_part
from graphopt.ir.ranks import rank_weight
from graphopt.ir.weights import Cast, Reshaped


def devices(count):
    return tuple(f"cpu:{rank}" for rank in range(count))


def put_together(parts, placement):
    """Return the whole that the ranks' parts were cut from, in numbers alone."""
    distinct = parts[:: placement.copies]
    cut = [part.chunk(placement.sections, placement.axis) for part in distinct]
    ordered = [cut[n][s] for s in range(placement.sections) for n in range(len(distinct))]
    return torch.cat(ordered, placement.axis)


SOURCE = torch.randn(24, 36, 2, generator=torch.Generator().manual_seed(0))
PRODUCERS = {
    "array": Array(SOURCE),
    "rows": Rows(Array(torch.cat([SOURCE, -SOURCE])), slice(2, 50, 2)),
    "rows by number": Rows(Array(SOURCE), tuple(reversed(range(24)))),
    "transposed": Transposed(Array(SOURCE)),
    "padded": Padded(Array(SOURCE[:20]), 4),
    "reshaped": Reshaped(Array(SOURCE), (36, 24, 2)),
    "cast": Cast(Array(SOURCE), torch.bfloat16, "w"),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(PRODUCERS)), st.integers(0, 1), st.sampled_from([1, 2, 3]),
       st.sampled_from([(2, 1), (4, 1), (4, 2), (3, 1)]))  # fmt: skip
def test_parts_make_up_the_whole(name, axis, sections, ranks):
    producer, (count, copies) = PRODUCERS[name], ranks
    placement = Placement(devices(count), axis, sections, copies)
    try:
        check_split(Weight("w", producer), placement)
    except ValueError:
        assert producer.shape[axis] % (placement.parts * sections)
        return
    parts = [rank_part(producer, placement, rank) for rank in range(count)]
    loaded = [part.load() for part in parts]
    for part, value in zip(parts, loaded, strict=True):
        assert (part.shape, part.dtype) == (tuple(value.shape), value.dtype)
        assert part.shape == placement.local(producer.shape)
    assert torch.equal(put_together(loaded, placement), producer.load())
    for first, second in itertools.pairwise(range(count)):
        if placement.part_of(first) == placement.part_of(second):
            assert torch.equal(loaded[first], loaded[second])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("bits", "packed", "symmetric"), [(4, 1, True), (4, 1, False), (3, 1, False), (4, 0, False)]
)
def test_codes_are_split_between_groups(axis, bits, packed, symmetric):
    encoding = Packed(bits, 8, packed, symmetric)
    tensors = encoding.quantise(SOURCE[:, :32, 0].contiguous())
    producer = Dequantised(encoding, **{name: Array(t) for name, t in tensors.items()})
    weight = Weight("w", producer)
    placement = Placement(devices(2), axis)
    if axis == packed and producer.shape[axis] // 8 % 2:
        with pytest.raises(ValueError, match="3 groups of 8 codes along axis 0 in 2 parts"):
            check_split(weight, placement)
        return
    check_split(weight, placement)
    parts = [rank_weight(replace(weight, placement=placement), rank) for rank in range(2)]
    assert all(part.encoding == encoding for part in parts)
    assert sum(part.nbytes for part in parts) == weight.nbytes
    assert torch.equal(torch.cat([part.load() for part in parts], axis), producer.load())


def test_one_group_a_row_has_no_parts():
    encoding = Packed(4, 32)
    tensors = encoding.quantise(SOURCE[:, :32, 0].contiguous())
    weight = Weight("w", Dequantised(encoding, **{n: Array(t) for n, t in tensors.items()}))
    with pytest.raises(ValueError, match="1 groups of 32 codes along axis 1 in 2 parts"):
        check_split(weight, Placement(devices(2), 1))
    with pytest.raises(ValueError, match="no zeros"):
        check_split(weight, Placement(devices(2), summed=True))


def test_what_adds_up_is_on_the_first_rank_alone():
    weight = Weight("bias", Array(SOURCE[0]), placement=Placement(devices(3), summed=True))
    parts = [rank_weight(weight, rank) for rank in range(3)]
    assert all(part.placement is None for part in parts)
    assert torch.equal(parts[0].load(), SOURCE[0])
    assert not parts[1].load().any() and parts[2].shape == weight.shape


@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 96), 0), ((64, 96), 1), ((8, 4096), 1), ((3, 40, 30), 2)]
)
def test_a_rank_reads_its_own_part_of_a_file(shape, axis, tmp_path, monkeypatch):
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    with SafetensorsWriter(tmp_path / "a.safetensors", {"w": (shape, torch.float32)}) as writer:
        writer.write("w", value)
    monkeypatch.setattr(raw, "_BLOCK", 1)
    read = []
    fill = raw._read_into
    monkeypatch.setattr(raw, "_read_into", lambda *args: (read.append(args[3].nbytes), fill(*args)))
    producer = read_header(tmp_path / "a.safetensors")["w"]
    read.clear()
    part = rank_part(producer, Placement(devices(2), axis), 1)
    assert torch.equal(part.load(), value.chunk(2, axis)[1])
    assert sum(read) == value.nbytes // 2
    monkeypatch.setattr(raw, "_BLOCK", 2**20)
    assert torch.equal(part.load(), value.chunk(2, axis)[1])
