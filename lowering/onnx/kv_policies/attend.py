"""Attention whose steps read the pages that a policy selects, in standard operators.

A graph decides when it runs whether one token follows others: then pages are selected and gathered,
or all are read where the policy is due for calibration; else all keys are read and the policy's
state is made anew. These are branches of an If. New keys and values are written in front of it, so
that a cache may be extended where it lies.

Letters as in `graphopt.lowering.onnx.kv_policies.frame`, and M pages that are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.ir.kv_policies import POLICIES, STEPS, KVPolicy
from graphopt.lowering.onnx.kv_policies.averages import Averages
from graphopt.lowering.onnx.kv_policies.expected_attention import ExpectedMass
from graphopt.lowering.onnx.kv_policies.frame import Frame, write_tokens
from graphopt.lowering.onnx.kv_policies.key_codes import CodedKeys
from graphopt.lowering.onnx.kv_policies.page_range import EstimatedShares
from graphopt.lowering.onnx.kv_policies.predictor import PredictedRow
from graphopt.lowering.onnx.kv_policies.quest import Bounds
from graphopt.lowering.onnx.kv_policies.scoring import Attention, page_maxima
from graphopt.lowering.onnx.kv_policies.selection import NewestPages, Selection
from graphopt.lowering.onnx.kv_policies.snapkv import Votes

SELECTIONS: dict[str, type[Selection]] = {
    "dense": Selection,
    "sink-local": NewestPages,
    "last-row": Averages,
    "ema": Averages,
    "quest": Bounds,
    "page-range": EstimatedShares,
    "key-codes": CodedKeys,
    "snapkv": Votes,
    "expected-attention": ExpectedMass,
    "predictor": PredictedRow,
}
"""Kind of a policy -> what it is in a graph."""


def refusal(policy: KVPolicy) -> str | None:
    """Return why graphs do not have a policy, as a clause; None where they do."""
    if policy.kind in SELECTIONS:
        return None
    if POLICIES[policy.kind].measuring_only:
        return f"{policy.kind} reads all keys to select some, and is for measuring alone"
    return f"graphs have the policies {', '.join(sorted(SELECTIONS))}, and this is {policy.kind}"


@dataclass(frozen=True)
class Operands:
    """What an attention with a policy reads.

    Attributes:
        q, k, v: Of the new tokens: [B, H, S, D], [B, G, S, D] and [B, G, S, Dv].
        past_k, past_v: Caches [B, G, R, D] and [B, G, R, Dv].
        state, weights: The policy's, in the order of their types.
        layer: Its number by which layers take turns, int64 scalar.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    past_k: ir.Value
    past_v: ir.Value
    state: list[ir.Value]
    weights: list[ir.Value]
    layer: ir.Value


Prompt = Callable[[ir.Value, ir.Value], ir.Value]
"""Of keys and values [B, G, R, D]: the output [B, S, H Dv] of a prompt."""


def attend(
    frame: Frame, policy: KVPolicy, attention: Attention, given: Operands, prompt: Prompt
) -> list[ir.Value]:
    """Return the output [B, S, H Dv], both caches with the new tokens, and the state behind them.

    Args:
        prompt: Attention over all keys; called within a branch.
    """
    builder, groups = frame.builder, attention.heads.key_heads
    keys, values = (
        write_tokens(builder, frame.shared, past, new, groups)
        for past, new in ((given.past_k, given.k), (given.past_v, given.v))
    )
    selection = SELECTIONS[policy.kind](frame, policy, attention, given.weights)
    selection.prepare()
    # Made here, where both branches and other layers see them.
    frame.fixed(policy.budget)
    frame.read(policy.budget)
    frame.shape(groups, frame.read(policy.budget))
    frame.unread(groups)
    frame.biases(groups)
    due = _due(frame, policy, attention, given)
    step = _Step(frame, policy, attention, selection, given, keys, values)
    with builder.branch("step") as one:
        if policy.kind == "dense":
            one.results = step.over_all()
        elif due is None:
            one.results = step.over_selected()
        else:
            one.results = step.either(due)
    with builder.branch("prompt") as several:
        several.results = [prompt(keys, values), *selection.begin(given.q, keys)]
    made = builder.op(
        "If", frame.alone, outputs=len(one.results),
        then_branch=one.graph(), else_branch=several.graph(),
    )  # fmt: skip
    out, *left = made if isinstance(made, list) else [made]
    return [out, keys, values, *selection.after(given.state, left)]


def _due(frame: Frame, policy: KVPolicy, attention: Attention, given: Operands) -> ir.Value | None:
    """Return whether a step of one token reads all keys, a bool scalar; None for never."""
    if policy.calibrate_every is None:
        return None
    op, constant = frame.op, frame.constant
    names = list(policy.state_types(attention.heads, 0, 0))
    step = op("Add", given.state[names.index(STEPS)], constant(1))
    turn = op("Mod", op("Add", step, given.layer), constant(policy.calibrate_every))
    # Of several rows one that is due is enough.
    return op("Equal", op("ReduceMin", turn, keepdims=0), constant(0))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Step:
    """A step of one token of one layer; each method gives what the branch `step` hands out."""

    frame: Frame
    policy: KVPolicy
    attention: Attention
    selection: Selection
    given: Operands
    keys: ir.Value
    values: ir.Value

    def either(self, due: ir.Value) -> list[ir.Value]:
        """Read all keys where it is due, else those that are selected."""
        builder = self.frame.builder
        with builder.branch("all") as dense:
            dense.results = self.over_all()
        with builder.branch("selected") as sparse:
            sparse.results = self.over_selected()
        return builder.op(  # type: ignore[no-any-return]
            "If", due, outputs=len(dense.results),
            then_branch=dense.graph(), else_branch=sparse.graph(),
        )  # fmt: skip

    def over_all(self) -> list[ir.Value]:
        """Read all keys."""
        frame, op, constant = self.frame, self.frame.op, self.frame.constant
        rows = self.attention.by_group(frame, self.given.q)
        bias = op("Reshape", frame.bias, constant([0, 1, 1, -1]))
        out, weights = self.attention.over(frame, rows, self.keys, self.values, bias)
        probabilities = None
        if self.policy.needs_observation:
            maxima = page_maxima(frame, weights)
            unread = frame.unread(self.attention.heads.key_heads)
            probabilities = op("Where", frame.present, maxima, unread)
        return [out, *self.selection.calibrate(self.given.state, probabilities, self.given.k)]

    def over_selected(self) -> list[ir.Value]:
        """Read the pages that the policy selects.

        Of equal scores TopK takes the first, as `graphopt.ir.kv_policies.pages.select_pages` does.
        Where there are fewer than M pages it takes absent ones too, at whose keys the bias is
        `BLOCKED`.
        """
        frame, op, constant = self.frame, self.frame.op, self.frame.constant
        budget, attention, given = self.policy.budget, self.attention, self.given
        groups = attention.heads.key_heads
        rows = attention.by_group(frame, given.q)
        scores = self.selection.scores(given.state, rows)
        rank = op("Add", scores, frame.fixed(budget))
        best, page = op("TopK", rank, frame.read(budget), outputs=2, axis=-1, sorted=0)
        if self.selection.alike:
            page = op("Expand", page, frame.shape(groups, frame.read(budget)))
        index = op("Unsqueeze", page, constant([3]))
        k, v = (
            self._pages_of(x, index, dim)
            for x, dim in (
                (self.keys, attention.heads.k_dim), (self.values, attention.heads.v_dim)
            )
        )  # fmt: skip
        bias = op("GatherND", frame.biases(groups), index, batch_dims=2)
        bias = op("Reshape", bias, constant([0, groups, 1, -1]))
        out, weights = attention.over(frame, rows, k, v, bias)
        probabilities = None
        if self.policy.needs_observation:
            maxima, unread = page_maxima(frame, weights), frame.builder.number(-1.0)
            absent = op("Equal", best, frame.builder.number(float("-inf")))
            maxima = op("Where", absent, unread, maxima)
            probabilities = op("ScatterElements", frame.unread(groups), page, maxima, axis=2)
        return [out, *self.selection.observe(given.state, probabilities, given.k)]

    def _pages_of(self, cache: ir.Value, index: ir.Value, dim: int) -> ir.Value:
        """Return pages [B, G, M page, D] of a cache [B, G, R, D], each copied in one piece."""
        op, constant, groups = self.frame.op, self.frame.constant, self.attention.heads.key_heads
        width = self.frame.page * dim
        paged = op("Reshape", cache, constant([0, groups, -1, width]))
        taken = op("GatherND", paged, index, batch_dims=2)
        return op("Reshape", taken, constant([0, groups, -1, dim]))  # type: ignore[no-any-return]
