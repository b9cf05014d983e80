"""Operators that PyTorch has under several names, under the one that capture's rules know."""

from __future__ import annotations

_EQUIVALENTS = {
    # A view's strides are the tracer's business: the IR knows shapes alone.
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    # Memory that nothing was written to is what another computation left there.
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
    "aten.swapaxes.default": "aten.transpose.int",
    "aten.swapdims.default": "aten.transpose.int",
    "aten.special_softmax.default": "aten.softmax.int",
    "aten.special_log_softmax.default": "aten.log_softmax.int",
}

_ALIASES = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh",
    "arctan": "atan", "arctanh": "atanh", "clip": "clamp", "concat": "cat", "concatenate": "cat",
    "divide": "div", "true_divide": "div", "fix": "trunc", "greater": "gt",
    "greater_equal": "ge", "less": "lt", "less_equal": "le", "moveaxis": "movedim",
    "multiply": "mul", "negative": "neg", "not_equal": "ne", "subtract": "sub", "ger": "outer",
    "special_erf": "erf", "special_erfc": "erfc", "special_exp2": "exp2",
    "special_expit": "sigmoid", "special_expm1": "expm1", "special_log1p": "log1p",
    "special_logsumexp": "logsumexp",
}  # fmt: skip
"""Names whose overloads have the names and arguments of the other's."""


def plain_name(name: str) -> str:
    """Return the name of an operator, `namespace.name.overload`, that means the same."""
    namespace, op, overload = name.split(".")
    if namespace == "aten" and op in _ALIASES:
        return f"aten.{_ALIASES[op]}.{overload}"
    return _EQUIVALENTS.get(name, name)
