"""Row-parallel linears summed over ranks whose GPUs reach each other's memory: four ways.

Each class has a workspace of its own, for so many rows. A run is the same launches every time, so
that it can be recorded in a CUDA graph; all ranks make the same runs in the same order. A result
lies in the workspace, in one of a few places that take turns: it holds until the second run after
it.

Layout letters: M tokens, K a rank's features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.peer_memory import Layout, Peers, Places
from graphopt.runtime.peer_reduce import TwoShot, Waiting
from graphopt.runtime.reduction_plan import MOST_CHUNKS, LinearTiles


class SummedLinear:
    """A product by the library, and `TwoShot` behind it.

    Args:
        room: The most rows, M.
        columns: N.
        programs: Of the kernel that sums.
    """

    def __init__(
        self,
        peers: Peers,
        room: int,
        columns: int,
        dtype: torch.dtype,
        programs: int,
        waiting: Waiting,
    ) -> None:
        self._sum = TwoShot(peers, room, columns, dtype, programs, waiting)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the sum of the ranks' x weight^T + bias: [M, K], [N, K] and [N] to [M, N]."""
        out = self._sum.operand(len(x))
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        return self._sum(len(x))


class ChunkedLinear:
    """Products by the library, of some rows each, which the copy engines send to the one peer.

    A rank first computes the rows that the other sums, whose chunks go into the place of the
    result there; then its own, each added by the product itself to what has arrived in that
    place, and sent as well. The last chunk is small, since its copy is waited for.

    Args:
        room: The most rows, M.
        columns: N.
    """

    def __init__(
        self,
        peers: Peers,
        room: int,
        columns: int,
        dtype: torch.dtype,
        waiting: Waiting,
    ) -> None:
        self._waiting = waiting
        layout = Layout()
        self._places = Places(layout, room, columns, dtype, 2)
        # A flag for each chunk, those that are computed for the other first; and one for that
        # whatever read an earlier result in its place is through: it may be written.
        self._flags = [layout.add((1,), torch.int32) for _ in range(2 * MOST_CHUNKS)]
        self._entered = layout.add((1,), torch.int32)
        self.memory = peers.allocate(layout.bytes)
        self.epoch = torch.zeros(1, dtype=torch.int32, device=peers.device)
        self._part = torch.empty(-(-room // 2), columns, dtype=dtype, device=peers.device)
        self._copies, self._signals = (torch.cuda.Stream(peers.device) for _ in range(2))

    def __call__(
        self, x: Tensor | Callable[[slice], Tensor], weight: Tensor, chunks: Sequence[int]
    ) -> Tensor:
        """Return the sum of the ranks' x weight^T: [M, K] and [N, K] to [M, N].

        Args:
            x: Or what computes some rows of it, while those before are on their way.
            chunks: Rows of each; together M / 2, those that a rank sums.
        """
        own, other = self.memory.rank, 1 - self.memory.rank
        count = 2 * sum(chunks)
        out, theirs = (self._places.of(self.memory, count, rank) for rank in (own, other))
        part_of = x.__getitem__ if isinstance(x, Tensor) else x
        self._places.turn()
        main, matrix = torch.cuda.current_stream(), weight.t()
        self._signal(self._entered, main)
        first = other * sum(chunks)
        for index, rows in enumerate(_rows_of(other, chunks)):
            part = self._part[rows.start - first : rows.stop - first]
            torch.mm(part_of(rows), matrix, out=part)
            self._copies.wait_stream(main)
            if index == 0:
                with torch.cuda.stream(self._copies):
                    self._wait(self._entered)
            self._copy(theirs[rows], part, self._flags[index])
        for index, rows in enumerate(_rows_of(own, chunks)):
            own_part = part_of(rows)
            self._wait(self._flags[index])
            out[rows].addmm_(own_part, matrix)
            self._copies.wait_stream(main)
            self._copy(theirs[rows], out[rows], self._flags[len(chunks) + index])
        main.wait_stream(self._copies)
        main.wait_stream(self._signals)
        # What is sent in one order arrives in it.
        self._wait(self._flags[2 * len(chunks) - 1], last=True)
        return out

    def _copy(self, target: Tensor, source: Tensor, flag: int) -> None:
        """Copy by an engine while what is launched next runs, and tell the peer of it."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        # On a stream of its own, so that copies follow each other.
        self._signal(flag, self._copies)

    def _signal(self, flag: int, behind: torch.cuda.Stream) -> None:
        from graphopt.runtime.kernels.peer_sums import signal_peer

        self._signals.wait_stream(behind)
        with torch.cuda.stream(self._signals):
            signal_peer[(1,)](
                self.memory.bases, self.epoch, flag, 1 - self.memory.rank,
                num_warps=1,
            )  # fmt: skip

    def _wait(self, flag: int, *, last: bool = False) -> None:
        from graphopt.runtime.kernels.peer_sums import wait_for_peer

        waiting = self._waiting
        own = self.memory.part(flag, (1,), torch.int32)
        wait_for_peer[(1,)](
            own, self.epoch, waiting.late, waiting.patience, LAST=last, TRAP=waiting.trap,
            num_warps=1,
        )  # fmt: skip


def _rows_of(rank: int, chunks: Sequence[int]) -> Iterator[slice]:
    """Yield the rows of each chunk that a rank sums."""
    start = rank * sum(chunks)
    for size in chunks:
        yield slice(start, start + size)
        start += size


class PersistentLinear:
    """One kernel that computes tiles, sends each on when it is finished, and sums its own.

    Args:
        room: The most rows, M.
        columns: N.
        cores: Of the GPU; each runs `tiles.programs` of the kernel, all of them at once.
        bulk: Whether copy engines of the cores send tiles; None where they can.
    """

    def __init__(
        self,
        peers: Peers,
        room: int,
        columns: int,
        dtype: torch.dtype,
        tiles: LinearTiles,
        cores: int,
        waiting: Waiting,
        *,
        bulk: bool | None = None,
    ) -> None:
        self._tiles, self._waiting = tiles, waiting
        self._programs = cores * tiles.programs
        count = -(-room // tiles.rows) * -(-columns // tiles.columns)
        slots = (peers.ranks - 1) * -(-count // peers.ranks)
        able = peers.ranks == 2 and columns % 8 == 0 and copies_tiles(peers.device)
        self._bulk = able if bulk is None else bulk and able
        layout = Layout()
        # What arrives lies where the sum will, or by itself.
        self._places = Places(layout, room, columns, dtype, 2)
        self._staging = 0 if self._bulk else layout.add((slots, tiles.rows, tiles.columns), dtype)
        self._flags = layout.add((slots,), torch.int32)
        self._entered, self._ended = (layout.add((1,), torch.int32) for _ in range(2))
        self.memory = peers.allocate(layout.bytes)
        self.epochs = torch.zeros(2, dtype=torch.int32, device=peers.device)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the sum of the ranks' x weight^T + bias: [M, K], [N, K] and [N] to [M, N].

        Args:
            x: Its last axis is contiguous.
            weight: Contiguous.
        """
        from graphopt.runtime.kernels.persistent_linear import linear_all_reduce

        memory, tiles, waiting = self.memory, self._tiles, self._waiting
        (rows, depth), columns = x.shape, len(weight)
        x_tiles = described(x, tiles.rows, tiles.depth)
        weight_tiles = described(weight, tiles.columns, tiles.depth)
        if x_tiles is None or weight_tiles is None:
            x_tiles = weight_tiles = None
        out_tiles = None
        if self._bulk:
            theirs = self._places.of(memory, rows, 1 - memory.rank)
            out_tiles = described(theirs, tiles.rows, tiles.columns)
        linear_all_reduce[(self._programs,)](
            x, x_tiles, weight, weight_tiles, bias, out_tiles, memory.bases, self.epochs,
            waiting.late, waiting.patience,
            self._places.offset, self._staging, self._flags, self._entered, self._ended,
            rows, columns, depth, x.stride(0), memory.rank,
            RANKS=memory.ranks, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth,
            GROUP=tiles.group, WHOLE=depth % tiles.depth == 0, TRAP=waiting.trap,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        out = self._places.of(memory, rows)
        self._places.turn()
        return out


def copies_tiles(device: torch.device) -> bool:
    """Return whether cores of a GPU copy tiles of a tensor by themselves (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def described(matrix: Tensor, rows: int, columns: int) -> Any:
    """Return the tensor descriptor of tiles of a matrix; None where the device copies none of it.

    What of a tile lies outside of the matrix is read as 0, and not written.

    Args:
        matrix: The last axis contiguous.
    """
    step = 16 // matrix.element_size()
    if not copies_tiles(matrix.device) or matrix.data_ptr() % 16 or matrix.stride(0) % step:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])
