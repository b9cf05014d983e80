"""Norms and rotations that are trained through, each way: on a GPU, else interpreted."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiling import compile_alone
from families import captured
from programs import tiny_program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.execute import fused_norm, fused_rope
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.takes_kernels import _launches as decided
from graphopt.execute.takes_kernels import takes_kernels
from graphopt.ir import functional
from graphopt.ir.blocks import find_blocks
from graphopt.ir.ops import get_op
from graphopt.memory.stand_in import StandIn
from graphopt.training.memory import training_workload
from graphopt.training.parametrisations import FullParametrisation

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of Triton has no bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
EPS = 1e-6


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a CPU's tensors go to the kernels, which are interpreted there."""
    if DEVICE == "cpu":
        for module in (fused_norm, fused_rope):
            monkeypatch.setattr(module, "takes_kernels", lambda *_: True)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def both_ways(
    x: Tensor, weight: Tensor | None, slope: Tensor, offset: float, eps: float
) -> list[Tensor]:
    """The norm by the kernels, the gradient of x, and that of the gain."""
    leaves = [x.detach().requires_grad_()]
    if weight is not None:
        leaves.append(weight.detach().requires_grad_())
    attrs = {"eps": eps, "offset": offset}
    with torch.autocast(DEVICE, slope.dtype, enabled=slope.dtype != x.dtype):
        (out,) = fused_norm.rms_norm(leaves, attrs, for_products=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def check(x: Tensor, weight: Tensor | None, slope: Tensor, offset: float, eps: float = EPS) -> None:
    """Both ways are those of fp64, rounded once to the dtypes of slope and x behind sums in fp32.

    A sum is off by 2^-24 of its terms' magnitudes for each level: within a program terms are added
    up in a tree, and over rows one by one.
    """
    found = both_ways(x, weight, slope, offset, eps)
    n, s = x.cpu().double(), slope.cpu().double()
    gain = torch.ones(()).double() if weight is None else weight.cpu().double() + offset
    r = (n.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, g = n * r, s * gain
    along = [(g * n).mean(-1, keepdim=True), (g * n).abs().mean(-1, keepdim=True)]
    kept = x.shape[-1]
    exact = [n * gain, r * (g - n * along[0]), (s * n).reshape(-1, kept).sum(0)]
    terms = [
        exact[0].abs(), r * (g.abs() + n.abs() * along[1]), (s * n).abs().reshape(-1, kept).sum(0),
    ]  # fmt: skip
    levels = 16 + x[..., 0].numel()
    dtypes = [slope.dtype, x.dtype, torch.float32]
    assert len(found) == 2 + (weight is not None)
    for one, wanted, magnitude, dtype in zip(found, exact, terms, dtypes, strict=False):
        assert one.dtype == dtype and one.shape == wanted.shape
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        allowed = torch.finfo(dtype).eps * wanted.abs() + smallest + 2.0**-24 * levels * magnitude
        assert bool(((one.cpu().double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 6, 64, 576, 2500])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_both_ways_are_exact(
    rows: int, width: int, dtype: torch.dtype, offset: float | None
) -> None:
    x, slope = (random(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = None if offset is None else random(width, seed=2)
    check(x, weight, slope, offset or 0.0)


def test_a_program_takes_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are programs for, the last of them in part."""
    monkeypatch.setattr(fused_norm, "PROGRAMS", 3)
    monkeypatch.setattr(fused_norm, "ELEMENTS", 128)
    x, slope, weight = random(45, 64), random(45, 64, seed=1), random(64, seed=2)
    check(x, weight, slope, 0.0)


def test_rows_behind_the_last_add_nothing() -> None:
    """Also without an epsilon, where a row of zeros has no norm."""
    x, slope, weight = random(45, 64), random(45, 64, seed=1), random(64, seed=2)
    check(x, weight, slope, 0.0, eps=0.0)


def test_what_is_rounded_for_products_has_its_gradient() -> None:
    """The residual stream is in fp32, and what comes back from products is not."""
    x, weight = random(20, 48), random(48, seed=2)
    slope = random(20, 48, seed=1, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float16)
    check(x, weight, slope, 1.0)


def test_rows_may_lie_apart() -> None:
    """Heads of a projection, of which gradients come in another order."""
    x = random(2, 5, 3, 16).transpose(1, 2)
    slope, weight = random(2, 3, 16, 5, seed=1).transpose(2, 3), random(16, seed=2)
    check(x, weight, slope, 1.0)


def test_a_gain_that_is_not_trained_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    gradient = fused_norm._gradient

    def seen(*arguments: Any) -> Any:
        out, parts = gradient(*arguments)
        made.append(tuple(parts.shape))
        return out, parts

    monkeypatch.setattr(fused_norm, "_gradient", seen)
    for learns in (False, True):
        x, weight = random(4, 32).requires_grad_(), random(32, seed=1).requires_grad_(learns)
        (out,) = fused_norm.rms_norm([x, weight], {"eps": EPS})
        out.sum().backward()
        assert x.grad is not None and (weight.grad is not None) == learns
    assert made == [(0, 32), (1, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("rotated", [6, 16])
@pytest.mark.parametrize("tables", [1, 2])
def test_rotations_are_exact_both_ways(
    tables: int, rotated: int, heads_first: bool, interleaved: bool, dtype: torch.dtype
) -> None:
    """Of heads in part as well, and by tables for each text or for all."""
    x = random(2, 3, 5, 16, dtype=dtype).transpose(1, 2)  # heads 3, or 5 that lie apart
    slope = random(2, 5, 16, 3, dtype=dtype, seed=1).transpose(2, 3)
    angles = random(tables, 3 if heads_first else 5, rotated // 2, seed=2)
    cos, sin = 1.5 * angles.cos(), 1.5 * angles.sin()
    attrs = {"interleaved": interleaved, "heads_first": heads_first}
    leaf = x.detach().requires_grad_()
    (out,) = fused_rope.rope([leaf, cos, sin], attrs)
    found = [out.detach(), *torch.autograd.grad(out, leaf, slope)]
    # Tables are rounded to the dtype of x first, as in torch.
    tables_used = cos.to(dtype), sin.to(dtype)
    wide = [t.detach().cpu().double() for t in (x, *tables_used, slope)]
    wide[0].requires_grad_()
    (wanted,) = get_op("rope").torch(wide[:3], attrs)
    exact = [wanted.detach(), *torch.autograd.grad(wanted, wide[0], wide[3])]
    for one, value in zip(found, exact, strict=True):
        assert one.dtype == dtype and one.shape == value.shape
        # Two products and a sum in fp32, of magnitudes below 20, and one rounding.
        torch.testing.assert_close(
            one.cpu().double(), value, rtol=torch.finfo(dtype).eps, atol=20 * 3 * 2.0**-24
        )


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(2, 3, 8), random(3, 8, seed=1)),
        (random(0, 8), random(8, seed=1)),
    ],
    ids=["a gain of each row", "nothing"],
)
def test_what_kernels_do_not_take_goes_to_torch(x: Tensor, weight: Tensor) -> None:
    (out,) = fused_norm.rms_norm([x, weight], {"eps": EPS})
    assert torch.equal(out, functional.rms_norm(x, weight, EPS))


def test_training_runs_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in the mode in which compiled steps are traced: a compiler makes kernels itself."""
    program = tiny_program()
    ids = torch.arange(12, device=DEVICE)[None] % 50
    launched: list[tuple[int, ...]] = []
    launch = fused_norm.launch_norm

    def counting(x: Tensor, *rest: Any) -> Any:
        launched.append(tuple(x.shape))
        return launch(x, *rest)

    monkeypatch.setattr(fused_norm, "launch_norm", counting)
    runner = BlockRunner(program, 1, len(program.calls) - 1, {}, torch.device(DEVICE))
    runner.autocast = None
    found = runner.logits({"input_ids": ids})
    norms = sum(
        node.op == "rms_norm"
        for call in program.calls
        for node in program.functions[call.function].nodes
    )
    assert len(launched) == norms > 0
    runner.mode = "torch"
    torch.testing.assert_close(found, runner.logits({"input_ids": ids}))
    assert len(launched) == norms


@pytest.mark.parametrize(
    ("family", "rounded", "kept"),
    [("llama", 9, 0), ("olmo2", 1, 16), ("gemma3_text", 9, 16)],
)
def test_what_products_alone_read_is_rounded_for_them(
    family: str, rounded: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in front of projections and of the head; those of products have their dtype anyway."""
    monkeypatch.setattr(fused_rope, "takes_kernels", lambda *_: False)
    program = captured(family)[1]
    changes: list[bool] = []

    def plain(x: Tensor, y: None, weight: Tensor | None, eps: float, offset: float, dtype: Any):  # type: ignore[no-untyped-def]
        changes.append(dtype != x.dtype)
        return x, functional.rms_norm(x, weight, eps, offset).to(dtype)

    monkeypatch.setattr(fused_norm, "launch_norm", plain)
    runner = BlockRunner(program, 1, len(program.calls) - 1, {}, torch.device(DEVICE))
    runner.autocast = torch.bfloat16
    ids = torch.arange(12, device=DEVICE)[None]
    found = runner.logits({"input_ids": ids})
    assert (changes.count(True), changes.count(False)) == (rounded, kept)
    runner.mode = "torch"
    # Each product rounds the same numbers by itself then.
    assert torch.equal(found, runner.logits({"input_ids": ids}))


def test_what_is_looked_at_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are of the numbers that the program has."""
    program = tiny_program()
    monkeypatch.setattr(
        fused_norm, "launch_norm",
        lambda x, y, w, eps, offset, dtype: (x, functional.rms_norm(x, w, eps, offset).to(dtype)),
    )  # fmt: skip
    runner = BlockRunner(program, 1, len(program.calls) - 1, {}, torch.device(DEVICE))
    runner.autocast = torch.bfloat16
    call = program.calls[1]
    function = program.functions[call.function]
    norm = next(node for node in function.nodes if node.op == "rms_norm").output
    values = dict(runner.window_inputs(torch.arange(8, device=DEVICE)[None]))
    runner.run_range(values, 0, 1)
    args = [values[name] for name in call.args]
    weights = runner.call_weights(call)
    seen: dict[Any, Tensor] = {}
    runner.run_call(call, args, (1, 8), weights, observe=seen.__setitem__)
    assert seen[norm].dtype == torch.float32
    (wanted,) = runner.call_values(call, args, (1, 8), weights, [norm])
    assert wanted.dtype == torch.float32


def test_experts_take_what_is_rounded_as_it_is() -> None:
    """Under autocast, which rounds weights."""
    x, gates = torch.rand(3, 8), torch.ones(3, 2)
    up, down = torch.rand(12, 8), torch.rand(8, 12)
    made: list[torch.dtype] = []

    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                made.append(out.dtype)
            return out

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Conversions():
        functional.experts(x.bfloat16(), gates, up, down, act=torch.relu)
    assert torch.float32 not in made and torch.bfloat16 in made


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_blocks_gradients_are_those_of_torch(recomputes: bool) -> None:
    program = captured("gemma3_text")[1]
    blocks = find_blocks(program)
    ids = torch.arange(10, device=DEVICE)[None]
    gradients: dict[str, Tensor] = {}
    for mode in ("fused", "torch"):
        trained = {
            name: FullParametrisation(program.weights[name].load().float())
            for call in program.calls[blocks[0].position : blocks[-1].position + 1]
            for name in call.weights.values()
            if not program.weights[name].constant
        }
        stop = blocks[-1].position + 1
        runner = BlockRunner(program, blocks[0].position, stop, trained, torch.device(DEVICE))
        runner.autocast, runner.mode, runner.recomputes = None, mode, recomputes
        values = runner.window_inputs(ids)
        runner.run_range(values, 0, stop)
        values[runner.exit].square().sum().backward()
        for name, part in runner.parametrisations.items():
            (parameter,) = part.parameters()
            assert parameter.grad is not None
            if mode == "fused":
                gradients[name] = parameter.grad
                continue
            # Sums in fp32 of the same numbers, in another order, through four blocks.
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-4 * scale)
    assert len(gradients) > 20


@pytest.mark.parametrize(
    ("capability", "dtype", "taken"),
    [
        ((8, 0), torch.bfloat16, True),
        ((7, 0), torch.float16, False),
        ((9, 0), torch.float64, False),
    ],
)
def test_gpus_and_dtypes_that_kernels_take(
    capability: tuple[int, int], dtype: torch.dtype, taken: bool
) -> None:
    with StandIn(capability) as stand_in:
        assert takes_kernels(torch.zeros(2, dtype=dtype, device=stand_in.device)) == taken


def test_without_a_compiler_trainings_are_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles what launches its kernels, at first use."""
    from triton import runtime

    class Broken:
        def get_current_target(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=Broken()))
    decided.cache_clear()
    try:
        with pytest.warns(UserWarning, match="launches nothing here .Failed to find C compiler"):
            assert not decided()
    finally:
        decided.cache_clear()


def test_tensors_without_values_have_their_shapes_and_gradients() -> None:
    with StandIn() as stand_in:
        x = torch.zeros(2, 700, 64, device=stand_in.device, requires_grad=True)
        weight = torch.zeros(64, device=stand_in.device, requires_grad=True)
        (out,) = fused_norm.rms_norm([x, weight], {"eps": EPS})
        out.backward(torch.zeros_like(out))
        for tensor in (x, weight):
            assert tensor.grad is not None
            assert tensor.grad.shape == tensor.shape and tensor.grad.is_cuda


def test_a_predicted_step_has_a_kernel_a_norm() -> None:
    program = tiny_program()
    with StandIn() as stand_in:
        work = training_workload(program, stand_in.device, windows=2, seq=16, blocks=2)
        trace = work.record(1)
    kernels = {name for name in trace.op_names if "rms_norm" in name}
    assert kernels == {f"graphopt.rms_norm{way}.default" for way in ("", "_gradient")}
    assert "graphopt.rope.default" in trace.op_names
    assert not [name for name in trace.op_names if "rsqrt" in name]


COMPILE = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from graphopt.runtime.kernels.norm_gradient import rms_norm_gradient

strides = [f"{name}_stride_{axis}" for name in ("slope", "x") for axis in range(3)]
for kind in ("fp32", "bf16"):
    signature = {**dict.fromkeys(("slope_ptr", "x_ptr"), "*" + kind), "weight_ptr": "*fp32",
                 "out_ptr": "*" + kind, "parts_ptr": "*fp32",
                 **dict.fromkeys(("rows", "size_1", "size_2", *strides), "i32"),
                 "eps": "fp32", "offset": "fp32",
                 **dict.fromkeys(("N", "ROWS", "BLOCK"), "constexpr")}
    sixteens = {(place,): [["tt.divisibility", 16]] for place in (*range(5), *range(8, 14))}
    given = {"N": 640, "ROWS": 2, "BLOCK": 1024}
    source = ASTSource(rms_norm_gradient, signature, given, sixteens)
    for arch in (80, 90):
        made = compile(source, GPUTarget("cuda", arch, 32), {"num_warps": 8})
        ptx = made.asm["ptx"]
        assert set(re.findall(r"(?:ld|st)[.]global[.a-z0-9]*", ptx)) == {
            "ld.global.v4.b32", "st.global.v4.b32"
        }
"""


def test_the_kernel_compiles_and_reads_by_sixteen_bytes() -> None:
    assert compile_alone(COMPILE) == ""
