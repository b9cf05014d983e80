"""Following the edges of a function."""

from __future__ import annotations

import networkx
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.ir import Function, Value
from graphopt.ir.dataflow import dataflow, region


def diamond():
    """a = tanh(x); b = a * w; c = exp(a); y = b + c; z = tanh(x), which y does not read."""
    f = Function("f", params=[Value("x")], weights={"w": Value("w")})
    (x,) = f.params
    a = f.add("tanh", [x], names=["a"]).output
    b = f.add("mul", [a, f.weights["w"]], names=["b"]).output
    c = f.add("aten.exp.default", [a], names=["c"]).output
    y = f.add("add", [b, c], names=["y"]).output
    z = f.add("tanh", [x], names=["z"]).output
    f.results = [y, z]
    return f, {value.name: value for value in (x, a, b, c, y, z)}


def names(nodes):
    return [node.output.name for node in nodes]


def test_region_ends_at_the_boundary():
    f, v = diamond()
    assert names(region(f, [v["y"]])) == ["a", "b", "c", "y"]
    assert names(region(f, [v["y"]], [v["a"]])) == ["b", "c", "y"]
    assert names(region(f, [v["y"], v["z"]], [v["b"]])) == ["a", "c", "y", "z"]
    assert names(region(f, [v["b"]], [v["b"]])) == []
    assert region(f, [v["x"], f.weights["w"]]) == []


def test_a_node_of_several_outputs_is_cut_at_one_of_them():
    f = Function("f", params=[Value("positions")])
    table = f.add("rope_table", [f.params[0], None], names=["cos", "sin"], outputs=2)
    y = f.add("add", table.outputs, names=["y"]).output
    assert region(f, [y], [table.outputs[0]]) == f.nodes
    assert region(f, [y], table.outputs) == [f.nodes[-1]]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12))
def test_region_is_what_a_walk_from_the_target_meets(picks):
    f = Function("f", params=[Value("x")])
    values = [f.params[0]]
    for left, right in picks:
        operands = [values[left % len(values)], values[right % len(values)]]
        values.append(f.add("add", operands).output)
    target, cut = values[-1], values[len(values) // 2 : -1][:1]
    met, waiting = set(), [target]
    while waiting:
        value = waiting.pop()
        if value.node is not None and value not in cut:
            met.add(value.node)
            waiting.extend(value.node.inputs)
    assert region(f, [target], cut) == [node for node in f.nodes if node in met]


def test_the_order_of_a_function_is_one_of_its_dataflow():
    for function in tiny_program(cache=True).functions.values():
        graph, place = dataflow(function), {node: i for i, node in enumerate(function.nodes)}
        assert networkx.is_directed_acyclic_graph(graph)
        assert all(place[made] < place[read] for made, read in graph.edges)
