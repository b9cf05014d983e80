"""Greedy decoding in caches of fixed room, of which policies select what a step reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from graphopt.runtime.decoder import Decoder
from graphopt.runtime.kv_cache import PagedKVCache, fixed_caches
from graphopt.runtime.offloaded_cache import Offload, offloaded_caches, refuse_offload
from graphopt.runtime.policy_cache import (
    PolicyKVCache,
    StepCount,
    calibration_period,
    with_policies,
)


class PolicyDecoder(Decoder):
    """A `Decoder` of a model whose `kv_policies` say what selects pages in each layer.

    Layers take turns in reading all keys, so that a graph is recorded for each step of a period.

    Args:
        offload: Keep keys and values of layers with a policy in host memory, of which the device
            has the pages that a step reads.

    Attributes:
        count: The steps since the prompt.
        period: After how many steps the layers' turns repeat.
        offload: What offloaded layers share; None where all lies on the device.

    Raises:
        ValueError: As for `Decoder`; or keys are to lie in host memory, and the model is on no GPU,
            or its policies have several budgets.
        GraphoptError: The host has too little memory, with how much is needed.
    """

    def __init__(self, model: Any, capacity: int, batch: int = 1, *, offload: bool = False) -> None:
        self.count = StepCount()
        self.offload: Offload | None = None
        self._offloads = offload
        super().__init__(model, capacity, batch)
        self.period = calibration_period(model.kv_policies)

    def _caches(self, empty: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        policies = self.model.kv_policies
        if not self._offloads:
            return with_policies(super()._caches(empty), policies, self.count, self.new_lens)
        refuse_offload(self.token.device)
        caches: list[Any] = []
        pool: PagedKVCache | None = None
        layers = zip(empty, self.model.kv_layouts, policies, strict=True)
        for number, (kv, layout, policy) in enumerate(layers):
            bits = self.model.kv_bits[number : number + 1]
            if policy is None or pool is None:
                (made,) = fixed_caches(
                    [kv], [layout], self.capacity, self.seq_lens, self.new_lens, bits
                )
                if policy is not None:
                    if not isinstance(made, PagedKVCache):
                        raise ValueError(
                            "keys in host memory lie in the pages of their policy, and this "
                            f"model's are {layout[0]}: compile it for a target that reads pages"
                        )
                    pool = made
            caches.append(None if policy is not None else made)
        assert pool is not None  # a decoder of this kind has a layer with a policy
        caches, self.offload = offloaded_caches(
            caches, policies, pool, self.count, self.new_lens, self.capacity
        )
        return caches

    def _read(self, texts: list[list[int]]) -> None:
        # All keys are read, and what policies remember is made anew.
        self.count.steps = None
        if self.offload is not None:
            self.offload.held = self.used
        super()._read(texts)
        if self.offload is not None:
            self.offload.kv.settle()
        self.count.steps = 0

    def launch(self, given: int | list[int] | Tensor | None = None) -> None:
        super().launch(given)
        assert self.count.steps is not None
        self.count.steps += 1

    def _advance(self) -> None:
        if self.offload is not None:
            assert self.count.steps is not None
            self.offload.begin_step(self.count.steps)
        super()._advance()
        if self.offload is not None:
            # A recorded step has no copy on its way when it ends.
            self.offload.kv.settle()

    def _turn(self) -> int:
        assert self.count.steps is not None
        return self.count.steps % self.period

    def _moved(self) -> list[Tensor]:
        caches = [cache for cache in self.cache if isinstance(cache, PolicyKVCache)]
        states = [x for cache in caches for x in cache.state.values()]
        return [*super()._moved(), *states, *(self.offload.kv.moved() if self.offload else [])]
