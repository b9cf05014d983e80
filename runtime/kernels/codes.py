"""Codes of four and of eight bits as operands of matrix units, in Triton.

Every function here is inlined where it is called.
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


@triton.jit
def row_scales(rows, present, DIM: tl.constexpr, BITS: tl.constexpr):
    """Return the scale and the zero point of each row, 0 of those that are not there."""
    at = (rows + DIM * BITS // 8).to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.load(at, mask=present, other=0.0), tl.load(at + 1, mask=present, other=0.0)


@triton.jit
def with_common_power(scales):
    """Return a power of two, and the scales of a block's rows as multiples of it, up to 2.

    A weight of attention times such a multiple is in the range of fp16, where a weight times a
    scale may be below it. Sums are exact when they are divided and multiplied by the power.
    """
    # 2^-60, where rows have no scale: sums divided by it are still in fp32's range.
    largest = tl.maximum(tl.max(scales, 0), 8.673617379884035e-19)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return power, scales / power


@triton.jit
def code_tiles(
    rows, present, features, TYPE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr
):
    """Return the codes of rows as two tiles of a type: of four bits both halves of the features.

    Of eight bits the second is the first.
    """
    codes = tl.load(rows[:, None] + features[None, :], mask=present[:, None], other=0)
    if BITS == 4:
        low, high = unpacked(codes, TYPE, WORDS)
    else:
        # The byte, its sign turned, behind the bits of 2^23, whose next number is one more.
        wide = (codes.to(tl.int32) ^ 0x4B000080).to(tl.float32, bitcast=True)
        low = (wide - 8388736.0).to(TYPE)
        high = low
    return low, high
