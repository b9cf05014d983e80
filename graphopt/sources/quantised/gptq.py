"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A weight [out, in] of `bits` bits, in groups of inputs, is stored as

    qweight   int32 [in * bits / 32, out]       codes of an output channel, the first lowest
    qzeros    int32 [groups, out * bits / 32]   zero points of a group, the first lowest; in
                                                format `gptq` less one, in `gptq_v2` as they are
    scales    fp16 [groups, out]
    g_idx     int32 [in]                        the group of each input

and is (code - zero point) * scale. In `gptq` one is taken from each zero point of a word, with
what a 0 borrows, so that adding a word of ones gives them back. Zero points of 3 bits, which lie
across words, are written in two ways there, and are not read; symmetric codes need none.
Source: E. Frantar et al., GPTQ (arXiv 2210.17323), and GPTQModel's `convert_gptq_v1_to_v2_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir.encoding import BITS
from graphopt.ir.weights import Producer, Transposed
from graphopt.sources.quantised.method import (
    Method,
    ReadTensors,
    check_words,
    counted,
    in_order,
    misshapen,
    needed,
    parts_of,
    unread,
)
from graphopt.sources.quantised.words import (
    WORD,
    ColumnWords,
    OutOfOrder,
    RowWords,
    TurnedCodes,
    packed_matrix,
)
from graphopt.support.inputs import OpenSchema, parse

_FORMATS = ("gptq", "gptq_v2")


class _Keys(OpenSchema):
    bits: int
    group_size: int = -1
    sym: bool = True
    checkpoint_format: str | None = None
    format: str | None = None
    is_marlin_format: bool = False
    dynamic: dict[str, Any] | None = None


@dataclass(frozen=True)
class Gptq(Method):
    """GPTQ: bits, symmetry and the convention of zero points are the config's to say."""

    where: str
    keys: _Keys

    @classmethod
    def of(cls, where: str, entries: Mapping[str, Any]) -> Gptq:
        """Return the method of a config's entries.

        Raises:
            SourceError: They are malformed, or of a form that is not read.
        """
        keys = parse(_Keys, dict(entries), where)
        stated = keys.checkpoint_format or keys.format or _FORMATS[0]
        if stated not in _FORMATS or keys.is_marlin_format:
            name = "marlin" if keys.is_marlin_format else stated
            raise unread(where, f"the GPTQ format {name!r}")
        if keys.bits not in BITS:
            raise unread(where, f"GPTQ with {keys.bits} bits")
        if not _divides_words(keys.bits) and not keys.sym and stated == _FORMATS[0]:
            raise unread(where, "zero points of 3 bits in the GPTQ format 'gptq'")
        return cls(where, keys)

    def read(self, tensors: Mapping[str, Producer], dtype: torch.dtype) -> ReadTensors:
        quantised = parts_of(tensors, "qweight")
        result = ReadTensors()
        out_of_order: list[str] = []
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if module not in quantised or last not in ("qweight", "qzeros", "scales", "g_idx"):
                result.tensors[name] = tensor
                continue
            if last == "qweight":
                weight = self._weight(module, quantised[module])
                result.tensors[f"{module}.weight"] = weight
                result.out_by_in.add(f"{module}.weight")
                if weight.encoding is None:
                    out_of_order.append(module)
        if out_of_order:
            result.notes.append(
                f"{counted(out_of_order)}: inputs are grouped in the order of their activations "
                "(desc_act), so these weights are read as dense values"
            )
        return result

    def _weight(self, module: str, parts: Mapping[str, Producer]) -> Producer:
        qweight, qzeros, scales = (
            needed(self.where, module, parts, name) for name in ("qweight", "qzeros", "scales")
        )
        check_words(module, (qweight, qzeros), scales, parts, self.where)
        groups, rows = scales.shape
        bits = qzeros.shape[1] * WORD // rows if self.keys.dynamic else self.keys.bits
        length = qweight.shape[0] * WORD // bits if bits in BITS else 0
        if (
            qweight.shape != (-(-length * bits // WORD), rows)
            or qzeros.shape != (groups, -(-rows * bits // WORD))
            or not length
        ):
            raise misshapen(module, parts, self.where)
        codes = ColumnWords(qweight, rows, length, bits)
        zeros = TurnedCodes(
            RowWords(qzeros, groups, rows, bits, added=self._added(bits)), rows, groups, bits
        )
        turned, symmetric = Transposed(scales), self.keys.sym
        order = parts.get("g_idx")
        if order is not None and not in_order(module, parts, order, length, groups, self.where):
            return OutOfOrder(codes, turned, None if symmetric else zeros, order)
        packed = packed_matrix(
            codes, turned, None if symmetric else zeros,
            check=zeros if symmetric and _divides_words(bits) else None, name=f"{module}.weight",
        )  # fmt: skip
        if packed is None:
            raise misshapen(module, parts, self.where)
        return packed

    def _added(self, bits: int) -> int:
        """Return what is to be added to a word of zero points."""
        if (self.keys.checkpoint_format or self.keys.format) == "gptq_v2":
            return 0
        return sum(1 << place for place in range(0, WORD, bits)) if _divides_words(bits) else 0


def _divides_words(bits: int) -> bool:
    return WORD % bits == 0
