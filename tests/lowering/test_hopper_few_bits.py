"""Kernels of few bits in CUDA C++, against fp64: on a GPU for which they are, else emulated."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from cuda_emulator import COMPILER
from hopper_emulator import on_this_machine
from torch import Tensor

from graphopt.errors import LoweringError
from graphopt.ir import functional
from graphopt.ir.encoding import Packed
from graphopt.lowering.kernels.family import runtime_text
from graphopt.lowering.kernels.in_front import FrontShape, why_apart
from graphopt.lowering.kernels.triton import quantised_tiles
from graphopt.runtime import kronecker, packed_few
from graphopt.runtime.compiled import ACTIVATIONS, runs_compiled, say_instead
from graphopt.runtime.kronecker import Cut, best_cut, launch_many
from graphopt.runtime.nvrtc import compile_cuda, nvrtc_version
from graphopt.runtime.packed_codes import PackedCodes, pack_codes
from graphopt.runtime.packed_few import FILES, Form, InFront, launch_few
from graphopt.runtime.quantised_tiles import FewTiles, warps_for
from graphopt.targets import get_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and COMPILER is None:
    pytest.skip("there is no g++ to run the kernels with", allow_module_level=True)
if DEVICE == "cuda" and not runs_compiled(torch.device("cuda:0")):
    pytest.skip("the kernels are not for this GPU", allow_module_level=True)
BF16 = torch.finfo(torch.bfloat16).eps / 2
"""Unit roundoff."""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in (packed_few, kronecker):
        on_this_machine(monkeypatch, launcher)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def some_weight(
    outputs: int, inputs: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[PackedCodes, Tensor]:
    """Return a packed weight, and the matrix that it stands for in fp64."""
    encoding = Packed(4, group, symmetric=symmetric)
    tensors = encoding.quantise(random(outputs, inputs, seed=1).float().cpu(), dtype)
    wide = encoding.dequantise({**tensors, "scales": tensors["scales"].double()})
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    codes = pack_codes(tensors["packed"], tensors["scales"], tensors.get("zeros"), group=group)
    assert codes is not None
    return codes, wide


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "group", "symmetric", "dtype", "act"),
    [
        (1, 40, 384, 32, True, torch.bfloat16, ""),
        pytest.param(3, 36, 384, 64, False, torch.bfloat16, "", marks=pytest.mark.exhaustive),
        (11, 20, 512, 128, True, torch.float16, "silu"),
        pytest.param(
            2, 34, 768, 256, False, torch.bfloat16, "gelu_tanh", marks=pytest.mark.exhaustive
        ),
        pytest.param(9, 40, 384, 384, True, torch.bfloat16, "", marks=pytest.mark.exhaustive),
    ],
)
def test_products_of_few_tokens(
    tokens: int,
    outputs: int,
    inputs: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    act: str,
) -> None:
    weight, wide = some_weight(outputs, inputs, group, symmetric, dtype)
    bias = random(outputs, seed=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (tokens, inputs), generator=generator, dtype=torch.int8)
    scales = torch.rand(tokens, generator=generator) * 0.01 + 0.01
    # Halves of one tensor, whose rows are longer than what is read.
    x = random(tokens, 2 * inputs, dtype=dtype)[:, inputs:]
    for given, own, tiles in (
        (x, None, FewTiles(16, 12, 1, 2)),
        (codes.to(DEVICE), scales.to(DEVICE), FewTiles(16, 12, 2, 1, near=2)),
    ):
        found = launch_few(given, weight, bias, tiles, 1, own, act)
        assert found is not None and found[1] is None
        got = found[0]
        assert got.dtype == dtype
        values = given.double().cpu() * (1 if own is None else own.double().cpu()[:, None])
        # Sums in fp32, and a rounding to 16 bits at their end.
        sums = values @ wide.t() + bias.double().cpu()
        off = values.abs() @ wide.abs().t() * inputs * 2.0**-24 + 1e-6
        exact = sums
        if act:
            exact = functional.act_mul(*sums.chunk(2, -1), act)
            # A gate's slope is at most 1.13.
            gate, up = sums.abs().chunk(2, -1)
            off = 1.2 * off[:, : outputs // 2] * (up + 1) + off[:, outputs // 2 :] * (gate + 1)
        allowed = off + exact.abs() * torch.finfo(dtype).eps
        assert bool(((got.double().cpu() - exact).abs() <= allowed).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "act"), [(32, "silu"), pytest.param(256, "", marks=pytest.mark.exhaustive)]
)
def test_codes_that_come_near_early_change_no_number(group: int, act: str) -> None:
    """Addresses behind a weight's end would end the emulation; 35 outputs end within a tile."""
    # Three spans of each of four warps.
    weight, _ = some_weight(70, 12 * 128, group, False, torch.bfloat16)
    x = random(1, 12 * 128)
    made = [launch_few(x, weight, None, FewTiles(8, 12, 2, 1, near), 1, act=act) for near in (0, 5)]
    for found in made:
        assert found is not None and made[0] is not None and torch.equal(found[0], made[0][0])


def test_what_is_summed_over_is_divided_until_a_core_has_its_warps() -> None:
    tiles = FewTiles(8, 12, 2, 2)
    found = [warps_for(outputs, 86, tiles, 132) for outputs in (2560, 4096, 11008, 22016, 128000)]
    assert found == [16, 16, 4, 4, 4]
    assert warps_for(8192, 86, tiles, 132) == 8
    # Four pieces are not divided among more than four.
    assert warps_for(2560, 4, tiles, 132) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "sums", "offset"), [(3, True, 0.0), (1, False, 1.0)])
def test_products_with_a_norm_in_front(tokens: int, sums: bool, offset: float) -> None:
    weight, wide = some_weight(40, 384, 128, True, torch.bfloat16)
    x, y = (random(tokens, 384, seed=seed) for seed in (0, 5))
    gain = random(384, seed=4)
    norm = InFront(y if sums else None, gain, 1e-5, offset)
    found = launch_few(x, weight, None, FewTiles(8, 12, 1, 2), 1, front=norm)
    assert found is not None
    got, total = found
    whole = x + y if sums else x
    assert (total is not None) == sums and (total is None or torch.equal(total, whole))
    normed = functional.rms_norm(whole.double().cpu(), gain.double().cpu(), 1e-5, offset)
    exact = normed @ wide.t()
    # A norm is rounded to bf16, and what comes out.
    allowed = 1.01 * BF16 * (normed.abs() @ wide.abs().t() + exact.abs()) + 1e-6
    assert bool(((got.double().cpu() - exact).abs() <= allowed).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "n1", "n2", "factors", "before", "sums", "dtype"),
    [
        # Sizes that are whole tiles, and such with a part of one; factors of either side alone.
        (1, 32, 64, "both", "norm", True, torch.bfloat16),
        (2, 16, 88, "both", "silu", False, torch.float16),
        (3, 12, 32, "left", "", False, torch.bfloat16),
        pytest.param(
            4, 48, 8, "right", "gelu_tanh", False, torch.float16, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            1, 86, 128, "both", "silu", False, torch.bfloat16, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            2, 18, 64, "left", "norm", True, torch.float16, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            1, 16, 24, "right", "norm", False, torch.bfloat16, marks=pytest.mark.exhaustive
        ),
    ],
)  # fmt: skip
def test_products_with_a_transform_in_front(
    tokens: int, n1: int, n2: int, factors: str, before: str, sums: bool, dtype: torch.dtype
) -> None:
    inputs = n1 * n2
    weight, wide = some_weight(40, inputs, 128, True, dtype)
    x, y = random(tokens, 2 * inputs, dtype=dtype).chunk(2, -1)
    gain = random(inputs, seed=4, dtype=dtype) if before == "norm" else None
    left, right = (
        rotation(size, seed).to(dtype).contiguous() if factors in ("both", side) else None
        for size, seed, side in ((n1, 1, "left"), (n2, 2, "right"))
    )
    two = sums or before not in ("", "norm")
    front = InFront(y if two else None, gain, 1e-5, 0.0, before, left, right)
    found = launch_few(x, weight, None, FewTiles(8, 12, 1, 2), 1, front=front)
    assert found is not None
    got, total = found
    whole = x + y if sums else x
    assert (total is not None) == sums and (total is None or torch.equal(total, whole))
    values = whole.double().cpu()
    if gain is not None:
        values = functional.rms_norm(values, gain.double().cpu(), 1e-5, 0.0)
    elif before:
        values = functional.act_mul(values, y.double().cpu(), before)
    made = functional.kronecker(
        values, *(None if t is None else t.double().cpu() for t in (left, right))
    )
    exact = made @ wide.t()
    # What is multiplied is rounded, and what is between the products, and what comes out of them:
    # of orthogonal factors each keeps the length of a token's error. Then the product is.
    half = torch.finfo(dtype).eps / 2
    moved = 3 * half * values.norm(dim=-1, keepdim=True) * wide.norm(dim=-1)
    allowed = 1.01 * (moved + half * exact.abs()) + 1e-5 * wide.norm(dim=-1)
    assert bool(((got.double().cpu() - exact).abs() <= allowed).all())


@pytest.mark.slow
def test_a_transform_in_front_of_a_gated_product() -> None:
    n1, n2 = 12, 32
    weight, wide = some_weight(40, n1 * n2, 128, True, torch.bfloat16)
    x, gain = random(1, n1 * n2), random(n1 * n2, seed=4)
    left, right = (rotation(size, size).contiguous() for size in (n1, n2))
    front = InFront(None, gain, 1e-5, 0.0, "norm", left, right)
    found = launch_few(x, weight, None, FewTiles(8, 12, 2, 1), 1, act="silu", front=front)
    assert found is not None
    normed = functional.rms_norm(x.double().cpu(), gain.double().cpu(), 1e-5, 0.0)
    made = functional.kronecker(normed, left.double().cpu(), right.double().cpu())
    gate, up = (made @ wide.t()).chunk(2, -1)
    exact = functional.act_mul(gate, up, "silu")
    # Three roundings in front of the product, as above; the gate's slope is at most 1.13.
    moved = 3.03 * BF16 * made.norm() * wide.norm(dim=-1) + 1e-5
    off = 1.2 * moved[:20] * up.abs() + moved[20:] * (gate.abs() + 1)
    assert bool(((found[0].double().cpu() - exact).abs() <= off + 1.01 * BF16 * exact.abs()).all())


def test_what_a_product_does_not_transform() -> None:
    weight, _ = some_weight(32, 256, 128, True, torch.bfloat16)
    wide, _ = some_weight(32, 30 * 128, 128, True, torch.bfloat16)
    tiles = FewTiles(16, 12, 1, 2)
    turned = rotation(16, 1).contiguous().t()
    for front, codes, act, why in (
        (InFront(None, None, 0.0, 0.0, "", turned), weight, "", "row by row"),
        (InFront(None, None, 0.0, 0.0, "", None, rotation(4, 1)), weight, "", "as 64 x 4"),
        (InFront(None, None, 0.0, 0.0, "", rotation(15, 1)), wide, "", "as 15 x 256"),
        (InFront(None, None, 0.0, 0.0, "silu"), weight, "", "has no transform"),
        (
            InFront(random(1, 256), None, 0.0, 0.0, "silu", None, rotation(16, 1).contiguous()),
            weight, "relu", "silu in front of a product and relu",
        ),
        (
            InFront(None, None, 0.0, 0.0, "", None, random(384, 384)), wide, "",
            "a transform of 10 x 384 takes",
        ),
    ):  # fmt: skip
        say_instead.cache_clear()
        x = random(1, codes.shape[1])
        with pytest.warns(UserWarning, match=f"{why}.*Triton run instead of hopper_packed_few"):
            assert launch_few(x, codes, None, tiles, 1, act=act, front=front) is None


def test_a_product_transforms_where_that_takes_less() -> None:
    few = (FewTiles(8, 12, 2, 2),)
    known = quantised_tiles(get_target("hopper"))
    assert known is not None and known.front is not None
    tiles = replace(known, few=few, front=replace(known.front, tokens=1))
    none = replace(tiles, front=replace(known.front, tokens=0))
    assert "no figures" in str(why_apart(FrontShape(32, 64, True, True, 2560), none))
    # A 1.1B shape: of q, k and v, of merged heads, of gate and up, of what down reads.
    for shape in (
        FrontShape(32, 64, True, True, 2560, "norm"),
        FrontShape(32, 64, True, False, 2048),
        FrontShape(32, 64, True, True, 11264, "norm"),
        FrontShape(64, 88, True, True, 2048, "silu"),
    ):
        assert why_apart(shape, tiles) is None
    for shape, why in (
        # Of a core's blocks each transforms for itself.
        (FrontShape(64, 64, True, True, 12288, "norm"), "3 blocks of a core would transform for"),
        (FrontShape(64, 64, True, True, 22016, "norm"), "no room for 6 blocks"),
        (FrontShape(96, 224, True, True, 4096, "silu"), "no room for 1 blocks"),
        (FrontShape(15, 256, True, True, 4096), "takes no transform of 3840 features as 15 x 256"),
        (FrontShape(32, 64, True, True, 2560, span=64), "takes no transform"),
        (FrontShape(32, 64, True, True, 2560, "silu", "relu"), "its gate is silu"),
    ):
        assert why in str(why_apart(shape, tiles))


def test_what_the_kernel_for_few_tokens_does_not_take() -> None:
    weight, _ = some_weight(32, 256, 128, True, torch.bfloat16)
    small, _ = some_weight(32, 192, 64, True, torch.bfloat16)
    tiles = FewTiles(16, 12, 1, 2)
    assert small.span < 128
    other = InFront(random(1, 256), None, 1e-5, 0.0)
    wide = InFront(None, random(257), 1e-5, 0.0)
    for x, codes, bias, norm, why in (
        (random(1, 192), small, None, None, "192 inputs in groups of 64"),
        (random(1, 256, dtype=torch.float16), weight, None, None, "torch.float16"),
        (random(1, 256), weight, random(32).float(), None, "torch.float32"),
        (random(1, 256).to(torch.int8), weight, None, other, "torch.int8"),
        (random(2, 257)[:, 1:], weight, None, None, "multiples of 8 bytes"),
        (random(2, 256), weight, None, other, r"\(2, 256\) and \(1, 256\)"),
        (random(1, 256), weight, None, wide, "a gain is"),
    ):
        say_instead.cache_clear()
        with pytest.warns(UserWarning, match=f"{why}.*Triton run instead of hopper_packed_few"):
            assert launch_few(x, codes, bias, tiles, 1, front=norm) is None
    # What other kernels are for is not said.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = InFront(None, None, 1e-5, 0.0)
        assert launch_few(random(5, 256), weight, None, tiles, 1, front=many) is None
        assert launch_few(random(0, 256), weight, None, tiles, 1) is None


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0].to(torch.bfloat16).to(DEVICE)


def values_of(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return left^T x right of tokens in fp64."""
    tile = x.unflatten(-1, (len(left), -1)) @ right.double().cpu()
    return (left.double().cpu().t() @ tile).flatten(-2)


TOKENS = 5
SHAPES = [(24, 24), (20, 48), (64, 64), (9, 40)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "sums", "offset", "bits", "pairs", "clips"),
    [
        ("norm", True, 0.0, 4, False, False),
        ("norm", False, 1.0, 0, False, False),
        ("silu", False, 0.0, 8, False, True),
        ("", False, 0.0, 4, True, False),
    ],
)
@pytest.mark.parametrize(("n1", "n2"), [pytest.param(*SHAPES[0]), *(
    pytest.param(*shape, marks=pytest.mark.exhaustive) for shape in SHAPES[1:]
)])  # fmt: skip
def test_transforms_of_many_tokens(
    n1: int, n2: int, before: str, sums: bool, offset: float, bits: int, pairs: bool, clips: bool
) -> None:
    # A gate reads the halves of one product.
    x, y = random(TOKENS, 2 * n1 * n2).chunk(2, -1)
    x[1] = y[1] = 0
    x[3, 7] = float("nan")
    gain = random(n1 * n2, seed=4) if before == "norm" else None
    left, right = rotation(n1, 1), rotation(n2, 2)
    low, high = (torch.tensor([v], dtype=torch.bfloat16, device=DEVICE) for v in (0.75, 0.875))
    two = sums or before == "silu"
    found = launch_many(
        x, left, right, before=before, y=y if two else None, weight=gain, eps=1e-5, offset=offset,
        clip_low=low if clips else None, clip_high=high if clips else None, bits=bits, pairs=pairs,
    )  # fmt: skip
    assert found is not None
    out, scales, total = (None if t is None else t.cpu() for t in found)
    whole = x + y if sums else x
    wide = whole.double().cpu()
    if before == "norm":
        assert gain is not None
        wide = functional.rms_norm(wide, gain.double().cpu(), 1e-5, offset)
    elif before:
        wide = functional.act_mul(wide, y.double().cpu(), before)
    values, good = values_of(wide, left, right), [0, 1, 2, 4]
    assert (total is not None) == sums
    if total is not None:
        assert torch.equal(total[good], whole.cpu()[good])
    # What is multiplied is rounded, and what is between the products: of orthogonal factors each
    # keeps the length of a token's error.
    error = 2 * BF16 * wide.norm(dim=-1)
    assert out is not None
    if bits == 0:
        assert scales is None and not out[3].isfinite().any()
        off = (out.double() - values).abs() - BF16 * values.abs()
        assert bool((off[good] <= error[good, None]).all())
        return
    top = 2 ** (bits - 1) - 1
    most = torch.maximum(
        values.amax(-1).clamp(min=0) * (0.875 if clips else 1.0),
        -values.amin(-1).clamp(max=0) * (0.75 if clips else 1.0),
    )
    own = (most / top).masked_fill(most == 0, 1.0)
    assert scales is not None and scales[3].isnan() and scales[1] == 1
    assert bool(((scales.double() - own).abs()[good] <= error[good] / top + 1e-6 * own[good]).all())
    codes = out
    if pairs:
        codes = functional.unpack(out, 4).to(torch.int8)
        codes = torch.where(codes > 7, codes - 16, codes)
    exact = (values / scales[:, None].double()).clamp(-top - 1, top)
    off = (codes.double() - exact).abs() - error[:, None] / scales[:, None].double()
    assert bool((off[good] <= 0.5 + 1e-5 * top).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n1", "n2", "before", "over"),
    [
        (64, 64, "norm", True),
        pytest.param(24, 24, "silu", False, marks=pytest.mark.exhaustive),
        pytest.param(112, 128, "silu", True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_block_goes_from_token_to_token(
    n1: int, n2: int, before: str, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kronecker._planned.cache_clear()
    monkeypatch.setattr(kronecker, "cores_of", lambda device: 1)
    gate = before == "silu"
    cut = best_cut(Cut(n1, n2, kronecker.GATE if gate else kronecker.NORM, bits=8))
    assert cut is not None and cut.over == over
    tokens = 2 * cut.blocks + 1
    x, y = (random(tokens, n1 * n2, seed=seed) for seed in (0, 5))
    factors = rotation(n1, 1), rotation(n2, 2)

    def of(rows: slice) -> tuple[Tensor, Tensor]:
        found = launch_many(
            x[rows], *factors, before=before, y=y[rows] if gate else None, eps=1e-5, bits=8
        )
        assert found is not None and found[1] is not None
        return found[0], found[1]

    alone = [of(slice(token, token + 1)) for token in range(tokens)]
    for together, parts in zip(of(slice(None)), zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))
    kronecker._planned.cache_clear()


def test_what_the_kernel_for_many_tokens_does_not_take() -> None:
    left, right = rotation(16, 1), rotation(24, 2)
    x = random(2, 16 * 24)
    for given, factors, offset, why in (
        (x.half(), (left.half(), right.half()), 0.0, "torch.float16"),
        (x, (left, right), 0.5, r"gains \+ 0.5"),
        (random(2, 16 * 24 + 1)[:, 1:], (left, right), 0.0, "multiples of 16 bytes"),
        (random(2, 16 * 18), (left, rotation(18, 2)), 0.0, "factors of 16 and 18"),
    ):
        say_instead.cache_clear()
        kronecker._planned.cache_clear()
        with pytest.warns(UserWarning, match=f"{why}.*Triton run instead of hopper_transform"):
            assert launch_many(given, *factors, before="norm", offset=offset) is None
    # A factor of 512 is 512 KB.
    assert best_cut(Cut(512, 64, kronecker.NONE)) is None


def test_cuts_have_room_on_a_core() -> None:
    for n1, n2 in ((64, 64), (86, 128), (112, 128), (32, 64)):
        for front, bits in ((kronecker.NORM, 4), (kronecker.GATE, 8), (kronecker.NONE, 0)):
            cut = best_cut(Cut(n1, n2, front, bits=bits))
            assert cut is not None and cut.fits and cut.threads <= 1024
            assert cut.blocks * (cut.shared_bytes + 1024) <= 233472


def _nvrtc() -> str:
    try:
        nvrtc_version()
    except LoweringError as error:
        return str(error)
    return ""


@pytest.mark.skipif(_nvrtc() != "", reason=_nvrtc())
@pytest.mark.slow
def test_kernels_compile_without_spilling() -> None:
    def log_of(files: tuple[str, ...], constants: dict[str, int], front: str = "") -> str:
        text = front + "".join(runtime_text(f"kernels/{file}") for file in files)
        return compile_cuda(text, files[-1], "sm_90a", constants).log

    for warps, act, norm in ((4, ACTIVATIONS[0], True), (16, "", False)):
        form = Form(True, False, False, norm, norm, act, warps, 2, 2, 1, 128)
        assert "0 bytes spill stores" in log_of(FILES, form.constants)
    for warps, norm, front in (
        (16, True, ("", 32, 64, True, True)),
        (16, False, ("silu", 64, 88, True, True)),
    ):
        form = Form(True, False, False, norm, norm, "", warps, 2, 2, 1, 128, *front)
        assert "0 bytes spill stores" in log_of(FILES, form.constants)
    # Of 112 features a second block of a core is worth some spills.
    for cut in (Cut(64, 64, kronecker.NORM, bits=4), Cut(86, 128, kronecker.GATE, bits=4)):
        best = best_cut(cut)
        assert best is not None
        assert "0 bytes spill stores" in log_of(
            kronecker.FILES, best.constants, kronecker.product_of(cut.n1)
        )
