"""Products with weights of four bits, in Triton: few tokens at once, and unpacking for many.

A weight [N, K] lies as `graphopt.runtime.packed_codes.pack_codes` puts it: uint8
[K / SPAN, N, SPAN / 2]. A byte holds two signed numbers from -8 to 7, in its low bits one of the
first half of a span of inputs, and in its high bits the one as far into the second half. A tile
so unpacks into two operands of matrix units, and its bytes are one piece of memory.

The inputs of a half lie as the lanes of a warp hold an operand of a matrix unit, four to a row of
outputs: all of a lane's behind each other. See `place_of`.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.codes import unpacked


@triton.jit
def place_of(k, HALF: tl.constexpr):
    """Return the input of a half that lies at place k: four neighbours of each 16 for each lane."""
    EACH: tl.constexpr = HALF // 4
    place = k % EACH // 4 * 16 + k // EACH * 4 + k % 4
    return tl.max_contiguous(tl.multiple_of(place, 4), 4)


@triton.jit
def in_order(codes, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Return codes [ROWS, HALF] in the order of their inputs, each in the lane that has it."""
    lanes = tl.reshape(codes, [ROWS, 4, HALF // 16, 4])
    return tl.reshape(tl.permute(lanes, [0, 2, 1, 3]), [ROWS, HALF])


@triton.jit
def _halves(values, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Return the first and the second half of the columns [ROWS, HALF]."""
    parts = tl.reshape(values, [ROWS, 2, HALF // 2])
    return tl.split(tl.permute(parts, [0, 2, 1]))


@triton.jit(do_not_specialize=["M"])
def packed_few(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, part_ptr, arrived_ptr,
    M, N, spans,
    x_stride,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale, where fewer than K; else 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,  # spans that are on their way at once: 1, 2 or 4
    WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,  # start before the kernel in front has ended
):  # fmt: skip
    """As `packed_linear`, of few tokens: codes pass from memory to matrix units in registers.

    To be run by one warp, which waits for no other. With OVERLAP the first codes are on their way
    before the kernel in front has ended, which may write x, and no codes.
    """
    tl.static_assert((UNROLL == 1 or UNROLL == 2) or UNROLL == 4, "spans that are read ahead")
    HALF: tl.constexpr = SPAN // 2
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # Rows behind the last are computed as the last, and not written.
    row = tl.minimum(n, N - 1)
    each = tl.cdiv(spans, SPLITS)
    first = split * each
    last = tl.minimum(first + each, spans)
    codes_at = codes_ptr + row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    x_at = x_ptr + m.to(tl.int64)[None, :] * x_stride
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total = _add_spans(
        total, first, last, codes_at, x_at, m, M, scales_ptr, zeros_ptr, row, N, out_ptr,
        SPAN, GROUP, BLOCK_N, UNROLL, WORDS, OVERLAP,
    )  # fmt: skip
    for start in range(first + UNROLL, last, UNROLL):
        total = _add_spans(
            total, start, last, codes_at, x_at, m, M, scales_ptr, zeros_ptr, row, N, out_ptr,
            SPAN, GROUP, BLOCK_N, UNROLL, WORDS, False,
        )  # fmt: skip
    inside = (n < N)[:, None] & (m < M)[None, :]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    _gather(
        total, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, part_ptr, arrived_ptr, tile, split,
        row, m, M, N, place, inside, GROUP > 0, False, BLOCK_M, BLOCK_N, SPLITS,
    )  # fmt: skip


@triton.jit
def _add_spans(
    total, start, last, codes_at, x_at, m, M, scales_ptr, zeros_ptr, row, N, out_ptr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
    WORDS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Return a sum, and the products of some spans added to it; none of those behind the last.

    All that they read is on its way before the first product: codes, then inputs, then scales.
    """
    HALF: tl.constexpr = SPAN // 2
    PARTS: tl.constexpr = SPAN // GROUP if GROUP and GROUP < SPAN else 1
    # Inputs of a product: of a half, or of the smaller groups in it.
    TILES: tl.constexpr = 2 if PARTS < 4 else 4
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.static_assert(PARTS <= 4, "groups of a quarter of a span or more")
    k = tl.arange(0, SPAN // TILES)[:, None]
    # Triton knows no starred tuples.
    codes, inputs, scales, zeros = (), (), (), ()
    for step in tl.static_range(UNROLL):
        span = tl.minimum(start + step, last - 1)
        held = tl.load(codes_at + tl.full([], span, tl.int64) * N * HALF)
        codes = codes + (held,)  # noqa: RUF005
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for step in tl.static_range(UNROLL):
        # Behind the last span inputs are 0, and codes those of the last.
        at = x_at + tl.minimum(start + step, last - 1) * SPAN
        there = (m < tl.where(start + step < last, M, 0))[None, :]
        for tile in tl.static_range(TILES):
            x = tl.load(at + tile * (SPAN // TILES) + k, mask=there, other=0).to(TYPE)
            inputs = inputs + (x,)  # noqa: RUF005
    if GROUP:
        for step in tl.static_range(UNROLL):
            span = tl.minimum(start + step, last - 1)
            group = span * PARTS if PARTS > 1 else span // (GROUP // SPAN)
            for part in tl.static_range(PARTS):
                place = (group + part) * N + row
                scales = scales + (tl.load(scales_ptr + place),)  # noqa: RUF005
                if zeros_ptr is not None:
                    zeros = zeros + (tl.load(zeros_ptr + place),)  # noqa: RUF005
    for step in tl.static_range(UNROLL):
        held = in_order(codes[step], BLOCK_N, HALF)
        if TILES == 2:
            low, high = unpacked(held, TYPE, WORDS)
            if zeros_ptr is not None:
                if GROUP:
                    zero, other = zeros[step * PARTS], zeros[step * PARTS + PARTS - 1]
                else:
                    zero = tl.load(zeros_ptr + row)
                    other = zero
                low, high = low - zero.to(TYPE)[:, None], high - other.to(TYPE)[:, None]
            if GROUP == 0:
                total = tl.dot(low, inputs[2 * step], total)
                total = tl.dot(high, inputs[2 * step + 1], total)
            elif PARTS == 1:
                sums = tl.dot(low, inputs[2 * step])
                sums = tl.dot(high, inputs[2 * step + 1], sums)
                total += sums * scales[step].to(tl.float32)[:, None]
            else:
                sums = tl.dot(low, inputs[2 * step])
                total += sums * scales[2 * step].to(tl.float32)[:, None]
                sums = tl.dot(high, inputs[2 * step + 1])
                total += sums * scales[2 * step + 1].to(tl.float32)[:, None]
        else:
            front, back = _halves(held, BLOCK_N, HALF)
            for part in tl.static_range(2):
                low, high = unpacked(front if part == 0 else back, TYPE, WORDS)
                if zeros_ptr is not None:
                    low = low - zeros[4 * step + part].to(TYPE)[:, None]
                    high = high - zeros[4 * step + part + 2].to(TYPE)[:, None]
                sums = tl.dot(low, inputs[4 * step + part])
                total += sums * scales[4 * step + part].to(tl.float32)[:, None]
                sums = tl.dot(high, inputs[4 * step + part + 2])
                total += sums * scales[4 * step + part + 2].to(tl.float32)[:, None]
    return total


@triton.jit
def _add_group(total, values, inputs, scales_ptr, zeros_ptr, place, TYPE: tl.constexpr):
    """Return a sum, and the products of one group added to it by its scale."""
    if zeros_ptr is not None:
        values = values - tl.load(zeros_ptr + place).to(TYPE)[:, None]
    if tl.int8 == TYPE:
        sums = tl.dot(values, inputs, out_dtype=tl.int32).to(tl.float32)
    else:
        sums = tl.dot(values, inputs)
    return total + sums * tl.load(scales_ptr + place).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["M"])
def packed_linear(
    x_ptr,  # [M, K], rows `x_stride` apart: 16 bits, or int8 codes
    x_scales_ptr,  # fp32 [M]: of each token's codes, or None
    codes_ptr,  # uint8 [K / SPAN, N, SPAN / 2]
    scales_ptr,  # [K / group, N]
    zeros_ptr,  # [K / group, N] or None: what a number is too large by
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    part_ptr,  # fp32 [SPLITS, M, N]: sums over parts of K
    arrived_ptr,  # int32, one for each tile: 0, and 0 again at the end
    M, N, spans,
    x_stride,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale, where fewer than K; else 0
    INTEGER: tl.constexpr,  # multiply int8 by int8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Write x weight^T (+ bias), its sums in fp32, or in int32 up to the scales.

    K is divided among SPLITS programs; the last of them to arrive adds their parts, in one order.
    """
    HALF: tl.constexpr = SPAN // 2
    UPPER: tl.constexpr = HALF // GROUP if GROUP else 0  # groups of a half
    TYPE: tl.constexpr = tl.int8 if INTEGER else out_ptr.dtype.element_ty
    tile = tl.program_id(0) + tl.program_id(2) * tl.num_programs(0)
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, HALF)
    # Rows behind the last are computed as the last, and not written.
    row = tl.minimum(n, N - 1)
    each = tl.cdiv(spans, SPLITS)
    first = split * each
    last = tl.minimum(first + each, spans)

    codes_at = codes_ptr + row[:, None] * HALF + k[None, :]
    codes_at += first.to(tl.int64) * N * HALF
    x_at = x_ptr + m.to(tl.int64)[None, :] * x_stride + first * SPAN + place_of(k, HALF)[:, None]
    there = (m < M)[None, :]
    if INTEGER and GROUP == 0:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for span in range(first, last):
        codes = tl.load(codes_at)
        x_low = tl.load(x_at, mask=there, other=0).to(TYPE)
        x_high = tl.load(x_at + HALF, mask=there, other=0).to(TYPE)
        low, high = unpacked(codes, TYPE, WORDS)
        if GROUP == 0:
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + row).to(TYPE)[:, None]
                low, high = low - zero, high - zero
            if INTEGER:
                total = tl.dot(low, x_low, total, out_dtype=tl.int32)
                total = tl.dot(high, x_high, total, out_dtype=tl.int32)
            else:
                total = tl.dot(low, x_low, total)
                total = tl.dot(high, x_high, total)
        elif GROUP >= SPAN:
            place = span // (GROUP // SPAN) * N + row
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + place).to(TYPE)[:, None]
                low, high = low - zero, high - zero
            if INTEGER:
                sums = tl.dot(low, x_low, out_dtype=tl.int32)
                sums = tl.dot(high, x_high, sums, out_dtype=tl.int32).to(tl.float32)
            else:
                sums = tl.dot(low, x_low)
                sums = tl.dot(high, x_high, sums)
            total += sums * tl.load(scales_ptr + place).to(tl.float32)[:, None]
        else:
            # Groups lie among each other: what is not of a group is 0.
            number = (place_of(k, HALF) // GROUP)[:, None]
            for group in tl.static_range(UPPER):
                place = (span * 2 * UPPER + group) * N + row
                own = tl.where(number == group, x_low, 0).to(TYPE)
                total = _add_group(total, low, own, scales_ptr, zeros_ptr, place, TYPE)
                place += UPPER * N
                own = tl.where(number == group, x_high, 0).to(TYPE)
                total = _add_group(total, high, own, scales_ptr, zeros_ptr, place, TYPE)
        codes_at += N * HALF
        x_at += SPAN

    sums = total.to(tl.float32)
    inside = (n < N)[:, None] & (m < M)[None, :]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    _gather(
        sums, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, part_ptr, arrived_ptr, tile, split,
        row, m, M, N, place, inside, GROUP > 0, INTEGER, BLOCK_M, BLOCK_N, SPLITS,
    )  # fmt: skip


@triton.jit
def _gather(
    sums, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, part_ptr, arrived_ptr, tile, split,
    row, m, M, N, place, inside,
    GROUPED: tl.constexpr, INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write a tile; of several programs that have a part of it, the last to arrive adds them up."""
    if SPLITS > 1:
        size = M.to(tl.int64) * N
        tl.store(part_ptr + split * size + place, sums, mask=inside)
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.store(arrived_ptr + tile, 0)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLITS):
                part = part_ptr + other * size + place
                sums += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(
                sums, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, row, m, M, place, inside,
                GROUPED, INTEGER,
            )  # fmt: skip
    else:
        _finish(
            sums, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, row, m, M, place, inside,
            GROUPED, INTEGER,
        )  # fmt: skip


@triton.jit
def _finish(
    sums, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, row, m, M, place, inside,
    GROUPED: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Write sums times what scales are left, and with the bias."""
    if not GROUPED:
        sums = sums * tl.load(scales_ptr + row).to(tl.float32)[:, None]
    if x_scales_ptr is not None:
        sums = sums * tl.load(x_scales_ptr + m, mask=m < M, other=0.0)[None, :]
    if INTEGER:
        sums = sums * 0.0625
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _valued(numbers, scales_ptr, zeros_ptr, place):
    """Return what signed numbers stand for, in fp32."""
    values = numbers.to(tl.float32)
    if zeros_ptr is not None:
        values -= tl.load(zeros_ptr + place).to(tl.float32)
    return values * tl.load(scales_ptr + place).to(tl.float32)


@triton.jit
def unpack_weight(
    codes_ptr,  # uint8 [K / SPAN, N, SPAN / 2]
    scales_ptr,  # [K / group, N]
    zeros_ptr,  # [K / group, N] or None
    out_ptr,  # [N, K]: of the scales' type, or int8
    N, spans,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Write what some rows and one span of a weight stand for; as int8, its numbers times 16."""
    HALF: tl.constexpr = SPAN // 2
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    span = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, HALF)
    row = tl.minimum(n, N - 1)
    codes = tl.load(codes_ptr + span.to(tl.int64) * N * HALF + row[:, None] * HALF + k[None, :])
    low, high = unpacked(in_order(codes, BLOCK_N, HALF), TYPE, WORDS)
    if tl.int8 != TYPE:
        place = (span * SPAN + k)[None, :] // GROUP * N + row[:, None]
        low = _valued(low, scales_ptr, zeros_ptr, place).to(TYPE)
        place = (span * SPAN + HALF + k)[None, :] // GROUP * N + row[:, None]
        high = _valued(high, scales_ptr, zeros_ptr, place).to(TYPE)
    out_at = out_ptr + n.to(tl.int64)[:, None] * (spans * SPAN) + span * SPAN + k[None, :]
    inside = (n < N)[:, None]
    tl.store(out_at, low, mask=inside)
    tl.store(out_at + HALF, high, mask=inside)
