"""The learned predictor: the next row of attention from the last ones, by a small network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies import attention_cnn
from graphopt.ir.kv_policies.attention_cnn import FEATURES, HALO, row_features
from graphopt.ir.kv_policies.base import (
    STEPS,
    KVHeads,
    KVPolicy,
    State,
    TensorType,
    check_calibration,
    page_values,
)
from graphopt.ir.kv_policies.pages import (
    Filled,
    all_pages,
    put_pages,
    select_pages,
    statistics_dtype,
    take_pages,
)
from graphopt.ir.kv_policies.probabilities import Scoring, max_pooled, tail_pages

LEAST_HISTORY = 8
"""Rows without which none would be two rows away from both edges on both sides of a slide."""

AVERAGE_SHARE = 0.2
"""What the newest probability counts in the averages that are shown, as `Ema` has it."""

EDGE = 2 * HALO + 1
"""Rows of input that the features of the outer two rows, and of the next one, depend on."""


@dataclass(frozen=True)
class Predictor(KVPolicy):
    """Scores a page by the attention that a network predicts for it from the last rows.

    The network sees the rows of a KV head (the largest probability in each page, over its query
    heads too) at the pages that may be chosen: what is sink, or will be local at the next step, is
    outside and has zeros there. It predicts as soon as a row is known, so that pages can be brought
    for the next step before its query is.

    With two channels a row has the moving averages of pages' probabilities, as `Ema` keeps them: a
    page that a step did not read keeps its value in the next row and is marked as not observed.
    Values are fourth roots, since probabilities span orders of magnitude. What the last row says is
    the choice of `Ema`; the network learns what rows in front of it and pages beside it add. With
    one channel, the published form, values are probabilities and what was not read is 0.

    Of the `history` rows of features that a prediction is the mean of, a step computes six: a sum
    over the inner rows slides by one that comes and one that goes, and the two at either edge are
    computed again. Where a page opens, the last three pages of the sum are computed from all rows;
    a calibration computes all of it, so that roundings do not add up.

    State: `history` [B, G, R, N], a ring with row t in slot t mod R, t counting from the oldest row
    of the prompt; `observed`, of the same shape, with two channels; `running_sum` [B, G, F, N], of
    the features of the inner rows but the one that goes next; `scores` [B, G, N], the prediction
    for the next step; and `steps` [B].

    Source: Yang et al., arXiv 2502.04077, with the changes that are told above.

    Attributes:
        history: R, rows that a prediction is made of.
        channels: 2, or 1 for the published form.
        calibrate_every: As the published method has it, 5.
    """

    kind: ClassVar[str] = "predictor"
    needs_observation: ClassVar[bool] = True

    calibrate_every: int | None = 5
    history: int = 64
    channels: int = 2
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_calibration(self.calibrate_every)
        if self.history < LEAST_HISTORY:
            raise UsageError(
                f"A prediction from {self.history} rows.", f"Give {LEAST_HISTORY} or more."
            )
        if self.channels not in (1, 2):
            raise UsageError(
                f"A predictor of {self.channels} channels.",
                "Give 2, or 1 for the published form.",
            )

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        dtype, head = statistics_dtype(heads.dtype), (batch, heads.key_heads)
        rows: dict[str, TensorType] = {"history": ((*head, self.history, pages), dtype)}
        if self.channels == 2:
            rows["observed"] = ((*head, self.history, pages), torch.bool)
        return {
            **rows,
            "running_sum": ((*head, FEATURES, pages), dtype),
            "scores": ((*head, pages), dtype),
            STEPS: ((batch,), torch.int64),
        }

    def weight_types(self, heads: KVHeads) -> dict[str, TensorType]:
        dtype = statistics_dtype(heads.dtype)
        shapes = attention_cnn.weight_shapes(self.channels)
        return {name: (shape, dtype) for name, shape in shapes.items()}

    def with_weights(self, weights: Mapping[str, Tensor]) -> Predictor:
        """Return the policy with its weights, by name.

        Raises:
            UsageError: They are not those of a predictor of as many channels.
        """
        shapes = attention_cnn.weight_shapes(self.channels)
        if {name: tuple(x.shape) for name, x in weights.items()} != shapes:
            told = ", ".join(f"{name} {list(x.shape)}" for name, x in weights.items())
            raise UsageError(
                f"These are no weights of a predictor of {self.channels} channels: {told}.",
                f"Its weights are {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}.",
            )
        return replace(self, weights=dict(weights))

    def init(
        self,
        q_BHRD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        mask_BT: Tensor | None,
        scoring: Scoring,
    ) -> State:
        lengths = Filled.all_of(k_BGTD) if mask_BT is None else Filled.of_mask(mask_BT)
        page, rows = self.budget.page, q_BHRD.shape[2]
        probs = max_pooled(q_BHRD, k_BGTD, lengths, page, scoring, mask_BT)
        missing = (0, 0, self.history - rows, 0)
        if self.channels == 1:
            state = {"history": F.pad(probs, missing)}
        else:
            read = tail_pages(rows, lengths, page)
            state = {"history": F.pad(averages_of_rows(probs, read[:, None]), missing)}
            read = F.pad(read, missing)
            state["observed"] = read[:, None].expand_as(state["history"]).contiguous()
        state[STEPS] = torch.zeros_like(lengths.first_B)
        return self._from_all_rows(state, lengths)

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        scores = page_values(state, "scores", lengths.pages(self.budget.page))
        return select_pages(scores, self.budget, lengths)

    def observe(
        self,
        state: State,
        selected_BGM: Tensor,
        page_probs_BGM: Tensor | None,
        k_new_BG1D: Tensor,
        lengths: Filled,
    ) -> State:
        state = self._with_row(state, selected_BGM, page_probs_BGM, lengths)
        pages = state["history"].shape[3]
        sliding = page_values(state, "running_sum", pages, axis=3)
        inside = self._inside(state, lengths)
        ring = torch.arange(self.history, device=sliding.device)
        weights, groups = self._weights(), sliding.shape[1]
        # Three rows of each: at the top the outer two and the one that goes, at the bottom the one
        # that comes and the outer two.
        top = row_features(
            self._rows(state, ring[:EDGE]), inside, weights, top=True, bottom=False
        ).unflatten(0, (-1, groups))
        bottom = row_features(
            self._rows(state, ring[-EDGE:]), inside, weights, top=False, bottom=True
        ).unflatten(0, (-1, groups))
        sliding = sliding + bottom[:, :, :, 0] - top[:, :, :, 2]
        sliding = self._last_pages_again(state, sliding, lengths)
        total = sliding + top.sum(3) + bottom[:, :, :, 1:].sum(3)
        return {**state, "running_sum": sliding, "scores": self._score(total)}

    def calibrate(
        self, state: State, page_probs_BGN: Tensor | None, k_new_BG1D: Tensor, lengths: Filled
    ) -> State:
        everything = all_pages(self.budget.page, lengths).expand(-1, k_new_BG1D.shape[1], -1)
        state = self._with_row(state, everything, page_probs_BGN, lengths)
        return self._from_all_rows(state, lengths)

    def _with_row(
        self, state: State, selected_BGM: Tensor, page_probs_BGM: Tensor | None, lengths: Filled
    ) -> State:
        """Return the state with one row more in its ring, and one step more."""
        assert page_probs_BGM is not None
        pages = lengths.pages(self.budget.page)
        history = page_values(state, "history", pages, axis=3)
        slot = state[STEPS] % self.history
        before = _row(history, (state[STEPS] - 1) % self.history)
        values, kept = page_probs_BGM.to(history.dtype), torch.zeros_like(before)
        if self.channels == 2:
            values, kept = next_averages(take_pages(before, selected_BGM), values), before
        state = {**state, "history": _put_row(history, slot, put_pages(kept, selected_BGM, values))}
        if self.channels == 2:
            observed = page_values(state, "observed", pages, axis=3)
            read = torch.zeros_like(before, dtype=torch.bool)
            read = put_pages(read, selected_BGM, torch.ones_like(selected_BGM))
            state["observed"] = _put_row(observed, slot, read)
        state[STEPS] = state[STEPS] + 1
        return state

    def _rows(self, state: State, rows: Tensor) -> Tensor:
        """Return rows of the ring by their age, the oldest being 0: [B * G, C, rows, N]."""
        ordered = [_ordered(x, state[STEPS], rows) for x in self._channels(state)]
        return torch.stack(ordered, 2).flatten(0, 1)

    def _channels(self, state: State) -> list[Tensor]:
        """Return what the network sees of the ring: [B, G, R, N] each."""
        history = state["history"]
        return [history] if self.channels == 1 else [history, state["observed"].to(history.dtype)]

    def _selectable(self, lengths: Filled) -> tuple[Tensor, Tensor]:
        """Return the first and the last page, [B, 1], that may be chosen at the next step.

        The next step's token is behind the last one, so that what is local is known.
        """
        page, budget = self.budget.page, self.budget
        first = lengths.first_B // page + budget.sink
        return first[:, None], ((lengths.last_B + 1) // page - budget.local)[:, None]

    def _inside(self, state: State, lengths: Filled) -> Tensor:
        """Return the pages that may be chosen at the next step: bool [B * G, N]."""
        _, groups, _, pages = state["history"].shape
        first, last = self._selectable(lengths)
        number = torch.arange(pages, device=first.device)
        return ((number >= first) & (number <= last)).repeat_interleave(groups, 0)

    def _from_all_rows(self, state: State, lengths: Filled) -> State:
        """Return the state with its sum and its prediction computed from all rows."""
        rows = torch.arange(self.history, device=lengths.last_B.device)
        inside, groups = self._inside(state, lengths), state["history"].shape[1]
        features = row_features(
            self._rows(state, rows), inside, self._weights(), top=True, bottom=True
        ).unflatten(0, (-1, groups))
        return {
            **state,
            "running_sum": features[:, :, :, HALO + 1 : -HALO].sum(3),
            "scores": self._score(features.sum(3)),
        }

    def _last_pages_again(self, state: State, sliding: Tensor, lengths: Filled) -> Tensor:
        """Return the running sum with its last three pages computed from all rows.

        They are what changes where a page opens: the one that may now be chosen, and those that
        had zeros beside them. It is done at every step, so that each is the same.
        """
        first, last = self._selectable(lengths)
        columns = last + torch.arange(-2 * HALO, 1, device=last.device)
        exist = columns >= first.clamp(min=0)
        rows = torch.arange(self.history, device=last.device)
        batch, groups, _, pages = state["history"].shape
        index = columns.clamp(min=0)[:, None, None].expand(-1, groups, self.history, -1)
        near = [x.gather(3, index) for x in self._channels(state)]
        x = torch.stack([_ordered(x, state[STEPS], rows) for x in near], 2).flatten(0, 1)
        inside = exist.repeat_interleave(groups, 0)
        features = row_features(x, inside, self._weights(), top=False, bottom=False)
        inner = features[:, :, 1:, HALO:].sum(2).unflatten(0, (batch, groups))
        index = torch.where(exist, columns, pages)[:, None, None, HALO:].expand_as(inner)
        return F.pad(sliding, (0, 1)).scatter(3, index, inner)[..., :pages]

    def _score(self, total: Tensor) -> Tensor:
        """Return the predictions of the sums of all rows' features, [B, G, N]."""
        mean = total.flatten(0, 1) / self.history
        return attention_cnn.score(mean, self._weights()).unflatten(0, total.shape[:2])

    def _weights(self) -> Mapping[str, Tensor]:
        if self.weights is None:
            raise UsageError(
                "The KV policy predictor has no weights.",
                "Give it those of a checkpoint: `graphopt train-kv-policy` makes one.",
            )
        return self.weights


def next_averages(before: Tensor, probs: Tensor) -> Tensor:
    """Return the fourth roots of moving averages with one probability more.

    Args:
        before: Fourth roots of the averages so far; 0 where there was none, so that the new
            probability counts whole.
    """
    average = AVERAGE_SHARE * probs + (1 - AVERAGE_SHARE) * before.square().square()
    return torch.where(before > 0, average, probs).sqrt().sqrt()


def averages_of_rows(probs_BGRN: Tensor, read: Tensor) -> Tensor:
    """Return the fourth roots of the moving averages at the end of every row, [B, G, R, N].

    Args:
        read: Which pages a row has read, bool [B, 1, R, N]; from its first row on a page always is.
    """
    first = read & ~F.pad(read, (0, 0, 1, 0))[:, :, :-1]
    row = torch.arange(probs_BGRN.shape[2], device=probs_BGRN.device)
    behind = row[:, None] - row
    left = (1 - AVERAGE_SHARE) ** behind.clamp(min=0).to(probs_BGRN.dtype)
    left = (left * AVERAGE_SHARE).masked_fill(behind < 0, 0)
    return (left @ torch.where(first, probs_BGRN / AVERAGE_SHARE, probs_BGRN)).sqrt().sqrt()


def _ordered(ring: Tensor, steps: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a ring [B, G, R, N] by their age, the oldest being 0: [B, G, rows, N]."""
    slot = (steps[:, None] + rows) % ring.shape[2]
    index = slot[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])
    return ring.gather(2, index)


def _row(ring: Tensor, slot_B: Tensor) -> Tensor:
    """Return the row in one slot of each ring: [B, G, N]."""
    index = slot_B[:, None, None, None].expand(-1, ring.shape[1], 1, ring.shape[3])
    return ring.gather(2, index)[:, :, 0]


def _put_row(ring: Tensor, slot_B: Tensor, row_BGN: Tensor) -> Tensor:
    """Return rings with a row in one slot of each."""
    index = slot_B[:, None, None, None].expand(-1, ring.shape[1], 1, ring.shape[3])
    return ring.scatter(2, index, row_BGN[:, :, None])
