"""Steps of KV policies on a device: by Triton kernels where there are some, else in torch.

A decoding step with a policy is `select`, attention over what it selects, and `observe`; or where a
calibration is due attention over all pages, and `calibrate`. Each is the policy's own function,
with the same results up to rounding. With `in_place` kernels write where the state lies, and give
the same tensors back: a recorded step finds them where they were. Without it they write copies, as
a cache that grows is not changed by a step.

Layout letters as in `graphopt.ir.kv_policies.pages`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.key_codes import STEP_OF_BITS
from graphopt.ir.kv_policies.pages import Filled, all_pages
from graphopt.ir.kv_policies.predictor import AVERAGE_SHARE
from graphopt.ir.kv_policies.probabilities import Scoring, page_probabilities
from graphopt.runtime.fitting_tiles import has_triton

MOST_PAGES = 65536
"""Pages of a row that one program can hold in registers."""

WARP_PAGES = 128
"""Pages that a warp reads at a time, 16 bytes of scores a thread."""

THREAD_PAGES = 16
"""Pages that a thread chooses from, where there are not too many."""

BOUND_BYTES = 16384
"""What a program of four warps reads of the least and of the largest features."""

CODED_TOKENS = 128
"""Tokens whose codes a program of four warps reads."""

EARLY_START = True
"""Whether kernels start early on a GPU that can: `tools/bench_kv_kernels.py` compares both."""

AVERAGES = ("last-row", "ema")
SCORES = {**dict.fromkeys(AVERAGES, "probability"), "snapkv": "votes", "predictor": "scores"}
"""What policies' states call the scores of pages that `select` goes by."""

BOUNDED = ("quest", "page-range")
"""Policies that remember the range of the keys of each page."""

SELECTED_BY_KERNELS = ("sink-local", *BOUNDED, "key-codes", *SCORES)
_AXIS_2 = ("least", "largest", "codes", *SCORES.values())
_AXIS_3 = ("history", "observed", "running_sum")

CALIBRATED_BY_KERNELS = (*BOUNDED, "key-codes", *AVERAGES)
OBSERVED_BY_KERNELS = (*CALIBRATED_BY_KERNELS, "predictor")
"""Policies of which `select`, `calibrate` and `observe` are kernels."""


def select(
    policy: KVPolicy,
    state: State,
    q_BH1D: Tensor | None,
    k_BGTD: Tensor | None,
    lengths: Filled,
    scoring: Scoring,
) -> Tensor:
    """As `KVPolicy.select`."""
    if policy.kind in SELECTED_BY_KERNELS and runs_kernels(policy, state, lengths):
        return select_by_kernels(policy, state, q_BH1D, lengths, scoring)
    return policy.select(state, q_BH1D, k_BGTD, lengths, scoring)


def observe(
    policy: KVPolicy,
    state: State,
    selected_BGM: Tensor,
    page_max_BH1M: Tensor,
    lse_BH1: Tensor,
    k_new_BG1D: Tensor,
    lengths: Filled,
    *,
    in_place: bool,
) -> State:
    """As `KVPolicy.observe`, given what the attention over the selected pages gives.

    Args:
        page_max_BH1M, lse_BH1: Page maxima of those pages, and the log-sum-exp.
        in_place: Whether the state may be overwritten; torch never does.
    """
    if policy.kind in OBSERVED_BY_KERNELS and runs_kernels(policy, state, lengths):
        state = state if in_place else {name: x.clone() for name, x in state.items()}
        observe_by_kernels(policy, state, selected_BGM, page_max_BH1M, lse_BH1, k_new_BG1D, lengths)
        return state
    probabilities = _probabilities(policy, page_max_BH1M, lse_BH1, k_new_BG1D)
    return policy.observe(state, selected_BGM, probabilities, k_new_BG1D, lengths)


def calibrate(
    policy: KVPolicy,
    state: State,
    page_max_BH1N: Tensor,
    lse_BH1: Tensor,
    k_new_BG1D: Tensor,
    lengths: Filled,
    *,
    in_place: bool,
) -> State:
    """As `KVPolicy.calibrate`, given page maxima of all pages and the log-sum-exp.

    Args:
        in_place: As for `observe`.
    """
    if policy.kind in CALIBRATED_BY_KERNELS and runs_kernels(policy, state, lengths):
        state = state if in_place else {name: x.clone() for name, x in state.items()}
        everything = all_pages(policy.budget.page, lengths)
        observe_by_kernels(policy, state, everything, page_max_BH1N, lse_BH1, k_new_BG1D, lengths)
        return state
    probabilities = _probabilities(policy, page_max_BH1N, lse_BH1, k_new_BG1D)
    return policy.calibrate(state, probabilities, k_new_BG1D, lengths)


def _probabilities(
    policy: KVPolicy, page_max_BH1M: Tensor, lse_BH1: Tensor, k_new_BG1D: Tensor
) -> Tensor | None:
    """Return what `observe` reads of the pages [B, G, M]; None where it reads nothing."""
    if not policy.needs_observation:
        return None
    return page_probabilities(page_max_BH1M, lse_BH1, k_new_BG1D.shape[1])[:, :, 0]


def runs_kernels(policy: KVPolicy, state: State, lengths: Filled) -> bool:
    """Return whether kernels run where a state lies, and read what it has of each page.

    That is on a GPU with Triton, with all pages in memory of fixed room, and not in fp64.
    """
    pages = lengths.pages(policy.budget.page)
    if not lengths.first_B.is_cuda or pages > MOST_PAGES or not has_triton():
        return False
    if any(x.dtype == torch.float64 for x in state.values()):
        return False
    # By the axis of pages; what has none has no page to lack.
    by_axis = {2: [x for name, x in state.items() if name in _AXIS_2],
               3: [x for name, x in state.items() if name in _AXIS_3]}  # fmt: skip
    return all(_fits(x, pages, axis) for axis, tensors in by_axis.items() for x in tensors)


def _fits(x: Tensor, pages: int, axis: int) -> bool:
    """Return whether kernels read a tensor of a state, with its pages along an axis."""
    return x.shape[axis] >= pages and x.stride(-1) == 1


def select_by_kernels(
    policy: KVPolicy, state: State, q_BH1D: Tensor | None, lengths: Filled, scoring: Scoring
) -> Tensor:
    """Return what `KVPolicy.select` does, for the policies of `SELECTED_BY_KERNELS`."""
    kept_from = state["kept_from"] if policy.kind == "snapkv" else None
    scores: Tensor | None = None
    if policy.kind in BOUNDED:
        assert q_BH1D is not None
        mixed = (policy.lower, scoring) if policy.kind == "page-range" else None  # type: ignore[attr-defined]
        bounds = state["least"], state["largest"]
        scores = bound_scores(q_BH1D, *bounds, lengths, policy.budget.page, mixed)
    elif policy.kind == "key-codes":
        assert q_BH1D is not None
        scores = code_scores(q_BH1D, state, lengths, policy.budget.page, scoring)
    elif policy.kind in SCORES:
        scores = state[SCORES[policy.kind]]
    return select_pages(scores, policy, lengths, kept_from)


def observe_by_kernels(
    policy: KVPolicy,
    state: State,
    selected_BGM: Tensor,
    page_max_BH1M: Tensor,
    lse_BH1: Tensor,
    k_new_BG1D: Tensor,
    lengths: Filled,
) -> None:
    """Do to a state what `KVPolicy.observe` does, in place, for those of `OBSERVED_BY_KERNELS`."""
    if policy.kind in AVERAGES:
        share = policy.newest_share  # type: ignore[attr-defined]
        observe_average(state, selected_BGM, page_max_BH1M, lse_BH1, share)
    elif policy.kind == "predictor":
        observe_prediction(policy, state, selected_BGM, page_max_BH1M, lse_BH1, lengths)
    elif policy.kind in BOUNDED:
        extend_bounds(state, k_new_BG1D, lengths, policy.budget.page)
    elif policy.kind == "key-codes":
        extend_codes(state, k_new_BG1D, lengths, policy.budget.page)


def select_pages(
    scores_BGN: Tensor | None,
    policy: KVPolicy,
    lengths: Filled,
    kept_from_B: Tensor | None = None,
) -> Tensor:
    """Return `graphopt.ir.kv_policies.pages.select_pages` of scores by a kernel, [B, G, M].

    Args:
        scores_BGN: fp32; without them the later of two pages is the better. Or estimates of each
            query head, [B, G, H / G, N]: then pages go by the mean of their softmax.
        kept_from_B: Slot from whose page on all pages stand above the others.
    """
    from graphopt.runtime.kernels.kv_selection import select_pages as kernel

    budget, pages = policy.budget, lengths.pages(policy.budget.page)
    batch, device = len(lengths.first_B), lengths.first_B.device
    groups = 1 if scores_BGN is None else scores_BGN.shape[1]
    selected = torch.empty(batch, groups, budget.pages, dtype=torch.int64, device=device)
    if scores_BGN is not None:
        scores_BGN = _rows(scores_BGN)
    estimates = scores_BGN.shape[2] if scores_BGN is not None and scores_BGN.dim() == 4 else 0
    block = _power_above(pages)
    columns = min(block, WARP_PAGES)
    kernel[(batch * groups,)](
        scores_BGN, kept_from_B, lengths.first_B, lengths.last_B, selected,
        *((0, 0) if scores_BGN is None else scores_BGN.stride()[:2]),
        groups, 0 if scores_BGN is None else scores_BGN.shape[-1],
        PAGE=budget.page, READ=budget.pages, SINK=budget.sink, LOCAL=budget.local,
        ROWS=block // columns, COLUMNS=columns, SLOTS=_power_above(budget.pages),
        SCORES=scores_BGN is not None, ESTIMATES=estimates, KEPT=kept_from_B is not None,
        num_warps=_warps(block), **_early(selected.device),
    )  # fmt: skip
    return selected


def bound_scores(
    q_BH1D: Tensor,
    least_BGND: Tensor,
    largest_BGND: Tensor,
    lengths: Filled,
    page: int,
    mixed: tuple[float, Scoring] | None = None,
) -> Tensor:
    """Return Quest's bound of every page, fp32 [B, G, N]: the largest over the query heads.

    Args:
        mixed: What the lower bound counts in estimates, and how scores are made; then what is
            returned is each query head's estimate, [B, G, H / G, N].
    """
    from graphopt.runtime.kernels.kv_selection import bound_scores as kernel

    batch, groups, _, width = least_BGND.shape
    pages = lengths.pages(page)
    heads = q_BH1D.shape[1] // groups
    shape = (batch, groups, pages) if mixed is None else (batch, groups, heads, pages)
    bounds = torch.empty(shape, dtype=torch.float32, device=q_BH1D.device)
    lower, scoring = mixed or (0.0, Scoring(1.0))
    q, least, largest = (_rows(x) for x in (q_BH1D, least_BGND, largest_BGND))
    # Matrix units take 16 rows or more.
    padded = max(16, _power_above(width))
    size = max(q.element_size(), least.element_size())
    block = max(16, min(128, BOUND_BYTES // (padded * size)))
    kernel[(batch * groups, -(-pages // block))](
        q, least, largest, bounds, scoring.scale,
        *q.stride()[:2], *least.stride()[:3], *largest.stride()[:3], groups, pages,
        HEAD_DIM=width, D0=padded, GROUP=heads, HEADS=max(16, _power_above(heads)), BLOCK=block,
        LOWER=lower, SOFTCAP=scoring.softcap or 0.0, ESTIMATES=mixed is not None,
        num_warps=4, **_early(q.device),
    )  # fmt: skip
    return bounds


def extend_bounds(state: State, k_new_BG1D: Tensor, lengths: Filled, page: int) -> None:
    """Take a new key into the bounds of its page, in place."""
    from graphopt.runtime.kernels.kv_selection import extend_bounds as kernel

    k, least, largest = _rows(k_new_BG1D), state["least"], state["largest"]
    batch, groups, _, width = k.shape
    kernel[(batch * groups,)](
        k, least, largest, lengths.first_B, lengths.last_B,
        *k.stride()[:2], *least.stride()[:3], *largest.stride()[:3], groups,
        PAGE=page, HEAD_DIM=width, D0=_power_above(width), num_warps=1, **_early(k.device),
    )  # fmt: skip


def code_scores(
    q_BH1D: Tensor, state: State, lengths: Filled, page: int, scoring: Scoring
) -> Tensor:
    """Return each query head's log-sum-exp of the scores by codes, fp32 [B, G, H / G, N]."""
    from graphopt.runtime.kernels.key_codes import code_scores as kernel

    q, codes = _rows(q_BH1D), state["codes"]
    batch, groups = codes.shape[:2]
    pages, heads, width = lengths.pages(page), q.shape[1] // groups, state["scale"].shape[2]
    found = torch.empty(batch, groups, heads, pages, dtype=torch.float32, device=q.device)
    slots = _power_above(page)
    block = max(1, CODED_TOKENS // slots)
    kernel[(batch * groups, -(-pages // block))](
        q, codes, *(state[name] for name in ("order", "centre", "scale")),
        lengths.first_B, lengths.last_B, found, scoring.scale,
        *q.stride()[:2], *codes.stride()[:3], groups, pages,
        PAGE=page, SLOTS=slots, BLOCK=block, HEAD_DIM=q.shape[3], D0=_power_above(q.shape[3]),
        C=width // 8, C0=max(16, _power_above(width // 8)), **_code_steps(), GROUP=heads,
        HEADS=max(16, _power_above(heads)), SOFTCAP=scoring.softcap or 0.0,
        num_warps=4, **_early(q.device),
    )  # fmt: skip
    return found


def extend_codes(state: State, k_new_BG1D: Tensor, lengths: Filled, page: int) -> None:
    """Write the code of a new key, in place."""
    from graphopt.runtime.kernels.key_codes import extend_codes as kernel

    k, codes, width = _rows(k_new_BG1D), state["codes"], state["scale"].shape[2]
    batch, groups = codes.shape[:2]
    kernel[(batch * groups,)](
        k, codes, *(state[name] for name in ("order", "centre", "scale")), lengths.last_B,
        *k.stride()[:2], *codes.stride()[:3], groups,
        PAGE=page, HEAD_DIM=k.shape[3], C=width // 8, C0=_power_above(width // 8),
        **_code_steps(), num_warps=1, **_early(k.device),
    )  # fmt: skip


def _code_steps() -> dict[str, float]:
    return {f"STEP{bits}": step for bits, step in STEP_OF_BITS.items()}


def observe_average(
    state: State, selected_BGM: Tensor, page_max_BH1M: Tensor, lse_BH1: Tensor, share: float
) -> None:
    """Take the probabilities of the pages that were read into their averages, in place."""
    from graphopt.runtime.kernels.kv_selection import observe_average as kernel

    average = state["probability"]
    batch, groups = average.shape[:2]
    read = page_max_BH1M.shape[3]
    selected = _rows(selected_BGM.expand(batch, groups, -1))
    block = min(256, max(16, _power_above(read)))
    kernel[(batch * groups, -(-read // block))](
        selected, page_max_BH1M.contiguous(), lse_BH1.contiguous(), average, state["steps"],
        *selected.stride()[:2], *average.stride()[:2], groups, read, share,
        GROUP=page_max_BH1M.shape[1] // groups, BLOCK=block, num_warps=4,
        **_early(average.device),
    )  # fmt: skip


def observe_prediction(
    policy: KVPolicy,
    state: State,
    selected_BGM: Tensor,
    page_max_BH1M: Tensor,
    lse_BH1: Tensor,
    lengths: Filled,
) -> None:
    """Take a row into the learned predictor's ring and predict the next one, in place."""
    from graphopt.runtime.kernels.kv_selection import append_row, last_pages, predict_row

    history, sliding, scores = state["history"], state["running_sum"], state["scores"]
    batch, groups, rows = history.shape[:3]
    budget, pages, read = policy.budget, lengths.pages(policy.budget.page), page_max_BH1M.shape[3]
    channels = 2 if "observed" in state else 1
    # Bytes, of which 1 is true.
    observed = state["observed"].view(torch.int8) if channels == 2 else None
    ring = *history.stride()[:3], *((0, 0, 0) if observed is None else observed.stride()[:3])
    selected = _rows(selected_BGM.expand(batch, groups, -1))
    append_row[(batch * groups,)](
        selected, page_max_BH1M.contiguous(), lse_BH1.contiguous(), history, observed,
        state["steps"], *selected.stride()[:2], *ring, groups, pages, read, AVERAGE_SHARE,
        ROWS=rows, GROUP=page_max_BH1M.shape[1] // groups, BLOCK=1024, CHANNELS=channels,
        num_warps=4,
    )  # fmt: skip
    state["steps"] += 1
    weights = policy.weights  # type: ignore[attr-defined]
    layers = [
        weights[f"conv{n}.{part}"].float().contiguous()
        for n in (1, 2, 3)
        for part in ("weight", "bias")
    ]
    sums = torch.empty(batch, groups, 3, sliding.shape[2], device=sliding.device)
    seen = {"ROWS": rows, "PAGE": budget.page, "SINK": budget.sink, "LOCAL": budget.local,
            "CHANNELS": channels, "num_warps": 4}  # fmt: skip
    place = history, observed, state["steps"], lengths.first_B, lengths.last_B
    last_pages[(batch * groups, 3)](
        *place, *layers[:4], sums, *ring, groups, BLOCK=max(16, _power_above(rows)), **seen
    )
    block = 32
    predict_row[(batch * groups, -(-pages // block))](
        *place, *layers, sums, sliding, scores, *ring, *sliding.stride()[:3],
        *scores.stride()[:2], groups, pages, BLOCK=block, **seen,
    )  # fmt: skip


def _early(device: torch.device) -> dict[str, bool]:
    """Return options of a launch: whether a kernel starts before the one in front has ended.

    From Hopper on a GPU does that (programmatic dependent launch); the kernels wait inside.
    """
    if EARLY_START and device.type == "cuda" and _launches_early(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@functools.cache
def _launches_early(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _rows(x: Tensor) -> Tensor:
    """Return the tensor, or a copy whose last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_above(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (max(size, 1) - 1).bit_length()


def _warps(block: int) -> int:
    """Return how many warps hold so many pages, at most 32."""
    return min(32, max(1, block // (32 * THREAD_PAGES)))
