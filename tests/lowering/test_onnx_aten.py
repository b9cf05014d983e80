"""The ONNX form of every ATen operator that has one, run by ONNX Runtime and by torch."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import LoweringError
from graphopt.execute.function_run import run_function
from graphopt.ir import B, Call, Function, In, Node, Program, S, Type, Value
from graphopt.ir.ops.aten import resolve_target
from graphopt.ir.types import P
from graphopt.ir.verify import verify
from graphopt.lowering.onnx.emitter import OnnxEmitter
from graphopt.lowering.onnx.external import DataFile
from graphopt.lowering.onnx.graph import Graph
from graphopt.lowering.onnx.ops.registry import _TRANSLATIONS

# In tensors of these sizes 5 means the batch and 7 the length; then the graph runs at (2, 3) too.
BATCH, LENGTH = 5, 7
OTHER = {B: 2, S: 3, P: 0}
MEANING: dict[int, Any] = {5: B, 7: S, 9: S + 2, 14: 2 * S, 21: 3 * S, 28: 4 * S} | {
    35: B * S, 140: 4 * B * S
}  # fmt: skip
I64, F32, BOOL = torch.int64, torch.float32, torch.bool


def symbolic(shape):
    return tuple(MEANING.get(size, size) for size in shape)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(*shape):
    return random(*shape).abs() + 0.1


def whole(*shape, low=-9, high=10, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator)


def nonzero(*shape, seed=1):
    values = whole(*shape, low=1, high=6, seed=seed)
    return values * (whole(*shape, low=0, high=2, seed=seed + 1) * 2 - 1)


def flags(*shape, seed=0):
    return whole(*shape, low=0, high=2, seed=seed).bool()


def distinct(*shape):
    """No two elements are equal, so that places of extremes are the same everywhere."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order.view(shape).float() / 7 - count / 20


def concrete(leaf, sizes):
    if isinstance(leaf, list | tuple):
        return type(leaf)(concrete(item, sizes) for item in leaf)
    if hasattr(leaf, "subs"):
        return int(leaf.subs(sizes))
    return leaf


class Built:
    """A program of one ATen node, whose tensors are inputs."""

    def __init__(self, name, args, kwargs, output):
        self.tensors = []
        sizes = {B: BATCH, S: LENGTH}
        given = resolve_target(name)(*concrete(args, sizes), **kwargs)
        results = [given] if isinstance(given, Tensor) else list(given)
        kinds = [Type(symbolic(r.shape), r.dtype) for r in results]
        attrs = {
            "args": [self._place(item) for item in args],
            "kwargs": {key: self._place(item) for key, item in kwargs.items()},
            "types": kinds,
        }
        function = Function("node")
        function.params = [Value(f"x{i}") for i in range(len(self.tensors))]
        node = Node(name, list(function.params), attrs)
        node.outputs = [Value(f"y{i}", node, i) for i in range(len(kinds))]
        function.nodes, function.results = [node], [node.outputs[output]]
        program = Program("one", functions={"node": function}, outputs=["logits"])
        program.inputs = {"input_ids": Type((B, S), I64)}
        for param, tensor in zip(function.params, self.tensors, strict=True):
            program.inputs[param.name] = Type(symbolic(tensor.shape), tensor.dtype)
        names = [param.name for param in function.params]
        program.calls = [Call("node", names, ["logits"])]
        self.program, self.function = program, function

    def _place(self, item):
        if isinstance(item, Tensor):
            self.tensors.append(item)
            return In(len(self.tensors) - 1)
        if isinstance(item, list | tuple):
            return [self._place(inner) for inner in item]
        return item

    def session(self, folder):
        verify(self.program)
        model = Graph(self.program, DataFile(folder / "model.data", folder)).build()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)

    def inputs(self, sizes):
        """Return the tensors, cut to the sizes."""
        cut = []
        for tensor in self.tensors:
            for axis, size in enumerate(symbolic(tensor.shape)):
                tensor = tensor.narrow(axis, 0, concrete(size, sizes))
            cut.append(tensor.contiguous())
        return cut

    def torch(self, tensors, sizes):
        call = self.program.calls[0]
        return run_function(self.function, call, tensors, {}, sizes)[0][0]


def run(session, tensors, sizes):
    feeds = {f"x{i}": tensor.numpy() for i, tensor in enumerate(tensors)}
    wanted = {item.name for item in session.get_inputs()}
    feeds["input_ids"] = np.zeros((sizes[B], sizes[S]), dtype=np.int64)
    feeds = {name: value for name, value in feeds.items() if name in wanted}
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def check(folder, name, *args, output=0, tolerance=2e-6, **kwargs):
    """Compare at two sizes.

    Values are of order 1 and sums short, so a few roundings of 6e-8 are all that differs.
    """
    built = Built(name, list(args), kwargs, output)
    session = built.session(folder)
    for sizes in ({B: BATCH, S: LENGTH, P: 0}, OTHER):
        tensors = built.inputs(sizes)
        expected = built.torch(tensors, sizes)
        found = run(session, tensors, sizes)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


X = random(5, 7, 4)
Y = random(5, 7, 4, seed=1)
N, M = whole(5, 7, 4), nonzero(5, 7, 4)
F, G = flags(5, 7, 4), flags(5, 7, 4, seed=3)
D = distinct(5, 7, 4)
HEADS = random(5, 3, 7, 4)
HALVES = torch.tensor([[[0.5, 1.5, 2.5, -0.5], [-1.5, -2.5, 0.49, -0.51]]])
ROWS = whole(5, 7, low=-3, high=3)  # valid as rows of three, also from the end

CASES: dict[str, tuple[Any, ...]] = {}
OPTIONS: dict[str, dict[str, Any]] = {}


def case(name, *args, **options):
    label = name if name not in CASES else next(
        f"{name} {i}" for i in range(2, 99) if f"{name} {i}" not in CASES
    )  # fmt: skip
    CASES[label] = (name, *args)
    OPTIONS[label] = options


for _name in ("neg", "abs", "exp", "cos", "sin", "tanh", "sigmoid", "relu", "erf", "floor", "ceil",
              "sign", "sgn", "round", "square", "silu", "expm1"):  # fmt: skip
    case(f"aten.{_name}.default", X)
for _name in ("neg", "abs", "exp", "cos", "sigmoid", "relu", "floor", "ceil", "round", "sign",
              "square", "sqrt", "rsqrt", "reciprocal", "log", "tanh", "erf"):  # fmt: skip
    case(f"aten.{_name}.default", N.abs() + 1)
for _name in ("log", "sqrt", "rsqrt", "reciprocal", "log1p"):
    case(f"aten.{_name}.default", positive(5, 7, 4))
case("aten.log1p.default", X.clamp(-0.9, 0.9))
case("aten.log1p.default", N.abs())
case("aten.expm1.default", N)
case("aten.sin.default", F)
case("aten.round.default", HALVES)
case("aten.sign.default", N)
case("aten.neg.default", N)

for _name in ("add", "sub", "mul"):
    case(f"aten.{_name}.Tensor", X, Y)
    case(f"aten.{_name}.Tensor", X, random(7, 1))
    case(f"aten.{_name}.Tensor", X, N)
    case(f"aten.{_name}.Tensor", N, M)
    case(f"aten.{_name}.Tensor", X, 3)
    case(f"aten.{_name}.Tensor", N, 3)
    case(f"aten.{_name}.Tensor", N, 0.5)
    case(f"aten.{_name}.Scalar", X, 1.5)
for _name in ("add", "mul"):
    case(f"aten.{_name}.Tensor", F, N)
    case(f"aten.{_name}.Tensor", F, 2.5)
case("aten.add.Tensor", F, 2)
case("aten.add.Tensor", N, S)
case("aten.mul.Tensor", X, S)
case("aten.mul.Tensor", F, G)
case("aten.add.Tensor", F, G)
case("aten.add.Tensor", X, Y, alpha=-2)
case("aten.sub.Tensor", N, M, alpha=3)
case("aten.sub.Tensor", X, Y, alpha=0.5)
case("aten.add.Scalar", X, 1.5, 2)
case("aten.rsub.Scalar", X, 1.0)
case("aten.rsub.Scalar", N, 7)
case("aten.rsub.Tensor", X, Y, alpha=2)
for _name in ("maximum", "minimum"):
    case(f"aten.{_name}.default", X, Y)
    case(f"aten.{_name}.default", N, X)
    case(f"aten.{_name}.default", N, M)
    case(f"aten.{_name}.default", F, G)
case("aten.max.other", X, Y)
case("aten.min.other", X, random(4))
case("aten.pow.Tensor_Scalar", X, 2)
case("aten.pow.Tensor_Scalar", X, 3.0)
case("aten.pow.Tensor_Scalar", positive(5, 7, 4), -0.5)
case("aten.pow.Tensor_Scalar", N, 2)
case("aten.pow.Tensor_Scalar", N, 0.5)
case("aten.pow.Scalar", 2.0, X)
case("aten.pow.Scalar", 2, N.abs())
case("aten.pow.Scalar", 10000.0, X, tolerance=2e-5)  # the rounding of an exponent of 30
case("aten.pow.Tensor_Tensor", positive(5, 7, 4), Y)
case("aten.pow.Tensor_Tensor", X, whole(5, 7, 4, low=0, high=4))

for _form in ("aten.div.Tensor_mode", "aten.div.Scalar_mode"):
    for _mode in (None, "floor", "trunc"):
        _other = (3, -2.5) if "Scalar" in _form else (M, M.float(), Y)
        for _divisor in _other:
            case(_form, N, _divisor, rounding_mode=_mode)
            case(_form, X * 9, _divisor, rounding_mode=_mode)
case("aten.div.Tensor", X, Y)
case("aten.div.Tensor", N, M)
case("aten.div.Tensor", N, 4)
case("aten.div.Tensor", F, 4)
case("aten.true_divide.Tensor", N, M)
for _name in ("floor_divide", "remainder"):
    _tensor, _scalar = ("default", "Scalar") if _name == "floor_divide" else ("Tensor", "Scalar")
    case(f"aten.{_name}.{_tensor}", N, M)
    case(f"aten.{_name}.{_tensor}", X * 9, M)
    case(f"aten.{_name}.{_tensor}", X * 9, Y)
    case(f"aten.{_name}.{_scalar}", N, 4)
    case(f"aten.{_name}.{_scalar}", N, -4)
    case(f"aten.{_name}.{_scalar}", X * 9, -0.5)
    case(f"aten.{_name}.{_scalar}", N, 2.5)
# 1 / 0.1 rounds to 10, but 0.1 in fp32 is more than a tenth.
TENTHS = torch.arange(35.0).view(5, 7) / 10
case("aten.floor_divide.default", TENTHS, torch.full((5, 7), 0.1))
case("aten.remainder.Scalar", TENTHS, 0.1)
case("aten.remainder.Scalar", N * 10_007.0, 0.37)

case("aten.softplus.default", X * 9)
case("aten.softplus.default", X * 9, 2.0, 3.0)
case("aten.gelu.default", X)
case("aten.gelu.default", X, approximate="tanh")
case("aten.clamp.default", X, -0.5, 0.5)
case("aten.clamp.default", X, None, 0.5)
case("aten.clamp.default", X, 0.25)
case("aten.clamp.default", N, -3, 4)
case("aten.clamp.default", N, min=0)
case("aten.clamp.default", N, -2.5)
case("aten.clamp.Tensor", X, random(4) - 1, random(7, 1) + 1)
case("aten.clamp_min.default", X, 0.1)
case("aten.clamp_max.default", X, 0.1)
case("aten.clamp_max.default", N, 2)
case("aten.clamp.default", X, -math.inf, 3.4e38)
case("aten.hardtanh.default", X)
case("aten.hardtanh.default", X * 9, -2.0, 3.0)

# Where they bend, and far out, where an exponential overflows or what is small cancels.
CURVE = torch.cat((random(5, 7, 4), random(5, 7, 4, seed=2) * 40, random(5, 7, 4) * 1e-3), -1)
for _name in ("log_sigmoid", "mish", "selu", "elu", "celu", "leaky_relu", "hardsigmoid",
              "hardswish", "relu6", "erfc", "tan", "atan", "asinh", "isnan", "isinf",
              "isfinite", "trunc"):  # fmt: skip
    case(f"aten.{_name}.default", CURVE, tolerance=1e-5 if _name == "tan" else 2e-6)
case("aten.elu.default", CURVE, 0.7, 1.3, 0.4)
case("aten.celu.default", CURVE, 0.7)
case("aten.leaky_relu.default", CURVE, 0.3)
case("aten.prelu.default", X, torch.tensor([0.3]))
case("aten.prelu.default", random(5, 3, 7), random(3))
case("aten.glu.default", X)
case("aten.glu.default", random(5, 6, 7), 1)
case("aten.trunc.default", N)
case("aten.relu6.default", N)
for _name in ("asin", "acos", "atanh"):
    case(f"aten.{_name}.default", X.clamp(-0.95, 0.95), tolerance=1e-5)
for _name in ("sinh", "cosh", "exp2"):
    case(f"aten.{_name}.default", X * 2, tolerance=1e-5)
for _name in ("acosh", "log2", "log10"):
    case(f"aten.{_name}.default", positive(5, 7, 4) + 1, tolerance=1e-5)
ODD = torch.where(F, torch.tensor([math.nan, math.inf, -math.inf, 2.0]), X)
for _name in ("isnan", "isinf", "isfinite", "nan_to_num"):
    case(f"aten.{_name}.default", ODD)
case("aten.nan_to_num.default", ODD, 1.5, 7.0, -8.0)
case("aten.fmod.Tensor", X * 9, Y)
case("aten.fmod.Tensor", N, M)
case("aten.fmod.Scalar", X * 9, -0.5)
case("aten.addcmul.default", X, Y, random(4))
case("aten.addcmul.default", X, Y, random(7, 1), value=0.5)
case("aten.addcdiv.default", X, Y, positive(4), value=-2)
case("aten.lerp.Scalar", X, Y, 0.3)
case("aten.lerp.Tensor", X, Y, positive(5, 7, 4))

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    case(f"aten.{_name}.Tensor", N, M)
    case(f"aten.{_name}.Tensor", N, X.round())
    case(f"aten.{_name}.Scalar", N, 2)
    case(f"aten.{_name}.Scalar", N, 2.5)
    case(f"aten.{_name}.Scalar", X, 0)
    case(f"aten.{_name}.Scalar", N, S)
    case(f"aten.{_name}.Scalar", F, 1)
    case(f"aten.{_name}.Tensor", F, G)
case("aten.eq.Scalar", F, True)
case("aten.lt.Scalar", F, 0.5)
for _name in ("logical_and", "logical_or", "logical_xor"):
    case(f"aten.{_name}.default", F, G)
    case(f"aten.{_name}.default", N, F)
    case(f"aten.{_name}.default", X.round(), N)
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"):
    case(f"aten.{_name}.Tensor", F, G)
    case(f"aten.{_name}.Tensor", N, M)
    case(f"aten.{_name}.Scalar", F, True)
    case(f"aten.{_name}.Scalar", N, 6)
case("aten.logical_not.default", F)
case("aten.logical_not.default", N)
case("aten.logical_not.default", X.round())
case("aten.bitwise_not.default", F)
case("aten.bitwise_not.default", N)
case("aten.where.self", F, X, Y)
case("aten.where.self", F, X, N)
case("aten.where.self", flags(7, 1), random(4), X)
case("aten.where.ScalarOther", F, X, -math.inf)
case("aten.where.ScalarSelf", F, 0.0, X)
case("aten.where.Scalar", F, 1.0, -1.5)
case("aten.masked_fill.Scalar", X, F, -math.inf)
case("aten.masked_fill.Scalar", X, flags(7, 1), torch.finfo(F32).min)
case("aten.masked_fill.Scalar", N, F, 0)
case("aten.masked_fill.Tensor", X, F, torch.tensor(2.5))

for _name in ("mean", "sum"):
    case(f"aten.{_name}.default", X, tolerance=2e-5)
    for _dims, _keep in (([-1], True), ([0, -2], False), ([1], False), ([], False)):
        case(f"aten.{_name}.dim" if _name == "mean" else "aten.sum.dim_IntList", X, _dims, _keep,
             tolerance=1e-5)  # fmt: skip
case("aten.mean.dim", N, [-1], dtype=F32)
case("aten.sum.dim_IntList", N, [1])
case("aten.sum.dim_IntList", F, [1])
case("aten.sum.default", F)
case("aten.sum.dim_IntList", X, None)
for _name in ("amax", "amin"):
    case(f"aten.{_name}.default", X, [-1], True)
    case(f"aten.{_name}.default", X, [0, 2])
    case(f"aten.{_name}.default", N, [1])
    case(f"aten.{_name}.default", X)
case("aten.logsumexp.default", X, [-1], True, tolerance=1e-5)
case("aten.logsumexp.default", X * 400, [0, 2], tolerance=1e-5)
for _name in ("std", "var"):
    case(f"aten.{_name}.dim", X, [-1], False, True)
    case(f"aten.{_name}.dim", X, [1, 2])
    case(f"aten.{_name}.correction", X, [-1], correction=2, keepdim=True)
    case(f"aten.{_name}.correction", X)
case("aten.prod.dim_int", X, -1)
case("aten.prod.dim_int", N, 2, True)
case("aten.prod.default", positive(4))
case("aten.any.default", F)
case("aten.any.dim", F, -1)
case("aten.any.dim", N, 1, True)
case("aten.any.dim", X.round(), 1)
case("aten.any.dims", F, [0, 2])
case("aten.any.default", -N.abs())
case("aten.all.default", F)
case("aten.all.default", torch.ones(5, 7))
case("aten.all.dim", F, -1)
case("aten.all.dim", N, 1, True)
case("aten.all.dims", F, [0, 2])
for _name in ("max", "min"):
    for _output in (0, 1):
        case(f"aten.{_name}.dim", D, -1, output=_output)
        case(f"aten.{_name}.dim", D, 1, True, output=_output)
for _name in ("argmax", "argmin"):
    case(f"aten.{_name}.default", D, -1)
    case(f"aten.{_name}.default", D, 1, True)
    case(f"aten.{_name}.default", D)
case("aten.max.default", D)
case("aten.min.default", D)
case("aten.cumsum.default", X, -1)
case("aten.cumsum.default", X, 1)
case("aten.cumsum.default", F, 1)
case("aten.cumsum.default", N, 0, dtype=F32)
for _name in ("softmax.int", "log_softmax.int"):
    case(f"aten.{_name}", X, -1)
    case(f"aten.{_name}", X, 1)
    case(f"aten.{_name}", N, 2, F32)
case("aten._softmax.default", X, 1, False)
case("aten._log_softmax.default", X, -1, False)
case("aten.linalg_vector_norm.default", X, 2, [-1], True)
case("aten.linalg_vector_norm.default", X, 1.0, [1])
case("aten.linalg_vector_norm.default", X)
case("aten.norm.ScalarOpt_dim", X, 2, [-1], True)
case("aten.norm.Scalar", X)

case("aten.matmul.default", X, random(4, 3))
case("aten.matmul.default", HEADS, random(5, 3, 4, 7))
case("aten.matmul.default", X, random(4))
case("aten.matmul.default", N, whole(4, 3))
case("aten.bmm.default", X, random(5, 4, 2))
case("aten.mv.default", random(7, 4), random(4))
case("aten.dot.default", random(4), random(4, seed=1))
case("aten.outer.default", random(7), random(4))
case("aten.einsum.default", "bsd,de->bse", [X, random(4, 3)])
case("aten.einsum.default", "ibnd, jbnd -> ijbn", [HEADS, random(2, 3, 7, 4)])
case("aten.einsum.default", "bsd->sb", [X])
case("aten.einsum.default", "...d,de->...e", [X, random(4, 3)])
case("aten.mm.default", random(7, 4), random(4, 3))
case("aten.addmm.default", random(3), random(7, 4), random(4, 3))
case("aten.addmm.default", random(3), random(7, 4), random(4, 3), beta=0.5, alpha=2)
case("aten.baddbmm.default", random(5, 7, 2), X, random(5, 4, 2), beta=0, alpha=-1.5)
case("aten.linear.default", X, random(3, 4))
case("aten.linear.default", X, random(3, 4), random(3))
case("aten.linear.default", random(4), random(3, 4))
case("aten.conv1d.default", random(5, 4, 7), random(3, 4, 3), random(3), [1], [1])
case("aten.conv1d.default", random(5, 4, 7), random(4, 1, 2), None, [1], [1], [2], 4)
PICTURE = random(5, 3, 6, 8)
case("aten.conv2d.default", PICTURE, random(4, 3, 2, 2), random(4), [2, 2])
case("aten.conv2d.padding", PICTURE, random(4, 3, 2, 3), None, [2, 1], "valid")
case("aten.conv2d.default", PICTURE, random(6, 1, 3, 3), None, [1, 2], [1, 0], [1, 2], 3)
case("aten.conv3d.default", random(5, 3, 2, 4, 6), random(4, 3, 2, 2, 2), random(4), [2, 2, 2])
case("aten.avg_pool2d.default", PICTURE, [2, 4])
case("aten.avg_pool2d.default", PICTURE, [3], [2], [1], False, False)
case("aten.avg_pool2d.default", PICTURE, [3], [2], [1])
case("aten.im2col.default", PICTURE, [2, 4], [1, 1], [0, 0], [2, 4])
case("aten.im2col.default", random(1, 3, 14, 6), [2, 2], [1, 1], [0, 0], [2, 2])
case("aten.meshgrid.indexing", [random(7), random(4)], indexing="ij", output=0)
case("aten.meshgrid.indexing", [random(7), random(4)], indexing="xy", output=1)
SDPA = "aten.scaled_dot_product_attention.default"
case(SDPA, HEADS, random(5, 3, 7, 4, seed=1), random(5, 3, 7, 4, seed=2), tolerance=1e-5)
case(SDPA, HEADS, random(5, 3, 6, 4), random(5, 3, 6, 4), scale=0.2, tolerance=1e-5)
case(SDPA, HEADS, HEADS, HEADS, flags(7, 7) | torch.eye(7).bool(), tolerance=1e-5)
case(SDPA, HEADS, HEADS, HEADS, random(5, 1, 7, 7), scale=0.3, tolerance=1e-5)
case("aten.masked_scatter.default", X, flags(5, 7, 1), random(40, 4))
case("aten.masked_scatter.default", X, flags(7, 4), random(5, 7, 4, seed=4))
case("aten.masked_scatter.default", X, torch.zeros(5, 7, 1).bool(), random(0, 4))
EDGES = torch.tensor([-1.0, 0.0, 0.5, 2.0])
case("aten.bucketize.Tensor", X, EDGES)
case("aten.bucketize.Tensor", HALVES, EDGES)
case("aten.bucketize.Tensor", HALVES, EDGES, right=True)
case("aten.bucketize.Tensor", HALVES, EDGES, out_int32=True)
case("aten.layer_norm.default", X, [4], random(4), random(4), 1e-3, tolerance=1e-5)
case("aten.layer_norm.default", X, [4], tolerance=1e-5)
case("aten.layer_norm.default", X, [4], None, random(4), tolerance=1e-5)
case("aten.layer_norm.default", random(5, 3, 4), [3, 4], random(3, 4), None, tolerance=1e-5)
case("aten.rms_norm.default", X, [4], random(4), 1e-3)
case("aten.rms_norm.default", X, [4])

case("aten.reshape.default", X, [B, S, 2, 2])
case("aten.reshape.default", X, [B * S, 4])
case("aten.reshape.default", X, [-1])
case("aten.view.default", X, [B, 1, S, 4])
case("aten._unsafe_view.default", X, [B, -1])
case("aten.flatten.using_ints", HEADS, 1, 2)
case("aten.flatten.using_ints", X)
case("aten.unflatten.int", X, -1, [2, 2])
case("aten.unflatten.int", X, 2, [-1, 1])
case("aten.squeeze.dim", random(5, 1, 7, 4), 1)
case("aten.squeeze.dim", random(5, 7, 4, 1), -1)
case("aten.squeeze.dims", random(5, 1, 7, 1), [1, -1])
case("aten.unsqueeze.default", X, 0)
case("aten.unsqueeze.default", X, -1)
case("aten.unsqueeze.default", X, -2)
case("aten.transpose.int", X, 1, 2)
case("aten.transpose.int", HEADS, -1, -3)
case("aten.swapaxes.default", X, 0, -1)
case("aten.swapdims.default", X, 1, 0)
case("aten.permute.default", HEADS, [0, 2, -3, -1])
case("aten.t.default", random(7, 4))
case("aten.t.default", random(7))
case("aten.numpy_T.default", random(7, 4))
case("aten.mT.default", HEADS)
case("aten.movedim.int", HEADS, 1, -1)
case("aten.movedim.intlist", HEADS, [0, -1], [2, 0])
case("aten.moveaxis.int", HEADS, -1, 0)
case("aten.flip.default", X, [1])
case("aten.flip.default", X, [0, -1])
case("aten.roll.default", X, [1], [1])
case("aten.roll.default", X, [-2, 9], [1, -1])
case("aten.tile.default", X, [1, 2, 3])
case("aten.eye.default", 4)
case("aten.eye.default", S)
case("aten.eye.m", 3, S, dtype=I64)
case("aten.expand.default", random(5, 1, 4), [B, S, -1])
case("aten.expand.default", random(7, 1), [B, 3, S, 4])
case("aten.expand_as.default", random(7, 1), X)
case("aten.broadcast_to.default", random(4), [B, S, 4])
case("aten.repeat.default", X, [1, 2, 3])
case("aten.repeat.default", random(7, 4), [B, 1, 2, 1])
case("aten.repeat_interleave.self_int", HEADS, 2, 1)
case("aten.repeat_interleave.self_int", HEADS, 3, -1)
case("aten.slice.Tensor", X, 1, 1, 3)
case("aten.slice.Tensor", X, -1, -3, -1)
case("aten.slice.Tensor", X, 2, None, 2)
case("aten.slice.Tensor", X, 1, 1)
case("aten.slice.Tensor", X, 1, -2)
case("aten.slice.Tensor", X, 1, 0, 2**63 - 1)
case("aten.slice.Tensor", X, 2, 0, 4, 3)
case("aten.slice.Tensor", X, 1, 1, S)
case("aten.slice.Tensor", random(5, 14), 1, S, 2 * S)
case("aten.slice.Tensor", X)
case("aten.narrow.default", X, -1, 1, 2)
case("aten.narrow.default", random(5, 14), 1, S, S)
case("aten.narrow.default", X, 2, -2, 2)
case("aten.select.int", X, 1, 0)
case("aten.select.int", X, -1, -1)
case("aten.select.int", X, 1, -1)
case("aten.select.int", random(5, 9), 1, S)
for _output in (0, 1):
    case("aten.split.Tensor", X, 2, -1, output=_output)
    case("aten.split.Tensor", X, 3, 2, output=_output)
    case("aten.chunk.default", X, 2, -1, output=_output)
    case("aten.split_with_sizes.default", X, [1, 3], -1, output=_output)
    case("aten.split.sizes", X, [1, 3], 2, output=_output)
    case("aten.tensor_split.sections", X, 3, -1, output=_output)
    case("aten.split.Tensor", random(5, 14, 2), S, 1, output=_output)
    case("aten.unbind.int", X, -1, output=_output)
case("aten.split.Tensor", X, 4, -1)
case("aten.unbind.int", random(3, 5, 7))
case("aten.cat.default", [X, Y], -1)
case("aten.cat.default", [X, Y], 1)
case("aten.cat.default", [X, N], -1)
case("aten.cat.default", [X, random(5, 7, 2)], 2)
case("aten.concat.default", [X, Y])
case("aten.stack.default", [X, Y])
case("aten.stack.default", [X, Y], -1)
case("aten.stack.default", [X, N], 1)
case("aten.pad.default", X, [1, 2])
case("aten.pad.default", X, [0, 1, 2, 0], "constant", -1.5)
case("aten.constant_pad_nd.default", X, [-1, 2])
case("aten.constant_pad_nd.default", N, [1, 0], 7)
case("aten.pad.default", X, [0, 0, 2, 0])
case("aten.to.dtype", X * 9, I64)
case("aten.to.dtype", N, F32)
case("aten.to.dtype", X.round(), BOOL)
case("aten.to.dtype", X, BOOL)
case("aten.mul.Tensor", N.int(), 3)
case("aten.add.Tensor", N.int(), M)
case("aten.to.dtype", F, F32)
case("aten._to_copy.default", N, dtype=F32)
case("aten._to_copy.default", F, dtype=I64)
case("aten.type_as.default", N, X)
for _name in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy"):
    case(f"aten.{_name}.default", X)
case("aten.dropout.default", X, 0.5, False)
case("aten.copy.default", X, random(4))
case("aten.copy.default", X, N)
case("aten.full.default", [B, S], 2.5)
case("aten.full.default", [B, S], 3)
case("aten.full.default", [B, 2], True)
case("aten.full.default", [S], -math.inf)
case("aten.new_full.default", X, [S, 3], 1.5)
case("aten.full_like.default", N, 2)
case("aten.full_like.default", X, -1.5)
case("aten.ones.default", [B, S])
case("aten.ones.default", [S], dtype=I64)
case("aten.ones_like.default", N)
case("aten.ones_like.default", X, dtype=BOOL)
case("aten.new_ones.default", X, [2, S])
case("aten.zeros.default", [B, S, 2])
case("aten.zeros_like.default", F)
case("aten.new_zeros.default", N, [S])
case("aten.scalar_tensor.default", 2.5)
case("aten.scalar_tensor.default", S, dtype=I64)
case("aten.arange.default", S)
case("aten.arange.default", S, dtype=F32)
case("aten.arange.start", 2, S + 2)
case("aten.arange.start", -S, 0)
case("aten.arange.start_step", 0, 8, 2)
case("aten.arange.start_step", 3, -5, -2)
case("aten.arange.start_step", 0.0, 2.0, 0.25)
for _name in ("tril", "triu"):
    case(f"aten.{_name}.default", random(7, 7))
    case(f"aten.{_name}.default", X, -1)
    case(f"aten.{_name}.default", F, 1)
    case(f"aten.{_name}.default", N, diagonal=2)

case("aten.index.Tensor", random(3, 4), [ROWS])
case("aten.index.Tensor", random(5, 3, 4), [None, ROWS])
case("aten.index.Tensor", random(3, 3, 4), [ROWS, whole(7, low=-3, high=3)])
case("aten.index.Tensor", random(5, 7, 3), [None, None, torch.tensor([2, 0, -1])])
case("aten.index_put.default", random(3, 4), [torch.tensor([0, -1])], random(2, 4))
case("aten.index_put.default", random(3, 4), [torch.tensor([1, 2])], torch.tensor(2.5))
case("aten.index_put.default", random(3, 4), [torch.tensor([1, -2, 1])], random(3, 4), True)
case("aten.index_put.default", random(3, 4), [torch.tensor([0, -1]), torch.tensor([-1, 2])],
     random(2))  # fmt: skip
case("aten.index_select.default", X, -1, torch.tensor([3, 0, 0]))
case("aten.index_copy.default", random(3, 4), 0, torch.tensor([2, 0]), random(2, 4))
case("aten.index_add.default", random(3, 4), 0, torch.tensor([2, 0, 2]), random(3, 4))
case("aten.embedding.default", random(3, 4), ROWS.abs() % 3)
case("aten.gather.default", X, -1, whole(5, 7, 2, low=0, high=4))
case("aten.gather.default", random(5, 7, 4), 2, whole(5, 7, 4, low=0, high=4))
case("aten.scatter.src", X, -1, torch.tensor([0, 3, 1]).expand(5, 7, 3), random(5, 7, 3))
case("aten.scatter.value", X, 2, torch.tensor([3, 1]).expand(5, 7, 2), 1.5)
case("aten.scatter.value", N, 2, torch.tensor([3, 1]).expand(5, 7, 2), 1)
case("aten.scatter_add.default", X, -1, whole(5, 7, 3, low=0, high=4), random(5, 7, 3))
case("aten.slice_scatter.default", X, random(5, 7, 2), -1, 1, 3)
case("aten.slice_scatter.default", X, random(5, 7, 2), 2, 0, 2**63 - 1, 2)
case("aten.slice_scatter.default", X, random(5, 7, 2), 2, -2)
case("aten.slice_scatter.default", X, random(5, 7, 3), 2, -4, -1)
case("aten.slice_scatter.default", X, random(5, 7, 3), 2, 1, 99)
case("aten.one_hot.default", ROWS.abs() % 3, 3)
for _output in (0, 1):
    case("aten.topk.default", D, 2, output=_output)
    case("aten.topk.default", D, 2, 1, output=_output)
    case("aten.topk.default", D, 3, -1, False, output=_output)
    case("aten.sort.default", D, output=_output)
    case("aten.sort.default", D, 1, True, output=_output)
    case("aten.sort.stable", D, stable=True, dim=1, descending=True, output=_output)
    case("aten.sort.stable", N, stable=True, output=_output)
case("aten.argsort.default", D, -1)
case("aten.argsort.default", D, -1, True)
case("aten.argsort.stable", D, stable=True, dim=1, descending=True)
case("aten.histc.default", (ROWS.abs() % 3).float().flatten(), 3, 0, 2)


for _expr in (S // 2, (S + 1) // 2, -(-S // 2), sympy.ceiling(S / 3), S % 4, -S % 4, (S - 9) // 4,
              sympy.Max(S - 4, 0), sympy.Min(4, S), B * S * 2 - 1, S**3, (S**2 + S) / 2,
              (B + S) % 3 + 1, -S):  # fmt: skip
    case("aten.scalar_tensor.default", _expr, dtype=I64)


@pytest.mark.parametrize("label", CASES)
def test_form(label, tmp_path):
    name, *args = CASES[label]
    check(tmp_path, name, *args, **OPTIONS[label])


def test_every_registered_operator_is_here():
    tried = {name for name, *_ in CASES.values()} | {GROUPED}
    tried |= {name.rpartition(".")[0] for name in tried}
    known = {name for name in _TRANSLATIONS if "." in name}
    assert known - tried == set()


@pytest.mark.parametrize("name", ["log1p", "expm1"])
def test_small_arguments_do_not_cancel(name, tmp_path):
    """The result of 1e-6 is known to as many digits as the argument."""
    values = torch.logspace(-9, -0.5, 35).view(5, 7)
    for x in (values, -values):
        built = Built(f"aten.{name}.default", [x], {}, 0)
        sizes = {B: BATCH, S: LENGTH, P: 0}
        found = run(built.session(tmp_path), [x], sizes)
        torch.testing.assert_close(found, built.torch([x], sizes), rtol=1e-6, atol=0)


@functools.cache
def division(name, floats):
    x = torch.ones(5, 7) if floats else torch.ones(5, 7, dtype=I64)
    built = Built(name, [x, x], {}, 0)
    return built, built.session(Path("unused"))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(("aten.floor_divide.default", "aten.remainder.Tensor")),
    st.booleans(),
    st.lists(st.tuples(st.integers(-999, 999), st.integers(-30, 30)), min_size=35, max_size=35),
    st.sampled_from((1.0, 0.1, 0.37)),
)
def test_division_towards_minus_infinity(name, floats, pairs, unit):
    """Signs in all four combinations, multiples and near multiples."""
    a, b = (torch.tensor(side).view(5, 7) for side in zip(*pairs, strict=True))
    b = torch.where(b == 0, 31, b)
    if floats:
        a, b = a * unit, b * unit
    built, session = division(name, floats)
    sizes = {B: BATCH, S: LENGTH, P: 0}
    found, expected = run(session, [a, b], sizes), built.torch([a, b], sizes)
    assert found.equal(expected)


GROUPED = "transformers.grouped_mm_fallback.default"


def test_products_over_groups(tmp_path):
    """Also with experts that no row goes to."""
    pytest.importorskip("transformers.integrations.moe")
    rows, weight = random(7, 4), random(3, 4, 2)
    for ends in ([2, 5, 7], [0, 7, 7], [7, 7, 7]):
        built = Built(GROUPED, [rows, weight, torch.tensor(ends, dtype=torch.int32)], {}, 0)
        sizes = {B: BATCH, S: LENGTH, P: 0}
        found = run(built.session(tmp_path), built.tensors, sizes)
        torch.testing.assert_close(found, built.torch(built.tensors, sizes), rtol=1e-6, atol=1e-6)


REFUSED = {
    "index by flags": ("aten.index.Tensor", X, [F], "depends on values"),
    "index, middle axes": ("aten.index.Tensor", HEADS, [None, ROWS, ROWS], "not the first"),
    "open axis": ("aten.index_put.default", X, [None, ROWS], X, "left open"),
    "order of a norm": ("aten.linalg_vector_norm.default", X, 3, "norm of order 3"),
    "padding by words": ("aten.conv1d.padding", random(5, 4, 7), random(3, 4, 3), None, [1],
                         "same", "conv1d with padding 'same'"),
    "pool of its own": ("aten.avg_pool2d.default", random(5, 3, 6, 8), [2], [2], [0], False, True,
                        3, "divisor of its own"),
    "patches that overlap": ("aten.im2col.default", random(5, 3, 6, 8), [2, 2], [1, 1], [0, 0],
                             [1, 1], "im2col of patches that overlap"),
    "causal": ("aten.scaled_dot_product_attention.default", HEADS, HEADS, HEADS, None, 0.0, True,
               "attention that is causal"),
    "reflection": ("aten.pad.default", X, [1, 1], "reflect", "padding by 'reflect'"),
    "place with axes": ("aten.argmax.default", D, None, True, "axes kept"),
    "another axis": ("aten.index_add.default", X, 1, ROWS[0].abs(), X, "index_add"),
    "bins": ("aten.histc.default", random(7), 4, 0, 9, "histc over"),
    "bytes": ("aten.mul.Tensor", N.to(torch.int8), 3, "a number of type torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_what_has_no_form_is_refused_with_the_reason(label, tmp_path):
    name, *args, message = REFUSED[label]
    built = Built(name, args, {}, 0)
    with pytest.raises(LoweringError, match=rf"node: y0 = {name}: .*{message}.*--emit torch"):
        built.session(tmp_path)


def test_an_overload_without_a_form_is_refused_before_anything_is_read():
    built = Built("aten.round.decimals", [X], {"decimals": 1}, 0)
    with pytest.raises(
        LoweringError, match=r"node: y0 = aten\.round\.decimals: this ATen operator"
    ):
        OnnxEmitter().check(built.program, "cpu")
