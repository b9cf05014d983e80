"""Greedy decoding in caches of fixed room, for the models that are emitted for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.runtime.kv_cache import RingKVCache, StaticKVCache, fixed_caches
from graphopt.support.recorded import record

LEAST_ROOM = 128
"""Tokens of room that a step reads at least, where it is told how many: each is a recording."""


class Decoder:
    """Greedy decoding, in a cache with room for a whole text, or for several at once.

    On a GPU a step is recorded as a CUDA graph once and replayed: nothing is launched one by one.

    Args:
        model: A model with `empty_cache(batch)`, `kv_layouts` and `kv_bits`, called with ids, mask,
            positions and caches.
        capacity: Tokens of a prompt and of its answer together.
        batch: How many texts. Their lengths may differ.
        arena: An `Arena`, where steps write their results; by default memory is allocated for each.

    Attributes:
        positions: How many positions the model has; None for any number.
        records: Whether a step is the same kernels each time, so that a graph can hold it.
        last_alone: Whether the model can be asked for the logits of one token of each text alone.
        sees: Whether the model takes embeddings of pictures in the place of ids.
        reads_room: Whether attention reads all the room that it is given, filled or not, as
            PyTorch's does. It is given what the longest text needs, rounded up.
        logits: [batch, vocab], those of the next token of every text.

    Raises:
        ValueError: Such a cache holds nothing, or is longer than what the model has positions for.
    """

    positions: ClassVar[int | None] = None
    records: ClassVar[bool] = True
    last_alone: ClassVar[bool] = False
    sees: ClassVar[bool] = False
    reads_room: ClassVar[bool] = False

    def __init__(self, model: Any, capacity: int, batch: int = 1, arena: Any = None) -> None:
        if batch < 1 or capacity < 2:
            raise ValueError(
                f"a cache of {capacity} tokens for {batch} texts: there must be room for at least "
                "one text, and for 2 tokens"
            )
        if self.positions is not None and capacity > self.positions:
            raise ValueError(
                f"a cache of {capacity} tokens: the model has {self.positions} positions"
            )
        self.model, self.capacity, self.batch, self.arena = model, capacity, batch, arena
        self.held = [0] * batch  # tokens of each text, known here without asking the device
        self.several = False
        device = next(model.parameters()).device
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.new_lens = torch.ones_like(self.seq_lens)  # real tokens of a step
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        # Behind pictures, positions may be others than the number of tokens before.
        self.shift = torch.zeros_like(self.token)
        self.seen: dict[str, Tensor] = {}
        self.logits: Tensor | None = None
        # A paged cache unpacks to keys and values as well.
        empty = [(k, v) for k, v in model.empty_cache()]
        self.cache: list[Any] = self._caches(empty)
        # An arena is planned for steps that are all of one size.
        self.narrows = (
            self.reads_room
            and arena is None
            and all(isinstance(cache, RingKVCache | StaticKVCache) for cache in self.cache)
        )
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.buffer: Tensor | None = None  # the arena's, where the graphs write
        self.prompts: dict[int, Tensor] = {}  # by length, for the next prompts of that length

    def _caches(self, empty: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        """Return the caches of all layers.

        Args:
            empty: For each layer [B, G, 0, D] and [B, G, 0, Dv].
        """
        layouts, bits = self.model.kv_layouts, self.model.kv_bits
        return [*fixed_caches(empty, layouts, self.capacity, self.seq_lens, self.new_lens, bits)]

    @property
    def used(self) -> int:
        """Tokens of the longest text."""
        return max(self.held)

    @torch.no_grad()
    def start(self, ids: list[int] | list[list[int]]) -> int | list[int]:
        """Read the prompt and return the first token of the answer; of several, a list of each.

        Raises:
            ValueError: A prompt is empty or leaves no room, or there are not `batch` of them.
        """
        texts = self._texts(ids)
        self.shift.zero_()
        return self._start(texts)

    @torch.no_grad()
    def look(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        pictures: Tensor | None = None,
    ) -> int | list[int]:
        """Read prompts of embeddings and return the first token of each answer.

        Args:
            inputs_embeds: [batch, S, D].
            attention_mask: int64 [batch, S], 0 at padding, which stands in front.
            position_ids: int64 [batch, S] or [3, batch, S]; by default tokens are counted.
            pictures: int64 [batch, S], the picture that a token belongs to, negative for none.

        Raises:
            ValueError: As for `start`; or the model takes token ids alone.
        """
        if not self.sees:
            raise ValueError("this model takes token ids alone")
        device, (batch, longest) = self.token.device, attention_mask.shape
        place = torch.arange(longest, device=device)
        lengths = attention_mask.sum(-1, keepdim=True)
        # Padding moves behind the texts, where no token sees it.
        row, moved = torch.arange(batch, device=device)[:, None], (place - lengths) % longest
        real = place < lengths
        self.seen = {
            "inputs_embeds": inputs_embeds[row, moved],
            "position_ids": (
                place * real if position_ids is None else position_ids[..., row, moved]
            ),
        }
        if pictures is not None:
            self.seen["pictures"] = torch.where(real, pictures[row, moved], -1)
        newest = self.seen["position_ids"].masked_fill(~real, -1).amax(-1)
        newest = newest.amax(0) if newest.dim() == 2 else newest
        texts = self._texts([[0] * int(count) for count in lengths[:, 0].tolist()])
        self.shift.copy_(newest[:, None] + 1 - lengths)
        try:
            return self._start(texts)
        finally:
            self.seen = {}

    def _start(self, texts: list[list[int]]) -> int | list[int]:
        for text in texts:
            if not 0 < len(text) < self.capacity:
                raise ValueError(f"a prompt of {len(text)} tokens in a cache of {self.capacity}")
        self.held = [0] * self.batch
        self.seq_lens.zero_()
        self._read(texts)
        return self._answer()

    @torch.no_grad()
    def extend(self, ids: list[int] | list[list[int]]) -> int | list[int]:
        """Read further tokens of the texts at once, and return the token behind them.

        Raises:
            ValueError: Nothing was read before, a text gets no token, they leave no room, or there
                are not `batch` of them.
        """
        texts = self._texts(ids)
        if not self.used:
            raise ValueError("the cache is empty: start with a prompt")
        if not all(texts):
            raise ValueError("a text that gets no token: give every text at least one")
        needed = self.used + max(map(len, texts))
        if needed > self.capacity:
            raise ValueError(f"{needed} tokens in a cache of {self.capacity}")
        if max(map(len, texts)) == 1:
            return self.step([text[0] for text in texts])
        self._read(texts)
        return self._answer()

    def _texts(self, ids: list[int] | list[list[int]]) -> list[list[int]]:
        self.several = len(ids) > 0 and isinstance(ids[0], list)
        texts: list[Any] = [*ids] if self.several else [ids]
        if len(texts) != self.batch:
            raise ValueError(f"{len(texts)} prompts in a cache for {self.batch}")
        return texts

    def _read(self, texts: list[list[int]]) -> None:
        """Read tokens behind those that there are, and take what is likeliest behind them."""
        device, longest = self.token.device, max(map(len, texts))
        # Padded behind: no token sees a later one, and a row's next tokens overwrite the padding,
        # which a ring does not keep.
        padded = [text + [0] * (longest - len(text)) for text in texts]
        if longest not in self.prompts:
            self.prompts[longest] = torch.zeros_like(self.token).repeat(1, longest)
        prompt = self.prompts[longest]
        prompt.copy_(torch.tensor(padded))
        self.new_lens.copy_(torch.tensor([len(text) for text in texts]))
        seen = {
            name: value.narrow(1 if name == "inputs_embeds" else -1, self.used, longest)
            for name, value in self.seen.items()
        }
        given = seen.pop("position_ids", None)
        ids = prompt if given is None else None
        cache = self._with_room(self.used + longest)

        def read(tokens: int) -> tuple[Tensor, Tensor]:
            positions = self._places(torch.arange(longest, device=device))
            positions = positions if given is None else given
            newest = self.new_lens.long() - 1
            if self.last_alone:
                last = self.model(ids, None, positions, cache, newest, **seen)[0][:, 0]
            else:
                logits, _ = self.model(ids, None, positions, cache, **seen)
                last = logits[torch.arange(self.batch, device=device), newest]
            return last, last.argmax(-1, keepdim=True)

        if self.used and any(kind == "ring" for kind, _ in self.model.kv_layouts):
            # It reads the slots that it then writes, and an arena may run a step twice.
            self._take(*read(0))
        else:
            self._take(*self._run(("prefill", f"{self.batch} x {longest}", "tokens"), read))
        self.seq_lens += self.new_lens
        self.new_lens.fill_(1)
        self.held = [count + len(text) for count, text in zip(self.held, texts, strict=True)]

    @torch.no_grad()
    def step(self, given: int | list[int] | None = None) -> int | list[int]:
        """Return the token after the one before.

        Args:
            given: What was chosen as the token before, in place of the likeliest.

        Raises:
            ValueError: The cache is full.
        """
        self.launch(given)
        token = self._answer()
        self._check()
        return token

    @torch.no_grad()
    def steps(self, count: int) -> Iterator[int | list[int]]:
        """Yield the `count` tokens after the one before, each the likeliest.

        Where a step is a CUDA graph, the next one runs while the host reads a token. So whoever
        stops before the last token leaves the decoder one token further than what was yielded.

        Raises:
            ValueError: The cache has no room for them, or nothing was read before.
        """
        if self.used + count > self.capacity:
            raise ValueError(
                f"{count} tokens behind {self.used} in a cache of {self.capacity}: there is no room"
            )
        if not self._records():
            for _ in range(count):
                yield self.step()
            return
        # The host reads one while a step writes the other.
        read = [torch.empty(self.token.shape, dtype=torch.long, pin_memory=True) for _ in range(2)]
        arrived = [torch.cuda.Event() for _ in range(2)]
        for number in range(count + 1):
            if number < count:
                self.launch()
                read[number % 2].copy_(self.token, non_blocking=True)
                arrived[number % 2].record(torch.cuda.current_stream(self.token.device))
            if number:
                arrived[(number - 1) % 2].synchronize()
                self._check()
                yield self._told(read[(number - 1) % 2])

    @torch.no_grad()
    def launch(self, given: int | list[int] | Tensor | None = None) -> None:
        """Begin the next step, as `step` does, and wait for nothing: its `logits` follow.

        What the host does of a step may fail, which the next `step` says.

        Args:
            given: As for `step`; tokens that lie on the device too, int64 [batch, 1].

        Raises:
            ValueError: The cache is full.
        """
        if not 0 < self.used < self.capacity:
            state = "full" if self.used else "empty: start with a prompt"
            raise ValueError(f"the cache of {self.capacity} tokens is {state}")
        self.held = [count + 1 for count in self.held]
        if given is not None:
            self.token.copy_(torch.as_tensor(given).view(self.batch, 1))
        if not self._records():
            self._advance()
            return
        if self.arena is not None and self.arena.buffer is not self.buffer:
            # A longer prompt made it grow: what was recorded writes to the one before.
            self.graphs.clear()
        turn = self._turn()
        if turn not in self.graphs:
            self.graphs[turn] = self._record()
            self.buffer = None if self.arena is None else self.arena.buffer
        self.graphs[turn].replay()

    def _check(self) -> None:
        """Refuse a token of a step that failed in what the host does of it."""

    def _records(self) -> bool:
        """Return whether a step is a CUDA graph."""
        return self.token.device.type == "cuda" and self.records

    def _turn(self) -> int:
        """Return the number of the recording that the next step is."""
        return self._room(self.used)

    def _room(self, tokens: int) -> int:
        """Return how much room of the cache is given to a step behind which texts have `tokens`.

        That is a power of two or one and a half of one, so that there are few recordings.
        """
        if not self.narrows:
            return self.capacity
        power = 1 << (tokens - 1).bit_length()
        room = power if tokens > power * 3 // 4 else power * 3 // 4
        return min(max(room, LEAST_ROOM), self.capacity)

    def _with_room(self, tokens: int) -> list[Any]:
        """Return the caches for such a step."""
        room = self._room(tokens)
        if room == self.capacity:
            return self.cache
        return [
            cache.narrowed(room) if isinstance(cache, StaticKVCache) else cache
            for cache in self.cache
        ]

    def _moved(self) -> list[Tensor]:
        """Return what a step writes, but for keys and values behind those that there are."""
        return [self.token, self.seq_lens]

    def _answer(self) -> int | list[int]:
        return self._told(self.token)

    def _told(self, token: Tensor) -> int | list[int]:
        return token[:, 0].tolist() if self.several else int(token)

    def _run(
        self, key: tuple[Any, ...], step: Callable[[int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Run a step, which changes nothing but keys and values, in the arena if there is one."""
        return step(0) if self.arena is None else self.arena.run(key, step)

    def _take(self, logits: Tensor, token: Tensor) -> None:
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.token.copy_(token)

    def _places(self, behind: Tensor | None = None) -> Tensor:
        """Return the positions [batch, S] of the next token, or of those so far behind it [S]."""
        places = self.seq_lens.long()[:, None]
        if behind is not None:
            places = places + behind
        return places + self.shift if self.sees else places

    def _decode(self, tokens: int) -> tuple[Tensor, Tensor]:
        cache = self._with_room(self.used)
        logits, _ = self.model(self.token, None, self._places(), cache)
        last = logits[:, -1]
        return last, last.argmax(-1, keepdim=True)

    def _advance(self) -> None:
        self._take(*self._run(("decode", f"{self.batch} x 1", "token"), self._decode))
        self.seq_lens += 1

    def _record(self) -> torch.cuda.CUDAGraph:
        if self.token.is_cuda:
            # What the host's part of a step reads is changed: none may be on its way.
            torch.cuda.synchronize(self.token.device)
        moved = self._moved()
        before = [x.clone() for x in moved]
        # One runs after the other, and what a step gives is copied out of their memory.
        pool = next((graph.pool() for graph in self.graphs.values()), None)
        graph, _ = record(self._advance, self.token.device, pool=pool)
        for now, value in zip(moved, before, strict=True):
            now.copy_(value)
        return graph
