"""The rewriting kit: the driver, dead code and repeated code, on functions of a few nodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.dead_code import dead_nodes, remove_dead, remove_newly_dead
from graphopt.ir.graph import Call, Function, Param, Value
from graphopt.rewrite import (
    VARIES,
    Match,
    NoMatch,
    Site,
    apply_rules,
    merge_equal_nodes,
    rule,
    uniform_attribute,
)


@rule("relu")
def drop_repeated_relu(site: Site) -> Match | NoMatch:
    """relu(relu(x)) -> relu(x)."""
    inner = site.maker(0, "relu")
    if inner is None:
        return site.no("its operand is no relu")
    return site.forward(inner.output)


@rule()
def abs_is_relu(site: Site) -> Match | NoMatch:
    """abs(x) -> relu(x), for the test."""
    if site.node.op != "abs":
        return site.no("it is no abs")
    return site.change("relu", site.node.inputs)


def chain(*ops: str) -> Function:
    function = Function("f", [Value("x")])
    value = function.params[0]
    for op in ops:
        value = function.add(op, [value]).output
    function.results = [value]
    return function


def ops(function: Function) -> list[str]:
    return [node.op for node in function.nodes]


def test_rules_apply_until_none_does_and_what_they_leave_unread_goes():
    function = chain("relu", "abs", "relu", "tanh", "relu")
    result = apply_rules(function, [drop_repeated_relu, abs_is_relu])
    assert ops(function) == ["relu", "tanh", "relu"]
    assert result.counts == {"drop_repeated_relu": 2, "abs_is_relu": 1} and result.total == 3


def test_a_refusal_names_the_rule_the_reason_and_the_node():
    function = chain("relu", "tanh")
    result = apply_rules(function, [drop_repeated_relu, abs_is_relu])
    assert result.counts == {}
    assert [(name, no.reason, no.node) for name, no in result.refused] == [
        ("drop_repeated_relu", "its operand is no relu", function.nodes[0]),
        ("abs_is_relu", "it is no abs", function.nodes[0]),
        ("abs_is_relu", "it is no abs", function.nodes[1]),
    ]


def test_what_was_dead_before_is_neither_rewritten_nor_removed():
    function = chain("relu", "tanh")
    function.add("abs", [function.params[0]])
    apply_rules(function, [abs_is_relu])
    assert ops(function) == ["relu", "tanh", "abs"]
    assert dead_nodes(function) == [function.nodes[2]]
    assert remove_newly_dead(function, dead_nodes(function)) == 0
    assert remove_dead(function) == 1 and ops(function) == ["relu", "tanh"]


def test_dead_weight_slots_go_with_the_nodes_that_read_them():
    function = chain("relu")
    function.weights = {"a": Value("a"), "b": Value("b")}
    function.add("linear", [function.params[0], function.weights["a"]])
    function.results.append(function.weights["b"])
    assert remove_dead(function) == 1 and set(function.weights) == {"b"}


def test_joined_nodes_keep_the_values_that_others_read():
    @rule("relu")
    def pair(site: Site) -> Match | NoMatch:
        other = next((n for n in site.function.nodes if n.op == "tanh"), None)
        if other is None:
            return site.no("there is no tanh")
        nodes = [site.node, other]
        return site.join(nodes, "add_rms_norm", [site.operand(0)], {"eps": 0.1}, before=other)

    function = chain("relu", "abs")
    tanh = function.add("tanh", [function.params[0]], before=function.nodes[0])
    function.results.append(tanh.output)
    made = list(function.results)
    apply_rules(function, [pair])
    assert ops(function) == ["add_rms_norm", "abs"] and function.results == made
    (joined, _) = function.nodes
    assert [v.name for v in joined.outputs] == ["relu", "tanh"]
    assert all(v.node is joined and v.index == i for i, v in enumerate(joined.outputs))


def test_equal_nodes_are_merged_once_and_random_ones_never():
    function = chain("relu")
    x = function.params[0]
    y = function.add("relu", [x]).output
    left, right = function.add("add", [x, y]), function.add("add", [y, x])
    drawn = [
        function.add("aten.bernoulli.default", [x], {"args": [], "types": []}) for _ in range(2)
    ]
    function.results += [left.output, right.output, *(node.output for node in drawn)]
    assert merge_equal_nodes(function) == 2
    assert ops(function) == ["relu", "add", *["aten.bernoulli.default"] * 2]
    assert function.results[1] is function.results[2] is left.output


def test_attributes_are_equal_with_their_defaults_filled_in():
    function = chain("relu")
    x = function.params[0]
    for attrs in ({"eps": 0.1}, {"eps": 0.1, "offset": 0.0}, {"eps": 0.1, "offset": 1.0}):
        function.results.append(function.add("rms_norm", [x], attrs).output)
    assert merge_equal_nodes(function) == 1
    assert function.results[1] is function.results[2] is not function.results[3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2, 2], 2), ([2, 3], VARIES), ([], VARIES)],
    ids=["equal", "several", "none"],
)
def test_an_attribute_of_the_calls(values, expected):
    node = chain("relu").nodes[0]
    node.op, node.attrs = "softcap", {"cap": Param("cap")}
    calls = [Call("f", [], [], attrs={"cap": value}) for value in values]
    assert uniform_attribute(node, "cap", calls) is expected or expected == 2


OPS = {"relu": torch.relu, "abs": torch.abs, "tanh": torch.tanh}


PLACE = st.integers(0, 99)
STEP = st.tuples(st.sampled_from([*OPS, "add"]), PLACE, PLACE)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=1, max_size=9), st.lists(PLACE, min_size=1, max_size=3))
def test_no_clean_up_changes_a_result(steps, read):
    """Random graphs, computed before and after dead code, repeated code and a rule are removed."""
    function = Function("f", [Value("x"), Value("y")])
    made = list(function.params)
    for op, first, second in steps:
        operands = [made[first % len(made)]]
        if op == "add":
            operands.append(made[second % len(made)])
        made.append(function.add(op, operands).output)
    function.results = [made[index % len(made)] for index in read]

    def compute():
        values = dict(zip(function.params, torch.randn(2, 5, generator=seeded()), strict=True))
        for node in function.nodes:
            operands = [values[v] for v in node.inputs]
            values[node.output] = sum(operands) if node.op == "add" else OPS[node.op](*operands)
        return [values[v] for v in function.results]

    def seeded():
        return torch.Generator().manual_seed(0)

    before = compute()
    merge_equal_nodes(function)
    apply_rules(function, [drop_repeated_relu])
    remove_dead(function)
    assert all(torch.equal(a, b) for a, b in zip(before, compute(), strict=True))
    assert dead_nodes(function) == [] and merge_equal_nodes(function) == 0
