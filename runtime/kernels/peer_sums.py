"""Sums over ranks in Triton, through memory that every rank can reach: one-shot and two-shot.

Every rank has a workspace of one layout; `bases` holds the address of each, as this rank sees it.
A number of the call, the epoch, goes with every signal: it only ever rises (and wraps around), so
that nothing is reset and a signal of the call before is never taken for one of this. What it was
last is kept in this rank's memory, which makes a launch the same every time: fit for CUDA graphs.

No wait is without end: after `patience` looks a program gives up, says so in `late`, and the
result is wrong; with TRAP it stops the device instead.
"""

import triton
import triton.language as tl


@triton.jit
def workspace(bases_ptr, rank, offset, like):
    """Return a pointer of the type of `like` to what lies `offset` bytes into a rank's workspace.

    Offsets are multiples of 16.
    """
    address = tl.load(bases_ptr + rank) + offset
    return tl.multiple_of(address.to(like.dtype), 16)


@triton.jit
def stop(TRAP: tl.constexpr):
    """Stop the device, where that was asked for."""
    if TRAP:
        tl.inline_asm_elementwise(
            "trap; mov.u32 $0, $1;", "=r,r", [1], dtype=tl.int32, is_pure=False, pack=1
        )


# A flag is a store of one thread, since an atomic exchange would wait for the other GPU's answer,
# and of the last thread, since the first ones go on to start copies.
_STORE: tl.constexpr = tl.constexpr("""
{
    .reg .pred last;
    .reg .u32 thread, threads;
    mov.u32 thread, %tid.x;
    mov.u32 threads, %ntid.x;
    sub.u32 threads, threads, 1;
    setp.eq.u32 last, thread, threads;
    @last st.release.sys.global.u32 [$1], $2;
    mov.u32 $0, 0;
}
""")
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels are run by Triton's interpreter, which knows no instructions of a GPU."""


@triton.jit
def signal(flag_ptr, epoch):
    """Say, at a flag that may be another GPU's, that all which this program wrote is there."""
    tl.debug_barrier()
    if INTERPRETED:
        tl.atomic_xchg(flag_ptr, epoch, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(
            _STORE, "=r,l,r", [flag_ptr, epoch], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _look(flag_ptr):
    """Return a flag; what was written before it can then be read, by each thread that looks."""
    if INTERPRETED:
        seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    else:
        seen = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [flag_ptr], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    return seen


@triton.jit
def wait(flag_ptr, epoch, late_ptr, patience, TRAP: tl.constexpr):
    """Wait until a flag of this GPU has come to an epoch; all written before it can then be read.

    A difference is compared, which stays right where epochs wrap around.
    """
    seen = _look(flag_ptr)
    looks = 0
    while (seen - epoch < 0) & (looks < patience):
        seen = _look(flag_ptr)
        looks += 1
    if seen - epoch < 0:
        tl.store(late_ptr, epoch)
        stop(TRAP)


@triton.jit
def _halves(words, kind: tl.constexpr):
    """Return the two 16-bit numbers of each 32-bit word, in fp32."""
    low = (words & 0xFFFF).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
    high = (words >> 16).to(tl.int16).to(kind, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _words(low, high, kind: tl.constexpr):
    """Return fp32 numbers, rounded to 16 bits, as 32-bit words of two."""
    one = low.to(kind).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    other = high.to(kind).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return one | other


@triton.jit
def _exchanged(
    x_ptr, bases_ptr, late_ptr, patience, epoch, inbox, words, at, inside, rank,
    KIND: tl.constexpr, RANKS: tl.constexpr, TRAP: tl.constexpr,
):  # fmt: skip
    """Send words to every rank, and return the sums of what all sent, in fp32.

    Each 32-bit word travels with the epoch beside it, in 64 bits that arrive together: who reads
    it sees by itself that it is there, so that no flag and no fence is needed. Of two inboxes the
    epoch's parity names one: a rank sends for the call after the next only once it has had
    what this rank sent for the next, and so once this rank is through with this one.
    """
    own = tl.load(x_ptr + at, mask=inside, other=0)
    message = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    box = inbox + (epoch & 1).to(tl.int64) * (RANKS * words * 8)
    for step in tl.static_range(RANKS):
        peer = (rank + 1 + step) % RANKS
        slot = workspace(bases_ptr, peer, box, bases_ptr) + rank * words
        tl.store(slot + at, message, mask=inside)
    # In the order of ranks, so that the sum is the same on all of them.
    low = tl.zeros(at.shape, tl.float32)
    high = tl.zeros(at.shape, tl.float32)
    mine = workspace(bases_ptr, rank, box, bases_ptr)
    missing = 0
    for source in tl.static_range(RANKS):
        seen = tl.load(mine + source * words + at, mask=inside, other=message, volatile=True)
        wrong = tl.max(((seen >> 32).to(tl.int32) != epoch).to(tl.int32))
        looks = 0
        while (wrong != 0) & (looks < patience):
            seen = tl.load(mine + source * words + at, mask=inside, other=message, volatile=True)
            wrong = tl.max(((seen >> 32).to(tl.int32) != epoch).to(tl.int32))
            looks += 1
        missing += wrong
        one, other = _halves(seen.to(tl.int32), KIND)
        low += one
        high += other
    if missing != 0:
        tl.store(late_ptr, epoch)
        stop(TRAP)
    return low, high


@triton.jit(do_not_specialize=["patience", "rank"])
def one_shot(
    x_ptr,  # int32 [words]: two 16-bit numbers each
    out_ptr,  # as x, of 16 bits
    bases_ptr,  # int64 [RANKS]
    epochs_ptr,  # int32, one a program
    late_ptr,  # int32
    patience,
    inbox,  # bytes into a workspace: int64 [2, RANKS, words]
    words,
    rank,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TRAP: tl.constexpr,
):
    """Write the sum of the ranks' x: each sends all it has to all."""
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    at = program * BLOCK + tl.arange(0, BLOCK)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    low, high = _exchanged(
        x_ptr, bases_ptr, late_ptr, patience, epoch, inbox, words, at, at < words, rank,
        kind, RANKS, TRAP,
    )  # fmt: skip
    total = _words(low, high, kind)
    tl.store(out_ptr.to(x_ptr.dtype) + at, total, mask=at < words)
    tl.debug_barrier()
    tl.store(epochs_ptr + program, epoch)


@triton.jit
def meet(
    bases_ptr, epochs_ptr, late_ptr, patience, flags, epoch, rank,
    RANKS: tl.constexpr, TRAP: tl.constexpr,
):  # fmt: skip
    """Wait until this program of every rank has come here; flags: int32 [RANKS, programs]."""
    place = tl.program_id(0)
    programs = tl.num_programs(0)
    for step in tl.static_range(1, RANKS):
        peer = (rank + step) % RANKS
        signal(workspace(bases_ptr, peer, flags, epochs_ptr) + rank * programs + place, epoch)
    mine = workspace(bases_ptr, rank, flags, epochs_ptr)
    for step in tl.static_range(1, RANKS):
        source = (rank + step) % RANKS
        wait(mine + source * programs + place, epoch, late_ptr, patience, TRAP)


@triton.jit(do_not_specialize=["patience", "rank"])
def two_shot(
    data_ptr,  # [count] in this rank's workspace: its x, and then the sum
    bases_ptr,  # int64 [RANKS]
    epochs_ptr,  # int32, one a program
    late_ptr,  # int32
    patience,
    offset,  # bytes into a workspace: where data lies
    flags,  # bytes into a workspace: int32 [2, RANKS, programs]
    count,
    rank,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TRAP: tl.constexpr,
):
    """Put the sum of the ranks' data in place of it on all ranks: each sums a part of it."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch = tl.load(epochs_ptr + program) + 1
    meet(bases_ptr, epochs_ptr, late_ptr, patience, flags, epoch, rank, RANKS, TRAP)
    blocks = tl.cdiv(count, BLOCK)
    share = tl.cdiv(blocks, RANKS)
    first = rank * share
    last = tl.minimum(first + share, blocks)
    inner = tl.arange(0, BLOCK).to(tl.int64)
    for block in range(first + program, last, programs):
        at = inner + block * BLOCK
        inside = at < count
        total = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(RANKS):
            part = tl.load(workspace(bases_ptr, source, offset, data_ptr) + at, mask=inside)
            total += part.to(tl.float32)
        result = total.to(data_ptr.dtype.element_ty)
        for step in tl.static_range(RANKS):
            peer = (rank + 1 + step) % RANKS
            tl.store(workspace(bases_ptr, peer, offset, data_ptr) + at, result, mask=inside)
    after = flags + RANKS * programs * 4
    meet(bases_ptr, epochs_ptr, late_ptr, patience, after, epoch, rank, RANKS, TRAP)
    tl.store(epochs_ptr + program, epoch)


@triton.jit(do_not_specialize=["peer", "flag"])
def signal_peer(bases_ptr, epoch_ptr, flag, peer):
    """Write the epoch of this call `flag` bytes into a peer's workspace: a launch of one program.

    It comes behind all that the stream did before.
    """
    signal(workspace(bases_ptr, peer, flag, epoch_ptr), tl.load(epoch_ptr) + 1)


@triton.jit(do_not_specialize=["patience"])
def wait_for_peer(flag_ptr, epoch_ptr, late_ptr, patience, LAST: tl.constexpr, TRAP: tl.constexpr):
    """Wait for a peer's signal of this call; with LAST, the call ends, and its epoch is kept."""
    epoch = tl.load(epoch_ptr) + 1
    wait(flag_ptr, epoch, late_ptr, patience, TRAP)
    if LAST:
        tl.store(epoch_ptr, epoch)
