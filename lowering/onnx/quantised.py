"""Packed weights in an ONNX graph: one copy of the codes in the data file, read in blocks or whole.

The codes lie as `graphopt.ir.encoding` says, which is how com.microsoft::MatMulNBits and
com.microsoft::GatherBlockQuantized have them, and, for groups that come out even, also how ONNX
stores a tensor of 4 or 8 bits; so DequantizeLinear reads the same bytes where those two do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.ir import functional
from graphopt.ir.encoding import Packed
from graphopt.ir.weights import Weight
from graphopt.lowering.onnx.builder import MICROSOFT, GraphBuilder
from graphopt.lowering.onnx.external import DataFile, Layout

_TYPES = {4: (ir.DataType.UINT4, ml_dtypes.uint4), 8: (ir.DataType.UINT8, np.uint8)}

LEAST_BLOCK = 16
"""The smallest block of MatMulNBits and GatherBlockQuantized; theirs are powers of two."""

_FP32 = 1
"""MatMulNBits' accuracy_level: products in fp32. Level 4 rounds activations to 8 bits."""


def no_onnx_form(encoding: Packed) -> str | None:
    """Return why ONNX Runtime cannot read an encoding; None where it can."""
    if encoding.bits not in _TYPES:
        return f"ONNX has no tensors of {encoding.bits}-bit codes"
    if not encoding.fills_bytes:
        return f"its groups of {encoding.group} codes do not fill whole bytes"
    return None


@dataclass(eq=False)
class QuantisedMatrix:
    """A packed weight [out, in] as the ops of a graph may read it.

    Attributes:
        weight: The weight.
        codes: The uint8 tensor of its codes in the data file.
        scales: fp32 [rows, groups].
        zeros: Packed zero points, uint8; None where the encoding is symmetric.
    """

    weight: Weight
    codes: ir.ExternalTensor
    scales: ir.Value
    zeros: ir.Value | None
    _blocks: ir.Value | None = None
    _whole: ir.Value | None = None

    @classmethod
    def stored(cls, weight: Weight, builder: GraphBuilder, data: DataFile) -> QuantisedMatrix:
        """Give the tensors of a packed weight their places in a data file."""
        tensors: dict[str, ir.ExternalTensor] = {}
        for tensor in weight.tensors():
            label = builder.unique(tensor.name)
            suffix = tensor.name.removeprefix(f"{weight.name}.")
            # The ops that read packed weights take scales of the dtype that they compute in.
            tensors[suffix] = data.reserve(Layout((tensor,), single=True), label)
        values = {
            suffix: builder.initializer(str(tensor.name), tensor)
            for suffix, tensor in tensors.items()
            if suffix != "packed"
        }
        return cls(weight, tensors["packed"], values["scales"], values.get("zeros"))

    @property
    def encoding(self) -> Packed:
        encoding = self.weight.encoding
        assert encoding is not None
        return encoding

    @property
    def in_blocks(self) -> bool:
        """Whether the ops of com.microsoft read it: groups along `in` that are blocks of theirs."""
        group = self.encoding.group
        return self.encoding.axis == 1 and group >= LEAST_BLOCK and group & (group - 1) == 0

    def _code_blocks(self, builder: GraphBuilder) -> ir.Value:
        if self._blocks is None:
            self._blocks = builder.initializer(str(self.codes.name), self.codes)
        return self._blocks

    def matmul(self, builder: GraphBuilder, x: ir.Value) -> ir.Value:
        """Return x weight^T by com.microsoft::MatMulNBits."""
        rows, length = self.weight.shape
        product: ir.Value = builder.op(
            "MatMulNBits", x, self._code_blocks(builder), self.scales, self.zeros,
            domain=MICROSOFT, K=length, N=rows, bits=self.encoding.bits,
            block_size=self.encoding.group, accuracy_level=_FP32,
        )  # fmt: skip
        return product

    def gather(self, builder: GraphBuilder, ids: ir.Value) -> ir.Value:
        """Return rows `ids` by com.microsoft::GatherBlockQuantized."""
        rows, length = self.weight.shape
        width = length * self.encoding.bits // 8
        codes = builder.reshape(self._code_blocks(builder), [rows, width])
        found: ir.Value = builder.op(
            "GatherBlockQuantized", codes, ids, self.scales, self.zeros,
            domain=MICROSOFT, bits=self.encoding.bits, block_size=self.encoding.group,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return found

    def whole(self, builder: GraphBuilder) -> ir.Value:
        """Return the matrix [out, in] by DequantizeLinear; every run of the graph unpacks it."""
        if self._whole is None:
            dtype, array = _TYPES[self.encoding.bits]
            turned = self.encoding.axis == 0
            shape = self.weight.shape[::-1] if turned else self.weight.shape
            codes = ir.ExternalTensor(
                self.codes.location, self.codes.offset, self.codes.length, dtype,
                shape=ir.Shape(shape), name=builder.unique(f"{self.codes.name}.codes"),
                base_dir=self.codes.base_dir,
            )  # fmt: skip
            name = builder.unique(f"{self.weight.name}.zero_points")
            zeros = ir.tensor(self._zero_points().astype(array), dtype=dtype, name=name)
            value = builder.op(
                "DequantizeLinear",
                builder.initializer(str(codes.name), codes),
                self.scales,
                builder.initializer(name, zeros),
                axis=1,
                block_size=self.encoding.group,
            )
            self._whole = builder.op("Transpose", value, perm=[1, 0]) if turned else value
        assert self._whole is not None
        return self._whole

    def _zero_points(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Return the zero point of every group, uint8 [rows, groups]."""
        tensors = {tensor.name: tensor for tensor in self.weight.tensors()}
        groups = tensors[f"{self.weight.name}.scales"].shape
        packed = tensors.get(f"{self.weight.name}.zeros")
        if packed is None:
            return np.full(groups, 2 ** (self.encoding.bits - 1), np.uint8)
        zeros: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = functional.unpack(
            packed.load(), self.encoding.bits
        )[:, : groups[1]].numpy()
        return zeros
