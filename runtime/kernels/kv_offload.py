"""Pages of keys and values between host memory and a device, in Triton.

The host's memory is pinned: a device reads and writes it by the same address. What is copied is
copied as words of 32 bits, whatever it stands for.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pages", "slots", "read"])
def fetch_pages(
    host_ptr,  # int32 [rows, pages, WORDS], pinned
    pool_ptr,  # int32 [rows, slots, WORDS]
    source_ptr,  # int64 [rows, read]: the page that is fetched, or -1
    slot_ptr,  # int64 [rows, read]: where to
    pages, slots, read,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy pages out of host memory into slots of a pool, one for each program."""
    row, item = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = tl.load(source_ptr + row * read + item)
    if source >= 0:
        slot = tl.load(slot_ptr + row * read + item)
        host_page = host_ptr + (row * pages + source) * WORDS
        pool_page = pool_ptr + (row * slots + slot) * WORDS
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            inside = word < WORDS
            tl.store(pool_page + word, tl.load(host_page + word, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["pages"])
def append_token(
    new_ptr,  # int32 [rows, WORDS]: the new key or value of each row
    host_ptr,  # int32 [rows, pages, PAGE, WORDS], pinned
    pool_ptr,  # int32 [slots of all rows, PAGE, WORDS]
    staged_ptr,  # int32 [rows, pages, PAGE, WORDS], or None
    table_ptr,  # int32 [rows, pages]: the slot of a page, counted over all rows, or -1
    last_ptr,  # int64 [B]: the place of the new token
    GROUPS, pages,
    PAGE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGED: tl.constexpr,
):  # fmt: skip
    """Write a token to host memory and to wherever its page lies on the device."""
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(last_ptr + row // GROUPS)
    page, place = last // PAGE, last % PAGE
    word = tl.arange(0, BLOCK)
    inside = word < WORDS
    new = tl.load(new_ptr + row * WORDS + word, mask=inside)
    at = ((row * pages + page) * PAGE + place) * WORDS
    tl.store(host_ptr + at + word, new, mask=inside)
    if STAGED:
        tl.store(staged_ptr + at + word, new, mask=inside)
    slot = tl.load(table_ptr + row * pages + page).to(tl.int64)
    held = word < tl.where(slot >= 0, WORDS, 0)
    tl.store(pool_ptr + (slot * PAGE + place) * WORDS + word, new, mask=held)
