"""Mixtures of experts as capture leaves them: read from the dataflow, and left with some experts.

transformers sorts tokens by the expert that they are routed to, and multiplies them with the
experts' stacked weights by grouped products: operators that take for every expert where its rows
end. What a family's router does is found between its linear and the choice of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from graphopt.ir.blocks import Block, find_blocks
from graphopt.ir.dataflow import dataflow, region
from graphopt.ir.graph import (
    Call,
    Function,
    Node,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.resize import Resized, resize
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type, dim
from graphopt.ir.weights import Producer, Rows, Transposed

GROUPED_PRODUCTS = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
"""Operators of rows [R, in], a stack [E, in, out], and where each expert's rows end, [E]."""

_SUMS = ("add", "aten.add.Tensor")
_PRODUCTS = ("mul", "aten.mul.Tensor")


@dataclass(frozen=True)
class Groups:
    """How a router chooses among groups of experts first.

    Attributes:
        count: How many there are; experts of a group lie side by side.
        chosen: Of how many a token's experts may be.
        ranked: How many experts' scores make a group's.
    """

    count: int = 1
    chosen: int = 1
    ranked: int = 1


@dataclass(frozen=True)
class Mixture:
    """A feed-forward part of routed experts; what every token runs beside them is no part of it.

    R is the number of tokens times `top_k`: a row for every token and expert that it runs, sorted
    by expert.

    Attributes:
        experts: How many there are.
        top_k: How many a token runs.
        groups: The groups that the router chooses among first.
        router: The linear that gives the router logits, [B, S, experts].
        tokens: What the rows are taken from, [B S, D].
        rows: What the experts read, [R, D].
        expert_of_row: The expert of each row, int64 [R].
        ends: Where the rows of each expert end, int32 [experts].
        first: The grouped products that read `rows`.
        last: The grouped product that gives the experts' outputs.
        outputs: The experts' outputs, [R, D], with their biases.
        weighted: The same times the gates.
    """

    experts: int
    top_k: int
    groups: Groups
    router: Node
    tokens: Value
    rows: Value
    expert_of_row: Value
    ends: Value
    first: tuple[Node, ...]
    last: Node
    outputs: Value
    weighted: Value

    @property
    def token_of_row(self) -> Value:
        """The token of each row, int64 [R]."""
        assert self.rows.node is not None
        value = self.rows.node.operand(1)
        assert value is not None
        return value

    @property
    def gates(self) -> Value:
        """The gate of each row, [R, 1]."""
        assert self.weighted.node is not None
        values = [v for v in self.weighted.node.inputs if v is not None and v is not self.outputs]
        return values[0]

    @property
    def hidden(self) -> Value:
        """What the last product reads, one feature a neuron: [R, N]."""
        value = self.last.inputs[0]
        assert value is not None
        return value


def find_mixtures(program: Program) -> list[tuple[Block, Mixture | str]]:
    """Return the blocks that have a mixture of experts, with the mixture or why it is not read."""
    kinds, _ = infer_program(program)
    known: dict[tuple[str, int], Mixture | str | None] = {}
    found: list[tuple[Block, Mixture | str]] = []
    for block in find_blocks(program):
        call, types = program.calls[block.position], kinds[block.position]
        # Layers that are alike share their types too.
        key = call.function, id(types)
        if key not in known:
            known[key] = read_mixture(program.functions[call.function], call, types)
        mixture = known[key]
        if mixture is not None:
            found.append((block, mixture))
    return found


def read_mixture(
    function: Function, call: Call, types: Mapping[Value, Type]
) -> Mixture | str | None:
    """Return a function's mixture of experts, why it is not read, or None where there is none.

    Args:
        types: Types of the function's values, as the call uses it.
    """
    products = [node for node in function.nodes if node.op in GROUPED_PRODUCTS]
    if not products:
        return _other_mixture(function, types)
    *first, last = products
    rows, ends = first[0].inputs[0] if first else None, last.inputs[2]
    if rows is None or ends is None or any(node.inputs[0] is not rows for node in first):
        return "it has several mixtures of experts"
    experts = int(types[last.inputs[1]].shape[0])  # type: ignore[index]
    chain = region(function, [ends])
    routers = [
        node for node in chain if node.op == "linear" and types[node.output].shape[-1] == experts
    ]
    sorts = [node for node in chain if node.op.startswith("aten.sort.")]
    taking = rows.node
    tokens = None if taking is None or taking.operand(1) is None else taking.inputs[0]
    if not routers or not sorts or tokens is None:
        missing = "a router with a row an expert" if not routers else "tokens sorted by expert"
        return f"its experts are not reached by {missing}"
    weighted = _weighted(function, last.outputs[0])
    if weighted is None:
        return "the outputs of its experts are not multiplied by gates"
    outputs = next(
        value
        for value in weighted.inputs
        if value is not None and types[value].shape == types[weighted.outputs[0]].shape
    )
    top_k = dim(sympy.sympify(types[rows].shape[0]) / types[tokens].shape[0])
    return Mixture(
        experts, int(top_k), _groups(chain, routers[-1], experts, types, call),
        routers[-1], tokens, rows, sorts[-1].outputs[0], ends, tuple(first), last, outputs,
        weighted.outputs[0],
    )  # fmt: skip


def has_experts(function: Function) -> bool:
    """Return whether experts are run in a function on the tokens that are sent to them."""
    return any(node.op in ("experts", *GROUPED_PRODUCTS) for node in function.nodes)


def _other_mixture(function: Function, types: Mapping[Value, Type]) -> str | None:
    if any(node.op == "experts" for node in function.nodes):
        return "it was carved out of a dense part"
    for node in function.nodes:
        if node.op == "aten.bmm.default" and node.inputs[1] in function.weights.values():
            chosen = [n for n in region(function, [node.output]) if n.op.startswith("aten.topk.")]
            if chosen:
                return "every expert computes every token, and gates choose afterwards"
    return None


def _count(node: Node, call: Call) -> int:
    """Return how many entries a top-k takes."""
    attrs = resolve_attrs(node, call)
    return int(attrs["args"][1] if len(attrs["args"]) > 1 else attrs["kwargs"]["k"])


def _weighted(function: Function, value: Value) -> Node | None:
    """Return the product with the gates behind the experts' last product."""
    uses = function.uses()
    while len(uses[value]) == 1:
        ((node, _),) = uses[value]
        if node.op in _PRODUCTS:
            return node
        if node.op not in _SUMS and not node.op.startswith("aten.to."):
            return None
        value = node.outputs[0]
    return None


def _groups(
    chain: Sequence[Node], router: Node, experts: int, types: Mapping[Value, Type], call: Call
) -> Groups:
    """Return the groups that a router's scores are divided into on the way to the choice."""
    behind = chain[chain.index(router) + 1 :]
    for node in behind:
        made = types[node.outputs[0]].shape
        if len(made) < 3 or not isinstance(made[-2], int) or made[-2] * made[-1] != experts:
            continue
        count, size = int(made[-2]), int(made[-1])
        if count == 1 or all(v is None or types[v].shape[-1] != experts for v in node.inputs):
            continue
        tops = [
            (types[node.inputs[0]].shape, _count(node, call))  # type: ignore[index]
            for node in behind
            if node.op.startswith("aten.topk.")
        ]
        ranked = [k for shape, k in tops if len(shape) > 2 and shape[-2:] == (count, size)]
        chosen = [k for shape, k in tops[:-1] if shape[-1] == count and len(shape) == 2]
        return Groups(count, chosen[0] if chosen else count, ranked[0] if ranked else 1)
    return Groups()


def least_experts(mixture: Mixture) -> int:
    """Return how few experts a mixture can have: as many as tokens run, the same in each group."""
    groups = mixture.groups
    size = max(groups.ranked, -(-mixture.top_k // groups.chosen))
    return size * groups.count


def stack_of(function: Function, product: Node) -> tuple[str, bool]:
    """Return the slot of the stacked weights of a grouped product.

    Returns:
        The slot, and whether they are transposed for the product: [E, out, in].

    Raises:
        ValueError: They are made of something else.
    """
    slots, value, transposed = function.slots_by_value(), product.inputs[1], False
    while value is not None and value not in slots:
        node = value.node
        if node is None or node.op != "aten.transpose.int":
            raise ValueError(f"{value.name} is no stack of experts' weights")
        value, transposed = node.inputs[0], not transposed
    assert value is not None
    return slots[value], transposed


def tables_of(function: Function, mixture: Mixture, types: Mapping[Value, Type]) -> dict[str, int]:
    """Return the tables of biases that are looked up by a row's expert: [experts, columns].

    Returns:
        For each slot which of the products, `mixture.first` and then the last, it is added to.

    Raises:
        ValueError: A table is no bias of the experts, or is looked up by something else.
    """
    slots, uses = function.slots_by_value(), function.uses()
    products = [node.outputs[0] for node in (*mixture.first, mixture.last)]
    found: dict[str, int] = {}
    for node, _ in uses[mixture.expert_of_row]:
        for value in node.inputs:
            if value not in slots or types[value].shape[0] != mixture.experts:
                continue
            beside = {other for user, _ in uses[node.outputs[0]] for other in user.inputs}
            places = [place for place, product in enumerate(products) if product in beside]
            if len(places) != 1:
                raise ValueError(f"{slots[value]} is looked up by expert, and is no bias of theirs")
            found[slots[value]] = places[0]
    _refuse_other_tables(function, mixture, types, found)
    return found


_LOOKUPS = ("embedding", "aten.index.Tensor", "aten.index_select.default", "aten.gather.default")


def _refuse_other_tables(
    function: Function, mixture: Mixture, types: Mapping[Value, Type], known: Mapping[str, int]
) -> None:
    """Refuse rows of experts that are looked up by what was made of their ids.

    Raises:
        ValueError: There are some: which of them belong to an expert that is left is not known.
    """
    slots = function.slots_by_value()
    for node in function.nodes:
        if node.op not in _LOOKUPS:
            continue
        for value in node.inputs:
            slot = None if value is None else slots.get(value)
            if slot is None or slot in known or value is None:
                continue
            if types[value].shape[:1] == (mixture.experts,):
                raise ValueError(
                    f"{slot} has a row an expert, and {node.outputs[0].name} looks them up by "
                    "more than the expert of a row"
                )


def own_slots(function: Function, mixture: Mixture, types: Mapping[Value, Type]) -> list[str]:
    """Return the slots of what is an expert's own: all weights of a mixture but its router's."""
    stacks = [stack_of(function, product)[0] for product in (*mixture.first, mixture.last)]
    return [*stacks, *tables_of(function, mixture, types)]


def with_experts_left(
    function: Function, call: Call, types: Mapping[Value, Type], mixture: Mixture, left: int,
    name: str,
) -> Resized:  # fmt: skip
    """Return a copy of a function whose mixture has `left` experts.

    Raises:
        ValueError: The function computes with the number of experts in a way that is not known.
    """
    slots = function.slots_by_value()
    router = mixture.router.inputs[1]
    if router not in slots:
        raise ValueError("its router's matrix is no weight")
    own = own_slots(function, mixture, types)
    weights = {slot: {0: left} for slot in (slots[router], *own)}
    graph = dataflow(function)
    chosen = set(region(function, [mixture.ends, mixture.weighted]))
    behind: set[Node] = set()
    for node in function.nodes:
        if node is mixture.router or any(above in behind for above in graph.predecessors(node)):
            behind.add(node)
    counting = {
        node for node in behind & chosen if node.op in ("aten.histc.default", "aten.expand.default")
    }
    return resize(function, call, types, weights, name, counting)


def check_experts_left(program: Program, block: Block, left: int) -> None:
    """Refuse to leave a block's mixture with `left` experts, reading no weight.

    Raises:
        ValueError: As `with_experts_left`, or the block has no mixture that is read.
    """
    call, types = program.calls[block.position], infer_program(program)[0][block.position]
    function = program.functions[call.function]
    mixture = _read(function, call, types)
    with_experts_left(function, call, types, mixture, left, function.name)


def _read(function: Function, call: Call, types: Mapping[Value, Type]) -> Mixture:
    mixture = read_mixture(function, call, types)
    if not isinstance(mixture, Mixture):
        raise ValueError(mixture or "it has no mixture of experts")
    return mixture


def keep_experts(program: Program, kept: Mapping[int, Sequence[int]]) -> None:
    """Leave blocks with some of their experts, in place; the router knows the others no more.

    No weight is read: those of what is left are rows of those that are there.

    Args:
        kept: For the indices of blocks, among `find_blocks`, their experts, ascending.

    Raises:
        ValueError: A block has no mixture that is read, or computes with the number of its experts
            in a way that is not known.
    """
    kinds, _ = infer_program(program)
    blocks = find_blocks(program)
    made: dict[tuple[str, int], Resized] = {}
    for index, experts in kept.items():
        position = blocks[index].position
        call = program.calls[position]
        function = program.functions[call.function]
        key = (function.name, len(experts))
        if key not in made:
            mixture = _read(function, call, kinds[position])
            name = unique_name(f"{function.name}_{len(experts)}_experts", set(program.functions))
            made[key] = with_experts_left(
                function, call, kinds[position], mixture, len(experts), name
            )
            program.functions[name] = made[key].function
        _retarget(program, call, made[key], tuple(experts))
    program.prune_unused()


def _retarget(program: Program, call: Call, resized: Resized, kept: tuple[int, ...]) -> None:
    for slot, sizes in resized.weights.items():
        ((axis, _),) = sizes.items()
        producer = program.weights[call.weights[slot]].producer
        put_producer(program, call, slot, _entries(producer, axis, kept))
    call.function = resized.function.name
    call.attrs = {**call.attrs, **resized.attrs}


def put_producer(program: Program, call: Call, slot: str, producer: Producer) -> None:
    """Give the weight in a call's slot another value, in place, and no other call's."""
    weight = program.weights[call.weights[slot]].with_producer(producer)
    readers = [name for other in program.calls for name in other.weights.values()]
    if readers.count(weight.name) == 1:
        program.weights.replace(weight)
        return
    # Layers may share a weight, such as a bias that is 0 in all.
    name = unique_name(weight.name, {other.name for other in program.weights})
    call.weights[slot] = program.weights.add(replace(weight, name=name)).name


def _entries(producer: Producer, axis: int, kept: tuple[int, ...]) -> Producer:
    """Return what is at some places of the first or second axis."""
    if axis > 1:
        raise ValueError(f"experts lie along axis {axis} of a weight")
    if axis == 0:
        return Rows(producer, kept)
    return Transposed(Rows(Transposed(producer), kept))
