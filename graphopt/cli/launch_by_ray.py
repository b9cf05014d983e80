"""Ranks of a command as actors of a Ray cluster that runs: Ray places them and ends them.

The files that a command names are read and written where its ranks are, so that all hosts must see
them under the same paths.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from graphopt.cli.process import STARTED
from graphopt.errors import GraphoptError, UsageError, described

HEARD_EVERY = 0.5
"""Seconds between two looks at what the first rank prints."""


def launch_by_ray(arguments: Sequence[str], ranks: int | None, device: str) -> int:
    """Run `graphopt ARGUMENTS` as actors of a Ray cluster; return the exit code.

    Each has a CPU and a GPU; a CPU alone with `--device cpu`, or where the cluster has no GPU.

    Args:
        ranks: How many; None for one on each GPU.
        device: What the user named.

    Raises:
        UsageError: The cluster has less than the ranks take, or nothing says how many there are.
        GraphoptError: Ray is not installed, no cluster runs, or it lost a rank.
    """
    try:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    except ImportError:
        raise GraphoptError(
            "Ray is not installed here.",
            "pip install 'graphopt[ray]', or take --launcher torchrun.",
        ) from None
    if not ray.is_initialized():
        try:
            # Ray puts this folder in front of its workers' path, where anything may be called as a
            # module is.
            with contextlib.chdir(os.path.sep):
                ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError) as error:
            raise GraphoptError(
                f"No Ray cluster was found: {described(error)}.",
                "Start one with `ray start --head`, or name one by RAY_ADDRESS.",
            ) from error
    total = ray.cluster_resources()
    on_gpus = not device.startswith("cpu") and total.get("GPU", 0) >= 1
    count = ranks or (int(total["GPU"]) if on_gpus else 0)
    each = {"CPU": 1.0, "GPU": 1.0} if on_gpus else {"CPU": 1.0}
    _check_room(count, each, total)
    group = placement_group([each] * count, strategy="PACK")
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(on_gpus), max_concurrency=2)(RayRank)
    actors: list[Any] = []
    try:
        ray.get(group.ready())
        for rank in range(count):
            strategy = PlacementGroupSchedulingStrategy(group, rank)
            actors.append(actor.options(scheduling_strategy=strategy).remote())
        hosts = ray.get([one.host.remote() for one in actors])
        address, port = ray.get(actors[0].address.remote())
        running = [
            one.run.remote(list(arguments), os.getcwd(), environment)
            for one, environment in zip(
                actors, environments(hosts, address, port, on_gpus), strict=True
            )
        ]
        return _exit_code(ray, actors, running)
    except ray.exceptions.RayError as error:
        raise GraphoptError(
            f"The Ray cluster lost a rank: {described(error)}.",
            "Look at its logs: memory may not have sufficed on a host.",
        ) from error
    finally:
        for one in actors:
            ray.kill(one)
        remove_placement_group(group)


def _check_room(count: int, each: dict[str, float], total: dict[str, float]) -> None:
    """Refuse ranks that the cluster could never have: Ray would wait for more hosts."""
    if not count:
        raise UsageError(
            "The Ray cluster has no GPU that would say how many ranks there are to be.",
            "Give --ranks N.",
        )
    for kind, amount in each.items():
        there = int(total.get(kind, 0) / amount)
        if count > there:
            raise UsageError(
                f"{count} ranks take {count} {kind}s, and the Ray cluster has {there}.",
                f"Give --ranks {there} or less.",
            )


def environments(
    hosts: Sequence[str], address: str, port: int, on_gpus: bool
) -> list[dict[str, str]]:
    """Return what each rank's environment states, as torchrun would.

    Args:
        hosts: The host of each rank.
        address, port: Where the first rank can be met.
        on_gpus: Whether each has a GPU, which is then the only one that it sees.
    """
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_RANK": "0" if on_gpus else str(hosts[:rank].count(host)),
            "LOCAL_WORLD_SIZE": "1" if on_gpus else str(hosts.count(host)),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            STARTED: "1",
        }
        for rank, host in enumerate(hosts)
    ]


def _exit_code(ray: Any, actors: Sequence[Any], running: Sequence[Any]) -> int:
    """Wait for the ranks, and print what the first one prints; return the first failure's code."""
    left, code = list(running), 0
    while left and not code:
        done, left = ray.wait(left, timeout=HEARD_EVERY)
        code = next((c for c in ray.get(done) if c), 0)
        _print(ray.get(actors[0].heard.remote()))
    if code and left:
        # The first rank says why another one ends.
        ray.wait(left, num_returns=len(left), timeout=20)
        _print(ray.get(actors[0].heard.remote()))
    return code


def _print(heard: tuple[str, str]) -> None:
    for file, text in zip((sys.stdout, sys.stderr), heard, strict=True):
        file.write(text)
        file.flush()


class _Heard:
    """A text file that keeps what is written until it is asked for."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            self._parts.append(text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: it is all there."""

    def isatty(self) -> bool:
        return False

    def take(self) -> str:
        """Return what was written since this was asked last."""
        with self._lock:
            text = "".join(self._parts)
            self._parts.clear()
        return text


class RayRank:
    """A rank in a process of the cluster."""

    def __init__(self) -> None:
        self._files = _Heard(), _Heard()

    def host(self) -> str:
        """Return the address of the host that this is on."""
        from ray.util import get_node_ip_address

        return str(get_node_ip_address())

    def address(self) -> tuple[str, int]:
        """Return where the first rank can be met: its host, and a port that is free there."""
        with socket.socket() as found:
            found.bind(("", 0))
            return self.host(), int(found.getsockname()[1])

    def heard(self) -> tuple[str, str]:
        """Return what was printed since this was asked last, on stdout and on stderr."""
        return self._files[0].take(), self._files[1].take()

    def run(self, arguments: list[str], folder: str, environment: dict[str, str]) -> int:
        """Run a command; return its exit code.

        Args:
            folder: In which it is run.
        """
        os.environ.update(environment)
        files: Any = self._files
        with contextlib.redirect_stdout(files[0]), contextlib.redirect_stderr(files[1]):
            if not os.path.isdir(folder):
                sys.stderr.write(f"error: There is no folder {folder} on {self.host()}.\n")
                return 1
            os.chdir(folder)
            from graphopt.cli.commands import app

            return int(app(arguments, prog_name="graphopt", standalone_mode=False) or 0)
