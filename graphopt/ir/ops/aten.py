"""The ATen op: what capture could not raise, kept as it was exported, still runnable."""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.graph import In, Node
from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, register
from graphopt.ir.types import Type, evaluate


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return `value` with `change` applied to every leaf of nested lists, tuples and dicts."""
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)


def aten_argument(node: Node, position: int, name: str = "", default: Any = None) -> Any:
    """Return an argument of an ATen node: a Value, or a literal."""
    args, kwargs = node.attrs["args"], node.attrs.get("kwargs", {})
    if position < len(args):
        leaf = args[position]
    elif name in kwargs:
        leaf = kwargs[name]
    else:
        return default
    return node.inputs[leaf.index] if isinstance(leaf, In) else leaf


_REGISTERED_BY = {"transformers.grouped_mm_fallback.default": "transformers.integrations.moe"}
"""Operators outside PyTorch that capture produces -> the module that registers them."""

_NAME = re.compile(r"aten\.(\w+)\.(\w+)", re.ASCII)

_KINDS = (
    "Tensor", "number", "int", "SymInt", "float", "bool", "str", "ScalarType", "Layout", "Device",
    "MemoryFormat", "Generator",
)  # fmt: skip
"""Argument types that are values; a stream, a storage or an object of a class is none."""

# Text says how these compute. Of other operators it may name a file (from_file) or print.
_TAKES_TEXT = re.compile(
    r"gelu|divide|div|scatter|scatter_reduce|index_reduce|einsum|pad|pad_sequence|searchsorted"
    r"|quantile|nanquantile|meshgrid|conv[123]d|stft|fft_\w+|linalg_\w+"
)

# Operators for PyTorch's own use check less than public ones; these are what models become.
_INTERNAL = re.compile(
    r"_(?:"
    r"adaptive_avg_pool2d|addmm_activation|aminmax|cdist_forward|chunk_cat|conj|"
    r"conj_physical|convolution|euclidean_dist|fft_c2c|fft_c2r|fft_r2c|fused_rms_norm|"
    r"grouped_mm|int_mm|is_all_true|is_any_true|linalg_det|linalg_eigh|linalg_slogdet|"
    r"linalg_svd|log_softmax|logcumsumexp|native_batch_norm_legit_functional|"
    r"native_batch_norm_legit_no_training|neg_view|pdist_forward|prelu_kernel|"
    r"reshape_alias|reshape_copy|safe_softmax|scaled_dot_product_attention_math|"
    r"scaled_dot_product_flash_attention_for_cpu|scaled_mm|shape_as_tensor|softmax|"
    r"stack|to_copy|trilinear|unsafe_index|unsafe_view|weight_norm|"
    r"weight_norm_interface"
    r")"
)

# What gives memory that nothing was written to, or makes storage larger; what gives tensors of
# another layout, whose indices PyTorch does not check; and parts of training and of backends.
_EXCLUDED = re.compile(
    r"empty\w*|new_empty\w*|resize\w*|set|set_data|pin_memory|record_stream|ctc_loss"
    r"|\w*(?:sparse|quantize|nested|mkldnn|cudnn|miopen|fbgemm|foreach|_backward|_renorm)\w*"
)


# A program names the dtypes of a model in fp32: a table of zeros says fp32, and what is added to
# it has the dtype of the weights. These refuse operands of several dtypes.
ONE_DTYPE = frozenset(
    {
        "_unsafe_index_put", "addbmm", "addmm", "addmv", "baddbmm", "batch_norm", "bilinear",
        "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d.input",
        "convolution", "cross", "dot", "einsum", "group_norm", "index_add", "index_copy",
        "index_put", "index_reduce", "inner", "instance_norm", "layer_norm", "lerp.Scalar",
        "lerp.Tensor", "linalg_cross", "linalg_multi_dot", "linear", "masked_scatter", "matmul",
        "mm", "mv", "native_layer_norm", "prelu", "put", "scaled_dot_product_attention",
        "scatter.src", "scatter_add", "scatter_reduce.two", "tensordot", "vdot",
    }
)  # fmt: skip
"""Operators of `aten` whose floating-point operands must be of one dtype, as PyTorch's own."""

_HALF_LIMIT = torch.finfo(torch.float16).max


def needs_one_dtype(name: str, attrs: Attrs) -> bool:
    """Return whether a node's floating-point operands have to be brought into one dtype.

    Also where a number is out of the range of 16 bits: PyTorch refuses it there, or takes it for
    infinite.

    Args:
        name: The operator, with namespace and overload.
        attrs: The node's; output types among them, unless it is known that a float is among its
            operands.
    """
    if "types" in attrs and not attrs["types"][0].dtype.is_floating_point:
        return False
    if name in _REGISTERED_BY or name.split(".", 1)[1].removesuffix(".default") in ONE_DTYPE:
        return True
    tensors = any(isinstance(x, In) for x in attrs["args"])
    numbers = (x for x in attrs["args"] if isinstance(x, float) and math.isfinite(x))
    return tensors and any(abs(x) > _HALF_LIMIT for x in numbers)


@functools.cache
def resolve_target(name: str) -> torch._ops.OpOverload:
    """Return the torch operator called `namespace.name.overload`.

    A saved program names its operators, and nothing it names may do more than compute: operators
    are those of `aten` that PyTorch's dispatcher has in its table, whose schema writes to no
    argument, whose arguments are tensors and plain values, and which return tensors; and one
    of transformers that capture produces. A name is looked up in that table before any attribute
    is, so that it cannot lead elsewhere.

    Raises:
        KeyError: There is no such operator, or it is not one of those.
    """
    if name in _REGISTERED_BY:
        importlib.import_module(_REGISTERED_BY[name])
    else:
        match = _NAME.fullmatch(name)
        full = "" if match is None else f"aten::{match[1]}"
        if match is not None and match[2] != "default":
            full += f".{match[2]}"
        if full not in _dispatched():
            raise KeyError(f"no torch operator {name!r}")
    namespace, op, overload = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    if namespace == "aten" and not _computes(op, found._schema):
        raise KeyError(f"no torch operator {name!r} that programs may use")
    return found


@functools.cache
def _dispatched() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def _computes(op: str, schema: Any) -> bool:
    """True where an operator makes tensors of its arguments and does nothing else."""
    kinds = [str(argument.real_type) for argument in schema.arguments]
    plain = all(re.sub(r"Optional|List|[\[\]]", "", kind) in _KINDS for kind in kinds)
    says = any("str" in kind for kind in kinds)
    returns = [str(result.type) for result in schema.returns]
    return (
        plain
        and not schema.is_mutable
        and bool(returns)
        and all(kind in ("Tensor", "List[Tensor]") for kind in returns)
        and not (says and not _TAKES_TEXT.fullmatch(op))
        and not (op.startswith("_") and not op.startswith("__") and not _INTERNAL.fullmatch(op))
        and not _EXCLUDED.fullmatch(op)
    )


def is_random(node: Node) -> bool:
    """True for a node whose operator draws random numbers: two equal ones differ.

    With a dropout of 0, as in attention, it draws none.
    """
    if "." not in node.op or node.op.startswith("graphopt_capture."):
        return False  # an op of the IR, or one of the marks that capture leaves for itself
    target = resolve_target(node.op)
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    args, kwargs = node.attrs.get("args", []), node.attrs.get("kwargs", {})
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            value = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
            return bool(value != 0)
    return True


def concretize(attrs: Mapping[str, Any], sizes: Mapping[sympy.Symbol, int]) -> dict[str, Any]:
    """Return the attributes with symbolic sizes replaced by numbers."""

    def change(leaf: Any) -> Any:
        return evaluate(leaf, sizes) if isinstance(leaf, sympy.Expr) else leaf

    return {key: map_leaves(value, change) for key, value in attrs.items() if key != "types"}


def _fits(value: Any, kind: str, types: Types) -> bool:
    """True where a value can be an argument of a type of PyTorch's schemas."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[9:-1], types)
    if kind.startswith("List["):
        items = value if isinstance(value, list | tuple) else [value]
        return all(_fits(item, kind[5:-1], types) for item in items)
    if kind == "Tensor" and isinstance(value, In):
        return 0 <= value.index < len(types) and types[value.index] is not None
    if kind in _CLASSES:
        return isinstance(value, _CLASSES[kind])
    number = isinstance(value, int | float | sympy.Expr)
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    if kind in ("int", "SymInt"):
        return number and not isinstance(value, bool | float)
    return number and (kind != "float" or not isinstance(value, bool))


_CLASSES = {
    "bool": bool, "str": str, "ScalarType": torch.dtype, "Layout": torch.layout,
    "Device": torch.device, "MemoryFormat": torch.memory_format, "Generator": type(None),
}  # fmt: skip


@register
class Aten(Op):
    """Any torch operator.

    Attributes: `args` and `kwargs` as exported, with `In(i)` for operand i and sympy
    expressions for sizes; `types`, the output types as exported; `device`, where the program runs,
    for an operator of no tensor.
    """

    name = "aten"
    operands = ()

    def check(self, attrs: Attrs, types: Types) -> None:
        """Check the arguments by the operator's own schema.

        Raises:
            ValueError: One is missing, unknown, of another type, or an operand that is not there.
        """
        for name in ("args", "types"):
            if name not in attrs:
                raise ValueError(f"attribute {name!r} is not set")
        kinds = attrs["types"]
        if not isinstance(kinds, list) or not all(isinstance(kind, Type) for kind in kinds):
            raise ValueError("attribute 'types' is no list of types")
        args, kwargs = attrs["args"], attrs.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError("attributes 'args' and 'kwargs' are no list and no dict")
        try:
            arguments = resolve_target(attrs["target"])._schema.arguments
        except KeyError:
            return  # capture's own marks, and operators of code that the user trusts
        by_place = [argument for argument in arguments if not argument.kwarg_only]
        if len(args) > len(by_place):
            raise ValueError(f"{len(args)} arguments for {len(by_place)}")
        given = {argument.name: value for argument, value in zip(by_place, args, strict=False)}
        for name, value in kwargs.items():
            if name in given or name not in [argument.name for argument in arguments]:
                raise ValueError(f"it has no argument {name!r}, or has it twice")
            given[name] = value
        for argument in arguments:
            if argument.name in given:
                if not _fits(given[argument.name], str(argument.real_type), types):
                    raise ValueError(
                        f"argument {argument.name!r} is {given[argument.name]!r:.60}, not of type "
                        f"{argument.real_type}"
                    )
            elif not argument.has_default_value():
                raise ValueError(f"argument {argument.name!r} is missing")

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return list(attrs["types"])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        target = resolve_target(attrs["target"])
        anchor = next((t for t in tensors if t is not None), None)
        device = anchor.device if anchor is not None else attrs.get("device")
        floats = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
        # Exported graphs name fp32; under an fp64 reference they mean "the working precision".
        wide = torch.float64 if torch.float64 in floats else torch.float32

        def change(leaf: Any) -> Any:
            if isinstance(leaf, In):
                operand = tensors[leaf.index]
                if operand is not None and operand.dtype is torch.float32:
                    # Such as whole numbers that became fp32 and now meet an fp64 operand.
                    return operand.to(wide)
                return operand
            if isinstance(leaf, torch.device):
                return device
            if leaf is torch.float32:
                return wide
            return leaf

        args = map_leaves(attrs["args"], change)
        options = map_leaves(attrs.get("kwargs", {}), change)
        if any(kind.itemsize < 4 for kind in floats) and needs_one_dtype(attrs["target"], attrs):
            result = functional.narrowed(target, *args, **options)
        else:
            result = target(*args, **options)
        return (result,) if isinstance(result, Tensor) else tuple(result)
