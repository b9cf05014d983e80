"""Divergence of logits and its gradient: in torch, and by the kernel, on a GPU or interpreted."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from compiling import compile_alone
from torch import Tensor

from graphopt.memory.stand_in import StandIn
from graphopt.training.divergence import divergence, divergence_in_torch, launch_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# The interpreter of Triton has no bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def logits(*shape: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def exact(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, and its gradient, in fp64."""
    log_q = torch.log_softmax(student.double().cpu(), -1)
    log_p = torch.log_softmax(teacher.double().cpu(), -1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(-1), log_q.exp() - p


@WITH_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 97, 4096, 4097, 9000])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_the_kernel_is_exact(size: int, scale: float, dtype: torch.dtype) -> None:
    student, teacher = (logits(5, size, dtype=dtype, scale=scale, seed=n) for n in (1, 2))
    losses, gradient = launch_divergence(student, teacher, 0.25)
    wanted, slope = (0.25 * x for x in exact(student, teacher))
    # Logits less their log-sum-exp, some six times the scale, are rounded to 2^-24 of themselves;
    # so are the few sums and products behind them.
    eps = 2.0**-23 * (4 + 10 * scale)
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=eps, atol=eps)
    assert gradient.dtype == dtype and gradient.shape == student.shape
    torch.testing.assert_close(
        gradient.cpu().double(), slope, rtol=torch.finfo(dtype).eps, atol=eps + 2.0**-25
    )


@WITH_TRITON
def test_tokens_that_are_never_expected_cost_nothing() -> None:
    student, teacher = (logits(3, 5000, dtype=torch.float32, seed=n) for n in (3, 4))
    student[:, 7], teacher[:, 7] = -torch.inf, -torch.inf
    teacher[1, 4500:] = -torch.inf
    losses, gradient = launch_divergence(student, teacher, 1.0)
    kept = [x for x in range(5000) if x != 7]
    wanted, slope = exact(student[:, kept], teacher[:, kept])
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[:, kept].cpu().double(), slope, rtol=1e-5, atol=1e-6)
    assert not gradient[:, 7].any()


@WITH_TRITON
@pytest.mark.parametrize("broken", [0, 1])
def test_no_number_stays_none(broken: int) -> None:
    """A training stops at such a loss."""
    pair = [logits(2, 100, dtype=torch.float32, seed=n) for n in (1, 2)]
    pair[broken][0, 3] = torch.nan
    losses, gradient = launch_divergence(pair[0], pair[1], 1.0)
    assert losses.isnan().tolist() == [True, False]
    assert gradient.isnan().any(1).tolist() == [True, False]


@WITH_TRITON
def test_rows_may_lie_apart() -> None:
    student, teacher = logits(4, 300, dtype=torch.float32), logits(300, 4, dtype=torch.float32)
    student, teacher = student[:, 50:150], teacher[50:150].t()
    losses, gradient = launch_divergence(student, teacher, 1.0)
    wanted, slope = exact(student, teacher)
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_the_gradient_is_that_of_the_loss(dtype: torch.dtype) -> None:
    """Whichever way it is computed here; logits of fp64 are rounded to fp32."""
    student, teacher = logits(2, 3, 50, dtype=dtype), logits(2, 3, 50, dtype=dtype, seed=5)
    leaf = student.double().requires_grad_()
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (teacher, leaf))
    wanted = (log_p.exp() * (log_p - log_q)).sum() / 6
    wanted.backward()
    assert leaf.grad is not None
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for way in (divergence, divergence_in_torch):
        loss, gradient = way(student, teacher, 6)
        assert loss.shape == () and gradient.shape == student.shape and gradient.dtype == dtype
        assert float((loss - wanted.detach()).abs()) < 1e-5 * float(wanted)
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=eps, atol=1e-6)


@WITH_TRITON
def test_tensors_without_values_have_their_shapes() -> None:
    with StandIn() as stand_in:
        student = torch.zeros(2, 8, 70, dtype=torch.bfloat16, device=stand_in.device)
        loss, gradient = divergence(student, student.clone(), 16)
        assert loss.shape == () and loss.dtype == torch.float32
        assert gradient.shape == (2, 8, 70) and gradient.dtype == torch.bfloat16
        assert gradient.device.type == "cuda"


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from graphopt.runtime.kernels.divergence import row_divergence
from graphopt.training.divergence import BLOCK, WARPS

names = ("student_ptr", "teacher_ptr", "gradient_ptr")
sizes = ("student_stride", "teacher_stride", "V")
signature = {**dict.fromkeys(names, "*bf16"), "loss_ptr": "*fp32", **dict.fromkeys(sizes, "i32"),
             "share": "fp32", "BLOCK": "constexpr"}
sixteens = {(place,): [["tt.divisibility", 16]] for place in range(7)}
source = ASTSource(row_divergence, signature, {"BLOCK": BLOCK}, sixteens)
for arch in (80, 90):
    made = compile(source, GPUTarget("cuda", arch, 32), {"num_warps": WARPS})
    # Rows of a multiple of 16 logits are read and written by 16 bytes.
    assert "ld.global.b16" not in made.asm["ptx"] and "st.global.b16" not in made.asm["ptx"]
"""


@WITH_TRITON
def test_the_kernel_compiles_and_reads_by_sixteen_bytes() -> None:
    assert compile_alone(COMPILE) == ""
