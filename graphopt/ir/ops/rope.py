"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Count,
    Least,
    Number,
    Op,
    Positive,
    Tensors,
    Types,
    need,
    register,
    same,
)
from graphopt.ir.types import Dim, Type, dim


@register
class RopeTable(Op):
    """Cosines and sines: positions [B, S], inv_freq [R/2] -> two of [B, S, R/2].

    Source: Su et al., arXiv 2104.09864, section 3.2.2.
    """

    name = "rope_table"
    operands = ("positions", "inv_freq")
    attributes = {"scale": Number}  # noqa: RUF012
    defaults = {"scale": 1.0}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        positions, inv_freq = need(types, 0), need(types, 1)
        if len(inv_freq.shape) != 1:
            raise ValueError(f"rope_table with inv_freq {inv_freq}")
        table = Type((*positions.shape, inv_freq.shape[0]), inv_freq.dtype)
        return [table, table]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, inv_freq = tensors
        assert positions is not None and inv_freq is not None
        angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
        scale = attrs.get("scale", 1.0)
        return torch.cos(angles) * scale, torch.sin(angles) * scale

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, inv_freq = tensors
        assert positions is not None and inv_freq is not None
        return functional.rope_table(positions, inv_freq, attrs.get("scale", 1.0))


class _Frequencies(Op):
    """What depends on the longest sequence of a step: positions [B, S], its newest token included.

    The longest decides for the whole batch, as in transformers' `dynamic_rope_update`; keys that
    lie in a cache keep the rotation they were stored with.
    """

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(need(types, 0).numel)


@register
class ByLength(_Frequencies):
    """`long` where the longest sequence has more than `length` tokens, else `short`.

    LongRoPE's two sets of frequencies [R/2], or of factors on the tables [1].

    Source: Ding et al., arXiv 2402.13753, section 3.3.
    """

    name = "by_length"
    operands = ("positions", "short", "long")
    attributes = {"length": Count}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        positions, short, long = need(types, 0), need(types, 1), need(types, 2)
        if len(positions.shape) != 2 or short != long or not attrs["length"] > 0:
            raise ValueError(f"by_length of {short} and {long} for positions {positions}")
        return [short]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, short, long = tensors
        assert positions is not None and short is not None and long is not None
        return ((long if int(positions.max()) + 1 > attrs["length"] else short).clone(),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, short, long = tensors
        assert positions is not None and short is not None and long is not None
        return (functional.by_length(positions, short, long, attrs["length"]),)


@register
class NtkFrequencies(_Frequencies):
    """Dynamic NTK: frequencies [R/2] of a base that grows with the longest sequence.

    With n the tokens of the longest sequence, at least `length`, the base becomes
    base (factor n / length - factor + 1)^(R / (R - 2)), and a frequency is the base to the power
    of minus its exponent [R/2], which is 2i / R.

    Source: Peng et al., arXiv 2309.00071, section 3.1 and appendix B.2.
    """

    name = "ntk_frequencies"
    operands = ("positions", "exponents")
    attributes = {"base": Positive, "factor": Least, "length": Count}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        positions, exponents = need(types, 0), need(types, 1)
        pairs = exponents.shape[0] if len(exponents.shape) == 1 else 0
        if len(positions.shape) != 2 or not isinstance(pairs, int) or pairs < 2:
            raise ValueError(f"ntk_frequencies with exponents {exponents} at {positions}")
        if not (attrs["length"] > 0 and attrs["base"] > 0 and attrs["factor"] >= 0):
            raise ValueError(f"ntk_frequencies with {dict(attrs)}")
        return [exponents]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, exponents = tensors
        assert positions is not None and exponents is not None
        longest = max(int(positions.max()) + 1, attrs["length"])
        stretch = attrs["factor"] * longest / attrs["length"] - attrs["factor"] + 1
        rotated = 2 * exponents.shape[0]
        return ((attrs["base"] * stretch ** (rotated / (rotated - 2))) ** -exponents,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, exponents = tensors
        assert positions is not None and exponents is not None
        numbers = (attrs["base"], attrs["factor"], attrs["length"])
        return (functional.ntk_frequencies(positions, exponents, *numbers),)


@register
class Rope(Op):
    """Rotate the first R features of every head; cos, sin [B, S, R/2].

    x is [B, H, S, D], or [B, S, H, D] with `heads_first=False`. Pairs are halves, or
    neighbours with `interleaved=True`.
    """

    name = "rope"
    operands = ("x", "cos", "sin")
    attributes = {"interleaved": bool, "heads_first": bool}  # noqa: RUF012
    defaults = {"interleaved": False, "heads_first": True}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, cos, sin = need(types, 0), need(types, 1), need(types, 2)
        fits = len(x.shape) == 4 and len(cos.shape) == 3 and cos.shape == sin.shape
        width, half = x.shape[-1], cos.shape[-1]
        if not fits or not isinstance(width, int) or 2 * int(half) > width:
            raise ValueError(f"rope of {x} with tables {cos} and {sin}")
        tokens = (x.shape[0], x.shape[2 if attrs.get("heads_first", True) else 1])
        if not all(a in (1, b) or same(a, b) for a, b in zip(cos.shape, tokens, strict=False)):
            raise ValueError(f"rope of {x} with tables {cos} and {sin}")
        return [x]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        x, cos = need(types, 0), need(types, 1)
        return dim(3 * x.numel / x.shape[-1] * 2 * cos.shape[-1])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, cos, sin = tensors
        assert x is not None and cos is not None and sin is not None
        axis = 1 if attrs.get("heads_first", True) else 2
        cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        half = cos.shape[-1]
        out = x.clone()
        for pair in range(half):
            first, second = (
                (2 * pair, 2 * pair + 1) if attrs.get("interleaved") else (pair, pair + half)
            )
            c, s = cos[..., pair], sin[..., pair]
            out[..., first] = x[..., first] * c - x[..., second] * s
            out[..., second] = x[..., second] * c + x[..., first] * s
        return (out,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, cos, sin = tensors
        assert x is not None and cos is not None and sin is not None
        interleaved, first = attrs.get("interleaved", False), attrs.get("heads_first", True)
        return (functional.rope(x, cos, sin, interleaved, first),)
