"""Kernels of Kronecker transforms and of rounding, against fp64: on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from graphopt.ir import functional  # noqa: E402
from graphopt.runtime import transforms  # noqa: E402
from graphopt.runtime.transforms import TransformKernels, fits, launch_transform  # noqa: E402

DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
H100 = 232448


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def rotation(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0].to(dtype).to(DEVICE)


def exact(x: Tensor, left: Tensor | None, right: Tensor | None, n1: int) -> Tensor:
    """Return left^T x right of tokens [T, N1 N2] in fp64, rounded between as the kernel does."""
    tile = x.double().cpu().unflatten(-1, (n1, -1))
    if right is not None:
        tile = tile @ right.double().cpu()
        tile = tile if left is None else tile.to(x.dtype).double()
    return (tile if left is None else left.double().cpu().t() @ tile).flatten(-2)


def rounded(values: Tensor, bits: int, low: float = 1.0, high: float = 1.0) -> tuple[Tensor, ...]:
    """Return codes and scales of values [T, K] in fp64."""
    top = 2 ** (bits - 1) - 1
    largest = torch.maximum((values.amax(-1) * high).abs(), (values.amin(-1) * low).abs())
    scales = largest / top
    scales = scales.masked_fill(scales == 0, 1.0)
    return (values / scales[:, None]).round().clamp(-top - 1, top), scales


def unpacked(codes: Tensor, pairs: bool) -> Tensor:
    """Return codes as numbers."""
    if not pairs:
        return codes.cpu().double()
    both = functional.unpack(codes.cpu(), 4).double()
    return torch.where(both > 7, both - 16, both)


def check(codes: Tensor, scales: Tensor | None, values: Tensor, bits: int, **clips: float) -> None:
    assert scales is not None
    wanted, own = rounded(values, bits, **clips)
    assert bool(((scales.cpu().double() - own).abs() <= 1e-3 * own).all())
    off = (unpacked(codes, codes.dtype == torch.uint8) - wanted).abs()
    assert float(off.max()) <= 1
    assert float((off > 0).double().mean()) <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n1", "n2"), [(24, 24), (32, 48), (64, 64), (86, 128), (9, 64), (112, 128)]
)
def test_transform_and_codes(n1: int, n2: int, bits: int, dtype: torch.dtype) -> None:
    x = random(3, n1 * n2, dtype=dtype, seed=0)
    x[1] = 0
    left, right = rotation(n1, dtype, 1), rotation(n2, dtype, 2)
    codes, scales, total = launch_transform(x, left, right, bits=bits, pairs=bits == 4)
    assert total is None and scales is not None
    values = exact(x, left, right, n1)
    check(codes, scales, values, bits)
    assert scales[1] == 1 and not codes[1].any()


@pytest.mark.parametrize("sides", ["left", "right", "none"])
def test_a_factor_may_be_absent(sides: str) -> None:
    dtype, n1, n2 = torch.float16, 12, 32
    x = random(4, n1 * n2, dtype=dtype, seed=0)
    left = rotation(n1, dtype, 1) if sides == "left" else None
    right = rotation(n2, dtype, 2) if sides == "right" else None
    values = exact(x, left, right, n1)
    codes, scales, _ = TransformKernels(H100).by_kernels(x, left, right, bits=8)
    check(codes, scales, values, 8)
    plain, scales, _ = TransformKernels(H100).by_kernels(x, left, right)
    assert scales is None
    assert bool(((plain.cpu().double() - values).abs() <= 2.0**-10 * values.abs() + 1e-5).all())


def test_a_norm_in_front() -> None:
    dtype, n1, n2 = torch.float16, 24, 24
    x, y = (random(5, n1 * n2, dtype=dtype, seed=seed) for seed in (0, 3))
    gain = random(n1 * n2, dtype=dtype, seed=4)
    left, right = rotation(n1, dtype, 1), rotation(n2, dtype, 2)
    for addend in (None, y):
        codes, scales, total = launch_transform(
            x, left, right, before="norm", y=addend, weight=gain, eps=1e-5, offset=1.0, bits=4
        )
        whole = x if addend is None else (x + addend)
        if addend is not None:
            assert total is not None and torch.equal(total, whole)
        normed = functional.rms_norm(whole.cpu().double(), gain.cpu().double(), 1e-5, 1.0)
        check(codes, scales, exact(normed.to(dtype), left, right, n1), 4)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_a_gate_in_front_and_clips_behind(act: str) -> None:
    dtype, n1, n2 = torch.float16, 32, 48
    # Halves of one product, which are no whole rows of memory.
    gate, up = random(2, 3, 2 * n1 * n2, dtype=dtype, seed=0).split(n1 * n2, -1)
    left, right = rotation(n1, dtype, 1), rotation(n2, dtype, 2)
    low, high = (torch.tensor(value, device=DEVICE) for value in (0.8, 0.9))
    codes, scales, _ = launch_transform(
        gate, left, right, before=act, y=up, bits=4, pairs=True, clip_low=low, clip_high=high
    )
    assert codes.shape == (2, 3, n1 * n2 // 2) and scales is not None and scales.shape == (2, 3)
    wide = functional.act_mul(gate.cpu().double(), up.cpu().double(), act).to(dtype)
    values = exact(wide, left, right, n1).flatten(0, 1)
    check(codes.flatten(0, 1), scales.flatten(), values, 4, low=0.8, high=0.9)


def test_what_is_too_large_for_a_core_takes_several_kernels_and_gives_the_same() -> None:
    dtype, n1, n2 = torch.float16, 32, 48
    # Of a core as small as that, the second holds the left product and the third none.
    whole, left_alone, none = H100, 2 * (32 * 32 + 2 * 32 * 64), 1024
    assert fits(n1, n2, n1, n2, whole) and not fits(n1, n2, n1, n2, left_alone)
    assert fits(n1, None, n1, n2, left_alone) and not fits(n1, None, n1, n2, none)
    assert not fits(128, 256, 128, 256, H100) and fits(112, 128, 112, 128, H100)
    x, y = (random(4, n1 * n2, dtype=dtype, seed=seed) for seed in (0, 3))
    left, right = rotation(n1, dtype, 1), rotation(n2, dtype, 2)
    gain = random(n1 * n2, dtype=dtype, seed=4)
    for front in ({}, {"before": "norm", "y": y, "weight": gain, "eps": 1e-5}):
        expected = TransformKernels(whole).by_kernels(x, left, right, bits=4, **front)
        for room in (left_alone, none):
            got = TransformKernels(room).by_kernels(x, left, right, bits=4, **front)
            off = (got[0].int() - expected[0].int()).abs()
            # The last rounds the values to 16 bits before their codes.
            assert int(off.max()) <= 1 and float((off > 0).double().mean()) <= 1e-3
            assert torch.allclose(got[1], expected[1], rtol=1e-3)
            assert (got[2] is None) == (expected[2] is None)


def test_a_gpu_with_less_memory_than_the_target_takes_several_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = random(2, 32 * 48, dtype=torch.float16, seed=0)
    left, right = (rotation(size, torch.float16, seed) for seed, size in enumerate((32, 48)))
    launched: list[bool] = []
    launch = transforms.launch_transform

    def counted(x: Tensor, left: Tensor | None, right: Tensor | None, **rest: Any) -> Any:
        launched.append(right is None)
        return launch(x, left, right, **rest)

    monkeypatch.setattr(transforms, "launch_transform", counted)
    for own in (None, H100, 2 * (32 * 32 + 2 * 32 * 64)):
        monkeypatch.setattr(transforms, "_shared_bytes_of", lambda device, own=own: own)
        TransformKernels(H100).by_kernels(x, left, right, bits=8)
    assert launched == [False, False, True]


def test_what_is_no_number_stays_none() -> None:
    x = random(3, 576, dtype=torch.float16, seed=0)
    x[1, 5] = float("nan")
    for left in (None, rotation(24, torch.float16, 1)):
        _, scales, _ = launch_transform(x, left, None, sizes=(24, 24), bits=8)
        assert scales is not None and scales.isnan().tolist() == [False, True, False]
