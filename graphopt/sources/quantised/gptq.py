"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A weight [out, in] of `bits` bits, in groups of inputs, is stored as

    qweight   int32 [in * bits / 32, out]       codes of an output channel, the first lowest
    qzeros    int32 [groups, out * bits / 32]   zero points of a group, the first lowest; in
                                                format `gptq` less one, in `gptq_v2` as they are
    scales    fp16 [groups, out]
    g_idx     int32 [in]                        the group of each input

and is (code - zero point) * scale. In `gptq` one is taken from each zero point of a word, with
what a 0 borrows, so that adding a word of ones gives them back. Zero points of 3 bits, which lie
across words, are written in two ways there, and are not read; symmetric codes need none. What
`dynamic` states of some layers, by patterns of their names, goes before what is stated of all.
Source: E. Frantar et al., GPTQ (arXiv 2210.17323), and GPTQModel's `convert_gptq_v1_to_v2_format`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ir.encoding import BITS
from graphopt.ir.weights import Producer, Transposed
from graphopt.sources.quantised.method import (
    Method,
    ReadTensors,
    about_uneven_groups,
    check_words,
    groups_of_inputs,
    misshapen,
    needed,
    parts_of,
    unread,
)
from graphopt.sources.quantised.words import (
    WORD,
    ColumnWords,
    RowWords,
    TurnedCodes,
    quantised_matrix,
)
from graphopt.support.inputs import OpenSchema, parse

_FORMATS = ("gptq", "gptq_v2")


class _Layer(OpenSchema):
    """What is stated of some layers; None for what is stated of all."""

    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None


class _Keys(OpenSchema):
    bits: int
    group_size: int | None = None
    sym: bool = True
    checkpoint_format: str | None = None
    format: str | None = None
    is_marlin_format: bool = False
    dynamic: dict[str, _Layer] | None = None


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
        layers = keys.dynamic or {}
        for bits in (keys.bits, *(layer.bits for layer in layers.values())):
            if bits is not None and bits not in BITS:
                raise unread(where, f"GPTQ with {bits} bits")
        for pattern in layers:
            try:
                re.compile(_expression(pattern))
            except re.error as error:
                raise unread(where, f"the pattern of layers {pattern!r:.60}") from error
            if _takes_long(_expression(pattern)):
                raise unread(where, f"the pattern of layers {pattern!r:.60}, with so many repeats")
        return cls(where, keys)

    def read(self, tensors: Mapping[str, Producer], dtype: torch.dtype) -> ReadTensors:
        quantised = parts_of(tensors, "qweight")
        result = ReadTensors()
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if module not in quantised or last not in ("qweight", "qzeros", "scales", "g_idx"):
                result.tensors[name] = tensor
                continue
            if last == "qweight":
                weight = self._weight(module, quantised[module])
                result.tensors[f"{module}.weight"] = weight
                result.out_by_in.add(f"{module}.weight")
        result.notes += about_uneven_groups(result.tensors, "desc_act")
        return result

    def _stated(self, module: str) -> _Layer:
        """Return what is stated of a layer: the first pattern that its name begins with counts."""
        usual = _Layer(bits=self.keys.bits, group_size=self.keys.group_size, sym=self.keys.sym)
        for pattern, layer in (self.keys.dynamic or {}).items():
            # What begins with "-:" names layers that are dense.
            if not pattern.startswith("-:") and re.match(_expression(pattern), module):
                return usual.model_copy(update=layer.model_dump(exclude_none=True))
        return usual

    def _weight(self, module: str, parts: Mapping[str, Producer]) -> Producer:
        qweight, qzeros, scales = (
            needed(self.where, module, parts, name) for name in ("qweight", "qzeros", "scales")
        )
        check_words(module, (qweight, qzeros), scales, parts, self.where)
        groups, rows = scales.shape
        stated = self._stated(module)
        assert stated.bits is not None
        bits, symmetric, in_words = stated.bits, bool(stated.sym), WORD % stated.bits == 0
        if not in_words and not symmetric and not self._is_version_2:
            raise unread(self.where, f"zero points of {bits} bits in the GPTQ format 'gptq'")
        length = qweight.shape[0] * WORD // bits
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
        sizes = [] if stated.group_size is None else [stated.group_size]
        return quantised_matrix(
            codes,
            Transposed(scales),
            None if symmetric else zeros,
            groups_of_inputs(
                module, parts, length, groups, sizes, self.where, order=parts.get("g_idx")
            ),
            check=zeros if symmetric and (in_words or self._is_version_2) else None,
            name=f"{module}.weight",
        )

    @property
    def _is_version_2(self) -> bool:
        return (self.keys.checkpoint_format or self.keys.format) == _FORMATS[1]

    def _added(self, bits: int) -> int:
        """Return what is to be added to a word of zero points."""
        if self._is_version_2 or WORD % bits:
            return 0
        return sum(1 << place for place in range(0, WORD, bits))


def _expression(pattern: str) -> str:
    """Return the regular expression of a key of `dynamic`."""
    return pattern.removeprefix("+:").removeprefix("-:")


_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,?\d*\})")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_MOST_REPEATS = 5


def _takes_long(expression: str) -> bool:
    """Return whether an expression of a file may take exponentially long: the file is anybody's.

    A repeat in a repeated group does; one behind the other take a power of the name's length.
    """
    repeats = len(_REPEAT.findall(expression))
    return repeats > _MOST_REPEATS or _REPEATED_GROUP.search(expression) is not None
