"""From a module to IR functions: torch.export on meta tensors, one layer of a kind at a time.

The module is exported once with every repeated layer replaced by an opaque call, so time and
memory don't grow with depth; then one layer of each kind is exported on its own. What calls the
same operators as something that was exported before is not exported again.
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
from graphopt.capture.known_exports import KNOWN
from graphopt.capture.layer_calls import LAYER, TRACE_BATCH, TRACE_LENGTH, LayerCall, OuterGraph
from graphopt.capture.model import (
    accepted_inputs,
    logits_of,
    parameters_reserved,
)
from graphopt.capture.operator_digest import operator_digest
from graphopt.capture.tracing import traced
from graphopt.ir.types import B, S, Type


class Wrapped(nn.Module):
    """A module as a function of its tensor arguments alone, returning a flat list of tensors."""

    def __init__(self, inner: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self._run = run

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves, _ = pytree.tree_flatten(self._run(self.inner, *tensors))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def export_outer(module: nn.Module) -> Exported:
    """Export everything around the repeated layers of a language model.

    Returns:
        The function (parameters are the program inputs, result the logits) and the layer calls.

    Raises:
        CaptureError: torch.export fails or specialises batch or length.
    """
    names = accepted_inputs(module)
    types = [Type((B, S), torch.int64)] * len(names)
    keywords = {"use_cache": False} if _takes_use_cache(module) else {}

    def run(inner: nn.Module, *tensors: Tensor) -> Tensor:
        return logits_of(inner(**dict(zip(names, tensors, strict=True)), **keywords))

    with OuterGraph(module).installed() as outer:
        digest = operator_digest(module, run, types, outer.layers.values())
        calls = outer.take_calls()
        key = None if digest is None else f"{' '.join(names)} {digest}"
        exported = KNOWN.get(key, module, calls)
        if exported is not None:
            return exported
        with parameters_reserved(module):
            exported = export_function(Wrapped(module, run), types, WHOLE)
        calls = outer.take_calls()
    for value, name in zip(exported.function.params, names, strict=True):
        value.name = name
    for node in exported.function.nodes:
        if node.op == LAYER:
            exported.layer_calls[node] = calls[node.attrs["args"][1]]
    KNOWN.add(key, exported, module)
    return exported


def export_layer(call: LayerCall, types: Sequence[Type]) -> Exported:
    """Export one layer as a function of its tensor arguments.

    Args:
        types: Types of the tensor arguments, sizes in B and S.

    Raises:
        CaptureError: torch.export fails or specialises batch or length.
    """

    def run(inner: nn.Module, *tensors: Tensor) -> Any:
        return call.run(inner, tensors)

    digest = operator_digest(call.module, run, types)
    exported = KNOWN.get(digest, call.module)
    if exported is None:
        with parameters_reserved(call.module):
            exported = export_function(Wrapped(call.module, run), types, call.path)
        KNOWN.add(digest, exported, call.module)
    return exported


def _takes_use_cache(module: nn.Module) -> bool:
    """True where forward takes `use_cache`, or a transformers model hands keywords on."""
    parameters = inspect.signature(module.forward).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "use_cache" in parameters or (hands_on and hasattr(module, "config"))


def export_function(module: Wrapped, types: Sequence[Type], where: str) -> Exported:
    """Export a module as a function of tensors of the types, whose sizes are in B and S.

    Raises:
        CaptureError: torch.export fails or specialises B or S.
    """
    sizes = {B: TRACE_BATCH, S: TRACE_LENGTH}
    inputs = [torch.ones(kind.concrete(sizes), dtype=kind.dtype) for kind in types]
    shapes = [kind.shape for kind in types]
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
