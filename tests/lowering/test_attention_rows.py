"""Attention by rows: what the whole gives for them, and the sum over ranks that asks for them."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emitted import load_file
from hypothesis import given, settings
from hypothesis import strategies as st
from imitated_streams import imitated_streams
from programs import tiny_program
from ranks import run_ranks
from sharded import VOCAB, sharded
from test_reductions import BY_ROWS, figures
from tiny_models import save_tiny
from torch import Tensor

import graphopt as go
from graphopt.compiler import emit
from graphopt.ir import Program, functional
from graphopt.ir.kv_memory import PagedKV
from graphopt.lowering.kernels import plan_attention
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.pass_manager.pipeline import DEFAULT_RECIPE
from graphopt.plan import AttentionSpec
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.attention_rows import AttentionRows, RowsDispatcher
from graphopt.runtime.dispatch import by_reference
from graphopt.runtime.kv_cache import fixed_caches
from graphopt.runtime.peer_memory import on_one_device
from graphopt.runtime.peer_reduce import Waiting
from graphopt.runtime.reduction_plan import LinearPlan, Stage
from graphopt.runtime.reductions import RankReductions
from graphopt.runtime.triton_attention import load
from graphopt.targets import get_target

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HEADS, GROUPS, DIM, VALUES, WINDOW = 4, 2, 16, 8, 7
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore:attention on a CPU")

LIBRARY = LinearPlan("library", 1.0, (Stage(1.0, 0.0),))
FORMS: dict[str, dict[str, Any]] = {
    "all keys": {},
    "a window": {"window": WINDOW},
    "chunks": {"chunk": 5},
    "a soft-cap": {"softcap": 2.0},
}
PER_HEAD = ("neither", "slopes", "sinks")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def dispatcher() -> RowsDispatcher:
    return RowsDispatcher([], Path(), None)


def attention_rows(
    texts: int, tokens: int, past: int, layout: str, form: dict[str, Any], per_head: str
) -> tuple[AttentionRows, Tensor]:
    """Return an attention of new tokens behind a cache's, and its output by brute force."""
    q = random(texts, HEADS, tokens, DIM, seed=0)
    k, v = (random(texts, GROUPS, past + tokens, d, seed=d) for d in (DIM, VALUES))
    extra = random(HEADS, seed=3).abs()
    given = {} if per_head == "neither" else {per_head: extra}
    options = {"scale": 0.3, "causal": True, **form}
    own = dispatcher()
    held, new = [k[:, :, :past], v[:, :, :past]], (k[:, :, past:], v[:, :, past:])
    cache: Any = tuple(held)
    if layout == "none":
        assert not past
        rows = own.attention_by_rows(q, *new, **given, **options)
    else:
        kind, _, fixed = layout.partition(" ")
        if kind == "ring":
            options |= {"ring": 2 * WINDOW}
            cache = tuple(part[:, :, max(0, past - 2 * WINDOW) :] for part in held)
        if fixed:
            size = {"contiguous": None, "ring": 2 * WINDOW, "paged": 4}[kind]
            lens = torch.zeros(texts, dtype=torch.int32)
            empty = [(k[:, :, :0], v[:, :, :0])]
            (cache,) = fixed_caches(
                empty, [(kind, size)], past + tokens + 3, lens, lens + tokens, [16]
            )
            if past:
                cache.new_lens.fill_(past) if kind == "ring" else None
                own.cached_attention(q[:, :, :0], *held, cache, **options)
                lens.fill_(past)
                cache.new_lens.fill_(tokens) if kind == "ring" else None
        elif kind == "paged":
            cache = PagedKV.empty(k[:, :, :0], v[:, :, :0], 4)
            cache = cache.extended(*held) if past else cache
        rows, left = own.cached_attention_by_rows(q, *new, cache, **given, **options)
        assert left is cache if fixed else left is not cache
    extras = (None, None, given.get("slopes"), given.get("sinks"))
    plain = {name: value for name, value in options.items() if name != "ring"}
    return rows, functional.merge_heads(functional.attention(q, k, v, *extras, **plain))


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 24), st.integers(0, 20), st.data(),
    st.sampled_from(
        ["none", "contiguous", "contiguous fixed", "paged", "paged fixed", "ring", "ring fixed"]
    ),
    st.sampled_from(list(FORMS)), st.sampled_from(PER_HEAD),
)  # fmt: skip
def test_rows_are_those_of_the_whole(
    texts: int, tokens: int, past: int, data: st.DataObject, layout: str, form: str, per_head: str
) -> None:
    if layout.startswith("ring"):
        form = "a window"
        per_head = "sinks" if per_head == "slopes" else per_head
    past = 0 if layout == "none" else past
    found, exact = attention_rows(texts, tokens, past, layout, FORMS[form], per_head)
    assert found.described is not None
    assert found.past == (0 if "fixed" in layout or layout == "none" else min(
        past, 2 * WINDOW if layout == "ring" else past
    ))  # fmt: skip
    torch.testing.assert_close(found.whole(), exact, rtol=1e-12, atol=1e-12)
    count = texts * tokens
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count + 1))
    rows = found.rows(slice(start, stop))
    flat = torch.cat((exact.flatten(0, 1), exact.new_zeros(1, HEADS * VALUES)))
    torch.testing.assert_close(rows, flat[start:stop], rtol=1e-12, atol=1e-12)


def test_what_keeps_an_attention_whole() -> None:
    q, k = random(2, HEADS, 5, DIM, seed=0), random(2, GROUPS, 5, DIM, seed=1)
    own, options = dispatcher(), {"scale": 1.0, "causal": True}
    mask = torch.ones(2, 5, dtype=torch.long)
    assert own.attention_by_rows(q, k, k, **options).described is not None
    assert own.attention_by_rows(q, k, k, mask, **options).described is None
    assert own.attention_by_rows(q, k, k, None, random(5, 5, seed=2), **options).described is None
    assert own.attention_by_rows(q, k, k, **options | {"causal": False}).described is None


@needs_triton
@pytest.mark.parametrize(
    ("fixed", "features"), [(False, {}), (True, {"window": 20, "sinks": True})],
    ids=["all keys", "fixed room, a window, sinks"],
)  # fmt: skip
def test_a_kernel_gives_the_same_rows_to_the_bit(fixed: bool, features: dict[str, Any]) -> None:
    """Rows that begin and end within tiles, behind a past, of two texts."""
    width, heads = 32, 2
    spec = AttentionSpec(
        head_dim=width, heads=heads, kv_heads=1, dtype="f16", kv_lens=fixed, **features
    )
    plan = plan_attention(spec, dataclasses.replace(get_target("ampere"), kernels=("triton",)))
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    run = load("prefill", {**kernel_constants(plan), **tiles}, None)

    def attend(q: Tensor, keys: Keys, extras: Extras, options: Any) -> Any:
        return run(q, keys, scale=options["scale"], extras=extras)

    half = torch.float16
    texts, tokens, past = 2, 21, 9
    q = random(texts, heads, tokens, width, seed=0, dtype=half).to(DEVICE)
    room = past + tokens + (6 if fixed else 0)
    k, v = (random(texts, 1, room, width, seed=s, dtype=half).to(DEVICE) for s in (1, 2))
    sinks = random(heads, seed=3, dtype=torch.float32).to(DEVICE) if "sinks" in features else None
    lens = torch.full((texts,), past + tokens, dtype=torch.int32, device=DEVICE)
    keys = Keys(k, v, kv_lens=lens if fixed else None)
    found = AttentionRows(attend, q, keys, Extras(sinks=sinks), {"scale": 0.25}, past)
    whole = found.whole().flatten(0, 1)
    for start, stop in ((0, 13), (13, 30), (30, 42)):
        rows = found.rows(slice(start, stop))
        # The interpreter multiplies by numpy, whose rounding may hang on where a row stands in a
        # tile: a probability and the output may each be half a unit of fp16 off.
        off = 0.0 if DEVICE == "cuda" else 2.0**-10 * float(v.abs().max())
        torch.testing.assert_close(rows, whole[start:stop], rtol=0, atol=off)
    exact = by_reference(
        q.double(), Keys(k.double(), v.double(), kv_lens=keys.kv_lens),
        Extras(sinks=None if sinks is None else sinks.double()),
        {"scale": 0.25, **{n: x for n, x in features.items() if n != "sinks"}},
    )[0]  # fmt: skip
    error = (whole.double() - functional.merge_heads(exact).flatten(0, 1)).abs().max()
    # fp16 weights and output of values of about 1.
    assert float(error) < 4 * torch.finfo(half).eps * float(v.abs().max())


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="ranks side by side on a GPU are in test_reductions.py")
@pytest.mark.parametrize(("texts", "tokens"), [(1, 512), (1, 301), (2, 150), (3, 97)])
def test_ranks_sum_what_each_makes_of_its_rows(
    texts: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on one device, one after the other; the second time each finds what it waits for.

    Chunks are added where they lie, so that a result is taken before another rank runs again.
    """
    own = figures(**BY_ROWS, tiles=(), one_shot_bytes=1, launch=0.0, signal=0.0)
    columns, half = 24, torch.float16
    asked: list[slice] = []
    attentions, weights = [], []
    for rank in range(2):
        q, k, v = (
            random(texts, heads, tokens, DIM, seed=10 * rank + heads, dtype=half)
            for heads in (HEADS, GROUPS, GROUPS)
        )
        options = {"scale": 0.25, "causal": True}
        attentions.append(AttentionRows(by_reference, q, Keys(k, v), Extras(), options))
        weights.append(random(columns, HEADS * DIM, seed=40 + rank, dtype=half) / 8)
    rows = AttentionRows.rows
    monkeypatch.setattr(AttentionRows, "rows", lambda self, at: asked.append(at) or rows(self, at))
    with imitated_streams():
        waiting = Waiting(DEVICE, 1, trap=False)
        sums = [RankReductions(own, (peers, waiting)) for peers in on_one_device(2, DEVICE)]
        results: list[Tensor] = []
        for turn in range(2):
            results = []
            for rank in range(2):
                made = [x for x in sums[rank]._made.values() if hasattr(x, "_places")]
                for chunked in made if turn else ():
                    chunked.epoch -= 1
                    chunked._places.turn()
                found = sums[rank].attention_linear_all_reduce(attentions[rank], weights[rank])
                results.append(found.clone())
    parts = [a.whole().double() @ w.double().t() for a, w in zip(attentions, weights, strict=True)]
    exact, size = parts[0] + parts[1], parts[0].abs() + parts[1].abs()
    eps = torch.finfo(half).eps
    for result in results:
        assert result.shape == (texts, tokens, columns)
        # Each part, and the sum, rounded once; attention, of rows or whole, to its own eps.
        assert bool(((result.double() - exact).abs() <= 4 * eps * (size + size.mean())).all())
        assert torch.equal(result, results[0])
    even = texts * tokens + texts * tokens % 2
    # In chunks, and first those that the other rank sums.
    assert asked[0].start == even // 2 and len(asked) >= 4 * 2
    assert sum(at.stop - at.start for at in asked) == 4 * even


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
FAMILIES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one key head": {"kv_heads": 1},
    "as many key heads": {"kv_heads": 4},
    "windows, sinks": {"window": 4, "sinks": True},
    "slopes, soft-caps": {"alibi": True, "softcap": 2.0},
}


GATED = "a gate"
"""Of a family whose attention's output goes through one: it stays as it is."""


def computed(folder: Path, forced: bool) -> dict[str, Any]:
    """Return what a package computes of one text, of two alike in length, and of unlike ones."""
    module = load_file(folder / "model.py")
    model = module.load(device="cpu")
    asked: list[int] = []
    if forced:
        force_chunks(module, asked)
    one, two = [PROMPT], [PROMPT, PROMPT[::-1]]
    found: dict[str, Any] = {}
    for name, texts in (("one", one), ("two", two)):
        found[name], cache = model(torch.tensor(texts))
        further = torch.tensor([PROMPT[:5]] * len(texts))
        found[f"{name}, gone on"], _ = model(further, cache=cache)
    masked = torch.ones(2, len(PROMPT), dtype=torch.long)
    masked[1, :3] = 0
    calls = len(asked)
    found["unlike, masked"] = model(torch.tensor(two), masked)[0] * masked[..., None]
    assert len(asked) == calls  # a padding mask: attention stays whole
    for name, texts in (("alike", two), ("unlike", [PROMPT, PROMPT[:4]])):
        decoder = module.Decoder(model, 24, batch=2)
        decoder.start(texts)
        found[f"{name}, decoder"] = decoder.logits
        calls = len(asked)
        found[f"{name}, a token"] = decoder.step() and decoder.logits
        assert len(asked) == calls  # as does that of a token
    found["asked"] = len(asked)
    return found


def force_chunks(module: Any, asked: list[int]) -> None:
    """Make attention of a package run by rows, summed by torch.distributed, and note which."""
    sums = module.kernels._SUMS
    reductions: Any = sys.modules[type(sums).__module__]

    def planned(attention: Any, *given: Any) -> Any:
        half = (attention.texts * attention.tokens + 1) // 2
        cut = (half // 2, half - half // 2)
        return dataclasses.replace(LIBRARY, how="attention-chunks", chunks=cut)

    def chunked(attend: Any, weight: Tensor, chunks: tuple[int, ...]) -> Tensor:
        half, own = sum(chunks), torch.distributed.get_rank()
        parts = {}
        for rank in (1 - own, own):
            start = rank * half
            for size in chunks:
                parts[start] = attend(slice(start, start + size)) @ weight.t()
                asked.append(size)
                start += size
        whole = torch.cat([parts[start] for start in sorted(parts)])
        torch.distributed.all_reduce(whole)
        return whole

    by_rows = reductions.RankReductions(None)
    by_rows._reach = lambda x: (None, SimpleNamespace(ranks=2), None)
    by_rows._chunked = lambda *given: chunked
    by_rows.linear_all_reduce = sums.linear_all_reduce
    reductions.plan_attention_linear, reductions.LEAST_CHUNK = planned, 2
    module.attention_linear_all_reduce = by_rows.attention_linear_all_reduce


def computed_by_ranks(rank: int, folders: list[Path]) -> list[tuple[dict[str, Any], ...]]:
    return [tuple(computed(folder, forced) for forced in (False, True)) for folder in folders]


def family(name: str, folder: Path) -> Program:
    """Return a program with a cache, of the features of a name."""
    if name != GATED:
        return tiny_program(cache=True, vocab=VOCAB, **FAMILIES[name])
    program = go.capture(str(save_tiny(folder / "source", "afmoe")))
    for step in DEFAULT_RECIPE.split(","):
        program = make_pass(step, {}).run(program, Context()).program
    return program


@pytest.mark.parametrize(
    "names",
    [pytest.param(["windows, sinks"], marks=pytest.mark.slow),
     pytest.param([*FAMILIES, GATED], marks=pytest.mark.exhaustive)],
    ids=["one", "all"],
)  # fmt: skip
def test_packages_by_rows_compute_what_plain_ones_do(names: list[str], tmp_path: Path) -> None:
    """Of two ranks, whose attentions run as planned, whole on a CPU, and in chunks all the same."""
    folders = []
    for name in names:
        one = family(name, tmp_path)
        folder = tmp_path / name
        for program, out in ((one, folder / "one"), (sharded(one), folder / "two")):
            emit(program, out, target="hopper", emit=("torch",), dtype="float32")
        text = (folder / "two" / "model.py").read_text(encoding="utf-8")
        by_rows = "cached_attention_by_rows(" in text and "attention_linear_all_reduce(a, " in text
        assert by_rows == (name != GATED) and (by_rows or "attention_by_rows(" not in text)
        alone = (folder / "one" / "model.py").read_text(encoding="utf-8")
        assert "attention_by_rows(" not in alone
        folders.append(folder)
    ranks = run_ranks(computed_by_ranks, [folder / "two" for folder in folders], limit=120)
    for number, folder in enumerate(folders):
        alone = computed(folder / "one", forced=False)
        for planned, forced in (found[number] for found in ranks):
            # Of two layers, two chunks for either rank, in each of six prompts.
            chunks = 0 if folder.name == GATED else 2 * 4 * 6
            assert planned.pop("asked") == 0 and forced.pop("asked") == chunks
            for name, expected in alone.items():
                if name == "asked":
                    continue
                largest = 1e-5 * float(expected.abs().max())
                assert torch.equal(planned[name], ranks[0][number][0][name]), (folder.name, name)
                for found in (planned, forced):
                    error = float((found[name] - expected).abs().max())
                    # Sums of parts are rounded in another order, a few dozen times over.
                    assert error < largest, (folder.name, name)
