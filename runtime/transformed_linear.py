"""Products of packed weights that transform what they read, where they are of few tokens.

Layout letters: K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphopt.runtime.fused import runs_by_kernel
from graphopt.runtime.packed_few import InFront
from graphopt.runtime.quantised_linear import QuantisedKernels, QuantisedWeight


class TransformedLinears:
    """`transformed_packed_linear`, by one kernel or by one for each part of it.

    Args:
        linears: The products.
        transformed: As `functional.transformed`, by kernels of their own.
        tokens: The most tokens that a product transforms for itself.
    """

    def __init__(
        self, linears: QuantisedKernels, transformed: Callable[..., Any], tokens: int
    ) -> None:
        self._linears, self._transformed, self._tokens = linears, transformed, tokens

    def transformed_packed_linear(
        self,
        x: Tensor,
        y: Tensor | None,
        norm_weight: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        weight: QuantisedWeight,
        bias: Tensor | None = None,
        *,
        before: str = "",
        total: bool = False,
        eps: float = 0.0,
        offset: float = 0.0,
        act: str = "",
        sizes: Sequence[int] = (),
    ) -> Any:
        """As `functional.transformed_packed_linear`."""
        given = [t for t in (x, y) if t is not None]
        found = None
        if x.numel() <= self._tokens * x.shape[-1] and runs_by_kernel(*given):
            front = InFront(y, norm_weight, eps, offset, before, left, right)
            found = self._linears.few_with_front(x, weight, bias, act, front)
        if found is None:
            options = {"before": before, "total": total, "eps": eps, "offset": offset}
            made = self._transformed(x, y, norm_weight, left, right, **options)
            whole, values = made if total else (None, made)
            product = self._linears.packed_linear(values, weight, bias, act)
        else:
            product, whole = found
        results = [whole] if total else []
        results += product.split([*sizes], -1) if sizes else [product]
        return tuple(results) if len(results) > 1 else results[0]
