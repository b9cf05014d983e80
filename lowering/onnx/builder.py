"""Writing an ONNX graph node by node: constants, symbolic sizes, initializers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from graphopt.files.onnx_file import OWN_CONSTANT
from graphopt.ir.types import Dim

OPSET = 23
MICROSOFT = "com.microsoft"
GRAPHOPT = "graphopt"

ONNX_DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}

NUMPY_DTYPES: dict[torch.dtype, type] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.bool: np.bool_,
}


@dataclass
class Branch:
    """One side of an If."""

    name: str
    nodes: list[ir.Node]
    results: list[ir.Value] = field(default_factory=list)

    def graph(self) -> ir.Graph:
        """Return it as a graph without inputs; it reads the values around it by name."""
        return ir.Graph([], self.results, nodes=self.nodes, name=self.name)


class GraphBuilder:
    """Collects nodes in order.

    Attributes:
        nodes: The nodes so far.
        scope: Prefix of the names of new nodes: the path of the call being lowered.
        functions: Local functions in use, by name.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.functions: dict[str, ir.Function] = {}
        self.scope = ""
        self._names: dict[str, int] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._rows: dict[ir.Value, list[ir.Value]] = {}
        self._narrow: dict[ir.Value, ir.Value] = {}
        self._sizes: dict[Any, ir.Value] = {}
        self._symbols: dict[sympy.Symbol, ir.Value] = {}

    # Nodes ---------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """Return `name`, made unique in the graph."""
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        without: Collection[int] = (),
        name: str = "",
        **attributes: Any,
    ) -> Any:
        """Append a node and return its output, or a list of its outputs.

        Args:
            without: Optional outputs that are not asked for: a runtime need not compute them.
        """
        operands = list(inputs)
        while operands and operands[-1] is None:
            operands.pop()
        label = self.unique(f"{self.scope}/{name or op_type}" if self.scope else name or op_type)
        given = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(op_type, operands, given, domain=domain, num_outputs=outputs, name=label)
        for index, value in enumerate(node.outputs):
            value.name = label if outputs == 1 else f"{label}:{index}"
            if index in without:
                value.name = ""
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, value: Any, dtype: type = np.int64) -> ir.Value:
        """Return a small constant; equal ones are shared."""
        array: np.ndarray[Any, Any] = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            kind = array.dtype.name
            name = self.unique(f"{OWN_CONSTANT}{kind}_{len(self._constants)}")
            self._constants[key] = self.initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def number(self, value: float, like: torch.dtype = torch.float32) -> ir.Value:
        """Return a scalar constant of the dtype.

        Raises:
            ValueError: Constants of that dtype are not written.
        """
        if like not in NUMPY_DTYPES:
            raise ValueError(f"a number of type {like} has no ONNX form here")
        return self.constant(value, NUMPY_DTYPES[like])

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add an initializer under a name that is unique already."""
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers[name] = value
        return value

    def widened(self, stored: ir.Value) -> ir.Value:
        """Return an initializer as the graph computes with it: what is stored in 16 bits, in fp32.

        ONNX Runtime computes the cast once, when it loads the graph.
        """
        assert stored.const_value is not None and stored.name is not None
        if stored.const_value.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return stored
        scope, self.scope = self.scope, "weights"
        wide: ir.Value = self.op("Cast", stored, to=ir.DataType.FLOAT, name=stored.name)
        self.scope = scope
        wide.shape, wide.type = stored.shape, ir.TensorType(ir.DataType.FLOAT)
        self._narrow[wide] = stored
        return wide

    def split(self, value: ir.Value, count: int, sizes: ir.Value | None = None) -> list[ir.Value]:
        """Split dimension 0 in parts of the sizes, an int64 tensor [count], or in equal ones."""
        equal = count if sizes is None else None
        parts = self.op("Split", value, sizes, outputs=count, axis=0, num_outputs=equal)
        return [parts] if count == 1 else list(parts)

    def rows(self, value: ir.Value, count: int) -> list[ir.Value]:
        """Return a tensor in equal parts of dimension 0.

        Those of an initializer are initializers on the same bytes; others are split when the
        graph runs.
        """
        if value in self._rows:
            return self._rows[value]
        if value in self._narrow:
            narrow = self.rows(self._narrow[value], count)
            self._rows[value] = [self.widened(part) for part in narrow]
            return self._rows[value]
        tensor = value.const_value
        if tensor is None:
            return self.split(value, count)
        assert value.name is not None
        size, *rest = tensor.shape.numpy()
        shape = ir.Shape([size // count, *rest])
        parts: list[ir.Value] = []
        for number in range(count):
            name = self.unique(f"{value.name}.{number}")
            if isinstance(tensor, ir.ExternalTensor):
                assert tensor.length is not None
                length = tensor.length // count
                part: ir.TensorProtocol = ir.ExternalTensor(
                    tensor.location, (tensor.offset or 0) + number * length, length, tensor.dtype,
                    shape=shape, name=name, base_dir=tensor.base_dir,
                )  # fmt: skip
            else:
                rows = slice(number * size // count, (number + 1) * size // count)
                part = ir.tensor(tensor.numpy()[rows], name=name)
            parts.append(self.initializer(name, part))
        self._rows[value] = parts
        return parts

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[Branch]:
        """Collect the nodes made inside as a branch of an If; set its `results` before the end."""
        outer, sizes, scope = self.nodes, dict(self._sizes), self.scope
        made = Branch(self.unique(f"{scope}/{name}"), [])
        self.nodes, self.scope = made.nodes, made.name
        try:
            yield made
        finally:
            # What a branch computed is not seen outside of it.
            self.nodes, self._sizes, self.scope = outer, sizes, scope

    # Sizes ---------------------------------------------------------------------------------

    def bind(self, symbol: sympy.Symbol, value: ir.Value) -> None:
        """Say that an int64 tensor [1] holds the value of B, S or P."""
        self._symbols[symbol] = value

    def bound(self, symbol: sympy.Symbol) -> ir.Value | None:
        """Return what was bound to a symbol; None where nothing was."""
        return self._symbols.get(symbol)

    def size(self, expr: Dim) -> ir.Value:
        """Return a size as an int64 tensor [1].

        Raises:
            ValueError: The expression is of a kind that sizes never are.
        """
        if isinstance(expr, int):
            return self.constant([expr])
        if expr in self._symbols:
            return self._symbols[expr]
        return self._kept(expr, lambda: self._size(sympy.sympify(expr)))

    def _kept(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """Return what is made of sizes, once in a graph, under a name among sizes."""
        if key not in self._sizes:
            scope, self.scope = self.scope, "sizes"
            self._sizes[key] = make()
            self.scope = scope
        return self._sizes[key]

    def _size(self, expr: sympy.Expr) -> ir.Value:
        if expr.is_Integer:
            return self.constant([int(expr)])
        if expr.is_Add or expr.is_Mul:
            name = "Add" if expr.is_Add else "Mul"
            numerator, denominator = sympy.fraction(sympy.together(expr))
            if denominator != 1:
                parts = self.size(_plain(numerator)), self.size(_plain(denominator))
                return self.op("Div", *parts)
            first, *rest = (self.size(_plain(arg)) for arg in expr.args)
            for other in rest:
                first = self.op(name, first, other)
            return first
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            power = base = self.size(_plain(expr.base))
            for _ in range(int(expr.exp) - 1):
                power = self.op("Mul", power, base)
            return power
        if isinstance(expr, sympy.floor):
            return self._floor(*sympy.fraction(sympy.together(expr.args[0])))
        if isinstance(expr, sympy.ceiling):
            return self.op("Neg", self._floor(*sympy.fraction(sympy.together(-expr.args[0]))))
        if isinstance(expr, sympy.Max | sympy.Min):
            name = "Max" if isinstance(expr, sympy.Max) else "Min"
            return self.op(name, *(self.size(_plain(arg)) for arg in expr.args))
        if isinstance(expr, sympy.Mod):
            return self.op("Mod", *(self.size(_plain(arg)) for arg in expr.args))
        raise ValueError(f"the size {expr} has no ONNX form")

    def _floor(self, numerator: sympy.Expr, denominator: sympy.Expr) -> ir.Value:
        """Divide towards minus infinity; ONNX divides towards zero, but for a multiple."""
        top, bottom = self.size(_plain(numerator)), self.size(_plain(denominator))
        return self.op("Div", self.op("Sub", top, self.op("Mod", top, bottom)), bottom)

    def shape(self, sizes: Sequence[Dim]) -> ir.Value:
        """Return sizes as an int64 vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant([int(size) for size in sizes])
        key = tuple(sizes)
        if key not in self._sizes:
            parts: list[ir.Value] = []
            run: list[int] = []
            for size in sizes:
                if isinstance(size, int):
                    run.append(size)
                    continue
                if run:
                    parts.append(self.constant(run))
                    run = []
                parts.append(self.size(size))
            if run:
                parts.append(self.constant(run))
            self._kept(
                key, lambda: parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
            )
        return self._sizes[key]

    def scalar(self, expr: Dim) -> ir.Value:
        """Return a size as an int64 scalar."""
        if isinstance(expr, int):
            return self.constant(expr)
        return self._kept(
            ("scalar", expr), lambda: self.op("Squeeze", self.size(expr), self.constant([0]))
        )

    def reshape(self, x: ir.Value, sizes: Sequence[Dim]) -> ir.Value:
        """Reshape; one symbolic size becomes -1, B and S in front are copied where they stand."""
        symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        if len(symbolic) <= 1 and -1 not in sizes:
            plain = [-1 if i in symbolic else int(size) for i, size in enumerate(sizes)]
            return self.op("Reshape", x, self.constant(plain))
        return self.op("Reshape", x, self.shape(sizes))

    # Functions -----------------------------------------------------------------------------

    def call(
        self, function: ir.Function, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any
    ) -> Any:
        """Append a call of a local function."""
        self.functions[function.name] = function
        return self.op(
            function.name, *inputs, domain=function.domain, outputs=outputs, **attributes
        )

    def model(
        self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value],
        metadata: Mapping[str, str],
    ) -> ir.Model:  # fmt: skip
        """Return the finished model."""
        imports = {"": OPSET, MICROSOFT: 1}
        imports |= {function.domain: 1 for function in self.functions.values()}
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=imports,
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=11,
            producer_name="graphopt",
            functions=list(self.functions.values()),
            metadata_props=dict(metadata),
        )


def _plain(expr: sympy.Expr) -> Dim:
    return int(expr) if expr.is_Integer else expr
