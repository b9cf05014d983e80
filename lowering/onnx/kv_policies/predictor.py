"""The learned predictor in a graph; see `graphopt.ir.kv_policies.predictor`.

Letters as in `graphopt.lowering.onnx.kv_policies.frame`, and R here the rows of the ring, C
channels, F features.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.kv_policies import Predictor
from graphopt.ir.kv_policies.attention_cnn import FEATURES, HALO
from graphopt.ir.kv_policies.predictor import AVERAGE_SHARE, EDGE
from graphopt.ir.types import B
from graphopt.lowering.onnx.kv_policies.averages import no_steps
from graphopt.lowering.onnx.kv_policies.selection import Selection


class PredictedRow(Selection):
    """A ring of rows, what is marked as read of them, sliding features, scores, and steps.

    One step computes six rows of features; one that reads all pages computes all.
    """

    def prepare(self) -> None:
        frame = self.frame
        frame.tail(self.rows)
        frame.once(("selectable", self.policy.budget), self._selectable)

    @property
    def rows(self) -> int:
        """R."""
        return self.policy.history

    @property
    def marked(self) -> bool:
        """Whether pages that were read are marked."""
        assert isinstance(self.policy, Predictor)
        return self.policy.channels == 2

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        # A page without a prediction is the newest, which is always read.
        return state[-2]

    def observe(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        op, constant = self.op, self.constant
        rings, sliding, steps = self._with_row(state, probabilities)
        inside, ring = self._inside(), np.arange(self.rows)
        # Three rows of each: at the top the outer two and the one that goes, at the bottom the one
        # that comes and the outer two.
        top = self._features(self._ordered(rings, steps, ring[:EDGE]), inside, top=True)
        bottom = self._features(self._ordered(rings, steps, ring[-EDGE:]), inside, bottom=True)
        axis = constant([3])
        outer = [
            op("Squeeze", row, axis)
            for rows in (top, bottom)
            for row in op("Split", rows, axis=3, num_outputs=3, outputs=3)
        ]
        goes, comes = outer[2], outer.pop(3)
        sliding = op("Sub", op("Add", sliding, comes), goes)
        sliding = self._last_pages_again(rings, steps, sliding)
        return [*rings, sliding, self._score(op("Sum", sliding, *outer)), steps]

    def calibrate(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        rings, _, steps = self._with_row(state, probabilities)
        return [*rings, *self._from_all_rows(rings, steps), steps]

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        op, constant, frame = self.op, self.constant, self.frame
        tail = frame.tail(self.rows)
        probabilities = self.attention.pages_of_tail(frame, tail, q, keys)
        missing = op("Sub", constant([self.rows]), tail.rows)
        pads = op("Concat", constant([0, 0]), missing, constant([0] * 5), axis=0)
        if not self.marked:
            rings = [op("Pad", probabilities, pads)]
        else:
            read = op("Unsqueeze", tail.pages, constant([1]))
            rings = [op("Pad", self._averages(probabilities, read, tail.rows), pads)]
            read = op("Expand", op("Pad", read, pads), op("Shape", rings[0]))
            rings.append(op("Cast", read, to=ir.DataType.BOOL))
        steps = no_steps(self)
        return [*rings, *self._from_all_rows(rings, steps), steps]

    # The ring --------------------------------------------------------------------------------

    def _with_row(
        self, state: list[ir.Value], probabilities: ir.Value | None
    ) -> tuple[list[ir.Value], ir.Value, ir.Value]:
        """Return the rings with one row more, the features that slide, and the steps."""
        assert probabilities is not None
        op, constant, frame = self.op, self.constant, self.frame
        *rings, sliding, _, steps = state
        fresh = op("Unsqueeze", frame.fresh, constant([1]))
        nought = self.number(0.0)
        history = op("Where", fresh, nought, rings[0])
        sliding = op("Where", fresh, nought, sliding)
        before = self._ordered([history], op("Sub", steps, constant(1)), np.zeros(1, np.int64))
        before = op("Reshape", before, frame.shape(self.groups, frame.pages))
        read = op("GreaterOrEqual", probabilities, nought)
        values = op("Max", probabilities, nought)
        if self.marked:
            known = op("Mul", op("Mul", before, before), op("Mul", before, before))
            average = op("Add", op("Mul", values, self.number(AVERAGE_SHARE)),
                         op("Mul", known, self.number(1 - AVERAGE_SHARE)))  # fmt: skip
            values = op("Where", op("Greater", before, nought), average, values)
            values = op("Sqrt", op("Sqrt", values))
        row = op("Where", read, values, before if self.marked else nought)
        here = self._slots(steps, np.zeros(1, np.int64))
        here = op("Equal", constant(np.arange(self.rows).reshape(1, 1, -1, 1)), here)
        made = [op("Where", here, op("Unsqueeze", row, constant([2])), history)]
        if self.marked:
            observed = op("And", rings[1], op("Not", fresh))
            read = op("And", op("Unsqueeze", read, constant([2])), here)
            made.append(op("Or", read, op("And", observed, op("Not", here))))
        return made, sliding, op("Add", steps, constant(1))

    def _slots(self, steps: ir.Value, ages: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
        """Return the slots of rows by their age, the oldest being 0: int64 [B, 1, rows, 1]."""
        op, constant = self.op, self.constant
        steps = op("Unsqueeze", steps, constant([1, 2, 3]))
        age = constant(ages.reshape(1, 1, -1, 1))
        return op("Mod", op("Add", steps, age), constant(self.rows))  # type: ignore[no-any-return]

    def _ordered(self, rings: list[ir.Value], steps: ir.Value, ages: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
        """Return rows of the rings by their age, the oldest being 0: [B G, C, rows, n].

        Args:
            rings: [B, G, R, n] each.
        """
        op, constant, builder = self.op, self.constant, self.frame.builder
        shape = constant([self.groups, len(ages), 1])
        index = op("Expand", self._slots(steps, ages),
                   op("Concat", builder.size(B), shape, axis=0))  # fmt: skip
        channels = [
            op("GatherND", op("Cast", ring, to=ir.DataType.FLOAT), index, batch_dims=2)
            for ring in rings
        ]
        x = op("Concat", *(op("Unsqueeze", one, constant([2])) for one in channels), axis=2)
        width = op("Shape", rings[0], start=3)
        rows = op("Concat", constant([-1, len(rings), len(ages)]), width, axis=0)
        return op("Reshape", x, rows)  # type: ignore[no-any-return]

    def _averages(self, probabilities: ir.Value, read: ir.Value, rows: ir.Value) -> ir.Value:
        """Return the fourth roots of moving averages at the end of every row; see the policy.

        Args:
            probabilities: [B, G, r, N].
            read: fp32 [B, 1, r, N], 1 at the pages that a row has read.
            rows: r.
        """
        op, constant = self.op, self.constant
        first = op("Sub", read, op("Pad", read, constant([0, 0, 1, 0, 0, 0, -1, 0])))
        first = op("Greater", first, self.number(0.0))
        row = np.arange(self.rows)
        behind = np.maximum(row[:, None] - row, 0)
        left = np.tril(AVERAGE_SHARE * (1 - AVERAGE_SHARE) ** behind)
        both = op("Concat", rows, rows, axis=0)
        left = op("Slice", constant(left, np.float32), constant([0, 0]), both, constant([0, 1]))
        # A page's first probability counts whole.
        whole = op("Div", probabilities, self.number(AVERAGE_SHARE))
        average = op("MatMul", left, op("Where", first, whole, probabilities))
        return op("Sqrt", op("Sqrt", average))  # type: ignore[no-any-return]

    # The network -----------------------------------------------------------------------------

    def _selectable(self) -> tuple[ir.Value, ir.Value]:
        """Return the first and the last page, [B, 1, 1], that may be chosen at the next step."""
        op, constant, frame, budget = self.op, self.constant, self.frame, self.policy.budget
        first = op("Add", frame.first_page, constant(budget.sink))
        last = op("Div", op("Add", frame.last, constant(1)), constant(frame.page))
        return first, op("Sub", last, constant(budget.local))

    def _limits(self) -> tuple[ir.Value, ir.Value]:
        return self.frame.once(("selectable", self.policy.budget), self._selectable)  # type: ignore[no-any-return]

    def _inside(self) -> ir.Value:
        """Return 1 for the pages that may be chosen at the next step: fp32 [B G, 1, 1, N]."""
        op, number = self.op, self.frame.number
        first, last = self._limits()
        inside = op("And", op("GreaterOrEqual", number, first), op("LessOrEqual", number, last))
        return self._for_heads(inside)

    def _for_heads(self, inside_B1N: ir.Value) -> ir.Value:
        """Return what holds of a row for each of its key heads: fp32 [B G, 1, 1, n]."""
        op, constant = self.op, self.constant
        inside = op("Cast", inside_B1N, to=ir.DataType.FLOAT)
        inside = op("Expand", inside, constant([1, self.groups, 1]))
        width = op("Shape", inside, start=2)
        return op("Reshape", inside, op("Concat", constant([-1, 1, 1]), width, axis=0))  # type: ignore[no-any-return]

    def _features(
        self, x: ir.Value, inside: ir.Value, *, top: bool = False, bottom: bool = False
    ) -> ir.Value:
        """Return the features of rows, [B, G, F, rows, n]; see `attention_cnn.row_features`."""
        op, constant = self.op, self.constant
        first, first_bias, second, second_bias, *_ = self.weights
        pads = [int(top), 1, int(bottom), 1]
        hidden = op("Conv", op("Mul", x, inside), first, first_bias, pads=pads)
        hidden = op("Mul", op("Relu", hidden), inside)
        made = op("Relu", op("Conv", hidden, second, second_bias, pads=pads))
        sizes = op("Shape", made, start=2)
        shape = op("Concat", constant([-1, self.groups, FEATURES]), sizes, axis=0)
        return op("Reshape", made, shape)  # type: ignore[no-any-return]

    def _from_all_rows(self, rings: list[ir.Value], steps: ir.Value) -> list[ir.Value]:
        """Return the features that slide and the scores, computed from all rows."""
        op, constant = self.op, self.constant
        x = self._ordered(rings, steps, np.arange(self.rows))
        features = self._features(x, self._inside(), top=True, bottom=True)
        inner = op("Slice", features, *(constant([x]) for x in (HALO + 1, -HALO, 3)))
        total = op("ReduceSum", features, constant([3]), keepdims=0)
        return [op("ReduceSum", inner, constant([3]), keepdims=0), self._score(total)]

    def _last_pages_again(
        self, rings: list[ir.Value], steps: ir.Value, sliding: ir.Value
    ) -> ir.Value:
        """Return the running sum with its last three pages computed from all rows."""
        op, constant, frame = self.op, self.constant, self.frame
        first, last = self._limits()
        columns = op("Add", last, constant(np.arange(-2 * HALO, 1).reshape(1, 1, -1)))
        exist = op("GreaterOrEqual", columns, op("Max", first, constant(0)))
        index = op("Unsqueeze", op("Max", columns, constant(0)), constant([1]))
        shape = constant([self.groups, self.rows, 2 * HALO + 1])
        index = op("Expand", index, op("Concat", frame.builder.size(B), shape, axis=0))
        near = [
            op("GatherElements", op("Cast", ring, to=ir.DataType.FLOAT), index, axis=3)
            for ring in rings
        ]
        x = self._ordered(near, steps, np.arange(self.rows))
        features = self._features(x, self._for_heads(exist))
        for axis, start in ((3, 1), (4, HALO)):
            end = constant([np.iinfo(np.int64).max])
            features = op("Slice", features, constant([start]), end, constant([axis]))
        again = op("ReduceSum", features, constant([3]), keepdims=0)  # [B, G, F, 3]
        places = [op("Slice", x, *(constant([n]) for n in (HALO, 2 * HALO + 1, 2)))
                  for x in (columns, exist)]  # fmt: skip
        for number in range(HALO + 1):
            column, there, value = (
                op("Slice", x, *(constant([n]) for n in (number, number + 1, axis)))
                for x, axis in ((places[0], 2), (places[1], 2), (again, 3))
            )
            here = op("And", op("Equal", frame.number, column), there)
            sliding = op("Where", op("Unsqueeze", here, constant([1])), value, sliding)
        return sliding

    def _score(self, total: ir.Value) -> ir.Value:
        """Return the predictions [B, G, N] of the sums of all rows' features [B, G, F, N]."""
        op, constant = self.op, self.constant
        *_, weight, bias = self.weights
        mean = op("Div", total, self.number(float(self.rows)))
        column = op("Reshape", weight, constant([1, FEATURES]))
        scores = op("Add", op("MatMul", column, mean), bias)
        return op("Squeeze", scores, constant([2]))  # type: ignore[no-any-return]
