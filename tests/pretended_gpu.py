"""A GPU that is not there, whose tensors have values: they lie on a CPU and say otherwise.

What a program does with a real GPU's tensors it does with these, as slowly as a CPU does. An
operation that mixes them with a CPU's is an error, as on a GPU, but for indices and numbers.
Kernels of the device do not run, and nothing is converted by autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from graphopt.support.recorded import Recorded
from graphopt.training.step_memory import RecordedStep

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_MEMORY = 80 << 30

_INDEXED = ("aten::index", "aten::_unsafe_index")
_PUT = ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPIES = ("aten::copy_", "aten::_to_copy")


class OnGPU(Tensor):
    """A tensor that says that it lies on the GPU; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=CPU,
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: Any, meta: None, size: Any, stride: Any) -> OnGPU:
        return OnGPU(tensors["inner"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in _COPIES:
            operands = []
        elif name in _INDEXED or name in _PUT:
            # An index may lie elsewhere.
            operands = [args[0], *args[2:3]]
        for x in operands:
            if isinstance(x, Tensor) and not isinstance(x, OnGPU) and x.dim():
                raise RuntimeError(f"{name}: {x.dtype}{list(x.shape)} lies on the CPU, others not")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name == "aten::copy_" and not isinstance(args[0], OnGPU):
            return args[0]
        out = tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnGPU) else x


class _ToGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _inner(grad)


class _ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _inner(x.detach()).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if isinstance(grad, OnGPU) else OnGPU(grad)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the GPU, or on the CPU."""
    if isinstance(x, OnGPU) == (device.type == "cuda"):
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return (_ToGPU if device.type == "cuda" else _ToCPU).apply(x)
    x = x.detach()
    return OnGPU(x) if device.type == "cuda" else x.inner


def _is_gpu(x: Any) -> bool:
    return str(x).startswith("cuda") if isinstance(x, str | torch.device) else False


class _Functions(TorchFunctionMode):
    """Makes on the CPU what is to be made on the GPU, and says that it lies there."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device or getattr(func, "__name__", "") == "_parse_to":
            return func(*args, **kwargs)
        if func is Tensor.cuda or func is Tensor.cpu:
            return moved(args[0], GPU if func is Tensor.cuda else CPU)
        if func is Tensor.tolist:
            return func(moved(args[0], CPU))
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.to:
            return _to(*args, **kwargs)
        here = any(map(_is_gpu, tree_leaves((args, kwargs))))
        if func in (Tensor.new_tensor, torch.nn.functional.one_hot):
            # They make what they need where C++ says that a tensor lies.
            here = isinstance(args[0], OnGPU)
            args = tree_map(lambda x: moved(x, CPU) if isinstance(x, OnGPU) else x, args)
        args, kwargs = tree_map(lambda x: CPU if _is_gpu(x) else x, (args, kwargs))
        kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if not here:
            return out
        return tree_map(lambda x: moved(x, GPU) if isinstance(x, Tensor) else x, out)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `Tensor.to`."""
    device = kwargs.pop("device", None)
    kwargs.pop("non_blocking", None)
    rest = []
    for value in args:
        if isinstance(value, Tensor):
            device = value.device
            rest.append(value.dtype)
        elif isinstance(value, str | torch.device):
            device = value
        elif value is not None and not isinstance(value, bool):
            rest.append(value)
    made = Tensor.to(x, *rest, **kwargs) if rest or kwargs else x
    if device is None:
        return made
    device = torch.device(device)
    return Tensor.to(made, device) if device.type == "meta" else moved(made, device)


class _Generator(torch.Generator):
    """One of the CPU, wherever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        return made


def _keep_work(self: Any, work: Callable[..., Any], tensors: Sequence[Tensor | None]) -> None:
    self.work = work


def _run_work(self: Any, tensors: Sequence[Tensor | None]) -> Any:
    return self.work(*tensors)


class _Properties:
    name, major, minor = "a GPU that is not there", 9, 0
    total_memory, multi_processor_count = _MEMORY, 132


_ANSWERS = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
    "synchronize": None, "empty_cache": None, "set_device": None, "manual_seed_all": None,
    "_lazy_init": None, "init": None, "mem_get_info": (_MEMORY, _MEMORY), "memory_allocated": 0,
    "memory_reserved": 0, "max_memory_allocated": 0, "max_memory_reserved": 0, "memory_stats": {},
    "reset_peak_memory_stats": None, "get_device_capability": (9, 0),
    "get_device_name": _Properties.name, "get_device_properties": _Properties,
    "get_per_process_memory_fraction": 1.0, "is_bf16_supported": False,
    "is_current_stream_capturing": False,
}  # fmt: skip


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let there be a GPU."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer, **__: a))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        # Tensors of an inference are not wrapped.
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        # What would be recorded runs as it is.
        for kind, run in ((Recorded, "__call__"), (RecordedStep, "replay")):
            stack.enter_context(mock.patch.object(kind, "__init__", _keep_work))
            stack.enter_context(mock.patch.object(kind, run, _run_work))
        # Parameters of a module are replaced, and not written over.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(_Functions())
        yield
