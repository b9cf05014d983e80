"""What a module calls, operator by operator, seen by running it on tensors without values.

To export a layer takes a second, to run it like this a tenth of one. So what was exported once in
a process stands for all that calls the same operators on the same operands: the layers of a model,
and models of one config, such as one that a checkpoint's config makes and is compared with.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphopt.capture.layer_calls import TRACE_BATCH, TRACE_LENGTH
from graphopt.capture.model import own_tensors, tensors_replaced
from graphopt.capture.tracing import collected
from graphopt.ir.types import B, P, S, Type

_SIZES: tuple[Mapping[sympy.Symbol, int], ...] = (
    {B: TRACE_BATCH, S: TRACE_LENGTH, P: 0},
    {B: 5, S: 2**24 + 3, P: 0},
)
"""The size of the trace, and a length beyond every window, chunk and context: two layers with
`min(length, window)` in them differ there."""

_MOST_NUMBERS = 1024
"""Of a tensor that a module makes of numbers in its forward."""


def operator_digest(
    module: nn.Module,
    run: Callable[..., Any],
    types: Sequence[Type],
    opaque: Collection[nn.Module] = (),
) -> str | None:
    """Return a digest of what a module calls; None where running it does not tell.

    Modules of equal digests are exported to equal functions. It is of the module's tensors (names,
    shapes, dtypes, which of them are the same), and of every operator in order with its operands
    and results, at two choices of sizes.

    Args:
        run: Takes the module and its tensor arguments, and returns tensors, nested in any way.
        types: Types of the tensor arguments, sizes in B and S.
        opaque: Parts whose operators are not seen by a trace either.
    """

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    # Whatever running it raises, exporting it says more plainly.
    with (
        contextlib.suppress(Exception),
        collected(),
        torch.no_grad(),
        _compiling_state_context(),  # some models have a way of their own for it
        FakeTensorMode(),
        tensors_replaced(module, fake, opaque),
    ):
        names: dict[int, str] = {}
        seen: list[Any] = [types]
        for name, _, _, tensor in own_tensors(module, opaque):
            first = names.setdefault(id(tensor), name)
            seen.append((name, first, tuple(tensor.shape), tensor.dtype))
        for sizes in _SIZES:
            inputs = [torch.empty(kind.concrete(sizes), dtype=kind.dtype) for kind in types]
            log = _Log(names, inputs)
            with log:
                output = run(module, *inputs)
            seen.append((log.operators, log.described(output)))
        return hashlib.sha256(repr(seen).encode()).hexdigest()
    return None


class _UnknownTensorError(Exception):
    """An operand was made out of sight."""


class _Log(TorchDispatchMode):
    """Writes down every operator that is called inside."""

    def __init__(self, names: Mapping[int, str], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operators: list[Any] = []
        self._names: dict[int, str | int] = dict(names)
        self._held: list[Tensor] = []  # an identity is a tensor's for as long as it lives
        for tensor in inputs:
            self._number(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = self.described(args), self.described(kwargs)
        results = func(*args, **kwargs)
        for tensor in results if isinstance(results, tuple | list) else (results,):
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                self._number(tensor)
        self.operators.append((str(func), operands, self.described(results)))
        return results

    def described(self, value: Any) -> Any:
        """Return a nested value with every tensor as its name or number, shape and dtype.

        A tensor with values, such as one that the module makes of numbers, is described by these.

        Raises:
            _UnknownTensorError: A tensor is none of the module's, and no operator made it.
        """
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, tuple | list):
            return type(value).__name__, [self.described(item) for item in value]
        if isinstance(value, dict):
            return "dict", [(key, self.described(item)) for key, item in value.items()]
        leaves, spec = pytree.tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            return repr(value)
        return str(spec), self.described(leaves)

    def _tensor(self, tensor: Tensor) -> Any:
        if id(tensor) in self._names:
            return self._names[id(tensor)], tuple(tensor.shape), tensor.dtype
        if isinstance(tensor, FakeTensor) or tensor.numel() > _MOST_NUMBERS:
            raise _UnknownTensorError
        with _disable_current_modes():
            return tensor.tolist(), tensor.dtype

    def _number(self, tensor: Tensor) -> None:
        self._names[id(tensor)] = len(self._held)
        self._held.append(tensor)
