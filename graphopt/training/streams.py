"""The dense model's stream, which a student learns from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.execute.student import Student
from graphopt.support.devices import free_bytes

TOKENS_AHEAD = 32768
"""Tokens over which a GPU runs the dense model at once: with fewer it waits for launches."""


class Streams:
    """The stream at one place of a model on windows of text, made when first asked for and kept.

    Kept in bf16 where the model computes in it. On the device, as long as that takes no more
    than half of what is free there, and else in half of what is free in the host's memory; what
    fits neither is made anew each time.

    Args:
        student: The model; its calls are run from the start to its last one.
        ids: int64 [N, S].
    """

    def __init__(self, student: Student, ids: Tensor) -> None:
        self._student, self._ids = student, ids
        self._known: dict[int, Tensor] = {}
        self._place: torch.device | None = None
        self._begun = False

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Return the streams of some windows, [len(rows), S, D] on the model's device."""
        missing = [row for row in rows if row not in self._known]
        if missing:
            if self._place is not None and self._student.device.type == "cuda":
                others = (row for row in range(len(self._ids)) if row not in self._known)
                ahead = itertools.islice(others, TOKENS_AHEAD // self._ids.shape[1])
                missing = list(dict.fromkeys([*missing, *ahead]))
            made = self._make(missing)
            if not self._begun:
                self._begun, self._place = True, self._roomy(made[0].nbytes * len(self._ids))
            if self._place is None:
                return made
            self._known |= dict(zip(missing, made.to(self._place).unbind(), strict=True))
        return torch.stack([self._known[row] for row in rows]).to(self._student.device)

    def _make(self, rows: Sequence[int]) -> Tensor:
        student = self._student
        values = student.inputs(self._ids[torch.tensor(rows)].to(student.device))
        with torch.no_grad():
            student.run(values, 0, student.stop)
        return values[student.exit].to(student.kept_dtype)

    def _roomy(self, size: int) -> torch.device | None:
        """Return where so many bytes fit; None where they do nowhere."""
        for device in (self._student.device, torch.device("cpu")):
            if size <= free_bytes(device) // 2:
                return device
        return None


@dataclass(frozen=True)
class Lessons:
    """What a student learns from.

    Attributes:
        ids: int64 [N, S], windows of tokens.
        targets: The dense model's stream in the place of the student's exit.
        entry: The stream in front of the student's first call; None where it starts from the
            ids.
        held_out: How many windows, the last ones, are for checks alone. One at least: the best
            state is chosen by them, and it is what a training that fails falls back to.
    """

    ids: Tensor
    targets: Streams
    entry: Streams | None = None
    held_out: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.held_out < len(self.ids):
            raise ValueError(f"{self.held_out} of {len(self.ids)} windows are held out")
