"""Keys and values of four and of eight bits, in Triton, as they are written.

A row of a cache is the codes of one key or value, and behind them its scale and its zero point in
fp32: a feature is (code - zero) scale. Of four bits a byte holds in its low bits a feature of the
first half, and in its high bits the one as far into the second half, each as a signed number.
What reads them is in codes.py.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.block import begin_early, token_place

_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _rounded(x):
    """Return fp32 numbers below 2^22 rounded to the nearest integer, ties to even."""
    return (x + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def _pack_heads(
    source_ptr, target_ptr, source_stride_h, target_stride_h, heads,
    D: tl.constexpr, BITS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the codes, the scale and the zero point of the heads of one token."""
    BYTES: tl.constexpr = D * BITS // 8
    MOST: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (column < BYTES)
    source = source_ptr + head * source_stride_h + column
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    broken = tl.max((x != x).to(tl.int32), 1)
    if BITS == 4:
        y = tl.load(source + BYTES, mask=mask, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, tl.min(y, 1)), tl.maximum(high, tl.max(y, 1))
        broken = tl.maximum(broken, tl.max((y != y).to(tl.int32), 1))
    scale = (high - low) / MOST
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero = _rounded(-low / scale)
    # What is no finite number is none when it is read.
    scale = tl.where((broken == 0) & (scale <= 3.4e38), scale, float("nan"))
    codes = _rounded(x / scale[:, None]) + zero[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), MOST).to(tl.int32) - MIDDLE
    if BITS == 4:
        others = _rounded(y / scale[:, None]) + zero[:, None]
        others = tl.minimum(tl.maximum(others, 0.0), MOST).to(tl.int32) - MIDDLE
        codes = (codes & 0xF) | ((others & 0xF) << 4)
    # Caches may be larger than 2^31 elements.
    target = target_ptr + head.to(tl.int64) * target_stride_h
    tl.store(target + column, codes.to(tl.uint8), mask=mask)
    pair = tl.arange(0, 2)[None, :]
    row = (target + BYTES).to(tl.pointer_type(tl.float32), bitcast=True)
    both = tl.where(pair == 0, scale[:, None], zero[:, None] - MIDDLE)
    tl.store(row + pair, both, mask=(head < heads) & (pair < 2))


@triton.jit
def append_packed_kv(
    k_ptr, v_ptr, cache_k_ptr, cache_v_ptr,
    seq_lens_ptr,  # int32: tokens of each row
    new_lens_ptr,  # int32 [B] or None: how many of the new ones are real
    block_table_ptr,  # int32 [B, block_table_width] or None: where in the pool a page lies
    total_ptr,  # int32 [B]
    S, heads,
    capacity,  # tokens that a row has room for
    length_stride, block_table_width,
    k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s,
    cache_k_stride_b, cache_k_stride_h, cache_k_stride_t,
    cache_v_stride_b, cache_v_stride_h, cache_v_stride_t,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BITS: tl.constexpr,
    RING: tl.constexpr,  # whether a token lies in the slot of its number modulo the capacity
    PAGE: tl.constexpr,  # tokens of a page, or 0
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `append_kv`, of rows that are rounded to codes."""
    if OVERLAP:
        begin_early()
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    row, place, written, length = token_place(
        b, s, S, capacity, seq_lens_ptr, new_lens_ptr, block_table_ptr, length_stride,
        block_table_width, RING, PAGE,
    )  # fmt: skip
    heads = tl.where(written, heads, 0)
    if tl.program_id(1) == 0:
        _pack_heads(
            k_ptr + b * k_stride_b + s * k_stride_s,
            cache_k_ptr + row * cache_k_stride_b + place * cache_k_stride_t,
            k_stride_h, cache_k_stride_h, heads,
            K_DIM, BITS, HEADS, BLOCK_K,
        )  # fmt: skip
        if s == 0:
            tl.store(total_ptr + b, length + S)
    else:
        _pack_heads(
            v_ptr + b * v_stride_b + s * v_stride_s,
            cache_v_ptr + row * cache_v_stride_b + place * cache_v_stride_t,
            v_stride_h, cache_v_stride_h, heads,
            V_DIM, BITS, HEADS, BLOCK_V,
        )  # fmt: skip
