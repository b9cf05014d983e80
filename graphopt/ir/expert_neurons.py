"""The neurons of the experts of a mixture: where they lie, leaving some, and masks over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.ir.blocks import find_blocks
from graphopt.ir.dataflow import region
from graphopt.ir.functional import ACTIVATIONS
from graphopt.ir.graph import Call, Function, In, Node, Program, Value, unique_name
from graphopt.ir.mixture import (
    GROUPED_PRODUCTS,
    Mixture,
    put_producer,
    read_mixture,
    stack_of,
    tables_of,
)
from graphopt.ir.ops.aten import map_leaves, resolve_target
from graphopt.ir.resize import Resized, resize
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.ir.weights import Array, Producer, Reshaped, Rows, Transposed, Weight

_COLUMNWISE = frozenset({"add", "mul", "scale", *ACTIVATIONS})
_COLUMNWISE_ATEN = ("add", "sub", "mul", "clamp", "clamp_min", "clamp_max", "to", "pow", "neg")
_SELECTIONS = ("chunk", "slice", "split", "split_with_sizes", "narrow")


def neuron_columns(
    function: Function, products: Sequence[Node], hidden: Value, widths: Sequence[int]
) -> list[Tensor]:
    """Return of which columns of products' results neurons are made.

    Where gate and up projections are one stack, a neuron is two of its columns: they lie in two
    halves, or side by side.

    Args:
        products: Such as `Mixture.first`.
        hidden: One feature a neuron, [R, N], such as `Mixture.hidden`.
        widths: How many columns each product's result has.

    Returns:
        For each product int64 [N, columns of a neuron].

    Raises:
        ValueError: Something else than activations of chosen columns makes the neurons.
    """
    places = {product: place for place, product in enumerate(products)}
    # For every value made of the products' results, of which columns its own are.
    made: dict[Value, list[tuple[int, Tensor]]] = {}
    for node in region(function, [hidden], [product.inputs[0] for product in products]):  # type: ignore[misc]
        if node in places:
            made[node.outputs[0]] = [(places[node], torch.arange(widths[places[node]]))]
            continue
        read = [pair for value in node.inputs if value in made for pair in made[value]]
        if not read:
            continue
        namespace, _, name = node.op.partition(".")
        if namespace == "aten" and name.partition(".")[0] in _SELECTIONS:
            for value, columns in zip(node.outputs, _selected(node, read), strict=True):
                made[value] = columns
        elif node.op in _COLUMNWISE or name.partition(".")[0] in _COLUMNWISE_ATEN:
            once = {(place, tuple(columns.tolist())): columns for place, columns in read}
            made[node.outputs[0]] = [(place, columns) for (place, _), columns in once.items()]
        else:
            raise ValueError(f"{node.outputs[0].name} = {node.op} stands in front of its neurons")
    found = made.get(hidden, [])
    columns_of = [[c for place, c in found if place == number] for number in places.values()]
    if not all(columns_of):
        raise ValueError("its neurons are not made of its first products")
    return [torch.stack(columns, 1) for columns in columns_of]


def _selected(node: Node, read: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Return for each output of a choice of columns of which columns of the products it is."""
    found: list[list[tuple[int, Tensor]]] = [[] for _ in node.outputs]
    for place, columns in read:

        def change(leaf: object, columns: Tensor = columns) -> object:
            return columns[None] if isinstance(leaf, In) else leaf

        args = map_leaves(node.attrs["args"], change)
        result = resolve_target(node.op)(*args, **node.attrs.get("kwargs", {}))
        parts = [result] if isinstance(result, Tensor) else list(result)
        for outputs, part in zip(found, parts, strict=True):
            outputs.append((place, part[0]))
    return found


def columns_of_mixture(
    function: Function, types: Mapping[Value, Type], mixture: Mixture
) -> list[Tensor]:
    """Return `neuron_columns` of a mixture.

    Raises:
        ValueError: As there.
    """
    widths = [int(types[node.outputs[0]].shape[-1]) for node in mixture.first]
    return neuron_columns(function, mixture.first, mixture.hidden, widths)


def neuron_count(types: Mapping[Value, Type], mixture: Mixture) -> int:
    """Return how many neurons each expert of a mixture has."""
    return int(types[mixture.hidden].shape[-1])


def _with_neurons_left(
    function: Function, call: Call, types: Mapping[Value, Type], mixture: Mixture, left: int,
    name: str,
) -> tuple[Resized, list[Tensor]]:  # fmt: skip
    """Return a copy of a function whose experts have `left` neurons, and where their columns lie.

    Raises:
        ValueError: The function computes with the number of neurons in a way that is not known.
    """
    columns = columns_of_mixture(function, types, mixture)
    weights: dict[str, dict[int, int]] = {}
    for product, own in zip(mixture.first, columns, strict=True):
        slot, transposed = stack_of(function, product)
        weights[slot] = {1 if transposed else 2: own.shape[1] * left}
    slot, transposed = stack_of(function, mixture.last)
    weights[slot] = {2 if transposed else 1: left}
    resized = resize(function, call, types, weights, name)
    where = dict(zip(function.nodes, resized.function.nodes, strict=True))
    hidden = where[mixture.last].inputs[0]
    assert hidden is not None
    made = neuron_columns(
        resized.function,
        [where[node] for node in mixture.first],
        hidden,
        [own.shape[1] * left for own in columns],
    )
    return resized, made


def check_neurons_left(
    function: Function, call: Call, types: Mapping[Value, Type], mixture: Mixture, left: int
) -> None:
    """Refuse to leave a mixture's experts with `left` neurons, reading no weight.

    Raises:
        ValueError: Its experts compute in a way that is not known.
    """
    _with_neurons_left(function, call, types, mixture, left, function.name)


def keep_neurons(program: Program, kept: Mapping[int, Sequence[Sequence[int]]]) -> None:
    """Leave the experts of blocks' mixtures with some of their neurons, in place, in an order.

    No weight is read: those of what is left are rows and columns of those that are there.

    Args:
        kept: For the indices of blocks, among `find_blocks`, the neurons of each expert, of all as
            many.

    Raises:
        ValueError: A block has no mixture that is read, or its experts compute in a way that is
            not known.
    """
    kinds, _ = infer_program(program)
    blocks = find_blocks(program)
    made: dict[tuple[str, int], tuple[Resized, list[Tensor]]] = {}
    for index, neurons in kept.items():
        position = blocks[index].position
        call, types = program.calls[position], kinds[position]
        function = program.functions[call.function]
        mixture = read_mixture(function, call, types)
        if not isinstance(mixture, Mixture):
            raise ValueError(mixture or "it has no mixture of experts")
        left = len(neurons[0])
        key = (function.name, left)
        if key not in made:
            name = unique_name(f"{function.name}_{left}_neurons", set(program.functions))
            made[key] = _with_neurons_left(function, call, types, mixture, left, name)
            program.functions[name] = made[key][0].function
        resized, columns_left = made[key]
        columns = columns_of_mixture(function, types, mixture)
        places = [*_chosen_columns(columns, columns_left, neurons), [list(n) for n in neurons]]
        for number, product in enumerate((*mixture.first, mixture.last)):
            slot, transposed = stack_of(function, product)
            axis = 1 if transposed == (product is not mixture.last) else 2
            producer = program.weights[call.weights[slot]].producer
            put_producer(program, call, slot, _columns(producer, axis, places[number]))
        for slot, number in tables_of(function, mixture, types).items():
            if number < len(mixture.first):
                producer = program.weights[call.weights[slot]].producer
                put_producer(program, call, slot, _columns(producer, 1, places[number]))
        call.function = resized.function.name
        call.attrs = {**call.attrs, **resized.attrs}
    program.prune_unused()


def _chosen_columns(
    columns: Sequence[Tensor], left: Sequence[Tensor], neurons: Sequence[Sequence[int]]
) -> list[list[list[int]]]:
    """Return for each product, and each expert, which column comes to each of the places left."""
    found: list[list[list[int]]] = []
    for own, new in zip(columns, left, strict=True):
        of_experts: list[list[int]] = []
        for kept in neurons:
            order = torch.empty(new.numel(), dtype=torch.int64)
            order[new.flatten()] = own[torch.tensor(list(kept))].flatten()
            of_experts.append(order.tolist())
        found.append(of_experts)
    return found


def _columns(producer: Producer, axis: int, places: Sequence[Sequence[int]]) -> Producer:
    """Return for every expert, the first axis, what is at its own places of another axis."""
    experts, *sizes = producer.shape
    size, left = sizes[axis - 1], len(places[0])
    rows = tuple(e * size + place for e, own in enumerate(places) for place in own)
    if axis == 2:
        # The experts' columns side by side, as rows.
        flat = Transposed(Reshaped(Transposed(producer), (sizes[0], experts * size)))
        back = Reshaped(Transposed(Rows(flat, rows)), (sizes[0], experts, left))
        return Transposed(back)
    by_row = Reshaped(producer, (experts * size, *sizes[1:]))
    return Reshaped(Rows(by_row, rows), (experts, left, *sizes[1:]))


def mask_neurons(
    program: Program,
    index: int,
    shared: int,
    active: int,
    router: Tensor,
    bias: Tensor,
) -> None:
    """Let every row of a block's mixture run some neurons of its expert, in place.

    The first `shared` neurons are run by all rows. The others are groups of equal size that lie
    side by side, of which a row runs the `active` ones with the highest logits of its expert's
    own router. The neurons of other groups are computed and put to 0.

    Args:
        index: The block, among `find_blocks`.
        router: [experts, D, groups].
        bias: [experts, groups].
    """
    block = find_blocks(program)[index]
    call = program.calls[block.position]
    types = infer_program(program)[0][block.position]
    given = program.functions[call.function]
    mixture = read_mixture(given, call, types)
    assert isinstance(mixture, Mixture)
    groups, neurons = bias.shape[1], neuron_count(types, mixture)
    name = f"{given.name}_S{shared}A{active}E{groups}"
    if name not in program.functions:
        program.functions[name] = _masked(given, types, mixture, active, groups, name)
    place = torch.arange(neurons)
    owner = (place - shared).div((neurons - shared) // groups, rounding_mode="floor")
    member = (owner[:, None] == torch.arange(groups)).float()
    values = {
        "router.weight": Array(router.float().cpu().contiguous()),
        "router.bias": Array(bias.float().cpu().contiguous()),
        "router.members": Array(member),
        "router.shared": Array((place < shared).float()),
    }
    stem = stack_of(given, mixture.last)[0].rpartition(".")[0]
    for own, producer in values.items():
        slot = f"{stem}.{own}" if stem else own
        weight = f"{call.path}.{slot}" if call.path else slot
        weight = unique_name(weight, {other.name for other in program.weights})
        program.weights.add(Weight(weight, producer, constant=own in _FIXED))
        call.weights[slot] = weight
    call.function = name
    program.prune_unused()


def is_masked(function: Function) -> bool:
    """Return whether a function has a mixture whose experts have routers of their own."""
    return any(
        node.op in GROUPED_PRODUCTS and any(n.op == "top_k_gating" for n in region(function, [v]))
        for node in function.nodes
        for v in node.inputs[:1]
        if v is not None
    )


_FIXED = ("router.members", "router.shared")
"""Weights of a masked mixture that say which neurons are in which group."""


def _masked(
    given: Function, types: Mapping[Value, Type], mixture: Mixture, active: int, groups: int,
    name: str,
) -> Function:  # fmt: skip
    function = given.clone(name)
    values = dict(zip(given.values(), function.values(), strict=True))
    last = function.nodes[given.nodes.index(mixture.last)]
    stem = stack_of(given, mixture.last)[0].rpartition(".")[0]

    def weight(own: str) -> Value:
        slot = f"{stem}.{own}" if stem else own
        function.weights[slot] = Value(slot)
        return function.weights[slot]

    rows = types[mixture.rows]
    attrs = {"args": [In(0), In(1), In(2)], "kwargs": {},
             "types": [Type((rows.shape[0], groups), rows.dtype)]}  # fmt: skip
    read = [values[mixture.rows], weight("router.weight"), values[mixture.ends]]
    logits = function.add(mixture.last.op, read, attrs, ["router_logits"], before=last).output
    table = [values[mixture.expert_of_row], weight("router.bias")]
    bias = function.add("embedding", table, before=last).output
    logits = function.add("add", [logits, bias], before=last).output
    gates = function.add("top_k_gating", [logits], {"top_k": active}, before=last).output
    members = [gates, weight("router.members"), weight("router.shared")]
    mask = function.add("linear", members, names=["mask"], before=last).output
    hidden = last.inputs[0]
    last.inputs[0] = function.add("mul", [hidden, mask], before=last).output
    return function
