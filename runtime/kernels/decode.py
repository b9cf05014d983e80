"""Attention of few query tokens over a long cache, in Triton: keys split over many programs.

One program reads one span of the keys of one key head, once, for all query heads that share it.
A second kernel merges the spans by their log-sum-exp (flash-decoding: O = sum of
exp(lse_i - lse) O_i). What a span is hangs on the number of keys alone, so that a row's result
is the same bit for bit whatever else is in the batch.
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


@triton.jit
def span_of(keys, split, splits, BLOCK_N: tl.constexpr):
    """Return where a program's keys begin and end: whole blocks, as many as others' or one more."""
    blocks = tl.cdiv(keys, BLOCK_N)
    each, left = blocks // splits, blocks % splits
    low = (split * each + min(split, left)) * BLOCK_N
    high = low + (each + (split < left).to(tl.int32)) * BLOCK_N
    return low, min(high, keys)


@triton.jit(do_not_specialize=["S", "T", "block_table_width", "selected_width", "page_slots"])
def attention_decode(
    q_ptr,  # [B, H, S, HEAD_DIM], by strides
    k_ptr,  # [B, G, T, HEAD_DIM]; paged: [pages, G, PAGE, HEAD_DIM]
    v_ptr,  # [B, G, T, VALUE_DIM]; paged: [pages, G, PAGE, VALUE_DIM]
    part_ptr,  # fp32 [B, H, S, splits, VALUE_DIM]: the result of every span
    part_lse_ptr,  # fp32 [B, H, S, splits]: its log-sum-exp, to base 2
    page_max_ptr,  # fp32 [B, H, S, page_slots]: largest score of every page read
    mask_ptr,  # int8 [B, T], contiguous: nonzero at real keys
    bias_ptr,  # [B, H, S, T], by strides, 0 where it broadcasts
    slopes_ptr,  # fp32 [H]
    positions_ptr,  # int32 [B, T], contiguous: ALiBi position of every key
    kv_lens_ptr,  # int32 [B]: keys of each row, where they are fewer than T
    block_table_ptr,  # int32 [B, block_table_width]: where in the pool a page of the row lies
    selected_blocks_ptr,  # int [B, G, selected_width]: the pages that a key head reads, or -1
    ring_start_ptr,  # int32 [B]: ring slot of key 0
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
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
    KV_LENS: tl.constexpr,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    PAGE_MAX: tl.constexpr,
    KV_BITS: tl.constexpr,  # 16, or those of the codes in the rows of a cache
    WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched before the kernel in front ends, as the merge before this
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    split, splits = tl.program_id(0), tl.num_programs(0)
    groups = H // GROUP
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    batch_64, group_64 = batch.to(tl.int64), group.to(tl.int64)
    mask_row = batch_64 * T
    if KV_LENS:
        T = min(T, tl.load(kv_lens_ptr + batch))
    walked = T
    if SELECTED:
        walked = selected_width * PAGE
    low, high = span_of(walked, split, splits, BLOCK_N)

    # Rows are the query heads of the group, token after token.
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < S * GROUP
    token = rows // GROUP
    head = (group * GROUP + rows % GROUP).to(tl.int64)
    shift = 0 if TOP_LEFT else T - S
    positions = token + shift
    if (CAUSAL and not TOP_LEFT) and (WINDOW and not SELECTED):
        # Blocks that no row's window reaches are not read.
        low = max(low, max(shift - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)

    unit = exponent_unit(scale, SOFTCAP, ALIBI, BIAS)

    q_batch = q_ptr + tl.multiple_of(batch_64 * q_stride_b, 8)
    q_rows = q_batch + tl.multiple_of(head * q_stride_h + token.to(tl.int64) * q_stride_s, 8)
    d0 = tl.arange(0, D0)
    q0 = tl.load(q_rows[:, None] + d0[None, :], mask=real[:, None], other=0.0)
    if D1:
        d1 = D0 + tl.arange(0, D1)
        inside = (d1 < HEAD_DIM)[None, :]
        q1 = tl.load(q_rows[:, None] + d1[None, :], mask=real[:, None] & inside, other=0.0)
    v0 = tl.arange(0, V0)
    if V1:
        v1 = V0 + tl.arange(0, V1)

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum0 = tl.zeros([BLOCK_M, V0], tl.float32)
    if V1:
        sum1 = tl.zeros([BLOCK_M, V1], tl.float32)
    slope = 0.0
    bias_rows = bias_ptr
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=real, other=0.0)[:, None] * LOG2E
    if BIAS:
        bias_rows += batch_64 * bias_stride_b + head[:, None] * bias_stride_h
        bias_rows += token.to(tl.int64)[:, None] * bias_stride_s

    EACH: tl.constexpr = 8 + 8 * (KV_BITS < 16)
    k_head = k_ptr + tl.multiple_of(group_64 * k_stride_h, EACH)
    v_head = v_ptr + tl.multiple_of(group_64 * v_stride_h, EACH)
    if not PAGE:
        k_head += tl.multiple_of(batch_64 * k_stride_b, EACH)
        v_head += tl.multiple_of(batch_64 * v_stride_b, EACH)
    if KV_BITS < 16:
        q_sum = tl.sum(q0.to(tl.float32), 1)
        if D1:
            q_sum += tl.sum(q1.to(tl.float32), 1)
        # What zero points of the values come to.
        less = tl.zeros([BLOCK_M], tl.float32)

    # Where keys lie is looked up blocks ahead: the number of a page in the list three before, its
    # place in the pool two before. Keys and values then wait for no other load, and those of the
    # first blocks wait for two loads in all.
    columns = tl.arange(0, BLOCK_N)
    chosen = batch * groups + group
    keys, place = columns, columns
    pages, pages_1 = columns, columns
    page, page_1, page_2 = columns, columns, columns
    if PAGE:
        page, place = page_places(low, columns, PAGE, BLOCK_N)
        page_1, place = page_places(low + BLOCK_N, columns, PAGE, BLOCK_N)
        page_2, place = page_places(low + 2 * BLOCK_N, columns, PAGE, BLOCK_N)
        if SELECTED:
            page = picked_pages(page, chosen, selected_blocks_ptr, selected_width)
            page_1 = picked_pages(page_1, chosen, selected_blocks_ptr, selected_width)
            page_2 = picked_pages(page_2, chosen, selected_blocks_ptr, selected_width)
        pages = pool_pages(page, T, batch, block_table_ptr, block_table_width, PAGE)
        pages_1 = pool_pages(page_1, T, batch, block_table_ptr, block_table_width, PAGE)
    for start in range(low, high, BLOCK_N):
        keys = start + columns
        if PAGE:
            listed, place = page_places(start, columns, PAGE, BLOCK_N)
        if SELECTED:
            keys = keys_of_pages(page, place, T, PAGE)
        present = keys < T
        k_offsets, v_offsets = key_offsets(
            keys, place, pages, batch, ring_start_ptr,
            k_stride_b, k_stride_t, v_stride_b, v_stride_t, RING, PAGE, KV_BITS,
        )  # fmt: skip
        k_rows = k_head + k_offsets[:, None]
        v_rows = v_head + v_offsets[:, None]

        if KV_BITS == 16:
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
            True, CAUSAL, WINDOW, CHUNK, PADDING_MASK,
        )  # fmt: skip
        if PAGE_MAX:
            where = (batch_64 * H + head) * S + token
            page_maxima(
                scores, unit, page_max_ptr, where, real, start, page_slots,
                BLOCK_M, BLOCK_N, PAGE, SELECTED,
            )  # fmt: skip

        weights, shrink, top, total = softmax_step(scores, unit, top, total)
        if KV_BITS == 16:
            weights = weights.to(TYPE)
            value0 = tl.load(v_rows + v0[None, :], mask=present[:, None], other=0.0)
            sum0 = tl.dot(weights, value0, sum0 * shrink[:, None])
            if V1:
                value1 = tl.load(
                    v_rows + v1[None, :],
                    mask=present[:, None] & (v1 < VALUE_DIM)[None, :],
                    other=0.0,
                )
                sum1 = tl.dot(weights, value1, sum1 * shrink[:, None])
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

        if PAGE:
            # The maxima change nothing: Triton pipelines no loop that hands a value on as it is.
            pages = tl.maximum(pages_1, 0)
            pages_1 = pool_pages(page_2, T, batch, block_table_ptr, block_table_width, PAGE)
            listed, place = page_places(start + 3 * BLOCK_N, columns, PAGE, BLOCK_N)
            page, page_1, page_2 = tl.maximum(page_1, -1), tl.maximum(page_2, -1), listed
            if SELECTED:
                page_2 = picked_pages(listed, chosen, selected_blocks_ptr, selected_width)

    if KV_BITS < 16:
        sum0 -= less[:, None]
        if V1:
            sum1 -= less[:, None]
    some, total, factor = shares(total)
    where = ((batch_64 * H + head) * S + token) * splits + split
    part_rows = part_ptr + where[:, None] * VALUE_DIM
    tl.store(part_rows + v0[None, :], sum0 * factor[:, None], mask=real[:, None])
    if V1:
        inside = (v1 < VALUE_DIM)[None, :]
        tl.store(part_rows + v1[None, :], sum1 * factor[:, None], mask=real[:, None] & inside)
    lse = tl.where(some, top + tl.log2(total), float("-inf"))
    tl.store(part_lse_ptr + where, lse, mask=real)


@triton.jit(do_not_specialize=["S"])
def attention_merge(
    part_ptr,  # fp32 [B, H, S, splits, VALUE_DIM]
    part_lse_ptr,  # fp32 [B, H, S, splits], to base 2
    sinks_ptr,  # fp32 [H]
    out_ptr,  # [B, H, S, VALUE_DIM], by strides
    lse_ptr,  # fp32 [B, H, S], contiguous
    o_stride_b, o_stride_h, o_stride_s,
    S, H,
    splits,
    VALUE_DIM: tl.constexpr,
    SLOTS: tl.constexpr,  # the power of two from `splits` up
    BLOCK_V: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    token, head, batch = row % S, row // S % H, row // S // H
    index = tl.arange(0, SLOTS)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    known = index < splits
    lse = tl.load(part_lse_ptr + row * splits + index, mask=known, other=float("-inf"))
    parts = tl.load(
        part_ptr + (row * splits + index)[:, None] * VALUE_DIM + columns[None, :],
        mask=known[:, None] & (columns < VALUE_DIM)[None, :],
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
    some, total, factor = shares(total)
    out = tl.sum(parts * weights[:, None], 0) * factor
    out_row = out_ptr + batch * o_stride_b + head * o_stride_h + token * o_stride_s
    tl.store(out_row + columns, out.to(out_ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    if LSE:
        if tl.program_id(1) == 0:
            whole = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
            tl.store(lse_ptr + row, whole)
