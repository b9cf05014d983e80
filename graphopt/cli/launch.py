"""Starting the ranks of a command: by torchrun on this host, or by a cluster."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from graphopt.cli import console as ui
from graphopt.cli.process import STARTED
from graphopt.errors import UsageError, unknown_name

LAUNCHERS = ("torchrun", "ray")


def launch(launcher: str | None, ranks: int | None, device: str) -> int:
    """Run the command of this process as several ranks; return its exit code.

    Args:
        launcher: One of `LAUNCHERS`, by default torchrun.
        ranks: How many; None for one on each GPU of the host, or of the cluster.
        device: What the user named.

    Raises:
        UsageError: There is no such launcher, or nothing says how many ranks.
        GraphoptError: The ranks cannot be started.
    """
    if launcher is not None and launcher not in LAUNCHERS:
        raise unknown_name("launcher", launcher, LAUNCHERS)
    if launcher == "ray":
        from graphopt.cli.launch_by_ray import launch_by_ray

        return launch_by_ray(sys.argv[1:], ranks, device)
    return launch_by_torchrun(sys.argv[1:], ranks, device)


def launch_by_torchrun(arguments: Sequence[str], ranks: int | None, device: str) -> int:
    """Run `graphopt ARGUMENTS` as ranks on this host; return the exit code of the first to fail."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    count = ranks or _gpus_here(device)
    os.environ[STARTED] = "1"
    # torchrun would give each rank one thread.
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    options = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", "0"]
    try:
        run(parse_args([*options, "-m", "graphopt", *arguments]))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            ui.say_error(
                f"Rank {rank} was ended by {name}, and the others with it.",
                "The log of the host says whether its memory did not suffice."
                if name == "SIGKILL"
                else "",
            )
            return 1
        return int(failure.exitcode)
    except (SignalException, KeyboardInterrupt):
        return 130
    return 0


def _gpus_here(device: str) -> int:
    """Return how many GPUs this host has, for a rank each."""
    import torch

    count = 0 if device.startswith("cpu") else torch.cuda.device_count()
    if not count:
        raise UsageError(
            "There is no GPU that would say how many ranks there are to be.", "Give --ranks N."
        )
    return count
