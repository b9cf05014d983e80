"""Tiled attention of many query tokens for Ascend, in the Triton that triton-ascend 3.2 takes.

One program runs on each cube core and walks over tasks: BLOCK_M query rows of one head. Keys and
values are walked in two levels (FastAttention, arXiv 2410.16663, two-level tiling). A block of
BLOCK_KV keys is one round between the cube and the vector cores: its scores all come before its
one maximum, its weighted values are summed up on the cube, and what has been summed so far is
rescaled once. Inside a round, blocks of BLOCK_N keys are what one product and the temporaries of
one softmax hold in the buffers on the chip. At the edges of what a row sees, rounds are of one
small block.

Which keys a row sees is looked up rather than compared (the same paper's tiling-mask): windows
of one upper triangular table, at clamped shifts; see runtime/tiling_mask.py.

Addresses are plain pointer arithmetic, each tile contiguous along its last axis. The same source
runs under the interpreter of upstream Triton.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The running maximum starts here rather than at -inf: differences to it stay finite, and a row
# that sees no key ends with the sum 0.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
# Added to a score that is not seen. Far below LOWEST, so that its weight is 0 even where a row
# has seen nothing yet; finite, since the table's zeros are multiplied by it.
UNSEEN: tl.constexpr = tl.constexpr(-1.0e38)


@triton.jit
def load_tile(
    rows_ptr,  # the tile's first element
    stride,  # from a row to the next
    left,  # rows there are
    SIZE: tl.constexpr,  # columns there are
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CUT: tl.constexpr,  # whether rows may be missing
):
    """Return [ROWS, COLUMNS], 0 where there is nothing."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    pointers = rows_ptr + row[:, None] * stride + column[None, :]
    if CUT and SIZE < COLUMNS:
        return tl.load(pointers, mask=(row < left)[:, None] & (column < SIZE)[None, :], other=0.0)
    if CUT:
        return tl.load(pointers, mask=(row < left)[:, None], other=0.0)
    if SIZE < COLUMNS:
        return tl.load(pointers, mask=(column < SIZE)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def block_scores(
    q,  # [BLOCK_M, HEAD_TILE]
    k_rows,  # the block's first key
    k_stride_t,
    mask_ptr,
    token,  # the block's first element of the key mask
    left,  # keys from the block's first to the last
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDING_MASK: tl.constexpr,
    CUT: tl.constexpr,
):
    """Return the exponents to base 2 of one small block, fp32 [BLOCK_M, BLOCK_N]."""
    # Loaded as it lies and transposed on the way to the matrix unit: loaded transposed, every
    # element would be a transfer of its own.
    k = load_tile(k_rows, k_stride_t, left, HEAD_DIM, BLOCK_N, HEAD_TILE, CUT)
    scores = tl.dot(q, tl.trans(k))
    if SOFTCAP > 0:
        # cap tanh(x / cap), by tanh(y) = 1 - 2 / (exp(2 y) + 1).
        scores = scores * (scale * 2.0 * LOG2E / SOFTCAP)
        scores = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    else:
        scores = scores * (scale * LOG2E)
    if PADDING_MASK:
        # Of one row alone: the only compare there is.
        key = tl.arange(0, BLOCK_N)
        token = tl.load(mask_ptr + token + key, mask=key < left, other=0)
        scores += tl.where(token != 0, 0.0, UNSEEN)[None, :]
    return scores


@triton.jit
def table_window(
    table_ptr,
    delta,
    HEADS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return, fp32 [BLOCK_M, BLOCK_N], 1 where column > row // HEADS + delta and else 0."""
    row = min(max(delta, 0), BLOCK_N) * HEADS
    column = min(max(-delta, 0), BLOCK_M)
    corner = table_ptr + row * (2 * M) + column
    return load_tile(corner, 2 * M, 0, BLOCK_N, BLOCK_M, BLOCK_N, False).to(tl.float32)


@triton.jit
def stretches(
    first_position,  # the key at which the tile's first row stands
    last_position,
    keys,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return low, inner_low, inner_high, high: which keys the rows of a tile see.

    Keys from `low` up to `high` are walked, the rest is seen by no row. Between the inner two,
    which are whole blocks, every row sees every key.
    """
    low = 0
    high = keys
    inner_low = 0
    inner_high = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = min(high, max(last_position + 1, 0))
        inner_high = min(inner_high, max(first_position + 1, 0) // BLOCK_N * BLOCK_N)
    if WINDOW:
        low = max(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        inner_low = tl.cdiv(max(last_position - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
    inner_low = min(max(inner_low, low), high)
    inner_high = min(max(inner_high, inner_low), high)
    return low, inner_low, inner_high, high


@triton.jit
def walk_keys(
    q,  # [BLOCK_M, HEAD_TILE]: of each token the HEADS query heads that share the keys
    k_head,  # key 0 of the row and key head
    v_head,
    table_ptr,
    mask_ptr,
    mask_row,  # the key mask's element of key 0
    top,  # fp32 [BLOCK_M]: the largest exponent so far
    total,  # fp32 [BLOCK_M]: the sum of weights so far
    summed,  # fp32 [BLOCK_M, VALUE_TILE]: the weighted sum of values so far
    low, inner_low, inner_high, high,  # of `stretches`
    first_position,
    keys,
    k_stride_t, v_stride_t,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDING_MASK: tl.constexpr,
):  # fmt: skip
    """Return top, total and summed after the keys from `low` up to `high`.

    Of the inner keys as much as whole rounds hold, up to `wide`, is walked in rounds of BLOCK_KV.
    """
    wide = inner_low + (inner_high - inner_low) // BLOCK_KV * BLOCK_KV

    # Four stretches: the left edge, whole rounds, whole small blocks, the right edge.
    for part in tl.static_range(0 if WINDOW else 1, 4):
        if part == 0:
            begin, end = low, inner_low
        elif part == 1:
            begin, end = inner_low, wide
        elif part == 2:
            begin, end = wide, inner_high
        else:
            begin, end = inner_high, high
        if part != 2 or BLOCK_KV > BLOCK_N:
            for start in range(begin, end, BLOCK_KV if part == 1 else BLOCK_N):
                left = keys - start
                k_rows = k_head + tl.cast(start, tl.int64) * k_stride_t
                v_rows = v_head + tl.cast(start, tl.int64) * v_stride_t
                token = mask_row + start
                scores0 = block_scores(
                    q, k_rows, k_stride_t, mask_ptr, token, left, scale,
                    HEAD_DIM, HEAD_TILE, BLOCK_N, SOFTCAP, PADDING_MASK, part == 0 or part == 3,
                )  # fmt: skip
                if part == 0 or part == 3:
                    if CAUSAL:
                        upper = table_window(
                            table_ptr, first_position - start, HEADS, M, BLOCK_M, BLOCK_N
                        )
                        scores0 += upper * UNSEEN
                    if WINDOW:
                        # The same table, read the other way: 1 is what the window holds.
                        lower = table_window(
                            table_ptr, first_position - WINDOW - start, HEADS, M, BLOCK_M, BLOCK_N
                        )
                        scores0 += (1.0 - lower) * UNSEEN
                    if not PADDING_MASK:
                        # The end of the keys is a row of the table.
                        table_row = table_ptr + min(left - 1, BLOCK_N) * (HEADS * 2 * M)
                        cut = tl.load(table_row + tl.arange(0, BLOCK_N)).to(tl.float32)
                        scores0 += (cut * UNSEEN)[None, :]
                raised = tl.maximum(top, tl.max(scores0, 1))
                if part == 1 and BLOCK_KV > BLOCK_N:
                    scores1 = block_scores(
                        q, k_rows + BLOCK_N * k_stride_t, k_stride_t,
                        mask_ptr, token + BLOCK_N, left - BLOCK_N, scale,
                        HEAD_DIM, HEAD_TILE, BLOCK_N, SOFTCAP, PADDING_MASK, False,
                    )  # fmt: skip
                    raised = tl.maximum(raised, tl.max(scores1, 1))
                if part == 1 and BLOCK_KV > 2 * BLOCK_N:
                    scores2 = block_scores(
                        q, k_rows + 2 * BLOCK_N * k_stride_t, k_stride_t,
                        mask_ptr, token + 2 * BLOCK_N, left - 2 * BLOCK_N, scale,
                        HEAD_DIM, HEAD_TILE, BLOCK_N, SOFTCAP, PADDING_MASK, False,
                    )  # fmt: skip
                    raised = tl.maximum(raised, tl.max(scores2, 1))
                    scores3 = block_scores(
                        q, k_rows + 3 * BLOCK_N * k_stride_t, k_stride_t,
                        mask_ptr, token + 3 * BLOCK_N, left - 3 * BLOCK_N, scale,
                        HEAD_DIM, HEAD_TILE, BLOCK_N, SOFTCAP, PADDING_MASK, False,
                    )  # fmt: skip
                    raised = tl.maximum(raised, tl.max(scores3, 1))
                shrink = tl.exp2(top - raised)
                top = raised

                weights = tl.exp2(scores0 - raised[:, None])
                total = total * shrink + tl.sum(weights, 1)
                value = load_tile(
                    v_rows,
                    v_stride_t,
                    left,
                    VALUE_DIM,
                    BLOCK_N,
                    VALUE_TILE,
                    part == 0 or part == 3,
                )
                added = tl.dot(weights.to(v_head.dtype.element_ty), value)
                if part == 1 and BLOCK_KV > BLOCK_N:
                    weights = tl.exp2(scores1 - raised[:, None])
                    total += tl.sum(weights, 1)
                    v_rows += BLOCK_N * v_stride_t
                    value = load_tile(
                        v_rows, v_stride_t, left, VALUE_DIM, BLOCK_N, VALUE_TILE, False
                    )
                    added = tl.dot(weights.to(v_head.dtype.element_ty), value, added)
                if part == 1 and BLOCK_KV > 2 * BLOCK_N:
                    weights = tl.exp2(scores2 - raised[:, None])
                    total += tl.sum(weights, 1)
                    v_rows += BLOCK_N * v_stride_t
                    value = load_tile(
                        v_rows, v_stride_t, left, VALUE_DIM, BLOCK_N, VALUE_TILE, False
                    )
                    added = tl.dot(weights.to(v_head.dtype.element_ty), value, added)
                    weights = tl.exp2(scores3 - raised[:, None])
                    total += tl.sum(weights, 1)
                    v_rows += BLOCK_N * v_stride_t
                    value = load_tile(
                        v_rows, v_stride_t, left, VALUE_DIM, BLOCK_N, VALUE_TILE, False
                    )
                    added = tl.dot(weights.to(v_head.dtype.element_ty), value, added)
                summed = summed * shrink[:, None] + added
    return top, total, summed


@triton.jit
def ascend_prefill(
    q_ptr,  # [B, H, S, HEAD_DIM], by strides
    k_ptr,  # [B, G, T, HEAD_DIM]
    v_ptr,  # [B, G, T, VALUE_DIM]
    out_ptr,  # [B, H, S, VALUE_DIM]
    lse_ptr,  # fp32 [B, H, S], contiguous: natural logarithm of the sum of exponentials
    table_ptr,  # fp16 [2 M, 2 M], contiguous: 1 above the diagonal, else 0
    mask_ptr,  # int8 [B, T], contiguous: nonzero at real keys
    sinks_ptr,  # fp32 [H]
    kv_lens_ptr,  # int32 [B]: keys of each row, where they are fewer than T
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    o_stride_b, o_stride_h, o_stride_s,
    B, S, T, H,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,  # the power of two that holds HEAD_DIM
    VALUE_TILE: tl.constexpr,  # the same for VALUE_DIM
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_KV: tl.constexpr,  # 1, 2 or 4 times BLOCK_N
    M: tl.constexpr,  # half a side of the table, at least BLOCK_M and BLOCK_N
    CAUSAL: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDING_MASK: tl.constexpr,
    SINKS: tl.constexpr,
    KV_LENS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_M)
    for task in range(tl.program_id(0), blocks * B * H, tl.num_programs(0)):
        # The last rows of a causal attention see the most keys: they start first. Tasks side by
        # side, which run at the same time, are the same rows of different heads.
        block = blocks - 1 - task // (B * H)
        batch = task // H % B
        head = task % H
        group = head // GROUP
        keys = T
        if KV_LENS:
            keys = min(T, tl.load(kv_lens_ptr + batch))
        first_row = block * BLOCK_M
        rows_left = S - first_row
        # Query i stands at key i + shift.
        shift = 0 if TOP_LEFT else keys - S
        first_position = first_row + shift
        last_position = first_position + BLOCK_M - 1

        q_rows = (
            q_ptr + tl.cast(batch, tl.int64) * q_stride_b + tl.cast(head, tl.int64) * q_stride_h
        )
        q_rows += tl.cast(first_row, tl.int64) * q_stride_s
        q = load_tile(q_rows, q_stride_s, rows_left, HEAD_DIM, BLOCK_M, HEAD_TILE, True)
        k_head = (
            k_ptr + tl.cast(batch, tl.int64) * k_stride_b + tl.cast(group, tl.int64) * k_stride_h
        )
        v_head = (
            v_ptr + tl.cast(batch, tl.int64) * v_stride_b + tl.cast(group, tl.int64) * v_stride_h
        )
        mask_row = tl.cast(batch, tl.int64) * T

        total = tl.zeros([BLOCK_M], tl.float32)
        if SINKS:
            top = total + tl.load(sinks_ptr + head) * LOG2E
            total += 1.0
        else:
            top = tl.full([BLOCK_M], LOWEST, tl.float32)
        # A zero that hangs on the task: the compiler keeps a constant tile in the unified buffer
        # through the whole kernel, beside the one that it is copied to.
        summed = tl.zeros([BLOCK_M, VALUE_TILE], tl.float32) + tl.cast(task, tl.float32) * 0.0

        low, inner_low, inner_high, high = stretches(
            first_position, last_position, keys, BLOCK_N, CAUSAL, WINDOW
        )
        top, total, summed = walk_keys(
            q, k_head, v_head, table_ptr, mask_ptr, mask_row, top, total, summed,
            low, inner_low, inner_high, high, first_position, keys, k_stride_t, v_stride_t, scale,
            HEAD_DIM, VALUE_DIM, HEAD_TILE, VALUE_TILE, 1, BLOCK_M, BLOCK_N, BLOCK_KV, M,
            CAUSAL, WINDOW, SOFTCAP, PADDING_MASK,
        )  # fmt: skip

        # A row that saw no key has a sum of 0.
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        factor = tl.where(some, 1.0 / total, 0.0)
        row = tl.arange(0, BLOCK_M)
        out_rows = (
            out_ptr + tl.cast(batch, tl.int64) * o_stride_b + tl.cast(head, tl.int64) * o_stride_h
        )
        out_rows += tl.cast(first_row, tl.int64) * o_stride_s
        column = tl.arange(0, VALUE_TILE)
        out = (summed * factor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(
            out_rows + row[:, None] * o_stride_s + column[None, :], out,
            mask=(row < rows_left)[:, None] & (column < VALUE_DIM)[None, :],
        )  # fmt: skip
        if LSE:
            lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
            lse_row = lse_ptr + (tl.cast(batch, tl.int64) * H + head) * S + first_row
            tl.store(lse_row + row, lse, mask=row < rows_left)
