"""Attention whose output is computed when it is asked for: whole, or some of its rows.

A linear behind it that is summed over ranks asks for rows, and sends what it makes of them while
attention of the next ones runs.

Layout letters: B texts, S new tokens of each, T keys, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.dispatch import AttentionDispatcher, Results
from graphopt.runtime.kv_cache import FixedKVCache, KVCache, tokens_held
from graphopt.runtime.reduction_plan import CausalAttention

Attend = Callable[[Tensor, Keys, Extras, Mapping[str, Any]], Results]


@dataclass(frozen=True)
class AttentionRows:
    """An attention that was not computed yet. Row b S + s is new token s of text b.

    Attributes:
        attend: Computes an attention of (q, keys, extras, options).
        q: [B, H, S, D].
        keys: The S newest of every text are those of the queries.
        extras, options: As `attend` takes them.
        past: Keys in front of a text's new tokens, as far as the host knows.
    """

    attend: Attend
    q: Tensor
    keys: Keys
    extras: Extras
    options: Mapping[str, Any]
    past: int = 0

    @property
    def described(self) -> CausalAttention | None:
        """What is planned by; None where it is computed as a whole.

        Rows of a causal attention see the keys up to the last of them. A padding mask says that
        texts are of unequal lengths; a bias has columns for all keys.
        """
        if not self.options.get("causal", True) or self.extras.mask is not None:
            return None
        if self.extras.bias is not None:
            return None
        most_keys = self.options.get("window") or self.options.get("chunk")
        texts, heads, tokens, _ = self.q.shape
        return CausalAttention(tokens, heads, texts, self.past, most_keys)

    def whole(self) -> Tensor:
        """Return the output of all rows, a token's heads side by side: [B, S, H Dv]."""
        return functional.merge_heads(self.attend(self.q, self.keys, self.extras, self.options)[0])

    def rows(self, rows: slice) -> Tensor:
        """Return what `whole` has in some rows, [n, H Dv]; those behind the last one are 0.

        A kernel reads the keys of a row in the same tiles for some rows as for all.
        """
        count = self.q.shape[0] * self.q.shape[2]
        parts = [self._part(*piece) for piece in self._pieces(rows.start, min(rows.stop, count))]
        if rows.stop > count:
            like = parts[0] if parts else self.whole()[0]
            parts.append(like.new_zeros(rows.stop - max(rows.start, count), like.shape[-1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows as texts and tokens of each: as many whole texts as there are at once."""
        tokens = self.q.shape[2]
        while start < stop:
            text, first = divmod(start, tokens)
            whole = 0 if first else (stop - start) // tokens
            last = tokens if whole else min(tokens, first + stop - start)
            texts = max(1, whole)
            yield slice(text, text + texts), slice(first, last)
            start += texts * (last - first)

    def _part(self, texts: slice, tokens: slice) -> Tensor:
        keys = _of(self.keys, texts, self.q.shape[2] - tokens.stop)
        out, *_ = self.attend(self.q[texts, :, tokens], keys, self.extras, self.options)
        return functional.merge_heads(out).flatten(0, 1)


def _of(keys: Keys, texts: slice, later: int) -> Keys:
    """Return the keys of some texts without the last so many of each."""
    if keys.block_table is None:
        keys = replace(keys, k=keys.k[texts], v=keys.v[texts])
    of_texts = {
        name: value[texts]
        for name in ("kv_lens", "ring_start", "block_table")
        if (value := getattr(keys, name)) is not None
    }
    keys = replace(keys, **of_texts)
    if not later:
        return keys
    if keys.kv_lens is not None:
        return replace(keys, kv_lens=keys.kv_lens - later)
    held = keys.k.shape[2] - later
    return replace(keys, k=keys.k[:, :, :held], v=keys.v[:, :, :held])


class RowsDispatcher(AttentionDispatcher):
    """An `AttentionDispatcher` that has attentions whose output is computed when asked for, too."""

    def attention_by_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> AttentionRows:
        """As `attention`."""
        extras = Extras(mask, bias, slopes, None, sinks)
        return AttentionRows(
            self._attend, q.to(v.dtype), Keys(k.to(v.dtype), v), extras, options
        )  # fmt: skip

    def cached_attention_by_rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: KVCache | None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> tuple[AttentionRows, KVCache]:
        """As `cached_attention`; new keys and values are put behind those of the cache now.

        Raises:
            ValueError: As for `cached_attention`.
        """
        q, k = q.to(v.dtype), k.to(v.dtype)
        # Of a cache of fixed room the device alone knows, and a plan is as right without.
        before = 0 if past is None or isinstance(past, FixedKVCache) else tokens_held(past)
        extras = Extras(mask, bias, slopes, None, sinks)
        cache, keys, extras = self._extended(k, v, past, extras, options)
        return AttentionRows(self._attend, q, keys, extras, options, before), cache
