"""Tiled attention of many query tokens, in Triton.

One program computes BLOCK_M query rows of one head. It walks over the keys in blocks of BLOCK_N
and keeps a running maximum and sum of every row (Dao et al., arXiv 2205.14135, algorithm 1; with
the row as the outer loop, arXiv 2307.08691, algorithm 1). Exponentials are to base 2.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.codes import code_tiles, row_scales, with_common_power
from graphopt.runtime.kernels.common import (
    LN2,
    LOG2E,
    LOWEST,
    exponent_unit,
    key_offsets,
    keys_of_pages,
    page_maxima,
    page_places,
    picked_pages,
    pool_pages,
    shares,
    softmax_step,
    transformed,
    visible,
)


@triton.jit(do_not_specialize=["S", "T", "block_table_width", "selected_width", "page_slots"])
def attention_prefill(
    q_ptr,  # [B, H, S, HEAD_DIM], by strides
    k_ptr,  # [B, G, T, HEAD_DIM]; paged: [pages, G, PAGE, HEAD_DIM]
    v_ptr,  # [B, G, T, VALUE_DIM]; paged: [pages, G, PAGE, VALUE_DIM]
    out_ptr,  # [B, H, S, VALUE_DIM]
    lse_ptr,  # fp32 [B, H, S], contiguous: natural logarithm of the sum of exponentials
    page_max_ptr,  # fp32 [B, H, S, page_slots]: largest score of every page read
    mask_ptr,  # int8 [B, T], contiguous: nonzero at real keys
    bias_ptr,  # [B, H, S, T], by strides, 0 where it broadcasts
    slopes_ptr,  # fp32 [H]
    positions_ptr,  # int32 [B, T], contiguous: ALiBi position of every key
    sinks_ptr,  # fp32 [H]
    cu_seqlens_q_ptr,  # int32 [B + 1]: where each sequence begins among the queries, and the end
    cu_seqlens_k_ptr,  # int32 [B + 1]: the same among the keys
    kv_lens_ptr,  # int32 [B]: keys of each row, where they are fewer than T
    block_table_ptr,  # int32 [B, block_table_width]: where in the pool a page of the row lies
    selected_blocks_ptr,  # int32 [B, G, selected_width]: the pages that a key head reads, or -1
    ring_start_ptr,  # int32 [B]: ring slot of key 0
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    o_stride_b, o_stride_h, o_stride_s,
    bias_stride_b, bias_stride_h, bias_stride_s, bias_stride_t,
    block_table_width, selected_width, page_slots,
    S, T, H,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D0: tl.constexpr,  # HEAD_DIM as a power of two, and what is left of it
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDING_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    VARLEN: tl.constexpr,
    KV_LENS: tl.constexpr,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    LSE: tl.constexpr,
    PAGE_MAX: tl.constexpr,
    KV_BITS: tl.constexpr,  # 16, or those of the codes in the rows of a cache
    WORDS: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    # The last rows of a causal attention see the most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    group = head // GROUP
    q_batch, k_batch = batch.to(tl.int64), batch.to(tl.int64)
    q_first, k_first = 0, 0
    lse_rows = S
    mask_row = batch.to(tl.int64) * T
    if VARLEN:
        q_first = tl.load(cu_seqlens_q_ptr + batch)
        k_first = tl.load(cu_seqlens_k_ptr + batch)
        S = tl.load(cu_seqlens_q_ptr + batch + 1) - q_first
        T = tl.load(cu_seqlens_k_ptr + batch + 1) - k_first
        q_batch, k_batch = q_batch * 0, k_batch * 0
        if block * BLOCK_M >= S:
            return
    if KV_LENS:
        T = min(T, tl.load(kv_lens_ptr + batch))

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < S
    # Query i stands at key i + shift.
    shift = 0 if TOP_LEFT else T - S
    positions = rows + shift

    unit = exponent_unit(scale, SOFTCAP, ALIBI, BIAS)

    q_head = q_ptr + tl.multiple_of(q_batch * q_stride_b + head.to(tl.int64) * q_stride_h, 8)
    q_rows = q_head + tl.multiple_of((q_first + rows).to(tl.int64) * q_stride_s, 8)[:, None]
    d0 = tl.arange(0, D0)
    q0 = tl.load(q_rows + d0[None, :], mask=real[:, None], other=0.0)
    if D1:
        d1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_rows + d1[None, :], mask=real[:, None] & (d1 < HEAD_DIM)[None, :], other=0.0)
    v0 = tl.arange(0, V0)
    if V1:
        v1 = V0 + tl.arange(0, V1)

    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        top = total + tl.load(sinks_ptr + head) * LOG2E
        total += 1.0
    else:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
    sum0 = tl.zeros([BLOCK_M, V0], tl.float32)
    if V1:
        sum1 = tl.zeros([BLOCK_M, V1], tl.float32)
    slope = 0.0
    bias_rows = bias_ptr
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E
    if BIAS:
        bias_rows += q_batch * bias_stride_b + head.to(tl.int64) * bias_stride_h
        bias_rows += rows[:, None].to(tl.int64) * bias_stride_s

    # Keys from `low` up to `high` are walked; between the inner two every row sees every key.
    low, high = 0, T
    inner_low, inner_high = 0, T // BLOCK_N * BLOCK_N
    first_position = block * BLOCK_M + shift
    last_position = first_position + BLOCK_M - 1
    if SELECTED:
        high = selected_width * PAGE
        inner_high = 0
    else:
        if CAUSAL:
            high = min(high, max(last_position + 1, 0))
            inner_high = min(inner_high, max(first_position + 1, 0) // BLOCK_N * BLOCK_N)
        if WINDOW:
            low = max(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            inner_low = tl.cdiv(max(last_position - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        if CHUNK:
            start = max(first_position, 0) // CHUNK * CHUNK
            low = max(low, start // BLOCK_N * BLOCK_N)
            start = max(last_position, 0) // CHUNK * CHUNK
            inner_low = max(inner_low, tl.cdiv(start, BLOCK_N) * BLOCK_N)
            end = tl.where(first_position < 0, 0, (max(first_position, 0) // CHUNK + 1) * CHUNK)
            inner_high = min(inner_high, end // BLOCK_N * BLOCK_N)
    inner_low = min(max(inner_low, low), high)
    inner_high = min(max(inner_high, inner_low), high)

    EACH: tl.constexpr = 8 + 8 * (KV_BITS < 16)
    k_head = k_ptr + tl.multiple_of(group.to(tl.int64) * k_stride_h, EACH)
    v_head = v_ptr + tl.multiple_of(group.to(tl.int64) * v_stride_h, EACH)
    if not PAGE:
        k_head += tl.multiple_of(k_batch * k_stride_b, EACH)
        v_head += tl.multiple_of(k_batch * v_stride_b, EACH)
    if KV_BITS < 16:
        q_sum = tl.sum(q0.to(tl.float32), 1)
        if D1:
            q_sum += tl.sum(q1.to(tl.float32), 1)
        # What zero points of the values come to.
        less = tl.zeros([BLOCK_M], tl.float32)

    # Three stretches: the left edge, the inside, the right edge.
    for part in tl.static_range(0 if (WINDOW or CHUNK) else 1, 3):
        if part == 0:
            begin, end = low, inner_low
        elif part == 1:
            begin, end = inner_low, inner_high
        else:
            begin, end = inner_high, high
        for start in range(begin, end, BLOCK_N):
            columns = tl.arange(0, BLOCK_N)
            keys = start + columns
            pages, place = keys, keys
            if PAGE:
                page, place = page_places(start, columns, PAGE, BLOCK_N)
                if SELECTED:
                    page = picked_pages(
                        page, batch * (H // GROUP) + group, selected_blocks_ptr, selected_width
                    )
                    keys = keys_of_pages(page, place, T, PAGE)
                pages = pool_pages(page, T, batch, block_table_ptr, block_table_width, PAGE)
            present = keys < T
            k_offsets, v_offsets = key_offsets(
                k_first + keys, place, pages, batch, ring_start_ptr,
                k_stride_b, k_stride_t, v_stride_b, v_stride_t, RING, PAGE, KV_BITS,
            )  # fmt: skip
            k_rows = k_head + k_offsets[:, None]
            v_rows = v_head + v_offsets[:, None]

            if KV_BITS == 16:
                if part == 1:
                    k0 = tl.load(k_rows + d0[None, :])
                else:
                    k0 = tl.load(k_rows + d0[None, :], mask=present[:, None], other=0.0)
                scores = tl.dot(q0, tl.trans(k0))
                if D1:
                    k1 = tl.load(
                        k_rows + d1[None, :],
                        mask=present[:, None] & (d1 < HEAD_DIM)[None, :],
                        other=0.0,
                    )
                    scores = tl.dot(q1, tl.trans(k1), scores)
            else:
                k0, k1 = code_tiles(k_head + k_offsets, present, d0, TYPE, KV_BITS, WORDS)
                scores = tl.dot(q0, tl.trans(k0))
                if KV_BITS == 4:
                    scores = tl.dot(q1, tl.trans(k1), scores)
                scale_k, zero_k = row_scales(k_head + k_offsets, present, HEAD_DIM, KV_BITS)
                scores = (scores - q_sum[:, None] * zero_k[None, :]) * scale_k[None, :]

            if (SOFTCAP > 0 or ALIBI) or BIAS:
                scores = transformed(
                    scores, keys, present, real, scale, slope, positions_ptr, mask_row,
                    bias_rows, bias_stride_t, SOFTCAP, ALIBI, BIAS,
                )  # fmt: skip
            scores = visible(
                scores, keys, present, positions, mask_ptr, mask_row,
                part != 1, CAUSAL, WINDOW, CHUNK, PADDING_MASK,
            )  # fmt: skip
            if PAGE_MAX:
                where = (q_batch * H + head) * S + rows
                page_maxima(
                    scores, unit, page_max_ptr, where, real, start, page_slots,
                    BLOCK_M, BLOCK_N, PAGE, False,
                )  # fmt: skip

            weights, shrink, top, total = softmax_step(scores, unit, top, total)
            if KV_BITS == 16:
                sum0 = sum0 * shrink[:, None]
                weights = weights.to(TYPE)
                if part == 1:
                    value0 = tl.load(v_rows + v0[None, :])
                else:
                    value0 = tl.load(v_rows + v0[None, :], mask=present[:, None], other=0.0)
                sum0 = tl.dot(weights, value0, sum0)
                if V1:
                    sum1 = sum1 * shrink[:, None]
                    value1 = tl.load(
                        v_rows + v1[None, :],
                        mask=present[:, None] & (v1 < VALUE_DIM)[None, :],
                        other=0.0,
                    )
                    sum1 = tl.dot(weights, value1, sum1)
            else:
                scale_v, zero_v = row_scales(v_head + v_offsets, present, VALUE_DIM, KV_BITS)
                power, scale_v = with_common_power(scale_v)
                shrink = shrink / power
                weights = (weights * scale_v[None, :]).to(TYPE)
                less = less * shrink + tl.sum(weights.to(tl.float32) * zero_v[None, :], 1)
                less = less * power
                value0, value1 = code_tiles(v_head + v_offsets, present, v0, TYPE, KV_BITS, WORDS)
                sum0 = tl.dot(weights, value0, sum0 * shrink[:, None]) * power
                if KV_BITS == 4:
                    sum1 = tl.dot(weights, value1, sum1 * shrink[:, None]) * power

    if KV_BITS < 16:
        sum0 -= less[:, None]
        if V1:
            sum1 -= less[:, None]
    some, total, factor = shares(total)
    out_head = out_ptr + tl.multiple_of(q_batch * o_stride_b + head.to(tl.int64) * o_stride_h, 8)
    out_rows = out_head + tl.multiple_of((q_first + rows).to(tl.int64) * o_stride_s, 8)[:, None]
    out0 = (sum0 * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows + v0[None, :], out0, mask=real[:, None])
    if V1:
        out1 = (sum1 * factor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + v1[None, :], out1, mask=real[:, None] & (v1 < VALUE_DIM)[None, :])
    if LSE:
        lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse_ptr + (q_batch * H + head) * lse_rows + q_first + rows, lse, mask=real)
