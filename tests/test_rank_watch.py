"""What ranks know of each other's ends: several watches in one process, a thread for each rank."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from graphopt.support import rank_watch
from graphopt.support.rank_watch import KILLED, RankEnd, RankWatch

SOON = 20.0
"""Seconds that nothing here takes, unless it hangs."""


class Group:
    """Watches of ranks, with what each one's `ended` was called with."""

    def __init__(self, world: int, meet: Callable[[Any], Any] = lambda given: given) -> None:
        first: queue.Queue[Any] = queue.Queue()
        self.ended: list[queue.Queue[RankEnd]] = [queue.Queue() for _ in range(world)]

        def join(rank: int) -> RankWatch:
            def of_first(value: Any) -> Any:
                if rank == 0:
                    for _ in range(world - 1):
                        first.put(meet(value))
                    return value
                return first.get(timeout=SOON)

            return RankWatch(rank, world, of_first, self.ended[rank].put)

        with ThreadPoolExecutor(world) as pool:
            self.ranks = list(pool.map(join, range(world)))

    def kill(self, rank: int) -> None:
        """Close a rank's connections, as the operating system does for a process that ended."""
        self.ranks[rank].stop()


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Group:
    made = Group(getattr(request, "param", 3))
    request.addfinalizer(lambda: [rank.stop() for rank in made.ranks])
    return made


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_reason_reaches_all_others(who: int, group: Group) -> None:
    group.ranks[who].tell("The lamp is out.", "Light it.", 3)
    told = RankEnd(who, "The lamp is out.", "Light it.", 3)
    for rank, watch in enumerate(group.ranks):
        if rank != who:
            assert group.ended[rank].get(timeout=SOON) == told
            assert watch.end == told
            assert watch.leave() == told
    assert group.ranks[who].end is None  # that is of others
    group.kill(who)  # what follows from the end of a rank is no end of its own
    group.ranks[0].tell("Something else.", "", 1)
    assert [rank.end for rank in group.ranks].count(told) == 2
    assert all(ended.empty() for ended in group.ended)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_rank_that_is_killed_is_missed_at_once(who: int, group: Group) -> None:
    group.kill(who)
    for rank in {0, 1, 2} - {who}:
        end = group.ended[rank].get(timeout=SOON)
        assert end == RankEnd(who, KILLED, said=False)


def test_all_hear_of_the_same_end(group: Group) -> None:
    """Though all of them fail at the same time."""
    with ThreadPoolExecutor(3) as pool:
        for rank in group.ranks:
            pool.submit(rank.tell, f"by {rank.rank}", "", 1)
    ends = {end for rank in group.ranks for end in [rank.end] if end is not None}
    assert len(ends) == 1
    (end,) = ends
    assert group.ranks[end.rank].end is None
    heard = [rank for rank in group.ranks if rank.end is not None]
    assert len(heard) == 2


@pytest.mark.parametrize("group", [2, 5], indirect=True)
def test_they_leave_together(group: Group) -> None:
    first, *others = group.ranks
    with ThreadPoolExecutor(len(group.ranks)) as pool:
        left = [pool.submit(rank.leave) for rank in others]
        assert not first.until(lambda: first.flagged("left"), 0.05)
        assert not any(one.done() for one in left)  # the first is not done
        left.append(pool.submit(first.leave))
        assert [one.result(SOON) for one in left] == [None] * len(group.ranks)
    assert all(ended.empty() for ended in group.ended)


def test_a_rank_that_leaves_hears_of_one_that_fails(group: Group) -> None:
    with ThreadPoolExecutor(3) as pool:
        left = [pool.submit(group.ranks[rank].leave) for rank in (0, 2)]
        group.ranks[1].tell("It failed.", "", 1)
        assert [one.result(SOON) for one in left] == [RankEnd(1, "It failed.")] * 2


def test_flags_of_a_rank_are_seen_by_all(group: Group) -> None:
    group.ranks[2].flag("told")
    for rank in group.ranks:
        assert rank.until(lambda rank=rank: rank.flagged("told", by=2), SOON)
        assert not rank.flagged("told") and not rank.flagged("told", by=1)
    group.ranks[0].flag("told")
    group.kill(1)
    # Rank 0 knows that nothing more will come.
    assert group.ranks[0].until(lambda: group.ranks[0].flagged("told"), SOON)


def test_signs_of_life_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "SIGN_EVERY", 0.02)
    group = Group(3)
    assert not group.ranks[0].until(lambda: group.ranks[0].end is not None, 0.2)
    monkeypatch.setattr(group.ranks[2], "_send", lambda *message: None)  # as one that hangs
    monkeypatch.setattr(rank_watch, "SILENT", 0.1)
    for rank in (0, 1):
        end = group.ended[rank].get(timeout=SOON)
        # Where the machine is busy, another one may be silent for as long.
        assert end.what == "has given no sign of life for 0 seconds" and not end.said
    for rank in group.ranks:
        rank.stop()


def test_strangers_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port may be found by anybody."""

    def meet(given: Any) -> Any:
        (_, host), port, asked, answer = given
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
        return [[None, f"{host}.invalid"], port, asked, answer]

    monkeypatch.setattr(rank_watch, "REACHED", 0.2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(OSError, match=r"ranks \[1\] have not reached rank 0"):
        Group(2, meet)


def test_what_is_not_rank_0_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads somewhere else, and a port at which something else answers."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0\n")

        pool.submit(answer)
        port = other.getsockname()[1]
        given = [["127.0.0.1", "host.invalid"], port, "asked", "answer"]
        said = r"rank 0 is not reached at port \d+ of 127.0.0.1: it is not there; host.invalid: "
        with pytest.raises(OSError, match=said):
            RankWatch(1, 2, lambda value: given, lambda end: None)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "REACHED", 0.05)
    with pytest.raises(OSError, match=r"ranks \[1, 2\] have not reached rank 0"):
        RankWatch(0, 3, lambda value: value, lambda end: None)


def test_no_thread_is_left(group: Group) -> None:
    for rank in group.ranks:
        rank.stop()
    for thread in threading.enumerate():
        if thread.name == "other ranks":
            thread.join(SOON)
            assert not thread.is_alive()
