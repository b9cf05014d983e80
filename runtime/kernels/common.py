"""What the prefill and the decode kernel have in common: keys, scores, and the running softmax.

Every function here is inlined where it is called.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The running maximum starts here rather than at -inf: differences to it stay finite, and a row
# that sees no key ends with the sum 0.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def page_places(start, columns, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which page each slot of a block lies in, and where in it.

    The page is one number where the block lies in one page, and both are the same in every block
    where pages divide it, but for the first page: that costs a loop less.

    Args:
        start: The block's first slot, a multiple of BLOCK_N.
        columns: 0 to BLOCK_N - 1.
    """
    if PAGE % BLOCK_N == 0:
        page = start // PAGE
        place = start % PAGE + columns
    elif BLOCK_N % PAGE == 0:
        page = start // PAGE + columns // PAGE
        place = columns % PAGE
    else:
        page = (start + columns) // PAGE
        place = (start + columns) % PAGE
    return page, place


@triton.jit
def picked_pages(
    listed,  # one or [BLOCK_N]: which pages of a list
    row,  # which list
    selected_blocks_ptr,
    selected_width,
):
    """Return the pages that are listed, int32; -1 for none, and 2^30 for any number above it."""
    page_ptrs = selected_blocks_ptr + row * selected_width + listed
    page = tl.load(page_ptrs, mask=listed < selected_width, other=-1)
    return tl.minimum(tl.maximum(page, -1), 1 << 30).to(tl.int32)


@triton.jit
def pool_pages(
    page,  # one or [BLOCK_N], -1 for none
    T,
    batch,
    block_table_ptr,
    block_table_width,
    PAGE: tl.constexpr,
):
    """Return where in the pool pages lie; 0 for what holds no key."""
    page_ptrs = block_table_ptr + batch * block_table_width + page
    return tl.load(page_ptrs, mask=(page >= 0) & (page < tl.cdiv(T, PAGE)), other=0)


@triton.jit
def keys_of_pages(
    page,  # one or [BLOCK_N], -1 for none
    place,  # [BLOCK_N]
    T,
    PAGE: tl.constexpr,
):
    """Return the keys at places of pages; of no page, T, which is no key."""
    known = (page >= 0) & (page < tl.cdiv(T, PAGE))
    return tl.where(known, page * PAGE, T) + tl.where(known, place, 0)


@triton.jit
def key_offsets(
    keys,  # [BLOCK_N]
    place,  # [BLOCK_N]: `page_places`, where there are pages
    pages,  # one or [BLOCK_N]: `pool_pages`
    batch,
    ring_start_ptr,
    k_stride_b,
    k_stride_t,
    v_stride_b,
    v_stride_t,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    KV_BITS: tl.constexpr,
):
    """Return how far each key, and each value, lies behind the first of its head."""
    held = keys.to(tl.int64)
    if RING:
        slot = tl.load(ring_start_ptr + batch) + keys
        held = tl.where(slot >= RING, slot - RING, slot).to(tl.int64)
    # Rows begin at multiples of 16 bytes, which Triton does not see of a stride of 72.
    EACH: tl.constexpr = 8 + 8 * (KV_BITS < 16)
    if PAGE:
        held = place.to(tl.int64)
        k_page, v_page = pages.to(tl.int64) * k_stride_b, pages.to(tl.int64) * v_stride_b
        k_offsets = k_page + held * k_stride_t
        v_offsets = v_page + held * v_stride_t
    else:
        k_offsets = held * k_stride_t
        v_offsets = held * v_stride_t
    return tl.multiple_of(k_offsets, EACH), tl.multiple_of(v_offsets, EACH)


@triton.jit
def exponent_unit(scale, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr):
    """Return what a score is times to be an exponent to base 2.

    Where something is added to a score, it already is one. Else it is multiplied together with
    the maximum's subtraction, in one rounding.
    """
    unit = scale * LOG2E
    # Two operands at a time: Triton 3.1, which compiles this for Volta, takes no more.
    if (SOFTCAP > 0 or ALIBI) or BIAS:
        unit = 1.0
    return unit


@triton.jit
def transformed(
    scores,  # [BLOCK_M, BLOCK_N]: products of queries and keys
    keys,
    present,
    real,  # [BLOCK_M]: which rows there are
    scale,
    slope,  # of ALiBi, to base 2: one, or [BLOCK_M, 1]
    positions_ptr,
    row,  # elements of a [B, T] in front of this row's
    bias_rows,  # [BLOCK_M, 1] pointers to the bias of key 0
    bias_stride_t,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Return the scores capped, and with ALiBi and the bias added, as exponents to base 2."""
    if SOFTCAP > 0:
        # cap tanh(x / cap), by tanh(y) = 1 - 2 / (exp(2 y) + 1).
        scores = scores * (scale * 2.0 * LOG2E / SOFTCAP)
        scores = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    else:
        scores = scores * (scale * LOG2E)
    if ALIBI:
        place = tl.load(positions_ptr + row + keys, mask=present, other=0)
        scores += slope * place.to(tl.float32)[None, :]
    if BIAS:
        bias_ptrs = bias_rows + keys.to(tl.int64)[None, :] * bias_stride_t
        added = tl.load(bias_ptrs, mask=real[:, None] & present[None, :], other=0.0)
        scores += added.to(tl.float32) * LOG2E
    return scores


@triton.jit
def visible(
    scores,  # [BLOCK_M, BLOCK_N]
    keys,
    present,
    positions,  # [BLOCK_M]: the key at which a row stands
    mask_ptr,
    row,
    EDGE: tl.constexpr,  # whether a row may miss a key for its place
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDING_MASK: tl.constexpr,
):
    """Return the scores, -inf where a row does not see the key."""
    if EDGE:
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= positions[:, None])
        if WINDOW:
            seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
        if CHUNK:
            # Where there are more queries than keys some stand before all of them, in no chunk.
            own = tl.where(positions < 0, -1, positions // CHUNK)
            seen = seen & (keys[None, :] // CHUNK == own[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    if PADDING_MASK:
        token = tl.load(mask_ptr + row + keys, mask=present, other=0)
        scores = tl.where(token[None, :] != 0, scores, float("-inf"))
    return scores


@triton.jit
def page_maxima(
    scores,  # [BLOCK_M, BLOCK_N], -inf where nothing is seen
    unit,
    page_max_ptr,
    where,  # [BLOCK_M]: the row among all of [B, H, S]
    real,
    start,  # the block's first slot
    page_slots,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WHOLE: tl.constexpr,  # every block of slots is walked, by one program
):
    """Write the maxima of the pages that lie in a block.

    Where a page lies in several blocks, or some are not walked, the maxima are raised instead,
    from the -inf that the launch wrote.
    """
    # BLOCK_N is a multiple of the page, or divides it.
    if PAGE < BLOCK_N:
        parts = tl.reshape(scores, [BLOCK_M, BLOCK_N // PAGE, PAGE])
        largest = tl.max(parts, 2) * (unit * LN2)
        slot = start // PAGE + tl.arange(0, BLOCK_N // PAGE)
        ptrs = page_max_ptr + where[:, None] * page_slots + slot[None, :]
        inside = real[:, None] & (slot < page_slots)[None, :]
    else:
        largest = tl.max(scores, 1) * (unit * LN2)
        slot = tl.zeros([BLOCK_M], tl.int32) + start // PAGE
        ptrs = page_max_ptr + where * page_slots + slot
        inside = real & (slot < page_slots)
    if WHOLE and PAGE <= BLOCK_N:
        tl.store(ptrs, largest, mask=inside)
    else:
        tl.atomic_max(ptrs, largest, mask=inside, sem="relaxed")


@triton.jit
def softmax_step(
    scores,  # [BLOCK_M, BLOCK_N]
    unit,
    top,  # [BLOCK_M]: the largest exponent so far
    total,  # [BLOCK_M]: the sum of weights so far, against `top`
):
    """Return the weights, what earlier sums are times, and the new maximum and sum."""
    raised = tl.maximum(top, tl.max(scores, 1) * unit)
    weights = tl.exp2(scores * unit - raised[:, None])
    shrink = tl.exp2(top - raised)
    total = total * shrink + tl.sum(weights, 1)
    return weights, shrink, raised, total


@triton.jit
def shares(total):
    """Return which rows have seen a key, and the sum and its reciprocal: 1 and 0 if none."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    return some, total, tl.where(some, 1.0 / total, 0.0)
