"""A process that is one rank of an emitted model, and does what another process asks of all ranks.

It is started by `graphopt.backends.rank_processes` through torchrun. What it is asked, and what it
answers, goes through a connection; ranks reach each other through torch.distributed alone.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Client
from typing import Any

import torch

from graphopt.backends.running_module import RunningModule
from graphopt.errors import GraphoptError, first_line

ADDRESS, KEY = "GRAPHOPT_RANKS_ADDRESS", "GRAPHOPT_RANKS_KEY"
"""Environment variables: the port to which a rank connects, and the secret that it knows."""


def main() -> None:
    """Connect, load the model, and answer until the connection ends."""
    rank = int(os.environ["RANK"])
    port, key = int(os.environ.pop(ADDRESS)), bytes.fromhex(os.environ.pop(KEY))
    connection = Client(("127.0.0.1", port), authkey=key)
    connection.send(rank)
    caches: dict[int, Any] = {}
    try:
        path, weights, device, facts = connection.recv()
        running = RunningModule(path, weights, torch.device(device), facts)
    except GraphoptError as error:
        connection.send((0, "failed", (error.message, error.remedy)))
        return
    connection.send((0, "done", None))
    while True:
        try:
            number, what, given = connection.recv()
        except EOFError:
            return  # nobody asks any more
        try:
            answer = _answer(running, caches, what, given)
        except GraphoptError as error:
            connection.send((number, "failed", (error.message, error.remedy)))
        except (RuntimeError, ValueError) as error:
            connection.send((number, "failed", (f"A step failed: {first_line(error)}.", "")))
        else:
            # The others have the same answer, which is large.
            connection.send((number, "done", answer if rank == 0 else None))


def _answer(running: RunningModule, caches: dict[int, Any], what: str, given: Any) -> Any:
    """Do one thing; caches stay here, under numbers."""
    if what == "start":
        handle, batch = given
        caches[handle] = running.start(batch)
        return None
    if what == "start_text":
        handle, room = given
        caches[handle] = running.start_text(room)
        return running.capacity(caches[handle])
    if what == "step":
        dropped, handle, last, arrays = given
        for other in dropped:
            caches.pop(other, None)
        inputs = {name: torch.from_numpy(value) for name, value in arrays.items()}
        logits, caches[handle] = running.step(inputs, caches[handle])
        return (logits[:, -1:] if last else logits).numpy()
    assert what == "log_likelihoods"
    return running.log_likelihoods(torch.from_numpy(given)).numpy()


if __name__ == "__main__":
    main()
