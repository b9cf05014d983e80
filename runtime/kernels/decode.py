"""Attention of few query tokens over a long cache, in Triton: keys split over many programs.

One program reads one span of the keys of one key head, once, for all query heads that share it.
A second kernel merges the spans by their log-sum-exp (flash-decoding: O = sum of
exp(lse_i - lse) O_i). A span's length hangs on the number of keys alone, so that a row's result
is the same bit for bit whatever else is in the batch.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The running maximum starts here rather than at -inf: differences to it stay finite, and a row
# that sees no key ends with the sum 0.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def span_length(keys, splits, BLOCK_N: tl.constexpr):
    """Return how many keys a program reads: a multiple of BLOCK_N, so that `splits` suffice."""
    return tl.cdiv(tl.cdiv(keys, splits), BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=["S", "T", "table_width", "pages_width", "page_slots"])
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
    place_ptr,  # int32 [B, T], contiguous: ALiBi position of every key
    lengths_ptr,  # int32 [B]: keys of each row, where they are fewer than T
    table_ptr,  # int32 [B, table_width]: page of the pool that holds a page of the sequence
    pages_ptr,  # int32 [B, pages_width]: the pages that are read, ascending, -1 behind the last
    first_ptr,  # int32 [B]: ring slot of key 0
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    bias_stride_b, bias_stride_h, bias_stride_s, bias_stride_t,
    table_width, pages_width, page_slots,
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
    KEY_MASK: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    LENGTHS: tl.constexpr,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    PAGE_MAX: tl.constexpr,
    OVERLAP: tl.constexpr,  # the merge may be launched while this runs, and waits for its end
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    split, splits = tl.program_id(0), tl.num_programs(0)
    groups = H // GROUP
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    batch_64, group_64 = batch.to(tl.int64), group.to(tl.int64)
    capacity = T
    if LENGTHS:
        T = tl.load(lengths_ptr + batch)
    walked = T
    if SELECTED:
        walked = pages_width * PAGE
    span = span_length(walked, splits, BLOCK_N)
    low = split * span
    high = min(low + span, walked)

    # Rows are the query heads of the group, token after token.
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < S * GROUP
    token = rows // GROUP
    head = group * GROUP + rows % GROUP
    shift = 0 if TOP_LEFT else T - S
    places = token + shift
    if (CAUSAL and not TOP_LEFT) and (WINDOW and not SELECTED):
        # Blocks that no row's window reaches are not read.
        low = max(low, max(shift - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)

    # What a score is times to be an exponent to base 2; where something is added to it, it
    # already is one. Multiplied with the maximum's subtraction, in one rounding.
    unit = 1.0 if (SOFTCAP > 0 or ALIBI) or BIAS else scale * LOG2E

    q_rows = q_ptr + batch_64 * q_stride_b + head.to(tl.int64) * q_stride_h + token * q_stride_s
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
    if ALIBI:
        slope = tl.load(slopes_ptr + head, mask=real, other=0.0) * LOG2E

    k_head = k_ptr + group_64 * k_stride_h
    v_head = v_ptr + group_64 * v_stride_h
    if not PAGE:
        k_head += batch_64 * k_stride_b
        v_head += batch_64 * v_stride_b

    for start in range(low, high, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        keys = slots
        if SELECTED:
            picked = slots // PAGE
            page = tl.load(
                pages_ptr + batch * pages_width + picked, mask=picked < pages_width, other=-1
            )
            keys = tl.where(page < 0, T, page * PAGE + slots % PAGE)
        present = keys < T
        held = keys.to(tl.int64)
        k_rows, v_rows = k_head + held * k_stride_t, v_head + held * v_stride_t
        if RING:
            slot = tl.load(first_ptr + batch) + keys
            held = tl.where(slot >= RING, slot - RING, slot).to(tl.int64)
            k_rows, v_rows = k_head + held * k_stride_t, v_head + held * v_stride_t
        if PAGE:
            pool = tl.load(
                table_ptr + batch * table_width + keys // PAGE, mask=present, other=0
            ).to(tl.int64)
            offset = (keys % PAGE).to(tl.int64)
            k_rows = k_head + pool * k_stride_b + offset * k_stride_t
            v_rows = v_head + pool * v_stride_b + offset * v_stride_t

        k0 = tl.load(k_rows[:, None] + d0[None, :], mask=present[:, None], other=0.0)
        scores = tl.dot(q0, tl.trans(k0))
        if D1:
            k1 = tl.load(
                k_rows[:, None] + d1[None, :],
                mask=present[:, None] & (d1 < HEAD_DIM)[None, :],
                other=0.0,
            )
            scores = tl.dot(q1, tl.trans(k1), scores)

        if SOFTCAP > 0:
            # cap tanh(x / cap), by tanh(y) = 1 - 2 / (exp(2 y) + 1).
            scores = scores * (scale * 2.0 * LOG2E / SOFTCAP)
            scores = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        elif ALIBI or BIAS:
            scores = scores * (scale * LOG2E)
        if ALIBI:
            place = tl.load(place_ptr + batch * capacity + keys, mask=present, other=0)
            scores += slope[:, None] * place.to(tl.float32)[None, :]
        if BIAS:
            bias_rows = bias_ptr + batch_64 * bias_stride_b + head * bias_stride_h
            bias_rows += token * bias_stride_s
            added = tl.load(
                bias_rows[:, None] + keys[None, :] * bias_stride_t,
                mask=real[:, None] & present[None, :],
                other=0.0,
            )
            scores += added.to(tl.float32) * LOG2E
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= places[:, None])
        if WINDOW:
            seen = seen & (keys[None, :] > places[:, None] - WINDOW)
        if CHUNK:
            seen = seen & (keys[None, :] // CHUNK == places[:, None] // CHUNK)
        if KEY_MASK:
            known = tl.load(mask_ptr + batch * capacity + keys, mask=present, other=0)
            seen = seen & (known != 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))

        if PAGE_MAX:
            # BLOCK_N is a multiple of the page, or divides it.
            SPAN: tl.constexpr = PAGE if PAGE < BLOCK_N else BLOCK_N
            parts = tl.reshape(scores, [BLOCK_M, BLOCK_N // SPAN, SPAN])
            largest = tl.max(parts, 2) * (unit * LN2)
            place_of = start // PAGE + tl.arange(0, BLOCK_N // SPAN)
            where = (batch_64 * H + head) * S + token
            tl.atomic_max(
                page_max_ptr + where[:, None] * page_slots + place_of[None, :],
                largest,
                mask=real[:, None] & (place_of < page_slots)[None, :],
                sem="relaxed",
            )

        raised = tl.maximum(top, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit - raised[:, None])
        shrink = tl.exp2(top - raised)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(v_ptr.dtype.element_ty)
        value0 = tl.load(v_rows[:, None] + v0[None, :], mask=present[:, None], other=0.0)
        sum0 = tl.dot(weights, value0, sum0 * shrink[:, None])
        if V1:
            value1 = tl.load(
                v_rows[:, None] + v1[None, :],
                mask=present[:, None] & (v1 < VALUE_DIM)[None, :],
                other=0.0,
            )
            sum1 = tl.dot(weights, value1, sum1 * shrink[:, None])
        top = raised

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    factor = tl.where(some, 1.0 / total, 0.0)
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
    SPLITS: tl.constexpr,  # the power of two from `splits` up
    BLOCK_V: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    token, head, batch = row % S, row // S % H, row // S // H
    index = tl.arange(0, SPLITS)
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
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    out = tl.sum(parts * weights[:, None], 0) * tl.where(some, 1.0 / total, 0.0)
    out_row = out_ptr + batch * o_stride_b + head * o_stride_h + token * o_stride_s
    tl.store(out_row + columns, out.to(out_ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    if LSE:
        if tl.program_id(1) == 0:
            whole = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
            tl.store(lse_ptr + row, whole)
