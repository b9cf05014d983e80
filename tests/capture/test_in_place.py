"""In-place operators: whatever sees the memory that they write sees the new value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture.fx_conversion import Converter
from graphopt.capture.in_place import needs_functionalizing
from graphopt.execute.function_run import run_function
from graphopt.ir.graph import Call

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def twice(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    y.mul_(3)
    return y + 1


def result_of_a_write_kept(x: Tensor) -> Tensor:
    y = x * 2
    z = y.add_(1)
    y.mul_(3)
    return z + 0


def source_of_a_write_kept(x: Tensor) -> Tensor:
    y = x * 2
    z = y.add_(1)
    z.mul_(3)
    return y + z


def views_before_that_nobody_reads_later(x: Tensor) -> Tensor:
    y = x * 2
    before = y.view(3, 24).sum(-1)
    y.add_(1)
    return y.sum((-1, -2)) + before


def views_after(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
    return y.unsqueeze(-1).expand(3, 4, 6, 2).reshape(3, 48)


def a_view_before_is_read_later(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(3, 24)
    y.add_(1)
    return z + 0


def a_view_is_written(x: Tensor) -> Tensor:
    y = x * 2
    y.view(3, 24).add_(1)
    return y + 0


def slices_are_written(x: Tensor) -> Tensor:
    y = x.new_empty(3, 4, 6)
    y[..., :2] = x[..., 4:]
    y[..., 2:] = 7.0
    return y + 0


def a_row_is_written(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1] = x[:, 0]
    y[:, 2].mul_(3)
    return y + 0


def a_slice_of_a_slice_is_written(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:][:, :, 2:] = 5.0
    return y + 0


def a_slice_is_written_and_a_view_read_later(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(3, 24)
    y[..., :2] = x[..., 4:]
    return z + y.view(3, 24)


def the_slice_itself_is_read_later(x: Tensor) -> Tensor:
    y = x * 2
    part = y[..., :2]
    part.add_(1)
    y.mul_(2)
    return part + y[..., 4:]


def pieces_of_a_split(x: Tensor) -> Tensor:
    first, second = (x * 2).split(3, dim=-1)
    first.add_(1)
    return first * second


def one_of_two_results(x: Tensor) -> Tensor:
    values, places = x.topk(2, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values + places


FUNCTIONAL = [twice, views_before_that_nobody_reads_later, views_after, slices_are_written,
              a_row_is_written, one_of_two_results]  # fmt: skip
"""Those that the conversion gets along with by itself."""
SHARED = [result_of_a_write_kept, source_of_a_write_kept, a_view_before_is_read_later,
          a_view_is_written, a_slice_of_a_slice_is_written,
          a_slice_is_written_and_a_view_read_later, the_slice_itself_is_read_later,
          pieces_of_a_split]  # fmt: skip


@pytest.mark.parametrize("function", [*FUNCTIONAL, *SHARED], ids=lambda function: function.__name__)
def test_writes_are_seen(function: Callable[[Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    program = torch.export.export(Module(), (X,), strict=False)
    if function in FUNCTIONAL:
        assert not needs_functionalizing(program.graph)
    elif needs_functionalizing(program.graph):
        program = program.run_decompositions({})
    exported = Converter(program, [tuple(X.shape)], "here").convert()
    (found,), _ = run_function(
        exported.function, Call("main", ["x"], ["y"]), [X], exported.constants, {}
    )
    assert torch.equal(found, function(X))
