"""Where operands of Volta's matrix instruction lie: in lanes, and in shared memory.

`mma.sync.m8n8k4` is four products [8, 4] by [4, 8], one in each quadpair of lanes (PTX ISA,
"Matrix fragments for mma.m8n8k4 with .f16"; CUTLASS names them in `mma_traits_sm70.hpp`). The
kernels in runtime/kernels/volta.cu are written to what is computed here; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

LANES = 32
BANKS = 32
WORD = 4

Address = Callable[[int, int], int]
"""The byte at which byte `b` of row `r` lies: address(r, b)."""


def quadpair(lane: int) -> int:
    """Return which of the four products a lane takes part in."""
    return lane >> 2 & 3


def quadpair_lanes(number: int) -> list[int]:
    """Return the eight lanes of a quadpair."""
    return [4 * number + lane for lane in range(4)] + [16 + 4 * number + lane for lane in range(4)]


def position(lane: int) -> int:
    """Return a lane's place among the eight of its quadpair."""
    return (lane & 3) + 4 * (lane >> 4)


def a_row(lane: int, i: int) -> tuple[int, int]:
    """Return (row, k) of element `i` of A [8, 4], read by rows."""
    return position(lane), i


def a_col(lane: int, i: int) -> tuple[int, int]:
    """Return (row, k) of element `i` of A [8, 4], read by columns."""
    return i + 4 * (lane >> 4), lane % 4


def b_row(lane: int, i: int) -> tuple[int, int]:
    """Return (k, column) of element `i` of B [4, 8], read by rows."""
    return lane % 4, i + 4 * (lane >> 4)


def b_col(lane: int, i: int) -> tuple[int, int]:
    """Return (k, column) of element `i` of B [4, 8], read by columns."""
    return i, position(lane)


def c_f16(lane: int, i: int) -> tuple[int, int]:
    """Return (row, column) of element `i` of the sums [8, 8] in fp16."""
    return position(lane), i


def c_f32(lane: int, i: int) -> tuple[int, int]:
    """Return (row, column) of element `i` of the sums [8, 8] in fp32."""
    return (lane & 1) + (i & 2) + 4 * (lane >> 4), (i & 4) + (lane & 2) + (i & 1)


def tile_row(lane: int) -> int:
    """Return the row of Q, or of the weights, that a lane reads of a 16 by 16 tile."""
    return 8 * (quadpair(lane) & 1) + position(lane)


def tile_key(lane: int) -> int:
    """Return the row of K that a lane reads of a tile of 16 keys."""
    return 8 * (quadpair(lane) >> 1) + position(lane)


def operand_swizzle(row: int) -> int:
    """Return what is XORed into the 16-byte chunk numbers of a row of Q, K or the weights.

    A load reads rows 0-3 and 8-11 of a tile, or 4-7 and 12-15 (arXiv 2410.16663, on Volta).
    """
    return row & 3 | row >> 1 & 4


def value_swizzle(row: int) -> int:
    """Return what is XORed into the 16-byte chunk numbers of a row of V."""
    return 2 * (row & 3)


def padded(size: int, more: int = 0) -> Address:
    """Return the layout of rows of `size` halves, `more` halves apart from each other."""
    pitch = 2 * (size + more)
    return lambda row, byte: row * pitch + byte


def swizzled(size: int, swizzle: Callable[[int], int]) -> Address:
    """Return the layout of rows of `size` halves whose chunks of 16 bytes change places."""
    return lambda row, byte: row * 2 * size + ((byte // 16) ^ swizzle(row)) * 16 + byte % 16


def operand_layout(size: int) -> Address:
    """Return the kernels' layout of rows of Q, K or the weights, `size` halves each.

    Rows of whole 128 bytes are swizzled. Others lie an odd number of chunks apart, and bits 2
    and 3 of the row's number change places: the eight rows of a load then follow each other.
    """
    chunks = size // 8
    if chunks % 8 == 0:
        return swizzled(size, operand_swizzle)
    pitch = 16 * (chunks | 1)

    def address(row: int, byte: int) -> int:
        return (row & ~12 | row << 1 & 8 | row >> 1 & 4) * pitch + byte

    return address


def value_layout(size: int) -> Address:
    """Return the kernels' layout of rows of V, `size` halves each, in whole tiles of 16.

    Rows of whole 128 bytes are swizzled. Others lie a number of chunks apart that is 2 modulo 4:
    four rows by two chunks then fill all banks.
    """
    chunks = -(-size // 16) * 2
    if chunks % 8 == 0:
        return swizzled(8 * chunks, value_swizzle)
    pitch = 16 * (chunks if chunks % 4 else chunks + 2)
    return lambda row, byte: row * pitch + byte


def operand_load(layout: Address, rows: Callable[[int], int], byte: int) -> list[int]:
    """Return every lane's address of a load of Q, K or the weights at `byte` of its row."""
    return [layout(rows(lane), byte) for lane in range(LANES)]


def value_load(layout: Address, column: int) -> list[int]:
    """Return every lane's address of a load of four halves of V for the columns from `column`.

    Quadpairs 0 and 1 read columns 0 to 7 of the 16, the others the next eight.
    """
    return [
        layout(lane & 3, 2 * (column + 8 * (quadpair(lane) >> 1) + 4 * (lane >> 4)))
        for lane in range(LANES)
    ]


def wavefronts(addresses: Sequence[int], size: int) -> int:
    """Return how many passes over the banks a warp's load takes.

    Lanes go in groups that together ask for 128 bytes: 16 lanes of 8 bytes, 8 lanes of 16. A
    group takes as many passes as the most asked bank has different words for it.
    """
    together = BANKS * WORD // size
    passes = 0
    for start in range(0, len(addresses), together):
        words = {
            (address + step) // WORD
            for address in addresses[start : start + together]
            for step in range(0, size, WORD)
        }
        counts = [0] * BANKS
        for word in words:
            counts[word % BANKS] += 1
        passes += max(counts)
    return passes
