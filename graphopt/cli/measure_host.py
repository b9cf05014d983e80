"""`graphopt measure-host`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import Device, Json, errors_as_sentences, print_json


@errors_as_sentences
def measure_host_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, .json.")],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure what keys in this machine's memory take, for `figures=` of the pass place-kv.

    That is at what rates its processors attend to them and its link brings them to the GPU, one by
    one and both at once. It takes some seconds, in which nothing else should run.
    """
    from graphopt.errors import GraphoptError, UsageError
    from graphopt.plan.measure_host import measure_host, write_measured_host
    from graphopt.runtime.host_attention import NoHostKernel
    from graphopt.support.devices import found_gpu, usable_device
    from graphopt.support.quantities import format_bytes

    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {str(out.parent)!r}, which is no folder"
        raise UsageError(f"{str(out)!r} {what}.", "Name a file in a folder that there is.")
    where = usable_device((found_gpu() or "cpu") if device == "auto" else device)
    try:
        measured = measure_host(where)
    except NoHostKernel as problem:
        raise GraphoptError(f"{problem}.") from problem
    write_measured_host(out, measured)
    if as_json:
        print_json(measured.model_dump())
        return
    rates = {
        "the link to the device": (measured.link, measured.link_beside),
        "attention by the processors": (measured.attention, measured.attention_beside),
    }
    rows = [
        (name, f"{format_bytes(alone)}/s; {format_bytes(beside)}/s beside the other")
        for name, (alone, beside) in rates.items()
    ]
    rows += [
        ("memory, read by all threads", f"{format_bytes(measured.memory)}/s"),
        ("a call of the host", f"{1e6 * measured.call:.0f} µs"),
        ("threads", str(measured.threads)),
    ]
    ui.print_rows(ui.stdout(), rows)
    if where.type == "cpu":
        ui.say_note("There is no GPU here: copies in the host's memory stand for its link.")
