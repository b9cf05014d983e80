"""Operators that draw random numbers are never taken for one another; all others may be."""

from __future__ import annotations

import pytest

from graphopt.ir import Function
from graphopt.ir.graph import Value
from graphopt.ir.ops.aten import In, is_random

ATTENTION = "aten.scaled_dot_product_attention.default"


@pytest.mark.parametrize(
    ("op", "attrs", "random"),
    [
        (ATTENTION, {"args": [In(0), In(1), In(2)]}, False),
        (ATTENTION, {"args": [In(0), In(1), In(2), None, 0.0, True]}, False),
        (ATTENTION, {"args": [In(0), In(1), In(2)], "kwargs": {"dropout_p": 0.0}}, False),
        (ATTENTION, {"args": [In(0), In(1), In(2), None, 0.1]}, True),
        (ATTENTION, {"args": [In(0), In(1), In(2)], "kwargs": {"dropout_p": 0.5}}, True),
        ("aten.bernoulli.default", {"args": [In(0)]}, True),
        ("aten.softmax.int", {"args": [In(0), -1]}, False),
        ("linear", {}, False),
    ],
)
def test_what_draws_random_numbers(op, attrs, random):
    values = [Value(name) for name in "qkv"]
    function = Function("f", values)
    function.add(op, values, attrs)
    assert is_random(function.nodes[0]) == random
