"""From a module to IR functions: torch.export on meta tensors, one layer of a kind at a time.

The module is exported once with every repeated layer replaced by an opaque call, so time and
memory don't grow with depth; then one layer of each kind is exported on its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture.fx_conversion import WHOLE, Converter, Exported
from graphopt.capture.in_place import needs_functionalizing
from graphopt.capture.layer_calls import RECORDS, TRACE_BATCH, TRACE_LENGTH, LayerCall, Shell
from graphopt.capture.model import (
    accepted_inputs,
    logits_of,
    parameters_reserved,
)
from graphopt.capture.operator_log import OperatorLog, operator_log
from graphopt.capture.tracing import traced
from graphopt.ir.types import B, S, Type


class _Wrapped(nn.Module):
    """A module as a function of its tensor arguments alone, returning a flat list of tensors."""

    def __init__(self, inner: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self._run = run

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves, _ = pytree.tree_flatten(self._run(self.inner, *tensors))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def export_shell(module: nn.Module) -> tuple[Exported, list[LayerCall]]:
    """Export everything around the repeated layers of a language model.

    Returns:
        The function (parameters are the program inputs, result the logits) and the layer calls.

    Raises:
        CaptureError: torch.export fails or specialises batch or length.
    """
    names = accepted_inputs(module)
    inputs = [torch.ones(TRACE_BATCH, TRACE_LENGTH, dtype=torch.long) for _ in names]
    keywords = {"use_cache": False} if _takes_use_cache(module) else {}

    def run(inner: nn.Module, *tensors: Tensor) -> Tensor:
        return logits_of(inner(**dict(zip(names, tensors, strict=True)), **keywords))

    shell = Shell(module)
    shell.install()
    try:
        with parameters_reserved(module):
            exported = _export(_Wrapped(module, run), inputs, [(B, S)] * len(names), WHOLE)
    finally:
        shell.remove()
    for value, name in zip(exported.function.params, names, strict=True):
        value.name = name
    for node in exported.function.nodes:
        if node.op == "graphopt_capture.layer.default":
            exported.stubs[node] = RECORDS.pop(node.attrs["args"][1])
    return exported, shell.records


class LayerExports:
    """Exports layers, each kind once: what calls the same operators gets a copy of its own."""

    def __init__(self) -> None:
        self._exported: list[tuple[OperatorLog, Exported]] = []

    def export(self, call: LayerCall, types: Sequence[Type]) -> Exported:
        """Return one layer as a function of its tensor arguments.

        Args:
            types: Types of the tensor arguments, sizes in B and S.

        Raises:
            CaptureError: torch.export fails or specialises batch or length.
        """
        log = operator_log(call, types)
        for known, exported in self._exported:
            if log == known:
                return exported.of_module(call.module)
        exported = export_layer(call, types)
        if log is not None:
            self._exported.append((log, exported.of_module(call.module)))
        return exported


def export_layer(call: LayerCall, types: Sequence[Type]) -> Exported:
    """Export one layer as a function of its tensor arguments; see `LayerExports`."""

    def run(inner: nn.Module, *tensors: Tensor) -> Any:
        return call.run(inner, tensors)

    sizes = {B: TRACE_BATCH, S: TRACE_LENGTH}
    inputs = [torch.zeros(kind.concrete(sizes), dtype=kind.dtype) for kind in types]
    with parameters_reserved(call.module):
        return _export(_Wrapped(call.module, run), inputs, [t.shape for t in types], call.path)


def _takes_use_cache(module: nn.Module) -> bool:
    """True where forward takes `use_cache`, or a transformers model hands keywords on."""
    parameters = inspect.signature(module.forward).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "use_cache" in parameters or (hands_on and hasattr(module, "config"))


def _export(
    module: _Wrapped, inputs: Sequence[Tensor], shapes: Sequence[Sequence[Any]], where: str
) -> Exported:
    dynamic = [
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(shape)
            if not isinstance(size, int)
        }
        or None
        for shape in shapes
    ]
    # A layer is traced once or twice: remembering the shapes of its operators costs more than it
    # saves.
    with (
        traced(where),
        torch.no_grad(),
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
    ):
        program = torch.export.export(
            module, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False
        )
        if needs_functionalizing(program.graph):
            program = program.run_decompositions({})
    return Converter(program, shapes, where).convert()
