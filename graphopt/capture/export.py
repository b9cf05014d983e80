"""From a module to IR functions: torch.export on meta tensors, one layer of a kind at a time.

The module is exported once with every repeated layer replaced by an opaque call, so time and
memory don't grow with depth; then one layer of each kind is exported on its own.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch._dynamo.config
from sympy.core.function import Application
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.capture.aliases import plain_name
from graphopt.capture.arguments import added, flatten, unflatten
from graphopt.capture.model import (
    accepted_inputs,
    everything_on_meta,
    logits_of,
    parameters_reserved,
)
from graphopt.capture.tracing import traced
from graphopt.errors import CaptureError
from graphopt.ir.graph import Function, In, Node, Value, unique_name
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.types import B, S, Type, dim

# Sizes used while tracing: distinct, and neither 0 nor 1, which torch.export specialises on.
TRACE_BATCH, TRACE_LENGTH = 3, 11

WHOLE = "the model"
"""What messages call the module that is captured."""

_LIBRARY = torch.library.Library("graphopt_capture", "DEF")
_LIBRARY.define("layer(Tensor[] inputs, int record) -> Tensor[]")
_RECORDS: dict[int, LayerCall] = {}


@torch.library.impl(_LIBRARY, "layer", "Meta")
def _layer_on_meta(inputs: list[Tensor], record: int) -> list[Tensor]:
    return [shape.make(inputs) for shape in _RECORDS[record].outputs]


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
    """One call of a repeated layer, seen while the shell was exported.

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
    """The parameters of a layer, taken away from it while the shell is exported.

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


class _Shell:
    """Replaces the forward of repeated layers by opaque calls while the shell is exported."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = repeated_layers(module)
        self._skip = _index_attributes(self.layers)
        self.records: list[LayerCall] = []
        self._shapes: dict[Any, LayerCall] = {}
        self._original: dict[str, Callable[..., Any]] = {}
        self._parameters: dict[str, _Parameters] = {}

    def install(self) -> None:
        for path, layer in self.layers.items():
            self._original[path] = layer.forward
            layer.forward = self._stub(path, layer)  # type: ignore[method-assign]
            self._parameters[path] = _Parameters(layer)
        # Layers may share parts, so that all are looked at before any is emptied.
        for parameters in self._parameters.values():
            parameters.hide()

    def remove(self) -> None:
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

    def _stub(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec, mappings = flatten(args, kwargs)
            positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            inputs = [leaves[i] for i in positions]
            statics = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            call = LayerCall(path, layer, spec, statics, positions)
            shapes = [(t.dtype, tuple(str(s) for s in t.shape)) for t in inputs]
            call.key = self._group_key(call, shapes)
            twin = self._shapes.get(call.key)
            if twin is None:
                with self._parameters[path].shown():
                    self._measure(call, inputs)
                self._shapes[call.key] = call
            else:
                call.outputs, call.out_spec = twin.outputs, twin.out_spec
                call.out_leaves = twin.out_leaves
            number = len(_RECORDS)
            _RECORDS[number] = call
            self.records.append(call)
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


_TENSOR = object()


class _Wrapped(nn.Module):
    """A module as a function of its tensor arguments alone, returning a flat list of tensors."""

    def __init__(self, inner: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self._run = run

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves, _ = pytree.tree_flatten(self._run(self.inner, *tensors))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass
class Exported:
    """One exported function with the types of its values.

    Attributes:
        function: Every node an ATen node; weight slots are names relative to the module.
        types: Type of every value.
        constants: Values of the slots that are no parameters.
        stubs: For the shell: layer-call nodes with their records.
    """

    function: Function
    types: dict[Value, Type]
    constants: dict[str, Tensor]
    stubs: dict[Node, LayerCall] = field(default_factory=dict)


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

    shell = _Shell(module)
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
            exported.stubs[node] = _RECORDS.pop(node.attrs["args"][1])
    return exported, shell.records


def export_layer(call: LayerCall, shapes: Sequence[Type]) -> Exported:
    """Export one layer as a function of its tensor arguments.

    Args:
        shapes: Types of the tensor arguments, sizes in B and S.
    """

    def run(inner: nn.Module, *tensors: Tensor) -> Any:
        return call.run(inner, tensors)

    sizes = {B: TRACE_BATCH, S: TRACE_LENGTH}
    inputs = [torch.zeros(shape.concrete(sizes), dtype=shape.dtype) for shape in shapes]
    with parameters_reserved(call.module):
        return _export(_Wrapped(call.module, run), inputs, [t.shape for t in shapes], call.path)


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
        if _needs_functionalizing(program.graph):
            program = program.run_decompositions({})
    return _Converter(program, shapes, where).convert()


def _is_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )


def _needs_functionalizing(graph: torch.fx.Graph) -> bool:
    """True where an in-place op writes to something that is seen through a view as well."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        target = node.args[0]
        if target.op != "call_function" or _is_view(target):
            return True
        if any(_is_view(user) for user in target.users if user is not node):
            return True
    return False


class _Converter:
    """Turns an ExportedProgram into a Function of ATen nodes."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        shapes: Sequence[Sequence[Any]],
        where: str,
    ) -> None:
        self.program = program
        self.where = where
        self.function = Function("main")
        self.types: dict[Value, Type] = {}
        self.env: dict[torch.fx.Node, Any] = {}
        self.used: dict[str, Tensor] = {}
        self.names: set[str] = set()
        self.symbols = self._symbols(shapes)

    def _symbols(self, shapes: Sequence[Sequence[Any]]) -> dict[sympy.Symbol, Any]:
        """Map torch's size symbols to expressions in B and S through the input shapes."""
        mapping: dict[sympy.Symbol, Any] = {}
        user = set(self.program.graph_signature.user_inputs)
        nodes = [n for n in self.program.graph.nodes if n.op == "placeholder" and n.name in user]
        for node, shape in zip(nodes, shapes, strict=True):
            for size, wanted in zip(node.meta["val"].shape, shape, strict=True):
                if isinstance(size, torch.SymInt):
                    expr = size.node.expr
                    if expr.is_Symbol:
                        mapping.setdefault(expr, wanted)
                elif not isinstance(wanted, int):
                    raise CaptureError(
                        f"torch.export fixed the size {wanted} of {self.where} to {size}.",
                        "The module computes with the length as a plain number; such a mixer "
                        "has no form in graphopt yet.",
                    )
        return mapping

    def expr(self, value: Any) -> Any:
        """Return an int, float, bool or SymInt as a number or an expression in B and S."""
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            expr = _simplify(value.node.expr.subs(self.symbols))
            return dim(expr) if expr.is_number or isinstance(value, torch.SymInt) else expr
        return value

    def type_of(self, tensor: Tensor) -> Type:
        return Type(tuple(self.expr(size) for size in tensor.shape), tensor.dtype)

    def new_value(self, name: str, tensor: Any) -> Value:
        unique = unique_name(name, self.names)
        self.names.add(unique)
        value = Value(unique)
        self.types[value] = self.type_of(tensor)
        return value

    def convert(self) -> Exported:
        signature = self.program.graph_signature
        owned = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, owned)
            elif node.op == "output":
                self._outputs(pytree.tree_leaves(node.args))
            else:
                self._node(node, self.program.graph_module)
        return Exported(self.function, self.types, self.used)

    def _outputs(self, results: Sequence[Any]) -> None:
        """Take the module's own results; what else is returned are tensors it changed.

        Raises:
            CaptureError: One of those matters to what the program computes afterwards.
        """
        kinds = self.program.graph_signature.output_specs
        changed: list[tuple[OutputKind, str]] = []
        for spec, result in zip(kinds, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                self.function.results.append(self.env[result])
            else:
                changed.append((spec.kind, spec.target or ""))
        if not changed:
            return
        self.function.remove_dead()
        self.used = {k: v for k, v in self.used.items() if k in self.function.weights}
        for kind, target in changed:
            if kind is OutputKind.USER_INPUT_MUTATION:
                self._refuse_changed_input(target)
            else:
                self._refuse_state(target.removeprefix("inner."))

    def _refuse_state(self, name: str) -> None:
        """A buffer that is written may be forgotten where no call reads what the last one left."""
        if name in self.function.weights:
            raise CaptureError(
                f"{self.where}: its forward pass changes the buffer {name!r} and reads it in the "
                "next call, which makes the model a recurrent one.",
                "graphopt takes models whose only memory is a cache of keys and values.",
            )

    def _refuse_changed_input(self, name: str) -> None:
        """The program's own inputs are the caller's; those of a layer are read behind it."""
        if self.where != WHOLE:
            raise CaptureError(
                f"{self.where}: its forward pass changes its argument {name!r} in place, which "
                "the layers around it would not see.",
                "Let it return a new tensor instead.",
            )

    def _placeholder(self, node: torch.fx.Node, owned: dict[str, str]) -> None:
        tensor = node.meta.get("val")
        if node.name not in owned:
            value = self.new_value(node.name, tensor)
            self.function.params.append(value)
            self.env[node] = value
            return
        name = owned[node.name].removeprefix("inner.")
        value = self.new_value(name, tensor)
        self.function.weights[name] = value
        self.env[node] = value
        if node.name not in self.program.graph_signature.inputs_to_parameters:
            full = owned[node.name]
            constant = self.program.constants.get(full)
            if constant is None:
                constant = self.program.state_dict[full]
            self.used[name] = constant.detach().clone()

    def _node(self, node: torch.fx.Node, owner: torch.fx.GraphModule) -> None:
        if node.op == "get_attr":
            self.env[node] = getattr(owner, str(node.target))
            return
        value = node.meta.get("val")
        if node.target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            self.env[node] = self.expr(value)
        elif getattr(node.target, "namespace", "") == "higher_order":
            self._inline(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            self._operator(node)
        else:
            raise CaptureError(f"{self.where}: {node.format_node()} has no form in the IR.")

    def _inline(self, node: torch.fx.Node) -> None:
        """Inline wrappers that only switch autograd or autocast."""
        if "wrap_with" not in str(node.target):
            raise CaptureError(
                f"{self.where}: {node.target} (a branch or loop on values) has no form in the IR.",
                "Choose a config without it, such as a fixed rotary scaling.",
            )
        position = next(
            i for i, a in enumerate(node.args) if isinstance(self._lookup(a), nn.Module)
        )
        body: torch.fx.GraphModule = self._lookup(node.args[position])
        operands = list(node.args[position + 1 :])
        inner_outputs: Any = None
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.env[inner] = self._lookup(operands.pop(0))
            elif inner.op == "output":
                inner_outputs = map_leaves(
                    map_arg(inner.args[0], lambda n: _Held(self.env[n])),  # type: ignore[arg-type, return-value]
                    lambda leaf: leaf.value if isinstance(leaf, _Held) else leaf,
                )
            else:
                self._node(inner, body)
        self.env[node] = inner_outputs

    def _lookup(self, argument: Any) -> Any:
        return self.env[argument] if isinstance(argument, torch.fx.Node) else argument

    def _operator(self, node: torch.fx.Node) -> None:
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        if any(word in name for word in ("_assert", "sym_constrain", "_set_grad", "_exit_auto")):
            return
        if target._schema.is_mutable:
            name = _functional_name(name)
        name = plain_name(name)
        inputs: list[Value] = []

        def place(leaf: Any) -> Any:
            leaf = self._lookup(leaf)
            if isinstance(leaf, Value):
                if leaf not in inputs:
                    inputs.append(leaf)
                return In(inputs.index(leaf))
            if isinstance(leaf, list | tuple):
                return map_leaves(leaf, place)
            return self.expr(leaf)

        args = [map_leaves(_plain(a), place) for a in node.args]
        kwargs = {key: map_leaves(_plain(a), place) for key, a in node.kwargs.items()}
        if name == "aten.zeros.default":
            kwargs.pop("memory_format", None)  # which `empty` takes and `zeros` does not
        value = node.meta.get("val")
        if name == "aten.copy.default" and self._copies(node, inputs):
            self.env[node] = inputs[-1]
            if target._schema.is_mutable and isinstance(node.args[0], torch.fx.Node):
                self.env[node.args[0]] = inputs[-1]
            return
        outputs = list(value) if isinstance(value, list | tuple) else [value]
        result = Node(name, list(inputs), {"args": args, "kwargs": kwargs})
        single = len(outputs) == 1 and not isinstance(value, list | tuple)
        for index, tensor in enumerate(outputs):
            made = self.new_value(node.name if single else f"{node.name}_{index}", tensor)
            made.node, made.index = result, index
            result.outputs.append(made)
        result.attrs["types"] = [self.types[made] for made in result.outputs]
        self.function.nodes.append(result)
        self.env[node] = result.outputs[0] if single else list(result.outputs)
        if target._schema.is_mutable and isinstance(node.args[0], torch.fx.Node):
            # Later readers of the written tensor see the new value.
            self.env[node.args[0]] = result.outputs[0]

    def _copies(self, node: torch.fx.Node, inputs: Sequence[Value]) -> bool:
        """Whether a copy puts a tensor of the same type in place of all of the other."""
        into, what = (self._lookup(a) for a in node.args[:2])
        return (
            isinstance(what, Value) and inputs[-1] is what and self.types[into] == self.types[what]
        )


_SYMPY_TWINS: dict[str, Callable[..., sympy.Expr]] = {
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Mod": sympy.Mod,
    "PythonMod": sympy.Mod,
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CleanDiv": lambda a, b: a / b,
    "IntTrueDiv": lambda a, b: a / b,
    "ToFloat": lambda a: a,
}


def _simplify(expr: sympy.Expr) -> sympy.Expr:
    """Resolve minima and maxima that hold for every batch and length of at least one."""
    # torch has functions of its own for these; the IR speaks sympy's.
    for function in expr.atoms(Application):
        plain = _SYMPY_TWINS.get(type(function).__name__)
        if plain is not None and not type(function).__module__.startswith("sympy."):
            expr = expr.xreplace({function: plain(*function.args)})
    if not expr.has(sympy.Max, sympy.Min):
        return expr
    less = {s: sympy.Symbol(f"{s}_less_one", integer=True, nonnegative=True) for s in (B, S)}
    shifted = expr.subs({s: z + 1 for s, z in less.items()})
    return sympy.expand(shifted.subs({z: s - 1 for s, z in less.items()}))


@dataclass
class _Held:
    """Keeps a value from being taken apart while a nested argument is mapped."""

    value: Any


def _plain(argument: Any) -> Any:
    """Return fx's immutable lists and dicts as plain ones."""
    if isinstance(argument, list | tuple):
        return [_plain(item) for item in argument]
    return argument


def _functional_name(name: str) -> str:
    """Return the out-of-place twin of an in-place operator.

    Raises:
        CaptureError: It has none.
    """
    namespace, op, overload = name.split(".")
    twin = op.removesuffix("_")
    if not hasattr(getattr(getattr(torch.ops, namespace), twin, None), overload):
        raise CaptureError(f"The in-place operator {name} has no out-of-place twin.")
    return f"{namespace}.{twin}.{overload}"
