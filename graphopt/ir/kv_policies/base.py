"""What a KV policy is: a choice of the pages that a decoding step reads, over explicit state.

A policy is a frozen dataclass of plain numbers. What it remembers of a layer is a dict of tensors
that goes in and comes out of each function, so that exported graphs have it as inputs and outputs
and a step can be recorded as a CUDA graph. A step of one token is

    selected = policy.select(state, q, k, lengths, scoring)   # k and lengths include the new key
    ...attention over the pages `selected`, with its page maxima and log-sum-exp...
    probabilities = page_probabilities(page_max, lse, G)[:, :, 0]
    state = policy.observe(state, selected, probabilities, k_new, lengths)

and where `policy.due(state, layer)` says so, one over all pages:

    state = policy.calibrate(state, probabilities_of_all_pages, k_new, lengths)

A step of several tokens is dense and ends with `init`, whatever the state was before.

Beside what a layer has anyway, the functions take: `Filled`, which has the number of slots too,
so that states grow by a page when one opens and `observe` knows; and `Scoring`, since softmax hangs
on the scale, the cap and the sinks. `state_types` gives shapes and dtypes, and none of the IR's
types: this package goes into emitted models, and needs torch and `graphopt.errors` alone. A policy
with weights (`weight_types`) is given them by `with_weights`.

State tensors may have more pages than there are (memory of fixed room), or fewer by those that
opened since (memory that grows): what lies behind a row's last key never counts.

Layout letters as in `graphopt.ir.kv_policies.pages`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.pages import Filled, PageBudget, all_pages, with_pages
from graphopt.ir.kv_policies.probabilities import Scoring

State: TypeAlias = dict[str, Tensor]
"""What a policy remembers of a layer, by name; every tensor begins with [B, ...] or [B, G, ...]."""

TensorType: TypeAlias = tuple[tuple[Any, ...], torch.dtype]
"""The shape of a tensor, whose sizes may be symbols, and its dtype."""


@dataclass(frozen=True)
class KVHeads:
    """The sizes of a layer's attention.

    Attributes:
        key_heads, query_heads: G and H.
        k_dim, v_dim: Sizes of a key and of a value head.
        dtype: That of the keys.
    """

    key_heads: int
    query_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class KVPolicy(ABC):
    """Chooses the pages that a decoding step reads.

    Attributes:
        budget: How many pages, and of how many tokens.
        calibrate_every: Steps from one dense step to the next; None for no dense steps.
        kind: The name of the policy.
        needs_query: Whether `select` reads the step's own query, so that no page can be brought
            before it is known.
        needs_observation: Whether `observe` reads the probabilities of the pages that were read.
        measuring_only: Whether it computes dense attention to select, so that it saves nothing.
    """

    kind: ClassVar[str]
    needs_query: ClassVar[bool] = False
    needs_observation: ClassVar[bool] = False
    measuring_only: ClassVar[bool] = False

    budget: PageBudget

    @property
    def calibrate_every(self) -> int | None:
        return None

    @property
    def history(self) -> int:
        """R: how many of a prompt's last queries `init` reads."""
        return 0

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        """Return the shapes and dtypes of the state of a layer, in their order.

        Args:
            pages, batch: N and B, numbers or symbols.
        """
        return {}

    def numbers_of_page(self, heads: KVHeads) -> int:
        """Return how many numbers `select` makes of each page of a KV head, beside its score."""
        return 0

    def weight_types(self, heads: KVHeads) -> dict[str, TensorType]:
        """Return the shapes and dtypes of what `with_weights` takes, in their order."""
        return {}

    def with_weights(self, weights: Mapping[str, Tensor]) -> KVPolicy:
        """Return the policy with its weights, by name."""
        return self

    def init(
        self,
        q_BHRD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        mask_BT: Tensor | None,
        scoring: Scoring,
    ) -> State:
        """Return the state after a prompt, or after any step of several tokens.

        Args:
            q_BHRD: The last queries of each row, at most `history`; see `tail_probabilities`.
            k_BGTD, v_BGTD: All keys and values.
            mask_BT: Nonzero at real tokens; None where all are.
        """
        return {}

    @abstractmethod
    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        """Return the pages that a step reads: int64 [B, G, M], each once; -1 names no page.

        Where all KV heads read the same, the result may have 1 in place of G, as the attention's
        `selected_blocks` may.

        Args:
            q_BH1D: The step's queries; may be None where not `needs_query`.
            k_BGTD: All keys, the new one included; may be None where not `measuring_only`.
        """

    def observe(
        self,
        state: State,
        selected_BGM: Tensor,
        page_probs_BGM: Tensor | None,
        k_new_BG1D: Tensor,
        lengths: Filled,
    ) -> State:
        """Return the state after a step that read the selected pages.

        Args:
            page_probs_BGM: The largest probability in each page that was read
                (`page_probabilities`); may be None where not `needs_observation`.
            k_new_BG1D: The step's keys.
        """
        return state

    def calibrate(
        self, state: State, page_probs_BGN: Tensor | None, k_new_BG1D: Tensor, lengths: Filled
    ) -> State:
        """Return the state after a step that read all pages.

        Args:
            page_probs_BGN: As for `observe`, of all pages in their order.
        """
        everything = all_pages(self.budget.page, lengths).expand(-1, k_new_BG1D.shape[1], -1)
        return self.observe(state, everything, page_probs_BGN, k_new_BG1D, lengths)

    def due(self, state: State, layer: int = 0) -> Tensor | None:
        """Return for which rows the next step is to be dense, bool [B]; None for never.

        The state counts steps since `init` (`STEPS`). Layer i is due at step t, counted from 1,
        where t + i is a multiple of `calibrate_every`: a slice of the layers at each step.
        """
        if self.calibrate_every is None:
            return None
        return (state[STEPS] + 1 + layer) % self.calibrate_every == 0


STEPS = "steps"
"""In the state of a policy that is calibrated: int64 [B], the steps since `init`."""


def check_calibration(every: int | None) -> None:
    """Refuse a number of steps that has no meaning.

    Raises:
        UsageError: It is below 1.
    """
    if every is not None and every < 1:
        raise UsageError(
            f"A calibration step every {every} steps.", "Give 1 or more, or leave it out for none."
        )


def page_values(state: State, name: str, pages: int, fill: float = 0, *, axis: int = 2) -> Tensor:
    """Return a state tensor with at least so many pages along an axis, new ones being `fill`."""
    return with_pages(state[name], pages, axis, fill)
