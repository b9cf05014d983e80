"""Finding out that a rank has ended, and why, so that no other waits for it.

Every rank has a connection to rank 0, and a thread that reads from it. Whatever ends a process
closes its connections: rank 0 sees that at once and tells the others, and all see the end of rank
0. A rank that ends by an error says why before. Each connection also carries a sign of life every
two seconds, so that a rank that hangs, or whose host is gone, is known after `SILENT` seconds.

All ranks hear of the same end, the first of which rank 0 hears. What follows from it is the user's:
`graphopt.support.rank_endings` for commands, `graphopt.runtime.ranks` for emitted models, into
which this file is copied. It needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SIGN_EVERY = 2.0
"""Seconds between two signs of life."""

SILENT = 35.0
"""Seconds without a sign of life after which a rank counts as ended."""

REACHED, GREETED = 20.0, 5.0
"""Seconds in which all ranks have to reach rank 0, and that one attempt may take."""

DECIDED = 1.0
"""Seconds for which a rank that says why it ends waits until rank 0 knows."""

KILLED = "has ended without a word, as a process does that is killed"

_LEFT = "left"


class RankEnd(NamedTuple):
    """The end of a rank, while others still counted on it.

    Attributes:
        rank: Its number.
        what: What it said; or else what can be said of it, as a clause that goes with its number.
        remedy: What to do about it; "" where that is not known.
        code: The exit code of its error.
        said: Whether it said so itself.
    """

    rank: int
    what: str
    remedy: str = ""
    code: int = 1
    said: bool = True


class RankWatch:
    """What a rank knows of the others: whether one has ended, and what they have flagged.

    All ranks make one together. It may be used by several threads.

    Args:
        rank, world: The number of this one, from 0, and how many there are.
        of_first: Returns on every rank what rank 0 gives it; all ranks call it once.
        ended: Called in a thread of its own when another rank has ended, once.

    Raises:
        OSError: This rank does not reach rank 0, or not all have reached it.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        of_first: Callable[[Any], Any],
        ended: Callable[[RankEnd], None],
    ) -> None:
        self.rank, self.world, self._ended = rank, world, ended
        self._end: RankEnd | None = None
        self._gone: set[int] = set()
        self._flags: dict[str, set[int]] = {}
        self._over = False
        self._changed, self._sending = threading.Condition(), threading.Lock()
        if rank == 0:
            self._lines = _accepted(world, of_first)
        else:
            self._lines = {0: _connected(rank, of_first)}
        threading.Thread(target=self._listen, name="other ranks", daemon=True).start()

    @property
    def end(self) -> RankEnd | None:
        """What ended another rank; None where none has ended, or this one is the first to."""
        end = self._end
        return None if end is None or end.rank == self.rank else end

    def tell(self, what: str, remedy: str, code: int) -> None:
        """Leave the others the reason for which this rank ends, unless another one has ended."""
        end = RankEnd(self.rank, what, remedy, code)
        if self.rank == 0:
            self._settle(end)
        else:
            self._send("end", list(end))
            self.until(lambda: self._end is not None, DECIDED)

    def flag(self, name: str) -> None:
        """Let all ranks know that this one has come to something that has a name."""
        self._note(name, self.rank)

    def flagged(self, name: str, *, by: int | None = None) -> bool:
        """Return whether a rank, by default each that has not ended, has come to something."""
        there = self._flags.get(name, set())
        if by is not None:
            return by in there
        return len(there | self._gone) == self.world

    def until(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until something holds of what this knows, at most so long; return whether it does.

        Args:
            holds: Asked again whenever anything has changed.
            seconds: By default as long as it takes.
        """
        with self._changed:
            return self._changed.wait_for(holds, seconds)

    def gone(self, rank: int) -> bool:
        """Return whether the connection to a rank has ended: to rank 0, or of rank 0 to any."""
        return rank in self._gone

    def leave(self) -> RankEnd | None:
        """Say that this rank is done, and wait until all are, or one has ended, which is returned.

        From then on an end is none that others count on.
        """
        self.flag(_LEFT)
        self.until(lambda: self._end is not None or self.flagged(_LEFT))
        if self.end is None:
            if self.rank == 0:  # what it sent last could be lost with its connections
                self.until(lambda: len(self._gone) == self.world - 1, SIGN_EVERY)
            self.stop()
        return self.end

    def stop(self) -> None:
        """Listen no more, and close the connections."""
        self._over = True
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # closed already
                line.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        """Read what others say, and see to it that they hear from this one, until `stop`."""
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            rest = dict.fromkeys(self._lines, b"")
            signed = woken = time.monotonic()
            heard = dict.fromkeys(self._lines, signed)
            while heard and not self._over:
                ready = selector.select(SIGN_EVERY / 2)
                now = time.monotonic()
                if now - woken > 2 * SIGN_EVERY:  # it was stopped itself: it could not hear
                    heard = dict.fromkeys(heard, now)
                woken = now
                for key, _ in ready:
                    rank, data = key.data, _read(key.fileobj)
                    heard[rank] = now
                    *messages, rest[rank] = (rest[rank] + data).split(b"\n")
                    for message in filter(None, messages):
                        self._take(*json.loads(message))
                    if not data:
                        selector.unregister(key.fileobj)
                        del heard[rank]
                        self._lose(rank, KILLED)
                if now - signed >= SIGN_EVERY:
                    signed = now
                    self._send()
                for rank, when in heard.items():
                    if now - when > SILENT:
                        self._lose(rank, f"has given no sign of life for {SILENT:.0f} seconds")
        for line in self._lines.values():
            line.close()

    def _take(self, kind: str, given: Any) -> None:
        if kind == "end":
            self._settle(RankEnd(*given))
        else:
            self._note(kind, given)

    def _note(self, name: str, rank: int) -> None:
        """Know of a flag, and pass it on: rank 0 to all, others their own to rank 0."""
        if self.rank in (0, rank):
            self._send(name, rank)
        with self._changed:
            self._flags.setdefault(name, set()).add(rank)
            self._changed.notify_all()

    def _lose(self, rank: int, what: str) -> None:
        """Know that nothing will come from a rank any more."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()
        if not (self._over or self.flagged(_LEFT, by=rank)):
            self._settle(RankEnd(rank, what, said=False))

    def _settle(self, end: RankEnd) -> None:
        """Know of the end of a rank, if it is the first; rank 0 tells all."""
        with self._changed:
            if self._end is not None:
                return
            self._end = end
            self._changed.notify_all()
        if self.rank == 0:
            self._send("end", list(end))
        if end.rank != self.rank:
            threading.Thread(target=self._ended, args=(end,), daemon=True).start()

    def _send(self, *message: Any) -> None:
        """Send a message, or a sign of life, to rank 0, or from there to all."""
        data = json.dumps(message).encode() + b"\n" if message else b"\n"
        with self._sending:
            for line in self._lines.values():
                with contextlib.suppress(OSError):  # it has ended, which `_listen` sees
                    line.sendall(data)


def _accepted(world: int, of_first: Callable[[Any], Any]) -> dict[int, socket.socket]:
    """Return the connections of rank 0 to all others, by their numbers."""
    asked, answer = secrets.token_hex(16), secrets.token_hex(16)
    found: dict[int, socket.socket] = {}
    with _server(world) as server:
        addresses = [os.environ.get("MASTER_ADDR"), socket.gethostname()]
        of_first([addresses, server.getsockname()[1], asked, answer])
        until = time.monotonic() + REACHED
        while len(found) < world - 1:
            server.settimeout(max(until - time.monotonic(), 1e-3))
            try:
                line, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, world)) - set(found))
                raise OSError(f"ranks {missing} have not reached rank 0") from None
            line.settimeout(GREETED)
            greeting = _line(line).split()
            if len(greeting) == 2 and secrets.compare_digest(greeting[0], asked.encode()):
                _send_at_once(line)
                line.sendall(f"{answer}\n".encode())
                found[int(greeting[1])] = line
            else:
                line.close()  # somebody else
    return found


def _connected(rank: int, of_first: Callable[[Any], Any]) -> socket.socket:
    """Return the connection of a rank to rank 0."""
    (given, host), port, asked, answer = of_first(None)
    addresses = [given, os.environ.get("MASTER_ADDR"), host]
    if host == socket.gethostname():
        addresses.insert(0, "localhost")
    errors = []
    for address in dict.fromkeys(filter(None, addresses)):
        try:
            line = socket.create_connection((address, port), GREETED)
            line.sendall(f"{asked} {rank}\n".encode())
            if _line(line) == answer.encode():
                _send_at_once(line)
                return line
            line.close()
            errors.append(f"{address}: it is not there")
        except OSError as error:
            errors.append(f"{address}: {error}")
    raise OSError(f"rank 0 is not reached at port {port} of {'; '.join(errors)}")


def _server(world: int) -> socket.socket:
    """Return a socket at which ranks of any host can be met."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world
            )
    return socket.create_server(("", 0), backlog=world)


def _send_at_once(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _line(connection: socket.socket) -> bytes:
    """Return the first line that comes, without its end; what came instead, where none does."""
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 100:
            byte = connection.recv(1)
            if not byte:
                break
            data += byte
    return data.rstrip(b"\n")


def _read(connection: Any) -> bytes:
    """Return what has come; nothing where the connection has ended."""
    try:
        return bytes(connection.recv(65536))
    except OSError:
        return b""
