"""Caches whose keys and values lie in host memory, for decoders whose policies select pages.

While a prompt is read, a layer's keys lie in a pool on the device that all layers share, one after
the other, and go to the host from there. A step reads the pages that were brought for it
(`graphopt.runtime.kv_offload`).

Layout letters: B batch, G key heads, N pages of a row, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.kv_policies import KVHeads, policy_from_dict
from graphopt.ir.kv_policies.base import KVPolicy
from graphopt.ir.kv_policies.pages import Filled
from graphopt.ir.kv_policies.probabilities import Scoring
from graphopt.runtime.attention import Keys
from graphopt.runtime.copies import Copies
from graphopt.runtime.kv_cache import PagedKVCache, in_order
from graphopt.runtime.kv_offload import OffloadedKV
from graphopt.runtime.policy_cache import PolicyKVCache, StepCount


@dataclass
class Offload:
    """What all offloaded layers of a decoder share.

    Attributes:
        kv: Their keys and values in host memory.
        layers: Numbers of these layers among all of the model.
        periods: Of each the steps from one that reads all keys to the next; None for never.
        held: Tokens of the longest text before what is being read.
        waiting: Layers that read all keys in this step and have not been reached.
    """

    kv: OffloadedKV
    layers: Sequence[int]
    periods: Sequence[int | None]
    held: int = 0
    waiting: list[int] = field(default_factory=list)

    def begin_step(self, steps: int) -> None:
        """Begin to bring what the first layers need that read all keys in a step.

        Args:
            steps: Steps of one token before it.
        """
        self.waiting = [
            number
            for number, (layer, every) in enumerate(zip(self.layers, self.periods, strict=True))
            if every is not None and (steps + 1 + layer) % every == 0
        ]
        for number in self.waiting[:2]:
            self.kv.stage(number)

    def read_all(self, number: int) -> None:
        """Note that a layer has read all its keys; its buffer takes those of another."""
        self.waiting.remove(number)
        if len(self.waiting) > 1:
            self.kv.stage(self.waiting[1])


@dataclass(frozen=True)
class OffloadedPolicyCache(PolicyKVCache):
    """A `PolicyKVCache` whose keys and values lie in host memory.

    Attributes:
        kv: The pool that layers share while a prompt is read.
        offload: What layers share besides.
        number: Of the layer among those that are offloaded.
    """

    offload: Offload = field(kw_only=True)
    number: int = field(kw_only=True)

    def recall(self) -> None:
        """Bring the keys and values of the text so far into the pool."""
        kv, pool = self.offload.kv, self.kv
        assert isinstance(pool, PagedKVCache)
        used = -(-self.offload.held // kv.page)
        for host, there in zip(kv.host_of(self.number), (pool.k, pool.v), strict=True):
            table = pool.block_table.long()
            for row in range(kv.rows):
                text, head = divmod(row, kv.heads.key_heads)
                there[table[text, :used], head] = host[row, :used].to(there.device)

    def store(self, keys: Keys) -> None:
        """Put what the pool holds into host memory."""
        self.offload.kv.fill(self.number, *in_order(keys))

    def filled(self) -> Filled:
        """Return where the real keys of each row lie, with those of the step."""
        real = self.kv.seq_lens.expand(len(self.new_lens)) + self.new_lens
        slots = self.offload.kv.pages * self.offload.kv.page
        return Filled(torch.zeros_like(real).long(), real.long() - 1, slots)

    def fetch_next(self, policy: KVPolicy, scoring: Scoring) -> None:
        """Begin to bring what the first step behind a prompt reads, where that is known."""
        if not policy.needs_query:
            here = self.filled()
            after = Filled(here.first_B, here.last_B + 1, here.slots)
            selected = policy.select(self.state, None, None, after, scoring)
            self.offload.kv.prefetch(self.number, selected)


def refuse_offload(device: torch.device) -> None:
    """Refuse keys in host memory where no GPU reads them.

    Raises:
        ValueError: The device is none.
    """
    if device.type != "cuda":
        raise ValueError(
            "keys in host memory are for a GPU, which reads pinned memory, and the model is on the "
            f"{device.type}: leave offload out"
        )


def offloaded_caches(
    caches: Sequence[Any],
    policies: Sequence[dict[str, Any] | None],
    pool: PagedKVCache,
    count: StepCount,
    new_lens: Tensor,
    capacity: int,
    copies: Copies | None = None,
) -> tuple[list[Any], Offload]:
    """Return caches of which those of layers with a policy lie in host memory.

    Args:
        caches: Of all layers; those of layers with a policy are not read.
        policies: For each layer the policy as `policy_to_dict` gives it; None for none.
        pool: A cache of one layer with a policy.
        count, new_lens: As for `PolicyKVCache`.
        capacity: Tokens that a text has room for.
        copies: What runs copies; see `OffloadedKV`.

    Raises:
        ValueError: No layer has a policy, or they differ in pages or budgets.
        GraphoptError: The host has too little memory, with how much is needed.
    """
    chosen = [layer for layer, policy in enumerate(policies) if policy is not None]
    made = [policy_from_dict(policy) for policy in policies if policy is not None]
    if len({policy.budget for policy in made}) != 1:
        raise ValueError(
            "keys in host memory are for layers whose policies have one budget: "
            f"there are {len({policy.budget for policy in made})}"
        )
    budget, rows = made[0].budget, len(new_lens)
    key_heads, k_dim, v_dim = pool.k.shape[1], pool.k.shape[3], pool.v.shape[3]
    kv = OffloadedKV(
        len(chosen), rows, KVHeads(key_heads, key_heads, k_dim, v_dim, pool.k.dtype), capacity,
        page=budget.page, read=budget.pages, device=pool.k.device, copies=copies,
    )  # fmt: skip
    offload = Offload(kv, chosen, [policy.calibrate_every for policy in made])
    result = [*caches]
    for number, layer in enumerate(chosen):
        result[layer] = OffloadedPolicyCache(pool, count, new_lens, offload=offload, number=number)
    return result, offload
