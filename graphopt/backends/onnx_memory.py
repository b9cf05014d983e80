"""What memory an ONNX Runtime session of an emitted graph takes, measured beside our own plans.

A session is opened and run in a process of its own (`onnx_memory_worker.py`), once to count what
the kernel says is resident, and once more with ONNX Runtime's profile, which takes memory itself,
for what its arena says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, SourceError, UsageError, first_line

LATER_STEPS = 3
"""Steps behind the first: the second may still take memory, by a pattern that the first left."""

PHASES = ("prefill", "decode")

RESIDENT = "anonymous resident bytes, by the kernel's counters in /proc (high-water mark, no clock)"
STATISTICS = "bytes that its arena's allocator counted, in its profile, node by node"


@dataclass(frozen=True)
class Taken:
    """What a piece of work added to a process, in bytes.

    Attributes:
        peak: Most anonymous resident bytes above those before.
        kept: Anonymous resident bytes above those before, when its results are released.
        kept_of_files: The same of pages of files: weights that are mapped, and code.
    """

    peak: int
    kept: int
    kept_of_files: int


@dataclass(frozen=True)
class ArenaStep:
    """What ONNX Runtime's arena counted of a step, in bytes.

    Attributes:
        in_use: Most of its bytes in use above those before the first step.
        held: All that it has taken from the system, behind the step, above what it had when the
            first step began.
    """

    in_use: int
    held: int


@dataclass(frozen=True)
class SessionMemory:
    """What a session took.

    Attributes:
        version: Of ONNX Runtime.
        opening: Of opening it: weights, packed forms of them, the graph.
        steps: Of each step, in order. Caches of decoding steps exist before them.
        arena: The same steps by its arena's own statistics; empty where it tells none.
        untold: Why it tells none, "" where it does.
    """

    version: str
    opening: Taken
    steps: list[Taken]
    arena: list[ArenaStep]
    untold: str = ""

    @property
    def first(self) -> Taken:
        return self.steps[0]

    @property
    def later(self) -> Taken:
        """Of steps behind the first: the highest peak, and all that they kept together."""
        rest = self.steps[1:]
        return Taken(
            max(step.peak for step in rest),
            sum(step.kept for step in rest),
            sum(step.kept_of_files for step in rest),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"counts": {"resident": RESIDENT, "arena": STATISTICS}}


def why_not_measured() -> str | None:
    """Return why memory of processes can't be measured here; None where it can."""
    if not Path("/proc/self/status").is_file():
        return f"{sys.platform} has no /proc, where Linux says what is resident"
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return "/proc/self/clear_refs, which resets the high-water mark, can't be written here"
    return None


def onnx_graph(folder: Path) -> Path | None:
    """Return `model.onnx` of an output folder; None where it has no ONNX form."""
    from graphopt.files.confined import folder_inside

    if not (folder / "program.json").is_file():
        return None
    path = (folder_inside(folder, "onnx") or folder / "onnx") / "model.onnx"
    return path if path.is_file() else None


def session_memory(
    path: Path,
    phase: str,
    *,
    batch: int = 1,
    seq: int = 128,
    later: int = LATER_STEPS,
    arena: bool = True,
    pattern: bool = True,
    constants: Collection[str] = (),
) -> SessionMemory:
    """Measure a session of a graph on the CPU.

    Args:
        path: `model.onnx` as graphopt emits it.
        phase: "prefill" reads prompts of `seq` tokens, each step from nothing. "decode" reads one
            token of each text behind `seq` tokens in the cache; a graph without a cache reads all.
        batch: Texts at once.
        later: Steps behind the first, at least 1.
        arena: Let ONNX Runtime keep an arena, as it does by default.
        pattern: Let it take what a step needs as one block, by the pattern of an earlier step of
            equal sizes, as it does by default.
        constants: Initializers that may hold infinity on purpose.

    Raises:
        UsageError: There is no such phase, or memory can't be measured here.
        SourceError: ONNX Runtime can't load or run the graph, or it is none that graphopt emits.
        GraphoptError: The process was ended, as a system does that runs out of memory.
    """
    from graphopt.files.onnx_file import check_onnx

    if phase not in PHASES:
        raise UsageError(
            f"An ONNX Runtime session has no phase {phase!r}.", f"Known: {', '.join(PHASES)}."
        )
    reason = why_not_measured()
    if reason is not None:
        raise UsageError(f"The memory of an ONNX Runtime session can't be measured: {reason}.")
    check_onnx(path, constants)
    work = {
        "path": str(path.resolve()), "phase": phase, "batch": batch, "seq": seq, "later": later,
        "arena": arena, "pattern": pattern, "profile": None,
    }  # fmt: skip
    found = _run(work)
    steps: list[ArenaStep] = []
    untold = "the session has no arena"
    if arena:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            profiled = _run({**work, "profile": str(Path(folder) / "profile")})
            events = json.loads(Path(profiled["profile"]).read_text(encoding="utf-8"))
        steps = arena_steps(events)
        untold = "" if steps else f"ONNX Runtime {found['version']} has none in its profile"
    return SessionMemory(
        found["version"],
        Taken(**found["opening"]),
        [Taken(**step) for step in found["steps"]],
        steps,
        untold,
    )


def _run(work: dict[str, Any]) -> dict[str, Any]:
    """Return what a process of its own found."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "graphopt.backends.onnx_memory_worker"],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        check=False,
    )
    what = f"The process that ran {work['path']} in ONNX Runtime"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise GraphoptError(
            f"{what} was ended by {name}, as happens where memory runs out.",
            "Give a smaller --batch or --seq.",
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GraphoptError(f"{what} failed: {last}.")
    found: dict[str, Any] = json.loads(done.stdout)
    if "failed" in found:
        raise SourceError(
            f"ONNX Runtime cannot run {work['path']}: {first_line(Exception(found['failed']))}.",
            "Compile the model again with --emit onnx, or give a smaller --batch or --seq.",
        )
    return found


def arena_steps(events: list[dict[str, Any]]) -> list[ArenaStep]:
    """Return what the arena counted of each step, by the events of a profile.

    A node's event has the arena's counters behind it and what the node changed of them. Bytes are
    those above what was in use when the first step began: later ones may take a block for all that
    they need before their first node. The allocator's highest mark is of all time: in a step that
    raised it, it is the step's peak, also of what a node frees before it ends; in others the peak
    is the most in use behind a node.
    """
    steps: list[ArenaStep] = []
    nodes: list[dict[str, int]] = []
    held = before = mark = 0
    names = (
        "mem_bytes_in_use", "mem_in_use_delta", "mem_in_use_peak", "mem_arena_held",
        "mem_arena_held_delta",
    )  # fmt: skip
    for event in events:
        values = event.get("args", {})
        if event.get("cat") == "Node" and all(name in values for name in names):
            nodes.append({name: int(values[name]) for name in names})
        if event.get("name") != "model_run" or not nodes:
            continue
        first, last = nodes[0], nodes[-1]
        if not steps:
            before = first["mem_bytes_in_use"] - first["mem_in_use_delta"]
            held = first["mem_arena_held"] - first["mem_arena_held_delta"]
            mark = first["mem_in_use_peak"]  # opening may have left it
        most = max(node["mem_bytes_in_use"] for node in nodes)
        if last["mem_in_use_peak"] > mark:
            most = max(most, last["mem_in_use_peak"])
        mark = last["mem_in_use_peak"]
        steps.append(ArenaStep(most - before, last["mem_arena_held"] - held))
        nodes = []
    return steps
