"""Tiled attention of few query tokens over a long cache for Ascend: keys split over the cores.

The rows of a tile are the query heads that share a key head, token after token, so that keys and
values are read once a key head. A task is one span of the keys of one key head; one program runs
on each cube core and walks over tasks, and over the keys of each as the prefill does, in rounds
of BLOCK_KV (runtime/kernels/ascend_prefill.py). A second kernel, on the vector cores, merges the
spans by their log-sum-exp (flash-decoding: O = sum of exp(lse_i - lse) O_i). A span's length
hangs on the number of keys alone, so that a row's result is the same bit for bit whatever else is
in the batch.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.ascend_prefill import (
    LN2,
    LOG2E,
    LOWEST,
    UNSEEN,
    load_tile,
    stretches,
    walk_keys,
)


@triton.jit
def ascend_decode(
    q_ptr,  # [B, G, S GROUP, HEAD_DIM], by strides: the heads of a token lie one behind the other
    k_ptr,  # [B, G, T, HEAD_DIM]
    v_ptr,  # [B, G, T, VALUE_DIM]
    part_ptr,  # fp32 [B, G, S GROUP, splits, VALUE_DIM], contiguous: the result of every span
    part_lse_ptr,  # fp32 [B, G, splits, S GROUP], contiguous: its log-sum-exp, to base 2; UNSEEN
                   # where the row sees none of the span's keys
    table_ptr,  # fp16 [2 M GROUP, 2 M], contiguous: 1 where column > row // GROUP, else 0
    mask_ptr,  # int8 [B, T], contiguous: nonzero at real keys
    kv_lens_ptr,  # int32 [B]: keys of each row, where they are fewer than T
    q_stride_b, q_stride_g, q_stride_r,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    B, S, T, G,
    splits,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,  # the power of two that holds HEAD_DIM
    VALUE_TILE: tl.constexpr,  # the same for VALUE_DIM
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least GROUP
    BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr,  # 1, 2 or 4 times BLOCK_N
    M: tl.constexpr,  # at least BLOCK_M and BLOCK_N
    CAUSAL: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDING_MASK: tl.constexpr,
    KV_LENS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    blocks = tl.cdiv(S, TOKENS)
    for task in range(tl.program_id(0), blocks * splits * B * G, tl.num_programs(0)):
        # Blocks of tokens that read the same keys run side by side, and so do spans of one head.
        block = task % blocks
        split = task // blocks % splits
        head = task // (blocks * splits)
        batch = head // G
        group = head % G
        keys = T
        if KV_LENS:
            keys = min(T, tl.load(kv_lens_ptr + batch))
        first_token = block * TOKENS
        first_row = first_token * GROUP
        rows_left = min(S - first_token, TOKENS) * GROUP
        # Token i stands at key i + shift.
        shift = 0 if TOP_LEFT else keys - S
        first_position = first_token + shift
        last_position = first_position + TOKENS - 1

        q_rows = (
            q_ptr + tl.cast(batch, tl.int64) * q_stride_b + tl.cast(group, tl.int64) * q_stride_g
        )
        q_rows += tl.cast(first_row, tl.int64) * q_stride_r
        q = load_tile(q_rows, q_stride_r, rows_left, HEAD_DIM, BLOCK_M, HEAD_TILE, True)
        k_head = (
            k_ptr + tl.cast(batch, tl.int64) * k_stride_b + tl.cast(group, tl.int64) * k_stride_h
        )
        v_head = (
            v_ptr + tl.cast(batch, tl.int64) * v_stride_b + tl.cast(group, tl.int64) * v_stride_h
        )
        mask_row = tl.cast(batch, tl.int64) * T

        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        # A zero that hangs on the task; see the prefill.
        summed = tl.zeros([BLOCK_M, VALUE_TILE], tl.float32) + tl.cast(task, tl.float32) * 0.0

        # Of what is seen, the span: whole rounds, so that `splits` suffice.
        low, inner_low, inner_high, high = stretches(
            first_position, last_position, keys, BLOCK_N, CAUSAL, WINDOW
        )
        span = tl.cdiv(tl.cdiv(max(high - low, 0), splits), BLOCK_KV) * BLOCK_KV
        low += split * span
        high = min(high, low + span)
        inner_low = min(max(inner_low, low), high)
        inner_high = min(max(inner_high, inner_low), high)
        top, total, summed = walk_keys(
            q, k_head, v_head, table_ptr, mask_ptr, mask_row, top, total, summed,
            low, inner_low, inner_high, high, first_position, keys, k_stride_t, v_stride_t, scale,
            HEAD_DIM, VALUE_DIM, HEAD_TILE, VALUE_TILE, GROUP, BLOCK_M, BLOCK_N, BLOCK_KV, M,
            CAUSAL, WINDOW, SOFTCAP, PADDING_MASK,
        )  # fmt: skip

        # A row that saw no key has a sum of 0.
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        factor = tl.where(some, 1.0 / total, 0.0)
        row = tl.arange(0, BLOCK_M)
        column = tl.arange(0, VALUE_TILE)
        first = (tl.cast(head, tl.int64) * (S * GROUP) + first_row) * splits + split
        tl.store(
            part_ptr + first * VALUE_DIM + row[:, None] * (splits * VALUE_DIM) + column[None, :],
            summed * factor[:, None],
            mask=(row < rows_left)[:, None] & (column < VALUE_DIM)[None, :],
        )
        # Contiguous along the rows: with a stride, the compiler gives every number of every
        # vector of a number a row 32 bytes of the unified buffer.
        lse = tl.where(some, top + tl.log2(total), UNSEEN)
        first = (tl.cast(head, tl.int64) * splits + split) * (S * GROUP) + first_row
        tl.store(part_lse_ptr + first + row, lse, mask=row < rows_left)


@triton.jit
def ascend_merge(
    part_ptr,  # fp32 [B, G, S GROUP, splits, VALUE_DIM], contiguous
    part_lse_ptr,  # fp32 [B, G, splits, S GROUP], contiguous, to base 2
    sinks_ptr,  # fp32 [H]
    out_ptr,  # [B, H, S, VALUE_DIM], by strides
    lse_ptr,  # fp32 [B, H, S], contiguous: natural logarithm of the sum of exponentials
    o_stride_b, o_stride_h, o_stride_s,
    B, S, H,
    splits,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two from `splits` up
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    for row in range(tl.program_id(0), B * H * S, tl.num_programs(0)):
        batch = row // (H * S)
        head = row // (S * GROUP) % (H // GROUP) * GROUP + row % GROUP
        token = row // GROUP % S
        split = tl.arange(0, SPLITS)
        known = split < splits
        rows = S * GROUP
        lse_rows = part_lse_ptr + tl.cast(row // rows, tl.int64) * splits * rows + row % rows
        lse = tl.load(lse_rows + split * rows, mask=known, other=UNSEEN)
        column = tl.arange(0, VALUE_TILE)
        first = tl.cast(row, tl.int64) * splits
        parts = tl.load(
            part_ptr + first * VALUE_DIM + split[:, None] * VALUE_DIM + column[None, :],
            mask=known[:, None] & (column < VALUE_DIM)[None, :],
            other=0.0,
        )
        top = tl.maximum(tl.max(lse, 0), LOWEST)
        if SINKS:
            sink = tl.load(sinks_ptr + head) * LOG2E
            top = tl.maximum(top, sink)
        weights = tl.exp2(lse - top)
        total = tl.sum(weights, 0)
        if SINKS:
            total += tl.exp2(sink - top)
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        out = tl.sum(parts * weights[:, None], 0) * tl.where(some, 1.0 / total, 0.0)
        out_row = (
            out_ptr + tl.cast(batch, tl.int64) * o_stride_b + tl.cast(head, tl.int64) * o_stride_h
        )
        out_row += tl.cast(token, tl.int64) * o_stride_s
        tl.store(out_row + column, out.to(out_ptr.dtype.element_ty), mask=column < VALUE_DIM)
        if LSE:
            whole = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
            tl.store(lse_ptr + (tl.cast(batch, tl.int64) * H + head) * S + token, whole)
