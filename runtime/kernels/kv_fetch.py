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


@triton.jit(do_not_specialize=["pages"])
def plan_fetch(
    wanted_ptr,  # int64 [B, G, READ], by strides: pages of the next step, or -1
    current_ptr,  # int64 [rows, READ]: those of the present one; the next's afterwards
    slot_pages_ptr,  # int64 [rows, 2 READ]: the page in each slot, or -1
    table_ptr,  # int32 [rows, pages]: the slot of a page, counted over all rows
    marks_ptr,  # int8 [rows, pages]: zeros, and zeros again at the end
    free_ptr,  # int32 [rows, 2 READ]
    source_ptr,  # int64 [rows, READ]: the page that is fetched, or -1
    slot_ptr,  # int64 [rows, READ]: where to
    moved_ptr,  # int64: pages fetched so far
    wanted_stride_b, wanted_stride_g,
    GROUPS, pages,
    READ: tl.constexpr,
    LISTED: tl.constexpr,  # the power of two from READ up
):  # fmt: skip
    """Find slots for pages that are wanted and not current: `kv_slots.fetch_plan` in place."""
    row = tl.program_id(0).to(tl.int64)
    item = tl.arange(0, LISTED)
    inside = item < READ
    wanted_row = wanted_ptr + row // GROUPS * wanted_stride_b + row % GROUPS * wanted_stride_g
    wanted = tl.load(wanted_row + item, mask=inside, other=-1)
    current = tl.load(current_ptr + row * READ + item, mask=inside, other=-1)
    marks = marks_ptr + row * pages
    tl.store(marks + current, tl.full([LISTED], 1, tl.int8), mask=current >= 0)
    tl.debug_barrier()
    new = (wanted >= 0) & (tl.load(marks + wanted, mask=wanted >= 0, other=1) == 0)

    place = tl.arange(0, 2 * LISTED)
    there = place < 2 * READ
    slots = slot_pages_ptr + row * 2 * READ
    held = tl.load(slots + place, mask=there, other=-1)
    kept = (held >= 0) & (tl.load(marks + held, mask=held >= 0, other=0) != 0)
    free = there & (kept == 0)
    number = tl.cumsum(free.to(tl.int32), 0) - 1
    tl.store(free_ptr + row * 2 * READ + number, place, mask=free)
    tl.store(slots + place, tl.full([2 * LISTED], -1, tl.int64), mask=free)
    tl.debug_barrier()
    rank = tl.cumsum(new.to(tl.int32), 0) - 1
    slot = tl.load(free_ptr + row * 2 * READ + rank, mask=new, other=0).to(tl.int64)
    tl.store(slots + slot, wanted, mask=new)
    tl.store(table_ptr + row * pages + wanted, (row * 2 * READ + slot).to(tl.int32), mask=new)
    tl.store(marks + current, tl.zeros([LISTED], tl.int8), mask=current >= 0)
    tl.store(current_ptr + row * READ + item, wanted, mask=inside)
    tl.store(source_ptr + row * READ + item, tl.where(new, wanted, -1), mask=inside)
    tl.store(slot_ptr + row * READ + item, slot, mask=inside)
    tl.atomic_add(moved_ptr, tl.sum(new.to(tl.int64), 0))
