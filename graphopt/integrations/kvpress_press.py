"""KV policies as presses of kvpress, which evict at a prompt's end what is not read again.

    with PolicyPress(SnapKV(PageBudget.of(16, 1024, 64, 64)))(model):
        model.generate(ids)

A press decides once. So only a policy can be one that selects without a step's query and learns
nothing from steps: sink-local, SnapKV and Expected Attention. Its budget holds for the prompt; as
with every press, tokens that are generated are kept beside it.

It needs kvpress, which needs a transformers below 5.3: `graphopt.ir.kv_policies` runs with it, and
nothing else of graphopt is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from kvpress.utils import get_prerope_query_states
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from graphopt.errors import UsageError
from graphopt.ir.kv_policies import Filled, KVPolicy, Scoring


@dataclass
class PolicyPress(BasePress):  # type: ignore[misc]
    """Keeps of a prompt the pages that a policy selects for its first step.

    Attributes:
        policy: What selects.

    Raises:
        UsageError: The policy selects anew in every step, which a press cannot.
    """

    policy: KVPolicy

    def __post_init__(self) -> None:
        policy = self.policy
        if policy.needs_query or policy.needs_observation or policy.measuring_only:
            raise UsageError(
                f"The KV policy {policy.kind} selects anew in every step, and a press evicts once.",
                "Give sink-local, snapkv or expected-attention.",
            )

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the pages that are kept, in the order of the text.

        Args:
            module: The attention of the layer.
            hidden_states: What its queries are made of, [B, S, width].
            keys, values: [B, G, S, D] and [B, G, S, Dv], without padding.
            attentions: Not read.
            kwargs: Of the layer; `position_embeddings` are its cosines and sines.
        """
        policy, lengths = self.policy, Filled.all_of(keys)
        scoring = Scoring(float(getattr(module, "scaling")))  # noqa: B009  (modules have no types)
        queries = self._queries(module, hidden_states, kwargs["position_embeddings"])
        state = policy.init(queries, keys, values, None, scoring)
        selected_BGM = policy.select(state, None, None, lengths, scoring)
        page, (batch, heads, tokens, _) = policy.budget.page, keys.shape
        number = torch.arange(tokens, device=keys.device) // page
        kept_BGS = (selected_BGM[..., None] == number).any(2).expand(batch, heads, tokens)
        # Every head keeps as many pages, the last one, which may be filled in part, among them.
        slots = kept_BGS.nonzero()[:, 2].view(batch, heads, -1, 1)
        return tuple(  # type: ignore[return-value]
            x.gather(2, slots.expand(-1, -1, -1, x.shape[3])).contiguous() for x in (keys, values)
        )

    def _queries(
        self, module: nn.Module, hidden_states: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the last queries [B, H, R, D] that the policy reads."""
        rows = min(self.policy.history, hidden_states.shape[1])
        last = slice(hidden_states.shape[1] - rows, None)
        queries = get_prerope_query_states(module, hidden_states[:, last])
        cos, sin = (x[:, last] for x in angles)
        rotated, _ = apply_rotary_pos_emb(queries, queries, cos, sin)
        return rotated
