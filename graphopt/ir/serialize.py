"""Programs as JSON: the versioned form in which graphopt saves and loads them.

Weights are not part of the JSON; `program_to_json` lists their names, shapes and dtypes, and
the values lie beside it as safetensors.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from graphopt.errors import SourceError
from graphopt.ir.graph import Cache, Call, Function, In, KVState, Node, Param, Program, Value
from graphopt.ir.types import DTYPE_NAMES, DTYPES, SYMBOLS, Type, dim
from graphopt.ir.weights import Missing, Producer, Weight

FORMAT_VERSION = 1


def _pack(value: Any) -> Any:
    """Return an attribute as JSON; what JSON lacks becomes a one-key object."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"float": str(value)}
    if isinstance(value, Param):
        return {"param": value.name}
    if isinstance(value, In):
        return {"in": value.index}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "any"}
    if isinstance(value, torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, sympy.Expr):
        return {"expr": str(value)}
    if isinstance(value, Type):
        return {"type": [[_pack(size) for size in value.shape], DTYPE_NAMES[value.dtype]]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item) for item in value]}
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _pack(item) for key, item in value.items()}}
    raise TypeError(f"an attribute of type {type(value).__name__} cannot be saved")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "float":
            return float(content)
        case "param":
            return Param(content)
        case "in":
            return In(content)
        case "dtype" | "torch":
            return _torch_constant(content)
        case "device":
            return torch.device("cpu")
        case "expr":
            return _parse_expr(content)
        case "type":
            return Type(tuple(_unpack(size) for size in content[0]), DTYPES[content[1]])
        case "tuple":
            return tuple(_unpack(item) for item in content)
        case "dict":
            return {key: _unpack(item) for key, item in content.items()}
    raise SourceError(f"program.json holds an attribute of unknown kind {kind!r}.")


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
        raise ValueError(f"torch has no {name!r}")
    return found


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Mod": sympy.Mod,
    "ceiling": sympy.ceiling,
    "floor": sympy.floor,
}
_MAX_POWER = 16


def _parse_expr(text: str) -> Any:
    """Return the size written as `text`.

    Only sums, products, small powers and a few functions of B, S and P are built; sympy's own
    parser would evaluate the text as Python.
    """

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                return sympy.Integer(value)
            case ast.Name(id=name) if name in SYMBOLS:
                return SYMBOLS[name]
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -build(inner)
            case ast.BinOp(left, ast.Pow(), ast.Constant(value=int() as power)):
                if 0 <= power <= _MAX_POWER:
                    return build(left) ** power
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](build(left), build(right))
            case ast.Call(ast.Name(id=name), args, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(build, args))
        raise ValueError("not a size")

    try:
        size = build(ast.parse(text, mode="eval").body)
        if size.has(sympy.zoo, sympy.nan):
            raise ValueError("division by zero")
        return dim(size)
    except (SyntaxError, ValueError, TypeError, RecursionError) as error:
        raise SourceError(f"program.json holds a size that is not algebra: {text!r}.") from error


def _pack_function(function: Function) -> dict[str, Any]:
    names = {value: value.name for value in function.values()}
    return {
        "name": function.name,
        "params": [value.name for value in function.params],
        "weights": {slot: value.name for slot, value in function.weights.items()},
        "caches": [
            [c.slot, *(names[v] for v in (c.past_k, c.past_v, c.present_k, c.present_v))]
            for c in function.caches
        ],
        "nodes": [
            {
                "op": node.op,
                "in": [None if v is None else v.name for v in node.inputs],
                "attrs": {key: _pack(attr) for key, attr in node.attrs.items()},
                "out": [v.name for v in node.outputs],
            }
            for node in function.nodes
        ],
        "results": [value.name for value in function.results],
    }


def _unpack_function(data: dict[str, Any]) -> Function:
    values: dict[str, Value] = {}

    def make(name: str) -> Value:
        values[name] = Value(name)
        return values[name]

    function = Function(data["name"])
    function.params = [make(name) for name in data["params"]]
    function.weights = {slot: make(name) for slot, name in data["weights"].items()}
    pasts = [(c[0], make(c[1]), make(c[2]), c[3], c[4]) for c in data["caches"]]
    for item in data["nodes"]:
        node = Node(
            item["op"],
            [None if name is None else values[name] for name in item["in"]],
            {key: _unpack(attr) for key, attr in item["attrs"].items()},
        )
        for index, name in enumerate(item["out"]):
            value = make(name)
            value.node, value.index = node, index
            node.outputs.append(value)
        function.nodes.append(node)
    function.caches = [Cache(s, k, v, values[pk], values[pv]) for s, k, v, pk, pv in pasts]
    function.results = [values[name] for name in data["results"]]
    return function


def program_to_json(program: Program) -> dict[str, Any]:
    """Return the program, without weight values, as plain JSON data."""
    return {
        "format": "graphopt-program",
        "version": FORMAT_VERSION,
        "name": program.name,
        "source": program.source,
        "checkpoint_dtype": DTYPE_NAMES[program.checkpoint_dtype],
        "inputs": {name: _pack(kind) for name, kind in program.inputs.items()},
        "outputs": program.outputs,
        "functions": [_pack_function(f) for f in program.functions.values()],
        "calls": [
            {
                "function": c.function,
                "args": c.args,
                "results": c.results,
                "weights": c.weights,
                "attrs": {key: _pack(attr) for key, attr in c.attrs.items()},
                "caches": c.caches,
                "path": c.path,
            }
            for c in program.calls
        ],
        "weights": [
            {
                "name": w.name,
                "shape": list(w.shape),
                "dtype": DTYPE_NAMES[w.dtype],
                "checkpoint": w.checkpoint,
                "constant": w.constant,
            }
            for w in program.weights
        ],
        "states": [
            [s.name, s.heads, s.k_dim, s.v_dim, DTYPE_NAMES[s.dtype]]
            for s in program.states.values()
        ],
        "config": program.config,
        "generation": program.generation,
        "notes": [list(note) for note in program.notes],
    }


def program_from_json(data: dict[str, Any], producers: dict[str, Producer]) -> Program:
    """Return the program saved as `data`; weights take their values from `producers`.

    Raises:
        SourceError: The data is of another format or version, or is malformed.
    """
    if not isinstance(data, dict) or data.get("format") != "graphopt-program":
        raise SourceError("program.json is not a saved graphopt program.")
    if data.get("version") != FORMAT_VERSION:
        raise SourceError(
            f"program.json has version {data.get('version')}, this graphopt reads "
            f"{FORMAT_VERSION}.",
            "Compile the model again with this version.",
        )
    try:
        program = Program(
            name=data["name"],
            source=data["source"],
            inputs={name: _unpack(kind) for name, kind in data["inputs"].items()},
            outputs=list(data["outputs"]),
            functions={f["name"]: _unpack_function(f) for f in data["functions"]},
            config=data["config"],
            # Programs saved by older versions have none.
            generation=dict(data.get("generation", {})),
            checkpoint_dtype=DTYPES[data["checkpoint_dtype"]],
            notes=[(where, reason) for where, reason in data["notes"]],
        )
        for c in data["calls"]:
            attrs = {key: _unpack(attr) for key, attr in c["attrs"].items()}
            program.calls.append(
                Call(c["function"], c["args"], c["results"], c["weights"], attrs, c["caches"],
                     c["path"])
            )  # fmt: skip
        for w in data["weights"]:
            missing = Missing(tuple(w["shape"]), DTYPES[w["dtype"]], w["name"])
            producer = producers.get(w["name"], missing)
            program.weights.add(Weight(w["name"], producer, w["checkpoint"], w["constant"]))
        for name, heads, k_dim, v_dim, dtype in data["states"]:
            program.states[name] = KVState(name, heads, k_dim, v_dim, DTYPES[dtype])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise SourceError(
            f"program.json is malformed: {error!r}.", "Compile the model again."
        ) from error
    return program
