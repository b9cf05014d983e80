"""What `graphopt passes` and `graphopt targets` print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from graphopt.support.quantities import format_bytes

if TYPE_CHECKING:
    # What reads their files takes longer to import than all that a listing of passes needs.
    from graphopt.targets import Target
    from graphopt.targets.here import Lack


def print_pass_list(console: Console, passes: list[dict[str, Any]]) -> None:
    """Print passes with what they do, and their options with types and defaults."""
    table = _table("pass", "", "what it does, and its options")
    for item in passes:
        options = ", ".join(
            f"{option['name']}: {option['type']} = {_default(option)}" for option in item["options"]
        )
        needs = f"; needs {', '.join(item['requires'])} before it" if item["requires"] else ""
        described = f"{item['summary'].rstrip('.')}{needs}."
        table.add_row(
            item["name"],
            "exact" if item["exact"] else "lossy",
            f"{described}\n{options}" if options else described,
        )
    console.print(table)
    console.print("graphopt passes NAME says what options mean, and what a pass leaves alone.")


def print_pass(console: Console, item: dict[str, Any]) -> None:
    """Print all that is known of a pass: what it does, its legality rules and its options."""
    console.print(item["name"], style="bold", end="  ")
    console.print("exact" if item["exact"] else "lossy", style="dim")
    _print_docstring(console, item["doc"])
    if item["requires"]:
        console.print(f"  It needs {', '.join(item['requires'])} before it in the recipe.\n")
    if not item["options"]:
        return
    table = _table("option", "default", "meaning")
    for option in item["options"]:
        # A meaning is a sentence, and what the option may be stands behind it.
        allowed = option["allowed"] or option["type"].removesuffix(" | None")
        table.add_row(option["name"], _default(option), f"{option['meaning']} [{allowed}]".strip())
    console.print(table)


def _print_docstring(console: Console, text: str) -> None:
    """Print paragraphs and numbered rules; their lines are those of a source, and break anew."""
    for paragraph in text.split("\n\n"):
        for part in re.split(r"\n(?=\d+\. )", paragraph):
            indent = " " * (5 if re.match(r"\d+\. ", part) else 2)
            lines = textwrap.fill(
                " ".join(part.split()), console.width, initial_indent="  ",
                subsequent_indent=indent, break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
            console.print(lines)
        console.print()


def _default(option: dict[str, Any]) -> str:
    default = option["default"]
    if isinstance(default, dict):
        return f"{_written(default['cpu'])}; {_written(default['gpu'])} on GPUs"
    return _written(default)


def _written(value: Any) -> str:
    """Return a value as a recipe has it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def print_targets(
    console: Console,
    targets: Sequence[Target],
    missing: Mapping[str, Sequence[Lack]],
    *,
    full: bool,
) -> None:
    """Print targets and what is missing here; `full` adds figures and where they are from."""
    table = _table("target", "isa", "what it is, and what is missing here")
    for target in targets:
        lines = [f"{target.title}: {' '.join(target.dtypes)}"]
        if target.kernels:
            lines.append(f"attention by {' '.join(target.kernels)}")
        elif target.kind != "cpu":
            lines.append("attention by its reference: no kernels of ours")
        lines += [str(lack) for lack in missing[target.name]]
        table.add_row(target.name, target.isa, "\n".join(lines))
    console.print(table)
    for target in targets if full else ():
        console.print()
        if target.cores:
            console.print(f"  cores: {target.cores}")
        if target.bandwidth:
            console.print(f"  bandwidth: {format_bytes(target.bandwidth)}/s")
        for memory in target.memories:
            size = format_bytes(memory.bytes) if memory.bytes else "-"
            console.print(f"  {memory.name}: {size} a {memory.per}")
        for unit in target.matrix_units:
            sums = " or ".join(unit.accumulate)
            console.print(f"  matrix unit: {unit.m} x {unit.n} x {unit.k}, {unit.input} to {sums}")
        if target.features:
            console.print(f"  features: {', '.join(target.features)}")
        for name, limit in target.limits.items():
            console.print(f"  {name}: {limit}")
        for purpose, packages in (("emit", target.emit), ("run", target.runtime)):
            for package, version in packages.items():
                console.print(f"  to {purpose}: {package} {version}")
        for figure, source in target.sources.items():
            console.print(Padding(f"source of {figure}: {source}", (0, 0, 0, 2)))


def _table(*headings: str) -> Table:
    """Return a table of which the last column alone wraps."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 1), header_style="bold", collapse_padding=True
    )
    for heading in headings[:-1]:
        table.add_column(heading, no_wrap=True)
    table.add_column(headings[-1], overflow="fold", ratio=1)
    return table
