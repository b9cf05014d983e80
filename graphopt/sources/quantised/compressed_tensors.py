"""Checkpoints of compressed-tensors, which llm-compressor writes.

Of a layer [out, in] they hold, by format,

    pack-quantized    weight_packed int32 [out, in * bits / 32], codes of a row, the first lowest;
                      weight_scale [out, groups]; weight_zero_point int32 [out * bits / 32, groups],
                      packed along out, where asymmetric; weight_shape; weight_g_idx [in], the
                      group of each input, where groups are no neighbours
    int-quantized     weight int8 [out, in], codes less 2 ** (bits - 1); weight_scale;
                      weight_zero_point int8 [out, groups], less 2 ** (bits - 1)
    float-quantized,  weight fp8 [out, in]; weight_scale
    naive-quantized   either of the two before

Activations that the config says to be rounded while the model runs are not: the weights are what
is read.
Source: compressed-tensors 0.20, `compressors/` and `quantization/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from pydantic import Field

from graphopt.ir.encoding import BITS
from graphopt.ir.weights import Producer
from graphopt.sources.quantised.float8 import (
    FLOAT8,
    UNUSED,
    USUAL_BLOCK,
    Block,
    Positive,
    made_dense,
    scaled,
)
from graphopt.sources.quantised.method import (
    Method,
    ReadTensors,
    about_uneven_groups,
    groups_of_inputs,
    misshapen,
    needed,
    parts_of,
    unread,
)
from graphopt.sources.quantised.words import (
    WORD,
    Codes,
    ColumnWords,
    RowWords,
    SignedCodes,
    Spread,
    TurnedCodes,
    quantised_matrix,
)
from graphopt.support.inputs import OpenSchema, parse

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "dense",
)  # fmt: skip

_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_PLAIN = ("weight", "weight_scale", "weight_zero_point")


class _Weights(OpenSchema):
    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    # Older releases write "128x128" for [128, 128].
    block_structure: (
        Annotated[list[Positive], Field(min_length=2, max_length=2)]
        | Annotated[str, Field(pattern=r"^[1-9]\d{0,5}x[1-9]\d{0,5}$")]
        | None
    ) = None


class _Group(OpenSchema):
    weights: _Weights | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Keys(OpenSchema):
    format: str | None = None
    config_groups: dict[str, _Group] = Field(default_factory=dict)
    quantization_status: str | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class CompressedTensors(Method):
    """compressed-tensors: the tensors say what is quantised how, the config of how many bits."""

    where: str
    keys: _Keys

    @classmethod
    def of(cls, where: str, entries: Mapping[str, Any]) -> CompressedTensors:
        """Return the method of a config's entries.

        Raises:
            SourceError: They are malformed, or of a form that is not read.
        """
        keys = parse(_Keys, dict(entries), where)
        for stated in [keys.format, *(group.format for group in keys.config_groups.values())]:
            if stated is not None and stated not in FORMATS:
                raise unread(where, f"the compressed-tensors format {stated!r:.60}")
        sparse = (keys.sparsity_config or {}).get("format")
        if sparse not in (None, "dense"):
            raise unread(where, f"sparse weights of the compressed-tensors format {sparse!r:.60}")
        if (keys.transform_config or {}).get("config_groups"):
            raise unread(where, "transforms of activations (transform_config)")
        if keys.quantization_status not in (None, "compressed"):
            raise unread(where, f"weights in the state {keys.quantization_status!r:.60}")
        for group in keys.config_groups.values():
            weights = group.weights
            if weights is not None and (weights.type, weights.num_bits) != ("float", 8):
                if weights.type != "int" or weights.num_bits not in BITS:
                    raise unread(where, f"weights of {weights.num_bits} bits ({weights.type})")
        return cls(where, keys)

    @property
    def _bits(self) -> list[int]:
        """The widths of codes that the config states."""
        groups = self.keys.config_groups.values()
        return sorted({g.weights.num_bits for g in groups if g.weights and g.weights.type == "int"})

    def read(self, tensors: Mapping[str, Producer], dtype: torch.dtype) -> ReadTensors:
        result = ReadTensors()
        packed, plain = parts_of(tensors, "weight_packed"), parts_of(tensors, "weight_scale")
        float8: list[str] = []
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if module in packed and last in _PACKED:
                if last == "weight_packed":
                    result.tensors[f"{module}.weight"] = self._packed(module, packed[module])
            elif module in plain and module not in packed and last in _PLAIN:
                if last == "weight" and tensor.dtype in FLOAT8:
                    scales = plain[module]["weight_scale"]
                    block = self._block(tensor, scales)
                    result.tensors[name] = scaled(name, tensor, scales, block, dtype, self.where)
                    float8.append(name)
                elif last == "weight":
                    result.tensors[name] = self._signed(module, plain[module])
            elif not name.endswith(UNUSED):
                result.tensors[name] = tensor
        if float8:
            result.notes.append(made_dense(float8, dtype))
        result.notes += about_uneven_groups(result.tensors, "actorder")
        result.notes += self._left_out()
        return result

    def _block(self, weight: Producer, scales: Producer) -> Block:
        """Return the block of an fp8 weight: the one that is stated and has so many scales."""
        stated: set[Block] = set()
        for group in self.keys.config_groups.values():
            block = group.weights.block_structure if group.weights else None
            if block is not None:
                rows, columns = block.split("x") if isinstance(block, str) else block
                stated.add((int(rows), int(columns)))
        # Blocks that reach beyond the matrix are alike.
        fitting = {
            tuple(map(min, block, weight.shape))
            for block in stated or {USUAL_BLOCK}
            if scales.shape == tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=False))
        }
        if len(fitting) > 1:
            raise unread(
                self.where, f"blocks of more sizes than one that have {scales.shape} scales"
            )
        return cast(Block, next(iter(fitting), USUAL_BLOCK))

    @property
    def _group_sizes(self) -> list[int]:
        """How many inputs share a scale, by each group of layers that says it; -1 for all."""
        sizes: list[int] = []
        for group in self.keys.config_groups.values():
            weights = group.weights
            if weights is None or weights.type != "int":
                continue
            if weights.strategy in ("channel", "tensor"):
                sizes.append(-1)
            elif weights.group_size is not None:
                sizes.append(weights.group_size)
        return sizes

    def _left_out(self) -> list[str]:
        """Return what the config says of running the model that is not done."""
        groups = self.keys.config_groups.values()
        left = ["activations"] * any(g.input_activations or g.output_activations for g in groups)
        left += ["keys and values"] * (self.keys.kv_cache_scheme is not None)
        return [f"{self.where} says that {what} are rounded, which they are not here"
                for what in left]  # fmt: skip

    def _packed(self, module: str, parts: Mapping[str, Producer]) -> Producer:
        """Return the weight of a layer in the format pack-quantized."""
        words, scales = parts["weight_packed"], needed(self.where, module, parts, "weight_scale")
        shape = needed(self.where, module, parts, "weight_shape")
        if shape.shape != (2,) or shape.dtype.is_floating_point or words.dtype != torch.int32:
            raise misshapen(module, parts, self.where)
        rows, length = (int(size) for size in shape.load())
        fitting = [b for b in self._bits if words.shape == (rows, -(-length * b // WORD))]
        if len(fitting) != 1 or rows < 1 or length < 1:
            raise misshapen(module, parts, self.where)
        (bits,) = fitting
        groups = scales.shape[1] if len(scales.shape) == 2 else 1
        zeros: Codes | None = None
        points = parts.get("weight_zero_point")
        if points is not None and points.dtype == torch.int8:
            zeros = self._bytes(module, parts, points, rows, groups, bits)
        elif points is not None:
            if points.shape != (-(-rows * bits // WORD), groups) or points.dtype != torch.int32:
                raise misshapen(module, parts, self.where)
            zeros = TurnedCodes(ColumnWords(points, groups, rows, bits), rows, groups, bits)
        codes = RowWords(words, rows, length, bits)
        return self._weight(module, parts, codes, scales, zeros)

    def _signed(self, module: str, parts: Mapping[str, Producer]) -> Producer:
        """Return the weight of a layer in the format int-quantized."""
        weight, scales = parts["weight"], parts["weight_scale"]
        if weight.dtype != torch.int8:
            return weight  # a dense layer whose scales are of something else
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise misshapen(module, parts, self.where)
        rows, length = weight.shape
        bits = self._bits[-1] if self._bits else 8
        groups = scales.shape[1] if len(scales.shape) == 2 else 1
        zeros: Codes | None = None
        if (points := parts.get("weight_zero_point")) is not None:
            zeros = self._bytes(module, parts, points, rows, groups, bits)
        return self._weight(module, parts, SignedCodes(weight, rows, length, bits), scales, zeros)

    def _bytes(
        self,
        module: str,
        parts: Mapping[str, Producer],
        points: Producer,
        rows: int,
        groups: int,
        bits: int,
    ) -> Codes:
        """Return zero points that are stored as bytes with a sign."""
        if points.dtype != torch.int8:
            raise misshapen(module, parts, self.where)
        if points.shape != (rows, groups):
            if math.prod(points.shape) not in (1, rows) or groups != 1:
                raise misshapen(module, parts, self.where)
            points = Spread(points, (rows, groups))
        return SignedCodes(points, rows, groups, bits)

    def _weight(
        self,
        module: str,
        parts: Mapping[str, Producer],
        codes: Codes,
        scales: Producer,
        zeros: Codes | None,
    ) -> Producer:
        if not scales.dtype.is_floating_point or 0 in scales.shape:
            raise misshapen(module, parts, self.where)
        count = scales.shape[1] if len(scales.shape) == 2 else 1
        if scales.shape != (codes.rows, count):
            if scales.shape not in ((), (1,), (1, 1), (codes.rows,)):
                raise misshapen(module, parts, self.where)
            scales = Spread(scales, (codes.rows, 1))
        groups = groups_of_inputs(
            module, parts, codes.length, count, self._group_sizes, self.where,
            order=parts.get("weight_g_idx"),
        )  # fmt: skip
        return quantised_matrix(codes, scales, zeros, groups)
