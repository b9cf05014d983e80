"""`graphopt memory`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import console as ui
from graphopt.cli.memory_onnx import graph_to_measure, measured_beside, with_cache
from graphopt.cli.memory_plan import check_seconds, plan_file
from graphopt.cli.shared import (
    MAX_COUNT,
    ConfigOption,
    Json,
    Remote,
    capture_model,
    check_writable,
    errors_as_sentences,
    model_spec,
    print_json,
)
from graphopt.errors import UsageError, unknown_name
from graphopt.support.quantities import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

    from graphopt.memory.analysis.fragmentation import Fragmentation
    from graphopt.memory.analysis.link import Link
    from graphopt.memory.analysis.summary import Summary
    from graphopt.memory.analysis.target import Reached
    from graphopt.memory.trace import Trace
    from graphopt.memory.workload import Workload

FAKE = "fake"
"""The device whose tensors have no values."""

PREFILL = "prefill"
"""The phase where the user names none."""

SCRIPT = "script"
"""The phase of a function of a script."""

ITERATIONS = {PREFILL: 1, "calibrate": 1, "decode": 4, "train": 3, SCRIPT: 3}
"""Iterations that are recorded, by phase, where the user says nothing."""


@dataclass(frozen=True)
class MemoryFlags:
    """The options of `graphopt memory`."""

    phase: Annotated[
        str | None,
        typer.Option(help="What a model does: prefill (the default), decode, train or calibrate."),
    ] = None
    batch: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Texts at once.")] = 1
    seq: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Tokens of each; of decode, in the cache.")
    ] = 128
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of a model's weights and activations: bfloat16 (the default), float16 or float32."
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, or fake: tensors without values stand for a GPU's, and nothing runs. "
            "auto takes a GPU where there is one, and else fake."
        ),
    ] = "auto"
    iterations: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="How often it is done; a period needs more than two."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="The page, memory.html by default; of --plan, rows with offsets."
        ),
    ] = None
    perfetto: Annotated[
        Path | None, typer.Option(help="Also write a trace for the Perfetto viewer.")
    ] = None
    save: Annotated[
        Path | None, typer.Option(help="Also write the events as JSON, which MODEL may be then.")
    ] = None
    swap_bandwidth: Annotated[
        str | None,
        typer.Option(
            help="Of copies to the host and back, such as 25GB (a second), or OUT,IN,OUT_US,IN_US; "
            "by default measured on a GPU, and else by the data sheet."
        ),
    ] = None
    target_peak: Annotated[
        str | None,
        typer.Option(help="Choose what to swap or recompute to get down to this, such as 12GB."),
    ] = None
    onnx: Annotated[
        bool | None,
        typer.Option(
            help="Also measure an ONNX Runtime session of an output folder, in a process of its "
            "own; by default where the folder has an ONNX form and the phase is prefill or decode."
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a model: a CSV file with columns id, lower, upper, size, for which "
            "offsets are planned."
        ),
    ] = None
    capacity: Annotated[
        int | None,
        typer.Option(min=0, help="Of --plan: bytes that suffice; by default the fewest."),
    ] = None
    seconds: Annotated[
        float | None,
        typer.Option(
            max=MAX_COUNT, help="How long to look for a plan of offsets: 60 with --plan, else 5."
        ),
    ] = None


@errors_as_sentences
def memory_command(
    model: Annotated[
        str | None,
        typer.Argument(help="A model, an output folder, script.py:function, or events of --save."),
    ] = None,
    config: ConfigOption = None,
    trust_remote_code: Remote = False,
    *,
    flags: MemoryFlags,
    as_json: Json = False,
) -> None:
    """Show the life of every block of memory in a run, or plan offsets for a table of blocks."""
    if flags.plan is not None:
        if model is not None or config is not None:
            raise UsageError("Both a model and --plan are given.", "Give one of them.")
        _refuse(flags, OF_RECORDING, "is not of --plan", "Leave it out.")
        seconds = 60.0 if flags.seconds is None else flags.seconds
        raise typer.Exit(plan_file(flags.plan, flags.capacity, flags.out, seconds, as_json))
    if flags.capacity is not None:
        raise UsageError("--capacity is of --plan.", "Give --plan FILE.csv, or --target-peak.")
    from graphopt.memory.analysis.arena import plan_arena
    from graphopt.memory.analysis.summary import summarise
    from graphopt.memory.page.page import render
    from graphopt.memory.perfetto import write_perfetto

    if flags.seconds is not None:
        check_seconds(flags.seconds)
    target = None if flags.target_peak is None else parse_bytes("--target-peak", flags.target_peak)
    spec = model_spec(model, config)
    graph = graph_to_measure(spec, flags.phase or PREFILL, flags.onnx)
    out = flags.out or Path("memory.html")
    check_apart(spec, {"-o": out, "--perfetto": flags.perfetto, "--save": flags.save})
    # What a script prints is no part of the table, nor of JSON.
    with ui.progress_bars() as progress, contextlib.redirect_stdout(sys.stderr):
        progress("recording", 0, 1)
        run = _saved(Path(spec), flags) or _recorded(spec, flags, trust_remote_code)
        progress("recording", 1, 1)
        if flags.save is not None:
            run.trace.save(flags.save)
        progress("planning offsets", 0, 1)
        arena = plan_arena(run.trace, 5.0 if flags.seconds is None else flags.seconds)
        progress("planning offsets", 1, 1)
        progress("looking through it", 0, 1)
        summary = summarise(
            run.trace, run.title, _link(flags, run), target=target, planned=arena.height,
            allocator=run.allocator, facts=run.facts,
        )  # fmt: skip
        out.write_text(render(summary, arena.offsets), encoding="utf-8")
        if flags.perfetto is not None:
            write_perfetto(summary, flags.perfetto)
        progress("looking through it", 1, 1)
        beside = None
        if graph is not None:
            progress("measuring ONNX Runtime", 0, 1)
            program = capture_model(spec, trust_remote_code)
            phase = flags.phase or PREFILL
            beside = measured_beside(graph, program, phase, flags.batch, flags.seq)
            progress("measuring ONNX Runtime", 1, 1)
    if as_json:
        told = {"onnx": beside.to_json()} if beside is not None else {}
        print_json(summary.to_json() | told | {"page": str(out)})
    else:
        _print(summary, out, beside.rows() if beside is not None else [])
    if not run.trace.complete:
        raise typer.Exit(1)


def check_apart(spec: str, files: dict[str, Path | None]) -> None:
    """Refuse files that cannot be written, or that another result or what is read would be lost by.

    Args:
        spec: A model, a script with its function, or saved events.
        files: By option.

    Raises:
        UsageError: Naming the option.
    """
    read = Path(f"{spec.partition('.py:')[0]}.py" if ".py:" in spec else spec)
    taken = {read.resolve(): "what is read"}
    for option, path in files.items():
        if path is None:
            continue
        check_writable(path)
        holds = taken.setdefault(path.resolve(), f"what {option} writes")
        if holds != f"what {option} writes":
            raise UsageError(f"{option} {path}: that file is {holds}.", "Give another file.")


OF_MODELS = ("phase", "dtype")
OF_RECORDING = (
    *OF_MODELS, "iterations", "perfetto", "save", "swap_bandwidth", "target_peak", "onnx",
)  # fmt: skip
"""Options that say something of a model, and of any run, and nothing of other uses."""


def _refuse(flags: MemoryFlags, names: tuple[str, ...], why: str, remedy: str) -> None:
    for name in names:
        if getattr(flags, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} {why}.", remedy)


@dataclass(frozen=True)
class _Run:
    """What was recorded, and where."""

    trace: Trace
    title: str
    facts: dict[str, str | int]
    allocator: Fragmentation | None = None
    on_gpu: bool = False


def _saved(path: Path, flags: MemoryFlags) -> _Run | None:
    """Return the events of a file that `--save` wrote; None if it is another one."""
    from graphopt.memory.trace import Trace

    if path.suffix != ".json" or not path.is_file():
        return None
    with path.open("rb") as file:
        if b'"graphopt_memory_trace"' not in file.read(64):
            return None
    _refuse(flags, (*OF_MODELS, "iterations"), "is not of saved events", "Leave it out.")
    return _Run(Trace.load(path), "saved events", {"events": str(path)})


def _recorded(spec: str, flags: MemoryFlags, trust_remote_code: bool) -> _Run:
    """Record what the user asked for."""
    import torch

    from graphopt.memory.analysis.devices import of_device
    from graphopt.memory.cost import newest_roofline
    from graphopt.memory.stand_in import StandIn
    from graphopt.memory.workspaces import kernel_workspace
    from graphopt.support.devices import found_gpu, usable_device

    make, name, phase = _maker(spec, flags, trust_remote_code)
    if flags.device == FAKE or (flags.device == "auto" and found_gpu() is None):
        cost = newest_roofline()
        with StandIn() as stand_in:
            workload = make(stand_in.device)
            count = workload.warm_up + (flags.iterations or ITERATIONS[phase])
            trace = workload.record(count, workspaces=kernel_workspace, cost=cost)
        where = f"tensors without values, times of {cost.name}"
        facts = _facts(workload, phase, flags, where)
        return _Run(of_device(trace, str(stand_in.device)), name, facts)
    device = torch.device("cuda")
    if flags.device != "auto":
        device = usable_device(flags.device, f"auto, {FAKE}, cpu, cuda, cuda:N")
    workload = make(device)
    count = workload.warm_up + (flags.iterations or ITERATIONS[phase])
    gpu = device.type == "cuda"
    trace = workload.record(count, **({"history": True} if gpu else {}))
    where = torch.cuda.get_device_name(device) if gpu else "CPU"
    facts = _facts(workload, phase, flags, where)
    allocator = _allocator(device) if gpu else None
    return _Run(of_device(trace, device.type), name, facts, allocator, gpu)


def _facts(workload: Workload, phase: str, flags: MemoryFlags, where: str) -> dict[str, str | int]:
    """Return what a run was of, by name; of a script what its function takes."""
    sizes = {"batch": flags.batch, "seq": flags.seq}
    return {
        **({} if phase == SCRIPT else {"phase": phase}),
        **{key: size for key, size in sizes.items() if key in workload.sizes},
        "device": where,
    }


def _allocator(device: torch.device) -> Fragmentation:
    """Return what torch's allocator holds now."""
    import torch

    from graphopt.memory.analysis.fragmentation import fragmentation

    number = torch.cuda.current_device() if device.index is None else device.index
    return fragmentation(torch.cuda.memory_snapshot(), number)


def _maker(
    spec: str, flags: MemoryFlags, trust_remote_code: bool
) -> tuple[Callable[[Any], Workload], str, str]:
    """Return what makes the workload on a device, its title and its phase."""
    import torch

    from graphopt.memory.workload import script_workload

    if spec.endswith(".py"):
        raise UsageError(f"{spec} names no function.", f"Give {spec}:FUNCTION.")
    if ".py:" in spec:
        _refuse(flags, OF_MODELS, "is of models", "What a script does is in its function.")
        return (
            lambda device: script_workload(spec, device, batch=flags.batch, seq=flags.seq),
            spec,
            SCRIPT,
        )
    from graphopt.execute.workloads import PHASES, program_workload

    phase = flags.phase or PREFILL
    if phase not in PHASES:
        raise unknown_name("phase", phase, PHASES)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = flags.dtype or "bfloat16"
    if dtype not in dtypes:
        raise UsageError(f"Unknown dtype {dtype!r}.", f"Known: {', '.join(dtypes)}.")
    program = with_cache(capture_model(spec, trust_remote_code), phase)

    def make(device: torch.device) -> Workload:
        return program_workload(
            program, phase, device, batch=flags.batch, seq=flags.seq, dtype=dtypes[dtype],
        )  # fmt: skip

    return make, program.name, phase


def _link(flags: MemoryFlags, run: _Run) -> Link:
    from graphopt.memory.analysis.link import default_link, measure_link, parse_link

    if flags.swap_bandwidth is not None:
        return parse_link(flags.swap_bandwidth)
    return measure_link("cuda") if run.on_gpu else default_link()


def _print(summary: Summary, out: Path, beside: list[tuple[str, str]]) -> None:
    """Print the table of a summary, and rows of what was measured beside it."""
    from graphopt.memory.analysis.swap import has_times

    console = ui.stdout()
    trace, found = summary.trace, summary.intervals
    over = [c for c in summary.swaps if c.over_peak]
    rows = [
        ("what", f"{summary.title}: {', '.join(summary.said.values())}"),
        ("clock", trace.clock),
        ("events", f"{len(trace):,} of {len(trace.instances):,} blocks"),
        ("peak", f"{format_bytes(summary.peak)} behind {summary.peak_operation() or 'no event'}"),
        *(
            ("", f"{format_bytes(size):>10}  {size / summary.peak:6.1%}  {category}")
            for category, size in sorted(summary.by_category.items(), key=lambda i: -i[1])
        ),
        ("bound", f"{format_bytes(summary.rounded_peak)} with sizes rounded up to 512"),
    ]
    if summary.planned is not None and summary.rounded_peak:
        times = summary.planned / summary.rounded_peak
        rows.append(("plan", f"{format_bytes(summary.planned)}, {times:.4f} of the bound"))
    if (held := summary.allocator) is not None:
        rows.append(
            (
                "allocator",
                f"{format_bytes(held.reserved)} reserved at the end, {held.idle_share:.1%} of it "
                f"idle; {held.external:.1%} of what is free is not in one piece",
            )
        )
    rows.append(("period", summary.period_sentence()))
    if len(found):
        half, most, _, longest = (summary.time(gap) for gap in found.quantiles())
        rows.append(
            (
                "intervals",
                f"{len(found):,}; half up to {half}, 90 % up to {most}, longest {longest}",
            )
        )
    if has_times(trace):
        size = format_bytes(sum({c.instance: c.size for c in over}.values()))
        rows.append(
            (
                "swap",
                f"{len(summary.swaps):,} intervals suffice, {len(over):,} of them over the peak "
                f"({size})",
            )
        )
        rows.append(("", summary.link.describe()))
    else:
        rows.append(("swap", "the clock counts operations: no copy can be timed against it"))
    rows.append(("recompute", f"{len(summary.recomputes):,} intervals of activations"))
    if (reached := summary.reached) is not None:
        rows += _reached_rows(summary, reached)
    rows += [("note", note) for note in trace.notes]
    if not len(trace) and not trace.notes:
        rows.append(("note", "No operator of torch allocated, read or wrote anything."))
    rows += beside
    rows.append(("page", str(out)))
    ui.print_rows(console, rows)


def _reached_rows(summary: Summary, reached: Reached) -> list[tuple[str, str]]:
    verdict = f"not reached: {reached.left}" if reached.left else "reached"
    change = f"{format_bytes(reached.before)} -> {format_bytes(reached.after)}"
    rows = [("target", f"{format_bytes(reached.target)} {verdict}; {change}")]
    for how in ("swap", "recompute"):
        made = [choice for choice in reached.choices if choice.how == how]
        if made:
            size = format_bytes(sum(choice.size for choice in made))
            cost = sum(choice.cost for choice in made)
            costs = f", costs {summary.time(cost)}" if cost else ""
            rows.append(("", f"{how} {len(made):,} blocks, {size}{costs}"))
    return rows
