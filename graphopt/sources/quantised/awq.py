"""AWQ checkpoints, as AutoAWQ's version `gemm` and GPTQModel write them.

A weight [out, in] of 4 bits, in groups of inputs, is stored as

    qweight   int32 [in, out / 8]       codes of an input, those of eight outputs in a word
    qzeros    int32 [groups, out / 8]   zero points of a group, alike
    scales    fp16 [groups, out]

and is (code - zero point) * scale. The lowest four bits of a word are of the first of its eight
outputs, and those above of the outputs 2, 4, 6, 1, 3, 5 and 7.
Source: J. Lin et al., AWQ (arXiv 2306.00978), and AutoAWQ's `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.weights import Producer, Transposed
from graphopt.sources.quantised.method import (
    Method,
    ReadTensors,
    check_words,
    groups_of_inputs,
    misshapen,
    needed,
    parts_of,
    unread,
)
from graphopt.sources.quantised.words import WORD, Codes, TurnedCodes, as_bytes, quantised_matrix
from graphopt.support.inputs import OpenSchema, parse

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of a word are of, from the lowest on."""


class _Keys(OpenSchema):
    """AutoAWQ's own names, in quant_config.json, beside transformers' for the same."""

    bits: int | None = None
    w_bit: int | None = None
    zero_point: bool = True
    group_size: int | None = None
    q_group_size: int | None = None
    version: str | None = None
    checkpoint_format: str | None = None
    format: str | None = None


@dataclass(frozen=True)
class InterleavedWords(Codes):
    """int32 [out, in / 8] of 4-bit codes, those of a word in AutoAWQ's order."""

    def codes(self) -> Tensor:
        nibbles = functional.unpack(as_bytes(self.source.load()), self.bits)
        words = nibbles.unflatten(-1, (-1, len(_ORDER)))
        ordered = torch.empty_like(words)
        ordered[..., list(_ORDER)] = words
        return ordered.flatten(-2)


@dataclass(frozen=True)
class Awq(Method):
    """AWQ, whose bits and layout are always the same.

    Attributes:
        group_size: How many inputs share a scale, -1 for all; None where nothing says it.
    """

    where: str
    group_size: int | None

    @classmethod
    def of(cls, where: str, entries: Mapping[str, Any]) -> Awq:
        """Return the method of a config's entries.

        Raises:
            SourceError: They are malformed, or of a form that is not read.
        """
        keys = parse(_Keys, dict(entries), where)
        version = (keys.version or keys.checkpoint_format or keys.format or "gemm").lower()
        if version != "gemm":
            raise unread(where, f"AWQ in the version {version!r}")
        bits = keys.w_bit if keys.bits is None else keys.bits
        if bits not in (None, _BITS):
            raise unread(where, f"AWQ with {bits} bits")
        if not keys.zero_point:
            raise unread(where, "AWQ without zero points")
        return cls(where, keys.q_group_size if keys.group_size is None else keys.group_size)

    def read(self, tensors: Mapping[str, Producer], dtype: torch.dtype) -> ReadTensors:
        quantised = parts_of(tensors, "qweight")
        result = ReadTensors()
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if module not in quantised or last not in ("qweight", "qzeros", "scales"):
                result.tensors[name] = tensor
            elif last == "qweight":
                result.tensors[f"{module}.weight"] = self._weight(module, quantised[module])
        return result

    def _weight(self, module: str, parts: Mapping[str, Producer]) -> Producer:
        qweight, qzeros, scales = (
            needed(self.where, module, parts, name) for name in ("qweight", "qzeros", "scales")
        )
        check_words(module, (qweight, qzeros), scales, parts, self.where)
        (groups, rows), length = scales.shape, qweight.shape[0]
        words = rows * _BITS // WORD
        if qweight.shape != (length, words) or qzeros.shape != (groups, words):
            raise misshapen(module, parts, self.where)
        codes = InterleavedWords(qweight, length, rows, _BITS)
        zeros = InterleavedWords(qzeros, groups, rows, _BITS)
        stated = [] if self.group_size is None else [self.group_size]
        matrix = quantised_matrix(
            TurnedCodes(codes, rows, length, _BITS),
            Transposed(scales),
            TurnedCodes(zeros, rows, groups, _BITS),
            groups_of_inputs(module, parts, length, groups, stated, self.where),
        )
        if matrix.encoding is None:  # AutoAWQ and GPTQModel make none whose groups are uneven
            raise misshapen(module, parts, self.where)
        return matrix
