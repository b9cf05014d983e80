"""From an exported program of torch to a function of ATen nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.function import Application
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from graphopt.capture.aliases import plain_name
from graphopt.capture.in_place import SCATTERS, written_slice
from graphopt.capture.layer_calls import LayerCall
from graphopt.errors import CaptureError
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Function, In, Node, Value, unique_name
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.types import B, S, Type, dim

WHOLE = "the model"
"""What messages call the module that is captured."""


@dataclass
class Exported:
    """One exported function with the types of its values.

    Attributes:
        function: Every node an ATen node; weight slots are names relative to the module.
        types: Type of every value.
        constants: Values of the slots that are no parameters.
        layer_calls: For the outer graph: layer-call nodes with their records.
    """

    function: Function
    types: dict[Value, Type]
    constants: dict[str, Tensor]
    layer_calls: dict[Node, LayerCall] = field(default_factory=dict)


class Converter:
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
        self.simplified: dict[sympy.Expr, sympy.Expr] = {}

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
            own = value.node.expr
            if own not in self.simplified:
                self.simplified[own] = _simplify(own.subs(self.symbols))
            expr = self.simplified[own]
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
        remove_dead(self.function)
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
            if target._schema.is_mutable:
                self._write(node, inputs[-1])
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
        if target._schema.is_mutable:
            self._write(node, result.outputs[0])

    def _write(self, node: torch.fx.Node, value: Value) -> None:
        """Let later readers of what an in-place operator writes see the new value."""
        written = node.args[0]
        assert isinstance(written, torch.fx.Node)
        self.env[written] = value
        view = written_slice(node)
        if view is None:
            return
        base, *where = view.args
        scatter = SCATTERS[view.target]  # type: ignore[index]
        name = f"{scatter.namespace}.{scatter._schema.name.split('::')[1]}.{scatter._overloadname}"
        assert isinstance(base, torch.fx.Node)
        before: Value = self.env[base]
        places = [In(0), In(1), *(self.expr(self._lookup(place)) for place in where)]
        result = Node(name, [before, value], {"args": places, "kwargs": {}})
        whole = self.new_value(f"{before.name}_written", base.meta["val"])
        whole.node = result
        result.outputs.append(whole)
        result.attrs["types"] = [self.types[whole]]
        self.function.nodes.append(result)
        self.env[base] = whole

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


_ASSIGNMENTS = {
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
}
"""What `&=` and its kin are called where they make a tensor."""


def _functional_name(name: str) -> str:
    """Return the functional form of an in-place operator.

    Raises:
        CaptureError: It has none.
    """
    namespace, op, overload = name.split(".")
    functional = _ASSIGNMENTS.get(op) or op.removesuffix("_")
    if not hasattr(getattr(getattr(torch.ops, namespace), functional, None), overload):
        raise CaptureError(f"The in-place operator {name} has no functional form.")
    return f"{namespace}.{functional}.{overload}"
