"""Folding kernel sources: what goes, what stays, and that the rest computes the same."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.lowering.triton.specialise import specialise


def folded(text, *plans, kernel="kernel"):
    """A module `only` with one kernel, folded, without its head."""
    made = specialise({"only": text}, {kernel: [("a plan", plan) for plan in plans]})["only"]
    head, body = [], made.splitlines(keepends=True)
    while body[0].startswith("#"):
        head.append(body.pop(0))
    assert "a plan" in "".join(head)
    return "".join(body)


# What each function does hangs on its constants; run as plain Python.
BRANCHES = '''
def kernel(x, unread, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Numbers told apart by the way to them."""
    # Goes with the branch.
    if A == 0 and C:
        x = x * 3 + unread
    elif A > 1:
        # Of a large A.
        if not B:
            x = x * 5
        else:
            x = x * 7 + C
        x += 1
    else:
        x = helper(x, A, B)

    if B or x > 100:
        x += 11
    if x > 3:
        x += 13
    elif A:
        x += 17
    y = 0 if (A or B) else x
    z = (
        x + 2 * y
    )
    return helper(z, A + 1, C)


def helper(x, A: tl.constexpr, B: tl.constexpr):
    if A > 2:
        x += 19
    if B and x > 0:
        x += 23
    return other(x, B) if A % 2 else x - 1


def other(x, B: tl.constexpr):
    for step in range(2 if B else 1):
        x += step * 29
    return x
'''
VALUES = st.fixed_dictionaries(
    {"A": st.integers(0, 3), "B": st.booleans(), "C": st.sampled_from([0, 1, 5])}
)


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=3), st.integers(-5, 200))
def test_what_is_left_computes_the_same(plans, x):
    text = folded(BRANCHES, *plans)
    assert text == folded(BRANCHES, *plans)
    before, after = {"tl": SimpleNamespace(constexpr=int)}, {"tl": SimpleNamespace(constexpr=int)}
    exec(BRANCHES, before)
    exec(text, after)
    for plan in plans:
        given = {"x": x, "unread": 1000, **plan}
        taken = {name: given[name] for name in inspect.signature(after["kernel"]).parameters}
        assert after["kernel"](**taken) == before["kernel"](**given)
    if all(plan == plans[0] for plan in plans):
        assert ("unread" in text) == (plan["A"] == 0 and bool(plan["C"]))


def test_text_before_and_after():
    text = '''"""A kernel."""

import triton.language as tl

WIDE: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["n", "m"])
def kernel(
    x_ptr,  # [n]
    bias_ptr,  # [m]
    n, m,  # sizes
    BIAS: tl.constexpr,
    PAGE: tl.constexpr,  # of a cache
    BLOCK: tl.constexpr,
):  # fmt: skip
    width = m
    # Read ahead.
    if BIAS:
        width = tl.load(bias_ptr) * WIDE

    # Kept: it says what follows.
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if not PAGE:
        # Contiguous.
        x = step(
            x, n, bias_ptr, BIAS
        )
    else:
        x = x // PAGE
    tl.store(x_ptr, x)


@triton.jit
def step(x, n, bias_ptr, BIAS: tl.constexpr):
    if BIAS:
        x += tl.load(bias_ptr)
    return x + n


# Nobody calls it any more.
@triton.jit
def spare(x):
    return x
'''
    plan = {"BIAS": False, "PAGE": 0, "BLOCK": 64}
    made = specialise({"only": text}, {"kernel": [("plain", plan), ("large", plan)]})
    assert (
        made["only"]
        == '''# kernel: for the model's plans
#   plain
#   large
#   In kernel fixed, since the same in all: BIAS=False, PAGE=0
"""A kernel."""

import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def kernel(
    x_ptr,  # [n]
    n,  # sizes
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Kept: it says what follows.
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    # Contiguous.
    x = step(x, n)
    tl.store(x_ptr, x)


@triton.jit
def step(x, n):
    return x + n
'''
    )


def test_names_go_from_the_other_module_too():
    common = "ONE: int = 1\nTWO: int = 2\n\n\ndef double(x):\n    return x * TWO\n"
    common += "\n\ndef single(x, FLAG: constexpr):\n    return x * ONE\n"
    text = "from .common import double, single\n\n\ndef kernel(x, FLAG: constexpr):\n"
    text += "    if FLAG:\n        return double(x)\n    return single(x, FLAG)\n"
    made = specialise({"common": common, "k": text}, {"kernel": [("p", {"FLAG": False})]})
    assert made["k"].endswith(
        "\nfrom .common import single\n\n\ndef kernel(x):\n    return single(x)\n"
    )
    assert made["common"].endswith("\nONE: int = 1\n\n\ndef single(x):\n    return x * ONE\n")
    # Nothing is left of either where no plan is there.
    assert specialise({"common": common, "k": text}, {"kernel": []}) == {}


@pytest.mark.parametrize(
    "body",
    [
        "    if x: return A\n    return 1\n",  # one line, and not a constant
        "    if A: return x\n    return A\n",  # a constant, on one line
        "    A = x\n    if A:\n        x = 2\n    return A + x\n",  # no constant any more
        "    if len('ab') == A:\n        x = 2\n    return x + A\n",  # a call
        "    if A == 1 == x:\n        x = 2\n    return x + A\n",
        "    if 1 // (A - 1):\n        x = 2\n    return x + A\n",
        "    if x or not A:\n        x = 2\n    return x + A\n",
        '    if A:\n        x = """a\nb"""\n    return x + A\n',  # cannot move to the left
        "    return (x if A else 2) * 3 + A\n",
        "    x[A] = other()\n    return lambda A: A\n",
    ],
)
def test_what_is_not_understood_stays(body):
    text = f"def kernel(x, A: constexpr):\n{body}"
    assert folded(text, {"A": 1}) == text


def test_constants_that_differ_and_functions_that_are_passed_on_stay():
    text = "def kernel(x, A: constexpr):\n    if A:\n        x = 1\n    return x\n"
    assert folded(text, {"A": True}, {"A": False}) == text
    assert folded(text, {"A": True}, {"A": 1}) == text
    assert folded(text, {"A": True}, {}) == text
    text = "def kernel(x, f):\n    return f(x, helper) + helper(x, 0)\n\n\n"
    text += "def helper(x, B: constexpr):\n    if B:\n        x = 1\n    return x\n"
    assert folded(text, {}) == text


def test_modules_it_cannot_tell_apart_are_refused():
    for texts in ({"a": "def f():\n    pass\n", "b": "def f():\n    pass\n"}, {"a": "x = 'é'\n"}):
        with pytest.raises(ValueError, match="ASCII texts and functions of different names"):
            specialise(texts, {})


def test_a_suite_of_which_all_goes_at_once_is_a_pass():
    text = (
        "def kernel(x, n, A: tl.constexpr, B: tl.constexpr):\n"
        "    for i in range(n):\n"
        "        if A:\n"
        "            x += i\n"
        "        # Goes too.\n"
        "        if B:\n"
        "            x -= i\n"
        "    while n:\n"
        "        one = n + 1\n"
        "        two = n + 2\n"
        "    return x\n"
    )
    assert folded(text, {"A": False, "B": 0}) == (
        "def kernel(x, n):\n"
        "    for i in range(n):\n"
        "        pass\n"
        "    while n:\n"
        "        pass\n"
        "    return x\n"
    )


def test_a_branch_that_is_taken_and_has_nothing_left_goes():
    text = (
        "def kernel(x, A: tl.constexpr, B: tl.constexpr):\n"
        "    x += 1\n"
        "    # Goes too.\n"
        "    if A:\n"
        "        if B:\n"
        "            x += 2\n"
        "    return x\n"
    )
    assert folded(text, {"A": True, "B": False}) == (
        "def kernel(x):\n    x += 1\n    return x\n"
    )  # fmt: skip
