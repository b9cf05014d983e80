"""Kernels of feed-forward parts with experts, against fp64: on a GPU, else interpreted."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from carved import carved
from compiling import compile_alone
from programs import tiny_program
from sampling import slow_but
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

import graphopt as go  # noqa: E402
from graphopt.execute.interpreter import Runner  # noqa: E402
from graphopt.ir import functional  # noqa: E402
from graphopt.ir.feed_forward import Split  # noqa: E402
from graphopt.ir.ops import get_op  # noqa: E402
from graphopt.lowering.kernels.triton import expert_tiles  # noqa: E402
from graphopt.runtime import moe  # noqa: E402
from graphopt.targets import get_target  # noqa: E402

TILES = expert_tiles(get_target("hopper"))
KERNELS = moe.ExpertKernels(TILES)

# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
SHAPES = [
    # tokens, experts, active, neurons of an expert, shared neurons, features
    (1, 5, 3, 24, 72, 64),
    (3, 14, 2, 12, 0, 40),
    (70, 5, 3, 43, 16, 96),
    (33, 2, 1, 16, 8, 32),
    (20, 4, 4, 16, 0, 32),
    # Blocks of what is summed over fit, so that nothing is masked.
    (20, 4, 2, 128, 0, 128),
]
if DEVICE == "cuda":
    # Tiles of more tokens, and of such as the GPU copies by itself.
    SHAPES += [(300, 4, 1, 128, 64, 192), (1500, 4, 2, 192, 64, 256)]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype).to(DEVICE)


class Part:
    """Weights of a part, and what fp64 makes of them."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, act: str, gated: bool, biased: bool
    ) -> None:
        tokens, experts, self.active, size, shared, width = shape
        self.experts, self.act = experts, act
        self.x = random(tokens, width, dtype=dtype, seed=0) * width**0.5

        def weights(neurons: int, seed: int) -> list[Tensor | None]:
            def vector(n: int, seed: int) -> Tensor | None:
                return random(n, dtype=dtype, seed=seed) * n**0.5 if biased else None

            return [
                random(neurons, width, dtype=dtype, seed=seed),
                random(width, neurons, dtype=dtype, seed=seed + 1),
                random(neurons, width, dtype=dtype, seed=seed + 2) if gated else None,
                vector(neurons, seed + 3),
                vector(neurons, seed + 4) if gated else None,
            ]

        self.routed = weights(experts * size, 1)
        self.shared: list[Tensor | None] = [None] * 6
        if shared:
            down_bias = random(width, dtype=dtype, seed=20) if biased else None
            self.shared = [*weights(shared, 11), down_bias]

    def exact(self, gates: Tensor) -> Tensor:
        """Return the result in fp64."""

        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double().cpu()

        x = self.x.double().cpu()
        operands = [x, wide(gates), *map(wide, self.routed)]
        whole = get_op("experts").reference(operands, {"act": self.act, "active": self.active})[0]
        up, down, gate, up_bias, gate_bias, down_bias = map(wide, self.shared)
        if up is not None:
            hidden = _linear(x, up, up_bias)
            act = get_op(self.act)
            if gate is None:
                hidden = act.reference([hidden], {})[0]
            else:
                hidden = act.reference([_linear(x, gate, gate_bias)], {})[0] * hidden
            whole = whole + _linear(hidden, down, down_bias)
        return whole


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def some_gates(part: Part, dtype: torch.dtype, kind: str) -> Tensor:
    tokens, experts = len(part.x), part.experts
    if kind == "one":
        # Every token runs the last experts, and the others none.
        gates = torch.zeros(tokens, experts)
        gates[:, -part.active :] = 1
        return gates.to(dtype).to(DEVICE)
    scores = random(tokens, experts, dtype=dtype, seed=30)
    gates = functional.top_k_gating(scores, top_k=part.active)
    if kind == "scaled":
        gates = gates * (1 + scores.abs())
    if kind == "fewer":
        gates = gates * (torch.arange(tokens, device=DEVICE) % 3 > 0)[:, None]
    return gates


def close(found: Tensor, exact: Tensor, units: int = 4) -> None:
    """Hidden neurons, parts and sums are each rounded once: a few units of the output's scale."""
    eps = torch.finfo(found.dtype).eps
    scale = exact.abs().mean() + exact.abs()
    assert bool(((found.double().cpu() - exact).abs() <= units * eps * scale).all())


FORMS, KINDS = ("gated", "plain", "biased"), ("top", "one", "scaled", "fewer")
QUICK = (1, 3)
"""Of the shapes, which run in the inner test loop."""

# An interpreter takes seconds for each: there every shape is in one form, and one in several.
CASES = [
    pytest.param(shape, form, kind, marks=[pytest.mark.slow] * (i not in QUICK))
    for i, shape in enumerate(SHAPES)
    for j, form in enumerate(FORMS)
    for k, kind in enumerate(KINDS)
    if DEVICE == "cuda" or (j, k) == (i % 3, i % 4) or (i == 1 and j == k % 3)
]


def few_tiles(shape: tuple[int, ...]) -> moe.ExpertTiles:
    """Return the target's tiles; for an interpreter larger ones where there are many neurons."""
    if DEVICE == "cuda" or shape[3] < 32:
        return TILES
    reads = [dataclasses.replace(t, rows=32) for t in (TILES.expand_few, TILES.reduce_few)]
    return dataclasses.replace(TILES, expand_few=reads[0], reduce_few=reads[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "form", "kind"), CASES)
def test_parts(shape: tuple[int, ...], form: str, kind: str, dtype: torch.dtype) -> None:
    part = Part(shape, dtype, "gelu" if form == "plain" else "silu", form != "plain",
                form == "biased")  # fmt: skip
    gates = some_gates(part, dtype, kind)
    exact = part.exact(gates)
    # An interpreter runs programs one after the other: a few tokens say it all.
    first = slice(0, 3)
    x, own = part.x[first], gates[first]
    operands = (*part.routed, *part.shared, part.act, part.active, few_tiles(shape))
    few = moe.launch_few(x, own, *operands)
    close(few, exact[first])
    # Again, and the last token alone: neither the run nor the other tokens change a bit.
    for rows in (slice(None), slice(-1, None)) if DEVICE == "cuda" else (slice(-1, None),):
        assert torch.equal(few[rows], moe.launch_few(x[rows], own[rows], *operands))
    part.shared = [None] * 6
    exact = part.exact(gates)
    bias = random(len(exact[0]), dtype=dtype, seed=40)
    others = random(*exact.shape, dtype=dtype, seed=41)
    close(many(part, gates, others, bias), exact + bias.double().cpu() + others.double().cpu())


def many(
    part: Part, gates: Tensor, shared: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the sum of the experts, what else is shared and a bias, as of many tokens."""
    parts = moe.launch_many(part.x, gates, *part.routed, part.act, part.active, TILES)
    y = torch.empty(len(parts), parts.shape[-1], dtype=parts.dtype, device=parts.device)
    moe.launch_combine(parts, gates, shared, bias, y)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", slow_but((1, 5, 14, 64), 5))
@pytest.mark.parametrize("operands", ["logits", "selection_bias", "gate_scale", "both"])
def test_gates(operands: str, experts: int, dtype: torch.dtype) -> None:
    scores = random(37, experts, dtype=dtype, seed=0) * experts**0.5
    # Two equal ones: the first is chosen.
    scores[:, -1] = scores[:, 0]
    # One that changes the choice, and no ties of sums that are rounded differently.
    bias = random(experts, dtype=dtype, seed=1) if operands in ("selection_bias", "both") else None
    gate_scale = (
        random(experts, dtype=dtype, seed=2) if operands in ("gate_scale", "both") else None
    )
    count = max(1, experts // 3)
    found = moe.launch_top_k_gating(scores, bias, gate_scale, count)
    # The same scores as products with one feature, and with zeros behind it.
    weight = torch.eye(experts, 48 if experts < 48 else 80, dtype=dtype, device=DEVICE)
    x = torch.zeros(len(scores), weight.shape[1], dtype=dtype, device=DEVICE)
    x[:, :experts] = scores
    assert torch.equal(moe.launch_route(x, weight, None, bias, gate_scale, count), found)
    offset = torch.zeros(experts, dtype=dtype, device=DEVICE)
    offset[-1] = 100.0
    assert bool(
        (moe.launch_route(x[:5], weight, offset, bias, gate_scale, count)[:, -1] != 0).all()
    )
    exact = functional.top_k_gating(
        scores.double().cpu(),
        None if bias is None else bias.double().cpu(),
        None if gate_scale is None else gate_scale.double().cpu(),
        top_k=count,
    )
    assert bool(((found != 0).sum(-1) == count).all())
    eps = torch.finfo(dtype).eps
    assert bool(((found.double().cpu() - exact).abs() <= eps * (1 + exact.abs())).all())


@pytest.mark.slow
def test_thresholds_choose_what_is_above_them() -> None:
    scores = random(19, 6, dtype=torch.float16, seed=0)
    bias = torch.tensor([0.0, -9.0, 9.0, 0.0, 0.0, 0.0], dtype=torch.float16, device=DEVICE)
    for given in (None, bias):
        gates = moe.launch_top_k_gating(scores, given, None, 6, mean_active_experts=2)
        ranked = scores.double() if given is None else scores.double() + given.double()
        assert torch.equal(gates, (ranked > 0).to(gates.dtype))
        part = Part((19, 6, 6, 8, 0, 32), torch.float16, "silu", True, False)
        close(many(part, gates), part.exact(gates))
        x, own = part.x[:2], gates[:2]
        few = moe.launch_few(x, own, *part.routed, *part.shared, part.act, part.active, TILES)
        close(few, part.exact(gates)[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_run_in_pieces_beside_what_is_shared(dtype, monkeypatch) -> None:
    monkeypatch.setattr(moe, "AT_ONCE", 64)
    part = Part((150, 6, 2, 48, 80, 128), dtype, "silu", gated=True, biased=True)
    gates = some_gates(part, dtype, "top")
    for _ in range(3):
        found = KERNELS.moe(part.x, gates, *part.routed, *part.shared, act="silu", active=2)
        close(found, part.exact(gates))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size", "width"),
    [(3000, 90, 1001), (600, 90, 1001), (3000, 45, 100), (3000, 104, 1000)],
)
def test_many_tokens_of_rows_that_begin_anywhere(tokens, size, width, dtype) -> None:
    """Copies and products of the largest tiles take rows that begin at multiples of 16 bytes.

    Plain fp32 that rounds where the kernels do comes to 4 units where there are three million
    elements: among so many are some that are small sums of parts five times the mean.
    """
    part = Part((tokens, 4, 2, size, 40, width), dtype, "silu", gated=True, biased=True)
    gates = some_gates(part, dtype, "top")
    found = KERNELS.moe(part.x, gates, *part.routed, *part.shared, act="silu", active=2)
    close(found, part.exact(gates), units=8)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.lowering.kernels.triton import expert_tiles
from graphopt.runtime.kernels import experts
from graphopt.targets import get_target

def shared_bytes(kernel, arch, options, **constants):
    compiled = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    constants |= options
    signature = {
        name: "constexpr" if name in constants
        else "*i32" if name in ("order_ptr", "counts_ptr")
        else "*bf16" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    # As tensors are where they start, and rows where they begin.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names) if name.endswith(("_ptr", "stride"))
        and name not in constants
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=compiled)
    return made.metadata.shared

# What a program may have: an RTX 30 or 40, an A100.
for i, (arch, room) in enumerate(((86, 101376), (80, 166912))):
    for j, row in enumerate(expert_tiles(get_target("ampere")).many):
        rows, up = row.expand.rows, row.expand
        sizes = {"E": 5, "SIZE": 1376, "ROOM": 1408}
        if EVERY or (i + j) % 4 == 0:
            used = shared_bytes(
                experts.expand, arch, up.options(5, 2, room), D=4096, COUNT=3, ACT="silu",
                up_tiles=None, gate_tiles=None, up_bias_ptr=None, gate_bias_ptr=None, **sizes,
            )
            assert used <= room, (arch, rows, used)
        if EVERY or (i + j) % 4 == 2:
            used = shared_bytes(
                experts.reduce, arch, row.reduce.options(5, 1, room), OUT=4096,
                hidden_tiles=None, down_tiles=None, **sizes,
            )
            assert used <= room, (arch, rows, used)
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_products_fit_into_the_shared_memory_of_small_gpus(every: bool) -> None:
    """A kernel takes over a second to compile: some pairs of GPU, tile and kernel, or all."""
    assert compile_alone(f"EVERY = {every}\n{COMPILE}") == ""


@pytest.mark.parametrize("shared", [0, 24])
def test_emitted_models_run_experts_by_kernels(shared: int, tmp_path: Path) -> None:
    program = carved(tiny_program(head_dim=32, ffn=56), Split(shared, 4, 2))
    program = go.Pipeline.default().run(program, go.RunOptions(verify=False))[0]
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",), dtype="float32")
    text = (tmp_path / "out" / "model.py").read_text(encoding="utf-8")
    # What every token runs is part of the call.
    assert text.count(" moe(") == 1 and ("shared_up=" in text) == bool(shared)
    assert "experts(" not in text
    spec = importlib.util.spec_from_file_location("emitted_model", tmp_path / "out" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ids = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    model = module.load(tmp_path / "out", device=DEVICE, dtype=torch.float32)
    with torch.no_grad():
        logits, _ = model(ids.to(DEVICE))
    assert float((logits.cpu().double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    if DEVICE == "cuda":
        model = module.load(tmp_path / "out")
        with torch.no_grad():
            whole, _ = model(ids.cuda())
        # Where two scores are nearly equal 16 bits may choose another expert: most tokens agree.
        error = (whole.double().cpu() - exact).abs().amax(-1) / exact.abs().max()
        assert float((error < 2e-2).double().mean()) > 0.9
        assert module.generate(model, [1, 2, 3], 5) == module.generate(model, [1, 2, 3], 5)
