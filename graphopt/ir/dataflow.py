"""A function's dataflow as a networkx graph, for questions that follow its edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx

from graphopt.ir.graph import Function, Node, Value


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
