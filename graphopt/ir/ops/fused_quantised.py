"""Ops that lowering makes for kernels that read and write codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Least,
    Number,
    Op,
    Tensors,
    Types,
    get_op,
    need,
    optional,
    register,
)
from graphopt.ir.ops.fused import FusedLinear
from graphopt.ir.types import Dim, Type, dim

CodeBits = Annotated[int, pydantic.Field(ge=0, le=8)]
"""Type of the width of a code, 0 for values that are not rounded."""


def _front(name: str) -> str:
    if name not in ("", "norm", *functional.ACTIVATIONS):
        raise ValueError(f"{name!r} is neither norm nor an activation")
    return name


def _gate(name: str) -> str:
    if name and name not in functional.ACTIVATIONS:
        raise ValueError(f"{name!r} is no activation")
    return name


Gate = Annotated[str, pydantic.AfterValidator(_gate)]
"""Type of the name of an activation, or nothing."""


@register
class PackedLinear(FusedLinear):
    """`linear` of one x with `parts` packed weights, as one product: -> one output a weight.

    `factors` are the weights [out_i, in], all of one encoding, and behind them as many biases
    [out_i], or none. With `act` there are two parts of one size, and one output: act(first) second.
    """

    name = "packed_linear"
    attributes = {**FusedLinear.attributes, "act": Gate}  # noqa: RUF012
    defaults = {"act": ""}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        parts = super().infer(types, {"parts": attrs["parts"]})
        if not attrs.get("act", ""):
            return parts
        if len(parts) != 2:
            raise ValueError(f"{self.name} with act={attrs['act']!r} of {len(parts)} parts")
        return get_op("act_mul").infer(parts, {"act": attrs["act"]})

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        own = {"parts": attrs["parts"]}
        if not attrs.get("act", ""):
            return super().flops(types, outputs, own)
        parts = super().infer(types, own)
        gate = get_op("act_mul").flops(parts, outputs, {"act": attrs["act"]})
        return dim(super().flops(types, parts, own) + gate)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        return _gated(super().reference(tensors, attrs), attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        return _gated(super().torch(tensors, attrs), attrs)

    def check_encodings(self, types: Types) -> None:
        weights = [kind for kind in types[1:] if kind is not None and kind.encoding is not None]
        if len({kind.encoding for kind in weights}) > 1:
            raise ValueError("packed_linear of weights that are packed in different ways")
        if types and types[0] is not None and types[0].encoding is not None:
            raise ValueError(f"operand 'x' is {types[0]}, and this op reads dense ones")


def _gated(parts: tuple[Tensor, ...], attrs: Attrs) -> tuple[Tensor, ...]:
    act = attrs.get("act", "")
    return get_op("act_mul").reference(parts, {"act": act}) if act else parts


Front = Annotated[str, pydantic.AfterValidator(_front)]
"""Type of what a `transformed` does first: `norm`, the name of an activation, or nothing."""


@register
class Transformed(Op):
    """A norm or a gate, a Kronecker transform and rounding to codes: each there or not, at once.

    `before` is `norm`: rms_norm(x + y, norm_weight), of x alone without y; or the name of an
    activation: act(x) y; or empty: x. Then `kronecker` by the factors that are given. With `bits`
    the result is rounded as `quantise_dequantise` does symmetrically, and comes as two: codes
    (i8 [..., N]) and the scale of each token ([...], in fp32 for an x of fewer bits). With `total`
    x + y comes first.
    """

    name = "transformed"
    fused = True
    operands = ("x", "y?", "norm_weight?", "left?", "right?", "clip_low?", "clip_high?")
    attributes = {  # noqa: RUF012
        "before": Front, "total": bool, "eps": Least, "offset": Number, "bits": CodeBits,
    }  # fmt: skip
    defaults = {  # noqa: RUF012
        "before": "", "total": False, "eps": 0.0, "offset": 0.0, "bits": 0,
    }  # fmt: skip

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        before, bits = attrs.get("before", ""), attrs.get("bits", 0)
        x, results = need(types, 0), []
        if before == "norm":
            whole = [x] if _at(types, 1) is None else get_op("add").infer(types[:2], {})
            results += whole if attrs.get("total", False) else []
            (x,) = get_op("rms_norm").infer([whole[0], _at(types, 2)], _norm_attrs(attrs))
        elif before:
            (x,) = get_op("act_mul").infer(types[:2], {"act": before})
        if _at(types, 3) is not None or _at(types, 4) is not None:
            (x,) = get_op("kronecker").infer([x, _at(types, 3), _at(types, 4)], {})
        if not bits:
            return [*results, x]
        rounding = {"bits": bits, "symmetric": True}
        get_op("quantise_dequantise").infer([x, _at(types, 5), _at(types, 6)], rounding)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        codes = Type(x.shape, torch.int8), Type(x.shape[:-1], wide)
        return [*results, *codes]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        wide = need(types, 0)
        each = 5 if attrs.get("before", "") else 0
        sides = [kind.shape[0] for kind in (_at(types, 3), _at(types, 4)) if kind is not None]
        return dim(wide.numel * (each + 2 * sum(sides) + (5 if attrs.get("bits", 0) else 0)))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        before, bits = attrs.get("before", ""), attrs.get("bits", 0)
        x, results = tensors[0], []
        assert x is not None
        if before == "norm":
            y = optional(tensors, 1)
            whole = x if y is None else x + y
            results += [whole] if attrs.get("total", False) else []
            gain = optional(tensors, 2)
            (x,) = get_op("rms_norm").reference([whole, gain], _norm_attrs(attrs))
        elif before:
            (x,) = get_op("act_mul").reference(tensors[:2], {"act": before})
        factors = optional(tensors, 3), optional(tensors, 4)
        if factors != (None, None):
            (x,) = get_op("kronecker").reference([x, *factors], {})
        if not bits:
            return (*results, x)
        clips = optional(tensors, 5), optional(tensors, 6)
        return (*results, *functional.quantise(x, *clips, bits=bits))

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        found = functional.transformed(*tensors, **attrs)  # type: ignore[arg-type]
        return found if isinstance(found, tuple) else (found,)


@register
class NormPackedLinear(PackedLinear):
    """total = x + y, and the `packed_linear` of its RMS norm: -> (total, *outputs of the product).

    Without y of x alone, which total then is.
    """

    name = "norm_packed_linear"
    operands = ("x", "y?", "norm_weight?", "factors*")
    attributes = {**PackedLinear.attributes, "eps": Least, "offset": Number}  # noqa: RUF012
    defaults = {"act": "", "offset": 0.0}  # noqa: RUF012

    def check_encodings(self, types: Types) -> None:
        dense = [kind for kind in types[:3] if kind is not None]
        super().check_encodings([next((k for k in dense if k.encoding), dense[0]), *types[3:]])

    @staticmethod
    def _product(attrs: Attrs) -> Attrs:
        return {name: attrs[name] for name in ("parts", "act") if name in attrs}

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        whole = [need(types, 0)]
        if _at(types, 1) is not None:
            whole = get_op("add").infer(types[:2], {})
        normed = get_op("rms_norm").infer([whole[0], _at(types, 2)], _norm_attrs(attrs))
        return [*whole, *super().infer([*normed, *types[3:]], self._product(attrs))]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        given = [need(types, 0), *types[3:]]
        product = super().flops(given, outputs[1:], self._product(attrs))
        return dim(5 * outputs[0].numel + product)

    def _norm(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, Tensor]:
        x, y = tensors[0], optional(tensors, 1)
        assert x is not None
        whole = x if y is None else x + y
        (normed,) = get_op("rms_norm").reference([whole, optional(tensors, 2)], _norm_attrs(attrs))
        return whole, normed

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        whole, normed = self._norm(tensors, attrs)
        return (whole, *super().reference([normed, *tensors[3:]], self._product(attrs)))

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        whole, normed = self._norm(tensors, attrs)
        return (whole, *super().torch([normed, *tensors[3:]], self._product(attrs)))


@register
class TransformedPackedLinear(PackedLinear):
    """`packed_linear` of a `transformed` without rounding: -> (x + y with `total`, *outputs)."""

    name = "transformed_packed_linear"
    operands = ("x", "y?", "norm_weight?", "left?", "right?", "factors*")
    attributes = {  # noqa: RUF012
        **PackedLinear.attributes,
        "before": Front, "total": bool, "eps": Least, "offset": Number,
    }  # fmt: skip
    defaults = {  # noqa: RUF012
        "act": "", "before": "", "total": False, "eps": 0.0, "offset": 0.0,
    }  # fmt: skip

    def check_encodings(self, types: Types) -> None:
        dense = [kind for kind in types[:5] if kind is not None]
        super().check_encodings([next((k for k in dense if k.encoding), dense[0]), *types[5:]])

    @staticmethod
    def _parts(attrs: Attrs) -> tuple[Attrs, Attrs]:
        """Return the attributes of the transform, and those of the product."""
        product = {name: attrs[name] for name in ("parts", "act") if name in attrs}
        return {name: attrs[name] for name in attrs if name not in product}, product

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        front, product = self._parts(attrs)
        *total, made = get_op("transformed").infer(types[:5], front)
        return [*total, *super().infer([made, *types[5:]], product)]

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        front, product = self._parts(attrs)
        made = get_op("transformed").infer(types[:5], front)
        first = get_op("transformed").flops(types[:5], made, front)
        given = [made[-1], *types[5:]]
        return dim(first + super().flops(given, outputs[len(made) - 1 :], product))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        front, product = self._parts(attrs)
        *total, made = get_op("transformed").reference(tensors[:5], front)
        return (*total, *super().reference([made, *tensors[5:]], product))

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        front, product = self._parts(attrs)
        *total, made = get_op("transformed").torch(tensors[:5], front)
        return (*total, *super().torch([made, *tensors[5:]], product))


def _at(types: Types, index: int) -> Type | None:
    return types[index] if index < len(types) else None


def _norm_attrs(attrs: Attrs) -> Attrs:
    return {"eps": attrs.get("eps", 0.0), "offset": attrs.get("offset", 0.0)}


@register
class IntegerLinear(PackedLinear):
    """`packed_linear` of codes and the scale of each token: x = codes scales, which is not made."""

    name = "integer_linear"
    operands = ("codes", "scales", "factors*")

    def check_encodings(self, types: Types) -> None:
        super().check_encodings([need(types, 0), *types[2:]])

    @staticmethod
    def _x(types: Types) -> Type:
        """Return the type of what the codes stand for: that of the weights."""
        codes, scales = need(types, 0), need(types, 1)
        if codes.dtype != torch.int8 or scales.shape != codes.shape[:-1]:
            raise ValueError(f"integer_linear of codes {codes} with scales {scales}")
        return Type(codes.shape, need(types, 2).dtype)

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return super().infer([self._x(types), *types[2:]], attrs)

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        return super().flops([self._x(types), *types[2:]], outputs, attrs)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        return super().reference([self._values(tensors), *tensors[2:]], attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        return super().torch([self._values(tensors), *tensors[2:]], attrs)

    @staticmethod
    def _values(tensors: Tensors) -> Tensor:
        codes, scales, weight = tensors[:3]
        assert codes is not None and scales is not None and weight is not None
        return codes.to(weight.dtype) * scales[..., None].to(weight.dtype)
