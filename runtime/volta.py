"""The attention kernels for Volta: `runtime/kernels/volta.cu`, compiled ahead, as kernels to call.

`graphopt.runtime.attention` launches them as it launches those in Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from graphopt.runtime.attention import decode, prefill
from graphopt.runtime.driver import FLOAT, INT, LONG, POINTER, Kernel

# The constants that are macros of the source; the others are for the host.
DEFINES = (
    "DECODE", "HEAD_DIM", "VALUE_DIM", "GROUP", "BLOCK_M", "BLOCK_N", "WARPS", "CARRY", "P_PATH",
    "CAUSAL", "TOP_LEFT", "WINDOW", "CHUNK", "SOFTCAP", "PADDING_MASK", "BIAS", "ALIBI", "SINKS",
    "VARLEN", "KV_LENS", "RING", "PAGE", "LSE",
)  # fmt: skip

MERGE_THREADS = 64


def _parameters(names: str) -> dict[str, Any]:
    kinds = {"S": INT, "T": INT, "H": INT, "scale": FLOAT, "splits": INT, "block_table_width": INT}
    found: dict[str, Any] = {}
    for name in names.split():
        default = LONG if "_stride_" in name else POINTER
        found[name] = kinds.get(name, default)
    return found


_STRIDES = (
    "q_stride_b q_stride_h q_stride_s k_stride_b k_stride_h k_stride_t "
    "v_stride_b v_stride_h v_stride_t "
)
_BIAS_STRIDES = "bias_stride_b bias_stride_h bias_stride_s bias_stride_t "

# The parameters of the kernels, in the order of the source.
PREFILL = _parameters(
    "q_ptr k_ptr v_ptr out_ptr lse_ptr mask_ptr bias_ptr slopes_ptr positions_ptr sinks_ptr "
    "cu_seqlens_q_ptr cu_seqlens_k_ptr kv_lens_ptr block_table_ptr ring_start_ptr "
    + _STRIDES + "o_stride_b o_stride_h o_stride_s " + _BIAS_STRIDES
    + "block_table_width S T H scale"
)  # fmt: skip
DECODE = _parameters(
    "q_ptr k_ptr v_ptr part_ptr part_lse_ptr mask_ptr bias_ptr slopes_ptr positions_ptr "
    "kv_lens_ptr block_table_ptr ring_start_ptr "
    + _STRIDES
    + _BIAS_STRIDES
    + "block_table_width S T H scale"
)
MERGE = _parameters(
    "part_ptr part_lse_ptr sinks_ptr out_ptr lse_ptr o_stride_b o_stride_h o_stride_s S H splits"
)


def row_bytes(size: int) -> int:
    """Return how far rows of `size` elements of Q, K or P lie apart in shared memory."""
    chunks = size // 8
    return 16 * (chunks if chunks % 8 == 0 else chunks | 1)


def value_row_bytes(size: int) -> int:
    """Return how far rows of `size` elements of V lie apart in shared memory."""
    chunks = -(-size // 16) * 2
    return 16 * (chunks + 2 if chunks % 4 == 0 and chunks % 8 else chunks)


def shared_bytes(constants: Mapping[str, int | float | bool]) -> int:
    """Return the dynamic shared memory of a block of the kernel of these constants."""
    decode, head, value, m, n, warps, weights = (
        int(constants[name])
        for name in ("DECODE", "HEAD_DIM", "VALUE_DIM", "BLOCK_M", "BLOCK_N", "WARPS", "P_PATH")
    )

    def whole(size: int) -> int:
        return -(-size // 128) * 128

    queries = whole(m * row_bytes(head))
    tile = whole(n * row_bytes(head)) + whole(n * value_row_bytes(value))
    if not decode:
        return queries + tile + (warps * whole(m // warps * row_bytes(n)) if weights else 0)
    tile += whole(m * row_bytes(n)) if weights else 0
    # At the end the warps lay down their sums, maxima and totals instead.
    merging = warps * m * 4 * (-(-value // 16) * 16 + 4 + 2)
    return max(queries + warps * tile, merging)


def _check(constants: Mapping[str, Any]) -> Any:
    def check(grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        for name in ("q", "k", "v", "out"):
            tensor = arguments.get(f"{name}_ptr")
            if tensor is None:
                continue
            if tensor.dtype != torch.float16:
                raise ValueError(f"{name} is {tensor.dtype}: Volta's matrix units take float16")
            # Rows are read and written by 16 bytes.
            strides = [
                tensor.stride(axis) for axis in range(tensor.dim() - 1) if tensor.shape[axis] > 1
            ]
            if tensor.data_ptr() % 16 or any(stride % 8 for stride in strides):
                raise ValueError(
                    f"{name} is not aligned to 16 bytes in every row (strides "
                    f"{tuple(tensor.stride())}): call .contiguous()"
                )
        bias = arguments.get("bias_ptr")
        if bias is not None and bias.element_size() * 8 != constants["BIAS"]:
            raise ValueError(f"bias is {bias.dtype}: made for {constants['BIAS']} bits")
        if not arguments.get("scale", 1.0) > 0:
            raise ValueError(f"scale is {arguments['scale']}: it should be above 0")
        if any(size > 65535 for size in grid[1:]):
            raise ValueError(f"a grid of {grid}: at most 65,535 heads times rows of a batch")

    return check


def prefill_kernel(image: bytes, constants: Mapping[str, Any]) -> Kernel:
    """Return `attention_prefill` out of an image that was compiled with the constants."""
    return Kernel(
        image, "attention_prefill", PREFILL,
        threads=32 * constants["WARPS"], shared=shared_bytes(constants), check=_check(constants),
    )  # fmt: skip


def decode_kernels(image: bytes, constants: Mapping[str, Any]) -> tuple[Kernel, Kernel]:
    """Return `attention_decode` and `attention_merge` out of one image."""
    decode = Kernel(
        image, "attention_decode", DECODE,
        threads=32 * constants["WARPS"], shared=shared_bytes(constants), check=_check(constants),
    )  # fmt: skip
    merge = Kernel(image, "attention_merge", MERGE, threads=MERGE_THREADS)
    return decode, merge


def load(phase: str, constants: Mapping[str, Any], code: bytes | None) -> Callable[..., Any]:
    """Return what runs an attention of (q, keys, scale=, extras=).

    See `attention.prefill` and `attention.decode`.

    Args:
        phase: `prefill` or `decode`.
        code: Machine code for `sm_70`, or PTX with a zero behind it.
    """
    assert code is not None
    if phase == "decode":
        return partial(decode, *decode_kernels(code, constants), constants=constants)
    return partial(prefill, prefill_kernel(code, constants), constants=constants)
