"""Recording a callable: any number of iterations of it, to the end or to where it fails."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

from graphopt.errors import UsageError, described
from graphopt.memory.cuda_history import AllocatorHistory
from graphopt.memory.operators import data_dependence
from graphopt.memory.recorder import Cost, Recorder, Workspaces
from graphopt.memory.stand_in import StandIn
from graphopt.memory.trace import MAX_EVENTS, Category, Clock, Trace

Tags = Mapping[Category, Mapping[str, Tensor]]
"""What tensors hold -> their names -> them."""


def record(
    function: Callable[..., Any],
    *args: Any,
    iterations: int = 1,
    device: str | torch.device = "cpu",
    tags: Callable[[], Tags] | None = None,
    history: bool = False,
    workspaces: Workspaces | None = None,
    cost: Cost | None = None,
    most: int = MAX_EVENTS,
    **kwargs: Any,
) -> Trace:
    """Return the trace of a callable, run as often as said.

    Inside torch's fake mode, or a `StandIn`, nothing runs, and the clock counts operations or is
    the cost model's. A callable that fails gives the trace up to there, which is then not complete
    and says so.

    Args:
        function: Called with `args` and `kwargs` in each iteration. What it returns is let go of
            at its end.
        device: Where it computes: on a GPU the clock is that of CUDA events.
        tags: What tensors hold; asked in front of the first iteration and behind each.
        history: On a GPU, add what its allocator gave to others than tensors (`cuda_history`).
        workspaces, cost, most: See `Recorder`.

    Raises:
        UsageError: On fake tensors it needs the value of one.
    """
    fake, stand_in = detect_fake_mode(), StandIn.active
    valueless = fake is not None or stand_in is not None
    clock: Clock = "host"
    if valueless:
        clock = "operation index" if cost is None else "cost model"
    elif torch.device(device).type == "cuda":
        clock = "cuda events"
    recorder = Recorder(
        clock,
        workspaces=workspaces,
        cost=cost,
        as_fake=None if fake is None else _as_fake(fake),
        meta_place=None if stand_in is None else stand_in.place,
        most=most,
    )
    wanted = history and clock == "cuda events"
    kept = AllocatorHistory(torch.device(device)) if wanted else None
    with recorder, kept or contextlib.nullcontext():
        _tag(recorder, tags)
        for iteration in range(iterations):
            recorder.mark_iteration()
            try:
                out = function(*args, **kwargs)
                recorder.mark_saved(x for x in tree_leaves(out) if isinstance(x, Tensor))
                del out
            except (Exception, SystemExit) as error:
                if valueless and (reason := data_dependence(error)) is not None:
                    raise _needs_values(function, error, reason) from error
                recorder.stop(
                    f"Iteration {iteration + 1} of {iterations} failed, and the trace ends there: "
                    f"{described(error)}."
                )
                break
            _tag(recorder, tags)
    trace = recorder.finish()
    return trace if kept is None else kept.join(trace, recorder.addresses, recorder.log.host_times)


def _tag(recorder: Recorder, tags: Callable[[], Tags] | None) -> None:
    for category, tensors in (tags() if tags is not None else {}).items():
        recorder.tag(tensors, category)


def _as_fake(mode: Any) -> Callable[[Tensor], Tensor]:
    """Return what gives the fake tensor that stands for one with values.

    Both are kept: the mode forgets what nobody holds, and would make another the next time.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def as_fake(tensor: Tensor) -> Tensor:
        if hasattr(tensor, "fake_device"):
            return tensor
        if id(tensor) not in kept:
            kept[id(tensor)] = tensor, mode.from_tensor(tensor, static_shapes=True)
        return kept[id(tensor)][1]

    return as_fake


def _needs_values(function: Callable[..., Any], error: BaseException, reason: str) -> UsageError:
    """Return the error for what cannot be followed without values, with the line of the user's."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    stack = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in stack if not frame.filename.startswith(own)]
    where = f", in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    name = getattr(function, "__qualname__", type(function).__name__)
    return UsageError(
        f"{name} cannot be followed on tensors without values: {reason}{where}.",
        "Run it with values, on the CPU or a GPU.",
    )
