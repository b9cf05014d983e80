"""Functions run by several processes that are the ranks of one gloo group, with a time limit."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
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
_CONTEXT.set_forkserver_preload(["torch.distributed", "graphopt.execute.interpreter"])


def run_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, limit: float = LIMIT
) -> list[Any]:
    """Return what `function(rank, *args)` returns on every rank of a group, in their order.

    Args:
        function: At the top of a module, which the processes import; what it takes and returns is
            pickled.
        limit: Seconds after which all are ended.

    Raises:
        AssertionError: A rank raised, died or was ended at the limit, with what each says.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(
                target=_rank, args=(function, args, rank, ranks, folder, limit), daemon=True
            )
            for rank in range(ranks)
        ]
        end = time.monotonic() + limit
        for process in processes:
            process.start()
        try:
            _wait(processes, end)
            errors = [
                f"rank {rank}: {_said(Path(folder), rank, process.exitcode)}"
                for rank, process in enumerate(processes)
                if process.exitcode != 0
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()
        assert not errors, "\n".join(errors)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
                for rank in range(ranks)]  # fmt: skip


def run_program(rank: int, program: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return what a rank computes of a sharded program in fp64: its first output, and its states.

    For `run_ranks`; in this module, which imports little.
    """
    outputs, cache = Runner(rank_program(program, rank), dtype=torch.float64).run(inputs)
    return outputs[0], {name: [k, v] for name, (k, v) in cache.items()}


def _wait(processes: list[Any], end: float) -> None:
    """Wait until all have ended, or the limit is over, or one failed and others had two seconds."""
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            end = min(end, time.monotonic() + 2)
        if time.monotonic() > end:
            return
        time.sleep(0.02)


def _said(folder: Path, rank: int, exitcode: int | None) -> str:
    file = folder / f"{rank}.error"
    if file.exists():
        return file.read_text()
    return "still ran when it was ended" if exitcode is None else f"died with {exitcode}"


def _rank(
    function: Callable[..., Any], args: Any, rank: int, ranks: int, folder: str, limit: float
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=limit),
        )  # fmt: skip
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
