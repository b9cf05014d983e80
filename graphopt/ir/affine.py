"""Putting affine transforms and their inverses into functions, and multiplying them into weights.

A transform x -> x diag(scale) (left kron right) is inserted with its inverse behind it, so that
nothing changes; then the inverse goes into the matrices that read it, and the scale into a norm's
gain or into the rows of a linear. What is left in the graph is left and right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.affine_sites import NORMS, InputSite, KeySite, SiteFinder
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs, unique_name
from graphopt.ir.mixture import put_producer
from graphopt.ir.ops.attention import KEY, QUERY
from graphopt.ir.types import Type
from graphopt.ir.weights import Array, Weight

MARK, INVERSE = ".transform.", "_inverse"
"""What stands in the names of a transform's slots in front of its role, and behind that of what
undoes it."""


@dataclass(frozen=True)
class Factors:
    """What a site is transformed by: x diag(scale) (left kron right).

    Attributes:
        left, right: Square matrices; None for the identity.
        scale: [N]; None for ones.
        values: The map of the features of an attention's values, whose inverse is behind its
            merged heads: x is (left kron 1) of them there, and `right` is None.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    scale: Tensor | None = None
    values: Tensor | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the slots of `insert_transform`, by role, in fp64."""
        given = {"left": self.left, "right": self.right, "scale": self.scale, "values": self.values}
        found = {role: value.double() for role, value in given.items() if value is not None}
        for role, value in list(found.items()):
            inverse = 1 / value if role == "scale" else torch.linalg.inv(value)
            found[f"{role}{INVERSE}"] = inverse
        return found


def insert_transform(function: Function, site: InputSite, roles: Sequence[str]) -> dict[str, str]:
    """Put a transform and its inverse behind a site's value, in place.

    Args:
        roles: Which of `left`, `right`, `scale` and `values` it has; at least one.

    Returns:
        The new weight slots by role; those of the inverse are `left_inverse` and so on.
    """
    slots = {
        f"{role}{end}": _new_slot(function, site.stem, f"{role}{end}")
        for role in roles
        for end in ("", INVERSE)
    }
    given = {role: function.weights[slot] for role, slot in slots.items()}
    entering = [node for node, _ in site.entries]
    first = next(node for node in function.nodes if node in entering)

    def add(op: str, *inputs: Value | None) -> Value:
        operands = list(inputs)
        while operands[-1] is None:
            operands.pop()
        return function.add(op, operands, names=[f"{site.x.name}_t"], before=first).output

    value = site.x
    if "scale" in roles:
        value = add("mul", value, given["scale"])
    if "left" in roles or "right" in roles:
        value = add("kronecker", value, given.get("left"), given.get("right"))
    undone = given.get("left_inverse"), given.get("right_inverse") or given.get("values_inverse")
    if any(undone):
        value = add("kronecker", value, *undone)
    if "scale" in roles:
        value = add("mul", value, given["scale_inverse"])
    for node, operand in site.entries:
        node.inputs[operand] = value
    if "values" in roles:
        assert site.values is not None
        split = site.values.split
        made = function.add(
            "kronecker", [split.inputs[0], None, given["values"]], names=["v_t"], before=split
        )
        split.inputs[0] = made.output
    return slots


def insert_key_transform(function: Function, site: KeySite) -> dict[str, str]:
    """Multiply an attention's keys by a matrix and its queries by the inverse transpose, in place.

    Returns:
        The new weight slots, `keys` and `queries`.
    """
    slots: dict[str, str] = {}
    places = (("queries", QUERY, site.query_stem), ("keys", KEY, site.key_stem))
    for role, place, stem in places:
        slots[role] = _new_slot(function, stem, role)
        value = site.attention.inputs[place]
        factor = function.weights[slots[role]]
        made = function.add(
            "kronecker", [value, None, factor], names=[f"{role}_t"], before=site.attention
        )
        site.attention.inputs[place] = made.output
    return slots


def key_weights(matrix: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the slots of `insert_key_transform`, by role, in fp64."""
    return {"keys": matrix.double(), "queries": torch.linalg.inv(matrix.double()).T}


def add_weights(
    program: Program,
    call: Call,
    slots: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Give a call weights for new slots, named beside those that it has.

    Args:
        slots, tensors: By role.
        dtype: Of the new weights.
    """
    prefix = _prefix(call)
    taken = {weight.name for weight in program.weights}
    for role, slot in slots.items():
        name = unique_name(prefix + slot, taken)
        taken.add(name)
        value = tensors[role].to(dtype).cpu().contiguous()
        program.weights.add(Weight(name, Array(value)))
        call.weights[slot] = name


def _prefix(call: Call) -> str:
    """Return what a call's weights are called in front of their slots."""
    found = [name[: -len(slot)] for slot, name in call.weights.items() if name.endswith(slot)]
    return max(found, key=found.count) if found else f"{call.path}."


def _new_slot(function: Function, stem: str, role: str) -> str:
    # Two attentions may have keys of one projection.
    stem = unique_name(stem, {slot.removesuffix(MARK + role) for slot in function.weights})
    slot = f"{stem}{MARK}{role}"
    name = unique_name(slot.replace(".", "_"), function.value_names())
    function.weights[slot] = Value(name)
    return slot


# Folding


@dataclass
class Folded:
    """What was multiplied into weights.

    Attributes:
        places: Inverses, scales and maps of values that are gone from the graph.
        left: Scales and maps of values that could not be folded, with the reason.
    """

    places: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Chain:
    """The transforms in front of a site's value, in order.

    Attributes:
        forward: The transform.
        undoing: Its inverse.
    """

    forward: tuple[Node, ...]
    undoing: tuple[Node, ...]


def fold_transforms(
    program: Program, function: Function, calls: Sequence[Call], types: Mapping[Value, Type]
) -> Folded:
    """Multiply inverses, scales and maps of values into a function's weights, in place.

    Args:
        calls: All calls of the function.
        types: Types of its values, as the first of them has them.
    """
    folded = Folded()
    finder = SiteFinder(function, calls[0], types)
    chains = [(site, _chain(function, site)) for site in finder.run().inputs]
    for site, chain in chains:
        if not chain.undoing:
            continue
        for call in calls:
            for reader in site.readers:
                _fold_columns(program, function, call, reader.weight, reader.axis, chain.undoing)
        kept = chain.undoing[0].inputs[0]
        for node, operand in site.entries:
            node.inputs[operand] = kept
        folded.places += 1
    remove_dead(function)
    for _, chain in chains:
        if chain.forward and role_of(function, chain.forward[0]) == "scale":
            _fold_scale(program, function, calls, types, chain.forward[0], folded)
    for node in list(function.nodes):
        path = _mapped_values(function, node)
        if path is not None:
            _fold_rows(program, function, calls, path, node)
            folded.places += 1
    remove_dead(function)
    return folded


def role_of(function: Function, node: Node) -> str | None:
    """Return which part of a transform a node computes, by the slots of its factors.

    Returns:
        Such as `left` or `left_inverse`, of the first factor that there is; None where it is no
        part of a transform.
    """
    slots = function.slots_by_value()
    if node.op not in ("kronecker", "mul"):
        return None
    for value in node.inputs[1:]:
        _, inserted, role = slots.get(value, "").rpartition(MARK)  # type: ignore[arg-type]
        if inserted:
            return role
    return None


def unfolded(function: Function) -> str | None:
    """Return the first value that undoes a transform in the graph, or None."""
    roles = ((node, role_of(function, node) or "") for node in function.nodes)
    return next((node.output.name for node, role in roles if role.endswith(INVERSE)), None)


def _chain(function: Function, site: InputSite) -> _Chain:
    """Return the transforms between a site's value and what it was before they were inserted."""
    nodes: list[Node] = []
    value: Value = site.x
    while value.node is not None and (
        value.node.op == "quantise_dequantise" or role_of(function, value.node) is not None
    ):
        nodes.insert(0, value.node)
        first = value.node.inputs[0]
        assert first is not None
        value = first
    inverse = [(role_of(function, node) or "").endswith(INVERSE) for node in nodes]
    cut = inverse.index(True) if True in inverse else len(nodes)
    return _Chain(tuple(nodes[:cut]), tuple(nodes[cut:]))


def _mapped_values(function: Function, node: Node) -> Node | None:
    """Return the linear whose output a node maps head by head on the way to an attention."""
    if role_of(function, node) != "values" or node.inputs[0] is None:
        return None
    made = node.inputs[0].node
    alone = len(function.uses()[node.inputs[0]]) == 1
    return made if made is not None and made.op == "linear" and alone else None


def through(weight: Tensor, axis: int, node: Node, factors: Sequence[Tensor | None]) -> Tensor:
    """Return the weight that reads x as one behind the map reads x times the map.

    Args:
        axis: Of the weight's input features.
        node: A `mul` or a `kronecker`.
        factors: Values of its operands behind x.
    """
    rows = weight.movedim(axis, -1)
    if node.op == "mul":
        assert factors[0] is not None
        rows = rows * factors[0]
    else:
        turned = [None if factor is None else factor.T for factor in factors]
        rows = functional.kronecker(rows, *turned)
    return rows.movedim(-1, axis)


def _load(program: Program, function: Function, call: Call, value: Value) -> Tensor:
    slot = function.slots_by_value()[value]
    return program.weights[call.weights[slot]].load(torch.float64).cpu()


def _put(program: Program, function: Function, call: Call, value: Value, made: Tensor) -> None:
    """Give a call a computed weight, in fp32 at least: 16 bits would round what is exact."""
    slot = function.slots_by_value()[value]
    kept = torch.promote_types(program.weights[call.weights[slot]].dtype, torch.float32)
    put_producer(program, call, slot, Array(made.to(kept).contiguous()))


def _fold_columns(
    program: Program,
    function: Function,
    call: Call,
    weight: Value,
    axis: int,
    undoing: Sequence[Node],
) -> None:
    made = _load(program, function, call, weight)
    for node in reversed(undoing):
        factors = [
            None if value is None else _load(program, function, call, value)
            for value in node.inputs[1:]
        ]
        made = through(made, axis, node, factors)
    _put(program, function, call, weight, made)


def _fold_scale(
    program: Program,
    function: Function,
    calls: Sequence[Call],
    types: Mapping[Value, Type],
    node: Node,
    folded: Folded,
) -> None:
    source, factor = node.inputs[0], node.inputs[1]
    assert source is not None and factor is not None
    home, reason = SiteFinder(function, calls[0], types).scale_home(source, [(node, 0)])
    if home is None:
        folded.left.append((function.slots_by_value()[factor], reason))
        return
    if home.op in NORMS and home.operand(1) is None:
        _add_gain(program, function, calls, home, factor)
    else:
        operands = (1, 2) if home.op in ("layer_norm", "linear") else (1,)
        for call in calls:
            scale = _load(program, function, call, factor)
            offset = resolve_attrs(home, call).get("offset", 0.0)
            for operand in operands:
                value = home.operand(operand)
                if value is None:
                    continue
                given = _load(program, function, call, value)
                rows = scale[:, None] if given.dim() > 1 else scale
                shift = offset if operand == 1 else 0.0
                _put(program, function, call, value, (given + shift) * rows - shift)
    function.replace(node.output, source)
    folded.places += 1
    remove_dead(function)


def _add_gain(
    program: Program, function: Function, calls: Sequence[Call], norm: Node, factor: Value
) -> None:
    """Give a norm that has no gain one, which is the scale."""
    stem, _, _ = function.slots_by_value()[factor].rpartition(MARK)
    slot = _new_slot(function, stem, "gain")
    norm.inputs += [None] * (2 - len(norm.inputs))
    norm.inputs[1] = function.weights[slot]
    bias = norm.operand(2)
    for call in calls:
        scale = _load(program, function, call, factor)
        name = call.weights[function.slots_by_value()[factor]]
        dtype = program.weights[name].dtype
        gain = scale - resolve_attrs(norm, call).get("offset", 0.0)
        add_weights(program, call, {"gain": slot}, {"gain": gain}, dtype)
        if bias is not None:
            _put(program, function, call, bias, _load(program, function, call, bias) * scale)


def _fold_rows(
    program: Program, function: Function, calls: Sequence[Call], linear: Node, node: Node
) -> None:
    """Multiply a map of values into the rows, and the bias, of the linear that makes them."""
    factor = node.inputs[2]
    assert factor is not None
    for call in calls:
        matrix = _load(program, function, call, factor)
        for operand in (1, 2):
            value = linear.operand(operand)
            if value is not None:
                rows = functional.kronecker(
                    _load(program, function, call, value).transpose(0, -1), None, matrix
                )
                _put(program, function, call, value, rows.transpose(0, -1))
    function.replace(node.output, linear.output)
