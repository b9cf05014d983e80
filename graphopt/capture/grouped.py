"""Products of grouped rows that a model writes as a loop over experts.

Rows sorted by expert are cut into one piece an expert, whose lengths are values of a tensor, which
no trace holds. What such a module computes is one operator, `grouped_mm_fallback` of transformers,
and what it computes is found out by running it on a small example: the loop itself is never read.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

_ROWS_IN, _ROWS_OUT = 3, 2
"""Widths of the example, which differ so that the layout of the weight shows."""


@contextlib.contextmanager
def grouped_products(module: nn.Module) -> Iterator[None]:
    """Inside, a product of grouped rows is one operator to a trace, for every part that is one.

    Such a part is `forward(rows [N, K], counts)` with counts [E] as a tensor, or as a list made by
    `tolist`, and with one weight [E, K, M] or [E, M, K].
    """
    found = {part: layout for part in module.modules() if (layout := _layout(part)) is not None}
    if not found:
        yield
        return
    importlib.import_module("transformers.integrations.moe")  # registers the operator
    for part, transposed in found.items():
        part.forward = _product(part, transposed)  # type: ignore[method-assign]
    try:
        with _counts_as_tensors():
            yield
    finally:
        for part in found:
            vars(part).pop("forward", None)


class _Counts:
    """What `tolist` of traced counts returns: nothing but a grouped product can use it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def _counts_as_tensors() -> Iterator[None]:
    """Inside, `tolist` of a traced vector of whole numbers gives `_Counts`."""
    kinds: tuple[Any, ...] = (Tensor, FakeTensor, FunctionalTensor)
    before = [(kind, vars(kind).get("tolist")) for kind in kinds]

    def patched(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def tolist(self: Tensor) -> Any:
            traced = self.is_meta or isinstance(self, FakeTensor | FunctionalTensor)
            counts = self.dim() == 1 and not self.is_floating_point()
            return _Counts(self) if traced and counts else original(self)

        return tolist

    for kind in kinds:
        kind.tolist = patched(kind.tolist)
    try:
        yield
    finally:
        for kind, own in before:
            if own is None:
                del kind.tolist
            else:
                kind.tolist = own


def _product(part: nn.Module, transposed: bool) -> Callable[..., Tensor]:
    def forward(rows: Tensor, counts: Any) -> Tensor:
        counts = counts.tensor if isinstance(counts, _Counts) else counts
        (stored,) = part.parameters()
        weight = stored.transpose(1, 2) if transposed else stored
        ends = counts.cumsum(0).to(torch.int32)
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)
        return product

    return forward


def _layout(part: nn.Module) -> bool | None:
    """Return whether the weight of a grouped product is [E, M, K]; None for another module."""
    weights = list(part._parameters.items())
    if len(weights) != 1 or part._buffers or part._modules or "forward" in vars(part):
        return None
    name, weight = weights[0]
    arguments = list(inspect.signature(type(part).forward).parameters.values())[1:]
    plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in arguments)
    if weight is None or weight.dim() != 3 or len(arguments) != 2 or not plain:
        return None
    experts = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (experts,), generator=generator)
    own = torch.repeat_interleave(torch.arange(experts), counts)
    rows = torch.randn(len(own), _ROWS_IN, generator=generator)
    kept = torch.randn(experts, _ROWS_IN, _ROWS_OUT, generator=generator)
    wanted = torch.einsum("nk,nkm->nm", rows, kept[own])
    for transposed in (False, True):
        clone = copy.copy(part)
        clone._parameters = {
            name: nn.Parameter(kept.transpose(1, 2) if transposed else kept, requires_grad=False)
        }
        for given in (counts, counts.tolist()):
            # Whatever else it raises: it is no such product, and is traced as it is.
            with contextlib.suppress(Exception), torch.no_grad():
                made = type(part).forward(clone, rows, given)
                if made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-5):
                    return transposed
    return None
