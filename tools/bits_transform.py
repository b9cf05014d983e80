"""Transforms of tokens with their norm or gate and rounding, beside copies of as many bytes."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from measure import target_here
from torch import Tensor
from turns import ON_GPU, Result, Rows, best_of, median, microseconds, microseconds_in_graphs

from graphopt.ir import functional
from graphopt.lowering.kernels.triton import quantised_tiles
from graphopt.runtime.transforms import TransformKernels, launch_transform
from graphopt.targets import get_target

DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter cuts bf16 off where a GPU rounds.
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
TARGET = get_target(target_here())
TILES = quantised_tiles(TARGET)
assert TILES is not None
KERNELS = TransformKernels(TILES.shared_bytes)
TOKENS = 16384 if ON_GPU else 20
# Features as N1 x N2, as FlatQuant divides them.
SIZES = {4096: (64, 64), 11008: (86, 128), 14336: (112, 128)} if ON_GPU else {576: (24, 24)}

kept: dict[str, Any] = {}
"""The tiles that were the fastest, for what is timed behind them."""


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def rotation(size: int) -> Tensor:
    square = torch.randn(size, size, dtype=torch.float64)
    return torch.linalg.qr(square)[0].to(DTYPE).to(DEVICE).contiguous()


class Transformed:
    """Tokens, what stands in front of their transform, and the factors of it."""

    def __init__(self, width: int, before: str, tokens: int = TOKENS) -> None:
        self.n1, self.n2 = SIZES[width]
        self.before = before
        self.x = random(tokens, width)
        self.y = random(tokens, width) if before not in ("", "norm") else None
        self.gain = random(width) if before == "norm" else None
        self.left, self.right = rotation(self.n1), rotation(self.n2)

    def run(self, bits: int, pairs: bool, **options: Any) -> tuple[Tensor, Tensor]:
        """Return codes and scales as models compute them; with options by Triton's kernel."""
        by = launch_transform if options else KERNELS.by_kernels
        codes, scales, _ = by(
            self.x, self.left, self.right, before=self.before, y=self.y, weight=self.gain,
            eps=1e-5, bits=bits, pairs=pairs, **options,
        )  # fmt: skip
        assert scales is not None
        return codes, scales

    def values(self, rows: int) -> Tensor:
        """Return the first transformed tokens in fp64."""
        x = self.x[:rows].double()
        if self.before == "norm":
            assert self.gain is not None
            x = functional.rms_norm(x, self.gain.double(), 1e-5)
        elif self.before:
            assert self.y is not None
            x = functional.act_mul(x, self.y[:rows].double(), self.before)
        tile = x.unflatten(-1, (self.n1, -1)) @ self.right.double()
        return (self.left.double().t() @ tile).flatten(-2)

    def check(self, found: tuple[Tensor, Tensor], bits: int) -> Result:
        """Compare the first tokens' codes with torch's in fp64.

        Raises:
            AssertionError: Too many differ, or by more than 1, or a scale does by 2^-8.
        """
        codes, scales = found
        rows = min(256, len(codes))
        codes, scales = codes[:rows], scales[:rows]
        if codes.dtype == torch.uint8:
            codes = functional.unpack(codes, 4).to(torch.int8)
            codes = torch.where(codes > 7, codes - 16, codes)
        values, top = self.values(rows), 2 ** (bits - 1) - 1
        own = values.abs().amax(-1) / top
        off = (codes.int() - (values / own[:, None]).round().clamp(-top - 1, top).int()).abs()
        apart = float((off > 0).float().mean())
        scale = float(((scales - own).abs() / own).max())
        # A value has errors of two roundings to bf16, of 2^-9 of a token's root mean square each;
        # the largest of some thousands is about four times that, and of 2^(bits - 1) steps.
        assert int(off.max()) <= 1 and scale <= 2.0**-8, (int(off.max()), scale, apart)
        assert apart <= (1e-2 if bits == 4 else 0.15), apart
        return {"codes_apart": apart, "scale_off": scale}

    def bytes(self, bits: int, pairs: bool) -> int:
        read = self.x.numel() * self.x.element_size() * (1 if self.y is None else 2)
        return read + self.x.numel() // (2 if pairs else 1) + 4 * len(self.x)


def transform_options(width: int) -> Iterator[Result]:
    """Yield how a program and the machine may be divided."""
    assert TILES is not None
    cores = TILES.cores
    if width <= 4096:
        for warps, each, stages in ((4, 4, 1), (4, 7, 1), (4, 3, 2), (4, 5, 2), (2, 7, 1)):
            yield {"warps": warps, "stages": stages, "programs": each * cores}
        return
    for warps, each, stages, joined in (
        (8, 1, 1, False), (8, 2, 1, False), (8, 2, 2, False), (4, 2, 1, False), (4, 3, 1, False),
        (8, 2, 1, True), (16, 1, 2, True),
    ):  # fmt: skip
        yield {"warps": warps, "stages": stages, "programs": each * cores, "joined": joined}


def transform_part(rows: Rows, options: argparse.Namespace) -> None:
    for width, pairs in itertools.product(SIZES, (False, True)):
        transform_row(rows, options, width, "norm" if width == 4096 else "silu", 4, pairs)


def transform_row(
    rows: Rows, options: argparse.Namespace, width: int, before: str, bits: int, pairs: bool
) -> None:
    given = Transformed(width, before)
    name = f"{width} {before} {'int4' if pairs else 'int8'}"
    chosen: Result = {}
    key = f"transform {width}"
    if options.tune and not pairs:
        tried = {
            json.dumps(option): (lambda o=option: given.run(bits, pairs, **o))
            for option in transform_options(width)
        }
        best = best_of(rows, name, tried, lambda found: given.check(found, bits))
        kept[key] = json.loads(best) if best else {}
    chosen = kept.get(key, chosen)

    def make() -> tuple[Result, str]:
        checked = given.check(given.run(bits, pairs, **chosen), bits)
        moved = given.bytes(bits, pairs) // 2
        source = torch.randint(0, 256, (moved,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)

        def transform() -> Any:
            return given.run(bits, pairs, **chosen)

        times = microseconds_in_graphs(
            {
                "transform": transform,
                "triton": lambda: given.run(bits, pairs, **{"stages": 1, **chosen}),
                "copy": lambda: target.copy_(source),
            }
        )
        times |= microseconds({"launched": transform})
        found = median(times)
        ratio = found["transform"] / found["copy"]
        line = (
            f"{found['transform']:.1f} us, by Triton {found['triton']:.1f} us, "
            f"copy {found['copy']:.1f} us, x{ratio:.2f}; launched one by one "
            f"{found['launched']:.1f} us"
        )
        return {
            **checked, "options": chosen, "bytes": 2 * moved, "microseconds": times,
            "times_copy": ratio,
        }, line  # fmt: skip

    rows.add(f"transform {name}", make)
