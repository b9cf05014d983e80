"""A KV policy run over the decoding steps of a text whose queries and keys are all known.

What a step reads depends on the steps before through the policy's state, and on nothing else that
is not known already. So the steps of a layer are a loop over small tensors, for all texts and KV
heads at once, by the policy's own functions; attention itself is computed afterwards, for all steps
together. On a GPU a step is a CUDA graph, and nothing waits for the device meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.execute.page_attention import CausalAttention, PageScores
from graphopt.ir.kv_policies import Filled, KVPolicy, Scoring, State, page_probabilities
from graphopt.support.recorded import Recorded


def pages_read(
    policy: KVPolicy, attention: CausalAttention, scores: PageScores, layer: int
) -> Tensor:
    """Return which pages each step reads: bool [B, G, S, N].

    The prompt is what stands in front of the first query of `scores`; each query from there on is
    a step of one token.

    Args:
        attention: Of whole texts, without padding.
        scores: Of the steps' queries, in pages of the policy's size.
        layer: By which the steps are told at which the layer is calibrated; see `KVPolicy.due`.
    """
    steps = _PolicySteps(policy, attention, scores)
    every = policy.calibrate_every
    for number in range(steps.count):
        if every is not None and (number + 1 + layer) % every == 0:
            steps.run(steps.calibrate)
        else:
            steps.run(steps.select)
    return steps.read_BGSN


class _PolicySteps:
    """The state of a policy, and which pages were read so far.

    Attributes:
        count: How many steps there are.
        read_BGSN: Which pages each step reads; False in steps that are still to come.
    """

    def __init__(self, policy: KVPolicy, attention: CausalAttention, scores: PageScores) -> None:
        self._policy, self._attention, self._scores = policy, attention, scores
        first = scores.first
        q, k, mask = attention.q_BHSD, attention.k_BGSD, attention.mask_BS
        self._scoring = Scoring(attention.scale, attention.softcap, attention.sinks)
        self._state: State = policy.init(
            q[:, :, max(0, first - policy.history) : first],
            k[:, :, :first],
            attention.v_BGSD[:, :, :first],
            None if mask is None else mask[:, :first],
            self._scoring,
        )
        batch, heads, _, _ = k.shape
        _, _, self.count, pages = scores.maxima_BHSN.shape
        # One page more, for what names none.
        self._read = torch.zeros(
            batch, heads, self.count, pages + 1, dtype=torch.bool, device=k.device
        )
        self._number = torch.zeros(1, dtype=torch.int64, device=k.device)
        self._done = 0
        self._recorded: dict[Callable[[], None], Callable[[], None]] = {}

    @property
    def read_BGSN(self) -> Tensor:
        return self._read[..., :-1]

    def run(self, step: Callable[[], None]) -> None:
        """Run the next step. Where steps are recorded, the first is not: state grows in it."""
        if self._done and _are_recorded(self._number.device):
            step = self._recording_of(step)
        step()
        self._done += 1

    def select(self) -> None:
        """Run a step that reads what the policy selects."""
        policy, lengths = self._policy, self._lengths()
        query = self._of_step(self._attention.q_BHSD) if policy.needs_query else None
        keys = self._attention.k_BGSD if policy.measuring_only else None
        selected = policy.select(self._state, query, keys, lengths, self._scoring)
        selected = selected.expand(self._read.shape[0], self._read.shape[1], -1)
        none = self._read.shape[-1] - 1
        named = torch.where(selected >= 0, selected, none)
        row = torch.zeros_like(self._read[:, :, :1]).scatter(-1, named[:, :, None], True)
        self._read.index_copy_(2, self._number, row)
        probabilities = self._probabilities(selected) if policy.needs_observation else None
        self._keep(policy.observe(self._state, selected, probabilities, self._new_key(), lengths))

    def calibrate(self) -> None:
        """Run a step that reads all pages."""
        policy, lengths = self._policy, self._lengths()
        present = lengths.present_BN(self._scores.page)[:, None, None]
        row = torch.zeros_like(self._read[:, :, :1])
        row[..., :-1] = present
        self._read.index_copy_(2, self._number, row)
        probabilities = self._probabilities(None) if policy.needs_observation else None
        self._keep(policy.calibrate(self._state, probabilities, self._new_key(), lengths))

    def _lengths(self) -> Filled:
        last = (self._number + self._scores.first).expand(self._read.shape[0])
        return Filled(torch.zeros_like(last), last, self._attention.tokens)

    def _new_key(self) -> Tensor:
        return self._of_step(self._attention.k_BGSD)

    def _of_step(self, x: Tensor) -> Tensor:
        """Return [B, G, 1, D] of the step's token."""
        return x.index_select(2, self._number + self._scores.first)

    def _probabilities(self, selected_BGM: Tensor | None) -> Tensor:
        """Return the step's page probabilities [B, G, M] where it reads some pages, or all."""
        scores = self._scores
        maxima, lse = (
            x.index_select(2, self._number)[:, :, 0] for x in (scores.maxima_BHSN, scores.lse_BHSN)
        )
        if selected_BGM is not None:
            listed = selected_BGM.repeat_interleave(scores.groups, 1)
            maxima, lse = (
                x.gather(-1, listed.clamp(min=0)).masked_fill(listed < 0, float("-inf"))
                for x in (maxima, lse)
            )
        rows = scores.with_sinks(lse.logsumexp(-1, keepdim=True))
        return page_probabilities(maxima[:, :, None], rows, self._read.shape[1])[:, :, 0]

    def _keep(self, state: State) -> None:
        """Take over the state behind the step: in place where it stays in its memory."""
        fits = all(
            name in self._state and self._state[name].shape == value.shape
            for name, value in state.items()
        )
        if fits and _are_recorded(self._number.device):
            # Copied first: a tensor of the new state may be one of the old state.
            for name, value in {name: value.clone() for name, value in state.items()}.items():
                self._state[name].copy_(value)
        else:
            self._state = dict(state)
        self._number += 1

    def _recording_of(self, step: Callable[[], None]) -> Callable[[], None]:
        if step not in self._recorded:

            def work() -> tuple[Tensor, ...]:
                step()
                return ()

            before = {name: value.clone() for name, value in self._state.items()}
            number = self._number.clone()
            recorded = Recorded(work, [])
            # The step was run to be recorded, and is to be run once.
            for name, value in before.items():
                self._state[name].copy_(value)
            self._number.copy_(number)

            def replay() -> None:
                recorded([])

            self._recorded[step] = replay
        return self._recorded[step]


def _are_recorded(device: torch.device) -> bool:
    """Return whether steps are recorded as CUDA graphs."""
    return device.type == "cuda"
