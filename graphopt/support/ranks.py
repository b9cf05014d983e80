"""The processes that share one run, each on a device of its own, and what they tell each other.

Every rank runs the same program in the same order. What they share is windows of text: a rank runs
its part of them, and what is learnt from them is summed, or put together in order, so that all go
on with the same numbers and take the same decisions. `torchrun` and its like start the processes
and say in the environment which is which; gloo carries tensors of a CPU, NCCL those of GPUs.

    with joined("auto"):
        group = sharing(len(windows))
        total = group.total(sums_of(group.part(windows)))

Where there are fewer things than ranks, every rank does all of them: `sharing` then gives `ALONE`,
whose sums are what they are given.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import UsageError, described
from graphopt.support.launched import Launched, launched
from graphopt.support.quantities import counted
from graphopt.support.rank_endings import RankEndings, RankError

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)
"""Until torch gives a collective up: one may wait for what the first rank writes. Ranks that have
ended are found by `graphopt.support.rank_watch`."""

POLLED, SLEPT = 2e-3, 2e-4
"""Seconds for which the end of a collective is polled, and between two later looks."""

REASON_AFTER = 5.0
"""Seconds for which a rank that lost another one waits for its reason."""


class Ranks:
    """The ranks among which things are shared, as one of them sees it.

    Attributes:
        rank, world: The number of this one, from 0, and how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1, endings: RankEndings | None = None) -> None:
        self.rank, self.world, self._endings = rank, world, endings

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, prints and asks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` things are this rank's: neighbours, those of rank 0 in front."""
        start, stop = (count * rank // self.world for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def part(self, rows: Tensor) -> Tensor:
        """Return this rank's share of the rows of a tensor."""
        own = self.share(len(rows))
        return rows[own.start : own.stop]

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, bit for bit the same on each; `value` may be changed."""
        if self.world == 1:
            return value
        carried = _carried(value)
        self._wait(lambda: dist.all_reduce(carried, async_op=True))
        return carried.to(value.device)

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """Return the sum over ranks of each number."""
        if self.world == 1:
            return numbers
        return tuple(self.total(torch.tensor(numbers, dtype=torch.float64)).tolist())

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, in the order of ranks; they may have any number each."""
        if self.world == 1:
            return rows
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.total(counts)
        # As bytes: backends do not know every dtype.
        width = math.prod(rows.shape[1:]) * rows.element_size()
        carried = _carried(rows.detach())
        padded = carried.new_zeros(int(counts.max()), width, dtype=torch.uint8)
        if len(rows):
            padded[: len(rows)] = carried.view(len(rows), -1).view(torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        self._wait(lambda: dist.all_gather(parts, padded, async_op=True))
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole.view(-1).view(rows.dtype).view(-1, *rows.shape[1:]).to(rows.device)

    def most(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world == 1:
            return number
        value = torch.tensor([number])
        self._wait(lambda: dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True))
        return int(value)

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        return -self.most(-number)

    def made_by_first(self, make: Callable[[], T]) -> T:
        """Return on every rank what the first one makes; the others wait for it.

        Args:
            make: Returns tensors, numbers, text, or lists and dicts of them.
        """
        if self.world == 1:
            return make()
        file = io.BytesIO()
        if self.first:
            torch.save(make(), file)
        data = torch.frombuffer(bytearray(file.getvalue() or b"-"), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._wait(lambda: dist.broadcast(size, 0, async_op=True))
        data = data if self.first else torch.empty(int(size), dtype=torch.uint8)
        self._wait(lambda: dist.broadcast(data, 0, async_op=True))
        made = io.BytesIO(data.numpy().tobytes())
        return cast(T, torch.load(made, map_location="cpu", weights_only=True))

    def take_from_first(self, values: Sequence[Tensor]) -> None:
        """Give tensors the values that they have on the first rank, where they lie."""
        for value in values if self.world > 1 else ():
            carried = _carried(value.detach())
            self._wait(partial(dist.broadcast, carried, 0, async_op=True))
            value.data.copy_(carried)

    def clock(self) -> float:
        """Return the time on the first rank's clock, in seconds: it decides what takes too long."""
        if self.world == 1:
            return time.perf_counter()
        now = torch.tensor([time.perf_counter()], dtype=torch.float64)
        self._wait(lambda: dist.broadcast(now, 0, async_op=True))
        return float(now)

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.most(0)

    def tell(self, message: str, remedy: str, code: int) -> None:
        """Leave the other ranks the reason for which this one ends."""
        if self._endings is not None:
            self._endings.tell(message, remedy, code)

    def speaks(self, message: str, remedy: str, code: int) -> bool:
        """Leave the reason for which this rank ends; return whether it is to tell the user."""
        return self._endings is None or self._endings.speaks(message, remedy, code)

    def leave(self) -> None:
        """Wait until every rank has come to its end."""
        if self._endings is not None:
            self._endings.leave()

    def stop(self) -> None:
        """Look after the others no more."""
        if self._endings is not None:
            self._endings.stop()

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Wait for the end of a collective, or of any rank.

        Raises:
            RankError: Another rank has ended, with its reason where it gave one.
        """
        assert self._endings is not None
        try:
            work, begun = begin(), time.perf_counter()
            while not work.is_completed():
                self._endings.check()
                # Ranks may share a core: one that only waits lets the others go on.
                time.sleep(SLEPT if time.perf_counter() - begun > POLLED else 0)
            work.wait()
        except RuntimeError as error:
            raise self._endings.lost(described(error), REASON_AFTER) from error


ALONE = Ranks()
"""One process that shares nothing."""

_here = ALONE
_on_sigterm: Any = None
"""What SIGTERM did before; None where this is one process."""


def here() -> Ranks:
    """Return the ranks of this run: `ALONE`, unless it was started as one of several."""
    return _here


def sharing(*counts: int) -> Ranks:
    """Return the ranks among which so many things are shared, of each of several sorts.

    Those of the run, where each gets at least one of every sort that there is any of; else `ALONE`:
    every rank does them all.
    """
    fits = all(count == 0 or count >= _here.world for count in counts)
    return _here if fits else ALONE


def join(device: str) -> Ranks:
    """Be the rank that the environment states, until `leave` or `quit_ranks`.

    Where it states one process, that is `ALONE`. A rank computes on the GPU of its local number,
    which becomes the current one, where there are GPUs and the device is none of the CPU's.

    Args:
        device: What the user named, such as `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: There are more ranks on this host than GPUs, or a GPU was named by number.
        RankError: The other ranks cannot be reached.
    """
    global _here, _on_sigterm
    found = launched()
    if found is None:
        return ALONE
    backend = "cpu:gloo,cuda:nccl" if _on_gpus(found, device) else "gloo"
    if threading.current_thread() is threading.main_thread():
        _on_sigterm = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        endings = RankEndings(found.rank, found.world, _of_first)
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"Rank {found.rank} cannot reach the others at {found.address}: {described(error)}.",
            "Look at what torchrun, or --launcher, says of the other ranks.",
        ) from error
    _here = Ranks(found.rank, found.world, endings)
    return _here


def leave() -> None:
    """Wait until every rank has come here, and be one process again.

    Raises:
        RankError: Another one has ended by an error.
    """
    if _here.world > 1:
        _here.leave()
        dist.destroy_process_group()  # after an error it would wait for the others
    quit_ranks()


def quit_ranks() -> None:
    """Be one process again, without waiting for others."""
    global _here, _on_sigterm
    _here.stop()
    _here = ALONE
    if _on_sigterm is not None:
        signal.signal(signal.SIGTERM, _on_sigterm)
        _on_sigterm = None


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Be the rank that the environment states in the body; see `join`.

    An error of the body ends the other ranks too, with what it says.
    """
    ranks = join(device)
    try:
        yield ranks
        leave()
    except BaseException as error:
        ranks.tell(f"{described(error)}.", "", 1)
        raise
    finally:
        quit_ranks()


def _told_to_end(*_: Any) -> None:
    """Let SIGTERM, by which torchrun ends the other ranks, end what runs as an error does."""
    raise RankError(
        f"Rank {_here.rank} was told to end (SIGTERM), as another one had ended.",
        "The reason is what that one said, or its host's log has it.",
    )


def _on_gpus(found: Launched, device: str) -> bool:
    """Make this rank's GPU the current one; return whether it computes on one."""
    if device.startswith("cpu") or not torch.cuda.is_available():
        return False
    if ":" in device:
        raise UsageError(
            f"--device {device} names one GPU, and every rank has its own.",
            "Give --device cuda, or leave it out.",
        )
    count = torch.cuda.device_count()
    if found.local_world > count:
        raise UsageError(
            f"There are {found.local_world} ranks on this host, and it has "
            f"{counted(count, 'GPU')}.",
            f"Start {count} at most, or give --device cpu.",
        )
    torch.cuda.set_device(found.local)
    return True


def _of_first(value: Any) -> Any:
    """Return what rank 0 gives here. All ranks have to come."""
    given = [value]
    dist.broadcast_object_list(given, src=0, device=torch.device("cpu"))
    return given[0]


def _carried(value: Tensor) -> Tensor:
    """Return a tensor as it can be reduced: whole, on a device that a backend knows."""
    value = value if value.device.type in ("cpu", "cuda") else value.cpu()
    return value.clone() if value.is_inference() else value.contiguous()
