"""Page range: shares of estimates between bounds; see `graphopt.ir.kv_policies.page_range`."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.kv_policies.page_range import PageRange
from graphopt.lowering.onnx.kv_policies.frame import BLOCKED
from graphopt.lowering.onnx.kv_policies.quest import Bounds


class EstimatedShares(Bounds):
    """Remembers what Quest does, and goes by each head's softmax of estimates."""

    def prepare(self) -> None:
        super().prepare()
        self._known()

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        policy = self.policy
        assert isinstance(policy, PageRange)
        op, number = self.op, self.number
        upper, lower = (number(x * self.attention.scale) for x in (1 - policy.lower, policy.lower))
        # The bounds as the left operand, as `Bounds` has them.
        columns = op("Transpose", rows, perm=[0, 1, 3, 2])
        positive, negative = op("Max", columns, number(0.0)), op("Min", columns, number(0.0))
        estimate = op("Add", *(
            op("MatMul", bound, op("Add", op("Mul", one, upper), op("Mul", other, lower)))
            for one, other, bound in zip(
                (negative, positive), (positive, negative), state, strict=True
            )
        ))  # fmt: skip
        estimate = op("Transpose", estimate, perm=[0, 1, 3, 2])
        if self.attention.softcap is not None:
            cap = number(self.attention.softcap)
            estimate = op("Mul", op("Tanh", op("Div", estimate, cap)), cap)
        shares = op("Softmax", op("Where", self._known(), estimate, number(BLOCKED)), axis=-1)
        return op("ReduceMean", shares, self.constant([2]), keepdims=0)  # type: ignore[no-any-return]

    def _known(self) -> ir.Value:
        """Return which pages held a key before the last one: bool [B, 1, 1, N]."""
        op, frame = self.op, self.frame

        def make() -> ir.Value:
            known = op("And", frame.present, op("Not", frame.fresh))
            return op("Unsqueeze", known, self.constant([1]))  # type: ignore[no-any-return]

        return frame.once("known pages", make)  # type: ignore[no-any-return]
