"""What lets tokens see one another outside attention, beside an attention that has a cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sampling import exhaustive_but
from torch import Tensor, nn

import graphopt as go
from graphopt.execute.language_model import ProgramModel
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

HEADS, WIDTH = 2, 8

# Of q, k and v [B, H, S, D], for S tokens.
MIXING = {
    "attention to all": lambda q, k, v, s: F.scaled_dot_product_attention(q, k, v),
    "linear attention": lambda q, k, v, s: torch.einsum(
        "bhsd,bhsde->bhse",
        F.elu(q) + 1,
        torch.einsum("bhsd,bhse->bhsde", F.elu(k) + 1, v).cumsum(2),
    ),
    "a sum over all": lambda q, k, v, s: q + v.sum(2, keepdim=True),
    "the mean": lambda q, k, v, s: q * v.mean(2, keepdim=True),
    "the number of tokens": lambda q, k, v, s: v / s,
    "a running maximum": lambda q, k, v, s: v.cummax(2).values,
    "a shift by cat": lambda q, k, v, s: torch.cat([q[:, :, :1], v[:, :, :-1]], 2),
    "a shift by padding": lambda q, k, v, s: F.pad(v, (0, 0, 1, 0))[:, :, :-1],
    "a shift by an index": lambda q, k, v, s: v[:, :, (torch.arange(s) - 1).clamp(min=0)],
    "the order reversed": lambda q, k, v, s: v.flip(2),
    "the first token": lambda q, k, v, s: q + v[:, :, :1],
    "the last token": lambda q, k, v, s: q + v[:, :, -1:],
    "sorting": lambda q, k, v, s: v.sort(2).values,
    "a norm over tokens": lambda q, k, v, s: F.normalize(v, dim=2),
    "a softmax over tokens": lambda q, k, v, s: v.softmax(2),
}
APART = {
    "a softmax over features": lambda q, k, v, s: v.softmax(-1),
    "sums along features": lambda q, k, v, s: v.cumsum(-1) + q.mean(-1, keepdim=True),
    "features shifted": lambda q, k, v, s: F.pad(v, (1, 0))[..., :-1].flip(-1),
    "heads mixed": lambda q, k, v, s: torch.einsum("bhsd,bgsd->bgsd", q.sort(1).values, v),
    "features chosen": lambda q, k, v, s: v.topk(WIDTH, -1).values[
        ..., torch.arange(WIDTH).flip(0)
    ],
}


class _Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkvo = nn.ModuleDict({name: nn.Linear(16, 16) for name in "qkvo"})

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self.qkvo[n](x).view(batch, length, HEADS, WIDTH).transpose(1, 2) for n in "qkv")
        if self.kind:
            made = (MIXING | APART)[self.kind](q, k, v, length)
        else:
            made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.qkvo["o"](made.transpose(1, 2).reshape(batch, length, 16))


class _Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.first, self.second = _Attention(""), _Attention(kind)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(input_ids))))


EVERY_DAY = (
    "attention to all", "linear attention", "a sum over all", "the number of tokens",
    "a shift by cat", "a shift by an index", "a softmax over features", "sums along features",
    "heads mixed",
)  # fmt: skip
"""One of each sort: sums, counts, shifts and places; and along features or heads alone."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", exhaustive_but([*MIXING, *APART], *EVERY_DAY))
def test_a_cache_is_inserted_where_tokens_meet_in_attention_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = _Model(kind).eval()
    result = InsertKVCache().run(go.capture(model), Context())
    if kind in MIXING:
        assert not result.program.states
        assert (
            "mixes tokens" in result.skipped[0].reason
            or "see later ones" in result.skipped[0].reason
        )
        return
    assert not result.skipped
    ids = torch.randint(0, 50, (2, 9))
    form = ProgramModel(result.program)
    cache, steps = form.start(2), []
    for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
        inputs = {
            "input_ids": ids[:, start:stop],
            "attention_mask": torch.ones(2, stop, dtype=torch.long),
            "position_ids": torch.arange(start, stop).expand(2, -1),
        }
        logits, cache = form.step(inputs, cache)
        steps.append(logits)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(steps, 1), model(ids))
