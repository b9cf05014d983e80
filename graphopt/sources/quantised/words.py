"""Codes as checkpoints store them, in words of 32 bits, brought into the layout of the IR."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import SourceError
from graphopt.ir import functional
from graphopt.ir.encoding import Packed, pack
from graphopt.ir.weights import Dequantised, Producer
from graphopt.support.tensor_bytes import tensor_bytes

WORD = 32
"""Bits of a word."""


class Bytes(Producer):
    """A tensor of bytes."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.uint8


@dataclass(frozen=True)
class Codes(Bytes):
    """Codes of a matrix [out, in]; subclasses say how a checkpoint holds them.

    Attributes:
        source: The checkpoint's tensor.
        rows: out.
        length: in.
        bits: Of a code.
    """

    source: Producer
    rows: int
    length: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.rows, -(-self.length * self.bits // 8))

    def load(self) -> Tensor:
        """Return the codes in bytes, uint8 [out, ceil(in * bits / 8)], the first lowest."""
        return pack(self.codes(), self.bits)

    def codes(self) -> Tensor:
        """Return the codes one by one, uint8 [out, in]."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowWords(Codes):
    """int32 [out, ceil(in * bits / 32)]: the codes of a row, the first in the lowest bits.

    Attributes:
        added: A number that is added to each word.
    """

    added: int = 0

    def load(self) -> Tensor:
        return self.load_rows(0, self.rows)

    def load_rows(self, start: int, stop: int) -> Tensor:
        words = self.source.load_rows(start, stop)
        if self.added:
            words = (words.long() + self.added).to(torch.int32)
        return as_bytes(words)[:, : self.shape[1]]

    def codes(self) -> Tensor:
        return functional.unpack(self.load(), self.bits)[:, : self.length]


@dataclass(frozen=True)
class ColumnWords(Codes):
    """int32 [ceil(in * bits / 32), out]: the codes of a column, the first in the lowest bits."""

    def load(self) -> Tensor:
        return as_bytes(self.source.load().t())[:, : self.shape[1]]

    def codes(self) -> Tensor:
        return functional.unpack(self.load(), self.bits)[:, : self.length]


def as_bytes(words: Tensor) -> Tensor:
    """Return rows of int32 words [n, m] as their bytes, uint8 [n, 4 m], the lowest first."""
    return tensor_bytes(words).view(len(words), -1)


@dataclass(frozen=True)
class TurnedCodes(Codes):
    """The codes of another matrix, [in, out], as those of [out, in]."""

    source: Codes  # type: ignore[assignment]

    def codes(self) -> Tensor:
        return self.source.codes().t()


@dataclass(frozen=True)
class SignedCodes(Codes):
    """int8 [out, in]: a code less 2 ** (bits - 1) in every byte."""

    def codes(self) -> Tensor:
        return (self.source.load().to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)


@dataclass(frozen=True)
class Grouped(Bytes):
    """The codes of a matrix in groups, as `graphopt.ir.encoding` stores them."""

    source: Codes
    stored_as: Packed

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        groups = self.source.length // self.stored_as.group
        return (self.source.rows, groups, self.stored_as.group_bytes)

    def load(self) -> Tensor:
        if self.stored_as.fills_bytes:
            return self.source.load().reshape(self.shape)
        codes = self.source.codes().unflatten(1, (-1, self.stored_as.group))
        return pack(codes, self.stored_as.bits)

    def load_rows(self, start: int, stop: int) -> Tensor:
        if self.stored_as.fills_bytes:
            return self.source.load_rows(start, stop).reshape(-1, *self.shape[1:])
        return self.load()[start:stop]


@dataclass(frozen=True)
class WithoutZeroPoints(Bytes):
    """Codes whose zero points are to be 2 ** (bits - 1), which is checked when they are read.

    Attributes:
        source: The codes.
        zeros: The zero points of [out, groups].
        name: The weight's, for the message.
    """

    source: Producer
    zeros: Codes
    name: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    def load(self) -> Tensor:
        self._check()
        return self.source.load()

    def load_rows(self, start: int, stop: int) -> Tensor:
        self._check()
        return self.source.load_rows(start, stop)

    def _check(self) -> None:
        middle = 2 ** (self.zeros.bits - 1)
        codes = self.zeros.codes()
        if bool((codes != middle).any()):
            other = int(codes[codes != middle][0])
            raise SourceError(
                f"The zero points of {self.name!r} are not all {middle}, which they are where "
                f"codes are symmetric, as the config says these are: one is {other}.",
                "Correct the entries sym and checkpoint_format of its quantization_config.",
            )


@dataclass(frozen=True)
class Spread(Producer):
    """A number, or one a row, as [rows, columns]."""

    source: Producer
    shape: tuple[int, ...]  # type: ignore[misc]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> Tensor:
        value = self.source.load()
        return (value if value.dim() == 2 else value.view(-1, 1)).expand(self.shape).contiguous()


@dataclass(frozen=True)
class ConsecutiveGroups(Producer):
    """The group of each input, int64 [length], where neighbours share one: the last may be smaller.

    Attributes:
        length: How many inputs there are.
        size: How many inputs a group has.
    """

    length: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length,)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.int64

    def load(self) -> Tensor:
        return torch.arange(self.length) // self.size


@dataclass(frozen=True)
class UnevenGroups(Producer):
    """A matrix whose groups of inputs are no equal runs: dense, in the dtype of its scales.

    Attributes:
        codes: Of [out, in].
        scales: [out, groups].
        zeros: Zero points of [out, groups]; None where all are 2 ** (bits - 1).
        groups: int [in], the group of each input.
    """

    codes: Codes
    scales: Producer
    zeros: Codes | None
    groups: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.codes.rows, self.codes.length)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.scales.dtype

    def load(self) -> Tensor:
        group = self.groups.load().long()
        zeros: Tensor | int = 2 ** (self.codes.bits - 1)
        if self.zeros is not None:
            zeros = self.zeros.codes().float()[:, group]
        scales = self.scales.load()
        return ((self.codes.codes().float() - zeros) * scales.float()[:, group]).to(scales.dtype)


def quantised_matrix(
    codes: Codes,
    scales: Producer,
    zeros: Codes | None,
    groups: Producer,
    check: Codes | None = None,
    name: str = "",
) -> Producer:
    """Return a packed weight; a dense one where its groups are not of equal size and in order.

    Args:
        codes: Of [out, in].
        scales: [out, groups].
        zeros: Zero points of [out, groups]; None where codes are symmetric.
        groups: int [in], the group of each input.
        check: Zero points that a symmetric packed weight has all the same, to be checked.
        name: The weight's, for messages.
    """
    if not isinstance(groups, ConsecutiveGroups) or codes.length % groups.size:
        return UnevenGroups(codes, scales, zeros, groups)
    encoding = Packed(codes.bits, groups.size, symmetric=zeros is None)
    packed: Producer = Grouped(codes, encoding)
    if check is not None:
        packed = WithoutZeroPoints(packed, check, name)
    return Dequantised(encoding, packed, scales, zeros)
