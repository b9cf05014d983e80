"""First round: ATen nodes that do nothing go, and those that an op stands for become it."""

from __future__ import annotations

import contextlib
from typing import Any

import sympy
import torch

from graphopt.capture.rewriting import NotRaisedError, Raiser, base
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import concretize, map_leaves

_SAME_IF_TYPE_IS = {
    "to", "_to_copy", "contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy",
    "type_as", "expand", "expand_as", "view", "reshape", "_unsafe_view", "slice", "flatten",
    "dropout", "float", "double", "lift_fresh", "squeeze", "broadcast_to", "requires_grad_",
}  # fmt: skip

_MOVING = (
    "reshape", "view", "_unsafe_view", "flatten", "unsqueeze", "squeeze", "expand", "transpose",
    "permute", "clone", "contiguous", "alias", "detach",
)  # fmt: skip
"""Operators that give elements other places."""

_UNARY = {
    "aten.relu.default": "relu",
    "aten.silu.default": "silu",
    "aten.sigmoid.default": "sigmoid",
    "aten.tanh.default": "tanh",
}


_LARGEST_CONSTANT = 1 << 22


def canonicalise(raiser: Raiser) -> None:
    """Fold constants, remove no-ops, rename ATen ops that an op of the IR stands for."""
    _fold_constants(raiser)
    function = raiser.function
    for node in list(function.nodes):
        if not is_aten(node.op):
            continue
        same = _no_op(raiser, node)
        if same is not None:
            function.replace(node.output, same)
            continue
        with contextlib.suppress(NotRaisedError):
            _rename(raiser, node)
    raiser.sweep()


def _fold_constants(raiser: Raiser) -> None:
    """Compute what depends on constants alone, such as torch.tensor(...) in a forward."""
    for node in list(raiser.function.nodes):
        constants = [None if v is None else raiser.constant(v) for v in node.inputs]
        kinds = [raiser.types[v] for v in node.outputs]
        if any(c is None for c in constants) or not is_aten(node.op):
            continue
        sized = all(isinstance(size, int) for kind in kinds for size in kind.shape)
        if not sized or len(kinds) != 1 or int(kinds[0].numel) > _LARGEST_CONSTANT:
            continue
        if "rand" in node.op or "empty" in node.op or _mentions_sizes(node):
            continue
        attrs = {**concretize(node.attrs, {}), "target": node.op}
        value = get_op(node.op).reference(constants, attrs)[0]
        name = f"constant.{node.output.name}"
        slot = raiser.add_weight(name, tuple(value.shape), value.dtype)
        raiser.constants[name] = value.contiguous()
        raiser.function.replace(node.output, slot)
    raiser.sweep()


def _mentions_sizes(node: Node) -> bool:
    found: list[Any] = []
    map_leaves([node.attrs["args"], node.attrs.get("kwargs", {})], found.append)
    return any(isinstance(leaf, sympy.Expr) for leaf in found)


def _no_op(raiser: Raiser, node: Node) -> Value | None:
    """Return the operand a node passes on unchanged."""
    name = base(node.op)
    if len(node.outputs) != 1 or not node.inputs or node.inputs[0] is None:
        return None
    first = raiser.arg(node, 0)
    if not isinstance(first, Value):
        return None
    if name in _SAME_IF_TYPE_IS and raiser.types[first] == raiser.types[node.output]:
        if name == "dropout" and raiser.arg(node, 2, "train") not in (False, None):
            return None
        return first if name != "slice" or _full_slice(raiser, node) else None
    if name == "masked_fill" and _never_set(raiser, raiser.arg(node, 1)):
        return first if raiser.types[first] == raiser.types[node.output] else None
    if name in ("clamp", "clamp_max") and _never_above(raiser, node):
        return first if raiser.types[first] == raiser.types[node.output] else None
    if name == "copy":
        # What is overwritten counts for nothing; autograd knows no derivative of a copy.
        new = raiser.arg(node, 1)
        alike = isinstance(new, Value) and raiser.types[new] == raiser.types[node.output]
        return new if alike else None
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(name)
    if neutral is not None:
        other = raiser.arg(node, 1)
        plain = isinstance(other, int | float) and not isinstance(other, bool)
        if plain and other == neutral and raiser.types[first] == raiser.types[node.output]:
            return first
    return None


def _never_set(raiser: Raiser, mask: Any) -> bool:
    """Return whether a mask is of whole numbers from some number on, which none of them reaches.

    Experts leave out rows whose expert is on another device; where there is none, ids that a top-k
    over the experts gives are all below their number.
    """
    made = _moved_from(raiser, mask)
    compared = raiser.made_by(made, "ge", "gt")
    if compared is None:
        return False
    limit = raiser.scalar(raiser.arg(compared, 1))
    largest = _largest(raiser, raiser.arg(compared, 0))
    if limit is None or largest is None:
        return False
    return largest < limit if base(compared.op) == "ge" else largest <= limit


def _never_above(raiser: Raiser, node: Node) -> bool:
    """Return whether a clamp is of ids that stay as they are, as those of experts without others.

    Ids are places, so that they are 0 at least.
    """
    clamp = base(node.op) == "clamp"
    low = raiser.arg(node, 1, "min") if clamp else None
    high = raiser.arg(node, 2, "max") if clamp else raiser.arg(node, 1, "max")
    largest = _largest(raiser, raiser.arg(node, 0))
    if largest is None or not isinstance(low, int | None) or not isinstance(high, int | None):
        return False
    return (low is None or low <= 0) and (high is None or high >= largest)


def _largest(raiser: Raiser, value: Any) -> int | None:
    """Return a number that ids are at most: places of the largest; None where it is unknown."""
    value = _moved_from(raiser, value)
    made = raiser.made_by(value, "sort", "cat", "topk", "max", "argmax")
    if made is None:
        return None
    name = base(made.op)
    if name == "cat" or (name == "sort" and value is made.outputs[0]):
        parts = [_largest(raiser, part) for part in made.inputs]
        return None if None in parts else max(part for part in parts if part is not None)
    if name == "argmax":
        dim = raiser.arg(made, 1, "dim")
    elif name in ("topk", "max") and len(made.outputs) == 2 and value is made.outputs[1]:
        dim = raiser.arg(made, 2 if name == "topk" else 1, "dim", -1)
    else:
        return None
    size = raiser.types[raiser.arg(made, 0)].shape[dim] if isinstance(dim, int) else None
    return size - 1 if isinstance(size, int) else None


def _moved_from(raiser: Raiser, value: Any) -> Any:
    """Return the value whose elements another one has, in whatever places."""
    while (node := raiser.made_by(value, *_MOVING)) is not None:
        value = raiser.arg(node, 0)
    return value


def _full_slice(raiser: Raiser, node: Node) -> bool:
    start = raiser.arg(node, 2, "start", 0)
    return start in (0, None) and raiser.arg(node, 4, "step", 1) == 1


def _rename(raiser: Raiser, node: Node) -> None:
    name, out = base(node.op), node.output if len(node.outputs) == 1 else None
    if out is None:
        return
    if node.op in _UNARY:
        raiser.replace(out, _UNARY[node.op], [raiser.arg(node, 0)])
    elif name == "gelu":
        kind = raiser.arg(node, 1, "approximate", "none")
        raiser.replace(out, "gelu_tanh" if kind == "tanh" else "gelu", [raiser.arg(node, 0)])
    elif name == "embedding":
        weight, ids = raiser.arg(node, 0), raiser.arg(node, 1)
        if isinstance(weight, Value) and raiser.slot(weight) is not None:
            raiser.replace(out, "embedding", [ids, weight], name="x")
    elif name == "layer_norm":
        _layer_norm(raiser, node)
    elif name == "rms_norm":
        shape, weight = raiser.arg(node, 1), raiser.arg(node, 2, "weight")
        eps = raiser.arg(node, 3, "eps") or torch.finfo(torch.float32).eps
        if len(shape) == 1:
            raiser.replace(out, "rms_norm", [raiser.arg(node, 0), weight], {"eps": eps}, "h")
    elif name == "linear":
        operands = [raiser.arg(node, i) for i in range(3)]
        if len(raiser.types[operands[1]].shape) == 2:
            raiser.replace(out, "linear", operands)
    elif name in ("add", "sub", "mul", "div"):
        _arithmetic(raiser, node, name)
    elif name in ("view_as", "reshape_as", "expand_as"):
        _shape_of_another(raiser, node, "expand" if name == "expand_as" else "reshape")
    elif name == "index":
        _table_lookup(raiser, node)
    elif name == "index_select" and raiser.arg(node, 1) == 0:
        _lookup(raiser, node, raiser.arg(node, 0), raiser.arg(node, 2))


def _shape_of_another(raiser: Raiser, node: Node, name: str) -> None:
    """Write the shape that a node takes from an operand as numbers and sizes."""
    kind = raiser.types[node.output]
    attrs = {"args": [In(0), list(kind.shape)], "kwargs": {}, "types": [kind]}
    moved = raiser.function.add(f"aten.{name}.default", [raiser.arg(node, 0)], attrs, before=node)
    raiser.types[moved.output] = kind
    raiser.function.replace(node.output, moved.output)


def _table_lookup(raiser: Raiser, node: Node) -> None:
    """Rows of a table [rows, N] chosen by one index tensor."""
    table, indices = raiser.arg(node, 0), node.attrs["args"][1]
    if len(indices) == 1 and isinstance(indices[0], In):
        _lookup(raiser, node, table, node.inputs[indices[0].index])


def _lookup(raiser: Raiser, node: Node, table: Value, ids: Value | None) -> None:
    if ids is None or raiser.slot(table) is None or len(raiser.types[table].shape) != 2:
        return
    if raiser.types[ids].dtype in (torch.int64, torch.int32) and raiser.constant(ids) is None:
        raiser.replace(node.output, "embedding", [ids, table], name="x")


def _layer_norm(raiser: Raiser, node: Node) -> None:
    shape = raiser.arg(node, 1)
    operands = [raiser.arg(node, 0), raiser.arg(node, 2, "weight"), raiser.arg(node, 3, "bias")]
    if len(shape) == 1:
        eps = raiser.arg(node, 4, "eps", 1e-5)
        raiser.replace(node.output, "layer_norm", operands, {"eps": eps}, "h")


def _arithmetic(raiser: Raiser, node: Node, name: str) -> None:
    """Sums and products of two float tensors, and products with a number."""
    a, b = raiser.arg(node, 0), raiser.arg(node, 1)
    if not isinstance(a, Value) or raiser.types[node.output].dtype != torch.float32:
        return
    if raiser.arg(node, 2, "alpha", 1) != 1 or raiser.arg(node, 2, "rounding_mode") is not None:
        return
    number: Any = raiser.scalar(b)
    if name in ("mul", "div") and number is not None:
        factor = float(number) if name == "mul" else 1.0 / float(number)
        if raiser.types[a].dtype == torch.float32:
            raiser.replace(node.output, "scale", [a], {"factor": factor})
        return
    if name == "mul" and raiser.scalar(a) is not None and isinstance(b, Value):
        if raiser.types[b].dtype == torch.float32:
            raiser.replace(node.output, "scale", [b], {"factor": float(raiser.scalar(a) or 0)})
        return
    if name in ("add", "mul") and isinstance(b, Value):
        kinds = (raiser.types[a].dtype, raiser.types[b].dtype)
        if kinds == (torch.float32, torch.float32):
            raiser.replace(node.output, name, [a, b])
