"""Alignments: an op on ranks' parts makes parts of what it makes of the whole, or a partial sum."""

from __future__ import annotations

import pytest
import torch
from test_ops import CASES as OF_OPS
from test_ops import Case, Q, f64
from test_parts import devices, put_together

from graphopt.ir import Array, In, Type
from graphopt.ir.ops import get_op
from graphopt.ir.ops.aten import concretize
from graphopt.ir.parts import rank_part
from graphopt.ir.split import Split
from graphopt.ir.splits import adds, alignments, keeps_sums, local_attrs
from graphopt.ir.types import B, P, S

F64 = torch.float64
SIZES = {B: 2, S: 3, P: 4}
RANKS = (2, 3, 4)
CASES = [
    *OF_OPS,
    # Heads, of which each is computed by itself.
    Case("rms_norm", [Q, f64(8)], {"eps": 1e-3}),
    Case("layer_norm", [Q, f64(8), f64(8)], {"eps": 1e-3}),
    Case("quantise_dequantise", [Q], {"bits": 4, "symmetric": False}),
    Case("add_rms_norm", [Q, Q, f64(8)], {"eps": 1e-3}),
    Case("transformed", [Q], {"bits": 4}),
    Case("transformed", [Q, Q], {"before": "silu"}),
    Case("experts", [f64(B, S, 6), f64(B, S, 2), f64(24, 6), f64(7, 24), f64(24, 6)],
         {"act": "silu", "active": 2}),
]  # fmt: skip


def whole_types(op, attrs, types):
    own = {**attrs, "target": op} if "." in op else attrs
    return own, get_op(op).infer(types, own)


def fits(alignment, base, ranks, operands, results):
    """Return whether every axis of an alignment has equal parts."""
    for kinds, members in ((operands, alignment.operands), (results, alignment.results)):
        for place, member in members.items():
            split = base.times(member)
            size = kinds[place].shape[split.axis]
            if not isinstance(size, int):
                return False
            if size % (split.parts(ranks) * split.sections * alignment.unit):
                return False
    return True


def check(op, attrs, types, tensors, alignment, ranks):
    """Run an op on the whole and on every rank's part, and compare."""
    own, kinds = whole_types(op, attrs, types)
    base = Split(0)
    if not fits(alignment, base, ranks, types, kinds):
        return False
    made = {place: base.times(member) for place, member in alignment.results.items()}
    local = local_attrs(op, own, types, kinds, made, ranks)
    if "." in op:
        local = {**concretize(local, SIZES), "target": op}
        own = {**concretize(own, SIZES), "target": op}
    by_rank = []
    for rank in range(ranks):
        given = []
        for place, tensor in enumerate(tensors):
            member = alignment.operands.get(place)
            if tensor is None or (member is None and not adds(op, place)):
                given.append(tensor)
            elif member is None:
                given.append(tensor if rank == 0 or not alignment.sums else tensor * 0)
            else:
                placement = base.times(member).placement(devices(ranks))
                given.append(rank_part(Array(tensor), placement, rank).load())
        by_rank.append(get_op(op).reference(given, local))
    expected = get_op(op).reference(tensors, own)
    for place, value in enumerate(expected):
        parts = [results[place] for results in by_rank]
        if place in alignment.sums:
            found = sum(parts)
        elif place in made:
            found = put_together(parts, made[place].placement(devices(ranks)))
        else:
            found = parts[0]
            assert all(torch.equal(part, found) for part in parts)
        assert found.shape == value.shape
        if value.is_floating_point():
            tolerance = 1e-12 * max(1.0, float(value[value.isfinite()].abs().max()))
            assert torch.allclose(found, value, rtol=0, atol=tolerance)
        else:
            assert torch.equal(found, value)
    return True


# What is not computed by parts at all, and why there is no alignment.
NEVER = {"top_k_gating", "route", "rope_table", "by_length", "ntk_frequencies", "fused_linear",
         "packed_linear", "integer_linear", "rope_pair", "linear_all_reduce",
         "attention_linear_all_reduce"}  # fmt: skip


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_on_parts(case, ranks):
    tensors = case.tensors(SIZES)
    _, results = whole_types(case.op, case.attrs, case.types)
    found = list(alignments(case.op, case.attrs, case.types, results, ranks))
    assert case.op not in NEVER or not found
    for alignment in found:
        check(case.op, case.attrs, case.types, tensors, alignment, ranks)


def test_most_ops_are_tried_in_parts():
    tried = set()
    for case in CASES:
        _, results = whole_types(case.op, case.attrs, case.types)
        for ranks in (2, 3):
            for alignment in alignments(case.op, case.attrs, case.types, results, ranks):
                if check(case.op, case.attrs, case.types, case.tensors(SIZES), alignment, ranks):
                    tried.add(case.op)
    assert tried >= {
        "add", "attention", "embedding", "experts", "kronecker", "linear", "merge_heads", "moe",
        "mean_square", "mul", "policy_attention", "quantise_dequantise", "rms_norm", "rms_norm_by",
        "rope", "silu", "split_heads", "transpose_heads", "transformed",
    }  # fmt: skip


ATEN = {
    "aten.add.Tensor": [((2, 4, 6), (4, 1)), [In(0), In(1)]],
    "aten.sub.Tensor": [((2, 4, 6), (6,)), [In(0), In(1)]],
    "aten.where.self": [((2, 4, 6), (4, 6), (2, 4, 6)), [In(0), In(1), In(2)]],
    "aten.maximum.default": [((4, 6), (4, 6)), [In(0), In(1)]],
    "aten.min.other": [((4, 6), (4, 6)), [In(0), In(1)]],
    "aten.clamp.default": [((4, 6),), [In(0), -0.5, 0.5]],
    "aten.reshape.default": [((2, 3, 24),), [In(0), [2, 3, 4, 6]]],
    "aten.view.default": [((2, 4, 3, 6),), [In(0), [2, 12, -1]]],
    "aten.flatten.using_ints": [((2, 4, 6),), [In(0), 1]],
    "aten.unflatten.int": [((2, 24),), [In(0), 1, [4, 6]]],
    "aten.transpose.int": [((2, 4, 6),), [In(0), 1, 2]],
    "aten.permute.default": [((2, 4, 6),), [In(0), [2, 0, 1]]],
    "aten.t.default": [((4, 6),), [In(0)]],
    "aten.unsqueeze.default": [((4, 6),), [In(0), 1]],
    "aten.squeeze.dim": [((4, 1, 6),), [In(0), 1]],
    "aten.expand.default": [((4, 1, 6),), [In(0), [-1, 12, 6]]],
    "aten.slice.Tensor": [((4, 12),), [In(0), 1, 0, 6]],
    "aten.split_with_sizes.default": [((4, 24),), [In(0), [12, 12], 1]],
    "aten.split.Tensor": [((4, 24),), [In(0), 8, -1]],
    "aten.chunk.default": [((4, 24),), [In(0), 2, -1]],
    "aten.select.int": [((4, 3, 6),), [In(0), 1, 2]],
    "aten.cat.default": [((4, 6), (4, 6)), [[In(0), In(1)], 1]],
    "aten.stack.default": [((4, 6), (4, 6)), [[In(0), In(1)], 1]],
    "aten.repeat_interleave.self_int": [((4, 1, 6),), [In(0), 12, 1]],
    "aten.new_zeros.default": [((4, 6),), [In(0), [4, 12]]],
    "aten.slice_scatter.default": [((4, 12), (4, 6)), [In(0), In(1), 1, 0, 6]],
    "aten.index_select.default": [((5, 12), "rows"), [In(0), 0, In(1)]],
    "aten.sum.dim_IntList": [((4, 5, 6),), [In(0), [1]]],
    "aten.mean.dim": [((4, 5, 6),), [In(0), [-1], True]],
    "aten.softmax.int": [((4, 5, 6),), [In(0), 1]],
    "aten.bmm.default": [((4, 5, 6), (4, 6, 12)), [In(0), In(1)]],
    "aten.matmul.default": [((2, 4, 5, 6), (4, 6, 12)), [In(0), In(1)]],
    "aten.mm.default": [((4, 6), (6, 12)), [In(0), In(1)]],
}  # fmt: skip
EVERY_SECOND = [((4, 24),), [In(0), 1, 1, 2**63 - 1, 2]]
REPEATED = [((4, 4, 6),), [In(0), 2, 1]]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("op", "shapes", "args"),
    [*((op, *rest) for op, rest in ATEN.items()), ("aten.slice.Tensor", *EVERY_SECOND),
     ("aten.repeat_interleave.self_int", *REPEATED)],
)  # fmt: skip
def test_an_operator_on_parts(op, shapes, args, ranks):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.tensor([4, 0, 2]) if shape == "rows"
        else torch.randn(shape, generator=generator, dtype=F64)
        for shape in shapes
    ]  # fmt: skip
    if op == "aten.where.self":
        tensors[0] = tensors[0] > 0
    made = get_op(op).reference(tensors, {"args": args, "kwargs": {}, "target": op})
    types = [Type(tuple(t.shape), t.dtype) for t in tensors]
    attrs = {"args": args, "kwargs": {}, "types": [Type(tuple(t.shape), t.dtype) for t in made]}
    target = {**attrs, "target": op}
    found = list(alignments(op, target, types, attrs["types"], ranks))
    assert found
    done = [check(op, attrs, types, tensors, alignment, ranks) for alignment in found]
    assert any(done) or ranks > 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_linear_keeps_sums(case):
    tensors = case.tensors(SIZES)
    floats = [p for p, t in enumerate(tensors) if t is not None and t.is_floating_point()]
    for places in ([place] for place in floats) if len(floats) > 1 else (floats,):
        summed(case, tensors, places)
    summed(case, tensors, floats)


def summed(case, tensors, places):
    """Check that an op that keeps sums makes of summands a summand."""
    if not places or not keeps_sums(case.op, case.attrs, case.types, places):
        return

    def run(number):
        given = [
            tensor * (number + 1) if place in places else tensor
            for place, tensor in enumerate(tensors)
        ]
        return get_op(case.op).reference(given, case.attrs)[0]

    one, two = run(0), run(1)
    assert torch.allclose(two, 2 * one, rtol=1e-12)
