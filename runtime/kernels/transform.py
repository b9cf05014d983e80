"""A Kronecker transform of tokens, with what stands before and behind it, in Triton.

In front of it a norm, a gate or nothing; behind it rounding to integer codes, or nothing. A token
[N1 N2] is a tile [N1, N2], which never leaves the program that reads it.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.block import activation, row_start

# 1.5 * 2^23: a number of fp32 as large as this has no bits behind the point, so that a sum with it
# is rounded to the nearest integer, ties to even; its low bits are the integer.
_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


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
    B1: tl.constexpr, B2: tl.constexpr,  # powers of two from N1 and N2 up
    BEFORE: tl.constexpr,  # "norm", "", or the name of an activation
    BITS: tl.constexpr,  # 4 or 8, or 0: values are not rounded
    PAIRS: tl.constexpr,  # put two codes into a byte, the one of even place in the low bits
):  # fmt: skip
    """Write left^T x right as codes [tokens, N1 N2] with a scale for each token, or as values.

    In place of x: the norm of x (+ y, when the sum is written too) times `weight + offset`; or
    act(x) y. A scale is the largest magnitude, clipped, divided by the largest code; a token of
    zeros has the scale 1, and one with something that is no finite number the scale NaN. Products
    take 16 bits and give 32.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    i, j = tl.arange(0, B1), tl.arange(0, B2)
    inside = (i < N1)[:, None] & (j < N2)[None, :]
    column = i[:, None] * N2 + j[None, :]
    if right_ptr is not None:
        square = (j < N2)[:, None] & (j < N2)[None, :]
        right = tl.load(right_ptr + j[:, None] * N2 + j[None, :], mask=square, other=0.0)
    if left_ptr is not None:
        square = (i < N1)[:, None] & (i < N1)[None, :]
        left = tl.load(left_ptr + i[None, :] * N1 + i[:, None], mask=square, other=0.0)
    if BEFORE == "norm":
        if weight_ptr is not None:
            gain = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    CLIPPED: tl.constexpr = clip_low_ptr is not None or clip_high_ptr is not None
    low_clip, high_clip = 1.0, 1.0
    if clip_low_ptr is not None:
        low_clip = tl.load(clip_low_ptr).to(tl.float32)
    if clip_high_ptr is not None:
        high_clip = tl.load(clip_high_ptr).to(tl.float32)

    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        token_64 = tl.full([], token, tl.int64)
        target = token_64 * (N1 * N2)
        start = row_start(token_64, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
        if y_ptr is not None:
            start = row_start(token_64, size_1, size_2, y_stride_0, y_stride_1, y_stride_2)
            y = tl.load(y_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if BEFORE == "norm":
            wide = x.to(tl.float32)
            if y_ptr is not None:
                total = (wide + y).to(TYPE)
                tl.store(sum_ptr + target + column, total, mask=inside)
                wide = total.to(tl.float32)
            mean = tl.sum(tl.sum(wide * wide, 1), 0) / (N1 * N2)
            wide = wide * tl.rsqrt(mean + eps)
            if weight_ptr is not None:
                wide = wide * gain
            x = wide.to(TYPE)
        elif BEFORE != "":
            x = (activation(x.to(tl.float32), BEFORE) * y).to(TYPE)
        if right_ptr is not None:
            z = tl.dot(x, right)
            if left_ptr is not None:
                z = tl.dot(left, z.to(TYPE))
        elif left_ptr is not None:
            z = tl.dot(left, x)
        else:
            z = x.to(tl.float32)
        if BITS == 0:
            tl.store(out_ptr + target + column, z.to(TYPE), mask=inside)
        else:
            most: tl.constexpr = 2 ** (BITS - 1) - 1
            if CLIPPED:
                high = tl.maximum(tl.max(tl.max(z, 1), 0), 0.0) * high_clip
                low = tl.minimum(tl.min(tl.min(z, 1), 0), 0.0) * low_clip
                scale = tl.maximum(high, -low) / most
            else:
                scale = tl.max(tl.max(tl.abs(z), 1), 0) / most
            scale = tl.where(scale == 0.0, 1.0, scale)
            if left_ptr is None or right_ptr is None:
                # Maxima pass over what is no number, which two products bring into a whole token.
                broken = tl.max(tl.max((z != z).to(tl.int32), 1), 0)
                scale = tl.where(broken > 0, float("nan"), scale)
            scale = tl.where(scale <= _LARGEST, scale, float("nan"))
            tl.store(scales_ptr + token, scale)
            steps = z * (1.0 / scale)
            if CLIPPED:
                steps = tl.minimum(tl.maximum(steps, -most - 1.0), most)
            codes = (steps + _TO_INTEGER).to(tl.int32, bitcast=True)
            if PAIRS:
                even, odd = tl.split(tl.reshape(codes & 0xF, [B1, B2 // 2, 2]))
                half = tl.arange(0, B2 // 2)
                there = (i < N1)[:, None] & (half < N2 // 2)[None, :]
                target_at = out_ptr + target // 2 + i[:, None] * (N2 // 2) + half[None, :]
                tl.store(target_at, (even | (odd << 4)).to(tl.uint8), mask=there)
            else:
                tl.store(out_ptr + target + column, codes.to(tl.int8), mask=inside)
