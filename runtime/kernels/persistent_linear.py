"""A row-parallel linear and the sum of it over ranks, as one persistent kernel in Triton.

Tiles of the output are shared out to the ranks, each of which sums its own tiles. A rank first
computes what the others sum, beginning with what the rank behind it does, and writes each
finished tile into that rank's staging memory; then it computes its own tiles, by when what the
others made of them has long arrived, adds that in fp32 and writes the sum to all ranks. Each byte
travels once, all of it while matrix units work on the next tile: given descriptors, the copy engine
of a core sends a tile from shared memory, and no core is set aside for communication.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.peer_sums import signal, wait, workspace


@triton.jit
def _sent():
    """Wait until what this thread gave to the copy engine has arrived."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, $1;",
        "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _product(
    x_ptr, x_tiles, weight_ptr, weight_tiles, row, column, M, N, K, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return a tile of x weight^T, in fp32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if x_tiles is not None:
        for place in range(0, K, BLOCK_K):
            x = x_tiles.load([row * BLOCK_M, place])
            weight = weight_tiles.load([column * BLOCK_N, place])
            total = tl.dot(x, weight.T, total)
    else:
        k = tl.arange(0, BLOCK_K)
        # Rows behind the last are computed as the last, and not written.
        m = tl.minimum(row * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
        n = tl.minimum(column * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        weight_at = weight_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
        for place in range(0, K, BLOCK_K):
            if WHOLE:
                x, weight = tl.load(x_at), tl.load(weight_at)
            else:
                x = tl.load(x_at, mask=(k < K - place)[None, :], other=0.0)
                weight = tl.load(weight_at, mask=(k < K - place)[:, None], other=0.0)
            total = tl.dot(x, weight, total)
            x_at += BLOCK_K
            weight_at += BLOCK_K
    return total


@triton.jit
def _place(tile, rows, columns, GROUP: tl.constexpr):
    """Return row and column of a tile; GROUP rows share columns of the weight while cached."""
    start = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - start, GROUP)
    return start + tile % (GROUP * columns) % height, tile % (GROUP * columns) // height


@triton.jit
def _inside(row, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return where the numbers of a tile lie in [M, N], and which of them do."""
    m, n = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    return m.to(tl.int64)[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]


@triton.jit(do_not_specialize=["patience", "rank"])
def linear_all_reduce(
    x_ptr,  # [M, K], rows `x_stride` apart
    x_tiles,  # its tensor descriptor, or None
    weight_ptr,  # [N, K], contiguous
    weight_tiles,  # its tensor descriptor, or None
    bias_ptr,  # [N] or None
    out_tiles,  # the tensor descriptor of `out` of the other one of two ranks, or None
    bases_ptr,  # int64 [RANKS]: where each rank's workspace begins
    epochs_ptr,  # int32 [2]: the epoch of the last call, and how many programs have ended
    late_ptr,  # int32: `runtime.kernels.peer_sums`
    patience,
    out,  # bytes into a workspace: [M, N]
    staging,  # bytes: [RANKS - 1, tiles of a rank, BLOCK_M, BLOCK_N]
    flags,  # bytes: int32 [RANKS - 1, tiles of a rank]
    entered,  # bytes: int32, the epoch of the last call that the other one of two ranks began
    ended,  # bytes: int32, how many programs of other ranks have ended, in all calls
    M, N, K,
    x_stride,
    rank,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # whether K is a multiple of BLOCK_K
    TRAP: tl.constexpr,
):  # fmt: skip
    """Write the sum of the ranks' x weight^T (+ bias) to `out` of every workspace."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch = tl.load(epochs_ptr) + 1
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = rows * columns
    share = tl.cdiv(tiles, RANKS)  # a rank sums the tiles from rank * share on
    kind: tl.constexpr = x_ptr.dtype.element_ty
    BULK: tl.constexpr = out_tiles is not None
    inner_m, inner_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inner = inner_m[:, None] * BLOCK_N + inner_n[None, :]
    box = workspace(bases_ptr, rank, staging, x_ptr)
    own = workspace(bases_ptr, rank, out, x_ptr)
    arrived = workspace(bases_ptr, rank, flags, epochs_ptr)
    if BULK:
        if program == 0:
            # Whatever read this rank's result of an earlier call is through: it may be written.
            signal(workspace(bases_ptr, 1 - rank, entered, epochs_ptr), epoch)
    unentered = 1  # not yet known whether the other rank has come so far
    first = (rank + 1) % RANKS * share
    untold = -1  # the place of a tile on its way, which is told of once the next one is computed
    # In loops of several stages Triton lets a copy engine's store run beside what follows.
    for step in tl.range(program, tiles, programs, num_stages=2):
        tile = first + step
        tile = tl.where(tile < tiles, tile, tile - tiles)
        owner = tile // share
        row, column = _place(tile, rows, columns, GROUP)
        total = _product(
            x_ptr, x_tiles, weight_ptr, weight_tiles, row, column, M, N, K, x_stride,
            BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
        )  # fmt: skip
        if bias_ptr is not None:
            n = column * BLOCK_N + inner_n
            bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
            total += bias.to(tl.float32)[None, :]
        if BULK:
            before = untold
            if before >= 0:
                _sent()
            place = tile - owner * share
            untold = place
            if owner == rank:
                # Before it waits for the other, which may wait for that.
                if before >= 0:
                    signal(workspace(bases_ptr, 1 - rank, flags, epochs_ptr) + before, epoch)
                before = -1
                untold = -1
                wait(arrived + place, epoch, late_ptr, patience, TRAP)
                at, inside = _inside(row, column, M, N, BLOCK_M, BLOCK_N)
                total += tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(own + at, total.to(kind), mask=inside)
            if unentered != 0:
                mine = workspace(bases_ptr, rank, entered, epochs_ptr)
                wait(mine, epoch, late_ptr, patience, TRAP)
                unentered = 0
            # Whether a sum or what the other rank is to sum: it goes into the other's result.
            out_tiles.store([row * BLOCK_M, column * BLOCK_N], total.to(kind))
            if before >= 0:
                signal(workspace(bases_ptr, 1 - rank, flags, epochs_ptr) + before, epoch)
        elif owner != rank:
            slot = (rank - owner - 1 + RANKS) % RANKS  # which of the owner's others this rank is
            place = slot * share + tile - owner * share
            theirs = workspace(bases_ptr, owner, staging, x_ptr)
            tl.store(theirs + place.to(tl.int64) * (BLOCK_M * BLOCK_N) + inner, total.to(kind))
            signal(workspace(bases_ptr, owner, flags, epochs_ptr) + place, epoch)
        else:
            for slot in tl.static_range(RANKS - 1):
                place = slot * share + tile - rank * share
                wait(arrived + place, epoch, late_ptr, patience, TRAP)
                part = tl.load(box + place.to(tl.int64) * (BLOCK_M * BLOCK_N) + inner)
                total += part.to(tl.float32)
            at, inside = _inside(row, column, M, N, BLOCK_M, BLOCK_N)
            # This rank's own memory first: what goes to another takes longer.
            for behind in tl.static_range(RANKS):
                target = workspace(bases_ptr, (rank + behind) % RANKS, out, x_ptr)
                tl.store(target + at, total.to(kind), mask=inside)
    if BULK:
        _sent()
        if untold >= 0:
            signal(workspace(bases_ptr, 1 - rank, flags, epochs_ptr) + untold, epoch)

    # Everything is there once all programs of all ranks have ended.
    for other in tl.static_range(1, RANKS):
        tl.debug_barrier()
        peer = (rank + other) % RANKS
        tl.atomic_add(workspace(bases_ptr, peer, ended, epochs_ptr), 1, sem="release", scope="sys")
    if program == 0:
        total_ended = epoch * ((RANKS - 1) * programs)
        wait(workspace(bases_ptr, rank, ended, epochs_ptr), total_ended, late_ptr, patience, TRAP)
    tl.debug_barrier()
    before = tl.atomic_add(epochs_ptr + 1, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        tl.store(epochs_ptr + 1, 0)
        tl.store(epochs_ptr, epoch)
