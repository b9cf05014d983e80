"""The Triton kernels against fp64: on a CUDA device where there is one, else interpreted."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_reference import random_case
from interpreted import leave_out_idle_work
from sampling import exhaustive_but, slow_but

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from graphopt.lowering.kernels import plan_attention  # noqa: E402
from graphopt.lowering.kernels.family import runtime_text  # noqa: E402
from graphopt.lowering.kernels.triton import kernel_constants  # noqa: E402
from graphopt.lowering.triton.specialise import specialise  # noqa: E402
from graphopt.plan import AttentionSpec  # noqa: E402
from graphopt.runtime.attention import (  # noqa: E402
    Extras,
    Keys,
    decode,
    prefill,
    rows_aligned,
    splits_of,
)
from graphopt.runtime.kernels.decode import attention_decode, attention_merge  # noqa: E402
from graphopt.runtime.kernels.prefill import attention_prefill  # noqa: E402
from graphopt.targets import get_target  # noqa: E402

ROOT = Path(__file__).parents[2]
FORMS = {
    "causal": {},
    "full": {"causal": False},
    "top left": {"align": "top-left"},
    "window": {"window": 20},
    "window, top left": {"window": 9, "align": "top-left"},
    "chunk": {"chunk": 24},
    "softcap": {"softcap": 2.0},
    "key mask": {"padding_mask": True},
    "full, key mask": {"causal": False, "padding_mask": True},
    "bias": {"bias": True, "causal": False},
    "alibi": {"alibi": True},
    "alibi, key mask": {"alibi": True, "padding_mask": True},
    "sinks": {"sinks": True},
    "kv_lens": {"kv_lens": True},
    "everything": {"window": 30, "softcap": 3.0, "padding_mask": True, "bias": True, "alibi": True,
                   "sinks": True, "kv_lens": True},
    "chunk, full": {"chunk": 24, "causal": False},
}  # fmt: skip
HEAD_SIZES = (32, 40, 64, 72, 80, 96, 128, 192, 256)
# The interpreter multiplies bf16 as if it were integers.
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
LENGTHS = (1, 7, 63, 64, 65, 127)
EVERY_FORM = exhaustive_but(
    FORMS, "causal", "window, top left", "chunk, full", "bias", "alibi, key mask", "sinks",
    "everything",
)  # fmt: skip
EVERY_HEAD_SIZE = exhaustive_but(HEAD_SIZES, 32, 64, 72, 256)


def planned(case, phase="prefill", **changes):
    """The constants for a case; small blocks, so that small inputs cross several."""
    heads, groups = case.q.shape[1], case.k.shape[1]
    dtype = {torch.float16: "f16", torch.bfloat16: "bf16"}[case.q.dtype]
    spec = AttentionSpec(
        head_dim=case.q.shape[3], value_dim=case.v.shape[3], heads=heads, kv_heads=groups,
        dtype=dtype, phase=phase, lse=True, **case.fields,
    )  # fmt: skip
    plan = plan_attention(spec, dataclasses.replace(get_target("ampere"), kernels=("triton",)))
    tiles = {"BLOCK_N": 16, "SPAN": 64} if phase == "decode" else {"BLOCK_M": 32, "BLOCK_N": 32}
    plan = dataclasses.replace(plan, tiles={**plan.tiles, "num_warps": 4, "num_stages": 1, **tiles})
    return {**kernel_constants(plan), **changes}


def on_device(item):
    """A dataclass of tensors, or a tensor, on the device; what is None stays so."""
    if isinstance(item, torch.Tensor):
        return item.to(DEVICE)
    if dataclasses.is_dataclass(item):
        changes = {f.name: on_device(getattr(item, f.name)) for f in dataclasses.fields(item)}
        return dataclasses.replace(item, **changes)
    return item


def operands(case, keys=None):
    extras = Extras(case.mask, case.bias, case.slopes, None, case.sinks)
    keys = keys or Keys(case.k, case.v, kv_lens=case.kv_lens)
    return on_device(case.q), on_device(keys), on_device(extras)


def close(found, lse, case):
    exact, bound = case.bound()
    assert torch.isfinite(found).all()
    assert (found.cpu().double() - exact).abs().max().item() <= bound
    _, expected = case.run(torch.float64)
    # A score is a sum of D products in fp32; its error is below D roundings of its size.
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=1e-4)


def check_prefill(case, keys=None, **changes):
    q, keys, extras = operands(case, keys)
    out, lse, page_max = prefill(
        attention_prefill, q, keys, planned(case, **changes), scale=case.scale, extras=extras
    )
    close(out, lse, case)
    return out, page_max


def check_decode(case, keys=None, splits=None, **changes):
    q, keys, extras = operands(case, keys)
    constants = planned(case, "decode", **changes)
    out, lse, page_max = decode(
        attention_decode, attention_merge, q, keys, constants,
        scale=case.scale, extras=extras, splits=splits,
    )  # fmt: skip
    close(out, lse, case)
    return out, page_max


def sizes_of(form, width=None):
    """A head size and lengths for a form: all of them are met over the forms."""
    number = list(FORMS).index(form)
    width = width or HEAD_SIZES[number % len(HEAD_SIZES)]
    queries, keys = LENGTHS[number % 6], LENGTHS[(number + 3) % 6]
    return width, queries, keys


@pytest.mark.slow
@pytest.mark.parametrize("form", EVERY_FORM)
def test_prefill_of_every_form(form):
    width, queries, keys = sizes_of(form)
    # Every pair of several rows, several heads of a group, and several groups is met.
    for heads, s, t in (
        ((1, 2, 2), queries, queries),
        ((1, 4, 2), queries, keys),
        ((2, 2, 1), 65, 65),
        ((2, 2, 2), 7, 40),
    ):
        check_prefill(random_case((*heads, s, t, width, width), FORMS[form], seed=s))


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted")
def test_the_interpreter_without_idle_work_gives_the_same_bits(monkeypatch):
    case = random_case((1, 2, 1, 4, 40, 40, 40), FORMS["everything"])
    fast = check_prefill(case)[0], check_decode(case, splits=2)[0]
    for changed in leave_out_idle_work():
        monkeypatch.setattr(*changed)
    assert all(map(torch.equal, fast, (check_prefill(case)[0], check_decode(case, splits=2)[0])))


@pytest.mark.parametrize("width", EVERY_HEAD_SIZE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_of_every_head_size(width, dtype):
    for length in (1, 7, 64, 127):
        check_prefill(random_case((1, 2, 1, length, length, width, width), {}, dtype=dtype))
    check_prefill(random_case((1, 2, 2, 33, 40, width, 48), {"causal": False}, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("form", EVERY_FORM)
def test_decode_of_every_form(form):
    width, _, keys = sizes_of(form)
    # As above: every pair of several rows, several heads of a group, and several groups.
    for heads, s, t, splits in (
        ((1, 4, 2), 1, keys, None),
        ((2, 2, 1), 1, 127, 5),
        ((2, 2, 1), 3, 65, 2),
        ((2, 2, 2), 2, 7, 1),
    ):
        fields = FORMS[form]
        check_decode(random_case((*heads, s, t, width, width), fields, seed=t), splits=splits)


@pytest.mark.slow
@pytest.mark.parametrize("width", EVERY_HEAD_SIZE)
def test_decode_of_every_head_size_and_group(width):
    for heads, groups in ((4, 4), (6, 2), (20, 1)):
        check_decode(random_case((1, heads, groups, 1, 70, width, width), {}), splits=3)
    for dtype in DTYPES:
        check_decode(random_case((1, 2, 1, 1, 33, width, 48), {}, dtype=dtype))


@pytest.mark.slow
def test_split_and_unsplit_agree_and_runs_repeat():
    case = random_case((1, 4, 2, 1, 200, 64, 64), {"window": 150})
    whole, _ = check_decode(case, splits=1)
    for splits in (2, 3, 7, 13):
        found, _ = check_decode(case, splits=splits)
        again, _ = check_decode(case, splits=splits)
        assert torch.equal(found, again)
        # Two results within the bound of one another's distance to the exact one.
        assert (found.double() - whole.double()).abs().max().item() <= 2 * case.bound()[1]


@pytest.mark.slow
def test_a_row_does_not_hang_on_its_batch():
    case = random_case((3, 4, 2, 1, 300, 32, 32), {})
    out, _ = check_decode(case)
    alone = dataclasses.replace(case, q=case.q[1:2], k=case.k[1:2], v=case.v[1:2])
    assert torch.equal(out[1:2], check_decode(alone)[0])
    assert splits_of(300, planned(case, "decode")) > 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_rows_that_see_nothing_are_zero(phase):
    def check(case):
        return (check_prefill(case) if phase == "prefill" else check_decode(case, splits=2))[0]

    case = random_case((2, 2, 1, 5, 40, 32, 32), {"padding_mask": True, "sinks": True})
    case.mask[1] = 0
    out = check(case)
    assert out[1].eq(0).all() and out[0].ne(0).any()
    # More queries than keys: the first stand before all keys.
    case = random_case((1, 2, 1, 9, 4, 32, 32), {})
    assert check(case)[0, :, :5].eq(0).all()


def test_scores_far_from_zero_stay_finite():
    for sign in (1, -1):
        case = random_case((1, 1, 1, 40, 40, 64, 64), {})
        case.q[:], case.k[:] = 60.0, 125.0 * sign
        case.k[..., 0] += torch.arange(40).to(torch.float16) % 7
        assert 5.9e4 < case.scores(torch.float64).abs().nan_to_num(0, posinf=0).max() < 6.1e4
        check_prefill(case)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_prefill, check_decode])
def test_queries_before_all_keys_are_in_no_chunk(check):
    fields = {"chunk": 24, "causal": False}
    check(random_case((2, 2, 1, 36, 9, 32, 32), {**fields, "kv_lens": True}))
    check(random_case((1, 2, 1, 40, 30, 32, 32), fields))


@pytest.mark.parametrize("check", [check_prefill, check_decode])
def test_rows_that_begin_anywhere_are_copied(check):
    case = random_case((2, 2, 1, 7, 40, 40, 72), {})
    for name in "qkv":
        x = getattr(case, name)
        wide = torch.zeros(*x.shape[:3], x.shape[3] + 1, dtype=x.dtype)
        setattr(case, name, wide[..., 1:].copy_(x))
    assert not any(rows_aligned(getattr(case, name)) for name in "qkv")
    check(case)


def test_an_output_that_begins_anywhere_is_written():
    case = random_case((1, 2, 1, 12, 12, 40, 40), {})
    q, keys, extras = operands(case)
    for phase, run in (("prefill", (prefill, attention_prefill)),
                       ("decode", (decode, attention_decode, attention_merge))):  # fmt: skip
        out = torch.zeros(1, 2, 12, 41, dtype=q.dtype, device=DEVICE)[..., 1:]
        found, lse, _ = run[0](
            *run[1:], q, keys, planned(case, phase), scale=case.scale, extras=extras, out=out
        )
        assert found is out
        close(out, lse, case)


@pytest.mark.parametrize("form", ["kv_lens", "sinks"])
def test_of_one_span_nothing_is_merged_but_sinks(form):
    case = random_case((2, 6, 2, 1, 40, 40, 32), FORMS[form])
    q, keys, extras = operands(case)
    constants = planned(case, "decode", LSE=False)

    class Refused:
        arg_names = ()

        def __getitem__(self, grid):
            raise AssertionError("a merge of one span")

    merge = attention_merge if form == "sinks" else Refused()
    options = {"scale": case.scale, "extras": extras}
    whole = decode(attention_decode, attention_merge, q, keys, constants, splits=1, **options)[0]
    out = torch.zeros(2, 1, 6, 32, dtype=q.dtype, device=DEVICE).transpose(1, 2)
    for given in (None, out):
        found, lse, _ = decode(
            attention_decode, merge, q, keys, constants, splits=1, rounds=True, out=given, **options
        )
        assert lse is None and torch.equal(found, whole)
    assert torch.equal(out, whole)
    # The heads of a token lie apart: its parts are put together elsewhere.
    apart = torch.zeros(2, 6, 1, 48, dtype=q.dtype, device=DEVICE)[..., :32]
    decode(
        attention_decode, attention_merge, q, keys, constants, splits=1, rounds=True, out=apart,
        **options,
    )  # fmt: skip
    assert torch.equal(apart, whole)


def test_rows_are_aligned_by_the_axes_that_are_followed():
    x = torch.zeros(4, 3, 8, 40, dtype=torch.float16)
    assert rows_aligned(x) and rows_aligned(x.transpose(1, 2)) and rows_aligned(x[:, :1])
    assert not rows_aligned(torch.zeros(3844, dtype=torch.float16)[4:].view(4, 3, 8, 40))
    odd = torch.zeros(1, 3, 8, 40, dtype=torch.float16).as_strided((1, 3, 8, 40), (1, 320, 40, 1))
    assert rows_aligned(odd)


@pytest.mark.parametrize("check", [check_prefill, check_decode])
def test_a_length_beyond_the_cache_is_that_of_the_cache(check):
    case = random_case((2, 2, 1, 5, 40, 32, 32), {"kv_lens": True})
    case.kv_lens = torch.tensor([40, 40])
    q, keys, extras = operands(case)
    keys = dataclasses.replace(keys, kv_lens=torch.tensor([41, 1000], device=DEVICE))
    phase, run = ("prefill", (prefill, attention_prefill))
    if check is check_decode:
        phase, run = ("decode", (decode, attention_decode, attention_merge))
    out, lse, _ = run[0](*run[1:], q, keys, planned(case, phase), scale=case.scale, extras=extras)
    close(out, lse, case)


class OutOfResources(Exception):
    """By the name of Triton's."""


class Cramped:
    """A kernel that finds too little memory for more than one stage of 16 keys."""

    def __init__(self, kernel, needs):
        self.kernel, self.arg_names, self.needs, self.refused = kernel, kernel.arg_names, needs, 0

    def __getitem__(self, grid):
        def run(**given):
            if given["num_stages"] * given["BLOCK_N"] > self.needs:
                self.refused += 1
                raise OutOfResources
            return self.kernel[grid](**given)

        return run


@pytest.mark.slow
def test_smaller_tiles_run_where_there_is_less_memory_than_was_planned_for():
    case = random_case((1, 2, 1, 70, 90, 32, 32), {})
    q, keys, extras = operands(case)
    options = {"scale": case.scale, "extras": extras}
    kernel = Cramped(attention_prefill, 16)
    out, lse, _ = prefill(kernel, q, keys, planned(case, num_stages=3), **options)
    close(out, lse, case)
    assert kernel.refused == 3
    kernel = Cramped(attention_decode, 16)
    constants = planned(case, "decode", num_stages=2)
    out, lse, _ = decode(kernel, attention_merge, q, keys, constants, **options)
    close(out, lse, case)
    assert kernel.refused == 1
    with pytest.raises(OutOfResources):
        prefill(Cramped(attention_prefill, 8), q, keys, planned(case), **options)


@pytest.mark.slow
def test_sequences_one_behind_the_other():
    lengths = ((5, 5), (64, 64), (1, 33), (40, 3))
    for fields in ({}, {"window": 10}, {"causal": False, "softcap": 2.0}):
        cases = [
            random_case((1, 4, 2, s, t, 64, 64), fields, seed=i) for i, (s, t) in enumerate(lengths)
        ]
        q, k, v = (torch.cat([getattr(c, n) for c in cases], 2) for n in "qkv")
        ends = [torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in zip(*lengths, strict=True)]
        joined = dataclasses.replace(cases[0], q=q, k=k, v=v, fields={**fields, "varlen": True})
        keys = on_device(Keys(k, v, cu_seqlens=ends[1]))
        out, lse, _ = prefill(
            attention_prefill, on_device(q), keys, planned(joined),
            scale=joined.scale, cu_seqlens_q=on_device(ends[0]), max_seqlen_q=64,
        )  # fmt: skip
        for case, start, end in zip(cases, ends[0][:-1], ends[0][1:], strict=True):
            close(out[:, :, start:end], lse[:, :, start:end], case)


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


@pytest.mark.slow
@pytest.mark.parametrize("page", slow_but((16, 24, 64), 24))
def test_pages(page):
    fields = {"kv": "paged", "page": page, "kv_lens": True}
    for form in ({}, {"window": 20, "softcap": 2.0}):
        case = random_case((2, 4, 2, 30, 100, 64, 64), {**form, **fields})
        check_prefill(case, paged(case, page))
        case = random_case((2, 4, 2, 1, 100, 80, 80), {**form, **fields})
        check_decode(case, paged(case, page), splits=3)


def picked(case, lists, page):
    """bool [B, G, T]: keys of the pages that are listed."""
    found = torch.zeros(case.k.shape[:3], dtype=torch.bool)
    for at in itertools.product(*map(range, found.shape[:2])):
        for number in lists[at][lists[at] >= 0]:
            found[at][number * page : (number + 1) * page] = True
    return found


def check_maxima(found, case, lists, page):
    scores = case.scores(torch.float64)
    assert found.shape == (*scores.shape[:3], lists.shape[2])
    group = case.q.shape[1] // case.k.shape[1]
    for b, head, slot in itertools.product(*map(range, (*scores.shape[:2], lists.shape[2]))):
        number = lists[b, head // group, slot]
        expected = scores.new_full(scores.shape[2:3], float("-inf"))
        # A negative number names no page: such a slot has seen nothing.
        if number >= 0 and number * page < scores.shape[3]:
            expected = scores[b, head, :, number * page : (number + 1) * page].amax(-1)
        torch.testing.assert_close(
            found[b, head, :, slot].cpu().double(), expected, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("page", slow_but((16, 32, 64), 16))
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_selected_blocks_and_their_maxima(phase, page):
    fields = {"kv": "paged", "page": page, "kv_lens": True, "selected_blocks": True}
    heads, check = (2, 4, 2, 1), check_decode
    if phase == "prefill":
        heads, check = (2, 2, 2, 40), check_prefill
    case = random_case((*heads, 150, 64, 64), fields)
    # By key head, in any order; the last number is that of no page.
    lists = torch.tensor([[[0, 2, 4], [4, 1, 0]], [[1, 2, -1], [-7, 3, 2**31 - 1]]])
    case.picked = picked(case, lists, page)
    keys = dataclasses.replace(paged(case, page), selected_blocks=lists)
    _, maxima = check(case, keys, PAGE_MAX=True)
    check_maxima(maxima, case, lists, page)
    assert check(case, keys)[1] is None


@pytest.mark.parametrize("numbers,block", [(torch.int32, 16), (torch.int64, 32)])
def test_a_list_over_many_blocks_and_programs(numbers, block):
    """Pages smaller and larger than a block, of which some lie behind a row's last key."""
    for page in (8, 64):
        fields = {"kv": "paged", "page": page, "kv_lens": True, "selected_blocks": True}
        case = random_case((2, 4, 2, 1, 300, 32, 32), fields)
        generator = torch.Generator().manual_seed(page)
        count = -(-300 // page)
        lists = torch.stack([torch.randperm(count, generator=generator) for _ in range(4)])
        lists = lists[:, : count * 2 // 3].view(2, 2, -1).to(numbers)
        lists[0, 0, 1] = -1
        if numbers == torch.int64:
            lists[1, 0, 2] = 2**40
        case.picked = picked(case, lists, page)
        keys = dataclasses.replace(paged(case, page), selected_blocks=lists)
        _, maxima = check_decode(case, keys, 3, PAGE_MAX=True, BLOCK_N=block)
        check_maxima(maxima, case, lists, page)


@pytest.mark.parametrize(
    "form",
    slow_but(({}, {"causal": False, "window": 20},
           {"softcap": 2.0, "padding_mask": True, "sinks": True},
           {"chunk": 24, "alibi": True, "bias": True}), {}),
)  # fmt: skip
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_maxima_of_all_pages(phase, form):
    page, heads, check = 16, (2, 4, 2, 1), check_decode
    if phase == "prefill":
        heads, check = (2, 2, 1, 45), check_prefill
    fields = {**form, "kv": "paged", "page": page, "kv_lens": True}
    case = random_case((*heads, 96, 32, 32), fields)
    _, maxima = check(case, paged(case, page), PAGE_MAX=True)
    check_maxima(maxima, case, torch.arange(6).expand(2, heads[2], 6), page)


def test_a_ring():
    fields = {"kv": "ring", "kv_lens": True, "window": 40}
    for queries, check in ((1, check_decode), (20, check_prefill)):
        case = random_case((2, 4, 2, queries, 90, 64, 64), fields)
        first = torch.tensor([0, 70])
        slots = (torch.arange(90)[None] + first[:, None]) % 90
        index = slots[:, None, :, None]
        k, v = (torch.zeros_like(x).scatter(2, index.expand_as(x), x) for x in (case.k, case.v))
        check(case, Keys(k, v, kv_lens=case.kv_lens, ring_start=first), RING=90)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": c.q[:, :3]}, "3 query heads over 2 key heads"),
        (lambda c: {"q": c.q[..., :16]}, "head sizes"),
        (lambda c: {"q": c.q[:, :, :0]}, "leave out empty"),
        (lambda c: {"v": c.v.float()}, "give one dtype"),
        (lambda c: {"k": c.k.transpose(2, 3).contiguous().transpose(2, 3)}, "not contiguous"),
        (lambda c: {"mask": torch.ones(2, 8, dtype=torch.int8)}, "does not take 'mask'"),
        (lambda c: {"kv_lens": torch.ones(2)}, "does not take 'kv_lens'"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    case = random_case((2, 4, 2, 8, 8, 32, 32), {})
    constants = planned(case)
    q, keys, extras = operands(dataclasses.replace(case, **change(case)))
    with pytest.raises(ValueError, match=message):
        prefill(attention_prefill, q, keys, constants, scale=1.0, extras=extras)


def test_more_heads_than_a_grid_has_are_refused_by_a_sentence():
    case = random_case((1, 2, 1, 1, 1, 32, 32), {})
    q, keys, extras = operands(case)
    wide, many = q.expand(40000, -1, -1, -1), Keys(*(x.expand(40000, -1, -1, -1) for x in (
        keys.k, keys.v)))  # fmt: skip
    with pytest.raises(ValueError, match="at most 65,535 heads times rows"):
        prefill(attention_prefill, wide, many, planned(case), scale=1.0, extras=extras)


SPECIALISED = {
    "causal": [
        {},
        {"padding_mask": True},
        {"kv_lens": True},
        {"padding_mask": True, "kv_lens": True},
    ],
    "all of one": [FORMS["everything"]],
    "window and none": [{"window": 9, "align": "top-left"}, {"align": "top-left"}],
    "chunk, softcap": [{"chunk": 24, "softcap": 2.0}, {"softcap": 2.0}],
    "bias": [
        {"bias": True, "causal": False},
        {"bias": True, "causal": False, "padding_mask": True},
    ],
    "alibi, sinks": [{"alibi": True, "sinks": True}],
    "pages": [{"kv": "paged", "page": 16, "kv_lens": True}],
}
OFTEN_SPECIALISED = (("all of one", 64), ("window and none", 64), ("bias", 64), ("pages", 80))


def emitted(folder, served, monkeypatch):
    """The kernels specialised for plans, as a package; and their texts before and after."""
    before = {name: runtime_text(f"kernels/{name}.py") for name in ("common", "prefill", "decode")}
    after = specialise(before, served)
    package = folder / f"made_{folder.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in after.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    modules = {name: importlib.import_module(f"{package.name}.{name}") for name in after}
    return modules, before, after, package


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"),
    [
        (name, width)
        if (name, width) in OFTEN_SPECIALISED
        else pytest.param(name, width, marks=pytest.mark.exhaustive)
        for width in (64, 80)
        for name in SPECIALISED
    ],
)
def test_specialised_kernels_give_the_same_bits(name, width, tmp_path, monkeypatch):
    forms = SPECIALISED[name]
    cases = [random_case((2, 2, 1, 40, 70, width, width), f, seed=i) for i, f in enumerate(forms)]
    few = [random_case((2, 2, 1, 2, 70, width, width), f, seed=i) for i, f in enumerate(forms)]
    constants = [planned(case) for case in cases], [planned(case, "decode") for case in few]
    rows = [[(str(form), row) for form, row in zip(forms, c, strict=True)] for c in constants]
    served = {"attention_prefill": rows[0], "attention_decode": rows[1],
              "attention_merge": rows[1]}  # fmt: skip
    modules, before, after, package = emitted(tmp_path, served, monkeypatch)
    assert after == specialise(before, served)
    for module in after:
        assert after[module].count("\n") < before[module].count("\n")
    # Relative imports are the folder's way to stand alone.
    styles = (["format", "--check"], ["check", "--ignore", "TID252"])
    for arguments in styles if importlib.util.find_spec("ruff") else ():
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config",
                   str(ROOT / "pyproject.toml"), str(package)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    small = modules["prefill"].attention_prefill
    assert len(small.arg_names) < len(attention_prefill.arg_names) - 10
    for case, row in zip(cases, constants[0], strict=True):
        q, keys, extras = operands(case, paged(case, 16) if case.fields.get("page") else None)
        options = {"scale": case.scale, "extras": extras}
        whole = prefill(attention_prefill, q, keys, row, **options)
        for one, other in zip(prefill(small, q, keys, row, **options), whole, strict=True):
            assert one is other is None or torch.equal(one, other)
    pair = modules["decode"].attention_decode, modules["decode"].attention_merge
    for case, row in zip(few, constants[1], strict=True):
        q, keys, extras = operands(case, paged(case, 16) if case.fields.get("page") else None)
        options = {"scale": case.scale, "extras": extras, "splits": 3}
        whole = decode(attention_decode, attention_merge, q, keys, row, **options)
        for one, other in zip(decode(*pair, q, keys, row, **options), whole, strict=True):
            assert one is other is None or torch.equal(one, other)
