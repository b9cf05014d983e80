"""Kernels of a decoder layer beside its attention: norm, rotary positions, gate, cache writes.

Each computes in fp32 and rounds once, where it writes. Rows are those along the last axis, which is
contiguous; where they begin is told by three sizes and strides, so that a slice of a packed
projection or a transposed view is read as it lies.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(row, size_1, size_2, stride_0, stride_1, stride_2):
    """Return where a row begins: its number in mixed base (any, size_1, size_2)."""
    inner = row % size_2
    middle = row // size_2 % size_1
    return row // size_2 // size_1 * stride_0 + middle * stride_1 + inner * stride_2


@triton.jit
def begin_early():
    """Let the next kernel be launched, and wait for the end of the one in front of this."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def rms_norm(
    x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr,
    rows, size_1, size_2,
    x_stride_0, x_stride_1, x_stride_2,
    y_stride_0, y_stride_1, y_stride_2,
    eps, offset,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write norm(x) * (weight + offset); with `y`, the sum x + y and the norm of the sum.

    The sum is rounded to 16 bits before its norm is taken, as a sum in memory is.
    """
    if OVERLAP:
        begin_early()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    target = row[:, None] * N + column[None, :]
    start = row_start(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        start = row_start(row, size_1, size_2, y_stride_0, y_stride_1, y_stride_2)
        y = tl.load(y_ptr + start[:, None] + column[None, :], mask=inside, other=0.0)
        total = (x + y.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + target, total, mask=inside)
        x = total.to(tl.float32)
    mean = tl.sum(x * x, 1) / N
    normed = x * tl.rsqrt(mean + eps)[:, None]
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32) + offset
        normed = normed * gain[None, :]
    tl.store(out_ptr + target, normed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of(right_ptr, row, inside, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Return some rows of a matrix [D, D], zeros behind the last."""
    column = tl.arange(0, COLUMNS)[None, :]
    mask = inside[:, None] & (column < D)
    return tl.load(right_ptr + row[:, None] * D + column, mask=mask, other=0.0)


@triton.jit
def _places_of_pairs(pair, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return where the two features of each pair lie in a head."""
    if INTERLEAVED:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + HALF
    return one, two


@triton.jit
def _rotated(one_ptr, two_ptr, inside, cos, sin):
    """Return pairs of features, rotated, in fp32."""
    first = tl.load(one_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(two_ptr, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rotate_and_transform(
    x_ptr, out_ptr, cos, sin, right_one, right_two, right_rest, x_stride_h, heads,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_rotate`, and multiply the heads, rounded, by the rows of a matrix [D, D]."""
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (pair < HALF)
    one, two = _places_of_pairs(pair, HALF, INTERLEAVED)
    source = x_ptr + head * x_stride_h
    first, second = _rotated(source + one, source + two, inside, cos, sin)
    kind = out_ptr.dtype.element_ty
    sums = tl.dot(first.to(kind), right_one)
    sums = tl.dot(second.to(kind), right_two, sums)
    if D > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, TAIL)[None, :]
        passing = tl.load(source + rest, mask=(head < heads) & (rest < D), other=0.0)
        sums = tl.dot(passing, right_rest, sums)
    column = tl.arange(0, COLUMNS)[None, :]
    target = out_ptr + head * D + column
    tl.store(target, sums.to(kind), mask=(head < heads) & (column < D))


@triton.jit
def _rotate(
    x_ptr, out_ptr, cos, sin, x_stride_h, heads,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of one token; `x_ptr` and `out_ptr` are at its first."""
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (pair < HALF)
    one, two = _places_of_pairs(pair, HALF, INTERLEAVED)
    source, target = x_ptr + head * x_stride_h, out_ptr + head * D
    first, second = _rotated(source + one, source + two, inside, cos, sin)
    kind = out_ptr.dtype.element_ty
    tl.store(target + one, first.to(kind), mask=inside)
    tl.store(target + two, second.to(kind), mask=inside)
    if D > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, TAIL)[None, :]
        passing = (head < heads) & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=passing), mask=passing)


@triton.jit
def rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    S, q_heads, k_heads,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    cos_stride_b, cos_stride_s, sin_stride_b, sin_stride_s,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rotate one token's heads of q, or in the second row of programs those of k.

    Results are [B, S, heads, D], contiguous. The tables are not rounded to 16 bits.
    """
    if OVERLAP:
        begin_early()
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    pair = tl.arange(0, BLOCK)
    cos_at = cos_ptr + b * cos_stride_b + s * cos_stride_s + pair
    sin_at = sin_ptr + b * sin_stride_b + s * sin_stride_s + pair
    cos = tl.load(cos_at, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_at, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if tl.program_id(1) == 0:
        x_ptr = q_ptr + b * q_stride_b + s * q_stride_s
        out_ptr = q_out_ptr + token * q_heads * D
        _rotate(
            x_ptr, out_ptr, cos, sin, q_stride_h, q_heads, D, HALF, INTERLEAVED, HEADS, BLOCK, TAIL
        )
    elif k_ptr is not None:
        x_ptr = k_ptr + b * k_stride_b + s * k_stride_s
        out_ptr = k_out_ptr + token * k_heads * D
        _rotate(
            x_ptr, out_ptr, cos, sin, k_stride_h, k_heads, D, HALF, INTERLEAVED, HEADS, BLOCK, TAIL
        )


@triton.jit
def rope_and_transform(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    q_right_ptr, k_right_ptr,  # [D, D], contiguous
    S, q_heads, k_heads,
    q_stride_b, q_stride_h, q_stride_s,
    k_stride_b, k_stride_h, k_stride_s,
    cos_stride_b, cos_stride_s, sin_stride_b, sin_stride_s,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `rope`, and multiply q by one factor, k by the other, which nothing in front writes."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    pair, rest = tl.arange(0, BLOCK), tl.arange(0, TAIL)
    right_ptr = q_right_ptr
    if tl.program_id(1) != 0:
        right_ptr = k_right_ptr
    one, two = _places_of_pairs(pair, HALF, INTERLEAVED)
    right_one = _rows_of(right_ptr, one, pair < HALF, D, COLUMNS)
    right_two = _rows_of(right_ptr, two, pair < HALF, D, COLUMNS)
    right_rest = right_one
    if D > 2 * HALF:
        right_rest = _rows_of(right_ptr, 2 * HALF + rest, rest < D - 2 * HALF, D, COLUMNS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    cos_at = cos_ptr + b * cos_stride_b + s * cos_stride_s + pair
    sin_at = sin_ptr + b * sin_stride_b + s * sin_stride_s + pair
    cos = tl.load(cos_at, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_at, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if tl.program_id(1) == 0:
        _rotate_and_transform(
            q_ptr + b * q_stride_b + s * q_stride_s, q_out_ptr + token * q_heads * D, cos, sin,
            right_one, right_two, right_rest, q_stride_h, q_heads,
            D, HALF, INTERLEAVED, HEADS, BLOCK, TAIL, COLUMNS,
        )  # fmt: skip
    else:
        _rotate_and_transform(
            k_ptr + b * k_stride_b + s * k_stride_s, k_out_ptr + token * k_heads * D, cos, sin,
            right_one, right_two, right_rest, k_stride_h, k_heads,
            D, HALF, INTERLEAVED, HEADS, BLOCK, TAIL, COLUMNS,
        )  # fmt: skip


@triton.jit
def _tanh(x):
    # The quotient loses the digits of a small x, where three terms of the series are enough.
    small = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.05, small, tl.where(x < 0.0, -large, large))


@triton.jit
def activation(x, ACT: tl.constexpr):
    if ACT == "silu":
        # A reciprocal root, squared, takes two instructions, and a division eight.
        root = tl.rsqrt(1.0 + tl.exp(-x))
        y = x * root * root
    elif ACT == "sigmoid":
        y = tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 1 + tanh(u) is 2 sigmoid(2 u).
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "tanh", "an activation that this kernel does not have")
        y = _tanh(x)
    return y


@triton.jit
def act_mul(
    gate_ptr, up_ptr, out_ptr,
    size_1, size_2,
    gate_stride_0, gate_stride_1, gate_stride_2,
    up_stride_0, up_stride_1, up_stride_2,
    N, ACT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write act(gate) * up for a block of one row."""
    if OVERLAP:
        begin_early()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    start = row_start(row, size_1, size_2, gate_stride_0, gate_stride_1, gate_stride_2)
    gate = tl.load(gate_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    start = row_start(row, size_1, size_2, up_stride_0, up_stride_1, up_stride_2)
    up = tl.load(up_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    made = activation(gate, ACT) * up
    tl.store(out_ptr + row * N + column, made.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def token_place(
    b, s, S, capacity, seq_lens_ptr, new_lens_ptr, block_table_ptr, length_stride,
    block_table_width, RING: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Return where in a cache a new token lies, whether it is written, and its row's length.

    The row of the cache, or the page of the pool, and the place in it.
    """
    length = tl.load(seq_lens_ptr + b * length_stride)
    place = (length + s).to(tl.int64)
    if RING:
        real = S
        if new_lens_ptr is not None:
            real = tl.load(new_lens_ptr + b)
        written = (s < real) & (s >= real - capacity)
        place = place % capacity
    else:
        written = place < capacity
    row = b
    if PAGE:
        page_ptr = block_table_ptr + b * block_table_width + place // PAGE
        row = tl.load(page_ptr, mask=written, other=0).to(tl.int64)
        place = place % PAGE
    return row, place, written, length


@triton.jit
def _copy_heads(
    source_ptr, target_ptr, source_stride_h, target_stride_h, heads,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (column < D)
    values = tl.load(source_ptr + head * source_stride_h + column, mask=mask)
    # Caches may be larger than 2^31 elements.
    tl.store(target_ptr + head.to(tl.int64) * target_stride_h + column, values, mask=mask)


@triton.jit
def append_kv(
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
    RING: tl.constexpr,  # whether a token lies in the slot of its number modulo the capacity
    PAGE: tl.constexpr,  # tokens of a page, or 0
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Copy one token's keys and values behind those of its row; write the row's new length.

    What would lie behind the end of the cache is left out. A ring takes the last real tokens.
    """
    if OVERLAP:
        begin_early()
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    row, place, written, length = token_place(
        b, s, S, capacity, seq_lens_ptr, new_lens_ptr, block_table_ptr, length_stride,
        block_table_width, RING, PAGE,
    )  # fmt: skip
    heads = tl.where(written, heads, 0)
    _copy_heads(
        k_ptr + b * k_stride_b + s * k_stride_s,
        cache_k_ptr + row * cache_k_stride_b + place * cache_k_stride_t,
        k_stride_h, cache_k_stride_h, heads, K_DIM, HEADS, BLOCK_K,
    )  # fmt: skip
    _copy_heads(
        v_ptr + b * v_stride_b + s * v_stride_s,
        cache_v_ptr + row * cache_v_stride_b + place * cache_v_stride_t,
        v_stride_h, cache_v_stride_h, heads, V_DIM, HEADS, BLOCK_V,
    )  # fmt: skip
    if s == 0:
        tl.store(total_ptr + b, length + S)
