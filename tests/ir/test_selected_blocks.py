"""Attention over selected pages of its keys: what it computes, costs, and is written as."""

from __future__ import annotations

import json

import pytest
import torch
from attention_programs import gating, selecting
from attention_reference import random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.backends.opening import open_language_model
from graphopt.compiler import emit
from graphopt.errors import LoweringError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.ir import KVLayout, Type
from graphopt.ir.ops import get_op
from graphopt.ir.ops.attention import SELECTED
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.types import B, P, S
from graphopt.ir.verify import verify

IDS = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(3))


def draws(pages):
    """Numbers of pages, each at most once: of ones there are, of none, and of ones behind."""
    return st.lists(st.sampled_from([*range(-2, pages + 2), 2**31 - 1]), min_size=1, max_size=5,
                    unique=True)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from((1, 5)), st.integers(0, 9), st.sampled_from((1, 3, 8)),
       st.sampled_from(({}, {"window": 4, "softcap": 2.0}, {"padding_mask": True, "sinks": True},
                        {"alibi": True, "bias": True, "causal": False})))  # fmt: skip
def test_it_is_attention_over_the_keys_of_the_pages(data, queries, past, page, form):
    keys = queries + past
    case = random_case((2, 4, 2, queries, keys, 8, 6), form, dtype=torch.float64)
    for name in ("slopes", "sinks"):  # which a case has in fp32
        per_head = getattr(case, name)
        setattr(case, name, None if per_head is None else per_head.double())
    pages = -(-keys // page)
    lists = [[data.draw(draws(pages)) for _ in range(2)] for _ in range(2)]
    width = max(len(row) for rows in lists for row in rows)
    selected = torch.full((2, 2, width), -1)
    case.picked = torch.zeros(2, 2, keys, dtype=torch.bool)
    for b, rows in enumerate(lists):
        for g, row in enumerate(rows):
            selected[b, g, : len(row)] = torch.tensor(row)
            for number in row:
                if number >= 0:
                    case.picked[b, g, number * page : (number + 1) * page] = True
    exact, lse = case.run(torch.float64)
    scores = case.scores(torch.float64)
    maxima = torch.full((2, 4, queries, width), float("-inf"), dtype=torch.float64)
    for b, g, m in torch.cartesian_prod(*map(torch.arange, selected.shape)).tolist():
        start = int(selected[b, g, m]) * page
        if 0 <= start < keys:
            heads = slice(2 * g, 2 * g + 2)
            maxima[b, heads, :, m] = scores[b, heads, :, start : start + page].amax(-1)
    attrs = {"causal": True, "window": None, "softcap": None, **form, "scale": case.scale,
             "page": page, "page_max": page, "lse": True}  # fmt: skip
    attrs = {key: value for key, value in attrs.items() if get_op("attention").attributes.get(key)}
    operands = [case.q, case.k[:, :, past:], case.v[:, :, past:], case.mask, case.bias,
                case.slopes, case.sinks, None, None, selected]  # fmt: skip
    if past:
        operands[7:9] = case.k[:, :, :past], case.v[:, :, :past]
    for run in (get_op("attention").reference, get_op("attention").torch):
        found = run(operands, attrs)
        torch.testing.assert_close(found[0], exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[-2].double(), lse, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[-1].double(), maxima, rtol=1e-10, atol=1e-10)
        plain = run(operands, {**attrs, "lse": False, "page_max": None})
        assert len(plain) == (3 if past else 1)
        torch.testing.assert_close(plain[0], exact, rtol=1e-10, atol=1e-10)


def test_all_pages_are_attention_over_all_keys():
    whole = selecting(4, KVLayout("paged", 4), lists=[[2, 0, 1, 3, 4, 5]] * 2)
    plain = selecting(64, KVLayout(), lists=[[0]] * 2)
    one, other = (Runner(p, torch.float64).logits({"input_ids": IDS}) for p in (whole, plain))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bytes_and_operations_follow_the_selected_pages():
    op = get_op("attention")
    q = Type((B, 4, S, 8), torch.float16)
    new = Type((B, 2, S, 8), torch.float16)
    past = Type((B, 2, P, 8), torch.float16)
    lists = Type((B, 2, 3), torch.int32)
    attrs = {"scale": 1.0, "causal": True}
    plain = [q, new, new, None, None, None, None, past, past]
    sizes = {B: 1, S: 1, P: 1023}

    def cost(operands, attrs):
        outputs = op.infer(operands, attrs)
        found = op.bytes(operands, outputs, attrs), op.flops(operands, outputs, attrs)
        return [int(value.subs(sizes)) for value in found]

    bytes_all, flops_all = cost(plain, attrs)
    bytes_few, flops_few = cost([*plain, lists], {**attrs, "page": 16})
    # q and o, the list, 48 keys and values of 2 heads read, and one of each written.
    assert bytes_few == 2 * 4 * 8 * 2 + 2 * 3 * 4 + (48 + 1) * 2 * (8 + 8) * 2
    assert flops_few * 1024 == flops_all * 48
    assert bytes_all > 20 * bytes_few
    # Never more than there are.
    sizes[P] = 15
    assert cost([*plain, lists], {**attrs, "page": 16})[1] == cost(plain, attrs)[1]


def test_it_is_written_and_read_back():
    program = selecting(4, KVLayout("paged", 4))
    text = print_program(program)
    assert "selected_blocks=" in text and "page=4" in text
    values = {weight.name: weight.load() for weight in program.weights}
    again = parse_program(text, values)
    saved = json.loads(json.dumps(program_to_json(program)))
    loaded = program_from_json(saved, {w.name: w.producer for w in program.weights})
    expected = Runner(program, torch.float64).logits({"input_ids": IDS})
    for other in (again, loaded):
        assert print_program(other) == text
        assert Runner(other, torch.float64).logits({"input_ids": IDS}).equal(expected)


def test_what_makes_no_sense_is_refused():
    program = selecting(4, KVLayout("paged", 4))
    (node,) = (n for n in program.functions["block"].nodes if n.op == "attention")
    for changes, message in (
        ({"page": None}, "selected_blocks and the attribute page come together"),
        ({"page_max": 8}, "maxima of pages of 8 keys, selected by pages of 4"),
    ):
        before = dict(node.attrs)
        node.attrs.update(changes)
        with pytest.raises(VerifyError, match=message):
            verify(program)
        node.attrs = before
    listed, node.inputs[SELECTED] = node.inputs[SELECTED], node.inputs[0]
    with pytest.raises(VerifyError, match=r"give whole numbers \[B, 2, M\]"):
        verify(program)
    node.inputs[SELECTED] = listed
    with pytest.raises(VerifyError, match="sees all keys, and a ring of 4"):
        selecting(4, KVLayout("ring", 4))
    with pytest.raises(VerifyError, match="pages begin at positions that a ring does not keep"):
        selecting(4, KVLayout("ring", 4), window=3, layers=1)


def test_an_onnx_graph_has_no_place_for_it(tmp_path):
    with pytest.raises(LoweringError, match="reads selected pages, which an ONNX graph has no"):
        emit(selecting(4, KVLayout()), tmp_path / "out", emit=("onnx",))


@pytest.mark.parametrize("page_max", [None, 4])
def test_torch_for_the_cpu_computes_it(page_max, tmp_path):
    program = gating(selecting(4, KVLayout()), page_max)
    emit(program, tmp_path / "out", emit=("torch",))
    model = open_language_model(str(tmp_path / "out"), "torch")
    expected = Runner(program).logits({"input_ids": IDS})
    torch.testing.assert_close(model.logits(IDS), expected, rtol=1e-4, atol=1e-5)
