"""Sums over ranks that share one device, against fp64: on a GPU side by side, else interpreted.

On a GPU each rank runs on a stream of its own, and waits for the others as it would for peers. The
interpreter runs one rank after the other: a rank that comes before another has to give up waiting,
and is run again, with the epoch of the call, once all the others have sent what they had to.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiling import compile_alone
from side_by_side import PROGRAMS, SideBySide
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

from graphopt.runtime.peer_linear import (  # noqa: E402
    ChunkedLinear,
    PersistentLinear,
    SummedLinear,
)
from graphopt.runtime.peer_memory import Peers, on_one_device  # noqa: E402
from graphopt.runtime.peer_reduce import OneShot, TwoShot, Waiting  # noqa: E402
from graphopt.runtime.reduction_plan import LinearTiles  # noqa: E402
from graphopt.support.recorded import record  # noqa: E402

# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
CALLS = 4
"""Of the same ranks one after another: places and inboxes take turns of two and three."""


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


class Ranks:
    """Some ranks on one device, each with its own of what `make` makes."""

    def __init__(self, count: int, make: Callable[[Peers, Waiting], Any]) -> None:
        self._side_by_side = SideBySide(count) if ON_GPU else None
        self.waiting = (
            Waiting(DEVICE, 1, trap=False)
            if self._side_by_side is None
            else self._side_by_side.waiting
        )
        self.own = [make(peers, self.waiting) for peers in on_one_device(count, DEVICE)]
        self._warm: set[object] = set()

    def run(self, *calls: Callable[[Any], Any], shape: object = None) -> list[Any]:
        """Return what each rank gives, in the call that is its own.

        Args:
            shape: Of the operands, where calls differ in it. On a GPU its first calls are made once
                before, by one rank after the other.
        """
        if self._side_by_side is None:
            return self._in_turn(calls)
        bound = self._bound(calls)
        if shape not in self._warm:
            self._warm.add(shape)
            self._side_by_side.warm_up(bound)
        return self._side_by_side.run(bound)

    def record(self, *calls: Callable[[Any], Any]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
        """Return calls of all ranks as one CUDA graph, and what holds their results."""
        assert self._side_by_side is not None
        bound, side_by_side = self._bound(calls), self._side_by_side
        side_by_side.warm_up(bound)
        return record(lambda: side_by_side.launch(bound), runs=0)

    def _bound(self, calls: Sequence[Callable[[Any], Any]]) -> list[Callable[[], Any]]:
        return [functools.partial(call, own) for call, own in zip(calls, self.own, strict=True)]

    def _in_turn(self, calls: Sequence[Callable[[Any], Any]]) -> list[Any]:
        before = [[epochs.clone() for epochs in _epochs(own)] for own in self.own]
        turns = [_turn(own) for own in self.own]
        for last in (False, True):
            for own, old, turn in zip(self.own, before, turns, strict=True):
                if last:
                    for epochs, value in zip(_epochs(own), old, strict=True):
                        epochs.copy_(value)
                    _turn(own, turn)
            results = [call(own) for own, call in zip(self.own, calls, strict=True)]
        return results


def _epochs(own: Any) -> list[Tensor]:
    return [own.epochs if hasattr(own, "epochs") else own._sum.epochs]


def _turn(own: Any, turn: int | None = None) -> int:
    places = getattr(getattr(own, "_sum", own), "_places", None)
    if places is None:
        return 0
    if turn is not None:
        places._turn = turn
    return int(places._turn)


def close(got: Tensor, exact: Tensor, terms: int, magnitudes: Tensor | None = None) -> None:
    """Each of `terms` summands was rounded once to 16 bits, as was the sum; products in fp32."""
    eps = torch.finfo(got.dtype).eps
    size = exact.abs() if magnitudes is None else magnitudes
    allowed = eps * (terms + 1) * size + 1e-6
    assert bool(((got.double().cpu() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "numel"), [(2, 1500), (2, 8), (3, 1026)])
def test_one_shot(ranks: int, numel: int, dtype: torch.dtype) -> None:
    group = Ranks(ranks, lambda peers, waiting: OneShot(peers, numel, waiting))
    for call in range(CALLS):
        xs = [random(numel, dtype=dtype, seed=10 * call + rank) for rank in range(ranks)]
        results = group.run(*(lambda own, x=x: own(x) for x in xs))
        exact = sum(x.double().cpu() for x in xs)
        size = sum(x.double().cpu().abs() for x in xs)
        for result in results:
            close(result, exact, 0, size)
            assert torch.equal(result, results[0])  # greedy tokens are the same on all ranks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "rows"), [(2, 40), (3, 130), (2, 1)])
def test_two_shot(ranks: int, rows: int, dtype: torch.dtype) -> None:
    columns, room = 100, 130
    group = Ranks(ranks, lambda peers, waiting: TwoShot(peers, room, columns, dtype, 3, waiting))
    for call in range(CALLS):
        xs = [random(rows, columns, dtype=dtype, seed=10 * call + rank) for rank in range(ranks)]

        def written(own: TwoShot, x: Tensor) -> TwoShot:
            own.operand(rows).copy_(x)
            return own

        # In place: whoever reads what was summed already would sum it again.
        if ON_GPU:
            results = group.run(*(lambda own, x=x: written(own, x)(rows) for x in xs))
        else:
            made = [written(own, x) for own, x in zip(group.own, xs, strict=True)]
            results = [own(rows) for own in made]
        exact = sum(x.double().cpu() for x in xs)
        size = sum(x.double().cpu().abs() for x in xs)
        for result in results:
            close(result, exact, 0, size)
            assert torch.equal(result, results[0])


TILES = LinearTiles(16, 32, 16, warps=4, stages=2, flops=1.0, beside=0.0, group=2)
WIDE = LinearTiles(128, 256, 64, warps=8, stages=3, flops=1.0, beside=0.0)
SQUARE = LinearTiles(128, 128, 64, warps=8, stages=4, flops=1.0, beside=0.0)
SHAPES = [
    # ranks, rows, columns, depth, bias
    (2, 40, 72, 48, False),
    (2, 16, 32, 24, True),
    pytest.param(3, 34, 40, 32, False, marks=pytest.mark.slow),
    (2, 1, 8, 16, False),
]


def linears(
    ranks: int, rows: int, columns: int, depth: int, bias: bool, dtype: torch.dtype, seed: int
) -> tuple[list[tuple[Tensor, Tensor, Tensor | None]], Tensor, Tensor]:
    """Return each rank's operands, the exact sum, and the magnitude of what is summed."""
    operands, exact, size = [], torch.zeros((), dtype=torch.float64), torch.zeros(())
    for rank in range(ranks):
        x = random(rows, depth, dtype=dtype, seed=seed + 3 * rank)
        weight = random(columns, depth, dtype=dtype, seed=seed + 3 * rank + 1)
        own = random(columns, dtype=dtype, seed=seed + 3 * rank + 2) if bias else None
        operands.append((x, weight, own))
        product = x.double().cpu() @ weight.double().cpu().t()
        if own is not None:
            product = product + own.double().cpu()
        exact, size = exact + product, size + product.abs()
    return operands, exact, size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "rows", "columns", "depth", "bias"), SHAPES)
def test_persistent_linear(
    ranks: int, rows: int, columns: int, depth: int, bias: bool, dtype: torch.dtype
) -> None:
    group = Ranks(
        ranks,
        lambda peers, waiting: PersistentLinear(
            peers, 64, columns, dtype, TILES, 5, waiting, bulk=False
        ),
    )
    for call in range(CALLS):
        operands, exact, size = linears(ranks, rows, columns, depth, bias, dtype, 100 * call)
        results = group.run(*(lambda own, each=each: own(*each) for each in operands))
        for result in results:
            close(result, exact, 1, size)
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_workspace_serves_shapes_of_fewer_rows(dtype: torch.dtype) -> None:
    group = Ranks(
        2,
        lambda peers, waiting: PersistentLinear(peers, 64, 40, dtype, TILES, 5, waiting),
    )
    for call, rows in enumerate((64, 10, 33, 64)):
        operands, exact, size = linears(2, rows, 40, 32, False, dtype, 100 * call)
        calls = (lambda own, each=each: own(*each) for each in operands)
        for result in group.run(*calls, shape=rows):
            close(result, exact, 1, size)


@pytest.mark.gpu
@pytest.mark.parametrize(("tiles", "bulk"), [(WIDE, True), (WIDE, False), (SQUARE, True)])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1024, 2048, 512), (1000, 1032, 4096)])
def test_tiles_of_the_target(
    rows: int, columns: int, depth: int, tiles: LinearTiles, bulk: bool
) -> None:
    cores = torch.cuda.get_device_properties(0).multi_processor_count // 2
    group = Ranks(
        2,
        lambda peers, waiting: PersistentLinear(
            peers, 1024, columns, torch.bfloat16, tiles, cores, waiting, bulk=bulk
        ),
    )
    for call in range(CALLS):
        operands, exact, size = linears(2, rows, columns, depth, False, torch.bfloat16, 100 * call)
        for result in group.run(*(lambda own, each=each: own(*each) for each in operands)):
            close(result, exact, 1, size + exact.abs().mean())


@pytest.mark.gpu
def test_chunks() -> None:
    rows, columns, depth = 1024, 1024, 512
    group = Ranks(
        2,
        lambda peers, waiting: ChunkedLinear(peers, 2048, columns, torch.bfloat16, waiting),
    )
    cuts = [(256, 128, 128), (512,), (384, 128), (256, 256)]
    for call, chunks in enumerate(2 * cuts):
        operands, exact, size = linears(2, rows, columns, depth, False, torch.bfloat16, 100 * call)
        calls = [lambda own, each=each, cut=chunks: own(each[0], each[1], cut) for each in operands]
        for result in group.run(*calls, shape=chunks):
            close(result, exact, 1, size + exact.abs().mean())


@pytest.mark.gpu
def test_recorded_runs_are_those_that_are_launched() -> None:
    rows, columns, depth = 256, 512, 256
    group = Ranks(
        2,
        lambda peers, waiting: SummedLinear(peers, 256, columns, torch.bfloat16, PROGRAMS, waiting),
    )
    operands, exact, size = linears(2, rows, columns, depth, False, torch.bfloat16, 0)
    graph, results = group.record(*(lambda own, each=each: own(*each) for each in operands))
    for _ in range(CALLS):
        for result in results:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for result in results:
            close(result, exact, 1, size)


def test_an_epoch_that_wraps_around_is_still_later() -> None:
    group = Ranks(2, lambda peers, waiting: OneShot(peers, 8, waiting))
    for own in group.own:
        own.epochs.fill_(2**31 - 2)
    for call in range(3):
        xs = [random(8, dtype=torch.float16, seed=10 * call + rank) for rank in range(2)]
        exact = xs[0].double().cpu() + xs[1].double().cpu()
        for result in group.run(*(lambda own, x=x: own(x) for x in xs)):
            close(result, exact, 0, exact.abs() + 1)


@pytest.mark.skipif(ON_GPU, reason="a rank without another waits for a second on a GPU")
def test_a_rank_without_the_others_says_so() -> None:
    group = Ranks(2, lambda peers, waiting: OneShot(peers, 8, waiting))
    assert not group.waiting.late.item()
    group.own[0](random(8, dtype=torch.float16, seed=0))
    assert group.waiting.late.item()


@pytest.mark.skipif(ON_GPU, reason="a rank without another waits for seconds on a GPU")
@pytest.mark.parametrize("how", ["one-shot", "two-shot", "persistent"])
def test_a_call_in_which_ranks_gave_up_changes_nothing_of_the_next(how: str) -> None:
    """So that each rank may be run alone before they are run side by side."""
    half = torch.float16
    make = {
        "one-shot": lambda peers, waiting: OneShot(peers, 8, waiting),
        "two-shot": lambda peers, waiting: TwoShot(peers, 1, 8, half, 1, waiting),
        "persistent": lambda peers, waiting: PersistentLinear(
            peers, 16, 32, half, TILES, 1, waiting, bulk=False
        ),
    }[how]
    group = Ranks(2, make)
    for given_up in (True, False):
        if how == "persistent":
            operands, exact, size = linears(2, 16, 32, 16, False, half, 100 * given_up)
            calls = [lambda own, each=each: own(*each) for each in operands]
        else:
            xs = [random(8, dtype=half, seed=10 * given_up + rank) for rank in range(2)]
            exact, size = (sum(x.double() for x in made) for made in (xs, map(torch.abs, xs)))
            calls = [lambda own, x=x: own(x) for x in xs]
        if how == "two-shot":
            for own, x in zip(group.own, xs, strict=True):
                own.operand(1).copy_(x)
            results = [own(1).view(-1) for own in group.own]
        elif given_up:
            results = [call(own) for call, own in zip(calls, group.own, strict=True)]
        else:
            results = group.run(*calls)
    assert group.waiting.late.item()
    for result in results:
        close(result, exact, 1, size)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.runtime.kernels import peer_sums, persistent_linear

def compiled(kernel, half, arch, kinds, warps, stages=3, **constants):
    kinds = {"x_ptr": "*i32", "bases_ptr": "*i64", "epochs_ptr": "*i32", "epoch_ptr": "*i32",
             "late_ptr": "*i32", "flag_ptr": "*i32"} | kinds
    signature = {
        name: "constexpr" if name in constants
        else kinds.get(name, "*" + half if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return made

for arch, half in ((80, "fp16"), (90, "bf16")):
    ranks = {"RANKS": 2, "TRAP": True}
    compiled(peer_sums.one_shot, half, arch, {}, 4, BLOCK=512, **ranks)
    compiled(peer_sums.two_shot, half, arch, {"offset": "i64"}, 8, BLOCK=4096, **ranks)
    compiled(peer_sums.signal_peer, half, arch, {}, 1)
    compiled(peer_sums.wait_for_peer, half, arch, {}, 1, LAST=True, TRAP=True)
    operands = {"x_ptr": "*" + half, "weight_ptr": "*" + half}
    tiles = {"BLOCK_K": 64, "GROUP": 8, "WHOLE": True, "bias_ptr": None}
    compiled(persistent_linear.linear_all_reduce, half, arch, operands, 8, x_tiles=None,
             weight_tiles=None, out_tiles=None, BLOCK_M=128, BLOCK_N=128, **tiles, **ranks)

operands |= {"x_tiles": "tensordesc<bf16[128, 64]>", "weight_tiles": "tensordesc<bf16[256, 64]>",
             "out_tiles": "tensordesc<bf16[128, 256]>", "out": "i64", "staging": "i64"}
made = compiled(persistent_linear.linear_all_reduce, "bf16", 90, operands, 8, BLOCK_M=128,
                BLOCK_N=256, **tiles, **ranks)
square = operands | {"weight_tiles": "tensordesc<bf16[128, 64]>",
                     "out_tiles": "tensordesc<bf16[128, 128]>"}
compiled(persistent_linear.linear_all_reduce, "bf16", 90, square, 8, 4, BLOCK_M=128, BLOCK_N=128,
         **tiles, **ranks)
ptx = made.asm["ptx"]
# The matrix instructions of Hopper, fed by its copy engine, and what a flag of another GPU needs.
for needed in ("wgmma.mma_async", "cp.async.bulk.tensor.2d.global.shared", "atom.sys", "trap;",
               "cp.async.bulk.wait_group 0;", "st.release.sys", ".acquire.sys"):
    parts = needed.split(".")
    assert needed in ptx or all(part in ptx for part in parts), needed
assert made.metadata.shared <= 232448, made.metadata.shared
# A tile that is sent has a place of its own beside the stages of the next product's operands: it
# is on its way while that is computed.
assert made.metadata.shared > 2 * (3 * 64 * (128 + 256) + 128 * 256), made.metadata.shared
"""


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper() -> None:
    assert compile_alone(COMPILE) == ""
