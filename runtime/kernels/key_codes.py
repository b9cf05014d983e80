"""Keys in few bits, in Triton: what a token's query gives each page, and the code of a new key.

Codes are those of `graphopt.ir.kv_policies.key_codes`: of a token C bytes with two features of 4
bits each, and C with four of 2 bits; feature n C + j of a part is in byte j, from bit n b on.
Programs are counted by key heads, as in `kv_selection`.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.kv_selection import begin_early

LOW_PART: tl.constexpr = tl.constexpr(2048.0)
"""What is left of a number in 16 bits is multiplied by, so that it has all of its bits there."""


@triton.jit
def part_scores(
    scores,  # fp32 [HEADS, TOKENS]: what is added to
    q_rows,  # [HEADS, 1]: where rows of queries are
    order_row,
    scale_row,
    code_places,  # [TOKENS, 1]: where codes are
    inside,  # [TOKENS, 1]
    real,  # [HEADS, 1]
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    START: tl.constexpr,  # the part's first feature, in the order
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    C0: tl.constexpr,  # the power of two from C up, and 16 or more
):
    """Add what the features of one part give: queries times scales, times their levels."""
    byte = tl.arange(0, C0)
    held = byte < C
    first_byte = 0 if START == 0 else C
    codes = tl.load(
        code_places + first_byte + byte[None, :], mask=inside & held[None, :], other=0
    ).to(tl.int32)
    for n in tl.static_range(0, 8 // BITS):
        feature = tl.load(order_row + START + n * C + byte, mask=held, other=HEAD_DIM)
        some = held & (feature < HEAD_DIM)
        q = tl.load(q_rows + feature[None, :], mask=real & some[None, :], other=0.0).to(tl.float32)
        q *= tl.load(scale_row + feature, mask=some, other=0.0)[None, :] * STEP
        # Levels are exact in 16 bits; queries are two numbers of 16 bits, of a common size.
        most = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)[:, None]
        q = q / most
        high = q.to(tl.float16)
        low = ((q - high.to(tl.float32)) * LOW_PART).to(tl.float16)
        level = ((codes >> (BITS * n)) & (2**BITS - 1)).to(tl.float32) - (2**BITS - 1) / 2
        level = tl.trans(level.to(tl.float16))
        found = tl.dot(low, level) / LOW_PART
        scores += (tl.dot(high, level) + found) * most
    return scores


@triton.jit(do_not_specialize=["pages"])
def code_scores(
    q_ptr,  # [B, H, 1, HEAD_DIM], by strides
    codes_ptr,  # uint8 [B, G, width, PAGE 2 C], by strides
    order_ptr,  # int64 [B, G, 6 C], contiguous
    centre_ptr,  # fp32 [B, G, 8 C], contiguous
    scale_ptr,  # the same
    first_ptr,  # int64 [B]: slot of a row's first key
    last_ptr,  # int64 [B]: slot of its last one, of which no code is there
    out_ptr,  # fp32 [B, G, GROUP, pages], contiguous
    scale,
    q_stride_b, q_stride_h,
    codes_stride_b, codes_stride_g, codes_stride_n,
    G, pages,
    PAGE: tl.constexpr,
    SLOTS: tl.constexpr,  # the power of two from PAGE up
    BLOCK: tl.constexpr,  # pages
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,  # the power of two from HEAD_DIM up
    C: tl.constexpr,
    C0: tl.constexpr,
    STEP4: tl.constexpr,
    STEP2: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # the power of two from GROUP up, and 16 or more
    SOFTCAP: tl.constexpr,  # 0 for none
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write each query head's log-sum-exp of the scores that the codes of a page give.

    What centres give is the same for all tokens, and matters under a cap alone.
    """
    if OVERLAP:
        begin_early()
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    first, last = tl.load(first_ptr + batch), tl.load(last_ptr + batch)
    token = tl.arange(0, BLOCK * SLOTS)
    number = tl.program_id(1).to(tl.int64) * BLOCK + token // SLOTS
    slot = number * PAGE + token % SLOTS
    known = (token % SLOTS < PAGE) & (number < pages) & (slot >= first) & (slot < last)
    places = codes_ptr + batch * codes_stride_b + group * codes_stride_g
    places += (number * codes_stride_n + (token % SLOTS) * (2 * C))[:, None]
    head = tl.arange(0, HEADS)
    real = (head < GROUP)[:, None]
    q_rows = q_ptr + batch * q_stride_b + (group * GROUP + head.to(tl.int64))[:, None] * q_stride_h
    order_row = order_ptr + row.to(tl.int64) * (6 * C)
    scale_row = scale_ptr + row.to(tl.int64) * (8 * C)
    scores = tl.zeros([HEADS, BLOCK * SLOTS], tl.float32)
    inside = known[:, None]
    scores = part_scores(
        scores, q_rows, order_row, scale_row, places, inside, real, STEP4, 4, 0, HEAD_DIM, C, C0
    )
    scores = part_scores(
        scores, q_rows, order_row, scale_row, places, inside, real, STEP2, 2, 2 * C, HEAD_DIM, C, C0
    )
    if SOFTCAP > 0:
        d = tl.arange(0, D0)
        held = d < HEAD_DIM
        q = tl.load(q_rows + d[None, :], mask=real & held[None, :], other=0.0).to(tl.float32)
        centre = tl.load(centre_ptr + row.to(tl.int64) * (8 * C) + d, mask=held, other=0.0)
        scores = (scores + tl.sum(q * centre[None, :], 1)[:, None]) * scale
        scores = SOFTCAP * (2.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * scores)) - 1.0)
    else:
        scores *= scale
    scores = tl.where(known[None, :], scores, float("-inf"))
    scores = tl.reshape(scores, [HEADS, BLOCK, SLOTS])
    most = tl.max(scores, 2)
    base = tl.maximum(most, -3.4028234663852886e38)  # of a page without a known token
    total = tl.sum(tl.exp(scores - base[:, :, None]), 2)
    found = tl.where(most > float("-inf"), base + tl.log(tl.maximum(total, 1e-30)), float("-inf"))
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = out_ptr + (row.to(tl.int64) * GROUP + head.to(tl.int64))[:, None] * pages
    tl.store(rows + page[None, :], found, mask=real & (page < pages)[None, :])


@triton.jit
def part_codes(
    k_row,
    order_row,
    centre_row,
    scale_row,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    START: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    C0: tl.constexpr,
):
    """Return the bytes of one part of a key, int32 [C0]."""
    byte = tl.arange(0, C0)
    held = byte < C
    made = tl.zeros([C0], tl.int32)
    for n in tl.static_range(0, 8 // BITS):
        feature = tl.load(order_row + START + n * C + byte, mask=held, other=0)
        some = held & (feature < HEAD_DIM)
        k = tl.load(k_row + feature, mask=some, other=0.0).to(tl.float32)
        centre = tl.load(centre_row + feature, mask=held, other=0.0)
        scale = tl.maximum(
            tl.load(scale_row + feature, mask=held, other=1.0), 1.1754943508222875e-38
        )
        x = tl.floor(tl.div_rn(tl.div_rn(k - centre, scale), STEP) + 2 ** (BITS - 1))
        x = tl.where(x == x, x, 0.0)
        code = tl.minimum(tl.maximum(x, 0.0), 2**BITS - 1).to(tl.int32)
        made |= code << (BITS * n)
    return made


@triton.jit
def extend_codes(
    k_ptr,  # [B, G, 1, HEAD_DIM], by strides: the new key
    codes_ptr,  # uint8 [B, G, width, PAGE 2 C], by strides
    order_ptr,  # int64 [B, G, 6 C], contiguous
    centre_ptr,  # fp32 [B, G, 8 C], contiguous
    scale_ptr,  # the same
    last_ptr,  # int64 [B]: slot of the new key
    k_stride_b, k_stride_g,
    codes_stride_b, codes_stride_g, codes_stride_n,
    G,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    C: tl.constexpr,
    C0: tl.constexpr,
    STEP4: tl.constexpr,
    STEP2: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the code of a new key."""
    if OVERLAP:
        begin_early()
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    slot = tl.maximum(tl.load(last_ptr + batch), 0)
    k_row = k_ptr + batch * k_stride_b + group * k_stride_g
    order_row = order_ptr + row.to(tl.int64) * (6 * C)
    centre_row = centre_ptr + row.to(tl.int64) * (8 * C)
    scale_row = scale_ptr + row.to(tl.int64) * (8 * C)
    place = codes_ptr + batch * codes_stride_b + group * codes_stride_g
    place += (slot // PAGE) * codes_stride_n + (slot % PAGE) * (2 * C)
    byte = tl.arange(0, C0)
    four = part_codes(k_row, order_row, centre_row, scale_row, STEP4, 4, 0, HEAD_DIM, C, C0)
    tl.store(place + byte, four.to(tl.uint8), mask=byte < C)
    two = part_codes(k_row, order_row, centre_row, scale_row, STEP2, 2, 2 * C, HEAD_DIM, C, C0)
    tl.store(place + C + byte, two.to(tl.uint8), mask=byte < C)
