"""The kernels of a layer beside its attention, against fp64: on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import compile_alone
from programs import tiny_program
from sampling import slow_but
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

import graphopt as go  # noqa: E402
from graphopt.execute.interpreter import Runner  # noqa: E402
from graphopt.ir import functional, kv_memory  # noqa: E402
from graphopt.ir.ops import get_op  # noqa: E402
from graphopt.runtime import fused  # noqa: E402

WIDTHS = (1, 7, 64, 576, 2048, 8192)
ROWS = (1, 3, 129)
# Wide rows are one to a program: an interpreter, which runs them in turn, gets three.
LARGEST = 1 << 19 if DEVICE == "cuda" else 1 << 15
SHAPES = [(rows, width) for width in WIDTHS for rows in ROWS if rows * width < LARGEST]
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
FP32 = 2.0**-23


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def near(found: Tensor, exact: Tensor, fp32_error: Tensor | float) -> None:
    """The result is the exact one, off by one rounding to 16 bits and by what fp32 adds."""
    limits = torch.finfo(found.dtype)
    # Half a unit in the last place, in the normal range and below it.
    rounding = exact.abs().clamp(min=limits.tiny) * limits.eps / 2
    difference = (found.double().cpu() - exact).abs()
    assert torch.isfinite(found).all()
    # The 16-bit neighbour of what fp32 gives may be one that lies a little further.
    assert bool((difference <= rounding * (1 + limits.eps) + fp32_error).all())


def reference(op: str, *tensors: Tensor | None, **attrs: object) -> Tensor:
    wide = [None if t is None else t.double().cpu() for t in tensors]
    return get_op(op).reference(wide, attrs)[0]


def norm_error(exact: Tensor, width: int) -> Tensor:
    """fp32 adds `width` squares, all positive, and rounds some times before and after."""
    return exact.abs() * FP32 * (width / 2 + 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, y = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    _, alone = fused.launch_norm(x, None, weight, 1e-5, 0.0)
    exact = reference("rms_norm", x, weight, eps=1e-5)
    near(alone, exact, norm_error(exact, width))
    total, normed = fused.launch_norm(x, y, weight, 1e-5, 1.0)
    assert torch.equal(total, x + y)  # rounded once, as a sum in memory is
    exact = reference("rms_norm", total, weight, eps=1e-5, offset=1.0)
    near(normed, exact, norm_error(exact, width))


def test_norm_of_tiny_values_is_ruled_by_epsilon() -> None:
    x = random(3, 64) * 2.0**-12
    _, found = fused.launch_norm(x, None, None, 1e-2, 0.0)
    exact = reference("rms_norm", x, eps=1e-2)
    assert float(exact.abs().max()) < 0.01
    near(found, exact, norm_error(exact, 64))


def sliced(rows: int, width: int, seed: int) -> Tensor:
    """A slice of a packed projection, [2, rows, width] that is not contiguous."""
    return random(2, rows, 3 * width + 5, seed=seed)[..., width : 2 * width]


def test_rows_are_read_as_they_lie() -> None:
    x, y = sliced(5, 24, 0), sliced(5, 24, 1).transpose(0, 1).contiguous().transpose(0, 1)
    weight = random(24, seed=2)
    total, normed = fused.launch_norm(x, y, weight, 1e-6, 0.0)
    assert torch.equal(total, x + y)
    exact = reference("rms_norm", total, weight, eps=1e-6)
    near(normed, exact, norm_error(exact, 24))
    heads = x.unflatten(-1, (3, 8)).transpose(1, 2)  # [2, 3, 5, 8], three axes that don't merge
    exact = reference("rms_norm", heads, weight[:8], eps=1e-6)
    near(fused.launch_norm(heads, None, weight[:8], 1e-6, 0.0)[1], exact, norm_error(exact, 8))
    backwards = x.transpose(1, 2)  # its last axis is not contiguous: copied
    exact = reference("rms_norm", backwards, weight[:5], eps=1e-6)
    near(fused.launch_norm(backwards, None, weight[:5], 1e-6, 0.0)[1], exact, norm_error(exact, 5))
    assert torch.equal(
        fused.launch_act_mul(x, y, "silu"),
        fused.launch_act_mul(x.contiguous(), y.contiguous(), "silu"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", slow_but(functional.ACTIVATIONS, "silu", "gelu"))
def test_gate(act: str, dtype: torch.dtype) -> None:
    for rows, width in ((1, 1), (3, 7), (129, 64), (1, 576), (2, 2048), (1, 8192)):
        gate = random(rows, width, dtype=dtype) * 3
        gate[..., -1] = 2.0**-10  # where tanh and its like lose digits
        up = random(rows, width, dtype=dtype, seed=1)
        exact = reference(act, gate) * up.double().cpu()
        # Exponentials and erf are right to a few units of fp32 of the argument or of 1.
        scale = (gate.double().cpu().abs() + 1) * up.double().cpu().abs()
        relative = exact.abs() if act in ("relu", "relu2", "tanh") else scale
        near(fused.launch_act_mul(gate, up, act), exact, relative * FP32 * 16)


def tables(batch: int, count: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(batch, count, half, generator=torch.Generator().manual_seed(3)) * 100
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "count", "width", "rotated"),
    [(9, 3, 5, 64, 64), (4, 1, 1, 80, 32), (2, 2, 3, 6, 6), (1, 1, 7, 128, 2), (5, 5, 2, 24, 20)],
)
def test_rope(
    heads: int, groups: int, count: int, width: int, rotated: int, interleaved: bool
) -> None:
    packed = random(2, count, (heads + groups) * width + 8)
    q, k = packed[..., : heads * width], packed[..., heads * width : (heads + groups) * width]
    q, k = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k))
    for batch in (1, 2):  # one table for all rows, or one for each
        cos, sin = tables(batch, count, rotated // 2)
        for turned, x in zip(fused.launch_rope(q, k, cos, sin, interleaved), (q, k), strict=True):
            assert turned is not None and turned.shape == x.shape
            exact = reference("rope", x, cos, sin, interleaved=interleaved)
            size = x.double().cpu().abs().amax(-1, keepdim=True)
            near(turned, exact, size * FP32 * 2)
            assert torch.equal(turned[..., rotated:], x[..., rotated:])
        alone, none = fused.launch_rope(k, None, cos, sin, interleaved)
        assert none is None
        assert torch.equal(alone, fused.launch_rope(q, k, cos, sin, interleaved)[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "count", "width", "rotated", "interleaved"),
    [
        (9, 3, 2, 64, 64, False),
        (4, 1, 1, 80, 32, True),
        (20, 2, 1, 24, 20, False),
        pytest.param(2, 2, 3, 128, 128, True, marks=pytest.mark.exhaustive),
    ],
)
def test_rope_with_a_transform_behind_it(
    heads: int, groups: int, count: int, width: int, rotated: int, interleaved: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    packed = random(2, count, (heads + groups) * width + 8, dtype=dtype)
    q, k = packed[..., : heads * width], packed[..., heads * width : (heads + groups) * width]
    q, k = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k))
    cos, sin = tables(2, count, rotated // 2)
    # Factors of several sizes: columns of one are not those of the other.
    factors = tuple(random(width, width, dtype=dtype, seed=seed) / width**0.5 for seed in (4, 5))
    found = fused.launch_rope(q, k, cos, sin, interleaved, factors)
    for made, x, right in zip(found, (q, k), factors, strict=True):
        assert made is not None and made.shape == x.shape
        turned = reference("rope", x, cos, sin, interleaved=interleaved)
        exact = turned @ right.double().cpu()
        # What is turned is rounded once more in front of the product.
        half = torch.finfo(dtype).eps / 2
        size = turned.abs() @ right.double().cpu().abs()
        near(made, exact, (half * 1.01 + FP32 * width) * size)


def test_heads_of_many_tokens_are_transformed_behind_their_rotation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "runs_by_kernel", lambda *tensors: True)
    given: list[bool] = []
    launch = fused.launch_rope
    monkeypatch.setattr(
        fused, "launch_rope", lambda *rest: given.append(rest[-1] is not None) or launch(*rest)
    )
    right = random(16, 16, seed=4)
    for count, factors in (
        (1, (right, right)),
        (fused.MOST_TRANSFORMED + 1, (right, right)),
        (1, (right, right.t())),  # a copy of it could still be on its way
    ):
        q, k = random(1, 4, count, 16), random(1, 2, count, 16, seed=1)
        cos, sin = tables(1, count, 8)
        found = fused.rope_pair(q, k, cos, sin, *factors)
        wide = [t.double().cpu() for t in (q, k, cos, sin, *factors)]
        for made, exact in zip(found, functional.rope_pair(*wide), strict=True):
            assert float((made.double().cpu() - exact).abs().max()) < 2.0**-9 * float(
                exact.abs().max()
            )
    assert given == [True, False, False]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (24, 40)])
def test_cache_writes(k_dim: int, v_dim: int, shared: bool) -> None:
    packed = random(3, 4, 2 * (k_dim + v_dim))
    k = packed[..., : 2 * k_dim].unflatten(-1, (2, k_dim)).transpose(1, 2)
    v = packed[..., 2 * k_dim :].unflatten(-1, (2, v_dim)).transpose(1, 2)
    length = torch.tensor([5] if shared else [0, 5, 6], dtype=torch.int32, device=DEVICE)
    found, expected = (
        (torch.zeros(3, 2, 10, k_dim).to(packed), torch.zeros(3, 2, 10, v_dim).to(packed))
        for _ in range(2)
    )
    ends = fused.launch_append(k, v, *found, length)
    assert torch.equal(ends, kv_memory.append_kv(k, v, *expected, length))
    assert ends.tolist() == ([9, 9, 9] if shared else [4, 9, 10])
    for row, end in enumerate(ends.tolist()):
        assert torch.equal(found[0][row, :, end - 4 : end], k[row])
        assert torch.equal(found[1][row, :, end - 4 : end], v[row])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_written_behind_the_end_of_a_cache() -> None:
    k, v = random(1, 1, 3, 8), random(1, 1, 3, 8, seed=1)
    held = torch.zeros(1, 2, 4, 8).to(k)  # the second head stands for what lies behind
    fused.launch_append(
        k, v, held[:, :1], held[:, :1].clone(), torch.tensor([2], dtype=torch.int32).to(DEVICE)
    )
    assert torch.equal(held[0, 0, 2:], k[0, 0, :2])
    assert not held[0, 1].any()


@pytest.mark.parametrize("layout", ["ring", "paged"])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_new_keys_in_a_ring_and_in_pages(layout: str, count: int) -> None:
    """Rows of unequal length, padded behind, by the kernel and by the reference."""
    k, v = random(2, 2, count, 8), random(2, 2, count, 16, seed=1)
    seq_lens = torch.tensor([2, 11], dtype=torch.int32).to(DEVICE)
    new_lens = torch.tensor([count, max(1, count - 2)], dtype=torch.int32).to(DEVICE)
    if layout == "ring":
        options: dict[str, Any] = {"ring": True, "new_lens": new_lens}
        shapes = (2, 2, 5, 8), (2, 2, 5, 16)
    else:
        table = torch.randperm(14, generator=torch.Generator().manual_seed(0)).view(2, 7)
        options = {"block_table": table.to(torch.int32).to(DEVICE)}
        shapes = (14, 2, 3, 8), (14, 2, 3, 16)
    found = [random(*shape, seed=2) for shape in shapes]
    expected = [cache.clone() for cache in found]
    plain = [cache.clone() for cache in found]
    assert fused.launch_append(k, v, *found, seq_lens, **options).tolist() == [
        2 + count,
        11 + count,
    ]
    kv_memory.append_kv(k, v, *expected, seq_lens, **options)
    for row in range(2):
        real = int(new_lens[row]) if layout == "ring" else count
        for s in range(real):
            place = int(seq_lens[row]) + s
            at = (row, slice(None), place % 5)
            if layout == "paged":
                at = (int(table[row, place // 3]), slice(None), place % 3)
            plain[0][at], plain[1][at] = k[row, :, s], v[row, :, s]
    for one, other, written in zip(found, expected, plain, strict=True):
        assert torch.equal(one, other) and torch.equal(one, written)


@pytest.mark.skipif(DEVICE == "cuda", reason="here every call has a kernel")
def test_on_a_cpu_the_reference_runs() -> None:
    x, y, weight = random(2, 3, 8), random(2, 3, 8, seed=1), random(8, seed=2)
    assert torch.equal(fused.rms_norm(x, weight, 1e-5), functional.rms_norm(x, weight, 1e-5))
    for a, b in zip(
        fused.add_rms_norm(x, y, weight, 1e-5),
        functional.add_rms_norm(x, y, weight, 1e-5),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(fused.act_mul(x, y), functional.act_mul(x, y))
    q, (cos, sin) = random(2, 2, 3, 8), tables(2, 3, 4)
    assert torch.equal(fused.rope(q, cos, sin), functional.rope(q, cos, sin))
    assert torch.equal(fused.rope_pair(q, q, cos, sin)[1], functional.rope(q, cos, sin))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py has it")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("features", [{"rotary_dim": 12, "bias": True}, {"interleaved": True}])
def test_an_emitted_model_by_these_kernels(
    features: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model in f16, its attention apart: prefill, then decoding of unequal texts."""
    program = tiny_program(cache=True, head_dim=16, **features)
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    spec = importlib.util.spec_from_file_location("emitted", tmp_path / "out" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    emitted = sys.modules[f"{module.kernels.__name__}.fused"]
    calls: list[bool] = []
    monkeypatch.setattr(emitted, "runs_by_kernel", lambda *tensors: calls.append(True) or True)
    model = module.load(tmp_path / "out", dtype=torch.float16)
    texts = [[5, 6, 7, 8, 9], [1, 2]]
    decoder = module.Decoder(model, 12, batch=2)
    answers = [[token] for token in decoder.start(texts)]
    runner = Runner(program, dtype=torch.float64, mode="reference")
    for _ in range(3):
        for row, text in enumerate(texts):
            ids = torch.tensor([[*text, *answers[row][:-1]]])
            expected = runner.logits({"input_ids": ids})[0, -1]
            # Two dozen roundings to f16 on the way through, most of them averaged out.
            bound = 24 * 2.0**-11 * float(expected.abs().max())
            assert float((decoder.logits[row].double() - expected).abs().max()) < bound
        for answer, token in zip(answers, decoder.step(), strict=True):
            answer.append(token)
    # In a layer two norms, a rotation, a gate and a cache write; then the last norm.
    assert len(calls) == 4 * (5 * 2 + 1)


COMPILE = """
import collections
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.ir import functional
from graphopt.runtime.kernels import block

calls = collections.Counter()

def compiled(kernel, half, arch, **constants):
    calls[kernel.fn.__name__] += 1
    if not EVERY and calls[kernel.fn.__name__] % 3 != 1:
        return
    kinds = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "seq_lens_ptr": "*i32",
             "new_lens_ptr": "*i32", "block_table_ptr": "*i32", "total_ptr": "*i32",
             "eps": "fp32", "offset": "fp32"}
    signature = {
        name: "constexpr" if name in constants
        else kinds.get(name, "*" + half if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]

for arch, half in ((80, "bf16"), (90, "fp16")):
    alone = {"y_ptr": None, "sum_ptr": None}
    for more in ({}, alone, {"weight_ptr": None}):
        compiled(block.rms_norm, half, arch, N=576, ROWS=1, BLOCK=1024, OVERLAP=arch == 90, **more)
    for more in ({}, {"k_ptr": None, "k_out_ptr": None}):
        sizes = {"D": 80, "HALF": 16, "HEADS": 16, "BLOCK": 16, "TAIL": 64}
        compiled(block.rope, half, arch, INTERLEAVED=not more, OVERLAP=False, **sizes, **more)
    sizes |= {"COLUMNS": 128}
    compiled(block.rope_and_transform, half, arch, INTERLEAVED=False, OVERLAP=arch == 90, **sizes)
    for act in functional.ACTIVATIONS:
        compiled(block.act_mul, half, arch, ACT=act, BLOCK=1024, OVERLAP=arch == 90)
    for more in (
        {"RING": False, "PAGE": 0, "new_lens_ptr": None, "block_table_ptr": None},
        {"RING": True, "PAGE": 0, "block_table_ptr": None},
        {"RING": False, "PAGE": 24, "new_lens_ptr": None},
    ):
        sizes = {"K_DIM": 64, "V_DIM": 80, "HEADS": 4, "BLOCK_K": 64, "BLOCK_V": 128}
        compiled(block.append_kv, half, arch, OVERLAP=arch == 90, **sizes, **more)
"""


@pytest.mark.parametrize(
    "every",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.exhaustive)],
)
def test_kernels_compile_for_ampere_and_hopper(every: bool) -> None:
    """The interpreter takes types that the compiler does not. One takes a second: a third of them.

    Every kernel is among those, and with calls for both GPUs where it has several a GPU.
    """
    assert compile_alone(f"EVERY = {every}\n{COMPILE}") == ""
