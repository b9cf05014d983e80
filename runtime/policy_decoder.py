"""Greedy decoding in caches of fixed room, of which policies select what a step reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.runtime.decoder import Decoder
from graphopt.runtime.policy_cache import (
    PolicyKVCache,
    StepCount,
    calibration_period,
    with_policies,
)


class PolicyDecoder(Decoder):
    """A `Decoder` of a model whose `kv_policies` say what selects pages in each layer.

    Layers take turns in reading all keys, so that a graph is recorded for each step of a period.

    Attributes:
        count: The steps since the prompt.
        period: After how many steps the layers' turns repeat.
    """

    def __init__(self, model: Any, capacity: int, batch: int = 1) -> None:
        super().__init__(model, capacity, batch)
        self.count = StepCount()
        self.cache = with_policies(self.cache, model.kv_policies, self.count, self.new_lens)
        self.period = calibration_period(model.kv_policies)

    def _read(self, texts: list[list[int]]) -> None:
        # All keys are read, and what policies remember is made anew.
        self.count.steps = None
        super()._read(texts)
        self.count.steps = 0

    def step(self, given: int | list[int] | None = None) -> int | list[int]:
        token = super().step(given)
        assert self.count.steps is not None
        self.count.steps += 1
        return token

    def _turn(self) -> int:
        assert self.count.steps is not None
        return self.count.steps % self.period

    def _moved(self) -> list[Tensor]:
        caches = [cache for cache in self.cache if isinstance(cache, PolicyKVCache)]
        return [*super()._moved(), *(x for cache in caches for x in cache.state.values())]
