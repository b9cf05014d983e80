"""Products with weights of four bits, in Triton: few tokens at once, and unpacking for many.

A weight [N, K] lies as `graphopt.runtime.quantised_linear.PackedLinear` puts it: uint8
[K / SPAN, N, SPAN / 2]. A byte holds two signed numbers from -8 to 7, in its low bits one of the
first half of a span of inputs, and in its high bits the one as far into the second half. A tile
so unpacks into two operands of matrix units as it lies, and its bytes are one piece of memory.
"""

import triton
import triton.language as tl

# Of four bytes: each nibble, its sign turned, behind the bits of 128 (of 1024 in fp16), whose next
# number is one more; 136 (1032) less is the number. The last lines of both are sums of two halves.
_TO_BF16: tl.constexpr = tl.constexpr("""
{
    .reg .b32 t, u, one, less;
    mov.b32 one, 0x3f803f80;
    mov.b32 less, 0xc308c308;
    prmt.b32 t, $4, 0, 0x4140;
    prmt.b32 u, $4, 0, 0x4342;
    lop3.b32 $0, t, 0x000f000f, 0x43084308, 0x6a;
    lop3.b32 $1, u, 0x000f000f, 0x43084308, 0x6a;
    shr.u32 t, t, 4;
    shr.u32 u, u, 4;
    lop3.b32 $2, t, 0x000f000f, 0x43084308, 0x6a;
    lop3.b32 $3, u, 0x000f000f, 0x43084308, 0x6a;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    fma.rn.bf16x2 $2, $2, one, less;
    fma.rn.bf16x2 $3, $3, one, less;
}
""")
_TO_FP16: tl.constexpr = tl.constexpr("""
{
    .reg .b32 t, u, less;
    mov.b32 less, 0xe408e408;
    prmt.b32 t, $4, 0, 0x4140;
    prmt.b32 u, $4, 0, 0x4342;
    lop3.b32 $0, t, 0x000f000f, 0x64086408, 0x6a;
    lop3.b32 $1, u, 0x000f000f, 0x64086408, 0x6a;
    shr.u32 t, t, 4;
    shr.u32 u, u, 4;
    lop3.b32 $2, t, 0x000f000f, 0x64086408, 0x6a;
    lop3.b32 $3, u, 0x000f000f, 0x64086408, 0x6a;
    add.rn.f16x2 $0, $0, less;
    add.rn.f16x2 $1, $1, less;
    add.rn.f16x2 $2, $2, less;
    add.rn.f16x2 $3, $3, less;
}
""")
_TO_INT8: tl.constexpr = tl.constexpr("""
{
    shl.b32 $0, $2, 4;
    and.b32 $0, $0, 0xf0f0f0f0;
    and.b32 $1, $2, 0xf0f0f0f0;
}
""")


@triton.jit
def _nibbles(codes, TYPE: tl.constexpr):
    """Return the signed numbers in the low and in the high bits of bytes; for int8, times 16."""
    if tl.int8 == TYPE:
        low = (codes << 4).to(tl.int8, bitcast=True)
        high = (codes & 0xF0).to(tl.int8, bitcast=True)
    else:
        # A signed byte's high bits, and its low ones moved there, by a shift that keeps the sign.
        low = ((codes << 4).to(tl.int8, bitcast=True) >> 4).to(TYPE)
        high = (codes.to(tl.int8, bitcast=True) >> 4).to(TYPE)
    return low, high


@triton.jit
def _nibbles_by_words(codes, TYPE: tl.constexpr):
    """As `_nibbles`, four bytes of a register at a time."""
    if tl.int8 == TYPE:
        low, high = tl.inline_asm_elementwise(
            _TO_INT8, "=r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif tl.bfloat16 == TYPE:
        low, high = tl.inline_asm_elementwise(
            _TO_BF16, "=r,=r,=r,=r,r", [codes],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            _TO_FP16, "=r,=r,=r,=r,r", [codes],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def unpacked(codes, TYPE: tl.constexpr, WORDS: tl.constexpr):
    """Return the numbers in the low and the high bits of bytes, of a type; of int8, times 16.

    Args:
        WORDS: By instructions for four bytes at once, which the interpreter has not.
    """
    if WORDS:
        low, high = _nibbles_by_words(codes, TYPE)
    else:
        low, high = _nibbles(codes, TYPE)
    return low, high


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
    group_spans,  # spans that share a scale
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,  # whether scales change along K
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
    x_at = x_ptr + m.to(tl.int64)[None, :] * x_stride + first * SPAN + k[:, None]
    there = (m < M)[None, :]
    if INTEGER and not GROUPED:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for span in range(first, last):
        codes = tl.load(codes_at)
        x_low = tl.load(x_at, mask=there, other=0).to(TYPE)
        x_high = tl.load(x_at + HALF, mask=there, other=0).to(TYPE)
        low, high = unpacked(codes, TYPE, WORDS)
        if GROUPED:
            place = span // group_spans * N + row
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + place).to(TYPE)
                low, high = low - zero[:, None], high - zero[:, None]
            if INTEGER:
                sums = tl.dot(low, x_low, out_dtype=tl.int32)
                sums = tl.dot(high, x_high, sums, out_dtype=tl.int32).to(tl.float32)
            else:
                sums = tl.dot(low, x_low)
                sums = tl.dot(high, x_high, sums)
            total += sums * tl.load(scales_ptr + place).to(tl.float32)[:, None]
        else:
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + row).to(TYPE)
                low, high = low - zero[:, None], high - zero[:, None]
            if INTEGER:
                total = tl.dot(low, x_low, total, out_dtype=tl.int32)
                total = tl.dot(high, x_high, total, out_dtype=tl.int32)
            else:
                total = tl.dot(low, x_low, total)
                total = tl.dot(high, x_high, total)
        codes_at += N * HALF
        x_at += SPAN

    sums = total.to(tl.float32)
    inside = (n < N)[:, None] & (m < M)[None, :]
    # What is written lies along N.
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLITS > 1:
        size = M.to(tl.int64) * N
        tl.store(part_ptr + split * size + place, sums, mask=inside)
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.store(arrived_ptr + tile, 0)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in range(SPLITS):
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
def unpack_weight(
    codes_ptr,  # uint8 [K / SPAN, N, SPAN / 2]
    scales_ptr,  # [K / group, N]
    zeros_ptr,  # [K / group, N] or None
    out_ptr,  # [N, K]: of the scales' type, or int8
    N, spans, group_spans,
    SPAN: tl.constexpr,
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
    low, high = unpacked(codes, TYPE, WORDS)
    if tl.int8 != TYPE:
        place = span // group_spans * N + row
        scale = tl.load(scales_ptr + place).to(tl.float32)[:, None]
        low, high = low.to(tl.float32), high.to(tl.float32)
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + place).to(tl.float32)[:, None]
            low, high = low - zero, high - zero
        low, high = (low * scale).to(TYPE), (high * scale).to(TYPE)
    out_at = out_ptr + n.to(tl.int64)[:, None] * (spans * SPAN) + span * SPAN + k[None, :]
    inside = (n < N)[:, None]
    tl.store(out_at, low, mask=inside)
    tl.store(out_at + HALF, high, mask=inside)
