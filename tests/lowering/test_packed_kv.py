"""Caches of keys and values in four and eight bits: written, read, and in an emitted model."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emitted import load_file
from programs import tiny_program
from sampling import exhaustive_but, slow_but
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

import graphopt as go  # noqa: E402
from graphopt.execute.interpreter import Runner  # noqa: E402
from graphopt.ir import KVLayout, Program, functional, kv_memory  # noqa: E402
from graphopt.ir.kv_memory import pack_rows, row_bytes, unpack_rows  # noqa: E402
from graphopt.ir.relayout import with_layouts  # noqa: E402
from graphopt.lowering.kernels import plan_attention  # noqa: E402
from graphopt.lowering.kernels.plan_kernels import planned_attentions  # noqa: E402
from graphopt.lowering.kernels.triton import kernel_constants  # noqa: E402
from graphopt.lowering.torch.passes import lower, lowering_passes  # noqa: E402
from graphopt.plan import AttentionSpec  # noqa: E402
from graphopt.runtime.attention import Extras, Keys, decode, prefill  # noqa: E402
from graphopt.runtime.fused import launch_append  # noqa: E402
from graphopt.runtime.kernels.decode import attention_decode, attention_merge  # noqa: E402
from graphopt.runtime.kernels.prefill import attention_prefill  # noqa: E402
from graphopt.runtime.kv_cache import dense, in_order  # noqa: E402
from graphopt.targets import get_target  # noqa: E402

BITS = (4, 8)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Features of a head with a mean of their own, as keys have.
    values = torch.randn(shape, generator=generator) + torch.randn(shape[-1], generator=generator)
    return values.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dim", [32, 40, 128])
@pytest.mark.parametrize("bits", BITS)
def test_rows_stand_for_what_rounding_gives(bits: int, dim: int) -> None:
    x = random(3, 2, 5, dim, seed=0, dtype=torch.float32).cpu()
    x[0, 0, 1] = 0
    rows = pack_rows(x, bits)
    assert rows.shape == (3, 2, 5, row_bytes(dim, bits)) and rows.shape[-1] % 16 == 0
    rounded = functional.quantise_dequantise(x, bits=bits, symmetric=False)
    assert torch.equal(unpack_rows(rows, dim, bits, torch.float32), rounded)
    x[1, 1, 1, 3] = float("nan")
    assert unpack_rows(pack_rows(x, bits), dim, bits, torch.float32)[1, 1, 1].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "ring", "paged"])
@pytest.mark.parametrize("bits", BITS)
def test_new_keys_are_written_as_rows(bits: int, layout: str) -> None:
    k, v = random(2, 3, 4, 64, seed=0), random(2, 3, 4, 32, seed=1)
    seq_lens = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    shape = (8, 3, 3) if layout == "paged" else (2, 3, 9 if layout == "contiguous" else 5)
    caches = [
        torch.zeros(*shape, row_bytes(dim, bits), dtype=torch.uint8, device=DEVICE)
        for dim in (64, 32)
    ]
    options: dict[str, Any] = {"bits": bits, "ring": layout == "ring"}
    if layout == "paged":
        options["block_table"] = torch.tensor(
            [[3, 0, 5], [1, 7, 2]], dtype=torch.int32, device=DEVICE
        )
    expected = [cache.clone() for cache in caches]
    total = kv_memory.append_kv(k, v, *expected, seq_lens, **options)
    assert torch.equal(launch_append(k, v, *caches, seq_lens, **options), total)
    for dim, one, other in zip((64, 32), caches, expected, strict=True):
        found, wanted = (unpack_rows(rows, dim, bits, torch.float32) for rows in (one, other))
        # A code may be its neighbour where a quotient is rounded another way.
        step = other[..., dim * bits // 8 :][..., :4].contiguous().view(torch.float32)
        off = (found - wanted).abs()
        assert bool((off <= step * (1 + 1e-3)).all())
        assert float((off > step * 1e-3).double().mean()) <= 1e-3


def attention(
    q: Tensor, keys: Keys, phase: str, fields: dict[str, Any], extras: Extras | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return what the kernel gives, with small tiles so that small inputs cross several."""
    spec = AttentionSpec(
        head_dim=q.shape[3], value_dim=keys.values, heads=q.shape[1], kv_heads=keys.k.shape[1],
        phase=phase, lse=True, kv_bits=keys.bits, **fields,
    )  # fmt: skip
    plan = plan_attention(spec, dataclasses.replace(get_target("ampere"), kernels=("triton",)))
    small = {"BLOCK_N": 16, "SPAN": 32} if phase == "decode" else {"BLOCK_M": 16, "BLOCK_N": 16}
    plan = dataclasses.replace(plan, tiles={**plan.tiles, "num_warps": 4, "num_stages": 1, **small})
    constants = kernel_constants(plan)
    scale = q.shape[3] ** -0.5
    options: dict[str, Any] = {"scale": scale, "extras": extras or Extras()}
    if phase == "decode":
        return decode(attention_decode, attention_merge, q, keys, constants, **options)[:2]
    return prefill(attention_prefill, q, keys, constants, **options)[:2]


FORMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window and cap": {"window": 11, "softcap": 5.0},
    "full": {"causal": False},
}


@pytest.mark.parametrize("form", exhaustive_but(FORMS, "causal", "window and cap"))
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("layout", slow_but(["contiguous", "ring", "paged"], "paged"))
@pytest.mark.parametrize("bits", BITS)
def test_attention_reads_rows(bits: int, layout: str, phase: str, form: str) -> None:
    fields, tokens = dict(FORMS[form]), 37
    queries, dims = (2, (32, 64)) if phase == "decode" else (19, (64, 32))
    if layout == "ring":
        fields["window"] = fields.get("window", 30)
    k, v = (random(2, 2, 48, dim, seed=seed) for seed, dim in enumerate(dims))
    q = random(2, 4, queries, dims[0], seed=5)
    lens = torch.tensor([tokens, 21], dtype=torch.int32, device=DEVICE)
    where: dict[str, Any] = {"kv_lens": lens}
    rows = [pack_rows(x, bits) for x in (k, v)]
    if layout == "ring":
        where["ring_start"] = torch.tensor([5, 40], dtype=torch.int32, device=DEVICE)
        fields |= {"kv": "ring", "slots": 48}
    if layout == "paged":
        table = torch.tensor([[0, 4, 2], [5, 1, 3]], dtype=torch.int32, device=DEVICE)
        where["block_table"] = table
        # Pages of 16 tokens, of both rows in one pool.
        rows = [x.unflatten(2, (3, 16)).transpose(1, 2).flatten(0, 1).contiguous() for x in rows]
        fields |= {"kv": "paged", "page": 16}
    keys = Keys(*rows, bits=bits, value_dim=dims[1], **where)
    out, lse = attention(q, keys, phase, {**fields, "kv_lens": True})
    wide = dense(keys, dims[0], torch.float64)
    exact_k, exact_v = (x.cpu() for x in in_order(wide))
    options = {name: fields.get(name) for name in ("window", "softcap")}
    expected = functional.attention(
        q.double().cpu(), exact_k, exact_v, scale=dims[0] ** -0.5, kv_lens=lens.cpu(),
        causal=fields.get("causal", True), **options,
    )  # fmt: skip
    # Weights times a scale are rounded to f16 (2^-11 of each), and so is the result.
    bound = 4 * 2.0**-11 * float(exact_v.abs().max())
    assert float((out.double().cpu() - expected).abs().max()) < bound
    assert lse is not None and bool(lse.isfinite().all())


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("bits", BITS)
def test_small_values_that_sinks_leave_little_weight_are_not_lost_in_f16(
    bits: int, phase: str
) -> None:
    queries, tokens, dim = 2, 80, 32
    k, v = (random(1, 1, tokens, dim, seed=seed, dtype=torch.float32) for seed in (0, 1))
    # Of the size of f16's smallest normal number: a scale is below it.
    rows = [pack_rows(k, bits), pack_rows(v * 2.0**-14, bits)]
    q = random(1, 2, queries, dim, seed=5)
    keys = Keys(
        *rows, bits=bits, value_dim=dim, kv_lens=torch.tensor([tokens - 3]).int().to(DEVICE)
    )
    sinks = torch.tensor([6.0, 3.0], device=DEVICE)
    fields = {"kv_lens": True, "sinks": True}
    out, _ = attention(q, keys, phase, fields, Extras(sinks=sinks))
    exact_k, exact_v = (x.cpu() for x in in_order(dense(keys, dim, torch.float64)))
    options: dict[str, Any] = {
        "scale": dim**-0.5, "causal": True, "sinks": sinks.double().cpu(),
        "kv_lens": keys.kv_lens.cpu(),
    }  # fmt: skip
    expected = functional.attention(q.double().cpu(), exact_k, exact_v, **options)
    size = functional.attention(q.double().cpu(), exact_k, exact_v.abs(), **options)
    # Weights times a scale are rounded to f16 (2^-11 of each), and so is the result, to a multiple
    # of 2^-24 at best.
    assert bool(((out.double().cpu() - expected).abs() < 2 * 2.0**-11 * size + 2.0**-25).all())


def with_rounded_keys(bits: int, **features: Any) -> Program:
    """Return a program whose new keys and values are rounded in front of its attentions."""
    sizes = {"hidden": 64, "head_dim": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
    program = tiny_program(**{**sizes, **features})
    recipe = f"canonicalise,quantize{{kv={bits},method=rtn}},insert-kv-cache"
    return go.Pipeline.parse(recipe).run(program, go.RunOptions(verify=False))[0]


@pytest.mark.parametrize("bits", BITS)
def test_lowering_leaves_the_rounding_to_the_cache(bits: int) -> None:
    program = with_rounded_keys(bits)
    lowered = lower(program, "hopper")
    nodes = lowered.functions["block"].nodes
    assert "quantise_dequantise" not in [node.op for node in nodes]
    (own,) = (node for node in nodes if node.op == "attention")
    assert own.attrs["kv_bits"] == bits
    plans = planned_attentions(lowered)[0].plans
    assert {plan.spec.kv_bits for plan in plans} == {16, bits}
    assert all(plan.kernel == "triton" for plan in plans if plan.spec.kv_bits == bits)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    for mode in ("reference", "torch"):
        found = Runner(lowered, dtype=torch.float64, mode=mode).logits({"input_ids": ids})
        # Sums in another order, in fp64.
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("head_dim", "reason"), [(48, "heads of 48: no power of two"), (16, "head_dim is 16")]
)
def test_rounding_stays_where_no_kernel_reads_codes_of_the_heads(
    head_dim: int, reason: str, bits: int
) -> None:
    """Else the reference unpacks the whole cache in every step."""
    program = with_rounded_keys(bits, head_dim=head_dim, heads=2, kv_heads=1)
    lowered, report = go.Pipeline(lowering_passes("ampere")).run(program)
    nodes = lowered.functions["block"].nodes
    assert [node.op for node in nodes].count("quantise_dequantise") == 2
    (own,) = (node for node in nodes if node.op == "attention")
    assert "kv_bits" not in own.attrs
    record = report.passes[1].record
    assert record is not None and any(reason in line for line in record.left)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize(
    ("bits", "layout"),
    [
        (4, "paged"),
        (8, "contiguous"),
        pytest.param(4, "contiguous", marks=pytest.mark.exhaustive),
        pytest.param(8, "paged", marks=pytest.mark.exhaustive),
    ],
)
def test_an_emitted_model_keeps_codes(
    bits: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = with_rounded_keys(bits)
    if layout == "paged":
        program = with_layouts(program, dict.fromkeys(program.states, KVLayout("paged", 16)))
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    name = module.kernels.__name__
    if DEVICE == "cpu":
        # By the kernels, in the interpreter.
        for own in ("dispatch", "fused"):
            loaded = sys.modules[f"{name}.{own}"]
            if own == "fused":
                monkeypatch.setattr(loaded, "runs_by_kernel", lambda *tensors: True)
            else:
                monkeypatch.setattr(loaded.AttentionDispatcher, "_on_device", lambda self, q: True)
                monkeypatch.setattr(loaded.AttentionDispatcher, "_runs_here", lambda self: True)
    model = module.load(tmp_path / "out", device=DEVICE, dtype=torch.float16)
    text = [5, 6, 7, 8, 9, 10, 11]
    decoder = module.Decoder(model, 16)
    assert decoder.cache[0].bits == bits and decoder.cache[0].k.dtype == torch.uint8
    answer = [decoder.start(text)]
    for _ in range(3):
        answer.append(decoder.step())
    runner = Runner(program, dtype=torch.float64, mode="reference")
    ids = torch.tensor([[*text, *answer[:-1]]])
    expected = runner.logits({"input_ids": ids})[0, -1]
    # Two dozen roundings to f16 on the way, each of which may turn a code to its neighbour.
    bound = (24 * 2.0**-11 + 4 * 2.0**-bits) * float(expected.abs().max())
    assert float((decoder.logits[0].double().cpu() - expected).abs().max()) < bound
