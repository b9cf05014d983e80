"""Measure kernels of four bits on a GPU beside bf16 torch: transforms, linears, decoding.

    python tools/bench_bits_kernels.py [--only transform,w4a4] [--tune] [--out FILE]

Parts, on the shapes of Llama-7B and with random numbers:

* `transform`: norm or gate, Kronecker transform and rounding of 16,384 tokens, beside a copy of
  as many bytes;
* `w4a4`: a linear of 16,384 tokens as a whole (transform, rounding, product), beside `F.linear`;
* `w4a16`: a linear of 1 and of 16 tokens, beside `F.linear`;
* `steps`: a norm and a gate of one token, alone and with a transform behind them;
* `front`: products of one token with a transform in front of them, by a kernel of its own and by
  the product itself, and rotations with a transform behind them;
* `kv`: attention of one token over caches of 16, 8 and 4 bits;
* `model`: a Llama shape of 1.1B parameters, emitted with four-bit weights and in bf16, decoding.

Times are of CUDA graphs, so without launches from Python, which a prompt's kernels outlast; the
transforms are timed with them too. Models decode in turns, by the wall clock and by the GPU's own
time; it is kept which kernels a step of each ran, how often and how long. Each kernel's result is
compared with what torch computes in fp32 or fp64 before it is timed; a kernel that fails is kept
with its traceback, and the next one runs. `--tune` tries other tiles than the target's. Without a
GPU shapes are small and kernels interpreted: that says only whether this script runs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bits_decode import cache_part, steps_part
from bits_front import front_part
from bits_model import model_part
from bits_transform import DEVICE, DTYPE, TARGET, TILES, Transformed, kept, random, transform_part
from results import given_words
from turns import (
    ON_GPU,
    Result,
    Rows,
    best_of,
    median,
    microseconds,
    microseconds_in_graphs,
    recorded,
)

from graphopt.runtime.packed_codes import PackedCodes, pack_codes
from graphopt.runtime.packed_few import launch_few
from graphopt.runtime.quantised_launch import launch_integer, launch_packed, launch_unpack
from graphopt.runtime.quantised_linear import QuantisedKernels
from graphopt.runtime.quantised_tiles import FewTiles, IntegerTiles, PackedTiles, tiles_for

ROOT = Path(__file__).resolve().parent.parent
# (outputs, inputs)
LINEARS = [(4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008)] if ON_GPU else [(96, 576)]
DECODED = [(11008, 4096), (4096, 11008), (4096, 4096)] if ON_GPU else [(96, 576)]
COLD = 400e6 if ON_GPU else 1
"""Bytes of weights that a run walks through, so that none is in a cache when it is read."""


def packed_weight(outputs: int, inputs: int, group: int) -> PackedCodes:
    """Return a random weight whose codes have a scale for every `group` inputs."""
    shape = outputs, inputs // group, group // 2
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    scales = (torch.rand(shape[:2], device=DEVICE) + 0.5) * (0.2 / inputs**0.5)
    codes = pack_codes(packed, scales.to(DTYPE), group=group)
    assert codes is not None
    return codes


def dense_of(weight: PackedCodes) -> Tensor:
    """Return what a weight stands for, by torch alone."""
    outputs, inputs = weight.shape
    lanes = weight.codes.unflatten(-1, (4, -1, 4)).transpose(-3, -2).flatten(-3)
    low, high = lanes & 15, lanes >> 4
    signed = torch.cat((low, high), -1).to(torch.int16)
    signed = (torch.where(signed > 7, signed - 16, signed)).transpose(0, 1).reshape(outputs, inputs)
    group = inputs // len(weight.scales)
    return (signed * weight.scales.t().repeat_interleave(group, 1).float()).to(DTYPE)


# Four-bit weights and activations of many tokens --------------------------------------------------


def integer_options() -> Iterator[IntegerTiles]:
    for rows, columns, depth, stages in (
        (128, 256, 128, 3),
        (128, 256, 128, 4),
        (256, 128, 128, 3),
    ):
        for persistent, group in ((False, 8), (True, 8)):
            yield IntegerTiles(rows, columns, depth, 8, stages, group, persistent)
    yield IntegerTiles(128, 256, 128, 8, 4, 16, False)


def w4a4_part(rows: Rows, options: argparse.Namespace) -> None:
    assert TILES is not None
    for outputs, inputs in LINEARS:
        w4a4_row(rows, options, outputs, inputs)


def w4a4_row(rows: Rows, options: argparse.Namespace, outputs: int, inputs: int) -> None:
    assert TILES is not None
    given = Transformed(inputs, "")
    cut = kept.get(f"transform {inputs}", {})
    weight = packed_weight(outputs, inputs, inputs)
    codes, scales = given.run(4, False, **cut)
    dense = dense_of(weight)
    name = f"{outputs}x{inputs}"
    tiles = TILES.integer

    def product(tiles: IntegerTiles) -> Tensor:
        return launch_integer(
            codes, scales, launch_unpack(weight, torch.int8), weight.scales[0], None, DTYPE,
            tiles, TILES.cores, 0.0625,
        )  # fmt: skip

    def check(y: Tensor) -> None:
        take = [*range(min(64, len(codes))), -1]
        exact = (codes[take].double() * scales[take, None].double()) @ dense.double().t()
        error = float((y[take].double() - exact).abs().max() / exact.abs().max())
        # bf16 of the scales' products in `dense` too.
        assert error < 1e-2, error

    if options.tune and "integer" not in kept:
        whole = launch_unpack(weight, torch.int8)
        tried = {
            json.dumps(vars_of(one)): (
                lambda one=one: launch_integer(
                    codes,
                    scales,
                    whole,
                    weight.scales[0],
                    None,
                    DTYPE,
                    one,
                    TILES.cores,
                    0.0625,
                )
            )
            for one in dict.fromkeys(integer_options())
        }
        best = best_of(rows, name, tried, check)
        tiles = IntegerTiles(**json.loads(best)) if best else tiles
        kept["integer"] = vars_of(tiles)
    elif "integer" in kept:
        tiles = IntegerTiles(**kept["integer"])
    kernels = QuantisedKernels(replace(TILES, integer=tiles))

    def make() -> tuple[Result, str]:
        check(product(tiles))
        whole = launch_unpack(weight, torch.int8)

        def linear() -> Tensor:
            made, own = given.run(4, False, **cut)
            return kernels.integer_linear_of_codes(made, own, weight)

        times = microseconds_in_graphs(
            {
                "whole": linear,
                "transform": lambda: given.run(4, False, **cut),
                "unpack": lambda: launch_unpack(weight, torch.int8),
                "product": lambda: launch_integer(
                    codes,
                    scales,
                    whole,
                    weight.scales[0],
                    None,
                    DTYPE,
                    tiles,
                    TILES.cores,
                    0.0625,
                ),
                "bf16": lambda: F.linear(given.x, dense),
            }
        )
        found = median(times)
        ratio = found["bf16"] / found["whole"]
        work = 2 * len(codes) * outputs * inputs / 1e6
        line = (
            ", ".join(f"{part} {value:.0f} us" for part, value in found.items())
            + f"; {work / found['product']:.0f} TOPS, bf16 {work / found['bf16']:.0f}; "
            f"x{ratio:.2f} faster"
        )
        return {"tiles": vars_of(tiles), "microseconds": times, "times_faster": ratio}, line

    rows.add(f"w4a4 {name}", make)


def vars_of(tiles: FewTiles | IntegerTiles | PackedTiles) -> Result:
    return {name: getattr(tiles, name) for name in tiles.__dataclass_fields__}


# Four-bit weights of few tokens -------------------------------------------------------------------


def packed_options(tokens: int) -> Iterator[FewTiles | PackedTiles]:
    columns = 8 if tokens <= 8 else 16
    for rows, unroll, programs in ((16, 4, 20), (16, 2, 24), (32, 2, 12)):
        yield PackedTiles(tokens, rows, columns, 1, 1, programs, unroll)
    for warps, row_tiles, ahead, near in itertools.product((6, 12, 24), (1, 2), (1, 2), (0, 4)):
        yield FewTiles(tokens, warps, row_tiles, ahead, near)


def tiles_of(key: str) -> FewTiles | PackedTiles:
    """Return tiles from their JSON."""
    found = json.loads(key)
    return FewTiles(**found) if "ahead" in found else PackedTiles(**found)


def w4a16_part(rows: Rows, options: argparse.Namespace) -> None:
    assert TILES is not None
    groups = (128, 32, 0) if ON_GPU else (32,)
    for tokens, (outputs, inputs), group in itertools.product((1, 16), DECODED, groups):
        w4a16_row(rows, options, tokens, outputs, inputs, group or inputs)


def w4a16_row(
    rows: Rows, options: argparse.Namespace, tokens: int, outputs: int, inputs: int, group: int
) -> None:
    assert TILES is not None
    count = max(1, int(COLD // (outputs * inputs // 2)))
    name = f"{outputs}x{inputs} group {group}, {tokens} tokens"
    weights = [packed_weight(outputs, inputs, group) for _ in range(count)]
    few = max(1, int(COLD // (2 * outputs * inputs)))
    dense = [dense_of(weight) for weight in weights[:few]]
    x = random(tokens, inputs)
    tiles: FewTiles | PackedTiles | None = tiles_for(tokens, TILES.few) if ON_GPU else None
    tiles = tiles or tiles_for(tokens, TILES.packed)
    assert tiles is not None
    exact = x.double() @ dense[0].double().t()

    def check(y: Tensor) -> None:
        error = float((y.double() - exact).abs().max() / exact.abs().max())
        assert error < 1e-2, error
        assert not any(weight.arrived.any() for weight in weights)

    def all_of(tiles: FewTiles | PackedTiles) -> Tensor:
        assert TILES is not None
        made = []
        for weight in weights:
            if isinstance(tiles, FewTiles):
                found = launch_few(x, weight, None, tiles, TILES.cores)
                assert found is not None
                made.append(found[0])
            else:
                made.append(launch_packed(x, weight, None, tiles, TILES.cores))
        return made[0]

    key = f"packed {tokens} {outputs} {inputs}"
    if options.tune and group == 128 and (outputs, inputs) != DECODED[-1]:
        tried = {}
        for one in packed_options(tokens):

            def replayed(one: FewTiles | PackedTiles = one) -> Tensor:
                return graphs[vars_key(one)]()

            tried[vars_key(one)] = replayed
        graphs = Recorded(lambda label: all_of(tiles_of(label)))
        best = best_of(rows, name, tried, check)
        if best:
            kept[key] = best
    if key in kept:
        tiles = tiles_of(kept[key])

    def make() -> tuple[Result, str]:
        check(all_of(tiles))
        times = microseconds({"int4": recorded(lambda: all_of(tiles))}, per=count)
        times |= microseconds(
            {"bf16": recorded(lambda: [F.linear(x, matrix) for matrix in dense])}, per=few
        )
        found = median(times)
        ratio = found["bf16"] / found["int4"]
        size = weights[0].codes.numel() + 2 * weights[0].scales.numel()
        line = (
            f"int4 {found['int4']:.1f} us ({size / found['int4'] / 1e6:.2f} TB/s), bf16 "
            f"{found['bf16']:.1f} us ({2e-6 * outputs * inputs / found['bf16']:.2f} TB/s), "
            f"x{ratio:.2f} faster"
        )
        return {"tiles": vars_of(tiles), "microseconds": times, "times_faster": ratio}, line

    rows.add(f"w4a16 {name}", make)


class Recorded(dict[str, Any]):
    """Graphs of runs by their label, recorded when they are asked for; each gives its result."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, label: str) -> Callable[[], Tensor]:
        made: list[Tensor] = []

        def run() -> None:
            made[:] = [self._make(label)]

        replay = recorded(run)

        def replayed() -> Tensor:
            replay()
            return made[0]

        self[label] = replayed
        return replayed


def vars_key(tiles: FewTiles | PackedTiles) -> str:
    return json.dumps(vars_of(tiles))


PARTS: dict[str, Callable[[Rows, argparse.Namespace], None]] = {
    "transform": transform_part,
    "w4a4": w4a4_part,
    "w4a16": w4a16_part,
    "steps": lambda rows, options: steps_part(rows),
    "front": lambda rows, options: front_part(rows, packed_weight, dense_of, COLD),
    "kv": lambda rows, options: cache_part(rows, TARGET),
    "model": lambda rows, options: model_part(rows, TARGET.name, options.model),
}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--tune", action="store_true", help="try other tiles than the target's")
    parser.add_argument(
        "--model", action="append", default=[], metavar="LABEL",
        help="decode this one alone, such as 'int4 group 128'; may be given again",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "bits_kernels.json")
    options = parser.parse_args()
    parts = options.only.split(",")
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    torch.manual_seed(0)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "numpy")},
        "target": TARGET.name,
        "command": "python tools/bench_bits_kernels.py " + given_words(),
    }
    # Parts that are not run again stay as they are.
    known = options.out.read_text(encoding="utf-8") if options.out.is_file() else "{}"
    found: dict[str, Any] = json.loads(known)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with torch.no_grad():
        for name in parts:

            def keep(rows: list[Result], name: str = name) -> None:
                found[name] = {**about, "rows": rows}
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

            started, rows = time.perf_counter(), Rows(keep)
            try:
                PARTS[name](rows, options)
            except Exception as error:
                rows.fail(name, error)
            lines += [*rows.lines, f"({name}: {time.perf_counter() - started:.0f} s)"]
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
