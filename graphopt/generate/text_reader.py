"""A text as a model reads it: what is new of it, behind what the KV cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import LanguageModel

SPARE_TOKENS = 4096
"""Room for the later turns of a conversation, in a cache of fixed room."""


class TextReader:
    """Gives the logits of the token behind a text, and reads of each text what is new.

    The KV cache of the text before is taken where the text begins with that one. Otherwise, and
    after a step that was interrupted, the whole text is read.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._read: list[int] = []
        self._cache: Any = None

    def next_logits(self, text: Sequence[int], room: int) -> Tensor:
        """Return fp32 [vocab] for the token behind a text.

        Args:
            text: Token ids, at least one.
            room: How long the text will be at most.
        """
        ids = list(text)
        cache, past = self._cache, len(self._read)
        self._cache = None  # a step uses it up, and may be interrupted
        if cache is None or not self._continued_by(ids):
            cache, past = self.model.start_text(room), 0
        elif not self._has_room(cache, room):
            cache, past = self.model.start_text(self._with_spare(room)), 0
        inputs = complete_inputs({"input_ids": torch.tensor([ids[past:]])}, past)
        logits, self._cache = self.model.step(inputs, cache)
        self._read = ids
        return logits[0, -1]

    def _continued_by(self, ids: list[int]) -> bool:
        """Return whether a text goes on from what was read, and its keys do too."""
        past = len(self._read)
        if not 0 < past < len(ids) or ids[:past] != self._read:
            return False
        switch = self.model.rotary_switch
        # Keys in the cache have the frequencies of short texts where the text becomes a long one.
        return switch is None or not past <= switch < len(ids)

    def _has_room(self, cache: Any, room: int) -> bool:
        capacity = self.model.capacity(cache)
        return capacity is None or room <= capacity

    def _with_spare(self, room: int) -> int:
        """Return room for a text that will go on, as that of a conversation does."""
        wanted, positions = room + SPARE_TOKENS, self.model.positions
        return wanted if positions is None else max(room, min(wanted, positions))
