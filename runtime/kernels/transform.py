"""A Kronecker transform of tokens, with what stands before and behind it, in Triton.

In front of it a norm, a gate or nothing; behind it rounding to integer codes, or nothing. A token
[N1 N2] is a tile, which never leaves the program that reads it. The tile is turned, [N2, N1], so
that what the right factor gives is an operand of the left one's product where it is, in registers.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.block import activation, row_start

# 1.5 * 2^23: a number of fp32 as large as this has no bits behind the point, so that a sum with it
# is rounded to the nearest integer, ties to even; its low bits are the integer.
_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _read(at, mask, WHOLE: tl.constexpr):
    """Return what is there, 0 behind the end."""
    return tl.load(at) if WHOLE else tl.load(at, mask=mask, other=0.0)


@triton.jit
def _square(ptr, i, j, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Return the elements at rows i and columns j of a matrix [SIZE, SIZE]."""
    mask = (i < SIZE) & (j < SIZE)
    return _read(ptr + i * SIZE + j, mask, WHOLE)


@triton.jit
def _codes(values, unit, BITS: tl.constexpr, CLIPPED: tl.constexpr):
    """Return values times a unit as integers, whose low bits are the codes."""
    steps = values * unit
    if CLIPPED:
        most: tl.constexpr = 2 ** (BITS - 1) - 1
        steps = tl.minimum(tl.maximum(steps, -most - 1.0), most)
    return (steps + _TO_INTEGER).to(tl.int32, bitcast=True)


@triton.jit
def _write(
    out_ptr, codes, column, mask,
    N1: tl.constexpr, N2: tl.constexpr, FIRST: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, PAIRS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the codes [B2, B1] of rows of a token from FIRST on; two in a byte with PAIRS."""
    small = codes.to(tl.int8)
    if PAIRS:
        even, odd = tl.split(tl.reshape(tl.trans(small), [B1, B2 // 2, 2]))
        i, half = FIRST + tl.arange(0, B1), tl.arange(0, B2 // 2)
        there = (i < N1)[:, None] & (half < N2 // 2)[None, :]
        at = out_ptr + i[:, None] * (N2 // 2) + half[None, :]
        tl.store(at, ((even & 0xF) | (odd << 4)).to(tl.uint8, bitcast=True), mask=there)
    elif WHOLE:
        tl.store(out_ptr + column, small)
    else:
        tl.store(out_ptr + column, small, mask=mask)


@triton.jit
def transform(
    x_ptr, y_ptr, weight_ptr,
    left_ptr,  # [N1, N1], contiguous, or None
    right_ptr,  # [N2, N2], contiguous, or None
    clip_low_ptr, clip_high_ptr,  # one number each, or None: 1
    sum_ptr, out_ptr, scales_ptr,
    tokens, size_1, size_2,
    x_stride_0, x_stride_1, x_stride_2,
    y_stride_0, y_stride_1, y_stride_2,
    eps, offset,
    N1: tl.constexpr, N2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,  # N1 as two powers of two, the second 0 or for the rest
    B2: tl.constexpr,  # the power of two from N2 up
    BEFORE: tl.constexpr,  # "norm", "", or the name of an activation
    BITS: tl.constexpr,  # 4 or 8, or 0: values are not rounded
    PAIRS: tl.constexpr,  # put two codes into a byte, the one of even place in the low bits
    OVERLAP: tl.constexpr,  # start before the kernel in front has ended, which writes no factor
):  # fmt: skip
    """Write left^T x right as codes [tokens, N1 N2] with a scale for each token, or as values.

    In place of x: the norm of x (+ y, when the sum is written too) times `weight + offset`; or
    act(x) y. A scale is the largest magnitude, clipped, divided by the largest code; a token of
    zeros has the scale 1, and one with something that is no finite number the scale NaN. Products
    take 16 bits and give 32.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    CLIPPED: tl.constexpr = clip_low_ptr is not None or clip_high_ptr is not None
    WHOLE0: tl.constexpr = B2 == N2 and D0 <= N1
    WHOLE1: tl.constexpr = B2 == N2 and D0 + D1 == N1
    j = tl.arange(0, B2)[:, None]
    i0 = tl.arange(0, D0)[None, :]
    mask0 = (i0 < N1) & (j < N2)
    column0 = i0 * N2 + j
    if D1:
        i1 = D0 + tl.arange(0, D1)[None, :]
        mask1 = (i1 < N1) & (j < N2)
        column1 = i1 * N2 + j
    if right_ptr is not None:
        # Its transpose.
        right = _square(right_ptr, tl.arange(0, B2)[None, :], j, N2, B2 == N2)
    if left_ptr is not None:
        k0 = tl.arange(0, D0)[:, None]
        left00 = _square(left_ptr, k0, i0, N1, D0 <= N1)
        if D1:
            k1 = D0 + tl.arange(0, D1)[:, None]
            left01 = _square(left_ptr, k0, i1, N1, D0 + D1 == N1)
            left10 = _square(left_ptr, k1, i0, N1, D0 + D1 == N1)
            left11 = _square(left_ptr, k1, i1, N1, D0 + D1 == N1)
    if BEFORE == "norm":
        if weight_ptr is not None:
            gain0 = _read(weight_ptr + column0, mask0, WHOLE0).to(tl.float32) + offset
            if D1:
                gain1 = _read(weight_ptr + column1, mask1, WHOLE1).to(tl.float32) + offset
    low_clip, high_clip = 1.0, 1.0
    if clip_low_ptr is not None:
        low_clip = tl.load(clip_low_ptr).to(tl.float32)
    if clip_high_ptr is not None:
        high_clip = tl.load(clip_high_ptr).to(tl.float32)

    # What is in front may write x and y, and none of these, which no cache holds any more.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        token_64 = tl.full([], token, tl.int64)
        target = token_64 * (N1 * N2)
        x_at = x_ptr + row_start(token_64, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)
        x0 = _read(x_at + column0, mask0, WHOLE0)
        if D1:
            x1 = _read(x_at + column1, mask1, WHOLE1)
        if y_ptr is not None:
            y_at = y_ptr + row_start(token_64, size_1, size_2, y_stride_0, y_stride_1, y_stride_2)
            y0 = _read(y_at + column0, mask0, WHOLE0).to(tl.float32)
            if D1:
                y1 = _read(y_at + column1, mask1, WHOLE1).to(tl.float32)
        if BEFORE == "norm":
            wide0 = x0.to(tl.float32)
            if y_ptr is not None:
                total0 = (wide0 + y0).to(TYPE)
                tl.store(sum_ptr + target + column0, total0, mask=mask0)
                wide0 = total0.to(tl.float32)
            square = tl.sum(tl.sum(wide0 * wide0, 0), 0)
            if D1:
                wide1 = x1.to(tl.float32)
                if y_ptr is not None:
                    total1 = (wide1 + y1).to(TYPE)
                    tl.store(sum_ptr + target + column1, total1, mask=mask1)
                    wide1 = total1.to(tl.float32)
                square += tl.sum(tl.sum(wide1 * wide1, 0), 0)
            unit = tl.rsqrt(square / (N1 * N2) + eps)
            wide0 = wide0 * unit
            if weight_ptr is not None:
                wide0 = wide0 * gain0
            x0 = wide0.to(TYPE)
            if D1:
                wide1 = wide1 * unit
                if weight_ptr is not None:
                    wide1 = wide1 * gain1
                x1 = wide1.to(TYPE)
        elif BEFORE != "":
            x0 = (activation(x0.to(tl.float32), BEFORE) * y0).to(TYPE)
            if D1:
                x1 = (activation(x1.to(tl.float32), BEFORE) * y1).to(TYPE)

        z0 = x0.to(tl.float32)
        if D1:
            z1 = x1.to(tl.float32)
        if right_ptr is not None:
            z0 = tl.dot(right, x0)
            if D1:
                z1 = tl.dot(right, x1)
            if left_ptr is not None:
                x0 = z0.to(TYPE)
                if D1:
                    x1 = z1.to(TYPE)
        if left_ptr is not None:
            z0 = tl.dot(x0, left00)
            if D1:
                z0 = tl.dot(x1, left10, z0)
                z1 = tl.dot(x0, left01)
                z1 = tl.dot(x1, left11, z1)

        if BITS == 0:
            tl.store(out_ptr + target + column0, z0.to(TYPE), mask=mask0)
            if D1:
                tl.store(out_ptr + target + column1, z1.to(TYPE), mask=mask1)
        else:
            most: tl.constexpr = 2 ** (BITS - 1) - 1
            if CLIPPED:
                high, low = tl.max(tl.max(z0, 0), 0), tl.min(tl.min(z0, 0), 0)
                if D1:
                    high = tl.maximum(high, tl.max(tl.max(z1, 0), 0))
                    low = tl.minimum(low, tl.min(tl.min(z1, 0), 0))
                high, low = tl.maximum(high, 0.0) * high_clip, tl.minimum(low, 0.0) * low_clip
                reach = tl.maximum(high, -low)
            elif D1:
                row = tl.maximum(tl.max(tl.abs(z0), 1), tl.max(tl.abs(z1), 1))
                reach = tl.max(row, 0)
            else:
                reach = tl.max(tl.max(tl.abs(z0), 1), 0)
            scale = reach / most
            scale = tl.where(scale == 0.0, 1.0, scale)
            if left_ptr is None or right_ptr is None:
                # Maxima pass over what is no number, which two products bring into a whole token.
                broken = tl.max(tl.max((z0 != z0).to(tl.int32), 1), 0)
                if D1:
                    broken += tl.max(tl.max((z1 != z1).to(tl.int32), 1), 0)
                scale = tl.where(broken > 0, float("nan"), scale)
            scale = tl.where(scale <= _LARGEST, scale, float("nan"))
            tl.store(scales_ptr + token, scale)
            unit = 1.0 / scale
            out_at = out_ptr + (target // 2 if PAIRS else target)
            codes = _codes(z0, unit, BITS, CLIPPED)
            _write(out_at, codes, column0, mask0, N1, N2, 0, D0, B2, PAIRS, WHOLE0)
            if D1:
                codes = _codes(z1, unit, BITS, CLIPPED)
                _write(out_at, codes, column1, mask1, N1, N2, D0, D1, B2, PAIRS, WHOLE1)
