"""The log-sum-exp and the page maxima of attention."""

from __future__ import annotations

import pytest
import torch
from attention_reference import random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.backends.opening import open_language_model
from graphopt.compiler import emit
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Program, Type
from graphopt.ir.ops import get_op
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, P, S
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

FORMS = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "window": st.sampled_from((None, 4)),
        "chunk": st.sampled_from((None, 5)),
        "softcap": st.sampled_from((None, 2.0)),
        "padding_mask": st.booleans(),
        "bias": st.booleans(),
        "alibi": st.booleans(),
        "sinks": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(FORMS, st.sampled_from((1, 7, 13)), st.integers(0, 6), st.sampled_from((1, 4, 16)))
def test_they_are_those_of_the_attention_written_out(form, queries, past, page):
    keys = queries + past
    case = random_case((2, 4, 2, queries, keys, 8, 6), form, dtype=torch.float64)
    attrs = {key: form[key] for key in ("causal", "window", "chunk", "softcap")}
    attrs |= {"scale": case.scale, "lse": True, "page_max": page}
    k, v = case.k[:, :, past:], case.v[:, :, past:]
    for name in ("slopes", "sinks"):  # which a case has in fp32
        per_head = getattr(case, name)
        setattr(case, name, None if per_head is None else per_head.double())
    extras = [case.mask, case.bias, case.slopes, case.sinks]
    pasts = [case.k[:, :, :past], case.v[:, :, :past]] if past else []
    out, lse = case.run(torch.float64)
    scores = case.scores(torch.float64)
    pages = -(-keys // page)
    maxima = torch.full((*scores.shape[:3], pages), float("-inf"), dtype=torch.float64)
    for number in range(pages):
        maxima[..., number] = scores[..., number * page : (number + 1) * page].amax(-1)
    for run in (get_op("attention").reference, get_op("attention").torch):
        found = run([case.q, k, v, *extras, *pasts], attrs)
        assert len(found) == (5 if past else 3)
        torch.testing.assert_close(found[0], out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[-2].double(), lse, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[-1].double(), maxima, rtol=1e-10, atol=1e-10)


def test_halves_of_the_keys_merge_by_their_log_sum_exp():
    """What the result is for: attentions over parts of the keys make that over all."""
    case = random_case((2, 4, 2, 3, 20, 8, 8), {"causal": False}, dtype=torch.float64)
    attrs = {"scale": case.scale, "causal": False, "lse": True}
    op = get_op("attention")
    whole, total = op.torch([case.q, case.k, case.v], attrs)
    (a, lse_a), (b, lse_b) = (
        op.torch([case.q, case.k[:, :, part], case.v[:, :, part]], attrs)
        for part in (slice(0, 12), slice(12, 20))
    )
    merged = torch.logaddexp(lse_a, lse_b)
    weights = [torch.exp(lse - merged)[..., None] for lse in (lse_a, lse_b)]
    torch.testing.assert_close(merged, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights[0] * a + weights[1] * b, whole, rtol=1e-12, atol=1e-12)


def with_results(cache: bool) -> Program:
    """A program whose last layer also returns the statistics of its attention."""
    program = tiny_program(layers=1)
    function = program.functions["block"]
    (node,) = (node for node in function.nodes if node.op == "attention")
    node.attrs |= {"lse": True, "page_max": 4}
    attention = function.add(
        "attention", node.inputs, node.attrs, ["b", "lse", "top"], outputs=3, before=node
    )
    function.replace(node.output, attention.outputs[0])
    function.nodes.remove(node)
    function.results += attention.outputs[1:]
    program.calls[1].results += ["lse", "top"]
    program.outputs += ["lse", "top"]
    verify(program)
    return InsertKVCache().run(program, Context()).program if cache else program


@pytest.mark.parametrize("cache", [False, True])
def test_types(cache):
    program = with_results(cache)
    verify(program)
    carried = infer_program(program)[1]
    assert carried["lse"] == Type((B, 4, S), torch.float32)
    keys = P + S if cache else S
    assert [carried["top"].shape[-1].subs({S: s, P: 3}) for s in (1, 4, 6)] == [
        -(-int(keys.subs({S: s, P: 3})) // 4) for s in (1, 4, 6)
    ]


@pytest.mark.parametrize("cache", [False, True])
def test_emitted_models_compute_the_same(cache, tmp_path):
    program = with_results(cache)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, lse, top = Runner(program).run({"input_ids": ids})[0]
    expected = Runner(program, torch.float64, mode="reference").run({"input_ids": ids})[0]
    for found, wanted in zip((logits, lse, top), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    program.outputs = program.outputs[:1]
    emit(program, tmp_path / "out", target="cpu", emit=("torch",))
    model = open_language_model(str(tmp_path / "out"), "torch")
    torch.testing.assert_close(model.logits(ids), logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_emitted_says_why(tmp_path):
    program = with_results(cache=True)
    with pytest.raises(LoweringError, match="or page maxima, which an ONNX graph has no place"):
        emit(program, tmp_path / "out", emit=("onnx",))
