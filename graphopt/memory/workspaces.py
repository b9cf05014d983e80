"""What kernels of torch for GPUs allocate inside an operator, beside its results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from graphopt.memory.operators import words

_FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_backward.default"
_EFFICIENT_BACKWARD = "aten._scaled_dot_product_efficient_attention_backward.default"

_UNKNOWN = {
    "cuDNN's attention": words(
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward"
    ),
    "convolutions": words("convolution convolution_backward"),
    "sorting": words("sort topk unique _unique2 embedding_dense_backward index_put_ nonzero"),
    "scans and large reductions": words("cumsum cumprod logcumsumexp"),
}
"""What has workspaces of a size that the library alone knows -> its operators."""


def kernel_workspace(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that a kernel uses beside its results while it runs; 0 where none are known.

    Flash attention's backward pass sums the gradient of the queries in fp32, over rows in
    multiples of 128 and features in multiples of 32, and writes gradients of keys and values for
    each head of queries before it sums those of a group (FlashAttention-2, section 3.1.2).
    """
    name = str(function)
    if name not in (_FLASH_BACKWARD, _EFFICIENT_BACKWARD):
        return 0
    q, k = args[1], args[2]
    assert isinstance(q, Tensor) and isinstance(k, Tensor)
    batch, heads, rows, width = q.shape
    if name == _EFFICIENT_BACKWARD:
        return 4 * batch * heads * rows  # the sums over a row of gradient times result
    rounded = -(-rows // 128) * 128
    wide = -(-width // 32) * 32
    size = 4 * batch * heads * rounded * (wide + 1)
    if k.shape[1] != heads:
        size += 2 * k.element_size() * batch * heads * k.shape[2] * width
    return size


def unknown_workspaces(op_names: Iterable[str]) -> list[str]:
    """Return a sentence for each kind of operator whose workspaces are not counted."""
    seen = {name.split(".")[1] for name in op_names if name.count(".") >= 1}
    return [
        f"Workspaces of {what} are not counted." for what, ops in _UNKNOWN.items() if ops & seen
    ]
