"""Attention of emitted models whose steps read the pages that policies select, by kernels.

Layout letters: B batch, S new tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphopt.ir.kv_memory import PagedKV, PolicyKV
from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled
from graphopt.ir.kv_policies.probabilities import Scoring
from graphopt.ir.policy_attention import filled, is_due, state_names
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.dispatch import AttentionDispatcher
from graphopt.runtime.kv_cache import in_order, tokens_held
from graphopt.runtime.kv_offload import offloaded_step
from graphopt.runtime.kv_policy import calibrate, observe, select
from graphopt.runtime.offloaded_cache import OffloadedPolicyCache
from graphopt.runtime.policy_cache import PolicyKVCache


@dataclass(frozen=True)
class _Attention:
    """What an attention reads, when the new keys lie behind the others."""

    q: Tensor
    k_new: Tensor
    keys: Keys
    extras: Extras
    scoring: Scoring

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scoring.scale, "softcap": self.scoring.softcap}


class PolicyDispatcher(AttentionDispatcher):
    """An `AttentionDispatcher` that has `policy_attention` too."""

    def policy_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: PolicyKV | PolicyKVCache,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        policy: KVPolicy,
        layer: int = 0,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, PolicyKV | PolicyKVCache]:
        """As `graphopt.ir.policy_attention.cached_policy_attention`; pages are read where they lie.

        A cache of fixed room is written and returned.

        Raises:
            ValueError: As for `cached_attention`.
        """
        scoring = Scoring(scale, softcap, sinks)
        q, k = q.to(v.dtype), k.to(v.dtype)
        plain = {"scale": scale, "softcap": softcap}
        if isinstance(past, OffloadedPolicyCache):
            return self._offloaded(q, k, v, past, mask, policy, layer, scoring), past
        kv, keys, extras = self._extended(k, v, past.kv, Extras(mask, sinks=sinks), plain)
        read = _Attention(q, k, keys, extras, scoring)
        if isinstance(past, PolicyKVCache):
            if q.shape[2] > 1 or past.count.steps is None:
                out = self._attend(q, keys, extras, plain)[0]
                past.begin(policy, q, keys, scoring)
                return out, past
            due, lengths = past.is_dense(policy, layer), past.lengths(keys)
            out, left = self._step(read, policy, past.state, lengths, None, due, in_place=True)
            past.keep(left)
            return out, past
        assert isinstance(kv, PagedKV | tuple)
        whole_k, whole_v = kv
        names = state_names(policy, q, k, v)
        if q.shape[2] > 1 or tokens_held(past) == 0:
            out = self._attend(q, keys, extras, plain)[0]
            last = q[:, :, q.shape[2] - min(policy.history, q.shape[2]) :]
            left = policy.init(last, whole_k, whole_v, mask, scoring)
        else:
            state = dict(zip(names, past.state, strict=True))
            due, lengths = is_due(policy, state, layer), filled(whole_k, mask)
            out, left = self._step(read, policy, state, lengths, whole_k, due, in_place=False)
        return out, PolicyKV(kv, tuple(left[name] for name in names))

    def _offloaded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: OffloadedPolicyCache,
        mask: Tensor | None,
        policy: KVPolicy,
        layer: int,
        scoring: Scoring,
    ) -> Tensor:
        """Return the output of attention whose keys lie in host memory, and write the new ones.

        Raises:
            ValueError: There is a padding mask; or there are sinks, which are one for each query
                head, where every key head reads pages of its own.
        """
        if mask is not None or scoring.sinks_H is not None:
            what = "a padding mask" if mask is not None else "sinks"
            raise ValueError(f"{what} with keys in host memory: keep them on the device")
        options = {"scale": scoring.scale, "softcap": scoring.softcap}
        if q.shape[2] > 1 or past.count.steps is None:
            past.recall()
            _, keys, extras = self._extended(k, v, past.kv, Extras(), options)
            out = self._attend(q, keys, extras, options)[0]
            past.begin(policy, q, keys, scoring)
            past.store(keys)
            past.fetch_next(policy, scoring)
            return out
        page, due = policy.budget.page, past.is_dense(policy, layer)

        def attend(rows: Tensor, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
            wanted = {**options, "lse": True, "page_max": page, "page": page}
            out, lse, maxima = self._attend(rows, keys, Extras(), wanted)
            assert lse is not None and maxima is not None
            return out, lse, maxima

        out, left = offloaded_step(
            past.offload.kv, past.number, policy, past.state, (q, k, v), past.filled(), scoring,
            attend, calibrating=due,
        )  # fmt: skip
        past.keep(left)
        if due:
            past.offload.read_all(past.number)
        return out

    def _step(
        self,
        read: _Attention,
        policy: KVPolicy,
        state: State,
        lengths: Filled,
        whole_k: Tensor | None,
        due: bool,
        *,
        in_place: bool,
    ) -> tuple[Tensor, State]:
        """Return the output of one token, and the state behind it.

        Args:
            whole_k: All keys [B, G, T, D] in the order of their tokens, where they are at hand.
            due: Whether all keys are read.
            in_place: Whether the state may be overwritten.
        """
        page = policy.budget.page
        options = {**read.options, "lse": True, "page_max": page}
        selected: Tensor | None = None
        if not due:
            if policy.measuring_only and whole_k is None:
                whole_k = in_order(read.keys)[0]
            selected = select(policy, state, read.q, whole_k, lengths, read.scoring)
            options |= {"selected_blocks": selected, "page": page}
        out, lse, maxima = self._attend(read.q, read.keys, read.extras, options)
        assert lse is not None and maxima is not None
        if selected is None:
            left = calibrate(policy, state, maxima, lse, read.k_new, lengths, in_place=in_place)
        else:
            left = observe(
                policy, state, selected, maxima, lse, read.k_new, lengths, in_place=in_place
            )
        return out, left
