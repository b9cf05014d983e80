"""Kernels of four-bit weights and of transforms, against fp64: on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from compiling import compile_alone
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from graphopt.ir.encoding import Packed  # noqa: E402
from graphopt.runtime import quantised_launch, quantised_linear  # noqa: E402
from graphopt.runtime.fitting_tiles import with_fewer_stages  # noqa: E402
from graphopt.runtime.packed_codes import PackedCodes, pack_codes  # noqa: E402
from graphopt.runtime.quantised_launch import (  # noqa: E402
    launch_integer,
    launch_packed,
    launch_unpack,
)
from graphopt.runtime.quantised_linear import QuantisedKernels  # noqa: E402
from graphopt.runtime.quantised_tiles import (  # noqa: E402
    IntegerTiles,
    PackedTiles,
    QuantisedTiles,
    splits_for,
)

# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
FEW = PackedTiles(tokens=16, rows=64, columns=16, warps=2, stages=3, programs=4)
FEWEST = PackedTiles(tokens=16, rows=32, columns=16, warps=1, stages=1, programs=8, unroll=2)


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def some_weight(
    outputs: int, inputs: int, group: int, dtype: torch.dtype, symmetric: bool = True
) -> tuple[PackedCodes, Tensor]:
    """Return a packed weight, and the matrix that it stands for in fp64."""
    encoding = Packed(4, group, symmetric=symmetric)
    tensors = encoding.quantise(random(outputs, inputs, dtype=torch.float32, seed=1).cpu(), dtype)
    wide = encoding.dequantise({**tensors, "scales": tensors["scales"].double()})
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    codes = pack_codes(tensors["packed"], tensors["scales"], tensors.get("zeros"), group=group)
    assert codes is not None
    return codes, wide


def bound(x: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a product may be off by: each sum in fp32, and one rounding at its end."""
    magnitudes = x.double().cpu().abs() @ wide.abs().t()
    size = (x.double().cpu() @ wide.t()).abs()
    return magnitudes * x.shape[-1] * 2.0**-24 + size * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "group", "symmetric"),
    [
        (1, 96, 256, 32, True),
        (3, 100, 192, 64, False),
        (16, 64, 512, 128, True),
        (20, 70, 576, 576, True),
        (2, 33, 384, 384, False),
        (1, 48, 768, 256, True),
        (9, 40, 640, 32, False),
        (5, 40, 640, 64, True),
    ],
)
def test_packed_linear(
    tokens: int, outputs: int, inputs: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight, wide = some_weight(outputs, inputs, group, dtype, symmetric)
    assert weight.shape == (outputs, inputs)
    x, bias = random(tokens, inputs, dtype=dtype), random(outputs, dtype=dtype, seed=2)
    expected = x.double().cpu() @ wide.t()
    for tiles, cores, own in (
        (FEW, 1, None), (FEW, 8, bias), (FEWEST, 1, bias), (FEWEST, 8, None)
    ):  # fmt: skip
        if tokens > FEWEST.columns and tiles is FEWEST:
            continue
        got = launch_packed(x, weight, own, tiles, cores).double().cpu()
        exact = expected if own is None else expected + own.double().cpu()
        allowed = bound(x, wide, dtype) + exact.abs() * torch.finfo(dtype).eps
        assert bool(((got - exact).abs() <= allowed).all())
        # Whoever adds the parts leaves the counters as they were.
        assert not weight.arrived.any()


def test_parts_of_a_sum_are_spread_over_programs() -> None:
    assert splits_for(96, 1, 8, FEW, 1) == 2
    assert splits_for(64, 1, 8, FEW, 8) == 4
    assert splits_for(11008, 1, 32, FEW, 132) == 3
    assert splits_for(64, 1, 1, FEW, 132) == 1
    # Parts of 3 spans: a fourth program would have none of 9.
    assert splits_for(64, 1, 9, FEW, 1) == 3
    # Parts of what is on its way at once.
    assert splits_for(32, 1, 9, FEWEST, 1) == 5
    assert splits_for(320, 1, 90, FEWEST, 6) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_unpacked_weights_are_those_of_the_encoding(symmetric: bool, dtype: torch.dtype) -> None:
    weight, wide = some_weight(70, 192, 64, dtype, symmetric)
    assert torch.equal(launch_unpack(weight, dtype).cpu(), wide.to(dtype))
    if symmetric:
        numbers = wide / weight.scales.t().double().cpu().repeat_interleave(64, 1)
        assert torch.equal(launch_unpack(weight, torch.int8).cpu().double() / 16, numbers)


def test_groups_that_do_not_fit_have_no_codes() -> None:
    packed = Packed(4, 18).quantise(torch.randn(4, 36))
    assert pack_codes(packed["packed"], packed["scales"], group=18) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 192), (5, 192), (40, 192), (70, 192), (5, 96)])
def test_products_of_codes_are_exact_up_to_the_scales(
    tokens: int, inputs: int, bits: int, dtype: torch.dtype
) -> None:
    tiles = QuantisedTiles(
        cores=3,
        shared_bytes=232448,
        packed=(PackedTiles(1, 32, 8, 1, 1, 4, 4),),
        integer_packed=(PackedTiles(16, 64, 16, 2, 3, 4), PackedTiles(48, 64, 32, 4, 3, 4)),
        integer=IntegerTiles(64, 64, 128, 4, 3, group=2, persistent=tokens == 70),
    )
    weight, wide = some_weight(100, inputs, inputs, dtype)
    generator = torch.Generator().manual_seed(3)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (tokens, inputs), generator=generator, dtype=torch.int8)
    scales = torch.rand(tokens, generator=generator) + 0.1
    bias = random(100, dtype=dtype, seed=2)
    exact = (codes.double() * scales[:, None].double()) @ wide.t() + bias.double().cpu()
    got = QuantisedKernels(tiles).integer_linear_of_codes(
        codes.to(DEVICE), scales.to(DEVICE), weight, bias
    )
    # Sums of codes are exact; then come three roundings in fp32 and one to 16 bits.
    error = (got.double().cpu() - exact).abs()
    sums = exact.abs() + bias.double().cpu().abs()
    assert bool((error <= sums * 2.0**-22 + exact.abs() * torch.finfo(dtype).eps / 2 + 1e-7).all())


def test_a_table_of_two_modules_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_linear, "runs_by_kernel", lambda *tensors: True)
    encoding = Packed(4, 32, symmetric=False)
    values = random(24, 128, dtype=torch.float32, seed=1).cpu()
    stored = encoding.quantise(values, torch.float16)
    wide = encoding.dequantise(stored)
    weights = {
        f"table.{suffix}": torch.nn.Parameter(tensor.clone(), requires_grad=False)
        for suffix, tensor in stored.items()
    }
    options = {"bits": 4, "group": 32, "axis": 1}
    table = quantised_linear.QuantisedWeight(weights, "table", **options)
    head = quantised_linear.QuantisedWeight(dict(weights), "table", **options)
    assert all(
        one is other for one, other in zip(table.parameters(), head.parameters(), strict=True)
    )
    assert not any(tensor.numel() for tensor in weights.values())
    ids = torch.tensor([3, 0, 23])
    assert head.sizes == [24] and torch.equal(head(), wide)
    assert torch.equal(table.rows(ids), wide[ids])
    for beyond in (-1, 24):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            table.rows(torch.tensor([[0, beyond]]))


class OutOfResources(Exception):
    """What Triton raises where a GPU has too little shared memory; known by its name."""


def test_stages_for_which_a_gpu_has_no_memory_are_tried_once() -> None:
    tried: list[int] = []

    def start(stages: int) -> None:
        tried.append(stages)
        if stages > 2:
            raise OutOfResources

    for _ in range(2):
        with_fewer_stages(("a kernel", 0), 4, start)
    assert tried == [4, 3, 2, 2]
    with_fewer_stages(("a kernel", 1), 3, start)
    assert tried[4:] == [3, 2]

    def never(stages: int) -> None:
        raise OutOfResources

    for _ in range(2):
        with pytest.raises(OutOfResources):
            with_fewer_stages(("a kernel", 2), 2, never)


def test_a_packed_product_takes_fewer_stages_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, wide = some_weight(32, 128, 32, torch.float16)
    asked: list[int] = []

    def short(key: object, stages: int, start: Callable[[int], None]) -> None:
        asked.append(stages)
        start(1)

    monkeypatch.setattr(quantised_launch, "with_fewer_stages", short)
    x = random(2, 128)
    got = launch_packed(x, weight, None, FEW, 1).double().cpu()
    assert asked == [FEW.stages]
    exact = x.double().cpu() @ wide.t()
    assert bool(((got - exact).abs() <= bound(x, wide, torch.float16)).all())


def test_a_product_of_int8_whose_depth_is_no_multiple_of_a_tile() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (
        torch.randint(-127, 128, (rows, 200), generator=generator, dtype=torch.int8)
        for rows in (33, 50)
    )
    ones = torch.ones(50)
    got = launch_integer(
        x.to(DEVICE), ones[:33].to(DEVICE), weight.to(DEVICE), ones.to(DEVICE), None,
        torch.float32, IntegerTiles(32, 32, 64, 4, 2), 2,
    )  # fmt: skip
    # Below 2^24, so that fp32 holds each.
    assert torch.equal(got.cpu().long(), x.long() @ weight.long().t())


COMPILE = """
import collections
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.runtime.kernels import integer_linear, packed_kv, packed_linear, transform

calls = collections.Counter()

def compiled(kernel, half, arch, kinds, warps, **constants):
    calls[kernel.fn.__name__] += 1
    if not EVERY and calls[kernel.fn.__name__] % 3 != 1:
        return
    kinds = {"x_scales_ptr": "*fp32", "codes_ptr": "*u8", "part_ptr": "*fp32",
             "arrived_ptr": "*i32", "eps": "fp32", "offset": "fp32", "unit": "fp32",
             "clip_low_ptr": "*fp32", "clip_high_ptr": "*fp32", "seq_lens_ptr": "*i32",
             "total_ptr": "*i32", "cache_k_ptr": "*u8", "cache_v_ptr": "*u8"} | kinds
    signature = {
        name: "constexpr" if name in constants
        else kinds.get(name, "*" + half if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target, options = GPUTarget("cuda", arch, 32), {"num_warps": warps}
    assert triton.compile(source, target=target, options=options).asm["ptx"]

for arch, half in ((80, "bf16"), (90, "fp16")):
    words = {"WORDS": True, "BLOCK_N": 16, "BLOCK_M": 8, "SPLITS": 2}
    for span, group in ((128, 0), (128, 32), (64, 64), (32, 0)):
        alone = {"x_scales_ptr": None, "zeros_ptr": None, "bias_ptr": None}
        compiled(packed_linear.packed_few, half, arch, {}, 1, SPAN=span, GROUP=group, UNROLL=2,
                 OVERLAP=arch == 90, **alone, **words)
        compiled(packed_linear.packed_linear, half, arch, {}, 4, SPAN=span, GROUP=group,
                 INTEGER=False, x_scales_ptr=None, **words | {"BLOCK_N": 64, "BLOCK_M": 32})
        compiled(packed_linear.unpack_weight, half, arch, {}, 4, SPAN=span, GROUP=group or 128,
                 BLOCK_N=64, WORDS=True)
    for group in (0, 32):
        compiled(packed_linear.packed_linear, half, arch, {"x_ptr": "*i8"}, 8, SPAN=128,
                 GROUP=group, INTEGER=True, zeros_ptr=None,
                 **words | {"BLOCK_N": 128, "BLOCK_M": 64})
    compiled(integer_linear.integer_linear, half, arch, {"x_ptr": "*i8", "weight_ptr": "*i8"}, 8,
             x_tiles=None, weight_tiles=None, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8,
             WHOLE=True, FLATTEN=False)
    for n1, parts, before, bits in ((64, (64, 0), "norm", 4), (86, (64, 32), "silu", 8)):
        compiled(transform.transform, half, arch, {"out_ptr": "*i8"}, 8, N1=n1, N2=128,
                 D0=parts[0], D1=parts[1], B2=128, BEFORE=before, BITS=bits, PAIRS=bits == 4,
                 OVERLAP=arch == 90)
    for bits in (4, 8):
        compiled(packed_kv.append_packed_kv, half, arch, {}, 1, new_lens_ptr=None,
                 block_table_ptr=None, K_DIM=64, V_DIM=64, HEADS=4, BLOCK_K=8 * bits,
                 BLOCK_V=8 * bits, BITS=bits, RING=False, PAGE=0, OVERLAP=arch == 90)
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
