"""The kernels of KV policies against the policies in torch; interpreted where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import slow_but

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from compiling import compile_alone
from torch import Tensor

from graphopt.ir.kv_policies import (
    Ema,
    Filled,
    KeyCodes,
    KVHeads,
    KVPolicy,
    LastRow,
    PageBudget,
    PageRange,
    Predictor,
    Quest,
    Scoring,
    SinkLocal,
    SnapKV,
    State,
    attention_cnn,
    page_probabilities,
    select_pages,
)
from graphopt.runtime import kv_policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = KVHeads(key_heads=2, query_heads=6, k_dim=40, v_dim=40)
SCORING = Scoring(0.25)
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 3e38, -3e38, 1e-45]


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, PageBudget, Filled]:
    """Scores with many ties and all kinds of numbers, rows of unequal length, any budget."""
    page, pages = draw(st.sampled_from([1, 3, 16])), draw(st.integers(1, 40))
    batch, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    slots = draw(st.integers((pages - 1) * page + 1, pages * page))
    sink, local = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    budget = PageBudget(page, draw(st.integers(sink + local, sink + local + 12)), sink, local)
    last = [draw(st.integers(0, slots - 1)) for _ in range(batch)]
    first = [draw(st.integers(0, end)) for end in last]
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    width = pages + draw(st.integers(-min(2, pages - 1), 3))  # memory of fixed room, or too short
    scores = torch.randint(-3, 4, (batch, groups, width), generator=generator) / 4
    special = torch.rand(scores.shape, generator=generator) < 0.3
    scores[special] = torch.tensor(SPECIAL)[
        torch.randint(len(SPECIAL), scores.shape, generator=generator)[special]
    ]
    return scores, budget, Filled(torch.tensor(first), torch.tensor(last), slots)


def on_device(lengths: Filled) -> Filled:
    return Filled(lengths.first_B.to(DEVICE), lengths.last_B.to(DEVICE), lengths.slots)


@settings(max_examples=8, deadline=None)
@given(selections())
def test_the_same_pages_are_selected_whatever_the_scores(drawn) -> None:
    scores, budget, lengths = drawn
    found = kv_policy.select_pages(scores.to(DEVICE), Quest(budget), on_device(lengths))
    assert torch.equal(found.cpu(), select_pages(scores, budget, lengths))


def test_the_pages_of_a_long_context() -> None:
    """8,192 pages, a tenth of them read: scores of every spread, and many that are equal."""
    budget = PageBudget(16, 819, 1, 2)
    lengths = Filled(torch.tensor([0]), torch.tensor([131000]), 131072)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(8192, generator=generator)
    few = torch.where(normal > 1.5, normal, -1.0)  # of most nothing is known
    rows = normal, (normal * 4).round(), (normal * 20).exp(), 1 / normal, few, normal * 1e-42
    scores = torch.stack(rows)[None]
    found = kv_policy.select_pages(scores.to(DEVICE), Ema(budget), on_device(lengths))
    assert torch.equal(found.cpu(), select_pages(scores, budget, lengths))


POLICIES = [
    SinkLocal(PageBudget(4, 7, 1, 2)),
    SnapKV(PageBudget(4, 7, 1, 2), window=3),
    LastRow(PageBudget(4, 7, 1, 2)),
    Ema(PageBudget(4, 7, 1, 2), calibrate_every=4),
    Quest(PageBudget(4, 7, 1, 2)),
    PageRange(PageBudget(4, 7, 1, 2), reach=0.3),
    KeyCodes(PageBudget(4, 7, 1, 2), queries=8),
    KeyCodes(PageBudget(3, 9, 1, 2), queries=8),
]


def axis_of_pages(name: str, x: Tensor) -> int | None:
    """Where a tensor of a state has its pages."""
    if x.dim() < 3 or name in ("order", "centre", "scale"):
        return None
    return 3 if name in ("history", "observed", "running_sum") else 2


def with_room(state: State, pages: int) -> State:
    """A state in memory of fixed room, on the device."""
    room = {}
    for name, x in state.items():
        axis = axis_of_pages(name, x)
        if axis is not None:
            shape = [*x.shape]
            shape[axis] = pages - shape[axis]
            fill = -1.0 if name == "probability" else 0.0
            x = torch.cat((x, x.new_full(shape, fill)), axis)
        room[name] = x.clone().to(DEVICE)
    return room


@pytest.mark.parametrize(
    "policy", slow_but(POLICIES, *POLICIES[:2]), ids=lambda policy: policy.kind
)
def test_steps_leave_the_same_state(policy: KVPolicy) -> None:
    """Six steps from a prompt of 60 tokens in one row and of 43 in the other, over new pages."""
    check_steps(policy, 60, 6)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_step_of_the_predictor_leaves_the_same_state(channels: int) -> None:
    """The step behind which a further page may be selected; the interpreter is slow at it."""
    policy = Predictor(PageBudget(4, 7, 1, 2), history=10, channels=channels)
    check_steps(policy.with_weights(attention_cnn.new_weights(channels, seed=3)), 63, 1, batch=1)


def check_steps(policy: KVPolicy, prompt: int, steps: int, batch: int = 2) -> None:
    assert policy.kind in kv_policy.SELECTED_BY_KERNELS
    page, room = policy.budget.page, 72
    generator = torch.Generator().manual_seed(1)
    q_all, k_all, v_all = (
        torch.randn(batch, heads, room, 40, generator=generator) for heads in (6, 2, 2)
    )
    mask = torch.ones(batch, prompt)
    mask[-1, :17] = 0
    state = policy.init(
        q_all[:, :, prompt - policy.history : prompt],
        *(x[:, :, :prompt] for x in (k_all, v_all)),
        mask,
        SCORING,
    )
    held = with_room(state, room // page)
    for t in range(prompt, prompt + steps):
        first, last = torch.tensor([0, 17])[-batch:], torch.tensor([t, t])[-batch:]
        lengths = Filled(first, last, room)
        q, k, k_new = q_all[:, :, t : t + 1], k_all[:, :, : t + 1], k_all[:, :, t : t + 1]
        expected = policy.select(state, q, k, lengths, SCORING)
        there = on_device(lengths)
        found = kv_policy.select_by_kernels(policy, held, q.to(DEVICE), there, SCORING)
        assert torch.equal(found.cpu(), expected)
        # What an attention over these pages gives: any numbers serve, -inf where none is listed.
        read = expected.expand(batch, 2, -1)
        page_max = torch.randn(batch, 6, 1, read.shape[2], generator=generator)
        page_max[(read < 0).repeat_interleave(3, 1)[:, :, None]] = float("-inf")
        lse = page_max.logsumexp(-1)
        probabilities = page_probabilities(page_max, lse, 2)[:, :, 0]
        state = policy.observe(state, expected, probabilities, k_new, lengths)
        if policy.kind in kv_policy.OBSERVED_BY_KERNELS:
            kv_policy.observe_by_kernels(
                policy, held, found, page_max.to(DEVICE), lse.to(DEVICE), k_new.to(DEVICE), there
            )
        for name, x in state.items():
            left, axis = held[name].cpu(), axis_of_pages(name, x)
            if axis is not None:
                left = left.narrow(axis, 0, x.shape[axis])
            # Averages of exponentials in fp32, of six steps.
            torch.testing.assert_close(left, x, rtol=1e-5, atol=1e-6)


def test_bounds_are_above_all_scores() -> None:
    """And those of torch: products in another order, of 40 terms each."""
    policy = Quest(PageBudget(16, 4, 1, 1))
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, heads, s, 40, generator=generator) for heads, s in ((6, 1), (2, 500)))
    state = policy.init(q, k, k, None, SCORING)
    lengths = Filled.all_of(k)
    least, largest = (state[name].to(DEVICE) for name in ("least", "largest"))
    found = kv_policy.bound_scores(q.to(DEVICE), least, largest, on_device(lengths), 16).cpu()
    scores = torch.einsum("bghd,bgtd->bght", q[:, :, 0].unflatten(1, (2, 3)), k).amax(2)
    scores = torch.nn.functional.pad(scores, (0, 12), value=float("-inf"))
    assert (found >= scores.unflatten(-1, (-1, 16)).amax(-1) - 1e-4).all()
    wide = state["least"].double(), state["largest"].double()
    q_wide = q[:, :, 0].double().unflatten(1, (2, 3))[:, :, :, None]
    bound = torch.maximum(q_wide * wide[0][:, :, None], q_wide * wide[1][:, :, None]).sum(-1)
    torch.testing.assert_close(found.double(), bound.amax(2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [(1, torch.float16), pytest.param(8, torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_bounds_of_a_long_context(groups: int, dtype: torch.dtype) -> None:
    """8,192 pages of heads of 128, in 16 bits, within the rounding of sums of 256 products."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bf16")
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(1, 4 * groups, 1, 128, generator=generator).to(dtype)
    ends = torch.randn(2, 1, groups, 8192, 128, generator=generator).to(dtype).sort(0).values
    last = torch.tensor([131071])
    lengths = on_device(Filled(torch.zeros_like(last), last, 131072))
    least, largest = (x.to(DEVICE) for x in ends)
    found = kv_policy.bound_scores(q.to(DEVICE), least, largest, lengths, 16).cpu()
    heads = q[:, :, 0].double().unflatten(1, (groups, 4))
    low, high = ends.double()
    exact = heads.clamp(min=0) @ high.mT + heads.clamp(max=0) @ low.mT
    sizes = heads.abs() @ torch.maximum(low.abs(), high.abs()).mT
    allowed = 256 * torch.finfo(torch.float32).eps * sizes.amax(2)
    assert ((found.double() - exact.amax(2)).abs() <= allowed).all()


def test_on_a_cpu_steps_are_those_of_torch() -> None:
    policy = Quest(PageBudget(4, 4, 1, 1))
    k = torch.randn(1, 2, 40, 40, dtype=torch.float64)
    q = torch.randn(1, 6, 1, 40, dtype=torch.float64)
    state, lengths = policy.init(q, k, k, None, SCORING), Filled.all_of(k)
    assert not kv_policy.runs_kernels(policy, state, lengths)
    found = kv_policy.select(policy, state, q, k, lengths, SCORING)
    assert torch.equal(found, policy.select(state, q, k, lengths, SCORING))
    page_max = torch.zeros(1, 6, 1, found.shape[2], dtype=torch.float64)
    lse = torch.ones(1, 6, 1, dtype=torch.float64)
    left = kv_policy.observe(
        policy, state, found, page_max, lse, k[:, :, -1:], lengths, in_place=False
    )
    expected = policy.observe(state, found, None, k[:, :, -1:], lengths)
    assert all(torch.equal(left[name], expected[name]) for name in expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_state_is_overwritten_only_where_it_may_be(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_policy, "runs_kernels", lambda *_: True)
    policy = LastRow(PageBudget(4, 4, 1, 1))
    k = torch.randn(1, 2, 40, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    lengths = Filled.all_of(k)
    state = policy.init(torch.ones_like(k[:, :, -1:]), k, k, None, SCORING)
    before = {name: x.clone() for name, x in state.items()}
    selected = kv_policy.select(policy, state, None, None, lengths, SCORING)
    page_max, lse = torch.zeros(1, 2, 1, 4, device=DEVICE), torch.ones(1, 2, 1, device=DEVICE)
    left = kv_policy.observe(
        policy, state, selected, page_max, lse, k[:, :, -1:], lengths, in_place=in_place
    )
    for name, x in before.items():
        assert torch.equal(state[name], x) != in_place
        assert not torch.equal(left[name], x)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.runtime.kernels import key_codes
from graphopt.runtime.kernels import kv_fetch as offload
from graphopt.runtime.kernels import kv_selection as kernels

TYPES = {"scores_ptr": "*fp32", "q_ptr": "*bf16", "k_ptr": "*bf16", "least_ptr": "*bf16",
         "largest_ptr": "*bf16", "page_max_ptr": "*fp32", "lse_ptr": "*fp32",
         "average_ptr": "*fp32", "share": "fp32"}

def compiled(kernel, constants, warps=4, **types):
    def kind(name):
        return {**TYPES, **types}.get(name, "*i64" if name.endswith("_ptr") else "i32")
    signature = {n: "constexpr" if n in constants else kind(n) for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps}
    made = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    assert made.metadata.shared <= 101376  # of a block on sm_86 and sm_89

early = {"OVERLAP": True}
own = {"PAGE": 16, "READ": 819, "SINK": 1, "LOCAL": 2, "ROWS": 64, "COLUMNS": 128, "SLOTS": 1024}
own |= early
for scores, kept, heads in ((1, 0, 0), (1, 1, 0), (0, 0, 0), (1, 0, 4)):
    given = {**own, "SCORES": scores, "KEPT": kept, "ESTIMATES": heads}
    given |= {} if scores else {"scores_ptr": None}
    given |= {} if kept else {"kept_from_ptr": None}
    compiled(kernels.select_pages, given, 16)
sizes = {"HEAD_DIM": 128, "D0": 128, **early}
for kind, block in (("*bf16", 32), ("*fp32", 16)):
    for own in ({"LOWER": 0.0, "SOFTCAP": 0.0, "ESTIMATES": False},
                {"LOWER": 0.25, "SOFTCAP": 30.0, "ESTIMATES": True}):
        compiled(kernels.bound_scores, {**sizes, **own, "GROUP": 4, "HEADS": 16, "BLOCK": block},
                 out_ptr="*fp32", least_ptr=kind, largest_ptr=kind, scale="fp32")
compiled(kernels.extend_bounds, {**sizes, "PAGE": 16}, 1)
codes = {"codes_ptr": "*u8", "centre_ptr": "*fp32", "scale_ptr": "*fp32", "scale": "fp32"}
coded = {"HEAD_DIM": 128, "C": 16, "C0": 16, "STEP4": 0.3352, "STEP2": 0.9957, **early}
for page, cap in ((4, 0.0), (16, 30.0)):
    block = {"PAGE": page, "SLOTS": page, "BLOCK": 128 // page, "D0": 128, "SOFTCAP": cap}
    compiled(key_codes.code_scores, {**coded, **block, "GROUP": 4, "HEADS": 16}, out_ptr="*fp32",
             **codes)
compiled(key_codes.extend_codes, {**coded, "PAGE": 4}, 1, **codes)
compiled(kernels.observe_average, {"GROUP": 4, "BLOCK": 256, **early})
network = {f"{part}{n}_ptr": "*fp32" for part in ("weight", "bias") for n in (1, 2, 3)}
network |= {f"{name}_ptr": "*fp32" for name in ("history", "sums", "sliding", "scores")}
network["observed_ptr"] = "*i8"
ring = {"ROWS": 64, "CHANNELS": 2}
seen = {**ring, "PAGE": 16, "SINK": 1, "LOCAL": 2}
compiled(kernels.append_row, {**ring, "GROUP": 4, "BLOCK": 1024}, **network)
compiled(kernels.last_pages, {**seen, "BLOCK": 64}, **network)
compiled(kernels.predict_row, {**seen, "BLOCK": 32}, **network)
words = {"host_ptr": "*i32", "pool_ptr": "*i32", "new_ptr": "*i32", "staged_ptr": "*i32",
         "table_ptr": "*i32", "marks_ptr": "*i8", "free_ptr": "*i32"}
compiled(offload.fetch_pages, {"WORDS": 1024, "BLOCK": 1024}, **words)
compiled(offload.plan_fetch, {"READ": 256, "LISTED": 256}, **words)
compiled(offload.append_token, {"PAGE": 16, "WORDS": 64, "BLOCK": 64, "STAGED": 1}, 1, **words)
"""


@pytest.mark.slow
def test_what_the_interpreter_takes_is_compiled() -> None:
    assert compile_alone(COMPILE.replace("ARCH", "90")) == ""
