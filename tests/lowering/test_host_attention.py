"""Attention on a CPU in C++: against fp64, in every instruction set that this machine has."""

from __future__ import annotations

import ctypes

import pytest
import torch
from attention_reference import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.kv_memory import pack_rows, unpack_rows
from graphopt.runtime import host_attention
from graphopt.runtime.host_attention import (
    Job,
    NoHostKernel,
    fill_job,
    host_kernel,
    host_memory,
    host_sum,
    levels_here,
)
from graphopt.runtime.host_step import merge

LANES = {"plain": 1, "avx2": 8, "avx512": 16, "avx512_bf16": 16}
ROUNDOFF = 2.0**-24


@st.composite
def attentions(draw):
    """An attention of few tokens: heads, sizes, lengths, dtypes, and what is done to scores."""
    groups, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    queries, batch = draw(st.sampled_from([1, 1, 2, 5])), draw(st.integers(1, 3))
    dims = [draw(st.sampled_from([8, 12, 16, 20, 32, 64, 80, 128])) for _ in range(2)]
    causal = draw(st.booleans())
    keys = queries + draw(st.sampled_from([0, 1, 60, 64, 65, 300, 1300]))
    window = draw(st.sampled_from([None, None, 1, 7, 100])) if causal else None
    return {
        "groups": groups, "group": group, "queries": queries, "batch": batch, "dims": dims,
        "keys": keys, "causal": causal, "window": window,
        "softcap": draw(st.sampled_from([None, None, 3.0])), "sinks": draw(st.booleans()),
        "kind": draw(st.sampled_from(["float32", "bfloat16", "float16", "codes"])),
        "seed": draw(st.integers(0, 2**20)),
        "lens": [draw(st.integers(queries if causal else 0, keys)) for _ in range(batch)],
    }  # fmt: skip


def made(case):
    """q, k and v as the kernel reads them, and keys and values as they count."""
    torch.manual_seed(case["seed"])
    dtype = torch.float32 if case["kind"] == "codes" else getattr(torch, case["kind"])
    heads = case["groups"] * case["group"]
    q = torch.randn(case["batch"], heads, case["queries"], case["dims"][0]).to(dtype)
    k, v = (
        torch.randn(case["batch"], case["groups"], case["keys"], dim).to(dtype)
        for dim in case["dims"]
    )
    if case["kind"] != "codes":
        return q, (k, v), (k, v)
    rows = pack_rows(k, 8), pack_rows(v, 8)
    counted = (
        unpack_rows(row, dim, 8, torch.float64) for row, dim in zip(rows, case["dims"], strict=True)
    )
    return q, rows, tuple(counted)


def bounds(case, q, k, v, level):
    """How far the output and the log-sum-exp may be from fp64.

    A score is a sum of D products, each rounded as often as a lane of a vector takes some and lanes
    are added, then scaled and capped. The exponential is off by two units of the last place. What
    scores are off by, weights are off by in proportion, twice with their sum. A block has 64 keys.
    """
    scale, dim = case["dims"][0] ** -0.5, case["dims"][0]
    wide = k.double().abs().repeat_interleave(case["group"], 1)
    largest = float((q.double().abs() @ wide.transpose(-1, -2)).amax()) if k.numel() else 0.0
    score = ROUNDOFF * largest * scale * (dim / LANES[level] + 8)
    total = 2 * score + ROUNDOFF * (64 / LANES[level] + 16)
    values = float(v.abs().max()) if v.numel() else 0.0
    sums = 2 * score + ROUNDOFF * (2 * 64 + 16)
    return sums * max(values, 1.0), total * max(1.0, float(largest * scale))


def check(case, level):
    q, rows, (k, v) = made(case)
    lens, scale = torch.tensor(case["lens"]), case["dims"][0] ** -0.5
    sinks = torch.randn(q.shape[1]) if case["sinks"] else None
    out, lse = host_attention.host_attention(
        q, *rows, lens, sinks, scale=scale, window=case["window"], softcap=case["softcap"],
        causal=case["causal"], value_dim=case["dims"][1], level=level,
    )  # fmt: skip
    fields = {name: case[name] for name in ("causal", "window", "softcap")}
    exact, total = Case(q, k, v, fields, scale, sinks=sinks, kv_lens=lens).run(torch.float64)
    of_out, of_total = bounds(case, q, k, v, level)
    assert float((out.double() - exact).abs().max()) <= of_out
    seen = total > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    if seen.any():
        assert float((lse.double() - total)[seen].abs().max()) <= of_total


@settings(max_examples=60, deadline=None)
@given(attentions(), st.data())
def test_it_is_attention(case, data):
    check(case, data.draw(st.sampled_from(levels_here())))


@pytest.mark.exhaustive
@settings(max_examples=1500, deadline=None)
@given(attentions())
def test_it_is_attention_in_every_instruction_set(case):
    for level in levels_here():
        check(case, level)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_it_does_not_depend_on_threads_or_pieces(threads):
    """A piece is a page of tokens; spans are cut at its ends."""
    torch.manual_seed(threads)
    q, lens = torch.randn(2, 6, 1, 32), torch.tensor([1500, 700])
    k, v = (torch.randn(2, 3, 1536, 32) for _ in range(2))
    expected = host_attention.host_attention(q, k, v, lens, scale=0.2)
    host_kernel().graphopt_set_threads(threads)
    try:
        for piece in (1536, 512, 96):
            cut = [x.unflatten(2, (-1, piece)).permute(2, 0, 1, 3, 4).contiguous() for x in (k, v)]
            out, lse, job = torch.empty(2, 6, 1, 32), torch.empty(2, 6, 1), Job()
            before = (lens - 1).to(torch.int32)
            fill_job(job, q, *cut, before, out, lse, width=32, own=1, scale=0.2)
            host_kernel().graphopt_host_step(ctypes.byref(job))
            assert torch.allclose(out, expected[0], atol=2e-6)
            assert torch.allclose(lse, expected[1], atol=2e-6)
    finally:
        host_kernel().graphopt_set_threads(0)


def test_a_step_is_written_behind_what_is_there_and_read_from_a_slot_on():
    """Tokens from 10 on lie in pieces of 4; the first piece is read elsewhere."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 1, 16), torch.zeros(5, 2, 1, 4, 16), torch.zeros(5, 2, 1, 4, 16)
    held = torch.tensor([23, 12], dtype=torch.int32)
    for there in (k, v):
        there[:] = torch.randn_like(there)
    new_k, new_v = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 16)
    before = [x.clone() for x in (k, v)]
    out, lse, job = torch.empty(2, 2, 1, 16), torch.empty(2, 2, 1), Job()
    fill_job(
        job, q, k, v, held, out, lse, width=16, first=10, begin=4, scale=0.25,
        new_k=new_k.data_ptr(), new_v=new_v.data_ptr(),
    )  # fmt: skip
    host_kernel().graphopt_host_step(ctypes.byref(job))
    for now, then, new in zip((k, v), before, (new_k, new_v), strict=True):
        then[3, 0, :, 1], then[0, 1, :, 2] = new[0, :, 0], new[1, :, 0]
        assert torch.equal(now, then)
    rows = [x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, 4:] for x in before]
    exact, total = Case(
        q, *rows, {"causal": False}, 0.25, kv_lens=torch.tensor([9, 0])
    ).run(torch.float64)  # fmt: skip
    assert torch.allclose(out.double(), exact, atol=1e-6)
    assert torch.allclose(lse.double(), total, atol=1e-6)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans())
def test_parts_merge_to_the_whole(seed, cuts, with_sinks):
    torch.manual_seed(seed)
    count = sum(cuts)
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, count, 8), torch.randn(1, 2, count, 8)
    sinks = torch.randn(4) if with_sinks else None
    parts = []
    for part_k, part_v in zip(k.split(cuts, 2), v.split(cuts, 2), strict=True):
        own = Case(q, part_k, part_v, {"causal": False}, 0.3)
        if part_k.shape[2]:
            parts.append(tuple(x.float() for x in own.run(torch.float64)))
        else:
            parts.append((torch.zeros(1, 4, 2, 8), torch.full((1, 4, 2), float("-inf"))))
    out, lse = merge(parts, sinks)
    if count == 0:
        assert (out == 0).all() and torch.equal(
            lse > float("-inf"), torch.full_like(lse, with_sinks) > 0
        )
        return
    exact, total = Case(q, k, v, {"causal": False}, 0.3, sinks=sinks).run(torch.float64)
    assert torch.allclose(out.double(), exact, atol=2e-6)
    assert torch.allclose(lse.double(), total, atol=2e-6)


def test_memory_is_zero_and_read_whole():
    memory = host_memory(5 * 2**20 + 12, 2**21)
    assert memory.numel() == 5 * 2**20 + 12 and not memory.any()
    words = memory.view(torch.int32)
    words[:] = torch.arange(len(words), dtype=torch.int32)
    # Sixteen sums of 32 bits a megabyte.
    assert host_sum(memory) % 2**32 == int(words.long().sum()) % 2**32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 1, 8, dtype=torch.float64)}, "queries of torch.float64"),
        ({"v": torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)}, "values of torch.bfloat16"),
        ({"k": torch.zeros(1, 1, 8, 4).transpose(2, 3)}, "strides"),
        ({"window": 3, "causal": False}, "a window without causal"),
    ],
)
def test_what_the_kernel_does_not_read_is_refused(change, message):
    given = {
        "q": torch.zeros(1, 2, 1, 8), "k": torch.zeros(1, 1, 4, 8), "v": torch.zeros(1, 1, 4, 8),
        "kv_lens": torch.tensor([4]), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        host_attention.host_attention(**(given | change))


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        NoHostKernel, match=r"no C\+\+ compiler \(no-such-compiler\).*apt install g"
    ):
        host_kernel.__wrapped__()


def test_what_is_no_program_is_no_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host_attention, "OPTIONS", ("-no-such-option",))
    with pytest.raises(NoHostKernel, match="does not compile it"):
        host_kernel.__wrapped__()
