"""How the keys and values of earlier tokens are kept: a state's layout and what it holds.

A contiguous state holds all P tokens of the past, one behind the other. A ring of n slots holds the
last n; a new token takes the slot of the oldest. A paged state holds all, in pages of a pool that a
table names; `graphopt.ir.kv_memory` is the reference of all three. An attention sees keys in the
order of their tokens, whatever the layout. Positions are no part of a state: they are counted from
the padding mask, which covers all P tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from graphopt.ir.kv_host import HostShare
from graphopt.ir.kv_policies.base import KVHeads, KVPolicy
from graphopt.ir.placement import Placement
from graphopt.ir.types import B, Dim, P, Type, dim

Kind = Literal["contiguous", "ring", "paged"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Where the keys and values of a state lie.

    Attributes:
        kind: `contiguous`, `ring` or `paged`.
        size: Slots of the ring, or tokens of a page; None where it is contiguous.

    Raises:
        ValueError: A size is missing, is below 1, or has no meaning.
    """

    kind: Kind = "contiguous"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("contiguous", "ring", "paged"):
            raise ValueError(f"{self.kind!r} is no layout: contiguous, ring or paged")
        if (self.kind == "contiguous") != (self.size is None):
            raise ValueError(f"a {self.kind} layout of size {self.size}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"a {self.kind} layout of size {self.size}: give 1 or more")

    @property
    def ring(self) -> int | None:
        """How many of the newest tokens are kept; None where all are."""
        return self.size if self.kind == "ring" else None

    @property
    def page(self) -> int | None:
        """Tokens of a page; None where there are no pages."""
        return self.size if self.kind == "paged" else None

    def __str__(self) -> str:
        names = {"contiguous": "", "ring": "slots=", "paged": "page="}
        return self.kind if self.size is None else f"{self.kind}({names[self.kind]}{self.size})"


@dataclass(slots=True)
class KVState:
    """The keys and values of one layer.

    Attributes:
        name: Unique in the program.
        heads: Key and value heads, G; of all devices together, like `query_heads`.
        k_dim, v_dim: Sizes of a key and of a value head.
        dtype: The dtype of keys and values.
        layout: Where they lie.
        placement: On which devices; None on one.
        policy: What selects the pages that a step of one token reads; None where it reads all keys.
        query_heads: Query heads, H, of the attention that a policy selects for; None without one.
        host: How tokens are divided between the device and the host, where it is placed on the
            host (`cpu`); None elsewhere.
    """

    name: str
    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype = torch.float32
    layout: KVLayout = KVLayout()
    placement: Placement | None = None
    policy: KVPolicy | None = None
    query_heads: int | None = None
    host: HostShare | None = None

    @property
    def length(self) -> Dim:
        """How many valid tokens it holds when P came before: the least of P and a ring's slots."""
        ring = self.layout.ring
        return P if ring is None else sympy.Min(P, ring)

    @property
    def types(self) -> tuple[Type, Type]:
        """What an attention reads: keys [B, G, length, k_dim] and values [B, G, length, v_dim].

        Of a state that is split by heads, G are those of one rank.
        """
        heads = self.heads // self._parts
        k, v = ((B, heads, self.length, size) for size in (self.k_dim, self.v_dim))
        return Type(k, self.dtype), Type(v, self.dtype)

    @property
    def _parts(self) -> int:
        """How many parts its heads are split into."""
        return 1 if self.placement is None else self.placement.parts

    def check_placement(self) -> None:
        """Check that it splits as its placement says, by its heads, or by tokens with the host.

        Raises:
            ValueError: It does not.
        """
        if self.host is not None:
            whole = self.layout == KVLayout() and self.policy is None
            if not whole or self.placement != Placement(("cpu",)):
                raise ValueError(
                    f"it is divided with the host, and is {self.layout}, "
                    f"{self.placement or 'unplaced'}, with {'a' if self.policy else 'no'} policy: "
                    "it should be contiguous, placed(cpu)"
                )
        if self.placement is None:
            return
        if self.placement.summed or self.placement.axis not in (None, 1):
            raise ValueError(f"{self.placement}: keys and values split by their heads, axis 1")
        self.placement.check((B, self.heads, self.length, self.k_dim))

    def of_rank(self) -> KVState:
        """Return what one rank has of it: its heads, without a placement."""
        if self.placement is None:
            return copy.copy(self)
        ranks = len(self.placement.devices) if self._parts > 1 else 1
        queries = None if self.query_heads is None else self.query_heads // ranks
        return replace(self, heads=self.heads // self._parts, query_heads=queries, placement=None)

    @property
    def policy_types(self) -> dict[str, Type]:
        """What the policy remembers of the P tokens before a step, by name; {} without a policy."""
        return self.policy_types_of(P)

    def policy_types_of(self, tokens: Dim) -> dict[str, Type]:
        """Return what the policy remembers of so many tokens of B texts, by name."""
        return {} if self.policy is None else policy_types(self.policy, self.kv_heads, B, tokens)

    @property
    def kv_heads(self) -> KVHeads:
        """The sizes of one rank's attention, as a policy asks for them."""
        own = self.of_rank()
        query_heads = own.query_heads or own.heads
        return KVHeads(own.heads, query_heads, self.k_dim, self.v_dim, self.dtype)

    def policy_nbytes(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes that the policy keeps of `batch` texts of so many tokens."""
        if self.policy is None:
            return 0
        types = policy_types(self.policy, self.kv_heads, batch, tokens)
        return sum(int(kind.bytes) for kind in types.values())

    def nbytes(self, tokens: Dim, itemsize: int | None = None) -> Dim:
        """Return the bytes for B sequences after `tokens` tokens; a page counts whole.

        Args:
            itemsize: Bytes an element; None for those of the state's dtype.
        """
        held = tokens
        if self.layout.kind == "ring":
            held = sympy.Min(tokens, self.layout.size)
        elif self.layout.kind == "paged":
            held = sympy.ceiling(sympy.sympify(tokens) / self.layout.size) * self.layout.size
        size = self.heads * (self.k_dim + self.v_dim) * (itemsize or self.dtype.itemsize)
        return size * B * held


def policy_types(policy: KVPolicy, heads: KVHeads, batch: Dim, tokens: Dim) -> dict[str, Type]:
    """Return the types of what a policy remembers of a layer after so many tokens, by name."""
    pages = dim(sympy.ceiling(sympy.sympify(tokens) / policy.budget.page))
    return {
        name: Type(tuple(map(dim, shape)), dtype)
        for name, (shape, dtype) in policy.state_types(heads, pages, batch).items()
    }
