"""Measure decoding over pages that a KV policy selects, on this GPU, beside dense attention.

    python tools/bench_kv_kernels.py --out benchmarks/kv_kernels.json

Random tensors of one text's shape: 32 query heads over 8 key heads of 128, 131,072 keys. Steps are
recorded as CUDA graphs; what is compared is measured in turns. Each step reads another of several
caches and lists of pages, which together are larger than what stays on the chip. Everything that
is measured is compared with torch first; the run ends with exit status 1 where one is off.

`decode` measures attention over selected pages, `selection` whole steps of policies, and their
parts. `tools/tune_kv_kernels.py` compares tiles.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.ir.kv_policies import (
    POLICIES,
    Filled,
    KeyCodes,
    KVHeads,
    KVPolicy,
    PageBudget,
    PageRange,
    Scoring,
    State,
    page_probabilities,
    select_pages,
)
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.runtime import kv_policy
from graphopt.runtime.attention import Keys
from graphopt.support.recorded import record
from graphopt.targets import Target, get_target

HEADS, GROUPS, WIDTH = 32, 8, 128
KEYS, SHARE = 131072, 10  # a tenth of the pages
PAGES = (16, 32, 64)
CACHES, LISTS = 3, 4
ROUNDS, REPLAYS = 15, 4
DEVICE = "cuda"
BF16 = 2.0**-8
"""Unit roundoff."""

PACKAGES = ("torch", "triton")
Run = Callable[[], Any]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def recorded(steps: list[Run]) -> Run:
    """Return the replay of one CUDA graph of several steps."""

    def all_of_them() -> None:
        for step in steps:
            step()

    return record(all_of_them)[0].replay


def microseconds(runs: Mapping[str, tuple[Run, int]], rounds: int) -> dict[str, list[float]]:
    """Return the times of a step of every run, taken in turns.

    Args:
        runs: What replays a graph, and how many steps it has.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, (replay, steps) in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()
            start.record()
            for _ in range(REPLAYS):
                replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(1000 * start.elapsed_time(end) / (REPLAYS * steps))
    return times


# Operands -----------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """One step's operands: queries, several caches as pages, and lists of pages to read."""

    page: int
    q: Tensor
    caches: list[Keys]
    lists: list[Tensor]

    @classmethod
    def random(cls, keys: int, page: int, share: int) -> Decoding:
        """Return random operands of so many keys, of which a step reads one page in `share`."""
        pages = keys // page
        caches = []
        for _ in range(CACHES):
            # As a decoder lays them out; of one text the order of the pool is that of the text.
            table = torch.arange(pages, dtype=torch.int32, device=DEVICE)[None]
            k, v = (random(pages, GROUPS, page, WIDTH) for _ in range(2))
            lens = torch.full((1,), keys, dtype=torch.int32, device=DEVICE)
            caches.append(Keys(k, v, kv_lens=lens, block_table=table))
        return cls(page, random(1, HEADS, 1, WIDTH), caches, [
            random_pages(pages, pages // share) for _ in range(LISTS)
        ])  # fmt: skip

    def contiguous(self, cache: Keys) -> tuple[Tensor, Tensor]:
        """Return keys and values [1, G, T, D]."""
        return tuple(x.transpose(0, 1).reshape(1, GROUPS, -1, WIDTH) for x in (cache.k, cache.v))  # type: ignore[return-value]

    def steps(self, attend: Callable[[Keys], Any], *, selected: bool) -> list[Run]:
        """Return a step for every cache, and where pages are selected for every list of each."""
        return [
            functools.partial(attend, replace(cache, selected_blocks=pages))
            for pages in (self.lists if selected else [None])
            for cache in self.caches
        ]


def random_pages(pages: int, read: int) -> Tensor:
    """Return int64 [1, G, read]: the first page, the last two, and random others, ascending."""
    rows = []
    for _ in range(GROUPS):
        others = torch.randperm(pages - 3, device=DEVICE)[: read - 3] + 1
        ends = torch.tensor([0, pages - 2, pages - 1], device=DEVICE)
        rows.append(torch.cat((others, ends)).sort().values)
    return torch.stack(rows)[None]


def paged_spec(page: int, *, selected: bool) -> AttentionSpec:
    return AttentionSpec(
        head_dim=WIDTH, heads=HEADS, kv_heads=GROUPS, dtype="bf16", phase="decode", kv="paged",
        page=page, kv_lens=True, selected_blocks=selected, lse=selected, page_max=selected,
    )  # fmt: skip


def attention(plan: AttentionPlan, q: Tensor) -> Callable[[Keys], Any]:
    run = get_family(plan.kernel).load(plan)
    return lambda keys: run(q, keys, scale=WIDTH**-0.5)


# Comparing ----------------------------------------------------------------------------------------


def over_allowed(operands: Decoding, plan: AttentionPlan) -> dict[str, float]:
    """Return the largest error of each result over what is allowed; above 1 it is wrong.

    Weights and the output are rounded to bf16: 2 u sum p |v|. A score is a sum of D products in
    fp32, whose error is below D roundings of sum |q k|.
    """
    cache, pages = operands.caches[-1], operands.lists[-1]
    keys = replace(cache, selected_blocks=pages)
    out, lse, page_max = attention(plan, operands.q)(keys)
    heads = torch.arange(GROUPS, device=DEVICE)[:, None]
    k, v = (x[pages[0], heads].double() for x in (cache.k, cache.v))  # [G, M, page, D]
    q = operands.q.double().view(GROUPS, HEADS // GROUPS, WIDTH)
    scores = torch.einsum("ghd,gmpd->ghmp", q, k) * WIDTH**-0.5
    sizes = torch.einsum("ghd,gmpd->ghmp", q.abs(), k.abs()).amax() * WIDTH**-0.5
    exact_lse = scores.flatten(2).logsumexp(-1)
    p = (scores - exact_lse[..., None, None]).exp()
    exact, mass = (torch.einsum("ghmp,gmpd->ghd", p, x) for x in (v, v.abs()))
    rounding = WIDTH * torch.finfo(torch.float32).eps * float(sizes)

    def worst(found: Tensor, expected: Tensor, allowed: Tensor | float) -> float:
        return float(((found.double().view(expected.shape) - expected).abs() / allowed).max())

    return {
        "out": worst(out, exact, 2 * BF16 * mass + 1e-9),
        "lse": worst(lse, exact_lse, rounding),
        "page_max": worst(page_max, scores.amax(-1), rounding),
    }


# Decode -------------------------------------------------------------------------------------------


def peer(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Run:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def dense_steps(operands: Decoding, machine: Target) -> dict[str, list[Run]]:
    """Return steps that read all keys: by our kernels, of two layouts, and by torch's."""
    q = operands.q
    caches = [operands.contiguous(cache) for cache in operands.caches]
    spec = AttentionSpec(head_dim=WIDTH, heads=HEADS, kv_heads=GROUPS, dtype="bf16", phase="decode")
    ours = attention(plan_attention(spec, machine), q)
    paged = attention(plan_attention(paged_spec(operands.page, selected=False), machine), q)
    return {
        "dense": [functools.partial(ours, Keys(k, v)) for k, v in caches],
        "dense FA2": [peer(SDPBackend.FLASH_ATTENTION, q, k, v) for k, v in caches],
        "dense cuDNN": [peer(SDPBackend.CUDNN_ATTENTION, q, k, v) for k, v in caches],
        "dense paged": operands.steps(paged, selected=False),
    }


def measured(steps: Mapping[str, list[Run]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the median time of a step of each, in microseconds, and all of them."""
    times = microseconds({name: (recorded(own), len(own)) for name, own in steps.items()}, ROUNDS)
    return {name: statistics.median(own) for name, own in times.items()}, times


def best_dense(medians: Mapping[str, float]) -> float:
    return min(time for name, time in medians.items() if name.startswith("dense"))


def bench_decode(target: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each size of a page: dense kernels, and the one over selected pages."""
    machine = get_target(target)
    for page in PAGES:
        operands = Decoding.random(KEYS, page, SHARE)
        plan = plan_attention(paged_spec(page, selected=True), machine)
        errors = over_allowed(operands, plan)
        steps = dense_steps(operands, machine)
        steps["selected"] = operands.steps(attention(plan, operands.q), selected=True)
        medians, times = measured(steps)
        read = operands.lists[0].shape[2] * page
        yield {
            "page": page, "keys": KEYS, "keys_read": read, "tiles": plan.tiles,
            "bytes_read": 4 * GROUPS * read * WIDTH,
            "microseconds": medians, "all_microseconds": times,
            "times_faster": {"selected": best_dense(medians) / medians["selected"]},
            "error_over_allowed": {"selected": errors},
        }  # fmt: skip


# Selection ----------------------------------------------------------------------------------------


@dataclass
class PolicyStep:
    """A step of a policy over one cache: `select`, attention and `observe`."""

    policy: KVPolicy
    attend: Callable[[Keys], Any]
    q: Tensor
    k_new: Tensor
    cache: Keys
    state: State
    lengths: Filled

    @classmethod
    def random(
        cls, policy: KVPolicy, attend: Callable[[Keys], Any], q: Tensor, cache: Keys
    ) -> PolicyStep:
        """Return a step after a random state of all pages; bounds are those of the cache's keys."""
        assert cache.block_table is not None
        pages = cache.block_table.shape[1]
        heads = KVHeads(GROUPS, HEADS, WIDTH, WIDTH, torch.bfloat16)
        state = {}
        for name, (shape, dtype) in policy.state_types(heads, pages, 1).items():
            whole = dtype == torch.int64
            drawn = torch.zeros(shape) if whole else torch.rand(shape)
            state[name] = drawn.to(DEVICE, dtype)
        if policy.kind in kv_policy.BOUNDED:
            bounds = cache.k.amin(2), cache.k.amax(2)  # [pages, G, D]
            least, largest = (x.transpose(0, 1)[None].contiguous() for x in bounds)
            state |= {"least": least, "largest": largest}
        last = torch.tensor([pages * policy.budget.page - 1], device=DEVICE)
        lengths = Filled(torch.zeros_like(last), last, pages * policy.budget.page)
        return cls(policy, attend, q, random(1, GROUPS, 1, WIDTH), cache, state, lengths)

    def select(self) -> Tensor:
        return kv_policy.select(self.policy, self.state, self.q, None, self.lengths, SCORING)

    def observe(self, selected: Tensor, page_max: Tensor, lse: Tensor) -> State:
        return kv_policy.observe(
            self.policy, self.state, selected, page_max, lse, self.k_new, self.lengths,
            in_place=True,
        )  # fmt: skip

    def part(self, name: str) -> Run:
        """Return one of the three parts of a step, on what the others gave."""
        listed = self.select().expand(1, GROUPS, -1)
        keys = replace(self.cache, selected_blocks=listed)
        _, lse, page_max = self.attend(keys)
        return {
            "select": self.select,
            "attend": lambda: self.attend(keys),
            "observe": lambda: self.observe(listed, page_max, lse),
        }[name]

    def whole(self) -> None:
        selected = self.select()
        listed = selected.expand(1, GROUPS, -1)
        _, lse, page_max = self.attend(replace(self.cache, selected_blocks=listed))
        self.observe(selected, page_max, lse)

    def _share_missed(self, selected: Tensor) -> float:
        """Return how much less the pages hold than the best by the estimated shares, at most."""
        policy = self.policy
        assert isinstance(policy, PageRange | KeyCodes)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in self.state.items()}
        shares = policy.shares(wide, self.q.double(), self.lengths, SCORING)
        best = select_pages(shares, policy.budget, self.lengths)
        return float((shares.gather(-1, best).sum(-1) - shares.gather(-1, selected).sum(-1)).max())

    def over_allowed(self) -> dict[str, float]:
        """Return how far results are from those of torch over what is allowed."""
        selected = self.select()
        off = {}
        if self.policy.kind == "quest":
            least, largest = self.state["least"], self.state["largest"]
            page = self.policy.budget.page
            bound = kv_policy.bound_scores(self.q, least, largest, self.lengths, page)
            q = self.q[:, :, 0].double().unflatten(1, (GROUPS, -1))
            exact = q.clamp(min=0) @ largest.double().mT + q.clamp(max=0) @ least.double().mT
            sizes = q.abs() @ torch.maximum(least.abs(), largest.abs()).double().mT
            rounding = WIDTH * torch.finfo(torch.float32).eps * float(sizes.amax())
            off["bound"] = float((bound.double() - exact.amax(2)).abs().max()) / rounding
            expected = select_pages(bound, self.policy.budget, self.lengths)
        elif self.policy.kind in ("page-range", "key-codes"):
            # Sums of rounded products: of pages of nearly one share either is right.
            off["share"] = self._share_missed(selected) / 1e-3
            expected = selected
        else:
            expected = self.policy.select(self.state, self.q, None, self.lengths, SCORING)
        off["selected"] = 0.0 if torch.equal(selected, expected) else float("inf")
        listed = selected.expand(1, GROUPS, -1)
        _, lse, page_max = self.attend(replace(self.cache, selected_blocks=listed))
        probabilities = page_probabilities(page_max, lse, GROUPS)[:, :, 0]
        wanted = self.policy.observe(
            {name: x.clone() for name, x in self.state.items()},
            selected, probabilities, self.k_new, self.lengths,
        )  # fmt: skip
        left = self.observe(selected, page_max, lse)
        for name, x in wanted.items():
            off[name] = float((left[name].double() - x.double()).abs().max()) / 1e-5
        return off


SCORING = Scoring(WIDTH**-0.5)
PARTS = ("select", "attend", "observe")


def selecting(kind: str, page: int, pages: int) -> KVPolicy:
    """Return a policy by name that reads so many pages, one of them sink and two local."""
    return POLICIES[kind](PageBudget(page, pages, 1, 2))


def policy_steps(policy: KVPolicy, operands: Decoding, machine: Target) -> list[PolicyStep]:
    attend = attention(
        plan_attention(paged_spec(operands.page, selected=True), machine), operands.q
    )
    return [PolicyStep.random(policy, attend, operands.q, cache) for cache in operands.caches]


def bench_selection(target: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each size of a page and policy: its step, and the parts of it."""
    machine = get_target(target)
    for page in PAGES:
        operands = Decoding.random(KEYS, page, SHARE)
        dense = dense_steps(operands, machine)
        for kind in ("ema", *kv_policy.BOUNDED):
            policy = selecting(kind, page, KEYS // page // SHARE)
            own = policy_steps(policy, operands, machine)
            errors = {kind: own[-1].over_allowed()}
            steps = {**dense, **{part: [step.part(part) for step in own] for part in PARTS}}
            steps["step"] = [step.whole for step in own]
            medians, times = measured(steps)
            yield {
                "policy": kind, "page": page, "keys": KEYS, "keys_read": policy.budget.tokens,
                "microseconds": medians, "all_microseconds": times,
                "times_faster": best_dense(medians) / medians["step"],
                "error_over_allowed": errors,
            }  # fmt: skip


Sections = Mapping[str, Callable[[], Iterator[dict[str, Any]]]]
"""What yields the rows of a part of the results, by its name."""


def measure(sections: Sections, only: str, out: Path) -> None:
    """Measure sections and write what they yield, as soon as it is there.

    Args:
        only: Names of sections, by commas.

    Raises:
        SystemExit: A result is farther off than it may be.
    """
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "command": f"python tools/{Path(sys.argv[0]).name} " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    wrong = 0.0
    for name in only.split(","):
        result[name] = []
        for row in sections[name]():
            result[name].append(row)
            shown = {key: value for key, value in row.items() if key != "all_microseconds"}
            print(name, json.dumps(shown), flush=True)
            errors = [e for own in row["error_over_allowed"].values() for e in own.values()]
            wrong = max([wrong, *errors])
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not wrong <= 1:
        sys.exit(f"a result is {wrong:.1f} times as far off as it may be")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kv_kernels.json"))
    parser.add_argument("--target", default="hopper")
    parser.add_argument("--only", default="decode,selection")
    args = parser.parse_args()
    sections = {
        "decode": lambda: bench_decode(args.target),
        "selection": lambda: bench_selection(args.target),
    }
    measure(sections, args.only, args.out)


if __name__ == "__main__":
    main()
