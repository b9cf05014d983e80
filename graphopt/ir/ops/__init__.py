"""The op set. One file a family; importing this package registers them all."""

from graphopt.ir.ops import (
    aten,
    attention,
    collectives,
    elementwise,
    embedding,
    experts,
    fused,
    fused_collectives,
    fused_quantised,
    linear,
    norm,
    pictures,
    policy_attention,
    quantisation,
    rope,
)
from graphopt.ir.ops.base import COMMUTATIVE, Op, all_ops, get_op, is_aten, register

__all__ = [
    "COMMUTATIVE",
    "Op",
    "all_ops",
    "aten",
    "attention",
    "collectives",
    "elementwise",
    "embedding",
    "experts",
    "fused",
    "fused_collectives",
    "fused_quantised",
    "get_op",
    "is_aten",
    "linear",
    "norm",
    "pictures",
    "policy_attention",
    "quantisation",
    "register",
    "rope",
]
