"""Packed weights in an ONNX graph: one copy of the codes in the data file, read in blocks or whole.

The codes lie as `graphopt.ir.encoding` says, which is how com.microsoft::MatMulNBits and
com.microsoft::GatherBlockQuantized have them, and, for groups that fill bytes, also how ONNX stores
a tensor of 4 or 8 bits; so other operators read the same bytes where those two do not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.ir.encoding import Packed, pack
from graphopt.ir.weights import Array, Rows, Transposed, Weight
from graphopt.lowering.onnx.builder import MICROSOFT, GraphBuilder
from graphopt.lowering.onnx.external import DataFile, Layout
from graphopt.lowering.onnx_accuracy import EXACT

_TYPES = {4: (ir.DataType.UINT4, ml_dtypes.uint4), 8: (ir.DataType.UINT8, np.uint8)}

LEAST_BLOCK, LARGEST_BLOCK = 16, 128
"""Blocks of MatMulNBits and GatherBlockQuantized are powers of two from 16 on; kernels are written
for these."""


def block_of(encoding: Packed) -> int | None:
    """Return the block in which com.microsoft's operators read an encoding; None where they can't.

    That is a group, or the largest part of one that they take: its blocks repeat a scale.
    """
    block = min(encoding.group & -encoding.group, LARGEST_BLOCK)
    return block if encoding.axis == 1 and block >= LEAST_BLOCK else None


def no_onnx_form(encoding: Packed) -> str | None:
    """Return why ONNX Runtime cannot read an encoding; None where it can."""
    if encoding.bits in _TYPES:
        return None
    if encoding.bits == 2 and block_of(encoding) is not None:
        return None if reads_two_bits() else "this ONNX Runtime has no kernel for codes of 2 bits"
    if encoding.bits == 2:
        return (
            "ONNX Runtime reads codes of 2 bits in groups along the input that are multiples of "
            f"{LEAST_BLOCK}"
        )
    return f"ONNX has no tensors of {encoding.bits}-bit codes, and MatMulNBits takes 2, 4 and 8"


@functools.cache
def reads_two_bits() -> bool:
    """Return whether this ONNX Runtime multiplies with codes of 2 bits, by trying it."""
    import onnxruntime

    encoding = Packed(2, LEAST_BLOCK)
    matrix = torch.linspace(-1, 1, 4 * 32, dtype=torch.float32).view(4, 32)
    tensors = encoding.quantise(matrix)
    builder = GraphBuilder()
    x = ir.Value(name="x", shape=ir.Shape([1, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    held = [
        builder.initializer(name, ir.tensor(tensors[name].numpy(), name=name))
        for name in ("packed", "scales")
    ]
    y = builder.op(
        "MatMulNBits", x, *held, domain=MICROSOFT, K=32, N=4, bits=2, block_size=LEAST_BLOCK,
        accuracy_level=EXACT, name="y",
    )  # fmt: skip
    y.shape, y.type = ir.Shape([1, 4]), ir.TensorType(ir.DataType.FLOAT)
    text = ir.serde.serialize_model(builder.model("two bits", [x], [y], {})).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    given = torch.linspace(0, 1, 32).view(1, 32)
    try:
        session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": given.numpy()})
    except Exception:  # ONNX Runtime's exceptions share no base class of their own
        return False
    expected = given @ encoding.dequantise(tensors).T
    return bool(torch.allclose(torch.from_numpy(found), expected, atol=1e-5))


@dataclass(eq=False)
class QuantisedMatrix:
    """A packed weight [out, in] as the ops of a graph may read it.

    Attributes:
        weight: The weight.
        codes: The uint8 tensor of its codes in the data file.
        data: The data file.
        accuracy_level: MatMulNBits' for inputs that are not rounded.
    """

    weight: Weight
    codes: ir.ExternalTensor
    data: DataFile
    accuracy_level: int
    _made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def stored(
        cls, weight: Weight, builder: GraphBuilder, data: DataFile, accuracy_level: int
    ) -> QuantisedMatrix:
        """Give the codes of a packed weight their place in a data file."""
        codes = cls._tensors(weight)["packed"]
        tensor = data.reserve(Layout((codes,)), builder.unique(codes.name))
        return cls(weight, tensor, data, accuracy_level)

    @staticmethod
    def _tensors(weight: Weight) -> dict[str, Weight]:
        return {t.name.removeprefix(f"{weight.name}."): t for t in weight.tensors()}

    @property
    def encoding(self) -> Packed:
        encoding = self.weight.encoding
        assert encoding is not None
        return encoding

    @property
    def in_blocks(self) -> bool:
        """Whether the ops of com.microsoft read it."""
        return block_of(self.encoding) is not None

    @property
    def gather_block(self) -> int | None:
        """The block in which GatherBlockQuantized reads it; None where it can't.

        Where zero points of four bits leave half of a row's last byte empty, ONNX Runtime 1.26
        takes it for the next row's. Half the block makes twice as many.
        """
        block, encoding = block_of(self.encoding), self.encoding
        if block is None or encoding.symmetric or encoding.bits != 4:
            return block
        if self.weight.shape[1] // block % 2:
            block //= 2
        return block if block >= LEAST_BLOCK else None

    @property
    def in_integers(self) -> bool:
        """Whether a product with integers needs nothing but its codes, and a scale for each row."""
        encoding = self.encoding
        whole_rows = encoding.axis == 1 and encoding.group == self.weight.shape[1]
        return whole_rows and encoding.symmetric and encoding.bits in _TYPES

    def _initializer(self, builder: GraphBuilder, weight: Weight) -> ir.Value:
        """Return a tensor of the data file, whose floats are fp32: what the graph computes in."""
        if weight.name not in self._made:
            label = builder.unique(weight.name)
            tensor = self.data.reserve(Layout((weight,), single=True), label)
            self._made[weight.name] = builder.initializer(label, tensor)
        value: ir.Value = self._made[weight.name]
        return value

    def _code_blocks(self, builder: GraphBuilder) -> ir.Value:
        """Return the codes as uint8 [rows, blocks, bytes of a block]."""
        if "blocks" not in self._made:
            block = block_of(self.encoding)
            assert block is not None
            rows, length = self.weight.shape
            shape = (rows, length // block, block * self.encoding.bits // 8)
            self._made["blocks"] = self._view(builder, ir.DataType.UINT8, shape, "blocks")
        value: ir.Value = self._made["blocks"]
        return value

    def _view(
        self, builder: GraphBuilder, dtype: ir.DataType, shape: tuple[int, ...], name: str
    ) -> ir.Value:
        """Return the bytes of the codes as an initializer of another type."""
        tensor = ir.ExternalTensor(
            self.codes.location, self.codes.offset, self.codes.length, dtype,
            shape=ir.Shape(shape), name=builder.unique(f"{self.codes.name}.{name}"),
            base_dir=self.codes.base_dir,
        )  # fmt: skip
        return builder.initializer(str(tensor.name), tensor)

    def _per_block(self, builder: GraphBuilder, block: int) -> tuple[ir.Value, ir.Value | None]:
        """Return the scales [rows, blocks] and the packed zero points of blocks, if there are any.

        Blocks that are parts of one group repeat what it has.
        """
        tensors = self._tensors(self.weight)
        scales, zeros = tensors["scales"], tensors.get("zeros")
        times = self.encoding.group // block
        if times > 1:
            groups = scales.shape[1]
            repeated = tuple(group for group in range(groups) for _ in range(times))
            by_block = Transposed(Rows(Transposed(scales.producer), repeated))
            scales = Weight(f"{scales.name}.blocks_of_{block}", by_block)
            if zeros is not None:
                points = self.encoding.zero_points(zeros.load(), groups)
                points = points.repeat_interleave(times, 1)
                packed = pack(points, self.encoding.bits)
                zeros = Weight(f"{zeros.name}.blocks_of_{block}", Array(packed))
        return (
            self._initializer(builder, scales),
            None if zeros is None else self._initializer(builder, zeros),
        )

    def matmul(self, builder: GraphBuilder, x: ir.Value, *, exact: bool = False) -> ir.Value:
        """Return x weight^T by com.microsoft::MatMulNBits.

        Args:
            exact: Whether `x` is not to be rounded, whatever the accuracy level is.
        """
        rows, length = self.weight.shape
        block = block_of(self.encoding)
        assert block is not None
        scales, zeros = self._per_block(builder, block)
        product: ir.Value = builder.op(
            "MatMulNBits", x, self._code_blocks(builder), scales, zeros,
            domain=MICROSOFT, K=length, N=rows, bits=self.encoding.bits,
            block_size=block,
            accuracy_level=EXACT if exact else self.accuracy_level,
        )  # fmt: skip
        return product

    def gather(self, builder: GraphBuilder, ids: ir.Value) -> ir.Value:
        """Return rows `ids` by com.microsoft::GatherBlockQuantized."""
        rows, length = self.weight.shape
        width = length * self.encoding.bits // 8
        codes = builder.reshape(self._code_blocks(builder), [rows, width])
        block = self.gather_block
        assert block is not None
        scales, zeros = self._per_block(builder, block)
        found: ir.Value = builder.op(
            "GatherBlockQuantized", codes, ids, scales, zeros,
            domain=MICROSOFT, bits=self.encoding.bits, block_size=block,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return found

    def integer_matmul(
        self, builder: GraphBuilder, codes: ir.Value, zero: ir.Value, scale: ir.Value
    ) -> ir.Value:
        """Return the product of integers with the weight's codes, times the scales of both.

        Codes are taken for unsigned numbers with a zero point: of two signed ones, kernels without
        instructions of their own for them may saturate sums of two products.

        Args:
            codes: uint8 [..., in].
            zero: Their zero point, a uint8 scalar.
            scale: fp32 [..., 1].
        """
        if "matrix" not in self._made:
            rows, length = self.weight.shape
            matrix = self._whole_codes(builder)
            if self.encoding.bits < 8:
                # ONNX Runtime unpacks and transposes it once, when it loads the graph.
                matrix = builder.op("Cast", matrix, to=ir.DataType.UINT8)
            matrix = self._rows(builder, matrix, rows, length)
            self._made["matrix"] = builder.op("Transpose", matrix, perm=[1, 0])
            scales = self._initializer(builder, self._tensors(self.weight)["scales"])
            self._made["row scales"] = builder.reshape(scales, [rows])
        middle = builder.constant(2 ** (self.encoding.bits - 1), np.uint8)
        product = builder.op("MatMulInteger", codes, self._made["matrix"], zero, middle)
        product = builder.op("Cast", product, to=ir.DataType.FLOAT)
        product = builder.op("Mul", product, scale)
        scaled: ir.Value = builder.op("Mul", product, self._made["row scales"])
        return scaled

    def whole(self, builder: GraphBuilder) -> ir.Value:
        """Return the matrix [out, in] by DequantizeLinear; every run of the graph unpacks it."""
        if "whole" not in self._made:
            turned = self.encoding.axis == 0
            rows, length = self.weight.shape[::-1] if turned else self.weight.shape
            scales = self._initializer(builder, self._tensors(self.weight)["scales"])
            groups = length // self.encoding.group
            scales = builder.reshape(scales, [rows, groups, 1])
            dtype, array = _TYPES[self.encoding.bits]
            name = builder.unique(f"{self.weight.name}.zero_points")
            points = self._zero_points().numpy()[..., None]
            zeros = builder.initializer(
                name, ir.tensor(points.astype(array), dtype=dtype, name=name)
            )
            codes = self._whole_codes(builder)
            value = builder.op(
                "DequantizeLinear", codes, scales, zeros, axis=2, block_size=self._stored_group
            )
            value = self._rows(builder, value, rows, length)
            self._made["whole"] = builder.op("Transpose", value, perm=[1, 0]) if turned else value
        whole: ir.Value = self._made["whole"]
        return whole

    @property
    def _stored_group(self) -> int:
        """Codes that the bytes of a group have room for."""
        return self.encoding.group_bytes * 8 // self.encoding.bits

    def _whole_codes(self, builder: GraphBuilder) -> ir.Value:
        """Return the codes as [rows, groups, codes of a group], those that are left over too."""
        if "codes" not in self._made:
            dtype, _ = _TYPES[self.encoding.bits]
            rows, length = self.weight.shape[:: -1 if self.encoding.axis == 0 else 1]
            shape = (rows, length // self.encoding.group, self._stored_group)
            self._made["codes"] = self._view(builder, dtype, shape, "codes")
        value: ir.Value = self._made["codes"]
        return value

    def _rows(self, builder: GraphBuilder, value: ir.Value, rows: int, length: int) -> ir.Value:
        """Return [rows, groups, codes of a group] as [rows, length], without what is left over."""
        if not self.encoding.fills_bytes:
            ends = [builder.constant([number]) for number in (0, self.encoding.group, 2)]
            value = builder.op("Slice", value, *ends)
        return builder.reshape(value, [rows, length])

    def _zero_points(self) -> Tensor:
        """Return the zero point of every group, uint8 [rows, groups]."""
        tensors = self._tensors(self.weight)
        rows, groups = tensors["scales"].shape
        if "zeros" not in tensors:
            return torch.full((rows, groups), 2 ** (self.encoding.bits - 1), dtype=torch.uint8)
        return self.encoding.zero_points(tensors["zeros"].load(), groups)
