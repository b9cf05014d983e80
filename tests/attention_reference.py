"""Attention written out: what kernels are compared with, and how far they may be from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    """Operands of one attention, on one device.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv]; `fields` are those of AttentionSpec.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    fields: dict
    scale: float
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    kv_lens: torch.Tensor | None = None
    picked: torch.Tensor | None = None  # bool [B, G, T]: keys of selected pages
    ends: tuple | None = field(default=None)

    def seen(self):
        """bool [B, H, S, T]: which keys each query sees."""
        batch, heads, queries, _ = self.q.shape
        keys = self.k.shape[2]
        device = self.q.device
        seen = torch.zeros(batch, heads, queries, keys, dtype=torch.bool, device=device)
        for b in range(batch):
            count = keys if self.kv_lens is None else int(self.kv_lens[b])
            shift = 0 if self.fields.get("align") == "top-left" else count - queries
            i = torch.arange(queries, device=device)[:, None] + shift
            j = torch.arange(keys, device=device)[None, :]
            allowed = (j < count) & (i == i)
            if self.fields.get("causal", True):
                allowed = allowed & (j <= i)
            if self.fields.get("window"):
                allowed = allowed & (j > i - self.fields["window"])
            if self.fields.get("chunk"):
                own = torch.div(i, self.fields["chunk"], rounding_mode="floor")
                allowed = allowed & (j // self.fields["chunk"] == own)
            if self.mask is not None:
                allowed = allowed & self.mask[b].bool()[None, :]
            if self.picked is not None:
                group = heads // self.picked.shape[1]
                allowed = allowed & self.picked[b].repeat_interleave(group, 0)[:, None]
            seen[b] = allowed
        return seen

    def scores(self, dtype):
        """Capped scores with all that is added, without what is not seen."""
        group = self.q.shape[1] // self.k.shape[1]
        q, k = self.q.to(dtype), self.k.to(dtype).repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) * self.scale
        cap = self.fields.get("softcap")
        if cap:
            scores = torch.tanh(scores / cap) * cap
        if self.slopes is not None:
            real = self.mask
            if real is None:
                real = torch.ones(self.k.shape[0], self.k.shape[2], device=self.q.device)
            places = (real.cumsum(-1) - 1) * real
            scores = (
                scores
                + self.slopes.to(dtype)[None, :, None, None] * places.to(dtype)[:, None, None, :]
            )
        if self.bias is not None:
            scores = scores + self.bias.to(dtype)
        return scores.masked_fill(~self.seen(), float("-inf"))

    def exponentials(self, dtype):
        """The exponentials of scores, their sum (0 where no key is seen), and its logarithm."""
        scores = self.scores(dtype)
        top = scores.amax(-1, keepdim=True)
        if self.sinks is not None:
            top = torch.maximum(top, self.sinks.to(dtype)[None, :, None, None])
        top = top.masked_fill(top == float("-inf"), 0.0)
        exps = torch.exp(scores - top)
        total = exps.sum(-1, keepdim=True)
        if self.sinks is not None:
            total = total + torch.exp(self.sinks.to(dtype)[None, :, None, None] - top)
        return exps, total, (top + total.log()).squeeze(-1)

    def run(self, dtype, weights=None):
        """The output in `dtype` and the log-sum-exp; `weights` is what the weights round to."""
        exps, total, lse = self.exponentials(dtype)
        v = self.v.to(dtype).repeat_interleave(self.q.shape[1] // self.v.shape[1], 1)
        # Rounded before they are divided by the sum, as a kernel has them.
        rounded = exps if weights is None else exps.to(weights).to(dtype)
        out = rounded @ v / total.masked_fill(total == 0, 1.0)
        return out, lse

    def bound(self):
        """The output in fp64, and twice the largest error of fp32 with 16-bit weights.

        One more rounding of the largest output, since a result between two numbers of 16 bits
        may fall to either.
        """
        exact, _ = self.run(torch.float64)
        plain, _ = self.run(torch.float32, self.q.dtype)
        error = (plain.to(self.q.dtype).double() - exact).abs().max().item()
        return exact, 2 * error + torch.finfo(self.q.dtype).eps / 2 * exact.abs().max().item()


def random_case(sizes, fields, seed=0, dtype=torch.float16, spread=1.0):
    """A case of (B, H, G, S, T, D, Dv), random in all that `fields` ask for."""
    batch, heads, groups, queries, keys, width, values = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    case = Case(
        draw(batch, heads, queries, width), draw(batch, groups, keys, width),
        draw(batch, groups, keys, values), dict(fields), scale=width**-0.5,
    )  # fmt: skip
    if fields.get("padding_mask"):
        case.mask = torch.ones(batch, keys, dtype=torch.int8)
        for b in range(batch):
            case.mask[b, : b * keys // 3] = 0
            if keys > 4:
                case.mask[b, keys // 2] = b % 2
    if fields.get("bias"):
        case.bias = draw(batch, 1, queries, keys)
        case.bias[0, 0, 0, ::3] = float("-inf")
    if fields.get("alibi"):
        case.slopes = torch.rand(heads, generator=generator) * 0.2
    if fields.get("sinks"):
        case.sinks = torch.randn(heads, generator=generator)
    if fields.get("kv_lens"):
        case.kv_lens = torch.tensor([max(1, keys - 3 * b - 1) for b in range(batch)])
    return case
