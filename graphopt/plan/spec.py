"""The one description of an attention that goes to every target."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.errors import UsageError

HEAD_SIZES = (32, 256)
"""Smallest and largest head size that is lowered."""


@dataclass(frozen=True)
class AttentionSpec:
    """softmax(cap(q k^T scale) + alibi + bias, over the keys seen) v, and how its data lie.

    Attributes:
        head_dim: Size of a query or key head, D.
        value_dim: Size of a value head, Dv; None for D.
        heads: Query heads, H.
        kv_heads: Key and value heads, G; H is a multiple of it.
        dtype: The dtype of queries, keys and values, as an IR name: `f16` or `bf16`.
        phase: `prefill` (many query tokens) or `decode` (few, keys split over many programs).
        causal: A query sees the keys up to its own place alone.
        align: Which corner the causal diagonal starts from where S and T differ: with
            `bottom-right` query i stands at key T - S + i, with `top-left` at key i.
        window: Keys a query sees, its own included; None for all.
        chunk: A query sees the keys of its own chunk of that length; None for all.
        softcap: Scores become cap tanh(score / cap); None for none.
        sinks: One more logit a head takes part in the softmax and carries no value.
        alibi: A slope a head times the key's position is added.
        padding_mask: A mask [B, T] of real keys.
        bias: An additive mask, broadcastable to [B, H, S, T].
        varlen: Sequences of unequal length lie one behind the other, B = 1.
        kv_lens: Rows of the cache hold fewer keys than it has room for.
        kv: Where keys and values lie: `contiguous`, `ring` or `paged`.
        slots: Tokens that a ring holds; None where the launch says it.
        page: Tokens of a page.
        selected_blocks: Only the pages of a list are read.
        kv_bits: Bits of a stored key or value element.
        lse: The log-sum-exp of every row is a second output.
        page_max: The largest score of every page read is a further output.

    Raises:
        UsageError: Two of these contradict each other.
    """

    head_dim: int
    heads: int
    kv_heads: int
    value_dim: int | None = None
    dtype: str = "f16"
    phase: Literal["prefill", "decode"] = "prefill"
    causal: bool = True
    align: Literal["bottom-right", "top-left"] = "bottom-right"
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    padding_mask: bool = False
    bias: bool = False
    varlen: bool = False
    kv_lens: bool = False
    kv: Literal["contiguous", "ring", "paged"] = "contiguous"
    slots: int | None = None
    page: int | None = None
    selected_blocks: bool = False
    kv_bits: int = 16
    lse: bool = False
    page_max: bool = False

    def __post_init__(self) -> None:
        for name in (
            "head_dim",
            "heads",
            "kv_heads",
            "value_dim",
            "window",
            "chunk",
            "slots",
            "page",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                self._refuse(f"{name} is {value}", "Give a number from 1 up.")
        if self.heads % self.kv_heads:
            self._refuse(
                f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly",
                "The first must be a multiple of the second.",
            )
        if self.softcap is not None and self.softcap <= 0:
            self._refuse(f"softcap is {self.softcap}", "Give a positive number.")
        if self.dtype not in ("f16", "bf16", "f32"):
            self._refuse(f"dtype is {self.dtype!r}", "Give f16, bf16 or f32.")
        if self.kv_bits not in (4, 8, 16):
            self._refuse(f"kv_bits is {self.kv_bits}", "Give 4, 8 or 16.")
        if (self.kv == "paged") != (self.page is not None):
            self._refuse("a paged cache and a page size come together", "Give both or neither.")
        if self.slots is not None and self.kv != "ring":
            self._refuse(f"a {self.kv} cache of {self.slots} slots", "Give kv=ring, or no slots.")
        if (self.selected_blocks or self.page_max) and self.kv != "paged":
            self._refuse("selected pages and page maxima are of a paged cache", "Give kv=paged.")
        if self.varlen and (self.kv_lens or self.kv != "contiguous" or self.phase == "decode"):
            self._refuse(
                "sequences one behind the other have no cache of their own",
                "Leave out varlen, or kv_lens, the ring, the pages and decode.",
            )
        if self.varlen and (self.padding_mask or self.bias or self.alibi):
            self._refuse(
                "masks, biases and ALiBi are by row of a batch, which varlen has not",
                "Leave out one of them.",
            )

    @staticmethod
    def _refuse(what: str, remedy: str) -> None:
        raise UsageError(f"This attention makes no sense: {what}.", remedy)

    @property
    def values(self) -> int:
        """The size of a value head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def replace(self, **changes: Any) -> AttentionSpec:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def describe(self) -> str:
        """Return the description as one line: what is not at its default, after the sizes."""
        size = f"D={self.head_dim}" if self.values == self.head_dim else (
            f"D={self.head_dim} Dv={self.values}"
        )  # fmt: skip
        words = [self.phase, size, f"heads={self.heads}", f"kv_heads={self.kv_heads}", self.dtype]
        words.append(f"causal ({self.align})" if self.causal else "full")
        skip = {"head_dim", "value_dim", "heads", "kv_heads", "dtype", "phase", "causal", "align"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in skip and value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return " ".join(words)
