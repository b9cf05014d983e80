"""What a recipe will do to a program, and what it will take, without reading a weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphopt.errors import PassError
from graphopt.ir.graph import Program
from graphopt.ir.types import B, P, S
from graphopt.pass_manager.contract import Context, Forecast, Pass
from graphopt.pass_manager.numbering import same_outputs
from graphopt.report.breakdown import breakdown, evaluate_cost
from graphopt.report.records import ForecastEntry

PROBE_TOKENS = 111
"""Tokens of verification's probe; see docs/report.md."""

VERIFIED_RUNS = 3
"""How often the probe runs for a pass whose results are not proved equal: whole, in two steps, and
in fp64 by calls, where each call that is alike is run once."""

READING_ELEMENTS = 60e6
"""Weights that are read and decoded in a second, by one core of 2020's x86 (packed codes; numbers
are read faster)."""

MATRIX_SIZE = 512
MEASURED_SECONDS = 0.1

EFFICIENCY = 0.5
"""The share of the speed of large products that a whole model reaches."""


@dataclass
class RecipeForecast:
    """What a recipe will do.

    Attributes:
        program: The structure that is left, as near as it can be told.
        passes: What each pass that reads weights will do.
        seconds: Of the passes, and of verifying them.
        memory: Bytes that the most demanding pass holds beside what is streamed.
    """

    program: Program
    passes: list[ForecastEntry] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0


def forecast_recipe(
    passes: Sequence[Pass], program: Program, device: torch.device, *, verify: bool
) -> RecipeForecast:
    """Say what passes will do to a program.

    Passes that need no weights are run on what is left of the structure.

    Args:
        program: Left as it is.
        device: Where the passes would compute.
        verify: Whether each is verified.
    """
    result = RecipeForecast(program.copy(), seconds={"passes": 0.0, "verify": 0.0})
    speed: float | None = None
    for item in passes:
        before = result.program
        if item.reads_weights:
            expected = item.forecast(before, device)
            text = expected.what or "what it changes is known once it has read weights"
            result.passes.append(ForecastEntry(item.name, text))
            result.program = expected.left if expected.left is not None else before
            compared = verify
        else:
            expected = Forecast()
            result.program = _without_weights(item, before.copy(), device)
            compared = verify and not same_outputs(before, result.program)
        tokens = VERIFIED_RUNS * PROBE_TOKENS * compared
        if speed is None and (tokens or expected.tokens):
            speed = tokens_per_second(before, device)
        result.seconds["passes"] += expected.seconds
        if speed is not None:
            result.seconds["passes"] += expected.tokens / speed
            result.seconds["verify"] += tokens / speed
        result.seconds["verify"] += reading_seconds(result.program) * compared
        result.memory = max(result.memory, expected.memory)
    return result


def _without_weights(item: Pass, program: Program, device: torch.device) -> Program:
    """Run a pass on a structure that may not be quite the one that it will get."""
    try:
        return item.run(program, Context(device=device)).program
    except PassError:
        return program


def reading_seconds(program: Program) -> float:
    """Return about how long it takes to read every weight once."""
    return sum(weight.numel for weight in program.used_weights()) / READING_ELEMENTS


def tokens_per_second(program: Program, device: torch.device) -> float:
    """Return about how many tokens of a text a device runs through a program in a second.

    From the FLOPs of the program and the speed of a matrix product, which is measured.
    """
    sizes = {B: 1, S: 256, P: 0}
    flops = sum(
        evaluate_cost(cost, sizes) for block in breakdown(program) for cost in block.flops.values()
    )
    return EFFICIENCY * flops_per_second(device) * sizes[S] / max(flops, 1)


def flops_per_second(device: torch.device) -> float:
    """Return how fast a device multiplies matrices in fp32, measured for a tenth of a second."""
    x = torch.ones(MATRIX_SIZE, MATRIX_SIZE, device=device)

    def product() -> None:
        torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()  # the first one makes ready
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < MEASURED_SECONDS:
        product()
        count += 1
    return 2.0 * MATRIX_SIZE**3 * count / seconds
