"""A GPU that is not there: tensors without values stand for its tensors.

Tensors of torch's device "meta" have shapes and storages and no memory. Inside `StandIn` they say
that they are on a GPU, whatever is put on a GPU becomes one of them, and what torch does otherwise
on a GPU than elsewhere is done as there: which attention kernel runs, which optimizer, what
autocast converts. No CUDA is needed, and torch may be built without it.

What is copied to the host has no values either. It is followed as memory of the host, and what is
computed there from it is taken for the GPU's.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphopt.memory.fused_attention import attend
from graphopt.memory.operators import words

_run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

_CHECKS = "_allowed_determinism_checks_to_fns"
"""What checkpoints know a tensor again by."""

_META, _CPU = torch.device("meta"), torch.device("cpu")

_LOWER = words(
    "linear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv addbmm baddbmm einsum "
    "chain_matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu "
    "scaled_dot_product_attention"
)
"""What CUDA's autocast computes in the lower precision, by its Python name."""

_UPPER = words(
    "exp expm1 log log10 log2 log1p reciprocal rsqrt pow __pow__ __rpow__ tan acos asin cosh "
    "sinh softplus layer_norm group_norm nll_loss kl_div l1_loss smooth_l1_loss huber_loss "
    "mse_loss cross_entropy binary_cross_entropy_with_logits cosine_similarity cdist dist "
    "logsumexp prod softmax log_softmax cumprod cumsum sum norm"
)
"""What it computes in fp32."""


class StandIn(TorchFunctionMode):
    """Lets tensors of device "meta" stand for those of a GPU.

    Args:
        capability: The GPU's compute capability.
        memory: Its bytes, which are all said to be free.

    Attributes:
        active: The one that is entered; None where none is.
    """

    active: ClassVar[StandIn | None] = None
    device = torch.device("cuda", 0)

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 2**40) -> None:
        super().__init__()
        self.capability, self.memory = capability, memory
        self.attend = functools.partial(attend, capability=capability)
        self._kept: list[tuple[Any, str, Any]] = []
        self._host: dict[int, weakref.ref[Any]] = {}
        self._copying = False

    def __enter__(self) -> StandIn:
        for owner, name, value in (
            # Modules of torch call it by this name where no function mode looks.
            (F, "scaled_dot_product_attention", self.attend),
            (torch.cuda, "mem_get_info", lambda device=None: (self.memory, self.memory)),
            (torch.cuda, "memory_allocated", lambda device=None: 0),
            (torch.cuda, "memory_reserved", lambda device=None: 0),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_per_process_memory_fraction", lambda device=None: 1.0),
            (torch.cuda, "is_bf16_supported", lambda *_: self.capability >= (8, 0)),
            (torch.autograd, "_engine_run_backward", self._backward),
            (torch_checkpoint, _CHECKS, {**getattr(torch_checkpoint, _CHECKS), "default": _known}),
            (StandIn, "active", self),
        ):
            self._kept.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._kept:
            setattr(*self._kept.pop())

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        """Go backwards with the mode on: what a checkpoint computes again, it computes as before.

        torch hands functions to a mode that is off meanwhile.
        """
        super().__enter__()
        try:
            return _run_backward(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def place(self, storage: torch.UntypedStorage, fresh: bool = False) -> torch.device:
        """Return where what a storage of device "meta" stands for lies.

        Args:
            fresh: An operator has just made it.
        """
        copied = fresh and self._copying
        return _CPU if copied or id(storage) in self._host else self.device

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy that stands for one on the host."""
        self._copying = True
        try:
            copy = tensor.clone()
        finally:
            self._copying = False
        storage = copy.untyped_storage()
        key, host = id(storage), self._host
        host[key] = weakref.ref(storage, lambda _: host.pop(key, None))
        return copy

    def __torch_function__(
        self,
        function: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        special = _SPECIAL.get(function)
        if special is not None:
            return special(self, function, args, kwargs)
        if any(map(_names_gpu, args)) or any(map(_names_gpu, kwargs.values())):
            args = tuple(_META if _names_gpu(x) else x for x in args)
            kwargs = {name: _META if _names_gpu(x) else x for name, x in kwargs.items()}
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _autocast(function, args, kwargs)
        return function(*args, **kwargs)


def _known(x: Tensor) -> dict[str, Any]:
    """Return what a checkpoint knows a tensor again by: asked where modes are on, and off."""
    with torch._C.DisableTorchFunction():
        return {"shape": x.shape, "dtype": x.dtype, "device": x.device}


def _names_gpu(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


def _autocast(function: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments in the dtype that CUDA's autocast computes a function in."""
    name = getattr(function, "__name__", "")
    if name in _LOWER:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in _UPPER:
        dtype = torch.float32
    else:
        return args, kwargs

    def converted(x: Tensor) -> Tensor:
        wide = x.dtype == torch.float64 or not x.dtype.is_floating_point
        return x if x.device != _META or wide else x.to(dtype)

    leaves, structure = tree_flatten((args, kwargs))
    # The last argument is converted first, as compilers evaluate the arguments of torch's own call.
    for place in range(len(leaves) - 1, -1, -1):
        if isinstance(leaves[place], Tensor):
            leaves[place] = converted(leaves[place])
    return tree_unflatten(leaves, structure)


Special = Callable[[StandIn, Any, tuple[Any, ...], dict[str, Any]], Any]


def _device(mode: StandIn, function: Any, args: Any, kwargs: Any) -> Any:
    device = function(*args)
    return mode.place(args[0].untyped_storage()) if device == _META else device


def _is_cuda(mode: StandIn, function: Any, args: Any, kwargs: Any) -> bool:
    return bool(_device(mode, torch.Tensor.device.__get__, args, {}).type == "cuda")  # type: ignore[attr-defined]


def _is_cpu(mode: StandIn, function: Any, args: Any, kwargs: Any) -> bool:
    return not _is_cuda(mode, function, args, kwargs)


def _to(mode: StandIn, function: Any, args: Any, kwargs: Any) -> Tensor:
    """Copy between the GPU and the host, and leave the dtype to what follows."""
    tensor, *rest = args
    wanted = [x for x in (*rest, *kwargs.values()) if isinstance(x, (str, torch.device))]
    # A module asks by what it was told of a GPU before, which is torch's "meta".
    on_gpu = bool(wanted) and (_names_gpu(wanted[0]) or torch.device(wanted[0]) == _META)
    if wanted and tensor.is_meta:
        here = mode.place(tensor.untyped_storage())
        if on_gpu != (here != _CPU):
            tensor = mode.to_host(tensor) if here != _CPU else tensor.clone()
    into_meta = on_gpu or tensor.is_meta
    changed = [_META if x in wanted and into_meta else x for x in rest]
    options = {k: _META if x in wanted and into_meta else x for k, x in kwargs.items()}
    return function(tensor, *changed, **options)


def _to_cpu(mode: StandIn, function: Any, args: Any, kwargs: Any) -> Tensor:
    return _to(mode, torch.Tensor.to, (args[0], "cpu"), {})


def _not_meta(mode: StandIn, function: Any, args: Any, kwargs: Any) -> bool:
    return False


def _get_device(mode: StandIn, function: Any, args: Any, kwargs: Any) -> int:
    return mode.device.index if args[0].is_meta else function(*args, **kwargs)


def _to_gpu(mode: StandIn, function: Any, args: Any, kwargs: Any) -> Tensor:
    return _to(mode, torch.Tensor.to, (args[0], mode.device), {})


def _attention(mode: StandIn, function: Any, args: Any, kwargs: Any) -> Any:
    if not args[0].is_meta:
        return function(*args, **kwargs)
    if torch.is_autocast_enabled("cuda"):
        args, kwargs = _autocast(function, args, kwargs)
    return mode.attend(*args, **kwargs)


def _dropout(
    mode: StandIn,
    function: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    def given(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> tuple[Tensor, float, bool]:
        return input, p, training and not inplace and 0 < p < 1 and input.is_meta

    x, p, fused = given(*args, **kwargs)
    return torch.native_dropout(x, p, True)[0] if fused else function(*args, **kwargs)


_SPECIAL: dict[Any, Special] = {
    torch.Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: _is_cuda,  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: _not_meta,  # type: ignore[attr-defined]
    torch.Tensor.get_device: _get_device,
    torch.Tensor.is_cpu.__get__: _is_cpu,  # type: ignore[attr-defined]
    torch.Tensor.cuda: _to_gpu,
    torch.Tensor.cpu: _to_cpu,
    torch.Tensor.to: _to,
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
}
"""What a GPU does in its own way -> how it is done here."""
