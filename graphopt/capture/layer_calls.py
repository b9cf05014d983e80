"""Repeated layers as opaque calls, so that what is around them is exported without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.capture.arguments import added, flatten, unflatten
from graphopt.capture.model import everything_on_meta

# Sizes used while tracing: distinct, and neither 0 nor 1, which torch.export specialises on.
TRACE_BATCH, TRACE_LENGTH = 3, 11

_TENSOR = object()
"""Stands for a tensor where a layer's results are listed."""

LAYER = "graphopt_capture.layer.default"
"""The operator that stands for a layer."""

_LIBRARY = torch.library.Library("graphopt_capture", "DEF")
_LIBRARY.define("layer(Tensor[] inputs, int record) -> Tensor[]")
RECORDS: dict[int, LayerCall] = {}


@torch.library.impl(_LIBRARY, "layer", "Meta")
def _layer_on_meta(inputs: list[Tensor], record: int) -> list[Tensor]:
    return [shape.make(inputs) for shape in RECORDS[record].outputs]


@dataclass(frozen=True)
class OutputShape:
    """How the shape of a layer output follows from its inputs' shapes.

    Each dimension is a number, or (input, dimension) whose size it repeats.
    """

    dims: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype

    def make(self, inputs: Sequence[Tensor]) -> Tensor:
        sizes = [d if isinstance(d, int) else inputs[d[0]].shape[d[1]] for d in self.dims]
        return torch.empty(sizes, dtype=self.dtype, device="meta")


@dataclass
class LayerCall:
    """One call of a repeated layer, seen while the outer graph was exported.

    Attributes:
        path: Qualified name of the layer.
        module: The layer.
        spec: How `args, kwargs` flatten; see `arguments`.
        leaves: The flattened arguments; tensors are replaced by None.
        tensors: Which leaves are tensors.
        outputs: Shapes of the tensors it returns.
        key: What calls of equal structure share.
    """

    path: str
    module: nn.Module
    spec: Any
    leaves: list[Any]
    tensors: list[int]
    outputs: list[OutputShape] = field(default_factory=list)
    out_spec: Any = None
    out_leaves: list[Any] = field(default_factory=list)
    key: Any = None

    def run(self, forward: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Return what the layer returns for its tensor arguments, and writes into its mappings."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.tensors, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs, mappings = unflatten(leaves, self.spec)
        before = [dict(mapping) for mapping in mappings]
        output = forward(*args, **kwargs)
        return output, added(before, mappings)


def repeated_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost members of module lists, by qualified name."""
    found: dict[str, nn.Module] = {}

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            path = f"{prefix}.{name}".lstrip(".")
            if isinstance(parent, nn.ModuleList):
                found[path] = child
            else:
                walk(child, path)

    walk(module, "")
    return found


def _index_attributes(layers: dict[str, nn.Module]) -> set[tuple[str, str]]:
    """Return (part, attribute) pairs that hold the layer's own position in every layer."""
    candidates: dict[tuple[str, str], bool] = {}
    for path, layer in layers.items():
        index = path.rsplit(".", 1)[-1]
        for prefix, part in layer.named_modules():
            for key, value in part.__dict__.items():
                if type(value) is int:
                    holds = str(value) == index
                    candidates[prefix, key] = candidates.get((prefix, key), True) and holds
    return {pair for pair, holds in candidates.items() if holds}


def _plain_attributes(layer: nn.Module, skip: set[tuple[str, str]]) -> tuple[Any, ...]:
    """Return the non-tensor attributes of a layer and its parts, less those in `skip`."""
    rows: list[Any] = []
    for prefix, part in layer.named_modules():
        rows.append((prefix, type(part)))
        for key, value in sorted(part.__dict__.items()):
            if key.startswith("_") or key in ("training", "forward") or (prefix, key) in skip:
                continue
            if isinstance(value, bool | int | str | float | type(None)):
                rows.append((prefix, key, value))
            elif isinstance(value, tuple | list) and all(
                isinstance(item, int | float | str) for item in value
            ):
                rows.append((prefix, key, tuple(value)))
            elif callable(value) and not isinstance(value, nn.Module):
                rows.append((prefix, key, getattr(value, "__qualname__", str(value))))
    return tuple(rows)


class _Parameters:
    """The parameters of a layer, taken away from it while the outer graph is exported.

    torch.export does work for every parameter it sees, also of layers that are opaque to it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters())
        self._stores = [(part, part._parameters) for part in layer.modules() if part._parameters]

    def hide(self) -> None:
        for part, _ in self._stores:
            part._parameters = {}

    def show(self) -> None:
        for part, store in self._stores:
            part._parameters = store

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        self.show()
        try:
            yield
        finally:
            self.hide()


class OuterGraph:
    """Replaces the forward of repeated layers by opaque calls while the outer graph is exported."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = repeated_layers(module)
        self._skip = _index_attributes(self.layers)
        self._shapes: dict[Any, LayerCall] = {}
        self._original: dict[str, Callable[..., Any]] = {}
        self._parameters: dict[str, _Parameters] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[OuterGraph]:
        """Inside, layers are opaque calls."""
        self._install()
        try:
            yield self
        finally:
            self._remove()
            RECORDS.clear()

    def take_calls(self) -> list[LayerCall]:
        """Return the calls since the last time, each in the place that its operator names."""
        calls = list(RECORDS.values())
        RECORDS.clear()
        return calls

    def _install(self) -> None:
        for path, layer in self.layers.items():
            self._original[path] = layer.forward
            layer.forward = self._opaque_call(path, layer)  # type: ignore[method-assign]
            self._parameters[path] = _Parameters(layer)
        # Layers may share parts, so that all are looked at before any is emptied.
        for parameters in self._parameters.values():
            parameters.hide()

    def _remove(self) -> None:
        for parameters in self._parameters.values():
            parameters.show()
        for path, layer in self.layers.items():
            if path in self._original:
                del layer.__dict__["forward"]

    def _group_key(self, call: LayerCall, shapes: Sequence[Any]) -> Any:
        statics = tuple(repr(leaf) for leaf in call.leaves)
        return (
            type(call.module),
            self._parameters[call.path].shapes,
            _plain_attributes(call.module, self._skip),
            str(call.spec),
            statics,
            tuple(shapes),
        )

    def _opaque_call(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec, mappings = flatten(args, kwargs)
            positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            inputs = [leaves[i] for i in positions]
            statics = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call = LayerCall(path, layer, spec, statics, positions)
            shapes = [(t.dtype, tuple(str(s) for s in t.shape)) for t in inputs]
            call.key = self._group_key(call, shapes)
            measured = self._shapes.get(call.key)
            if measured is None:
                with self._parameters[path].shown():
                    self._measure(call, inputs)
                self._shapes[call.key] = call
            else:
                call.outputs, call.out_spec = measured.outputs, measured.out_spec
                call.out_leaves = measured.out_leaves
            number = len(RECORDS)
            RECORDS[number] = call
            results = torch.ops.graphopt_capture.layer(inputs, number)
            out_leaves = list(call.out_leaves)
            places = [i for i, leaf in enumerate(out_leaves) if leaf is _TENSOR]
            for place, tensor in zip(places, results, strict=True):
                out_leaves[place] = tensor
            output, written = pytree.tree_unflatten(out_leaves, call.out_spec)
            for mapping, new in zip(mappings, written, strict=True):
                mapping.update(new)
            return output

        return forward

    def _measure(self, call: LayerCall, inputs: Sequence[Tensor]) -> None:
        """Run the layer itself once, outside the trace, to learn what it returns."""

        def hint(size: Any) -> int:
            return size if isinstance(size, int) else int(size.node.hint)

        with _disable_current_modes(), torch.no_grad(), everything_on_meta(call.module):
            plain = [
                torch.zeros([hint(s) for s in t.shape], dtype=t.dtype, device="meta")
                for t in inputs
            ]
            output = call.run(self._original[call.path], plain)
        leaves, call.out_spec = pytree.tree_flatten(output)
        dynamic = {TRACE_BATCH, TRACE_LENGTH}
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                call.out_leaves.append(leaf)
                continue
            call.out_leaves.append(_TENSOR)
            dims: list[int | tuple[int, int]] = []
            for size in leaf.shape:
                place = next(
                    (
                        (i, d)
                        for i, t in enumerate(inputs)
                        for d, s in enumerate(t.shape)
                        if not isinstance(s, int) and hint(s) == size
                    ),
                    None,
                )
                dims.append(place if place is not None and size in dynamic else int(size))
            call.outputs.append(OutputShape(tuple(dims), leaf.dtype))
