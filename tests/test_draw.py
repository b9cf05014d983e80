"""Tokens drawn from logits: in torch, and by the kernel, on a GPU or interpreted."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from compiling import compile_alone
from torch import Tensor

from graphopt.execute import draw
from graphopt.execute.draw import Draw, launch_draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# The interpreter of Triton has no bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def by_torch(logits: Tensor) -> tuple[Tensor, Tensor]:
    return Draw(torch.device("cpu"), 0)(logits.cpu())


def by_kernel(logits: Tensor) -> tuple[Tensor, Tensor]:
    return launch_draw(logits.to(DEVICE), 2**61 + 5)


WAYS = [by_torch, pytest.param(by_kernel, marks=WITH_TRITON)]
COUNT = 600


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_tokens_come_as_often_as_softmax_says(way, monkeypatch):
    monkeypatch.setattr(draw, "BLOCK", 4)  # so that a row of 29 is more than one round
    logits = torch.randn(29, generator=torch.Generator().manual_seed(0))
    logits[[3, 20, 28]] += 2
    logits[5] = -torch.inf
    tokens, scores = way(logits.expand(COUNT, -1))
    assert tokens.shape == (COUNT, 1) and tokens.dtype == torch.long and scores.shape == (COUNT,)
    found = torch.bincount(tokens[:, 0].cpu(), minlength=29)
    expected = COUNT * torch.softmax(logits.double(), -1)
    assert found[5] == 0 and bool(scores.isfinite().all())
    # Pearson's statistic of cells with 5 expected and more, the others being one: its mean is the
    # cells less one, its variance twice that; five standard deviations.
    cells = expected >= 5
    pairs = [
        torch.cat([x[cells].double(), x[~cells].double().sum()[None]]) for x in (found, expected)
    ]
    statistic, free = float(((pairs[0] - pairs[1]) ** 2 / pairs[1]).sum()), len(pairs[0]) - 1
    assert free > 12 and abs(statistic - free) < 5 * (2 * free) ** 0.5


@WITH_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 17, 4097, 9000])
def test_noise_is_gumbel_s_in_every_part_of_a_row(size):
    """Of equal logits the token is uniform, and the score's mean log(size) and Euler's constant."""
    count = 200
    tokens, scores = by_kernel(torch.zeros(count, size))
    places = (tokens.double() + 0.5) / size
    assert abs(float(places.mean()) - 0.5) <= 5 * (1 / 12 / count) ** 0.5
    off = float(scores.double().mean()) - math.log(size) - 0.5772156649
    assert abs(off) <= 5 * (math.pi**2 / 6 / count) ** 0.5
    assert size == 1 or len(set(tokens.flatten().tolist())) > min(size, count) // 2


@WITH_TRITON
def test_draws_are_one_by_one_independent():
    """Neither rows that follow each other nor calls that do draw alike; a seed draws again."""
    logits = torch.zeros(64, 1000, device=DEVICE)
    first, again, next_one = (launch_draw(logits, seed)[0] for seed in (7, 7, 2**40 + 7))
    assert torch.equal(first, again)
    assert int((first == next_one).sum()) <= 2
    assert len(set(first.flatten().tolist())) > 50


@pytest.mark.parametrize("way", WAYS)
def test_a_row_with_what_is_no_number_is_told(way):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    logits[2, 250] = torch.nan
    assert way(logits)[1].isnan().tolist() == [False, False, True, False]


@WITH_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_all_but_sure_is_drawn_in_every_dtype_and_layout(dtype):
    logits = torch.zeros(6, 5000, dtype=dtype)
    wanted = torch.tensor([0, 1, 1023, 1024, 4096, 4999])
    logits[torch.arange(6), wanted] = 60.0
    for given in (logits, logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :5000]):
        assert torch.equal(by_kernel(given)[0][:, 0].cpu(), wanted)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.execute.draw import BLOCK, WARPS
from graphopt.runtime.kernels.draw import draw_tokens

signature = {"logits_ptr": "*bf16", "token_ptr": "*i64", "score_ptr": "*fp32", "stride": "i32",
             "V": "i32", "seed": "i64", "BLOCK": "constexpr"}
sixteens = {(place,): [["tt.divisibility", 16]] for place in range(5)}
source = ASTSource(draw_tokens, signature, {"BLOCK": BLOCK}, sixteens)
for arch in (80, 90):
    made = compile(source, GPUTarget("cuda", arch, 32), {"num_warps": WARPS})
    # Rows of a multiple of 16 logits are read by 8 bytes, which are those of a thread.
    assert "ld.global.b16" not in made.asm["ptx"]
"""


@WITH_TRITON
def test_the_kernel_compiles_and_reads_several_logits_at_once() -> None:
    assert compile_alone(COMPILE) == ""
