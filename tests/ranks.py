"""Functions run by several processes that are the ranks of one gloo group, with a time limit."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program
from graphopt.ir.ranks import rank_program

LIMIT = 60.0
"""Seconds that ranks may take, the start of their processes included."""

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, by the process that others are forked from.
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed", "graphopt.cli.commands", "graphopt.compiler",
        "graphopt.backends.opening", "graphopt.capture.model", "transformers.modeling_utils",
        "transformers.models.llama.modeling_llama",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        exitcode: That of its process, minus the signal that ended it, or None where it still ran.
        value: What the function returned; None where it did not.
        error: What there is to say of a rank that did not end well; "" of others.
    """

    exitcode: int | None
    value: Any
    error: str


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    limit: float = LIMIT,
    group: bool = True,
) -> list[Any]:
    """Return what `function(rank, *args)` returns on every rank of a group, in their order.

    Args:
        function: At the top of a module, which the processes import; what it takes and returns is
            pickled.
        limit: Seconds after which all are ended.
        group: Whether the processes are a group of torch.distributed when the function is called.
            Else their environment states what torchrun's would, and the function makes one.

    Raises:
        AssertionError: A rank raised, died or was ended at the limit, with what each says.
    """
    found = ended_ranks(function, *args, ranks=ranks, limit=limit, group=group, patience=2)
    errors = [f"rank {rank}: {end.error}" for rank, end in enumerate(found) if end.error]
    assert not errors, "\n".join(errors)
    return [end.value for end in found]


def ended_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    limit: float = LIMIT,
    group: bool = True,
    patience: float = LIMIT,
) -> list[Ended]:
    """Return how every rank ended that ran `function(rank, *args)`, in their order.

    Args:
        function, limit, group: As for `run_ranks`.
        patience: Seconds that the others get to end by themselves when one has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Multiprocessing would hand over a file descriptor for each tensor, and takes 256.
        torch.save(args, Path(folder) / "args.pt")
        processes = [
            _CONTEXT.Process(
                target=_rank, args=(function, environment, folder, limit, group),
                daemon=True,
            )
            for environment in rank_environments(ranks)
        ]  # fmt: skip
        end = time.monotonic() + limit
        for process in processes:
            process.start()
        try:
            _wait(processes, end, patience)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            Ended(
                code,
                torch.load(Path(folder) / f"{rank}.pt", weights_only=False) if code == 0 else None,
                "" if code == 0 else _said(Path(folder), rank, code),
            )
            for rank, code in enumerate(codes)
        ]


def run_program(rank: int, program: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return what a rank computes of a sharded program in fp64: its first output, and its states.

    For `run_ranks`; in this module, which imports little.
    """
    outputs, cache = Runner(rank_program(program, rank), dtype=torch.float64).run(inputs)
    return outputs[0], {name: [k, v] for name, (k, v) in cache.items()}


def run_programs_on_gpu(
    rank: int, programs: list[Program], inputs: dict[str, Tensor]
) -> list[Tensor]:
    """Return what a rank computes of sharded programs in fp64 on the GPU of its number, by NCCL.

    For `run_ranks` with `group=False`.
    """
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    given, found = {name: value.to(device) for name, value in inputs.items()}, []
    for program in programs:
        runner = Runner(rank_program(program, rank), dtype=torch.float64, device=device)
        found.append(runner.run(given)[0][0].cpu())
    dist.destroy_process_group()
    return found


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return for each of several ranks on this host what torchrun states in its environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    return [
        {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
        for rank in range(ranks)
    ]  # fmt: skip


def _wait(processes: list[Any], end: float, patience: float) -> None:
    """Wait until all have ended, or the limit is over, or one failed and others had their time."""
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            end, patience = min(end, time.monotonic() + patience), float("inf")
        if time.monotonic() > end:
            return
        time.sleep(0.02)


def _said(folder: Path, rank: int, exitcode: int | None) -> str:
    file = folder / f"{rank}.error"
    if file.exists():
        return file.read_text()
    return "still ran when it was ended" if exitcode is None else f"died with {exitcode}"


def _rank(
    function: Callable[..., Any],
    environment: dict[str, str],
    folder: str,
    limit: float,
    group: bool,
) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    try:
        if group:
            dist.init_process_group(
                "gloo", f"file://{folder}/store", rank=rank, world_size=ranks,
                timeout=timedelta(seconds=limit),
            )  # fmt: skip
        else:
            os.environ.update(environment)
        args = torch.load(Path(folder) / "args.pt", weights_only=False)
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        if group:
            dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
