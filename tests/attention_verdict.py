"""A drawn attention run by its kernel, and how far the result may be from the exact one."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from attention_reference import Case
from attention_sweep import Drawn, Problem, kernel_is_interpreted, problem

from graphopt.plan import AttentionPlan


@dataclass
class Verdict:
    """How far a result is from the exact one.

    Attributes:
        error: The largest.
        reference: The largest of an fp32 reference whose output is rounded to the dtype.
        weights: The same of one whose weights are rounded as well, before they are divided by
            their sum.
        floor: The largest that is allowed besides (see `_judge`).
        used: The largest part of what is allowed, twice `reference` and the floor.
        wrong: What else is: a row that was not written, a log-sum-exp, a page's maximum.
    """

    error: float = 0.0
    reference: float = 0.0
    weights: float = 0.0
    floor: float = 0.0
    used: float = 0.0
    wrong: str = ""

    @property
    def right(self) -> bool:
        return self.used <= 1.0 and not self.wrong


FP32 = torch.finfo(torch.float32).eps / 2


def score_error(case: Case) -> float:
    """Return a bound of the error of a score in fp32, as a kernel computes it.

    Matrix units add 16 products at a time: a sum of D is D / 16 + 1 sums, each of which rounds,
    and some round towards zero, by at most twice the unit roundoff of |q| |k| (Cauchy and
    Schwarz). What follows (the scale, the base of the exponential, the cap by exponential and
    quotient, a slope times a place, the bias, and the maximum subtracted) is within 16 roundings
    of the largest score or cap.
    """
    longest = case.q.float().norm(dim=-1).max() * case.k.float().norm(dim=-1).max() * case.scale
    scores = case.scores(torch.float32)
    largest = scores.masked_fill(scores == float("-inf"), 0.0).abs().max()
    steps = 2 * (case.q.shape[-1] // 16 + 2)
    size = max(float(largest), case.fields.get("softcap") or 0.0)
    return FP32 * (steps * float(longest) + 16 * size)


def judge(
    parts: list[tuple[Case, int, int, int]],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    page_max: torch.Tensor | None = None,
    lists: torch.Tensor | None = None,
) -> Verdict:
    """Compare a kernel's results with those in fp64, and with the errors of fp32.

    An element of the output may be off by twice the largest error of the fp32 reference, and
    besides by what the kernel's arithmetic is known to do. It rounds a weight p to the dtype of
    v, relatively by its unit roundoff u, or where it is below the smallest normal number by half
    a step of those, and the result once more by u: that is 2 u sum p |v| and half a step times
    sum |v| over the keys seen. And scores off by d change the weights by 2 d of themselves.
    """
    found, pieces = Verdict(), []
    for whole, row, first, last in parts:
        for head in range(whole.k.shape[1]):
            case, heads = _one_head(whole, head)
            got = out[row : row + 1, heads, first:last]
            pieces.append(_judge(case, got.to(torch.float64), found))
            if lse is not None or page_max is not None:
                allowed = score_error(case)
            if lse is not None:
                _compare(
                    "log-sum-exp", lse[row : row + 1, heads, first:last],
                    case.exponentials(torch.float64)[2], allowed, found,
                )  # fmt: skip
            if page_max is not None:
                assert lists is not None
                maxima = page_max[row : row + 1, heads, first:last]
                _compare("page maximum", maxima, _maxima(case, lists[row, head]), allowed, found)
    for error, floor in pieces:
        part = error / (2 * found.reference + floor)
        found.used = max(found.used, float(part.masked_fill(error == 0, 0.0).max()))
    return found


def _one_head(case: Case, head: int) -> tuple[Case, slice]:
    """Return the part of a case of one key head, and the query heads it has."""
    group = case.q.shape[1] // case.k.shape[1]
    heads = slice(head * group, (head + 1) * group)
    bias = case.bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    return dataclasses.replace(
        case, q=case.q[:, heads], k=case.k[:, head : head + 1], v=case.v[:, head : head + 1],
        slopes=None if case.slopes is None else case.slopes[heads],
        sinks=None if case.sinks is None else case.sinks[heads], bias=bias,
        picked=None if case.picked is None else case.picked[:, head : head + 1],
    ), heads  # fmt: skip


def _judge(case: Case, got: torch.Tensor, found: Verdict) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the errors of one key head; return them, and the floor of each."""
    dtype = case.q.dtype
    info = torch.finfo(dtype)
    exps, total, _ = case.exponentials(torch.float64)
    total = total.masked_fill(total == 0, 1.0)
    v = case.v.to(torch.float64)
    exact, sizes = exps @ v / total, exps @ v.abs() / total
    half_step = info.tiny * info.eps / 2
    small = (exps > 0).to(torch.float64) @ v.abs() / total * half_step
    floor = (info.eps + 2 * score_error(case)) * sizes + small
    for name, weights in (("reference", None), ("weights", dtype)):
        plain = case.run(torch.float32, weights)[0].to(dtype).to(torch.float64)
        setattr(found, name, max(getattr(found, name), float((plain - exact).abs().max())))
    error = (got - exact).abs()
    if not torch.isfinite(got).all():
        found.wrong = found.wrong or "the output has what is no number"
        error = error.nan_to_num(float("inf"), float("inf"))
    found.error = max(found.error, float(error.max()))
    found.floor = max(found.floor, float(floor.max()))
    return error, floor


def _compare(
    what: str, got: torch.Tensor, exact: torch.Tensor, allowed: float, found: Verdict
) -> None:
    same = (got == float("-inf")) & (exact == float("-inf"))
    error = (got.to(torch.float64) - exact).abs().masked_fill(same, 0.0)
    worst = float(error.nan_to_num(float("inf"), float("inf")).max())
    limit = allowed + 8 * FP32 * float(exact.nan_to_num(neginf=0.0).abs().max())
    if not worst <= limit:
        found.wrong = found.wrong or f"{what} off by {worst:.2e}, {limit:.2e} are allowed"


def _maxima(case: Case, listed: torch.Tensor) -> torch.Tensor:
    """Return the largest score of every page listed, [1, heads, S, M]."""
    scores, page = case.scores(torch.float64), case.fields["page"]
    by_page = scores.unflatten(-1, (-1, page)).amax(-1)
    maxima = by_page[..., listed.clamp(min=0)]
    return maxima.masked_fill((listed < 0)[None, None, None], float("-inf"))


class Recorded:
    """A Triton kernel that remembers what was compiled last: shared memory, instructions."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.shared, self.wgmma = 0, False

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**given: Any) -> None:
            made = self.kernel[grid](**given)
            if hasattr(made, "metadata"):
                self.shared, self.wgmma = made.metadata.shared, "wgmma" in made.asm["ptx"]

        return run


def why_not_here(kernel: str) -> str | None:
    """Return why this machine cannot run a kernel."""
    if not kernel_is_interpreted(kernel):
        return None if torch.cuda.is_available() else "there is no GPU"
    versions = [metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, version)) for version in versions)
    if triton < (3, 9) and numpy >= (2, 5):
        return "Triton's interpreter turns arrays to numbers in a way that numpy 2.5 refuses"
    return None


def run(drawn: Drawn) -> dict[str, Any]:
    """Return the verdict on one description.

    Raises:
        GraphoptError: It was refused.
    """
    here = why_not_here(drawn.kernel)
    if here is not None:
        return {"verdict": "not run", "why": here}
    plan = drawn.plan()
    interpreted = kernel_is_interpreted(drawn.kernel)
    posed = problem(drawn, "cpu" if interpreted else "cuda")
    started = time.monotonic()
    out, lse, maxima, used = started_kernel(drawn, plan, posed)
    if not interpreted:
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    found = judge(posed.parts, out, lse, maxima, posed.lists)
    row: dict[str, Any] = {"tiles": plan.tiles, "seconds": round(seconds, 2), **used}
    row |= {k: float(f"{v:.4g}") for k, v in dataclasses.asdict(found).items() if k != "wrong"}
    planned = next((i.value for i in plan.inequalities if i.name == "shared memory"), None)
    wrong = found.wrong or ("" if found.used <= 1 else "an error beyond what is allowed")
    if planned is not None and row.get("shared", 0) > planned:
        wrong = wrong or f"{row['shared']:,} bytes of shared memory, planned were {planned:,}"
    if row.get("wgmma"):
        wrong = wrong or "it was compiled to the instructions that the planner avoids"
    return {"verdict": "wrong" if wrong else "right", "why": wrong, "planned": planned, **row}


def started_kernel(
    drawn: Drawn, plan: AttentionPlan, posed: Problem
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return output, log-sum-exp and page maxima, and what else is known of the kernel."""
    from graphopt.lowering.kernels.triton import kernel_constants
    from graphopt.runtime.attention import decode, prefill

    common = {"scale": posed.scale, "extras": posed.extras}
    decoding = plan.spec.phase == "decode"
    if drawn.kernel == "ascend-triton":
        return (*ascend(plan, posed, common, decoding), None, {})
    if drawn.kernel == "triton":
        from graphopt.runtime.kernels.decode import attention_decode, attention_merge
        from graphopt.runtime.kernels.prefill import attention_prefill

        constants = kernel_constants(plan, ring=posed.ring)
        if os.environ.get("TRITON_INTERPRET"):
            constants["OVERLAP"] = False
        kernel = Recorded(attention_decode if decoding else attention_prefill)
        if decoding:
            found = decode(kernel, attention_merge, posed.q, posed.keys, constants, **common)
        else:
            found = prefill(kernel, posed.q, posed.keys, constants, **common, **posed.options)
        return (*found, {"shared": kernel.shared, "wgmma": kernel.wgmma})
    if drawn.kernel == "hopper-cuda":
        from graphopt.lowering.kernels.hopper_cuda import hopper_constants, hopper_source
        from graphopt.runtime.hopper import HopperPrefill
        from graphopt.runtime.nvrtc import compile_cuda

        image = compile_cuda(hopper_source(plan), "hopper_prefill.cu", "sm_90a", {}).image
        constants = {**kernel_constants(plan), **hopper_constants(plan)}
        launcher = HopperPrefill(image, hopper_constants(plan))
        return (
            *prefill(launcher, posed.q, posed.keys, constants, **common, **posed.options), {}
        )  # fmt: skip
    from graphopt.lowering.kernels.volta_cuda import compile_volta, volta_constants
    from graphopt.runtime.volta import decode_kernels, prefill_kernel

    constants = volta_constants(plan, ring=posed.ring)
    image = compile_volta(constants, "compute_70").image
    if decoding:
        pair = decode_kernels(image, constants)
        return (*decode(*pair, posed.q, posed.keys, constants, **common), {})
    one = prefill_kernel(image, constants)
    return (*prefill(one, posed.q, posed.keys, constants, **common, **posed.options), {})


def ascend(
    plan: AttentionPlan, posed: Problem, common: dict[str, Any], decoding: bool
) -> tuple[Any, Any]:
    """Run the Ascend kernels by the interpreter."""
    from graphopt.lowering.kernels.ascend_triton import ascend_constants
    from graphopt.runtime import ascend as launcher
    from graphopt.runtime.kernels.ascend_decode import ascend_decode, ascend_merge
    from graphopt.runtime.kernels.ascend_prefill import ascend_prefill

    constants, programs = ascend_constants(plan), {"programs": 3}
    if decoding:
        kernels = ascend_decode, ascend_merge
        return launcher.decode(*kernels, posed.q, posed.keys, constants, **common, **programs)
    return launcher.prefill(ascend_prefill, posed.q, posed.keys, constants, **common, **programs)
