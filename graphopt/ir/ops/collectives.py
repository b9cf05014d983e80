"""What the ranks of a tensor-parallel program exchange, and ops that know a rank's part.

A program whose weights are split is one text that every rank runs on its own parts. A value inside
it is the same on all ranks, a part of a whole along an axis, or a partial sum; collectives are
where one becomes another. See `graphopt.ir.layouts`, which checks that, and `graphopt.ir.ranks`.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor

from graphopt.ir import collectives, functional
from graphopt.ir.ops.base import Attrs, Count, Offset, Op, Tensors, Types, need, register
from graphopt.ir.types import Dim, Type, dim

Ranks = Annotated[int, pydantic.Field(ge=2, le=10_000)]
"""Type of how many ranks take part."""

COLLECTIVES = frozenset({"all_reduce", "all_gather", "reduce_scatter"})
"""The ops in which ranks exchange something."""


class Collective(Op):
    """Exchanges values between all ranks of a program, which run it in the same order.

    The fast form needs a group of torch.distributed with as many ranks. The reference is what comes
    out where every rank has the same operand, seen from the first rank: one process has no other.
    """

    operands = ("x",)
    fused = True  # only the emitters that write for several devices need a translation

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return 0

    def communicated(self, types: Types, attrs: Attrs) -> Dim:
        """Return the bytes that each rank sends, by the ring algorithm, as torch's backends do.

        Source: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69(2), 2009.
        """
        raise NotImplementedError


def _axis(x: Type, attrs: Attrs) -> int:
    axis = int(attrs["axis"])
    if axis >= len(x.shape):
        raise ValueError(f"{x} has no axis {axis}")
    return axis


@register
class AllReduce(Collective):
    """The sum of x [...] over the ranks, on every rank: a partial sum becomes the whole."""

    name = "all_reduce"
    attributes = {"ranks": Ranks}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return [need(types, 0)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(need(types, 0).numel * (attrs["ranks"] - 1) / attrs["ranks"])

    def communicated(self, types: Types, attrs: Attrs) -> Dim:
        return dim(need(types, 0).bytes * 2 * (attrs["ranks"] - 1) / attrs["ranks"])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (x * attrs["ranks"],)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (collectives.all_reduce(x, **attrs),)


@register
class AllGather(Collective):
    """The parts x of all ranks, one behind the other along `axis`, on every rank."""

    name = "all_gather"
    attributes = {"axis": Offset, "ranks": Ranks}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x = need(types, 0)
        sizes, axis = list(x.shape), _axis(x, attrs)
        sizes[axis] = dim(sizes[axis] * attrs["ranks"])
        return [Type(tuple(sizes), x.dtype)]

    def communicated(self, types: Types, attrs: Attrs) -> Dim:
        return dim(need(types, 0).bytes * (attrs["ranks"] - 1))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (torch.cat([x] * attrs["ranks"], attrs["axis"]),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (collectives.all_gather(x, **attrs),)


@register
class ReduceScatter(Collective):
    """A rank's part along `axis` of the sum of x over the ranks."""

    name = "reduce_scatter"
    attributes = {"axis": Offset, "ranks": Ranks}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x = need(types, 0)
        sizes, axis = list(x.shape), _axis(x, attrs)
        size = sizes[axis]
        if not isinstance(size, int) or size % attrs["ranks"]:
            raise ValueError(f"axis {axis} of {x} in {attrs['ranks']} parts")
        sizes[axis] = size // int(attrs["ranks"])
        return [Type(tuple(sizes), x.dtype)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(outputs[0].numel * (attrs["ranks"] - 1))

    def communicated(self, types: Types, attrs: Attrs) -> Dim:
        return dim(need(types, 0).bytes * (attrs["ranks"] - 1) / attrs["ranks"])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (x.chunk(attrs["ranks"], attrs["axis"])[0] * attrs["ranks"],)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (collectives.reduce_scatter(x, **attrs),)


@register
class VocabParallelEmbedding(Op):
    """Rows `ids` [...] of a table of which `weight` [rows, N] has those from `first_row` [1] on.

    An id whose row lies elsewhere gives zeros, so that the ranks' results add up to the look-up.
    `vocab` is the number of rows that the table has for tokens, without rows that only pad it. An
    id that no rank has a row for is out of range on each of them, as in a whole table: an error
    where the look-up is checked, as on a CPU, and an assertion of the device on a GPU.
    Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3.
    """

    name = "vocab_parallel_embedding"
    operands = ("ids", "weight", "first_row")
    attributes = {"vocab": Count}  # noqa: RUF012
    encoded = ("weight",)
    fused = True

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        ids, weight, first = need(types, 0), need(types, 1), need(types, 2)
        if len(weight.shape) != 2 or ids.dtype.is_floating_point:
            raise ValueError(f"vocab_parallel_embedding of {ids} in {weight}")
        if weight.encoding is not None and weight.encoding.axis != 1:
            raise ValueError(f"vocab_parallel_embedding in {weight}: rows are looked up")
        if len(first.shape) != 1 or first.dtype.is_floating_point:
            raise ValueError(f"vocab_parallel_embedding from row {first} on: give a number a rank")
        return [Type((*ids.shape, weight.shape[1]), weight.dtype)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return 0

    def bytes(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(2 * outputs[0].bytes + need(types, 0).bytes)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        ids, weight, first = tensors
        assert ids is not None and weight is not None and first is not None
        row = ids - first
        here = (row >= 0) & (row < weight.shape[0])
        known = (ids >= 0) & (ids < attrs["vocab"])
        found = weight[torch.where(known, row * here, attrs["vocab"])]
        return (torch.where(here[..., None], found, 0),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        ids, weight, first = tensors
        assert ids is not None and weight is not None and first is not None
        return (functional.vocab_parallel_embedding(ids, weight, first, attrs["vocab"]),)
