"""Linears of weights of four bits on a GPU, in Triton: 16-bit activations, or integer codes.

What does not go to a kernel (a CPU, fp32, groups of other sizes, a machine without Triton) goes to
`functional`.

Layout letters: M tokens, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from graphopt.ir import functional
from graphopt.runtime.fused import act_mul, add_rms_norm, runs_by_kernel
from graphopt.runtime.packed_codes import PackedCodes, pack_codes, values_of
from graphopt.runtime.packed_few import InFront, launch_few
from graphopt.runtime.quantised_launch import launch_integer, launch_packed, launch_unpack
from graphopt.runtime.quantised_tiles import QuantisedTiles, tiles_for


@dataclass(frozen=True)
class _LaidOut:
    """What a `QuantisedWeight` made of stored tensors for the kernels."""

    sizes: list[int]
    span: int
    parameters: dict[str, nn.Parameter]


_LAID_OUT: MutableMapping[Tensor, _LaidOut] = WeakTensorKeyDictionary()
"""By the first tensor of codes that was read, while something holds it."""


class QuantisedWeight(nn.Module):
    """Matrices kept as packed codes with scales, one behind the other; a call gives their values.

    Codes that the kernels read lie as they read them, others as they are stored. The first are laid
    out once for all modules of the same tensors (a table that is the output matrix too), and the
    tensors in `weights` are emptied: they would be there beside them until a model is loaded.

    Args:
        weights: Tensors by name: `NAME.packed`, `NAME.scales` and, where there are any,
            `NAME.zeros`.
        names: Of the matrices [N, K].
        bits, group, axis: Their encoding; see `functional.dequantise`.

    Attributes:
        sizes: The outputs of each.
    """

    packed: Tensor
    codes: Tensor
    scales: Tensor
    arrived: Tensor
    zeros: Tensor | None

    def __init__(
        self, weights: dict[str, Tensor], *names: str, bits: int, group: int, axis: int
    ) -> None:
        super().__init__()
        packed, scales, zeros = (
            [weights[f"{name}.{suffix}"] for name in names if f"{name}.{suffix}" in weights]
            for suffix in ("packed", "scales", "zeros")
        )
        self.bits, self.group, self.axis = bits, group, axis
        self.zeros = None
        self.span: int | None = None
        laid_out = _LAID_OUT.get(packed[0])
        if laid_out is not None and len(laid_out.sizes) == len(names):
            self.sizes, self.span = laid_out.sizes, laid_out.span
            self._register(laid_out.parameters)
            return
        self.sizes = [len(tensor) for tensor in packed]
        tensors = {"packed": _joined(packed), "scales": _joined(scales)}
        if zeros:
            tensors["zeros"] = _joined(zeros)
        if bits == 4 and axis == 1 and runs_by_kernel(tensors["scales"]):
            codes = pack_codes(**tensors, group=group)
            if codes is not None:
                self.span = codes.span
                tensors = {"codes": codes.codes, "scales": codes.scales, "arrived": codes.arrived}
                tensors |= {} if codes.zeros is None else {"zeros": codes.zeros}
        parameters = {
            name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
        }
        self._register(parameters)
        if self.span is not None:
            _LAID_OUT[packed[0]] = _LaidOut(self.sizes, self.span, parameters)
            for source in (*packed, *scales, *zeros):
                source.data = source.new_empty(0)

    def _register(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            setattr(self, name, parameter)

    def packed_codes(self) -> PackedCodes | None:
        """Return the codes as the kernels read them; None where they don't."""
        if self.span is None:
            return None
        return PackedCodes(self.codes, self.scales, self.zeros, self.span, self.arrived)

    def forward(self) -> Tensor:
        """Return the matrix [N, K]."""
        if self.span is not None:
            return values_of(self.codes, self.scales, self.zeros, group=self.group)
        options = {"bits": self.bits, "group": self.group, "axis": self.axis}
        return functional.dequantise(self.packed, self.scales, self.zeros, **options)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows `ids` [...] of the matrix, [..., K]; its groups lie along rows."""
        # Not by indexing, which would count negative ids from the end.
        axis, flat = int(self.span is not None), ids.reshape(-1)
        zeros = None if self.zeros is None else self.zeros.index_select(axis, flat)
        scales = self.scales.index_select(axis, flat)
        if self.span is not None:
            codes = self.codes.index_select(axis, flat)
            values = values_of(codes, scales, zeros, group=self.group)
        else:
            options = {"bits": self.bits, "group": self.group}
            packed = self.packed.index_select(axis, flat)
            values = functional.dequantise(packed, scales, zeros, **options)
        return values.view(*ids.shape, values.shape[-1])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors one behind the other; one by itself is not copied."""
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([*tensors])


class QuantisedKernels:
    """Linears with the tiles of a target.

    Args:
        tiles: Those of the target that the model was emitted for.
    """

    def __init__(self, tiles: QuantisedTiles) -> None:
        self._tiles = tiles

    def packed_linear(
        self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, act: str = ""
    ) -> Tensor:
        """As `functional.packed_linear`, or with `act` as `functional.gated_packed_linear`."""
        codes = weight.packed_codes()
        if codes is None or not runs_by_kernel(x) or x.dtype != codes.scales.dtype:
            return _gated(functional.packed_linear(x, weight, bias), act)
        return self.linear_of_codes(x, codes, bias, act)

    def gated_packed_linear(
        self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, act: str
    ) -> Tensor:
        """As `functional.gated_packed_linear`."""
        return self.packed_linear(x, weight, bias, act)

    def norm_packed_linear(
        self,
        x: Tensor,
        y: Tensor | None,
        norm_weight: Tensor | None,
        weight: QuantisedWeight,
        bias: Tensor | None = None,
        *,
        eps: float,
        offset: float = 0.0,
        act: str = "",
        sizes: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        """As `functional.norm_packed_linear`."""
        found = None
        if runs_by_kernel(x):
            front = InFront(y, norm_weight, eps, offset)
            found = self.few_with_front(x, weight, bias, act, front)
        if found is None:
            total, normed = add_rms_norm(x, y, norm_weight, eps, offset)
            product = self.packed_linear(normed, weight, bias, act)
        else:
            product, total = found
        return (total, *product.split([*sizes], -1)) if sizes else (total, product)

    def few_with_front(
        self, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, act: str, front: InFront
    ) -> tuple[Tensor, Tensor] | None:
        """Return a product of few tokens with what stands in front of it, and what it is of.

        The second is x + y of a norm, else x. None where the kernel for few tokens does not run.

        Args:
            x: [..., K], as is the `y` of `front`.
        """
        codes, tiles = weight.packed_codes(), self._tiles.few
        few = tiles_for(x.numel() // x.shape[-1], tiles)
        if few is None or codes is None:
            return None
        rows = None if front.y is None else _rows_of(front.y)
        found = launch_few(
            _rows_of(x), codes, bias, few, self._tiles.cores, act=act, front=replace(front, y=rows)
        )
        if found is None:
            return None
        product, total = found
        return product.view(*x.shape[:-1], -1), x if total is None else total.view(x.shape)

    def linear_of_codes(
        self, x: Tensor, weight: PackedCodes, bias: Tensor | None = None, act: str = ""
    ) -> Tensor:
        """Return x weight^T + bias: x [..., K] of 16 bits, on the device of the weight."""
        rows = _rows_of(x)
        y = self._of_few(rows, weight, bias, None, act)
        if y is None:
            tiles = tiles_for(len(rows), self._tiles.packed)
            if tiles is None:
                y = functional.linear(rows, launch_unpack(weight, x.dtype), bias)
            else:
                y = launch_packed(rows, weight, bias, tiles, self._tiles.cores)
            y = _gated(y, act)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _of_few(
        self,
        x: Tensor,
        weight: PackedCodes,
        bias: Tensor | None,
        x_scales: Tensor | None,
        act: str,
    ) -> Tensor | None:
        """Return the product by the kernel for few tokens; None where it does not run."""
        tiles = tiles_for(len(x), self._tiles.few)
        found = (
            None
            if tiles is None
            else launch_few(x, weight, bias, tiles, self._tiles.cores, x_scales, act)
        )
        return None if found is None else found[0]

    def integer_linear(
        self,
        codes: Tensor,
        scales: Tensor,
        weight: QuantisedWeight,
        bias: Tensor | None = None,
        act: str = "",
    ) -> Tensor:
        """As `functional.integer_linear`, or with `act` as `functional.gated_integer_linear`."""
        packed = weight.packed_codes()
        if packed is None or not runs_by_kernel(packed.scales):
            return _gated(functional.integer_linear(codes, scales, weight, bias), act)
        return self.integer_linear_of_codes(codes, scales, packed, bias, act)

    def gated_integer_linear(
        self,
        codes: Tensor,
        scales: Tensor,
        weight: QuantisedWeight,
        bias: Tensor | None = None,
        *,
        act: str,
    ) -> Tensor:
        """As `functional.gated_integer_linear`."""
        return self.integer_linear(codes, scales, weight, bias, act)

    def integer_linear_of_codes(
        self,
        codes: Tensor,
        scales: Tensor,
        weight: PackedCodes,
        bias: Tensor | None = None,
        act: str = "",
    ) -> Tensor:
        """Return (codes * scales) weight^T + bias: int8 [..., K] and fp32 [...].

        In the dtype of the weight's scales.
        """
        rows, own = _rows_of(codes), scales.reshape(-1)
        y = self._of_few(rows, weight, bias, own, act)
        if y is None:
            y = _gated(self._of_integers(rows, own, weight, bias), act)
        return y.view(*codes.shape[:-1], y.shape[-1])

    def _of_integers(
        self, rows: Tensor, own: Tensor, weight: PackedCodes, bias: Tensor | None
    ) -> Tensor:
        """Return the product of int8 [M, K] and fp32 [M] by the kernels in Triton."""
        dtype = weight.scales.dtype
        # Of a few tokens reading the weight takes longer than any product.
        few = tiles_for(len(rows), self._tiles.packed[:1])
        exact = weight.zeros is None
        # A matrix unit multiplies 32 bytes at a time.
        halves = exact and weight.span >= 64
        tiles = few or tiles_for(
            len(rows), self._tiles.integer_packed if halves else self._tiles.packed
        )
        if tiles is not None:
            integer = halves and few is None
            y = launch_packed(
                rows, weight, bias, tiles, self._tiles.cores, own, dtype, integer=integer
            )
        elif exact and len(weight.scales) == 1:
            y = launch_integer(
                rows, own, launch_unpack(weight, torch.int8), weight.scales[0], bias, dtype,
                self._tiles.integer, self._tiles.cores, 0.0625,
            )  # fmt: skip
        else:
            x = (rows * own[:, None]).to(dtype)
            y = functional.linear(x, launch_unpack(weight, dtype), bias)
        return y


def _gated(y: Tensor, act: str) -> Tensor:
    """Return act(first) second of both halves of rows; without `act` the rows."""
    if not act:
        return y
    gate, up = y.chunk(2, -1)
    return act_mul(gate, up, act)


def _rows_of(x: Tensor) -> Tensor:
    """Return [..., K] as [M, K], the last axis contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
