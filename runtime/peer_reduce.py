"""Sums over ranks whose GPUs reach each other's memory: one-shot for few bytes, two-shot for many.

Each class has a workspace of its own. A run is a launch that is the same every time, so that it can
be recorded in a CUDA graph. All ranks make the same runs in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.runtime.peer_memory import Layout, Peers, Places

PATIENCE = 600_000_000
"""Looks at a signal, each of about a microsecond, until a kernel gives up: some ten minutes."""
_WORDS = 512
"""32-bit words that a program of a one-shot sum has."""
_BLOCK = 4096
"""Numbers that a program of a two-shot sum takes at once."""
_WARPS = 8


class Waiting:
    """What kernels that wait for other ranks are given.

    Attributes:
        late: int32 [1], not 0 once a wait was given up.
        patience, trap: How often to look for a signal, and whether to stop the device after that.
    """

    def __init__(
        self, device: torch.device | str, patience: int = PATIENCE, *, trap: bool = True
    ) -> None:
        self.late = torch.zeros(1, dtype=torch.int32, device=device)
        self.patience, self.trap = patience, trap


def as_words(x: Tensor) -> Tensor:
    """Return 16-bit numbers [..., N], contiguous and N even, as int32 [..., N / 2]."""
    return x.view(torch.int32)


class OneShot:
    """The sum over the ranks where each sends all that it has to all: one trip, for few bytes.

    Args:
        numel: Of what is summed, even.
    """

    def __init__(self, peers: Peers, numel: int, waiting: Waiting) -> None:
        layout = Layout()
        self._words, self._waiting = numel // 2, waiting
        self._inbox = layout.add((2, peers.ranks, self._words), torch.int64)
        self._programs = -(-self._words // _WORDS)
        self.memory = peers.allocate(layout.bytes)
        self.epochs = torch.zeros(self._programs, dtype=torch.int32, device=peers.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' x, of 16 bits."""
        from graphopt.runtime.kernels.peer_sums import one_shot

        x = x.contiguous()
        out, memory, waiting = torch.empty_like(x), self.memory, self._waiting
        one_shot[(self._programs,)](
            as_words(x), out, memory.bases, self.epochs, waiting.late, waiting.patience,
            self._inbox, self._words, memory.rank,
            RANKS=memory.ranks, BLOCK=_WORDS, TRAP=waiting.trap, num_warps=4,
        )  # fmt: skip
        return out


class TwoShot:
    """The sum over the ranks in place, each of which sums a part of it: for many bytes.

    What is summed lies in the workspace, and the result as well: it holds until the second run
    after it.

    Args:
        room: The most rows of what is summed.
        columns, dtype: Of it, 16 bits.
        programs: Of the kernel; all of them run at once.
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
        layout = Layout()
        self._waiting = waiting
        blocks = -(-room * columns // _BLOCK)
        self._programs = min(programs, -(-blocks // peers.ranks))
        self._places = Places(layout, room, columns, dtype, 2)
        self._flags = layout.add((2, peers.ranks, self._programs), torch.int32)
        self.memory = peers.allocate(layout.bytes)
        self.epochs = torch.zeros(self._programs, dtype=torch.int32, device=peers.device)

    def operand(self, rows: int) -> Tensor:
        """Return where to write what the next run sums, [rows, columns]."""
        return self._places.of(self.memory, rows)

    def __call__(self, rows: int) -> Tensor:
        """Return the sum of what the ranks have written into `operand(rows)`."""
        from graphopt.runtime.kernels.peer_sums import two_shot

        data, memory, waiting = self.operand(rows), self.memory, self._waiting
        two_shot[(self._programs,)](
            data, memory.bases, self.epochs, waiting.late, waiting.patience,
            self._places.offset, self._flags, data.numel(), memory.rank,
            RANKS=memory.ranks, BLOCK=_BLOCK, TRAP=waiting.trap, num_warps=_WARPS,
        )  # fmt: skip
        self._places.turn()
        return data
