"""Second moments of what matrices and attentions read, on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.ir.graph import Program, Value
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import Ranks


class SecondMoments:
    """The sum over tokens of x x^T, for one value x [.., N]; heads count as tokens."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of a batch."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float().flatten(0, -2)
            gram = (rows.t() @ rows).double()
        self.total = gram if self.total is None else self.total + gram
        self.count += len(rows)

    def reduce(self, ranks: Ranks) -> None:
        """Add what other ranks have."""
        assert self.total is not None
        self.total = ranks.total(self.total)
        self.count = int(ranks.totals(self.count)[0])

    def mean(self, where: str) -> Tensor:
        """Return the mean over tokens, fp64 [N, N].

        Args:
            where: What the value is called in messages.

        Raises:
            PassError: It is not finite.
        """
        assert self.total is not None
        if not bool(self.total.isfinite().all()):
            raise PassError(
                f"Activations of {where} are not finite on the calibration text.",
                "Look at the model's results on this text, or give another one with --calib.",
            )
        return self.total / self.count


def block_moments(
    program: Program,
    windows: Tensor,
    wanted: Callable[[BlockStep], Collection[Value]],
    *,
    device: torch.device,
    progress: Progress = silent,
) -> Iterator[tuple[BlockStep, dict[Value, SecondMoments]]]:
    """Yield a program's blocks, each with the second moments of values inside it.

    Args:
        windows: int64 [N, S], without padding.
        wanted: Names the values of a block's function.
    """
    stream = HiddenStateStream(
        calibration_runner(program, device), windows, progress=progress, what="second moments"
    )
    for block in stream:
        moments = {value: SecondMoments() for value in wanted(block)}
        # A parameter is no node's output, and is not observed.
        given = [value for value in moments if value.node is None]
        for batch in range(len(stream.ids)) if given else ():
            for value, x in zip(given, block.values(batch, given), strict=True):
                moments[value].add(x)

        def observer(
            value: Value, of: dict[Value, SecondMoments] = moments
        ) -> Callable[[int, Tensor], None]:
            return lambda _, tensor: of[value].add(tensor)

        block.advance(observers={v: observer(v) for v in moments if v.node is not None})
        for sums in moments.values():
            sums.reduce(stream.ranks)
        yield block, moments
