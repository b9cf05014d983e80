"""What a student learns from: windows of text, and the teacher's hidden states on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.execute.block_runner import BlockRunner
from graphopt.support.devices import room_for
from graphopt.support.ranks import here, sharing

TOKENS_AHEAD = 32768
"""Tokens over which a GPU runs the teacher at once: with fewer it waits for launches."""


class HiddenStateCache:
    """A model's residual stream in one place on windows of text, made when first asked for.

    It is kept in the dtype of products, on the device, as long as that takes no more than half of
    what is free there, and else in half of what is free in the host's memory. What fits neither
    is made anew each time. Ranks ask for the same windows in the same order; what is kept is made
    by each for a part of them, and all get all of it.

    Args:
        teacher: The model; its calls are run from the start to its last one.
        ids: int64 [N, S].
        entry: The hidden states in front of its first call, where they are known; calls before it
            are then not run.
        tokens_ahead: Over how many tokens a GPU runs the teacher at once, where states are kept.
    """

    def __init__(
        self,
        teacher: BlockRunner,
        ids: Tensor,
        entry: HiddenStateCache | None = None,
        tokens_ahead: int = TOKENS_AHEAD,
    ) -> None:
        self._ahead = tokens_ahead
        self._teacher: BlockRunner | None = teacher
        self._ids, self._entry, self._device = ids, entry, teacher.device
        self._known: dict[int, Tensor] = {}
        self._place: torch.device | None = None
        self._begun = False

    def rows(self, rows: Sequence[int], own: range | None = None) -> Tensor:
        """Return the hidden states of some windows, [n, S, D] on the model's device.

        Args:
            rows: The windows, the same on every rank.
            own: The places among them that this rank asks for; by default all n of them.
        """
        own = range(len(rows)) if own is None else own
        missing = [row for row in rows if row not in self._known]
        if missing and self._begun and self._place is None:
            return self._run(rows, own)
        if missing:
            missing = self._with_others(missing)
            ranks = sharing(len(missing))
            hidden = self._run(missing, ranks.share(len(missing)))
            if not self._begun:
                self._begun, self._place = True, self._agreed_place(hidden)
            hidden = ranks.gathered(hidden)
            if self._place is None:
                return hidden[own.start : own.stop]
            self._known |= dict(zip(missing, hidden.to(self._place).unbind(), strict=True))
        if not own:
            return self._known[rows[0]][None][:0].to(self._device)
        return torch.stack([self._known[rows[place]] for place in own]).to(self._device)

    def _with_others(self, missing: list[int]) -> list[int]:
        """Return missing windows with others, so that no device runs few, and no rank none."""
        if self._place is None:  # it is not known yet whether they can be kept
            return missing
        missing = list(dict.fromkeys(missing))
        ahead = -len(missing) % here().world
        if self._device.type == "cuda":
            ahead = max(ahead, self._ahead // self._ids.shape[1])
        others = (row for row in range(len(self._ids)) if row not in self._known)
        chosen = dict.fromkeys([*missing, *itertools.islice(others, ahead + len(missing))])
        return list(chosen)[: len(missing) + ahead]

    def _agreed_place(self, hidden: Tensor) -> torch.device | None:
        """Return where the hidden states of all windows have room on every rank."""
        places = [self._device, torch.device("cpu"), None]
        own = room_for(hidden[0].nbytes * len(self._ids), self._device)
        return places[here().most(places.index(own))]

    def complete(self) -> None:
        """Make those of all windows, and let go of the model and the states that they are made of.

        What has no room is still made anew each time, and needs both.
        """
        for row in range(len(self._ids)):
            self.rows([row])
            if self._place is None:
                return
        self._teacher = self._entry = None

    def _run(self, rows: Sequence[int], own: range) -> Tensor:
        teacher = self._teacher
        assert teacher is not None
        entry = None if self._entry is None else self._entry.rows(rows, own)
        if not own:
            return torch.empty(0, device=self._device)
        ids = self._ids[torch.tensor(rows)][own.start : own.stop]
        values = teacher.window_inputs(ids.to(teacher.device))
        with torch.no_grad():
            if entry is None:
                teacher.run_range(values, 0, teacher.stop)
            else:
                teacher.run_range(values, 0, teacher.embedding)
                values[teacher.entry] = entry
                teacher.run_range(values, teacher.first, teacher.stop)
        return values[teacher.exit].to(teacher.kept_dtype)


@dataclass(frozen=True)
class DistillationData:
    """What a student learns from.

    Attributes:
        ids: Windows of tokens, int64 [N, S].
        targets: The teacher's hidden states in the place of the student's exit.
        entry: The hidden states in front of the student's first call; None where it starts from
            the ids.
        held_out: How many windows, the last ones, are for checks alone. One at least: the best
            state is chosen by them, and it is what a training that fails falls back to.
    """

    ids: Tensor
    targets: HiddenStateCache
    entry: HiddenStateCache | None = None
    held_out: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.held_out < len(self.ids):
            raise ValueError(f"{self.held_out} of {len(self.ids)} windows are held out")

    def batch(
        self, rows: Sequence[int], device: torch.device, own: range | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return some windows, the targets for them, and their hidden states at the entry.

        Args:
            rows: The windows, the same on every rank.
            own: The places among them that this rank asks for; by default all.
        """
        own = range(len(rows)) if own is None else own
        return (
            self.ids[torch.tensor(rows)][own.start : own.stop].to(device),
            self.targets.rows(rows, own),
            None if self.entry is None else self.entry.rows(rows, own),
        )
