"""Collectives: what they are, under real ranks, and without a group."""

from __future__ import annotations

import os
import time

import pytest
import torch
from ranks import run_ranks

from graphopt.errors import UsageError
from graphopt.ir import B, S, Type
from graphopt.ir.ops import get_op
from graphopt.ir.ops.collectives import COLLECTIVES

F64, I64 = torch.float64, torch.int64
X = Type((B, S, 6), F64)


@pytest.mark.parametrize(
    ("op", "attrs", "shape", "sent"),
    [("all_reduce", {"ranks": 2}, (B, S, 6), 48),
     ("all_gather", {"axis": 2, "ranks": 4}, (B, S, 24), 144),
     ("all_gather", {"axis": 1, "ranks": 2}, (B, 2 * S, 6), 48),
     ("reduce_scatter", {"axis": 2, "ranks": 3}, (B, S, 2), 32)],
)  # fmt: skip
def test_what_comes_out_and_what_is_sent(op, attrs, shape, sent):
    (made,) = get_op(op).infer([X], attrs)
    assert made == Type(shape, F64)
    assert get_op(op).communicated([X], attrs) == sent * B * S
    x = torch.randn(2, 5, 6, dtype=F64)
    (value,) = get_op(op).reference([x], attrs)
    assert tuple(value.shape) == made.concrete({B: 2, S: 5})


@pytest.mark.parametrize(
    ("op", "attrs", "message"),
    [("all_gather", {"axis": 3, "ranks": 2}, "no axis 3"),
     ("reduce_scatter", {"axis": 2, "ranks": 4}, "in 4 parts"),
     ("reduce_scatter", {"axis": 1, "ranks": 2}, "in 2 parts")],
)  # fmt: skip
def test_axes_that_are_none(op, attrs, message):
    with pytest.raises(ValueError, match=message):
        get_op(op).infer([X], attrs)


@pytest.mark.parametrize("attrs", [{}, {"ranks": 1}, {"ranks": 2, "axis": 0}])
def test_attributes_that_are_none(attrs):
    with pytest.raises(ValueError, match="attribute"):
        get_op("all_reduce").check(attrs, [X])


@pytest.mark.parametrize("op", sorted(COLLECTIVES))
def test_a_process_without_a_group_is_told_how_to_start(op):
    attrs = {"ranks": 2} | ({} if op == "all_reduce" else {"axis": 0})
    with pytest.raises(UsageError, match=r"2 ranks, and this process is none.*torchrun"):
        get_op(op).torch([torch.ones(2)], attrs)


def test_rows_of_a_vocabulary_add_up_to_the_look_up():
    table, ids = torch.randn(12, 3, dtype=F64), torch.tensor([[0, 3, 4, 11], [7, 8, 5, 0]])
    op, attrs = get_op("vocab_parallel_embedding"), {"vocab": 12}
    for form in (op.reference, op.torch):
        parts = [
            form([ids, part, torch.tensor([4 * rank])], attrs)[0]
            for rank, part in enumerate(table.chunk(3))
        ]
        assert torch.equal(sum(parts), table[ids])
    for first in (Type((2, 1), I64), Type((1,), F64)):
        with pytest.raises(ValueError, match="a number a rank"):
            op.infer([Type((B, S), I64), Type((4, 3), F64), first], attrs)


@pytest.mark.parametrize("vocab", [1, 5, 11, 12])
@pytest.mark.parametrize("dtype", [torch.int32, I64])
def test_an_id_that_no_rank_has_a_row_for_is_out_of_range_on_each(vocab, dtype):
    """As in a whole table; also where rows of zeros pad it, and however far the id is beyond."""
    ranks = 4
    rows = -(-vocab // ranks)
    table = torch.zeros(ranks * rows, 2)
    table[:vocab] = torch.randn(vocab, 2)
    op, attrs = get_op("vocab_parallel_embedding"), {"vocab": vocab}
    for form in (op.reference, op.torch):
        for rank, part in enumerate(table.chunk(ranks)):
            first = torch.tensor([rows * rank])
            for wrong in (-(2**31) + rows, -vocab, -1, vocab, vocab + 1, 3 * vocab, 2**31 - 1):
                with pytest.raises(IndexError):
                    form([torch.tensor([[0, wrong]], dtype=dtype), part, first], attrs)
            (made,) = form([torch.arange(vocab, dtype=dtype), part, first], attrs)
            own = torch.where(torch.arange(vocab)[:, None] // rows == rank, table[:vocab], 0)
            assert torch.equal(made, own)


def _exchange(rank):
    x = torch.arange(12.0, dtype=F64).view(3, 4) * (rank + 1)
    found = {}
    for op, attrs in (
        ("all_reduce", {}), ("all_gather", {"axis": 1}), ("reduce_scatter", {"axis": 1}),
    ):  # fmt: skip
        found[op] = get_op(op).torch([x.t().contiguous().t()], attrs | {"ranks": 2})[0]
    try:
        get_op("all_reduce").torch([x], {"ranks": 3})
    except UsageError as error:
        found["wrong"] = str(error)
    return found


@pytest.mark.slow
def test_two_ranks_exchange():
    x = torch.arange(12.0, dtype=F64).view(3, 4)
    for rank, found in enumerate(run_ranks(_exchange)):
        assert torch.equal(found["all_reduce"], 3 * x)
        assert torch.equal(found["all_gather"], torch.cat([x, 2 * x], 1))
        assert torch.equal(found["reduce_scatter"], 3 * x[:, 2 * rank : 2 * rank + 2])
        assert "3 ranks, and the group has 2" in found["wrong"]


def _fail(rank, how):
    if rank == 1:
        if how == "raises":
            raise RuntimeError("this rank is broken")
        if how == "dies":
            os._exit(7)
        time.sleep(60)
    return get_op("all_reduce").torch([torch.ones(1)], {"ranks": 2})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said", "limit"),
    [
        ("raises", "rank 1:.*this rank is broken", 30),
        ("dies", "rank 1: died with 7", 30),
        ("hangs", "rank 1: still ran", 2),
    ],
)
def test_a_rank_that_fails_is_named_and_the_others_end(how, said, limit):
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        run_ranks(_fail, how, limit=limit)
