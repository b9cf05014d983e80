"""Attention in which a step of one token reads the pages that a policy selects.

Plain torch, as `graphopt.ir.functional` is, and copied into emitted models.

Layout letters: B batch, S new tokens, T tokens with the new ones, H query heads, G key heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.kv_memory import PolicyKV
from graphopt.ir.kv_policies import KVHeads, policy_from_dict
from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled
from graphopt.ir.kv_policies.probabilities import Scoring, page_probabilities


def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor],
    state: State,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    policy: KVPolicy,
    layer: int = 0,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], State]:
    """Causal `functional.cached_attention`, of which single tokens read selected pages alone.

    Several new tokens, and those that nothing came before, see all keys; the state is made anew
    behind them. One new token sees the pages that the policy selects, or all of them in a step that
    is due for calibration.

    Args:
        q, k, v: Queries [B, H, S, D], keys [B, G, S, D] and values [B, G, S, Dv] of the new tokens.
        past: Keys [B, G, P, D] and values [B, G, P, Dv] of those before.
        state: What the policy remembers of those.
        mask: [B, P + S], nonzero at real tokens.
        sinks: [H], as for `functional.attention`.
        policy: With its weights, where it has some.
        layer: Which layer it is: layers take turns in being calibrated.

    Returns:
        The output [B, H, S, Dv]; keys [B, G, T, D] and values [B, G, T, Dv]; the state after them.
    """
    scoring, page = Scoring(scale, softcap, sinks), policy.budget.page
    if q.shape[2] > 1 or past[0].shape[2] == 0:
        out, (k, v) = functional.cached_attention(
            q, k, v, past, mask, None, None, sinks, scale=scale, softcap=softcap
        )
        last = q[:, :, q.shape[2] - min(policy.history, q.shape[2]) :]
        return out, (k, v), policy.init(last, k, v, mask, scoring)
    new_k = k.to(v.dtype)
    if is_due(policy, state, layer):
        out, (k, v), lse, maxima = functional.attention_results(
            q, k, v, past, mask, None, None, sinks,
            cached=True, lse=True, page_max=page, scale=scale, softcap=softcap,
        )  # fmt: skip
        lengths = filled(k, mask)
        probabilities = page_probabilities(maxima, lse, k.shape[1])[:, :, 0]
        return out, (k, v), policy.calibrate(state, probabilities, new_k, lengths)
    k, v = torch.cat((past[0], new_k), 2), torch.cat((past[1], v), 2)
    lengths = filled(k, mask)
    selected = policy.select(state, q, k, lengths, scoring)
    out, lse, maxima = functional.selected_attention(
        q, k, v, selected, mask, sinks, page=page, scale=scale, softcap=softcap
    )
    probabilities = page_probabilities(maxima, lse, k.shape[1])[:, :, 0]
    return out, (k, v), policy.observe(state, selected, probabilities, new_k, lengths)


def cached_policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: PolicyKV,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, PolicyKV]:
    """`policy_attention` on a cache that has keys, values and the policy's state in one.

    Args:
        past: From `empty_caches` or the step before; it is not changed.
        options: As for `policy_attention`.

    Returns:
        The output [B, H, S, Dv], and the cache with the new tokens in it.
    """
    policy: KVPolicy = options["policy"]
    names = state_names(policy, q, k, v)
    state = dict(zip(names, past.state, strict=False))
    past_k, past_v = past
    out, kv, left = policy_attention(q, k, v, (past_k, past_v), state, mask, sinks, **options)
    return out, PolicyKV(kv, tuple(left[name] for name in names))


def state_names(policy: KVPolicy, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Return the names of what a policy remembers of an attention, in their order."""
    heads = KVHeads(k.shape[1], q.shape[1], k.shape[3], v.shape[3], v.dtype)
    return [*policy.state_types(heads, 0, 0)]


def empty_caches(
    empty: Sequence[tuple[Tensor, Tensor]], policies: Sequence[dict[str, Any] | None]
) -> list[tuple[Tensor, Tensor] | PolicyKV]:
    """Return caches without tokens.

    Args:
        empty: For each layer keys [B, G, 0, D] and values [B, G, 0, Dv].
        policies: For each layer the policy as `policy_to_dict` gives it; None for none.
    """
    return [
        kv if policy is None else PolicyKV(kv, ())
        for kv, policy in zip(empty, policies, strict=True)
    ]


def policy_of(fields: dict[str, Any], weights: dict[str, Tensor] | None = None) -> KVPolicy:
    """Return the policy that `policy_to_dict` gave fields of, with its weights by name."""
    policy = policy_from_dict(fields)
    return policy.with_weights(weights) if weights else policy


def is_due(policy: KVPolicy, state: State, layer: int) -> bool:
    """Return whether the next step of one token is to read all keys."""
    due = policy.due(state, layer)
    return due is not None and bool(due.any())


def filled(k: Tensor, mask: Tensor | None) -> Filled:
    """Return where the keys [B, G, T, D] of each row lie."""
    return Filled.all_of(k) if mask is None else Filled.of_mask(mask)
