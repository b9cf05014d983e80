"""The gradient of a root-mean-square norm, in Triton."""

import triton
import triton.language as tl

from graphopt.runtime.kernels.block import row_start


@triton.jit
def rms_norm_gradient(
    slope_ptr,  # the gradient of what `rms_norm` wrote
    x_ptr,
    weight_ptr,
    out_ptr,
    parts_ptr,  # fp32 [programs, N]
    rows, size_1, size_2,
    slope_stride_0, slope_stride_1, slope_stride_2,
    x_stride_0, x_stride_1, x_stride_2,
    eps, offset,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x and, of the gain's, what a program's rows add to it.

    With r = 1 / sqrt(mean(x^2) + eps), n = x r, and g the slope times the gain, the gradient of x
    is r (g - n mean(g n)), and that of the gain the sum of slope n over rows.
    """
    column = tl.arange(0, BLOCK)
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32) + offset
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        start = row_start(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)
        x = tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0)
        start = row_start(row, size_1, size_2, slope_stride_0, slope_stride_1, slope_stride_2)
        slope = tl.load(slope_ptr + start[:, None] + column[None, :], mask=inside, other=0.0)
        x, slope = x.to(tl.float32), slope.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]
        # Without an epsilon rows behind the last have no scale.
        normed, gained = tl.where(inside, x * scale, 0.0), slope * gain[None, :]
        along = tl.sum(gained * normed, 1)[:, None] / N
        out = (scale * (gained - normed * along)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * N + column[None, :], out, mask=inside)
        total += tl.sum(slope * normed, 0)
    if parts_ptr is not None:
        tl.store(parts_ptr + tl.program_id(0) * N + column, total, mask=column < N)
