"""Which of its attention kernels torch takes on a GPU, and what operators that comes to.

torch decides this when the operator runs, by properties of the GPU. Tensors without values have
none, so that the decision is made here, by the same conditions (torch's `sdp_utils.cpp`), for a
GPU that need not be there.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["cudnn", "flash", "efficient", "math"]

CUDNN_FIRST = 91500
"""The version of cuDNN above which torch prefers its kernel on Hopper and Blackwell."""


def chosen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    grouped: bool,
    capability: tuple[int, int],
    cudnn: int = CUDNN_FIRST + 1,
) -> Kernel:
    """Return the kernel that torch runs, where nobody has asked for another.

    Args:
        q, k, v: [B, H, S, D], [B, G, T, D] and [B, G, T, Dv].
        mask: Bool or additive, broadcastable to [B, H, S, T].
        grouped: Whether G may be less than H.
        capability: The GPU's compute capability.
        cudnn: Version of cuDNN.
    """
    if not (q.dim() == k.dim() == v.dim() == 4) or 0 in (q.shape[2], k.shape[2]):
        return "math"
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    if capability < (8, 0):
        half = half and q.dtype == torch.float16
    heads_match = q.shape[1] == k.shape[1] == v.shape[1]
    if not heads_match and not (grouped and q.shape[1] % k.shape[1] == 0):
        return "math"
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in (q, k, v)):
        return "math"
    width, value_width = q.shape[3], v.shape[3]
    gradient = torch.is_grad_enabled() and mask is not None and mask.requires_grad
    prefers_cudnn = capability[0] in (9, 10) and cudnn > CUDNN_FIRST
    most = 256 if capability == (9, 0) else 128
    cudnn_fits = max(width, value_width) <= most and width % 8 == value_width % 8 == 0
    if half and prefers_cudnn and cudnn_fits and k.shape[2] > 1 and not gradient:
        return "cudnn"
    square = not is_causal or q.shape[2] == k.shape[2]
    if half and capability >= (8, 0) and mask is None and square:
        if width == value_width <= 256:
            return "flash"
    alignment = 16 // q.element_size() if capability >= (8, 0) or half else 1
    aligned = width % alignment == value_width % alignment == 0
    known = half or q.dtype == torch.float32
    if known and heads_match and aligned and not (is_causal and mask is not None):
        return "efficient"
    return "math"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    capability: tuple[int, int],
) -> Tensor:
    """Do what `scaled_dot_product_attention` does on a GPU, by the operators of its kernel.

    Args:
        capability: The GPU's compute capability. The others are torch's.
    """
    kernel = chosen_kernel(
        q, k, v, attn_mask, is_causal=is_causal, grouped=enable_gqa, capability=capability
    )
    aten = torch.ops.aten
    if kernel == "math":
        return aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    if kernel == "flash":
        width = q.shape[3]
        scale = scale if scale is not None else width**-0.5
        q, k, v = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )[0]
        return out[..., :width]
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(
            mask, 0.0, torch.scalar_tensor(float("-inf"), dtype=q.dtype, device=mask.device)
        )
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            q, k, v, mask, backward, dropout_p, is_causal, False, scale=scale
        )[0]
    if mask is not None:
        # torch lets rows of a mask begin at multiples of 8 elements, as the kernel reads them.
        if mask.shape[-1] % 8:
            mask = F.pad(mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, backward, dropout_p, is_causal, scale=scale
    )[0]
