"""Producers that read no more than asked, and the store."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import SourceError
from graphopt.ir import Array, Missing, Padded, Producer, Rows, Transposed, Weight, WeightStore
from graphopt.ir.weights import Reshaped, SharedSources
from graphopt.support.tensor_bytes import tensor_bytes


@dataclass(frozen=True, eq=False)
class Spy(Producer):
    """A matrix that notes which rows were read."""

    value: torch.Tensor
    read: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self):
        return tuple(self.value.shape)

    @property
    def dtype(self):
        return self.value.dtype

    def load(self):
        return self.load_rows(0, self.shape[0])

    def load_rows(self, start, stop):
        self.read.append((start, stop))
        return self.value[start:stop]


def matrix(rows=6, columns=4):
    return torch.arange(float(rows * columns)).view(rows, columns)


def spy(rows=6, columns=4):
    return Spy(matrix(rows, columns))


@pytest.mark.parametrize(
    ("index", "read"),
    [
        (slice(2, 4), (2, 4)),
        (slice(4, None), (4, 6)),
        (slice(-3, -1), (3, 5)),
        (slice(0, 99), (0, 6)),
        (slice(1, 6, 2), (1, 6)),
        ((4, 1, 2, 1), (1, 5)),
        ((5,), (5, 6)),
    ],
)
def test_rows_read_the_range_that_holds_them(index, read):
    source = spy()
    rows = Rows(source, index)
    expected = matrix()[index if isinstance(index, slice) else list(index)]
    assert rows.shape == tuple(expected.shape) and rows.dtype == torch.float32
    assert source.read == []  # nothing is read for a shape
    assert rows.load().equal(expected)
    assert source.read == [read]


@pytest.mark.parametrize("index", [slice(2, 2), slice(5, 1), ()])
def test_no_rows(index):
    rows = Rows(spy(), index)
    assert rows.shape == (0, 4) and rows.load().shape == (0, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_rows_of_rows_read_no_more_than_they_need(data):
    """A block of a fused projection, streamed: only its own rows of the file are touched."""
    rows = data.draw(st.integers(1, 9))
    first, step = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(1, 3))
    index = data.draw(
        st.one_of(
            st.just(slice(first, data.draw(st.integers(first + 1, rows)), step)),
            st.lists(st.integers(0, rows - 1), min_size=1).map(tuple),
        )
    )
    source = spy(rows)
    outer = Rows(source, index)
    wanted = matrix(rows)[index if isinstance(index, slice) else list(index)]
    start = data.draw(st.integers(0, outer.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, outer.shape[0]))
    assert outer.load_rows(start, stop).equal(wanted[start:stop])
    numbers = list(range(*index.indices(rows))) if isinstance(index, slice) else list(index)
    part = numbers[start:stop]
    assert source.read == [(min(part), max(part) + 1)]


def test_a_transpose_is_read_by_columns():
    source = spy()
    turned = Transposed(source)
    assert turned.shape == (4, 6) and source.read == []
    assert turned.load().equal(matrix().t())
    assert turned.load_rows(1, 3).equal(matrix().t()[1:3])
    assert Rows(turned, slice(3, 4)).load().equal(matrix().t()[3:4])
    assert Transposed(Rows(source, slice(0, 2))).load().equal(matrix()[:2].t())
    stacked = Transposed(Reshaped(source, (3, 2, 4)))
    assert stacked.shape == (2, 3, 4)
    assert stacked.load().equal(matrix().view(3, 2, 4).transpose(0, 1))


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 2), (2, 6), (5, 8), (7, 9), (3, 3)])
def test_rows_of_zeros_stand_behind_what_is_read(start, stop):
    source = spy()
    padded = Padded(source, 3)
    whole = torch.cat([matrix(), torch.zeros(3, matrix().shape[1])])
    assert padded.shape == tuple(whole.shape) and padded.dtype == whole.dtype
    assert padded.load_rows(start, stop).equal(whole[start:stop])
    assert all(stop <= 6 for _, stop in source.read)
    assert Padded(Transposed(Array(matrix())), 2).load()[-2:].eq(0).all()


def test_another_shape():
    source = spy()
    wide = Reshaped(source, (2, 3, 4))
    assert wide.shape == (2, 3, 4) and wide.dtype == torch.float32 and source.read == []
    assert wide.load().equal(matrix().view(2, 3, 4))
    assert wide.load_rows(1, 2).equal(matrix().view(2, 3, 4)[1:2])
    assert Reshaped(Transposed(source), (24,)).load().equal(matrix().t().flatten())


def test_a_source_that_is_shared_is_read_once():
    source = spy()
    parts = [
        source, Rows(Padded(Transposed(source), 2), (3, 5, 0)), Transposed(Rows(source, (4, 1))),
        Reshaped(Rows(source, slice(2, 4)), (8,)), Array(matrix(2)),
    ]  # fmt: skip
    shared = SharedSources()
    values = [shared.load(part) for part in parts]
    assert source.read == [(0, 6)]
    assert all(v.equal(p.load()) and v.dtype == p.dtype for v, p in zip(values, parts, strict=True))
    source.read.clear()
    weight = Weight("w", parts[1])
    assert weight.load(torch.float64, shared).equal(values[1].double()) and source.read == []
    shared.forget()
    assert weight.load(torch.float64, shared).equal(values[1].double()) and len(source.read) == 1


def test_an_array_gives_its_value_without_its_graph():
    value = torch.ones(2, requires_grad=True)
    loaded = Array(value).load()
    assert not loaded.requires_grad and loaded.data_ptr() == value.data_ptr()
    assert Array(matrix()).load_rows(1, 3).equal(matrix()[1:3])


def test_a_missing_value_keeps_its_shape_and_says_why():
    missing = Missing((3, 4), torch.bfloat16, "a.weight")
    assert Rows(missing, slice(0, 2)).shape == (2, 4)
    assert Transposed(missing).dtype == torch.bfloat16
    for producer in (missing, Rows(missing, (1,)), Transposed(missing), Reshaped(missing, (12,))):
        with pytest.raises(SourceError, match=r"'a\.weight' has no value.*Give a model folder"):
            producer.load()


def test_a_weight_is_cast_where_it_holds_floats():
    weight = Weight("w", Array(torch.tensor([1.5, 2.5]).bfloat16()))
    assert weight.dtype == weight.load().dtype == torch.bfloat16
    assert weight.load(torch.float64).equal(torch.tensor([1.5, 2.5], dtype=torch.float64))
    index = Weight("i", Array(torch.tensor([1, 2])))
    assert index.load(torch.float32).dtype == torch.int64
    assert Weight("m", Array(matrix())).numel == 24
    assert Weight("s", Array(torch.tensor(2.0))).numel == 1


def test_the_store_keeps_order_and_refuses_repeats():
    store = WeightStore()
    for name in "cab":
        added = store.add(Weight(name, Array(torch.ones(1))))
        assert store[name] is added
    assert [weight.name for weight in store] == ["c", "a", "b"] and len(store) == 3
    with pytest.raises(KeyError, match="'a' exists already"):
        store.add(Weight("a", Array(torch.ones(1))))
    changed = Weight("a", Array(torch.zeros(2)))
    store.replace(changed)
    assert store["a"] is changed and [weight.name for weight in store] == ["c", "a", "b"]
    with pytest.raises(KeyError, match="no weight 'x'"):
        store.replace(Weight("x", Array(torch.ones(1))))
    copied = store.copy()
    copied.remove("c")
    assert "c" in store and "c" not in copied and "x" not in store
    with pytest.raises(KeyError):
        copied.remove("c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_bytes_of_a_tensor_are_row_major_whatever_its_strides(dtype):
    whole = torch.arange(35).view(5, 7).to(dtype)
    for value in (
        whole,
        whole.T,
        whole[:, 3],
        whole[2:3, 3],
        whole[:, 3:4],
        whole[4, 5],
        whole[:0],
    ):
        wanted = b"".join(bytes(item[None].view(torch.uint8).tolist()) for item in value.flatten())
        assert bytes(tensor_bytes(value).tolist()) == wanted
