"""Keys in few bits in a graph; see `graphopt.ir.kv_policies.key_codes`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.kv_policies.key_codes import PRIOR_KEYS, STEP_OF_BITS, parts, width_of_codes
from graphopt.lowering.onnx.kv_policies.frame import BLOCKED, places
from graphopt.lowering.onnx.kv_policies.selection import Selection


class CodedKeys(Selection):
    """The codes of all keys, and by which features, centres and scales they are made.

    A step changes one row of the codes, which is written behind the branch as for `quest`.
    """

    @property
    def width(self) -> int:
        """D, rounded up."""
        return width_of_codes(self.attention.heads.k_dim)

    def prepare(self) -> None:
        self.frame.newest(self.groups)
        self.frame.tail(self.policy.history)
        self._known()

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        op, constant, number, width = self.op, self.constant, self.number, self.width
        codes, order, centre, scale = state
        rows = op("Mul", self._padded(rows), number(self.attention.scale))
        kept = op("Mul", rows, op("Unsqueeze", scale, constant([2])))
        kept = op("GatherElements", kept, self._for_each(order, self.attention.share), axis=3)
        tokens = op("Reshape", codes, constant([0, self.groups, -1, width // 4]))
        levels = self._levels(tokens)
        scores = op("MatMul", kept, op("Transpose", levels, perm=[0, 1, 3, 2]))
        if self.attention.softcap is not None:
            # What centres give is the same for all tokens, and matters under a cap alone.
            shift = op("MatMul", rows, op("Unsqueeze", centre, constant([3])))
            cap = number(self.attention.softcap)
            scores = op("Mul", op("Tanh", op("Div", op("Add", scores, shift), cap)), cap)
        shares = op("Softmax", op("Where", self._known(), scores, number(BLOCKED)), axis=-1)
        shares = op("ReduceMean", shares, constant([2]), keepdims=0)
        paged = op("Reshape", shares, constant([0, self.groups, -1, self.frame.page]))
        return op("ReduceSum", paged, constant([3]), keepdims=0)  # type: ignore[no-any-return]

    def observe(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        op, constant, frame = self.op, self.constant, self.frame
        codes, order, centre, scale = state
        here, page, size = frame.newest(self.groups), frame.page, self.width // 4
        new = self._encoded(self._padded(k_new), order, centre, scale)
        place = constant((np.arange(page * size) // size).reshape(1, 1, 1, -1))
        slot = op("Unsqueeze", op("Mod", frame.last, constant(page)), constant([3]))
        row = op("Tile", new, constant([1, 1, 1, page]))
        row = op("Where", op("Equal", place, slot), row, op("GatherND", codes, here))
        return [op("Identity", x) for x in (here, row, order, centre, scale)]

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        op, constant, number, frame = self.op, self.constant, self.number, self.frame
        heads, tail, width = self.attention.heads, frame.tail(self.policy.history), self.width
        keys = self._padded(keys)
        seen = op("Unsqueeze", frame.seen, constant([1, 3]))
        real = op("Cast", seen, to=ir.DataType.FLOAT)  # [B, 1, R, 1]
        count = op("Max", op("ReduceSum", real, constant([2]), keepdims=0), number(1.0))

        def total(x: ir.Value) -> ir.Value:
            # What lies in room that no token has reached may be anything.
            kept = op("Where", seen, x, number(0.0))
            return op("ReduceSum", kept, constant([2]), keepdims=0)  # type: ignore[no-any-return]

        centre = op("Div", total(keys), count)
        off = op("Sub", keys, op("Unsqueeze", centre, constant([2])))
        size = op("ReduceMean", total(op("Mul", keys, keys)), constant([2]), keepdims=1)
        prior = op("Mul", op("Div", size, count), number(float(PRIOR_KEYS)))
        more = op("Add", count, number(float(PRIOR_KEYS)))
        variance = op("Div", op("Add", total(op("Mul", off, off)), prior), more)
        last = self._padded(tail.of(frame, q, 2))
        asked = op("Cast", op("Unsqueeze", tail.real, constant([1])), to=ir.DataType.FLOAT)
        squares = op("Mul", op("Mul", last, last), asked)
        squares = op("Reshape", squares, constant([0, self.groups, -1, width]))
        weight = op("ReduceSum", squares, constant([2]), keepdims=0)
        counts = op("Mul", weight, variance)
        if width > heads.k_dim:
            padding = np.arange(width) >= heads.k_dim
            counts = op("Where", constant(padding, np.bool_), number(-1.0), counts)
        _, order = op("TopK", counts, constant([3 * width // 4]), outputs=2, axis=-1, sorted=1)
        scale = op("Sqrt", variance)
        codes = self._encoded(keys, order, centre, scale)
        none = op("Cast", constant(0), to=ir.DataType.UINT8)
        codes = op("Where", seen, codes, none)
        codes = op("Reshape", codes, constant([0, self.groups, -1, frame.page * (width // 4)]))
        where = places(frame.builder, self.groups, frame.number, frame.pages)
        return [where, codes, order, centre, scale]

    def after(self, state: list[ir.Value], made: list[ir.Value]) -> list[ir.Value]:
        where, rows, *others = made
        return [self.op("ScatterND", state[0], where, rows), *others]

    def _known(self) -> ir.Value:
        """Return which slots held a key before the last one: bool [B, 1, 1, R]."""
        op, constant, frame = self.op, self.constant, self.frame

        def make() -> ir.Value:
            room = op("Squeeze", frame.room, constant([0]))
            slot = op("Range", constant(0), room, constant(1))
            before = op("Less", slot, op("Squeeze", frame.last, constant([2])))
            return op("Unsqueeze", op("And", frame.seen, before), constant([1, 2]))  # type: ignore[no-any-return]

        return frame.once("known slots", make)  # type: ignore[no-any-return]

    def _padded(self, x: ir.Value) -> ir.Value:
        """Return [B, n, s, D] with features of zeros up to `width`."""
        missing = self.width - self.attention.heads.k_dim
        if not missing:
            return x
        return self.op("Pad", x, self.constant([0] * 7 + [missing]))  # type: ignore[no-any-return]

    def _for_each(self, order: ir.Value, count: int | ir.Value) -> ir.Value:
        """Return an order [B, G, n] for each of so many rows, [B, G, rows, n]."""
        op, constant = self.op, self.constant
        rows = constant([count]) if isinstance(count, int) else count
        shape = op("Concat", constant([1, 1]), rows, constant([1]), axis=0)
        return op("Expand", op("Unsqueeze", order, constant([2])), shape)  # type: ignore[no-any-return]

    def _encoded(
        self, keys: ir.Value, order: ir.Value, centre: ir.Value, scale: ir.Value
    ) -> ir.Value:
        """Return keys [B, G, n, D] in codes, uint8 [B, G, n, D / 4]."""
        op, constant, number = self.op, self.constant, self.number
        least = number(float(np.finfo(np.float32).tiny))
        off = op("Sub", keys, op("Unsqueeze", centre, constant([2])))
        x = op("Div", off, op("Unsqueeze", op("Max", scale, least), constant([2])))
        rows = op("Shape", keys, start=2, end=3)
        x = op("GatherElements", x, self._for_each(order, rows), axis=3)
        packed, start = [], 0
        for bits, count in parts(self.width):
            part = op("Slice", x, constant([start]), constant([start + count]), constant([3]))
            start += count
            codes = op("Floor", op("Add", op("Div", part, number(STEP_OF_BITS[bits])),
                                   number(float(2 ** (bits - 1)))))  # fmt: skip
            codes = op("Clip", codes, number(0.0), number(2.0**bits - 1))
            fields = 8 // bits
            codes = op("Reshape", codes, constant([0, 0, 0, fields, count // fields]))
            places_of_bits = (2.0 ** (bits * np.arange(fields))).reshape(1, 1, 1, -1, 1)
            byte = op("Mul", codes, constant(places_of_bits, np.float32))
            packed.append(op("ReduceSum", byte, constant([3]), keepdims=0))
        return op("Cast", op("Concat", *packed, axis=3), to=ir.DataType.UINT8)  # type: ignore[no-any-return]

    def _levels(self, codes: ir.Value) -> ir.Value:
        """Return what codes [B, G, n, D / 4] stand for, fp32 [B, G, n, 3 D / 4]."""
        op, constant = self.op, self.constant
        levels, start = [], 0
        for bits, count in parts(self.width):
            size = count * bits // 8
            part = op("Slice", codes, constant([start]), constant([start + size]), constant([3]))
            start += size
            index = op("Cast", part, to=ir.DataType.INT32)
            for n in range(8 // bits):
                # Each byte is looked up, which is one pass where shifts and masks are three.
                table = ((np.arange(256) >> (bits * n)) & (2**bits - 1)) - (2**bits - 1) / 2
                levels.append(op("Gather", constant(table * STEP_OF_BITS[bits], np.float32), index))
        return op("Concat", *levels, axis=3)  # type: ignore[no-any-return]
