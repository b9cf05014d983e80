"""The translations of ops into ONNX, one file a family; importing this package registers all."""

from graphopt.lowering.onnx.ops import (
    aten,
    aten_index,
    aten_shape,
    aten_unary,
    aten_vision,
    attention,
    elementwise,
    experts,
    linear,
    norm,
    pictures,
    policy,
    quantisation,
    rope,
)
from graphopt.lowering.onnx.ops.registry import (
    Heads,
    Lowering,
    Pack,
    Sum,
    translation,
    translation_of,
)

__all__ = [
    "Heads",
    "Lowering",
    "Pack",
    "Sum",
    "aten",
    "aten_index",
    "aten_shape",
    "aten_unary",
    "aten_vision",
    "attention",
    "elementwise",
    "experts",
    "linear",
    "norm",
    "pictures",
    "policy",
    "quantisation",
    "rope",
    "translation",
    "translation_of",
]
