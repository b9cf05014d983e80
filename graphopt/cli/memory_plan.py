"""`graphopt memory --plan`: offsets for a table of blocks."""

from __future__ import annotations

from pathlib import Path

from graphopt.cli import console as ui
from graphopt.cli.shared import check_writable, print_json
from graphopt.errors import UsageError

MISSED = 1
"""Exit code where the capacity was not reached."""


def plan_file(
    table: Path, capacity: int | None, out: Path | None, seconds: float, as_json: bool
) -> int:
    """Plan offsets for the blocks of a CSV file and write them; return the exit code.

    Where `capacity` is not reached, nothing is written.

    Args:
        table: A CSV file with the columns id, lower, upper and size.
        capacity: Bytes that the arena may have; None looks for the smallest arena.
        out: The file to write.
        seconds: How long to look.
    """
    from graphopt.memory.planning.plan import Outcome, plan_offsets
    from graphopt.memory.planning.problem import read_problem, write_offsets

    check_seconds(seconds)
    if out is not None and out.exists() and out.samefile(table):
        raise UsageError(f"-o names the table itself: {out}.", "Name another file.")
    if out is not None:
        check_writable(out)
    problem = read_problem(table)
    plan = plan_offsets(problem, capacity, seconds=seconds, tell=ui.say_note)
    for note in plan.notes:
        ui.say_note(note)
    missed = capacity is not None and plan.height > capacity
    written = None if missed or out is None else out
    if written is not None:
        written.write_text(write_offsets(problem, plan.offsets), encoding="utf-8")
    if as_json:
        print_json(
            {
                "blocks": len(problem),
                "height": plan.height,
                "live_at_peak": plan.live,
                "bound": plan.bound,
                "capacity": capacity,
                "outcome": plan.outcome.value,
                "how": plan.how,
                "notes": list(plan.notes),
                "seconds": round(plan.seconds, 3),
                "written": None if written is None else str(written),
            }
        )
        return MISSED if missed else 0
    over = f"{plan.height / plan.bound:.4f} times the bound" if plan.bound else "nothing takes room"
    lines = [
        f"{len(problem)} blocks, {plan.live} bytes alive at the peak, which is the bound"
        + ("." if plan.bound == plan.live else f"; a search proves that {plan.bound} are needed."),
        f"The plan has {plan.height} bytes, {over} ({plan.how}, {plan.seconds:.1f} s).",
    ]
    if missed:
        lines.append(f"{capacity} bytes were not reached: {_why(plan.outcome, plan.bound)}")
    elif capacity is None and plan.outcome is Outcome.REACHED:
        lines.append("No smaller arena exists.")
    elif capacity is None:
        lines.append("Whether a smaller arena exists was not decided in this time.")
    if written is not None:
        lines.append(f"Wrote {written}.")
    ui.stdout().print("\n".join(lines), soft_wrap=True)
    return MISSED if missed else 0


def check_seconds(seconds: float) -> None:
    """Refuse no time to look in.

    Raises:
        UsageError: It is not above 0.
    """
    if not seconds > 0:
        raise UsageError(f"--seconds is {seconds:g}.", "Give a number above 0.")


def _why(outcome: object, bound: int) -> str:
    from graphopt.memory.planning.plan import Outcome

    if outcome is Outcome.INFEASIBLE:
        return f"proved to be out of reach, the bound is {bound}."
    return (
        f"not proved to be out of reach, the bound is {bound}. Give more --seconds, or leave out "
        "--capacity for the best plan that was found."
    )
