"""A decoding step's transforms: by kernels of their own, and by the products that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bits_transform import DEVICE, KERNELS, TILES, random, rotation
from torch import Tensor
from turns import ON_GPU, Result, Rows, median, microseconds, recorded

from graphopt.ir import functional
from graphopt.lowering.kernels.in_front import FrontShape, why_apart
from graphopt.runtime.fused import launch_rope
from graphopt.runtime.packed_codes import PackedCodes
from graphopt.runtime.packed_few import InFront, launch_few
from graphopt.runtime.quantised_launch import launch_packed
from graphopt.runtime.quantised_tiles import tiles_for

GROUP = 128 if ON_GPU else 32


@dataclass(frozen=True)
class Step:
    """A product of one token, of a layer's, and the transform in front of it."""

    name: str
    outputs: int
    n1: int
    n2: int
    before: str
    right: bool = True


STEPS = (
    (
        Step("1.1B q, k, v", 2560, 32, 64, "norm"),
        Step("1.1B o", 2048, 32, 64, "", right=False),
        Step("1.1B gate, up", 11264, 32, 64, "norm"),
        Step("1.1B down", 2048, 64, 88, "silu"),
        Step("7B q, k, v", 12288, 64, 64, "norm"),
        Step("7B o", 4096, 32, 128, "", right=False),
        Step("7B gate, up", 22016, 64, 64, "norm"),
        Step("7B down", 4096, 86, 128, "silu"),
    )
    if ON_GPU
    else (Step("tiny", 48, 16, 24, "norm"),)
)
HEADS = ((32, 4, 64), (32, 8, 128)) if ON_GPU else ((2, 1, 16),)
"""Of queries, of keys, and their size."""
TIMES = 20 if ON_GPU else 1
NEAR = (2, 8)
"""Spans of a warp that are brought into the second cache early."""


def front_part(
    rows: Rows, make_weight: Callable[[int, int, int], PackedCodes],
    dense_of: Callable[[PackedCodes], Tensor], cold: float,
) -> None:  # fmt: skip
    """Time products of one token with transforms apart and in front, and rotations of heads.

    Args:
        make_weight: Returns a random weight of so many outputs, inputs and inputs of a group.
        dense_of: Returns what a weight stands for.
        cold: Bytes of weights that a run walks through.
    """
    for step in STEPS:
        _step_row(rows, step, make_weight, dense_of, cold)
    for heads in HEADS:
        _rope_row(rows, *heads)


def _step_row(
    rows: Rows, step: Step, make_weight: Callable[[int, int, int], PackedCodes],
    dense_of: Callable[[PackedCodes], Tensor], cold: float,
) -> None:  # fmt: skip
    assert TILES is not None
    tiles, cores = TILES, TILES.cores
    inputs = step.n1 * step.n2
    count = max(1, int(cold // (step.outputs * inputs // 2)))
    weights = [make_weight(step.outputs, inputs, GROUP) for _ in range(count)]
    x, other, gain = random(1, inputs), random(1, inputs), random(inputs)
    norm, gate = step.before == "norm", step.before not in ("", "norm")
    y, gain = other if norm or gate else None, gain if norm else None
    left, right = rotation(step.n1), rotation(step.n2) if step.right else None
    few = tiles_for(1, tiles.few)
    front = InFront(y, gain, 1e-5, 0.0, step.before, left, right)

    def product(
        values: Tensor, weight: PackedCodes, front: InFront | None, near: int = 0
    ) -> Tensor | None:
        found = None
        if ON_GPU:
            assert few is not None
            few_near = replace(few, near=near)
            found = launch_few(values, weight, None, few_near, cores, front=front)
        if found is None and front is None:
            packed = tiles_for(1, tiles.packed)
            assert packed is not None
            return launch_packed(values, weight, None, packed, cores)
        return None if found is None else found[0]

    def apart(weight: PackedCodes) -> Tensor:
        made, _, _ = KERNELS.by_kernels(
            x, left, right, before=step.before, y=y, weight=gain, eps=1e-5
        )
        found = product(made, weight, None)
        assert found is not None
        return found

    def in_front(weight: PackedCodes, near: int = 0) -> Tensor:
        found = product(x, weight, front, near)
        assert found is not None, "the kernel did not take it"
        return found

    def without(weight: PackedCodes, near: int = 0) -> Tensor:
        """As a model without transforms: its gate is behind the product before."""
        bare = replace(front, left=None, right=None) if norm else None
        found = product(x, weight, bare, near)
        assert found is not None
        return found

    values = x.double()
    if norm:
        assert gain is not None
        values = functional.rms_norm((x + other).double(), gain.double(), 1e-5)
    elif gate:
        values = functional.act_mul(values, other.double(), step.before)
    wide = [None if t is None else t.double() for t in (left, right)]
    exact = functional.kronecker(values, *wide) @ dense_of(weights[0]).double().t()

    def off(found: Tensor) -> float:
        error = float((found.double() - exact).norm() / exact.norm())
        # Four roundings to bf16 of what is multiplied, and one of what comes out.
        assert error < 2e-2, error
        return error

    runs: dict[str, Callable[[PackedCodes], Tensor]] = {"apart": apart}
    if ON_GPU:
        for near in (0, *NEAR):
            label = f", {near} spans near" if near else ""
            runs[f"without{label}"] = partial(without, near=near)
            runs[f"in front{label}"] = partial(in_front, near=near)

    def make() -> tuple[Result, str]:
        errors = {name: off(run(weights[0])) for name, run in runs.items() if "without" not in name}
        graphs = {
            name: recorded(lambda run=run: [run(weight) for weight in weights])
            for name, run in runs.items()
        }
        times = microseconds(graphs, per=count)
        front_tokens = replace(tiles, front=tiles.front and replace(tiles.front, tokens=1))
        shape = FrontShape(
            step.n1, step.n2, True, step.right, step.outputs, step.before
        )  # fmt: skip
        reason = why_apart(shape, front_tokens)
        shown = ", ".join(f"{name} {value:.2f} us" for name, value in median(times).items())
        planned = "in front" if reason is None else f"apart: {reason}"
        result: Result = {"microseconds": times, "errors": errors, "planned": planned}
        return result, f"{shown}; planned {planned}"

    rows.add(f"front {step.name}", make)


def _rope_row(rows: Rows, heads: int, groups: int, width: int) -> None:
    q, k = (
        random(1, 1, count * width).unflatten(-1, (count, width)).transpose(1, 2)
        for count in (heads, groups)
    )
    angles = torch.rand(1, 1, width // 2, device=DEVICE) * 100
    cos, sin = angles.cos(), angles.sin()
    factors = rotation(width), rotation(width)

    def turned() -> Any:
        return launch_rope(q, k, cos, sin, False)

    def apart() -> Any:
        a, b = turned()
        assert b is not None
        return a @ factors[0], b @ factors[1]

    def joined() -> Any:
        return launch_rope(q, k, cos, sin, False, factors)

    def make() -> tuple[Result, str]:
        wide = [t.double() for t in (q, k, cos, sin, *factors)]
        errors: dict[str, float] = {}
        for name, run in (("apart", apart), ("joined", joined)):
            pairs = zip(run(), functional.rope_pair(*wide), strict=True)
            found = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
            # Two roundings.
            assert found < 1e-2, (name, found)
            errors[name] = found
        runs = {"without": turned, "apart": apart, "in one": joined}
        graphs = {
            name: recorded(lambda run=run: [run() for _ in range(TIMES)])
            for name, run in runs.items()
        }
        times = microseconds(graphs, per=TIMES)
        shown = ", ".join(f"{name} {value:.2f} us" for name, value in median(times).items())
        return {"microseconds": times, "errors": errors}, shown

    rows.add(f"rotation of {heads} and {groups} heads of {width}", make)
