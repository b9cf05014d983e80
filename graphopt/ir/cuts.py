"""Rows and transposes of weights, which leave a packed one packed where its groups allow it."""

from __future__ import annotations

from dataclasses import replace

from graphopt.ir.weights import Dequantised, Producer, Rows, Transposed


def rows_of(source: Producer, index: slice | tuple[int, ...]) -> Producer:
    """Return rows of a weight's dimension 0.

    Of a packed matrix whose groups lie along its rows they are the same rows of its tensors; where
    groups run across rows, what is returned is dense.
    """
    if isinstance(source, Dequantised) and source.encoding.axis == 1:
        tensors = {suffix: Rows(tensor, index) for suffix, tensor in source.tensors().items()}
        return Dequantised(source.encoding, **tensors)
    return Rows(source, index)


def transposed(source: Producer) -> Producer:
    """Return a weight with its first two dimensions in the other order.

    The tensors of a packed matrix are those of its transpose, with groups along the other axis.
    """
    if isinstance(source, Dequantised):
        encoding = replace(source.encoding, axis=1 - source.encoding.axis)
        return Dequantised(encoding, **source.tensors())
    return Transposed(source)
