"""What a causal attention reads page by page: its statistics, and its result over some pages.

On a text that is given, queries, keys and values of all tokens of a layer are known at once. So
what a decoding step would see at any place is computed for many places together: how much of each
page of keys every query reads, and what the attention gives where it reads some pages alone. Rows
of scores are in memory for a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Call, Node, Program, Value, resolve_attrs
from graphopt.ir.ops.attention import (
    BIAS,
    KEY,
    MASK,
    PAST_K,
    QUERY,
    SELECTED,
    SINKS,
    SLOPES,
    VALUE,
)
from graphopt.support.per_device import PerDevice

SCORES_AT_ONCE = PerDevice(cpu=2**25, gpu=2**28)
"""Scores of an attention, of all its heads, that are in memory at once."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of a program.

    Attributes:
        index: Its number among the attentions of the program.
        name: The module path of the call that it is in, with a number where that has several.
        position: That of the call.
        node: The attention in the call's function.
        left_alone: Why it cannot read selected pages of its keys; None where it can.
    """

    index: int
    name: str
    position: int
    node: Node
    left_alone: str | None


def attention_layers(program: Program) -> list[AttentionLayer]:
    """Return the attentions of a program in order of execution.

    Only attentions inside of blocks (`graphopt.ir.blocks`) can read selected pages: behind
    others, nothing runs anew what their results change.
    """
    blocks = {block.position for block in find_blocks(program)}
    layers: list[AttentionLayer] = []
    for position, call in enumerate(program.calls):
        nodes = [node for node in program.function_of(call).nodes if node.op == "attention"]
        for number, node in enumerate(nodes):
            name = call.path or f"{call.function} at {position}"
            reason = _reason_against_pages(node, call)
            if reason is None and position not in blocks:
                reason = "it lies outside of the blocks of a residual stream"
            name = name if len(nodes) == 1 else f"{name}, attention {number}"
            layers.append(AttentionLayer(len(layers), name, position, node, reason))
    return layers


def _reason_against_pages(node: Node, call: Call) -> str | None:
    attrs = resolve_attrs(node, call)
    if not attrs["causal"]:
        return "it sees both ways"
    if attrs.get("window") is not None:
        return f"it has a window of {attrs['window']} tokens"
    if attrs.get("chunk") is not None:
        return f"it sees chunks of {attrs['chunk']} tokens"
    if attrs.get("kv_bits", 16) < 16:
        return "it rounds keys and values itself"
    given = dict(enumerate(node.inputs))
    if given.get(SELECTED) is not None:
        return "it reads selected pages already"
    if given.get(BIAS) is not None or given.get(SLOPES) is not None:
        return "it adds to its scores by position, which policies know nothing of"
    return None


@dataclass(frozen=True)
class PageScores:
    """How every query of a text scores each page of its keys; -inf where it sees none of it.

    Attributes:
        first: The index of the first query.
        page: Keys of a page.
        maxima_BHSN: The largest score in each page, fp32 at least.
        lse_BHSN: The log-sum-exp of the scores in each page.
        sinks: [H], logits that take part in each row's softmax and have no value; None without.
        groups: Query heads that share a key head.
    """

    first: int
    page: int
    maxima_BHSN: Tensor
    lse_BHSN: Tensor
    sinks: Tensor | None
    groups: int

    def with_sinks(self, lse_BHS: Tensor) -> Tensor:
        """Return the log-sum-exp of rows [B, H, S] with the sinks' logits."""
        if self.sinks is None:
            return lse_BHS
        return torch.logaddexp(lse_BHS, self.sinks[None, :, None].to(lse_BHS.dtype))

    def probabilities(self) -> Tensor:
        """Return the largest weight in each page over its query heads, [B, G, S, N]."""
        lse_BHS = self.with_sinks(self.lse_BHSN.logsumexp(-1))
        return self.by_key_head(torch.exp(self.maxima_BHSN - lse_BHS[..., None])).amax(2)

    def mass(self) -> Tensor:
        """Return the share of each page in the weights of all keys, [B, G, S, N].

        It is the mean over the query heads of a key head, and sums to 1 over the pages: the sinks
        of a softmax are no keys.
        """
        lse_BHS1 = self.lse_BHSN.logsumexp(-1, keepdim=True)
        return self.by_key_head(torch.exp(self.lse_BHSN - lse_BHS1)).mean(2)

    def by_key_head(self, x_BH: Tensor) -> Tensor:
        """[B, H, ...] -> [B, G, H / G, ...]."""
        return x_BH.unflatten(1, (-1, self.groups))


class CausalAttention:
    """One attention of a block on whole texts, computed for some queries or over some pages.

    Args:
        node: The attention, of which `AttentionLayer.left_alone` is None.
        call: The call that it is run in.
        operands: The tensors of its operands, without a past.

    Attributes:
        q_BHSD, k_BGSD, v_BGSD: In the dtype of the values.
        mask_BS: Nonzero at real tokens; None where all are.
        sinks: [H], see `PageScores`.
        scale, softcap: How products become scores.
        tokens: S.
        groups: Query heads that share a key head.
    """

    def __init__(self, node: Node, call: Call, operands: Sequence[Tensor | None]) -> None:
        attrs = resolve_attrs(node, call)
        q, k, v = operands[QUERY], operands[KEY], operands[VALUE]
        assert q is not None and k is not None and v is not None
        # What was rotated by fp32 tables may be wider than the values.
        self.q_BHSD, self.k_BGSD, self.v_BGSD = q.to(v.dtype), k.to(v.dtype), v
        given = [*operands, *[None] * (SINKS + 1 - len(operands))]
        self.mask_BS, self.sinks = given[MASK], given[SINKS]
        self.scale: float = attrs["scale"]
        self.softcap: float | None = attrs.get("softcap")
        self.tokens, self.groups = q.shape[2], q.shape[1] // k.shape[1]

    @staticmethod
    def wanted(node: Node) -> list[Value]:
        """Return the values of a function that an attention's operands are made of."""
        return [value for value in node.inputs[:PAST_K] if value is not None]

    @classmethod
    def of_values(cls, node: Node, call: Call, values: Mapping[Value, Tensor]) -> CausalAttention:
        """Return the attention of a node with the values of its function that `wanted` names."""
        return cls(node, call, [None if v is None else values[v] for v in node.inputs[:PAST_K]])

    def dense(self, start: int, stop: int) -> Tensor:
        """Return the output [B, H, stop - start, Dv] of some queries over all their keys."""
        return self._attention(start, stop)

    def over_pages(self, read_BGSN: Tensor, first: int, page: int) -> Tensor:
        """Return the output of the last queries, each over the pages that it reads.

        Args:
            read_BGSN: bool, of every query from `first` on and every page.
            page: Keys of a page.

        Returns:
            [B, H, S - first, Dv].
        """
        outputs = []
        for start, stop in self._parts(first):
            read_BGsN = read_BGSN[:, :, start - first : stop - first]
            seen = read_BGsN.repeat_interleave(self.groups, 1).repeat_interleave(page, -1)
            outputs.append(self._attention(start, stop, seen[..., :stop]))
        return torch.cat(outputs, 2)

    def page_scores(self, first: int, page: int) -> PageScores:
        """Return how every query from `first` on scores each page of all keys."""
        batch, heads = self.q_BHSD.shape[:2]
        pages = -(-self.tokens // page)
        q, k = (x if x.dtype == torch.float64 else x.float() for x in (self.q_BHSD, self.k_BGSD))
        size = (batch, heads, self.tokens - first, pages)
        maxima, lse = q.new_empty(size), q.new_empty(size)
        for start, stop in self._parts(first):
            allowed = functional.allowed_keys(
                stop - start, self._mask(stop), stop, True, None, None, q.device
            )
            scores = functional.masked_scores(
                q[:, :, start:stop], k[:, :, :stop], allowed, None, self.scale, self.softcap
            )
            padded = F.pad(scores, (0, pages * page - stop), value=float("-inf"))
            by_page = padded.unflatten(-1, (pages, page))
            place = slice(start - first, stop - first)
            maxima[:, :, place], lse[:, :, place] = by_page.amax(-1), by_page.logsumexp(-1)
        return PageScores(first, page, maxima, lse, self.sinks, self.groups)

    def _parts(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield where parts of the queries from `first` on begin and end."""
        row = self.q_BHSD.shape[0] * self.q_BHSD.shape[1] * self.tokens
        rows = max(1, SCORES_AT_ONCE.on(self.q_BHSD.device) // row)
        for start in range(first, self.tokens, rows):
            yield start, min(start + rows, self.tokens)

    def _attention(self, start: int, stop: int, seen: Tensor | None = None) -> Tensor:
        """Return the output of the queries from `start` to `stop`, over keys that are `seen`."""
        return functional.attention(
            self.q_BHSD[:, :, start:stop],
            self.k_BGSD[:, :, :stop],
            self.v_BGSD[:, :, :stop],
            self._mask(stop),
            sinks=self.sinks,
            scale=self.scale,
            softcap=self.softcap,
            seen=seen,
        )

    def _mask(self, stop: int) -> Tensor | None:
        return None if self.mask_BS is None else self.mask_BS[:, :stop]
