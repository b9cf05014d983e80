"""What `graphopt memory` says of an ONNX Runtime session, beside the same step as we count it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.support.quantities import format_bytes

if TYPE_CHECKING:
    from graphopt.backends.onnx_memory import SessionMemory
    from graphopt.ir.graph import Program

OPERATORS = (
    "tensors that the program's operators make on a CPU in fp32, recorded without values (clock: "
    "operations)"
)
PLANNING_SECONDS = 5.0


@dataclass(frozen=True)
class OwnStep:
    """The same step as the program's operators do it, in bytes.

    Attributes:
        live: Alive at the peak, of what the step makes itself: its results and a longer cache too.
        planned: The arena that a plan of offsets needs for that.
        weights: Bytes of the weights.
        given: Inputs and the cache that the step is given.
    """

    live: int
    planned: int
    weights: int
    given: int


@dataclass(frozen=True)
class Beside:
    """A session and our own figures of its step; or why there are none."""

    session: SessionMemory | None
    own: OwnStep | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.session is None or self.own is None:
            return {"not_measured": self.reason}
        return self.session.to_json() | {
            "graphopt": {
                "live_bytes": self.own.live,
                "planned_bytes": self.own.planned,
                "weight_bytes": self.own.weights,
                "given_bytes": self.own.given,
                "counts": OPERATORS,
            }
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return labels and texts for a terminal."""
        from graphopt.backends.onnx_memory import RESIDENT, STATISTICS

        if self.session is None or self.own is None:
            return [("onnx", f"not measured: {self.reason}")]
        found, own = self.session, self.own
        opening, first, later = found.opening, found.first, found.later
        rows = [
            ("onnx", f"ONNX Runtime {found.version} on the CPU, in a process of its own"),
            (
                "",
                f"opening {_size(opening.peak)} at the peak, {_size(opening.kept)} stay, and "
                f"{_size(opening.kept_of_files)} of files",
            ),
            ("", f"first step {_size(first.peak)} at the peak, {_size(first.kept)} stay"),
            (
                "",
                f"{len(found.steps) - 1} later steps up to {_size(later.peak)} at the peak, "
                f"{_size(later.kept)} more stay",
            ),
            ("", f"counted: {RESIDENT}"),
        ]
        if found.arena:
            most = max(step.in_use for step in found.arena[1:])
            rows += [
                (
                    "its arena",
                    f"{_size(found.arena[0].in_use)} in use at the peak of the first step, "
                    f"{_size(most)} of later ones; {_size(found.arena[-1].held)} held",
                ),
                ("", f"counted: beyond what opening took, {STATISTICS}"),
            ]
        else:
            rows.append(("its arena", f"tells nothing: {found.untold}"))
        rows += [
            (
                "own step",
                f"{_size(own.live)} live at the peak and {_size(own.planned)} planned, beside "
                f"{_size(own.weights)} of weights and {_size(own.given)} of inputs and cache",
            ),
            ("", f"counted: {OPERATORS}"),
        ]
        return rows


def _size(count: int) -> str:
    return format_bytes(max(count, 0))


def graph_to_measure(spec: str, phase: str, wanted: bool | None) -> Path | None:
    """Return the ONNX graph of an output folder that is to be measured; None for no measurement.

    Args:
        wanted: What the user said; None to measure where that can be done.

    Raises:
        UsageError: It was asked for, and the folder has no ONNX form, the phase is none that the
            graph has, or the platform doesn't tell what is resident.
    """
    if wanted is False:
        return None
    folder = Path(spec).expanduser()
    if not wanted and not (folder / "program.json").is_file():
        return None
    from graphopt.backends.onnx_memory import PHASES, onnx_graph, why_not_measured

    graph = onnx_graph(folder)
    if not wanted:
        return graph if phase in PHASES else None
    if graph is None:
        raise UsageError(
            f"{spec!r} has no ONNX form, whose session --onnx could measure.",
            f"Compile one with `graphopt compile {spec} --emit onnx -o FOLDER`.",
        )
    if phase not in PHASES:
        raise UsageError(
            f"An ONNX graph has no phase {phase!r}.", f"--onnx is of {' and '.join(PHASES)}."
        )
    reason = why_not_measured()
    if reason is not None:
        raise UsageError(f"--onnx: {reason}.", f"Measure it on Linux, not on {sys.platform}.")
    return graph


def measured_beside(path: Path, program: Program, phase: str, batch: int, seq: int) -> Beside:
    """Measure a session of a graph, and count the same step of its program.

    Raises:
        GraphoptError: ONNX Runtime can't load or run the graph.
    """
    from graphopt.backends.onnx_memory import session_memory, why_not_measured

    reason = why_not_measured()
    if reason is not None:
        return Beside(None, None, reason)
    constants = [weight.name for weight in program.weights if weight.constant]
    session = session_memory(path, phase, batch=batch, seq=seq, constants=constants)
    return Beside(session, own_step(program, phase, batch, seq))


def with_cache(program: Program, phase: str) -> Program:
    """Return a program with the KV cache that its phase fills or reads, where it can have one."""
    if phase not in ("prefill", "decode") or program.states:
        return program
    from graphopt.pass_manager.contract import Context, make_pass

    return make_pass("insert-kv-cache", {}).run(program.copy(), Context()).program


def own_step(program: Program, phase: str, batch: int, seq: int) -> OwnStep:
    """Count a step of a program in fp32 as on a CPU, with the cache that its graph has too."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from graphopt.execute.workloads import program_workload
    from graphopt.memory.analysis.arena import plan_arena

    cached = with_cache(program, phase)
    with FakeTensorMode():
        workload = program_workload(
            cached, phase, torch.device("cpu"), batch=batch, seq=seq, dtype=torch.float32
        )
        trace = workload.record(1)
    given = trace.external
    sizes = {"weight": 0, "other": 0}
    for instance in trace.instances:
        if instance.external:
            sizes["weight" if instance.category == "weight" else "other"] += instance.size
    return OwnStep(
        trace.peak(~given).bytes,
        plan_arena(trace, PLANNING_SECONDS, ~given).height,
        sizes["weight"],
        sizes["other"],
    )
