"""What an op is, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar

import pydantic
import sympy
from torch import Tensor

from graphopt.ir.types import Dim, Type, dim

Types = Sequence[Type | None]
Tensors = Sequence[Tensor | None]
Attrs = Mapping[str, Any]

Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
"""Type of an attribute that is a finite number."""

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
"""Type of a finite number above 0."""

Least = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
"""Type of a finite number that is not negative."""

Count = Annotated[int, pydantic.Field(ge=1, le=2**31)]
"""Type of how many there are of something, at least one."""

Offset = Annotated[int, pydantic.Field(ge=0, le=2**31)]
"""Type of a place, or of how many there are where there may be none."""


class Op(ABC):
    """A high-level operation: shape function, symbolic cost and two implementations.

    `reference` is plain and works in fp64; `torch` is what calibration, tuning and evaluation
    run on. The third implementation, what a target runs, is under `graphopt.lowering`.

    Attributes:
        name: What the printer, recipes and saved programs call it.
        operands: Operand names in order; a trailing `?` marks one that may be absent, and a
            trailing `*` at the last one that there are as many as one likes, none absent.
        attributes: The type of every attribute it has.
        defaults: Attributes the printer leaves out at these values; the others must be given.
        encoded: Operands that may be packed, by name; the implementations get their values.
        fused: True for what lowering makes of several ops for the kernels of a target. Other
            emitters need no translation of it.
    """

    name: ClassVar[str]
    operands: ClassVar[tuple[str, ...]]
    attributes: ClassVar[Mapping[str, Any]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    encoded: ClassVar[tuple[str, ...]] = ()
    fused: ClassVar[bool] = False

    def operand_name(self, index: int) -> str:
        """Return what an operand is called; of those behind a `*`, `factors_2` and so on."""
        last = len(self.operands) - 1
        if index >= last and self.operands[last].endswith("*"):
            return f"{self.operands[last][:-1]}_{index - last}"
        return self.operands[index].rstrip("?") if index <= last else f"{index}"

    def check_count(self, operands: Sequence[object]) -> None:
        """Check how many operands there are, and that none is absent that must be there.

        Raises:
            ValueError: There are too few, too many, or a required one is absent.
        """
        required = sum(name[-1] not in "?*" for name in self.operands)
        many = self.operands[-1].endswith("*") if self.operands else False
        if len(operands) < required or (len(operands) > len(self.operands) and not many):
            raise ValueError(f"{len(operands)} operands for {self.operands}")
        repeated = operands[len(self.operands) - 1 :] if many else ()
        if any(operand is None for operand in (*operands[:required], *repeated)):
            raise ValueError("a required operand is missing")

    def check_encodings(self, types: Types) -> None:
        """Check that only operands which may be packed are.

        Raises:
            ValueError: Another one is.
        """
        for index, operand in enumerate(types):
            if operand is None or operand.encoding is None:
                continue
            name = self.operand_name(index)
            if name not in self.encoded:
                raise ValueError(f"operand {name!r} is {operand}, and this op reads dense ones")

    def check(self, attrs: Attrs, types: Types) -> None:
        """Check the attributes of a node, as a call gives them, by their declared types.

        Raises:
            ValueError: One is missing, unknown, or not of its type.
        """
        try:
            _schema(type(self)).model_validate(dict(attrs))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = str(first["loc"][0])
            if first["type"] == "missing":
                raise ValueError(f"attribute {name!r} is not set") from error
            if first["type"] == "extra_forbidden":
                raise ValueError(f"it has no attribute {name!r}") from error
            wanted = first["msg"].replace("Input should", "it should")
            raise ValueError(f"attribute {name!r} is {attrs[name]!r:.60}, and {wanted}") from error

    @abstractmethod
    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        """Return the output types.

        Raises:
            ValueError: The operand types or attributes do not fit the op.
        """

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        """Return floating-point operations; the default is one per output element."""
        return dim(sum((sympy.sympify(t.numel) for t in outputs), sympy.Integer(0)))

    def bytes(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        """Return the bytes moved when every operand is read and every output written once."""
        moved = [t.bytes for t in types if t is not None] + [t.bytes for t in outputs]
        return dim(sum((sympy.sympify(m) for m in moved), sympy.Integer(0)))

    @abstractmethod
    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        """Compute plainly, in the dtype of the operands, fp64 included."""

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        """Compute fast; the default is the reference."""
        return self.reference(tensors, attrs)


@cache
def _schema(op: type[Op]) -> type[pydantic.BaseModel]:
    fields: dict[str, Any] = {
        name: (kind, op.defaults.get(name, ...)) for name, kind in op.attributes.items()
    }
    strict = pydantic.ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    return pydantic.create_model(op.__name__, __config__=strict, **fields)


COMMUTATIVE = frozenset({"add", "mul"})
"""Ops whose two operands may change places: both orders round alike."""

_OPS: dict[str, Op] = {}


def register(op: type[Op]) -> type[Op]:
    """Class decorator: make an op known under its name."""
    if op.name in _OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    _OPS[op.name] = op()
    return op


def get_op(name: str) -> Op:
    """Return the op called `name`; every `aten.*` and `transformers.*` name is the ATen op.

    Raises:
        KeyError: No such op.
    """
    if "." in name:
        return _OPS["aten"]
    return _OPS[name]


def is_aten(name: str) -> bool:
    """True for an operation that capture could not raise."""
    return "." in name


def all_ops() -> dict[str, Op]:
    """Return the registered ops by name."""
    return dict(_OPS)


def need(types: Types, index: int) -> Type:
    """Return operand type `index`.

    Raises:
        ValueError: It is not there.
    """
    value = types[index] if index < len(types) else None
    if value is None:
        raise ValueError(f"operand {index} is missing")
    return value


def optional(tensors: Tensors, index: int) -> Tensor | None:
    """Return operand `index`; None where it is absent."""
    return tensors[index] if index < len(tensors) else None


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Return the broadcast of `shapes`.

    Raises:
        ValueError: Two sizes differ and neither is 1.
    """
    rank = max(len(shape) for shape in shapes)
    result: list[Dim] = []
    for axis in range(rank):
        size: Dim = 1
        for shape in shapes:
            offset = axis - (rank - len(shape))
            other = shape[offset] if offset >= 0 else 1
            if size == 1:
                size = other
            elif other != 1 and sympy.simplify(sympy.sympify(size) - other) != 0:
                raise ValueError(f"sizes {size} and {other} do not broadcast")
        result.append(size)
    return tuple(result)


def same(a: Dim, b: Dim) -> bool:
    """True where two symbolic sizes are equal for all B, S and P."""
    return a == b or sympy.simplify(sympy.sympify(a) - sympy.sympify(b)) == 0
