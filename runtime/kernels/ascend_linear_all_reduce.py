"""A row-parallel linear and its sum over two ranks on Ascend: some tiles of it, by Triton.

A plan's stages are launches of this kernel: first those of the tiles that the other rank sums,
whose results go into a box in its memory, then those of this rank's own, to which what lies in its
own box is added and which are written to both ranks. Between two stages the stream waits for the
other rank's notice that the box is full, so that no core waits for another device: while the links
carry one stage, the cube cores compute the next.

One program runs on each cube core and walks over the tiles of its stage.
"""

import triton
import triton.language as tl


@triton.jit
def ascend_linear_all_reduce(
    x_ptr,  # [M, K], contiguous
    weight_ptr,  # [N, K], contiguous
    box_ptr,  # [tiles of a rank, BLOCK_M, BLOCK_N]: with ADD this rank's own, else the other's
    out_ptr,  # [M, N], contiguous: of this rank
    other_out_ptr,  # the same of the other
    M, N, K,
    first,  # the stage's first tile, of all tiles
    count,  # how many tiles it has
    boxed,  # which tile is the first of the box
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,  # whether this rank sums these tiles
):  # fmt: skip
    columns = tl.cdiv(N, BLOCK_N)
    inner_m = tl.arange(0, BLOCK_M)
    inner_n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for step in range(tl.program_id(0), count, tl.num_programs(0)):
        tile = first + step
        m = tile // columns * BLOCK_M + inner_m
        n = tile % columns * BLOCK_N + inner_n
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for place in range(0, K, BLOCK_K):
            x = tl.load(
                x_ptr + m[:, None] * K + place + k[None, :],
                mask=(m < M)[:, None] & (place + k < K)[None, :], other=0.0,
            )  # fmt: skip
            weight = tl.load(
                weight_ptr + n[:, None] * K + place + k[None, :],
                mask=(n < N)[:, None] & (place + k < K)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(x, tl.trans(weight), total)
        held = (tile - boxed) * (BLOCK_M * BLOCK_N) + inner_m[:, None] * BLOCK_N + inner_n[None, :]
        if ADD:
            total += tl.load(box_ptr + held).to(tl.float32)
            at = m[:, None] * N + n[None, :]
            inside = (m < M)[:, None] & (n < N)[None, :]
            result = total.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, result, mask=inside)
            tl.store(other_out_ptr + at, result, mask=inside)
        else:
            tl.store(box_ptr + held, total.to(out_ptr.dtype.element_ty))
