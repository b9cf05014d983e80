"""Results on tensors without values: what is remembered has the sizes that torch gives."""

from __future__ import annotations

import pytest
import torch

from graphopt.memory.known_results import KnownResults

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS = [
    (aten.mul.Tensor, (meta(3, 4), meta(4, 3).t()), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.int64), 1), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.int64), 1.0), {}),
    (aten.add.Tensor, (meta(3, dtype=torch.int64), True), {}),
    (aten.sum.dim_IntList, (meta(3, 4), [1], True), {}),
    (aten.cat.default, ([meta(2, 3), meta(2, 5)], 1), {}),
    (aten.max.dim, (meta(3, 9), 1), {}),
    (aten._to_copy.default, (meta(3, 9).t(),), {"dtype": torch.bfloat16}),
]


def test_what_is_remembered_is_what_torch_gives() -> None:
    results = KnownResults()
    for _ in range(2):
        for function, args, kwargs in CALLS:
            plain, got = function(*args, **kwargs), results.run(function, args, kwargs)
            pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, got)), strict=True)
            for a, b in pairs:
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
                assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
    # Numbers of other types, which compare equal, make other dtypes.
    assert len(results._known) == len(CALLS)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (aten.view.default, (meta(2, 6), [3, 4])),
        (aten.add.Tensor, (meta(2, dtype=torch.int64), meta())),
        (aten.add.Tensor, (torch.ones(2), torch.ones(2))),
        (aten.unbind.int, (meta(2, 6),)),
    ],
)
def test_views_and_numbers_that_are_tensors_are_not_remembered(function, args) -> None:
    results = KnownResults()
    for _ in range(2):
        results.run(function, args, {})
    assert not results._known
