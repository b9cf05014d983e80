"""The attentions that the Volta kernels are compiled and checked for, and how they are checked."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

import torch
from attention_reference import random_case

from graphopt.lowering.kernels import plan_attention
from graphopt.lowering.kernels.volta_cuda import volta_constants
from graphopt.plan import AttentionSpec
from graphopt.runtime.attention import Extras, Keys, decode, prefill
from graphopt.targets import get_target

HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
LENGTHS = (1, 7, 63, 64, 65, 127, 1000)
UNEQUAL = ((7, 64), (64, 7), (65, 127), (127, 1000), (1000, 65))
RING = 128
EVERYTHING = {
    "window": 30, "softcap": 3.0, "padding_mask": True, "bias": True, "alibi": True, "sinks": True,
    "kv_lens": True, "lse": True,
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One set of constants.

    Attributes:
        size: Of a head; `value_size` where the value's differs.
        fields: What else AttentionSpec has.
        tiles: Those that are not as planned.
    """

    size: int
    fields: dict = field(default_factory=dict)
    heads: int = 4
    groups: int = 2
    value_size: int | None = None
    tiles: dict = field(default_factory=dict)
    bias_bits: int = 16

    def spec(self):
        return AttentionSpec(
            head_dim=self.size, value_dim=self.value_size, heads=self.heads, kv_heads=self.groups,
            **{"lse": True, **self.fields},
        )  # fmt: skip

    def plan(self):
        return plan_attention(self.spec(), get_target("volta"))

    def constants(self):
        ring = RING if self.fields.get("kv") == "ring" else 0
        found = volta_constants(self.plan(), ring=ring, bias_bits=self.bias_bits)
        return {**found, **self.tiles}


def _forms():
    shared = {"P_PATH": 1}
    paged = {"kv": "paged", "kv_lens": True}
    found = {f"causal {size}": Form(size) for size in HEAD_SIZES}
    found |= {f"full {size}": Form(size, {"causal": False}) for size in (32, 64, 128, 256)}
    found |= {
        "no log-sum-exp": Form(64, {"lse": False}),
        "top left 64": Form(64, {"align": "top-left"}),
        "top left 128": Form(128, {"align": "top-left"}),
        "key mask 64": Form(64, {"padding_mask": True}),
        "key mask 256": Form(256, {"padding_mask": True}),
        "full, key mask 96": Form(96, {"causal": False, "padding_mask": True}),
        "window 80": Form(80, {"window": 20}),
        "window 128": Form(128, {"window": 100}),
        "window, top left 96": Form(96, {"window": 9, "align": "top-left"}),
        "chunk 64": Form(64, {"chunk": 24}),
        "softcap 128": Form(128, {"softcap": 2.0}),
        "softcap 256": Form(256, {"softcap": 30.0}),
        "alibi 64": Form(64, {"alibi": True}),
        "alibi, key mask 128": Form(128, {"alibi": True, "padding_mask": True}),
        "bias 64": Form(64, {"bias": True, "causal": False}),
        "bias in fp32 128": Form(128, {"bias": True}, bias_bits=32),
        "sinks 192": Form(192, {"sinks": True}),
        "lengths 80": Form(80, {"kv_lens": True}),
        "one key head 128": Form(128, heads=4, groups=1),
        "as many key heads 64": Form(64, heads=3, groups=3),
        "varlen 64": Form(64, {"varlen": True}),
        "varlen, window 128": Form(128, {"varlen": True, "window": 10}),
        "varlen, full, softcap 80": Form(80, {"varlen": True, "causal": False, "softcap": 2.0}),
        "pages of 16, 64": Form(64, {**paged, "page": 16}),
        "pages of 24, window 128": Form(128, {**paged, "page": 24, "window": 50}),
        "pages of 64, 192": Form(192, {**paged, "page": 64}),
        "ring 64": Form(64, {"kv": "ring", "kv_lens": True, "window": 40}),
        "unequal 192 128": Form(192, value_size=128),
        "unequal 40 72": Form(40, {"causal": False}, value_size=72),
        "everything 64": Form(64, EVERYTHING),
        "everything 256": Form(256, EVERYTHING),
        "weights in shared memory 64": Form(64, tiles=shared),
        "weights in shared memory 80": Form(80, {"window": 30}, tiles=shared),
        "weights in shared memory 256": Form(256, tiles={**shared, "BLOCK_N": 16}),
    }
    for size in HEAD_SIZES:
        found[f"decode {size}"] = Form(size, {"phase": "decode"})
    found |= {
        "decode, one key head 128": Form(128, {"phase": "decode"}, heads=20, groups=1),
        "decode, one key head 64": Form(64, {"phase": "decode", "window": 50}, heads=40, groups=1),
        "decode, pages of 16, 64": Form(64, {**paged, "page": 16, "phase": "decode"}),
        "decode, ring 128": Form(128, {"kv": "ring", "kv_lens": True, "phase": "decode"}),
        "decode, everything 128": Form(128, {**EVERYTHING, "phase": "decode"}),
        "decode, unequal 40 72": Form(40, {"phase": "decode"}, value_size=72),
        "decode, weights in shared memory 64": Form(64, {"phase": "decode"}, tiles=shared),
    }
    return found


FORMS = _forms()


def file_name(name):
    """Return what the PTX of a form is called."""
    return re.sub(r"[^a-z0-9]+", "-", name) + ".ptx"


def sizes_of(form, lengths=LENGTHS, unequal=UNEQUAL):
    """The query and key tokens that a form is checked with."""
    if form.fields.get("kv") == "ring":
        return [(1 if form.fields.get("phase") == "decode" else 20, RING)]
    if form.fields.get("phase") == "decode":
        return [(1, t) for t in lengths] + [(3, t) for t in lengths if t >= 3]
    return [(t, t) for t in lengths] + list(unequal)


def case_of(form, queries, keys, seed=0, batch=2):
    """Random operands of a form; the log-sum-exp of a row of no key is -inf."""
    fields = {k: v for k, v in form.fields.items() if k not in ("varlen", "phase")}
    sizes = (batch, form.heads, form.groups, queries, keys, form.size, form.value_size or form.size)
    case = random_case(sizes, fields, seed=seed)
    if case.bias is not None and form.bias_bits == 32:
        case.bias = case.bias.float()
    return case


def held(form, case):
    """The keys of a case as its form holds them."""
    if form.fields.get("kv") == "paged":
        return paged(case, form.fields["page"])
    if form.fields.get("kv") == "ring":
        count = case.k.shape[2]
        first = torch.tensor([0, count - 20])
        slots = (torch.arange(count)[None] + first[:, None]) % count
        index = slots[:, None, :, None]
        k, v = (torch.zeros_like(x).scatter(2, index.expand_as(x), x) for x in (case.k, case.v))
        return Keys(k, v, kv_lens=case.kv_lens, ring_start=first)
    return Keys(case.k, case.v, kv_lens=case.kv_lens)


def paged(case, page, seed=0):
    """The keys of a case as pages in random order, with pages of noise between them."""
    batch, groups, count, _ = case.k.shape
    per_row = -(-count // page)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * batch * per_row, generator=generator)[: batch * per_row]
    table = order.view(batch, per_row)
    pools = []
    for source in (case.k, case.v):
        pool = torch.randn(2 * batch * per_row, groups, page, source.shape[3]).to(source.dtype)
        for b in range(batch):
            for n in range(per_row):
                piece = source[b, :, n * page : (n + 1) * page]
                pool[table[b, n], :, : piece.shape[1]] = piece
        pools.append(pool)
    return Keys(*pools, kv_lens=case.kv_lens, block_table=table)


def moved(item, device):
    """A dataclass of tensors, or a tensor, on the device; what is None stays so."""
    if isinstance(item, torch.Tensor):
        return item.to(device)
    if dataclasses.is_dataclass(item):
        changes = {f.name: moved(getattr(item, f.name), device) for f in dataclasses.fields(item)}
        return dataclasses.replace(item, **changes)
    return item


def run(form, kernels, constants, case, device="cpu", splits=None):
    """The output and the log-sum-exp of a case."""
    extras = moved(Extras(case.mask, case.bias, case.slopes, None, case.sinks), device)
    q, keys = moved(case.q, device), moved(held(form, case), device)
    if constants["DECODE"]:
        out, lse, _ = decode(
            *kernels, q, keys, constants, scale=case.scale, extras=extras, splits=splits
        )
        return out, lse
    return prefill(kernels, q, keys, constants, scale=case.scale, extras=extras)[:2]


def close(out, lse, case):
    """Check a result against fp64."""
    exact, bound = case.bound()
    assert torch.isfinite(out).all()
    error = (out.cpu().double() - exact).abs().max().item()
    assert error <= bound, f"an error of {error:.2e}, above {bound:.2e}"
    if lse is not None:
        _, expected = case.run(torch.float64)
        # A score is a sum of D products in fp32; its error is below D roundings of its size.
        torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=1e-4)


def check(form, kernels, constants, device="cpu", lengths=LENGTHS, unequal=UNEQUAL):
    """Check a form with all its lengths."""
    if form.fields.get("varlen"):
        return check_varlen(form, kernels, constants, device, lengths, unequal)
    for number, (queries, keys) in enumerate(sizes_of(form, lengths, unequal)):
        case = case_of(form, queries, keys, seed=number)
        for splits in (None, 1, 5) if constants["DECODE"] else (None,):
            close(*run(form, kernels, constants, case, device, splits), case)
    return None


def check_varlen(form, kernels, constants, device="cpu", lengths=LENGTHS, unequal=UNEQUAL):
    """Check sequences one behind the other: each has the result it has alone."""
    pairs = [(n, n) for n in lengths] + list(unequal)
    cases = [case_of(form, s, t, seed=i, batch=1) for i, (s, t) in enumerate(pairs)]
    q, k, v = (torch.cat([getattr(c, n) for c in cases], 2) for n in "qkv")
    ends = [torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in zip(*pairs, strict=True)]
    out, lse, _ = prefill(
        kernels, q.to(device), moved(Keys(k, v, cu_seqlens=ends[1]), device), constants,
        scale=cases[0].scale, cu_seqlens_q=ends[0].to(device),
        max_seqlen_q=max(s for s, _ in pairs),
    )  # fmt: skip
    for case, start, end in zip(cases, ends[0][:-1], ends[0][1:], strict=True):
        close(out[:, :, start:end], lse[:, :, start:end], case)
