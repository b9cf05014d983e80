"""What a policy is in a graph: scores of pages, and what it remembers from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.ir.kv_policies import KVPolicy
from graphopt.lowering.onnx.kv_policies.frame import Frame
from graphopt.lowering.onnx.kv_policies.scoring import Attention


class Selection:
    """A policy of one layer, in standard operators; by itself it remembers nothing.

    States are lists of tensors in the order of `KVPolicy.state_types`, of N pages. What they hold
    of pages behind a row's last key is not read.

    Args:
        weights: The policy's, in the order of `KVPolicy.weight_types`.

    Attributes:
        alike: Whether all key heads have the same scores.
    """

    alike: ClassVar[bool] = False

    def __init__(
        self, frame: Frame, policy: KVPolicy, attention: Attention, weights: Sequence[ir.Value]
    ) -> None:
        self.frame, self.policy, self.attention = frame, policy, attention
        self.weights = weights
        self.groups = attention.heads.key_heads
        self.op, self.constant = frame.op, frame.constant
        self.number = frame.builder.number

    def prepare(self) -> None:
        """Make what layers share, in front of branches."""

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        """Return finite scores of all pages, [B, G, N], or where they are `alike` [1, 1, N].

        Args:
            rows: The step's queries [B, G, h, D].
        """
        raise NotImplementedError

    def observe(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        """Return what a branch hands to `after` behind a step of one token.

        Args:
            probabilities: The largest in each page that was read, [B, G, N], and -1 elsewhere; for
                policies that need it.
            k_new: [B, G, 1, D].
        """
        return [self.op("Identity", x) for x in state]

    def calibrate(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        """Return the same behind a step that read all pages."""
        return self.observe(state, probabilities, k_new)

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        """Return the same behind a prompt.

        Args:
            q: [B, H, S, D].
            keys: [B, G, R, D].
        """
        return []

    def after(self, state: list[ir.Value], made: list[ir.Value]) -> list[ir.Value]:
        """Return the state behind a step.

        Args:
            state: That before it.
            made: What the branch that ran gave.
        """
        return made


class NewestPages(Selection):
    """`sink-local`: the newest pages."""

    alike: ClassVar[bool] = True

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        newest = self.op("Cast", self.frame.number, to=ir.DataType.FLOAT)
        return self.op("Unsqueeze", newest, self.constant([0, 1]))  # type: ignore[no-any-return]
