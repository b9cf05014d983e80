"""A function's dataflow as a networkx graph, for questions that follow its edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx

from graphopt.ir.graph import Function, Node, Program, Value
from graphopt.ir.ops.attention import ATTENTIONS, MASK


def dataflow(function: Function, boundary: Iterable[Value] = ()) -> networkx.DiGraph[Node]:
    """Return the graph of a function's nodes: an edge runs from a node to those that read it.

    Args:
        boundary: Values over which no edge runs.
    """
    cut = set(boundary)
    graph: networkx.DiGraph[Node] = networkx.DiGraph()
    graph.add_nodes_from(function.nodes)
    for node in function.nodes:
        for value in node.inputs:
            if value is not None and value.node is not None and value not in cut:
                graph.add_edge(value.node, node)
    return graph


def region(
    function: Function, targets: Sequence[Value], boundary: Iterable[Value] = ()
) -> list[Node]:
    """Return the nodes that compute `targets` from `boundary`, in the function's order."""
    cut = set(boundary)
    ends = {value.node for value in targets if value.node is not None and value not in cut}
    graph = dataflow(function, cut)
    found = ends.union(*(networkx.ancestors(graph, node) for node in ends))
    return [node for node in function.nodes if node in found]


def used_ops(program: Program) -> frozenset[str]:
    """Return the names of the ops in functions that some call runs."""
    called = {call.function for call in program.calls}
    return frozenset(node.op for name in called for node in program.functions[name].nodes)


def mask_is_for_attention_alone(program: Program) -> bool:
    """Return whether the padding mask is read by attentions and by nothing else.

    Then a model without padding needs no mask at all.
    """
    for call in program.calls:
        function = program.functions[call.function]
        uses = function.uses()
        for param, name in zip(function.params, call.args, strict=True):
            if name == "attention_mask":
                if param in function.results:
                    return False
                if any(node.op not in ATTENTIONS or index != MASK for node, index in uses[param]):
                    return False
    return True


_ANGLES = ("rope_table", "axial_rope_table", "by_length", "ntk_frequencies")


def angle_weights(program: Program) -> set[str]:
    """Return the weights that turn positions into angles, which 16 bits do not hold.

    A relative error of 2^-9 is a whole radian at position 512.
    """
    found: set[str] = set()
    for call in program.calls:
        function = program.functions[call.function]
        read = {v for node in function.nodes if node.op in _ANGLES for v in node.inputs}
        found |= {call.weights[slot] for slot, value in function.weights.items() if value in read}
    return found
