"""The ranks that run one model together: how they begin, and that they end together.

`torchrun` starts a process for each rank and tells it by environment variables which it is. What a
model computes is reduced and gathered by the group of a DeviceMesh: by NCCL between GPUs, by gloo
between CPUs. What else ranks tell each other goes through a second group, of gloo, which waits for
as long as it takes.

They watch each other (`rank_watch.py`): where one ends before the others are done, these know at
once, also while they wait in a recorded step, which no timeout of NCCL sees. They say why, and end
as well.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from graphopt.runtime.package_digest import differences, package_digest
from graphopt.support.rank_watch import RankEnd, RankWatch

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits in a collective for others that live and do not come."""
_EVER = timedelta(days=365)
_DONE, _MOMENT = "", 0.5
_ending = threading.Lock()
"""Held for good by the thread that says why this process ends."""


class RankError(RuntimeError):
    """The ranks cannot run the model together; with what to do about it."""


@dataclass
class Ranks:
    """This process as one of the ranks of a model.

    Attributes:
        count: How many there are.
        rank: The number of this one.
        device: Where it computes.
        mesh: Of all ranks, in one dimension.
        group: Of `mesh`, for collectives of what is computed.
        messages: The group of gloo for what else they tell each other.
        made_group: Whether torch.distributed was initialised here, and ends with `leave`.
    """

    count: int
    rank: int
    device: torch.device
    mesh: DeviceMesh
    group: dist.ProcessGroup
    messages: dist.ProcessGroup
    made_group: bool = True
    _watch: RankWatch | None = None
    _leaving: bool = False

    def of_first(self, value: T) -> T:
        """Return what rank 0 gives here. All ranks have to come."""
        given = [value]
        dist.broadcast_object_list(given, src=0, group=self.messages)
        return given[0]

    def gathered(self, value: T) -> list[T]:
        """Return what each rank gives here. All ranks have to come."""
        given: list[Any] = [None] * self.count
        dist.all_gather_object(given, value, group=self.messages)
        return given

    def watch(self) -> None:
        """End this process, with the reason, when another rank ends before `leave`.

        Raises:
            RankError: The ranks do not reach each other.
        """
        try:
            self._watch = RankWatch(self.rank, self.count, self.of_first, self._end_with)
        except OSError as error:
            raise RankError(
                f"rank {self.rank} cannot watch the others: {error}; all have to reach the host of "
                "rank 0 by TCP, by the name that it has or by MASTER_ADDR"
            ) from error

    def _end_with(self, other: RankEnd) -> None:
        # The main thread may wait for that rank where no exception reaches it.
        _end(f"rank {self.rank} ends: rank {other.rank} {other.what}", other.code)

    def leave(self, reason: str = _DONE) -> None:
        """Tell the others that this rank is done, and wait until they are.

        Args:
            reason: Why it failed instead: the others end at once, and so does this one.
        """
        if self._leaving or self._watch is None:
            return
        self._leaving = True
        watch = self._watch
        if reason != _DONE:
            # Where another rank's end made this one fail, that is the reason.
            if watch.until(lambda: watch.end is not None, _MOMENT) and watch.end is not None:
                self._end_with(watch.end)
            watch.tell(reason, "", 1)
            _end(f"rank {self.rank} ends: it {reason}", 1)
        end = watch.leave()
        if end is not None:
            self._end_with(end)
        if not self.made_group:
            return
        for item in gc.get_objects():
            if type(item) is torch.cuda.CUDAGraph:
                item.reset()  # NCCL's communicators wait for the graphs that they are in
        dist.destroy_process_group()


_joined: Ranks | None = None


def join(count: int, device: torch.device | str, code: Path, weights: Path) -> Ranks:
    """Return this process as one of `count` ranks, and wait for the others.

    A process group that is there already is taken; else one is made, as `torchrun` says.

    Args:
        device: `cpu`, or the kind of device of which each rank takes its own.
        code, weights: Folders of the package, which has to be the same everywhere.

    Raises:
        RankError: There are other ranks than `count`, or none; a rank has no device of its own; or
            another package.
    """
    global _joined
    if _joined is not None:
        return _joined
    kind = torch.device(device)
    if kind.index is not None:
        raise RankError(
            f"{device} is one device, and this model is split over {count}: say {kind.type}, and "
            "each rank takes a device of its own"
        )
    started = dist.get_world_size() if dist.is_initialized() else _started(count, code)
    if started != count:
        raise RankError(
            f"there are {started} ranks, and the weights of this model are split over {count}: "
            f"run torchrun --nproc-per-node {count}, or compile it with shard{{tp={started}}}"
        )
    own = _own_device(kind)
    made_group = not dist.is_initialized()
    if made_group:
        backend = dist.get_default_backend_for_device(own.type)
        dist.init_process_group(backend, timeout=TIMEOUT)
    messages = dist.new_group(backend="gloo", timeout=_EVER)
    mesh = init_device_mesh(own.type, (count,), mesh_dim_names=("tp",))
    made = Ranks(count, dist.get_rank(), own, mesh, mesh.get_group(), messages, made_group)
    _check_devices(made)
    _check_packages(made, package_digest(code, weights))
    made.watch()
    atexit.register(_leave_at_exit, made)
    _joined = made
    return made


def joined() -> Ranks:
    """Return what `join` made."""
    assert _joined is not None, "load the model first"
    return _joined


def _started(count: int, code: Path) -> int:
    """Return how many ranks torchrun has started."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        script = code / "model.py"
        raise RankError(
            f"this model is split over {count} ranks, and this process is alone: start it with "
            f"torchrun --nproc-per-node {count} {script}"
        )
    return int(os.environ["WORLD_SIZE"])


def _own_device(kind: torch.device) -> torch.device:
    """Return the device of this rank among those of its host.

    Raises:
        RankError: The host has fewer than ranks.
    """
    if kind.type == "cpu":
        return kind
    module = torch.get_device_module(kind)
    there = int(module.device_count())
    here = int(
        os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size() if dist.is_initialized() else 1)
    )
    # A launcher may show each rank a device of its own alone: then all of them see one.
    if here > there and there != 1:
        raise RankError(_too_few(here, there, kind.type))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device(kind.type, local if there > 1 else 0)
    module.set_device(own)
    return own


def _too_few(ranks: int, devices: int, kind: str) -> str:
    return (
        f"{ranks} ranks on {socket.gethostname()}, where torch finds {devices} of {kind}, and each "
        f"rank takes one of its own: run it on a host with {ranks}, or with --device cpu"
    )


def _check_devices(ranks: Ranks) -> None:
    """Refuse a device that two ranks have, and say where devices do not reach each other.

    Raises:
        RankError: Naming the ranks.
    """
    if ranks.device.type != "cuda":
        return
    own = str(torch.cuda.get_device_properties(ranks.device).uuid)
    places = ranks.gathered((socket.gethostname(), own))
    for rank, place in enumerate(places):
        if places.index(place) != rank:
            raise RankError(
                f"ranks {places.index(place)} and {rank} have one device: "
                + _too_few(sum(host == place[0] for host, _ in places), 1, "cuda")
            )
    here = range(torch.cuda.device_count())
    apart = [
        (a, b) for a in here for b in here if a < b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart and ranks.device.index == 0:
        a, b = apart[0]
        print(
            f"cuda:{a} and cuda:{b} do not reach each other's memory: NCCL goes through the "
            "host's, which is slower",
            file=sys.stderr,
        )


def _check_packages(ranks: Ranks, own: dict[str, str]) -> None:
    """Refuse ranks whose packages differ.

    Raises:
        RankError: Naming a rank, and what is different in its package.
    """
    for rank, names in differences(ranks.gathered(own)).items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RankError(
            f"rank {rank} has another package than rank 0: {', '.join(names[:3])}{more}; give all "
            "of them copies of one folder"
        )


def _leave_at_exit(ranks: Ranks) -> None:
    error = getattr(sys, "last_value", None)  # of the main thread, where it was not caught
    if error is None:
        ranks.leave()
    else:
        line = (str(error).strip().splitlines() or [""])[0]
        ranks.leave(f"failed: {type(error).__name__}: {line}")


def _end(reason: str, code: int) -> NoReturn:
    _ending.acquire()
    sys.stdout.flush()
    print(reason, file=sys.stderr, flush=True)
    os._exit(code)
