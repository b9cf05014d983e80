"""Building modules whose parameters take no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphopt.support.boundary import out_of_memory


class _MetaBeyondMemory(TorchFunctionMode):
    """Inside, `torch.empty` gives a tensor on meta where memory does not suffice for a real one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if func is not torch.empty or not out_of_memory(error):
                raise
            return func(*args, **kwargs | {"device": "meta"})


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter goes to meta the moment a module registers it.

    Buffers are computed for real, since a checkpoint does not hold them (inverse frequencies,
    slopes, sinusoid tables). A parameter's memory is reserved for an instant and never touched,
    so building a 70B model costs no memory to speak of; one that is larger than the memory of the
    machine, as stacked experts can be, is on meta from the start.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(
                torch.empty_like(param, device="meta"), requires_grad=param.requires_grad
            )
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        with _MetaBeyondMemory():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
