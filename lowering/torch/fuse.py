"""Nodes of a function joined where one kernel, or one product, does the work of several.

What they are joined to is for the emitted text alone. Each has a function of
`graphopt.ir.functional` that says what it computes:

1. `add_rms_norm`: a sum and the first RMS norm that reads it.
2. `act_mul`: an activation and the product that alone reads it.
3. `rope_pair`: two rotations by the same tables, where neither hangs on the other.
4. `packed_linear`: products of one tensor with several weights, as one with all of them.
5. `moe`: experts, and the feed-forward part of the same input that their sum is added to.
6. `route`: gates, and the linear that alone gives them their scores.

The sum at the end of a layer and the norm at the start of the next one are in two functions:
`defer_sums` moves the sum to where the norm is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import networkx

from graphopt.ir.feed_forward import read_hidden
from graphopt.ir.functional import ACTIVATIONS
from graphopt.ir.graph import Function, Node, Program, Value
from graphopt.lowering.torch.flow import Flow


def fuse(function: Function, packable: Collection[str]) -> None:
    """Join what can be joined, in place.

    Args:
        packable: Weight slots that may be put into one with others.
    """
    for node in [node for node in function.nodes if node.op == "experts"]:
        _experts(function, node)
    for node in [node for node in function.nodes if node.op == "top_gates"]:
        _route(function, node)
    for node in list(function.nodes):
        if node.op == "mul":
            _gate(function, node)
    for node in list(function.nodes):
        if node.op == "rms_norm":
            _sum(function, node)
    _rotations(function)
    _products(function, packable)


def _swap(function: Function, old: list[Node], new: Node) -> None:
    """Make the outputs of `old` those of `new`, in their order, and delete the nodes."""
    outputs = [value for node in old for value in node.outputs]
    new.outputs = outputs
    for index, value in enumerate(outputs):
        value.node, value.index = new, index
    function.nodes = [node for node in function.nodes if node not in old]


def _given(function: Function, value: Value | None) -> bool:
    """Return whether a value is there from the start: a weight, or none at all."""
    return value is None or value in function.weights.values()


def _gate(function: Function, product: Node) -> None:
    uses, outside = function.uses(), function.outside_values()
    for place in (0, 1):
        made = product.inputs[place]
        if made is None or made.node is None or made in outside or len(uses[made]) != 1:
            continue
        act = made.node
        if act.op not in ACTIVATIONS:
            continue
        operands = [act.inputs[0], product.inputs[1 - place]]
        new = function.add("act_mul", operands, {"act": act.op}, before=product)
        _swap(function, [product], new)
        function.nodes.remove(act)
        return


def _experts(function: Function, routed: Node) -> None:
    """Join experts with what every token runs beside them; the last operands are that part's."""
    uses, outside = function.uses(), function.outside_values()
    operands = [*routed.inputs, *[None] * (7 - len(routed.inputs))]
    total = uses[routed.output][0][0] if len(uses[routed.output]) == 1 else routed
    shared: list[Value | None] = []
    old = routed
    if total.op == "add" and routed.output not in outside:
        other = next((v for v in total.inputs if v is not routed.output), None)
        shared = _shared(function, other, routed)
        old = total if shared else routed
    new = function.add("moe", [*operands, *shared], routed.attrs, before=old)
    _swap(function, [old], new)
    function.remove_dead()


def _route(function: Function, gates: Node) -> None:
    scores = gates.inputs[0]
    made = None if scores is None else scores.node
    if made is None or made.op != "linear" or len(function.uses()[made.output]) > 1:
        return
    if made.output in function.outside_values():
        return
    operands = [*made.inputs, *[None] * (3 - len(made.inputs)), *gates.inputs[1:]]
    new = function.add("route", operands, gates.attrs, before=gates)
    _swap(function, [gates], new)
    function.nodes.remove(made)


def _shared(function: Function, value: Value | None, routed: Node) -> list[Value | None]:
    """Return the weights of a feed-forward part that reads what experts read; [] for none."""
    node = None if value is None else value.node
    if node is None or node.op != "linear" or len(function.uses()[node.output]) > 1:
        return []
    read = read_hidden(node.inputs[0], set(function.weights.values()))
    if read is None or read[0] != routed.attrs["act"]:
        return []
    _, gate, up = read
    if up.inputs[0] is not routed.inputs[0] or (gate is None) != (
        len(routed.inputs) < 5 or routed.inputs[4] is None
    ):
        return []

    def factors(part: Node | None) -> tuple[Value | None, Value | None]:
        given = [] if part is None else part.inputs[1:]
        return (given[0] if given else None, given[1] if len(given) > 1 else None)

    (up_weight, up_bias), (gate_weight, gate_bias), (down, down_bias) = map(
        factors, (up, gate, node)
    )
    return [up_weight, down, gate_weight, up_bias, gate_bias, down_bias]


def _sum(function: Function, norm: Node) -> None:
    x, weight = norm.inputs[0], norm.inputs[1] if len(norm.inputs) > 1 else None
    total = None if x is None else x.node
    if total is None or total.op != "add" or not _given(function, weight):
        return
    # At the sum's place: whatever reads it may stand before the norm.
    new = function.add("add_rms_norm", [*total.inputs, weight], norm.attrs, before=total)
    _swap(function, [total, norm], new)


def _rotations(function: Function) -> None:
    waiting: dict[object, Node] = {}
    for node in [node for node in function.nodes if node.op == "rope"]:
        key = (*node.inputs[1:], *sorted(node.attrs.items()))
        first = waiting.pop(key, None)
        if first is None:
            waiting[key] = node
            continue
        between = function.nodes[function.nodes.index(first) : function.nodes.index(node) + 1]
        if any(first.output in other.inputs for other in between):
            waiting[key] = node
            continue
        operands = [first.inputs[0], *node.inputs]
        new = function.add("rope_pair", operands, node.attrs, before=node)
        _swap(function, [first, node], new)


def _products(function: Function, packable: Collection[str]) -> None:
    slots = {value: slot for slot, value in function.weights.items()}
    uses = function.uses()
    groups: dict[object, list[Node]] = {}
    for node in function.nodes:
        if node.op != "linear":
            continue
        factors = [value for value in node.inputs[1:] if value is not None]
        if all(slots.get(v) in packable and len(uses[v]) == 1 for v in factors):
            groups.setdefault((node.inputs[0], len(factors)), []).append(node)
    for group in groups.values():
        if len(group) > 1:
            # By kind: all weights, then all biases.
            factors = [v for column in zip(*(n.inputs[1:] for n in group), strict=True)
                       for v in column if v is not None]  # fmt: skip
            operands = [group[0].inputs[0], *factors]
            new = function.add("packed_linear", operands, {"parts": len(group)}, before=group[0])
            _swap(function, group, new)


@dataclass
class Deferred:
    """A program whose layers hand on their last sum as its two summands.

    Attributes:
        program: The program; where nothing is deferred, the one given.
        params, results: By function, the old number of every parameter and result; a second
            summand has that of the sum.
    """

    program: Program
    params: dict[str, list[int]] = field(default_factory=dict)
    results: dict[str, list[int]] = field(default_factory=dict)

    def places(self, name: str) -> tuple[list[int], list[int]]:
        """Return the old numbers of a function's parameters and results."""
        function = self.program.functions[name]
        return (
            self.params.get(name, list(range(len(function.params)))),
            self.results.get(name, list(range(len(function.results)))),
        )


def defer_sums(program: Program) -> Deferred:
    """Take every sum that one call makes and the next one norms apart, and add it up there.

    1. Every function that reads such a value takes its RMS norm first.
    2. One of those that make it ends with a sum; another hands on None as the second summand.
    3. Each is read by one call alone, and is no input or output of the program.
    """
    made = Deferred(program.copy())
    edges = _edges(program)
    graph: networkx.Graph[tuple[str, str, int]] = networkx.Graph(edges)
    for part in networkx.connected_components(graph):
        makers = {key for key in part if key[1] == "result"}
        readers = part - makers
        if all(_norms(program, key) for key in readers) and any(
            _sum_of(program.functions[name], index) for name, _, index in makers
        ):
            _defer(made, makers, readers)
    return made


def _edges(program: Program) -> list[tuple[tuple[str, str, int], tuple[str, str, int]]]:
    """Return which results of functions are which parameters of others.

    What else reads or makes one of these is a node without a function, which norms nothing.
    """
    flow = Flow(program)
    other = ("", "param", 0)
    edges: list[tuple[tuple[str, str, int], tuple[str, str, int]]] = []
    for number, call in enumerate(program.calls):
        for index, value in enumerate(flow.args[number]):
            if value.made < 0:
                edges.append((other, (call.function, "param", index)))
        for index, value in enumerate(flow.results[number]):
            key = (call.function, "result", index)
            if not value.uses:
                continue
            reader = value.uses[0]
            if len(value.uses) > 1 or reader == len(program.calls):
                edges.append((key, other))
                continue
            place = flow.args[reader].index(value)
            edges.append((key, (program.calls[reader].function, "param", place)))
    return edges


def _norms(program: Program, key: tuple[str, str, int]) -> bool:
    """Return whether a function takes the norm of a parameter, by a weight of its own."""
    name, _, index = key
    if not name:
        return False
    function = program.functions[name]
    return any(
        node.op == "rms_norm"
        and node.inputs[0] is function.params[index]
        and all(_given(function, weight) for weight in node.inputs[1:])
        for node in function.nodes
    )


def _sum_of(function: Function, index: int) -> Node | None:
    """Return the sum that a result is, if nothing else needs it."""
    value = function.results[index]
    outside = [*function.results, *(v for c in function.caches for v in (c.present_k, c.present_v))]
    if value.node is None or value.node.op != "add":
        return None
    alone = not function.uses()[value] and sum(v is value for v in outside) == 1
    return value.node if alone else None


def _defer(
    made: Deferred, makers: set[tuple[str, str, int]], readers: set[tuple[str, str, int]]
) -> None:
    """Take apart what `makers` make and `readers` read."""
    program = made.program
    for name, _, old in sorted(readers):
        function = program.functions[name]
        numbers = made.params.setdefault(name, list(range(len(function.params))))
        index = numbers.index(old)
        x = function.params[index]
        delta = Value(f"{x.name}_delta")
        total = function.add("add", [x, delta], names=["total"], before=function.nodes[0])
        function.replace(x, total.output)
        total.inputs = [x, delta]
        function.params.insert(index + 1, delta)
        numbers.insert(index + 1, old)
        for call in program.calls:
            if call.function == name:
                call.args.insert(index + 1, f"{call.args[index]}_delta")
    for name, _, old in sorted(makers):
        function = program.functions[name]
        numbers = made.results.setdefault(name, list(range(len(function.results))))
        index = numbers.index(old)
        last = _sum_of(function, index)
        if last is None:
            delta = function.add("none", [], names=["delta"]).output
            function.results.insert(index + 1, delta)
        else:
            function.results[index : index + 1] = [v for v in last.inputs if v is not None]
            function.nodes.remove(last)
        numbers.insert(index + 1, old)
        for call in program.calls:
            if call.function == name:
                call.results.insert(index + 1, f"{call.results[index]}_delta")
