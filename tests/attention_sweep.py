"""Attentions drawn at random, with their operands."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_reference import Case

from graphopt.errors import UsageError
from graphopt.lowering.kernels import plan_attention
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.runtime.attention import Extras, Keys
from graphopt.targets import all_targets, get_target

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
HEAD_SIZES = tuple(range(32, 257, 8))
PAGES = (16, 24, 32, 48, 64, 128)
# Every kernel of every target.
KERNELS = tuple(
    (target.name, kernel) for target in all_targets().values() for kernel in target.kernels
)
# How a tensor [B, heads, tokens, D] lies: as its shape says; with the heads of a token side by
# side; with rows of NaN in front and behind; with rows that begin anywhere.
LAYOUTS = ("BHSD", "BSHD", "framed", "unaligned")
# The longest sequence and the most scores of what is slow.
SHORT, FEW_SCORES = 96, 2**17


@dataclass(frozen=True)
class Drawn:
    """One description and the operands that go with it.

    Attributes:
        fields: Of AttentionSpec.
        batch, queries, keys: B, S, T; with varlen as many sequences of up to that many tokens.
        seed: Of the operands.
        spread: How far scores are from each other, as a factor of D^-0.5.
    """

    target: str
    kernel: str
    fields: dict[str, Any]
    batch: int
    queries: int
    keys: int
    seed: int
    layout: str = "BHSD"
    spread: float = 1.0

    def spec(self) -> AttentionSpec:
        return AttentionSpec(**self.fields)

    def plan(self) -> AttentionPlan:
        """Return the plan of this kernel, not of the first that can.

        Raises:
            LoweringError: It refuses the description.
        """
        target = dataclasses.replace(get_target(self.target), kernels=(self.kernel,))
        return plan_attention(self.spec(), target)


def _fields(rng: Any, kernel: str) -> dict[str, Any]:
    """Return fields that the docs promise of a kernel."""

    def perhaps(chance: float) -> bool:
        return bool(rng.random() < chance)

    heads, group = rng.randint(1, 4), rng.randint(1, 16)
    step = 16 if kernel == "hopper-cuda" else 8
    sizes = [size for size in HEAD_SIZES if size % step == 0]
    size = rng.choice(sizes)
    found: dict[str, Any] = {
        "head_dim": size, "value_dim": size if perhaps(0.7) else rng.choice(sizes),
        "heads": heads * group, "kv_heads": heads,
        "dtype": "f16" if kernel == "volta-cuda" else rng.choice(sorted(DTYPES)),
        "phase": "prefill" if kernel == "hopper-cuda" or perhaps(0.65) else "decode",
        "causal": perhaps(0.75), "lse": perhaps(0.5), "sinks": perhaps(0.25),
        "align": "top-left" if perhaps(0.1) else "bottom-right",
        "softcap": rng.choice([1.0, 5.0, 20.0, 50.0]) if perhaps(0.25) else None,
        "window": int(2 ** rng.uniform(0, 11)) if perhaps(0.3) else None,
    }  # fmt: skip
    if kernel in ("hopper-cuda", "triton", "volta-cuda") and found["phase"] == "prefill":
        found["varlen"] = perhaps(0.12)
    if found.get("varlen"):
        return found
    found["kv_lens"] = perhaps(0.3)
    if kernel != "hopper-cuda":
        found["padding_mask"] = perhaps(0.25)
    if kernel in ("triton", "volta-cuda"):
        found |= {"bias": perhaps(0.25), "alibi": perhaps(0.25)}
        found["chunk"] = int(2 ** rng.uniform(3, 9)) if perhaps(0.12) else None
        found["kv"] = rng.choices(("contiguous", "ring", "paged"), (6, 1, 3))[0]
        if found["kv"] == "paged":
            found["page"] = rng.choice(PAGES)
            if kernel == "triton":
                found["selected_blocks"] = perhaps(0.5)
                found["page_max"] = found["page"] & (found["page"] - 1) == 0 and perhaps(0.5)
    return found


def draw(rng: Any, target: str, kernel: str, longest: int = 4096, scores: int = 2**26) -> Drawn:
    """Return a random description that the docs promise.

    Args:
        rng: A `random.Random`.
        longest: Tokens of a sequence.
        scores: At most so many in all; heads, rows and tokens are fewer where they would be more.
    """
    while True:
        fields = _fields(rng, kernel)
        batch = rng.randint(1, 5)
        keys = int(2 ** rng.uniform(0, math.log2(longest)))
        queries = keys
        if fields["phase"] == "decode":
            queries = rng.choice((1, 1, 1, 2, 5, 16))
        elif rng.random() < 0.5:
            queries = int(2 ** rng.uniform(0, math.log2(longest)))
        page = fields.get("page")
        if page:
            keys = max(1, keys // page) * page
        if batch * fields["heads"] * queries * keys > scores:
            continue
        layout = rng.choices(LAYOUTS, (4, 4, 3, 1))[0]
        spread = rng.choice((1.0, 1.0, 3.0))
        seed = rng.randrange(2**31)
        try:
            AttentionSpec(**fields)
        except UsageError:
            continue
        return Drawn(target, kernel, fields, batch, queries, keys, seed, layout, spread)


def kernel_is_interpreted(kernel: str) -> bool:
    """Return whether a kernel runs by Triton's interpreter on this machine."""
    return kernel == "ascend-triton" or (kernel == "triton" and not torch.cuda.is_available())


def number(seed: int, index: int, kinds: Sequence[tuple[str, str]], short: bool = False) -> Drawn:
    """Return description number `index` of a seed; kernels take turns.

    What is interpreted is short, and in f16: the interpreter multiplies bf16 as if it were
    integers.

    Args:
        kinds: Targets and kernels.
        short: For what else is slow.
    """
    interpreted = kernel_is_interpreted(kinds[index % len(kinds)][1])
    target, kernel = kinds[index % len(kinds)]
    rng = random.Random(f"{seed}.{index}")
    if short or interpreted:
        drawn = draw(rng, target, kernel, SHORT, FEW_SCORES)
        small = {**drawn.fields, "kv_heads": 1, "heads": drawn.fields["heads"]}
        small["heads"] //= drawn.fields["kv_heads"]
        if interpreted:
            small["dtype"] = "f16"
        return dataclasses.replace(drawn, fields=small, batch=min(drawn.batch, 2))
    return draw(rng, target, kernel)


@dataclass
class Problem:
    """Operands as a kernel takes them, and the exact attention of every sequence.

    Attributes:
        parts: A case of one row of the batch, and where its output lies: the row, the first
            query and the one behind the last.
        lists: int [B, G, M], the pages that are read, where maxima are asked for.
    """

    q: torch.Tensor
    keys: Keys
    extras: Extras
    scale: float
    parts: list[tuple[Case, int, int, int]]
    lists: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ring: int = 0


def problem(drawn: Drawn, device: str) -> Problem:
    """Return the operands of a description."""
    return _Maker(drawn, device).make()


class _Maker:
    def __init__(self, drawn: Drawn, device: str) -> None:
        self.drawn, self.device, self.spec = drawn, device, drawn.spec()
        self.dtype = DTYPES[self.spec.dtype]
        self.generator = torch.Generator(device=device).manual_seed(drawn.seed)
        self.scale = drawn.spread * self.spec.head_dim**-0.5
        # Where a kernel may read what is not there, it would show. The copy engine reads it.
        self.poison = 0.5 if drawn.kernel == "hopper-cuda" else float("nan")

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Return numbers from low to high, both included."""
        return torch.randint(
            low, high + 1, shape, generator=self.generator, device=self.device
        )  # fmt: skip

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, heads, tokens, D] as the description lays it out."""
        batch, heads, tokens, width = x.shape
        if self.drawn.layout == "BSHD":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.drawn.layout == "framed":
            shape = (batch, heads, tokens + 16, width)
            frame = torch.full(shape, self.poison, dtype=x.dtype, device=x.device)
            return frame[:, :, 8:-8].copy_(x)
        if self.drawn.layout == "unaligned":
            wide = torch.zeros(batch, heads, tokens, width + 1, dtype=x.dtype, device=x.device)
            return wide[..., 1:].copy_(x)
        return x

    def make(self) -> Problem:
        return self.varlen() if self.spec.varlen else self.rows()

    def varlen(self) -> Problem:
        drawn, spec = self.drawn, self.spec
        counts = self.integers(1, drawn.queries, drawn.batch).tolist()
        held = self.integers(1, drawn.keys, drawn.batch).tolist()
        ends = [torch.tensor([0, *n], device=self.device).cumsum(0).int() for n in (counts, held)]
        q = self.random(1, spec.heads, sum(counts), spec.head_dim).to(self.dtype)
        k = self.random(1, spec.kv_heads, sum(held), spec.head_dim).to(self.dtype)
        v = self.random(1, spec.kv_heads, sum(held), spec.values).to(self.dtype)
        sinks = self.random(spec.heads) if spec.sinks else None
        parts = []
        for b in range(drawn.batch):
            s, e = int(ends[0][b]), int(ends[0][b + 1])
            t, u = int(ends[1][b]), int(ends[1][b + 1])
            case = Case(q[:, :, s:e], k[:, :, t:u], v[:, :, t:u], drawn.fields, self.scale)
            case.sinks = sinks
            parts.append((case, 0, s, e))
        keys = Keys(self.laid_out(k), self.laid_out(v), cu_seqlens=ends[1])
        options = {"cu_seqlens_q": ends[0], "max_seqlen_q": max(counts)}
        extras = Extras(sinks=sinks)
        return Problem(self.laid_out(q), keys, extras, self.scale, parts, None, options)

    def rows(self) -> Problem:
        drawn, spec = self.drawn, self.spec
        batch, count = drawn.batch, drawn.keys
        q = self.random(batch, spec.heads, drawn.queries, spec.head_dim).to(self.dtype)
        k = self.random(batch, spec.kv_heads, count, spec.head_dim).to(self.dtype)
        v = self.random(batch, spec.kv_heads, count, spec.values).to(self.dtype)
        lengths = mask = bias = slopes = None
        if spec.kv_lens:
            lengths = self.integers(1, count, batch).int()
            lengths[0] = count
            behind = torch.arange(count, device=self.device)[None] >= lengths[:, None]
        if spec.padding_mask:
            mask = (self.random(batch, count) > -1.0).to(torch.int8)
            if batch > 1:
                mask[-1, : count // 3] = 0
        if spec.bias:
            shapes = ((batch, spec.heads), (batch, 1), (1, 1))
            rows, heads = shapes[drawn.seed % 3]
            bias = self.random(rows, heads, drawn.queries, count)
            bias = bias.masked_fill(self.random(*bias.shape) > 1.5, float("-inf")).to(self.dtype)
        if spec.alibi:
            slopes = torch.rand(spec.heads, generator=self.generator, device=self.device) * 0.1
        sinks = self.random(spec.heads) if spec.sinks else None
        lists, picked = self.lists() if spec.kv == "paged" else (None, None)
        parts = []
        for b in range(batch):
            one = slice(b, b + 1)
            case = Case(
                q[one], k[one], v[one], drawn.fields, self.scale, slopes=slopes, sinks=sinks
            )
            case.mask = None if mask is None else mask[one].float()
            case.bias = None if bias is None else bias.expand(batch, -1, -1, -1)[one].float()
            case.kv_lens = None if lengths is None else lengths[one]
            case.picked = None if picked is None else picked[one]
            parts.append((case, b, 0, drawn.queries))
        held = [x.clone() for x in (k, v)]
        if spec.kv_lens:
            held = [x.masked_fill(behind[:, None, :, None], self.poison) for x in held]
        extras = Extras(mask, bias, slopes, None, sinks)
        keys, ring = self.held(*held, lengths, lists if spec.selected_blocks else None)
        wanted = lists if spec.page_max else None
        return Problem(self.laid_out(q), keys, extras, self.scale, parts, wanted, {}, ring)

    def lists(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the pages that are read, [B, G, M], and bool [B, G, T], which keys are in them."""
        batch, count, page = self.drawn.batch, self.drawn.keys, self.spec.page
        groups = self.spec.kv_heads
        assert page is not None
        pages = count // page
        if not self.spec.selected_blocks:
            return torch.arange(pages, device=self.device).expand(batch, groups, pages), None
        width = int(self.integers(1, pages, 1))
        lists = torch.full((batch, groups, width), -1, device=self.device)
        picked = torch.zeros(batch, groups, count, dtype=torch.bool, device=self.device)
        for row in itertools.product(range(batch), range(groups)):
            some = torch.randperm(pages, generator=self.generator, device=self.device)
            some = some[: width if row[0] == 0 else int(self.integers(1, width, 1))]
            lists[row][: len(some)] = some
            inside = torch.isin(torch.arange(pages, device=self.device), some)
            picked[row] = inside.repeat_interleave(page)
        return lists, picked

    def held(self, k: torch.Tensor, v: torch.Tensor, lengths: Any, lists: Any) -> tuple[Keys, int]:
        """Return the keys as the cache of the description holds them, and the ring's slots."""
        batch, _, count, _ = k.shape
        if self.spec.kv == "contiguous":
            return Keys(self.laid_out(k), self.laid_out(v), kv_lens=lengths), 0
        if self.spec.kv == "ring":
            first = self.integers(0, count - 1, batch)
            slots = (torch.arange(count, device=self.device)[None] + first[:, None]) % count
            index = slots[:, None, :, None]
            k, v = (torch.zeros_like(x).scatter(2, index.expand_as(x), x) for x in (k, v))
            return Keys(
                self.laid_out(k), self.laid_out(v), kv_lens=lengths, ring_start=first
            ), count
        page = self.spec.page
        assert page is not None
        pages = batch * count // page
        order = torch.randperm(2 * pages, generator=self.generator, device=self.device)[:pages]
        pools = []
        for x in (k, v):
            shape = (2 * pages, x.shape[1], page, x.shape[3])
            pool = torch.full(shape, self.poison, dtype=x.dtype, device=self.device)
            pool[order] = x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
            pools.append(self.laid_out(pool))
        table = order.view(batch, -1)
        return Keys(*pools, kv_lens=lengths, block_table=table, selected_blocks=lists), 0
