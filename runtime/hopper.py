"""The attention kernel for Hopper: `runtime/kernels/hopper_prefill.cu`, compiled ahead.

`graphopt.runtime.attention` launches it as it launches those in Triton.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.attention import prefill
from graphopt.runtime.driver import FLOAT, LONG, POINTER, Kernel, check_status, cuda_driver

PANEL = 64
"""Columns of a tile that lie in one row of shared memory: 128 bytes of 16-bit elements."""

# Of CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion.
_DTYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128B, _PROMOTE_128B = 3, 2


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("S", "T", "H", "blocks", "tiles"))


def shared_bytes(head_dim: int, value_dim: int, tiles: Mapping[str, int]) -> int:
    """Return the bytes of shared memory that a block asks for, of 16-bit elements.

    A tile of queries, STAGES of keys and of values, all in whole panels; a barrier of 8 bytes for
    each stage to be full and to be empty, and four for queries and tile numbers; and what it
    takes to start at a multiple of 1024.
    """
    keys, values = (-(-size // PANEL) * PANEL for size in (head_dim, value_dim))
    stages = tiles["STAGES"]
    elements = tiles["BLOCK_M"] * keys + stages * tiles["BLOCK_N"] * (keys + values)
    return 2 * elements + 8 * (4 + 4 * stages) + 1024


def tensor_map(tensor: Tensor, rows: int) -> tuple[Any, int]:
    """Describe tiles of [rows, PANEL] of a tensor [B, heads, tokens, D] to the copy engine.

    What a tile has beyond the tensor is read as zeros.

    Returns:
        What keeps the description alive, and its address, a multiple of 64.

    Raises:
        ValueError: The tensor's address or strides are not multiples of 16 bytes.
    """
    size = tensor.element_size()
    strides = [tensor.stride(axis) * size for axis in (2, 1, 0)]
    if tensor.data_ptr() % 16 or any(stride % 16 for stride in strides):
        raise ValueError(
            f"a tensor of strides {tensor.stride()} at {tensor.data_ptr():#x}: the copy engine "
            "takes multiples of 16 bytes; call .contiguous()"
        )
    held = ctypes.create_string_buffer(128 + 64)
    address = (ctypes.addressof(held) + 63) // 64 * 64
    batch, heads, tokens, width = tensor.shape
    check_status(
        cuda_driver().cuTensorMapEncodeTiled(
            POINTER(address), _DTYPES[tensor.dtype], 4, POINTER(tensor.data_ptr()),
            (ctypes.c_uint64 * 4)(width, tokens, heads, batch), (ctypes.c_uint64 * 3)(*strides),
            (ctypes.c_uint32 * 4)(PANEL, rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            0, _SWIZZLE_128B, _PROMOTE_128B, 0,
        ),
        f"cannot describe a tensor of shape {tuple(tensor.shape)} to the copy engine",
    )  # fmt: skip
    return held, address


class HopperPrefill:
    """The kernel, called as `attention_prefill` in Triton is.

    Args:
        image: Machine code for `sm_90a`.
        constants: What it was compiled with.
    """

    arg_names = (
        "q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "sinks_ptr",
        "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "kv_lens_ptr",
        "o_stride_b", "o_stride_h", "o_stride_s", "S", "T", "H", "scale",
    )  # fmt: skip

    def __init__(self, image: bytes, constants: Mapping[str, int | float]) -> None:
        self._constants = dict(constants)
        tiles = {name: int(constants[name]) for name in ("BLOCK_M", "BLOCK_N", "STAGES")}
        shared = shared_bytes(int(constants["HEAD_DIM"]), int(constants["VALUE_DIM"]), tiles)
        threads = 128 * (int(constants["CONSUMERS"]) + 1)
        self._kernel = Kernel(image, "attention_prefill", {}, threads=threads, shared=shared)
        self._counters: dict[tuple[torch.device, int], Tensor] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches the kernel; the grid is (blocks of a head, heads of all rows)."""

        def run(**given: Any) -> None:
            q, k, v, out = (given[f"{name}_ptr"] for name in ("q", "k", "v", "out"))
            blocks, rows = grid
            constants = self._constants
            maps = [
                tensor_map(q, int(constants["BLOCK_M"])),
                tensor_map(k, int(constants["BLOCK_N"])),
                tensor_map(v, int(constants["BLOCK_N"])),
            ]
            names = ("lse", "sinks", "cu_seqlens_q", "cu_seqlens_k", "kv_lens")
            optional = [given[f"{name}_ptr"] for name in names]
            values: list[Any] = [POINTER(out.data_ptr())]
            values += [POINTER(None if t is None else t.data_ptr()) for t in optional]
            values += [
                POINTER(self._counter(q.device).data_ptr()),
                _Sizes(given["S"], given["T"], given["H"], blocks, blocks * rows),
                FLOAT(given["scale"]),
                *(LONG(given[f"o_stride_{axis}"]) for axis in "bhs"),
            ]
            addresses = [address for _, address in maps] + [ctypes.addressof(x) for x in values]
            pointers = (ctypes.c_void_p * len(addresses))(*addresses)
            cores = torch.cuda.get_device_properties(q.device).multi_processor_count
            tensors = [q, k, v, out, *(t for t in optional if t is not None)]
            self._kernel.start((min(cores, blocks * rows),), pointers, tensors)

        return run

    def _counter(self, device: torch.device) -> Tensor:
        """Return the tile counter of the current stream; a launch leaves it at zero again."""
        stream = torch.cuda.current_stream(device).cuda_stream
        if (device, stream) not in self._counters:
            self._counters[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
        return self._counters[device, stream]


def load(phase: str, constants: Mapping[str, Any], code: bytes | None) -> Callable[..., Any]:
    """Return what runs an attention of (q, keys, scale=, extras=); see `attention.prefill`.

    Args:
        phase: `prefill`, all that there is.
        code: Machine code for `sm_90a`.
    """
    assert phase == "prefill" and code is not None
    return partial(prefill, HopperPrefill(code, constants), constants=constants)
