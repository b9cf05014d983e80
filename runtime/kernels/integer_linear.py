"""Products of int8 codes by int8 weights, in Triton: many tokens at once, scales in the end."""

import triton
import triton.language as tl


@triton.jit
def integer_linear(
    x_ptr,  # int8 [M, K], rows `x_stride` apart
    x_tiles,  # its tensor descriptor, or None
    weight_ptr,  # int8 [N, K], contiguous
    weight_tiles,  # its tensor descriptor, or None
    x_scales_ptr,  # fp32 [M]
    scales_ptr,  # [N]
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M, N, K,
    x_stride,
    unit,  # what every number is times
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # tiles of tokens that share rows of the weight while those are cached
    WHOLE: tl.constexpr,  # whether K is a multiple of BLOCK_K
    FLATTEN: tl.constexpr,  # let the next tile's loads begin before this one is written
):  # fmt: skip
    """Write (x weight^T) * unit * x_scales * scales (+ bias); its sums are exact, in int32."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=FLATTEN):
        start = tile // (GROUP * columns) * GROUP
        height = tl.minimum(rows - start, GROUP)
        row = start + tile % (GROUP * columns) % height
        column = tile % (GROUP * columns) // height
        m = row * BLOCK_M + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        if x_tiles is not None:
            for place in range(0, K, BLOCK_K):
                x = x_tiles.load([row * BLOCK_M, place])
                weight = weight_tiles.load([column * BLOCK_N, place])
                total = tl.dot(x, weight.T, total, out_dtype=tl.int32)
        else:
            k = tl.arange(0, BLOCK_K)
            # Rows behind the last are computed as the last, and not written.
            x_at = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
            weight_at = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
            for place in range(0, K, BLOCK_K):
                if WHOLE:
                    x, weight = tl.load(x_at), tl.load(weight_at)
                else:
                    x = tl.load(x_at, mask=(k < K - place)[None, :], other=0)
                    weight = tl.load(weight_at, mask=(k < K - place)[:, None], other=0)
                total = tl.dot(x, weight, total, out_dtype=tl.int32)
                x_at += BLOCK_K
                weight_at += BLOCK_K
        inside_m, inside_n = m < M, n < N
        scale = tl.load(scales_ptr + n, mask=inside_n, other=0.0).to(tl.float32) * unit
        own = tl.load(x_scales_ptr + m, mask=inside_m, other=0.0)
        y = total.to(tl.float32) * own[:, None] * scale[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        out_at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])
