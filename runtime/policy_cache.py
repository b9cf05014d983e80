"""KV caches of fixed room whose pages a policy selects among.

What a policy remembers lies in memory of fixed room too, written in place, so that a step is the
same kernels each time. Whether a step reads all keys is known on the host, which counts.

Layout letters: B batch, S new tokens, T room, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.kv_policies import policy_from_dict
from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled
from graphopt.ir.kv_policies.probabilities import Scoring
from graphopt.runtime.attention import Keys
from graphopt.runtime.kv_cache import FixedKVCache, in_order


@dataclass
class StepCount:
    """Where a decoder is, as the host knows it: the same for all layers.

    Attributes:
        steps: Steps of one token since the prompt; None while a prompt is read.
    """

    steps: int | None = None


@dataclass(frozen=True)
class PolicyKVCache:
    """Keys and values of one layer in memory of fixed room, and what a policy remembers of them.

    Attributes:
        kv: Keys and values.
        count: Shared by all layers.
        new_lens: int32 [B]: how many of a step's tokens are real; the others are padding behind.
        state: What the policy remembers; empty before the first prompt.
    """

    kv: FixedKVCache
    count: StepCount
    new_lens: Tensor
    state: State = field(default_factory=dict)

    def lengths(self, keys: Keys) -> Filled:
        """Return where the real keys of each row lie, with those of the step."""
        real = self.kv.seq_lens.expand(len(self.new_lens)) + self.new_lens
        return Filled(torch.zeros_like(real).long(), real.long() - 1, keys.capacity())

    def is_dense(self, policy: KVPolicy, layer: int) -> bool:
        """Return whether a step of one token is due for calibration."""
        every = policy.calibrate_every
        assert self.count.steps is not None
        return every is not None and (self.count.steps + 1 + layer) % every == 0

    def begin(self, policy: KVPolicy, q: Tensor, keys: Keys, scoring: Scoring) -> None:
        """Make the state anew behind a prompt.

        Args:
            q: [B, H, S, D], padded behind as the prompt is.
        """
        lengths = self.lengths(keys)
        k, v = in_order(keys)
        slot = torch.arange(k.shape[2], device=q.device)
        mask = (slot <= lengths.last_B[:, None]).long()
        counts = self.new_lens.tolist()
        if len(set(counts)) == 1 or not bool(self.kv.seq_lens.any()):
            # The last real queries of each row; what would lie in front of the first sees nothing.
            rows = min(policy.history, q.shape[2])
            index = self.new_lens.long()[:, None] + torch.arange(-rows, 0, device=q.device)
            index = index.clamp(min=0)[:, None, :, None]
            last = q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))
            self.keep(policy.init(last, k, v, mask, scoring))
            return
        # In front of a row's new tokens stand others here, of whose queries nobody knows any more.
        begun = []
        for row, count in enumerate(counts):
            own = slice(row, row + 1)
            last = q[own, :, max(count - policy.history, 0) : count]
            begun.append(policy.init(last, k[own], v[own], mask[own], scoring))
        self.keep({name: torch.cat([state[name] for state in begun]) for name in begun[0]})

    def keep(self, state: State) -> None:
        """Put a state where the one before lies."""
        for name, value in state.items():
            held = self.state.get(name)
            if held is None:
                self.state[name] = value.contiguous()
            elif held is not value:
                held.copy_(value)


def with_policies(
    caches: Sequence[FixedKVCache],
    policies: Sequence[dict[str, Any] | None],
    count: StepCount,
    new_lens: Tensor,
) -> list[Any]:
    """Return caches, those of layers with a policy with room for what it remembers.

    Args:
        policies: For each layer the policy as `policy_to_dict` gives it; None for none.
    """
    return [
        cache if policy is None else PolicyKVCache(cache, count, new_lens)
        for cache, policy in zip(caches, policies, strict=True)
    ]


def calibration_period(policies: Sequence[dict[str, Any] | None]) -> int:
    """Return after how many steps the layers' turns in reading all keys repeat."""
    made = [policy_from_dict(policy) for policy in policies if policy is not None]
    return math.lcm(*(policy.calibrate_every or 1 for policy in made))
