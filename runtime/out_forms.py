"""Operations of torch, called so that they write their results to given memory.

The forms that torch has are looked up by name and arguments; a form that torch generates itself,
which makes the result elsewhere and copies it, is none. The forms of this file are those of
operations that move or fill values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

Writer: TypeAlias = Callable[[Sequence[Any], dict[str, Any], list[Tensor]], Any]
"""Takes the arguments of an operation, and a tensor without elements for each of its results."""

_PLACEMENT = ("dtype", "layout", "device", "pin_memory")
"""What memory that is given has already."""


@functools.cache
def is_composite(op: Any) -> bool:
    """Whether an operation is made of others and nothing else."""
    name = op.name()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CompositeImplicitAutograd") and not any(has(name, k) for k in ("CPU", "CUDA"))


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """What attention without a kernel of its own takes: rows of -inf alone give zeros."""
    rows = torch.all(torch.eq(x, -torch.inf), dim, True)
    return torch.softmax(x, dim, dtype).masked_fill_(rows, 0)


_MADE_OF_OTHERS: dict[Any, Callable[..., Any]] = {aten._safe_softmax.default: _safe_softmax}
"""Operations that torch makes of others behind its dispatcher, where a step does not see them."""


def decomposition(op: Any) -> Callable[..., Any] | None:
    """Return what calls the operations that an operation is made of; None if it is one itself."""
    own = _MADE_OF_OTHERS.get(op)
    if own is not None:
        return own
    return op.decompose if is_composite(op) else None


@functools.cache
def out_form(op: Any, results: int, device_type: str) -> Writer | None:
    """Return what calls an operation with memory for so many results; None if nothing does."""
    own = _OWN.get(op)
    if own is not None:
        return own if results == 1 else None
    if op.namespace != "aten":
        return None
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return None
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if a.name not in _PLACEMENT]
    packet = getattr(aten, op._schema.name.removeprefix("aten::"))
    for overload in packet.overloads():
        form = getattr(packet, overload)
        outs = [a.name for a in form._schema.arguments if a.is_out]
        taken = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
        plain = [each for each in taken if each[0] not in _PLACEMENT]
        if len(outs) != results or plain != wanted:
            continue
        # A form that torch generates makes the result elsewhere and copies it.
        generated = torch.Tag.generated in form.tags
        if not generated and torch._C._dispatch_has_computed_kernel_for_dispatch_key(
            form.name(), key
        ):
            return _calling(form, outs, [name for name, _ in taken])
    return None


def _calling(form: Any, outs: Sequence[str], names: Sequence[str]) -> Writer:
    def several(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Any:
        given = {name: value for name, value in kwargs.items() if name in names}
        return form(*args, **given, **dict(zip(outs, memory, strict=True)))

    def one(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Any:
        # What most of a step is.
        return several(args, kwargs, memory) if kwargs else form(*args, out=memory[0])

    return one if list(outs) == ["out"] else several


def _shaped(memory: Tensor, shape: Sequence[int], strides: Sequence[int] | None = None) -> Tensor:
    """Give memory a shape; contiguous by default."""
    if strides is None:
        return memory.resize_(shape)
    memory.resize_(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    return memory.as_strided_(shape, strides)


def _shaped_like(memory: Tensor, x: Tensor, memory_format: Any = None) -> Tensor:
    """Give memory the shape and, as torch does by default, the strides that `empty_like` has."""
    if x.is_contiguous() or memory_format is torch.contiguous_format:
        return _shaped(memory, x.shape)
    like = torch.empty_like(x, device="meta", memory_format=memory_format or torch.preserve_format)
    return _shaped(memory, x.shape, like.stride())


def _copied(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Tensor:
    to = _shaped_like(memory[0], args[0], kwargs.get("memory_format"))
    return to.copy_(args[0], non_blocking=kwargs.get("non_blocking", False))


def _masked_fill(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Tensor:
    x, mask, value = args
    to = _shaped(memory[0], torch.broadcast_shapes(x.shape, mask.shape))
    return to.copy_(x).masked_fill_(mask, value)


def _index_put(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Tensor:
    return aten.index_put_.default(_shaped_like(memory[0], args[0]).copy_(args[0]), *args[1:])


def _embedding(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Tensor:
    weight, indices = args[:2]
    rows = aten.index_select.out(weight, 0, indices.reshape(-1), out=memory[0])
    return rows.view(*indices.shape, weight.shape[1])


def _empty_like(args: Sequence[Any], kwargs: dict[str, Any], memory: list[Tensor]) -> Tensor:
    return _shaped_like(memory[0], args[0], kwargs.get("memory_format"))


def _filled_like(value: float) -> Writer:
    return lambda args, kwargs, memory: _empty_like(args, kwargs, memory).fill_(value)


def _filled(value: float) -> Writer:
    return lambda args, kwargs, memory: _shaped(memory[0], args[1]).fill_(value)


_OWN: dict[Any, Writer] = {
    aten._to_copy.default: _copied,
    aten.clone.default: _copied,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.embedding.default: _embedding,
    aten.index_put.default: _index_put,
    aten.mul.Scalar: lambda args, kwargs, memory: torch.mul(args[0], args[1], out=memory[0]),
    aten.relu.default: lambda args, kwargs, memory: aten.clamp_min.out(args[0], 0, out=memory[0]),
    aten.empty_like.default: _empty_like,
    aten.zeros_like.default: _filled_like(0),
    aten.ones_like.default: _filled_like(1),
    aten.full_like.default: lambda args, kwargs, memory: _empty_like(args, kwargs, memory).fill_(
        args[1]
    ),
    aten.empty.memory_format: lambda args, kwargs, memory: _shaped(memory[0], args[0]),
    aten.empty_strided.default: lambda args, kwargs, memory: _shaped(memory[0], args[0], args[1]),
    aten.new_empty.default: lambda args, kwargs, memory: _shaped(memory[0], args[1]),
    aten.new_empty_strided.default: lambda args, kwargs, memory: _shaped(
        memory[0], args[1], args[2]
    ),
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_full.default: lambda args, kwargs, memory: _shaped(memory[0], args[1]).fill_(args[2]),
    aten.scalar_tensor.default: lambda args, kwargs, memory: _shaped(memory[0], ()).fill_(args[0]),
    aten.arange.default: lambda args, kwargs, memory: aten.arange.out(args[0], out=memory[0]),
    aten.arange.start: lambda args, kwargs, memory: aten.arange.start_out(*args, out=memory[0]),
    aten.arange.start_step: lambda args, kwargs, memory: aten.arange.start_out(
        *args, out=memory[0]
    ),
}
