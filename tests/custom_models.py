"""Decoders as users write them: places, neighbours and masks made by hand.

They have no config and name no devices. Every kind differs from the plain one in a single line.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, HEAD_DIM, LONGEST = 300, 32, 4, 8, 64

PLACES = (
    "slice of a table", "slice of a parameter", "slice of a buffer", "narrow of a buffer",
    "buffer of numbers", "waves", "rotation by number", "rotation by table", "temperature",
    "log of the length",
)  # fmt: skip
"""Kinds that count the tokens of their input, which a cache has to go on counting."""

NEIGHBOURS = (
    "shift by padding", "shift by concatenation", "ids before", "running mean", "product with tril",
    "unfold", "keys shifted", "forgetting", "counted by cumsum", "running maximum",
)  # fmt: skip
"""Kinds in which a token depends on those before it outside of attention."""

MASKS = (
    "documents",
    "padding by id",
    "slopes by distance",
    "window of positions",
    "sinks",
    "quantile",
)
"""Kinds of masks and scores, and of constants that are computed on the way."""


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.forget = nn.Linear(WIDTH, HEADS)
        self.sink = nn.Parameter(torch.zeros(HEADS))
        ones = torch.ones(LONGEST, LONGEST)
        self.register_buffer("tril", torch.tril(ones)[None, None])
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None])
        self.register_buffer("logs", torch.log(torch.arange(2, LONGEST + 2)) / math.log(4))

    def forward(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        kind, (batch, length, _) = self.kind, x.shape
        numbers = torch.arange(length)
        if kind == "shift by padding":
            x = x + 0.5 * F.pad(x, (0, 0, 1, -1))
        elif kind == "shift by concatenation":
            x = x + 0.5 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        elif kind == "running mean":
            x = x + x.cumsum(1) / (numbers + 1)[None, :, None]
        elif kind == "product with tril":
            x = x + self.tril[0, 0, :length, :length] @ x
        elif kind == "quantile":
            x = x * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.9))
        elif kind == "unfold":
            x = x + F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)
        q, k, v = (
            part(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if kind == "keys shifted":
            k = k + F.pad(k, (0, 0, 1, -1))
        elif kind == "temperature":
            q = q * (1 + torch.log(torch.floor((numbers + 1) / 4.0) + 1))[None, None, :, None]
        elif kind == "log of the length":
            q = q * self.logs[:length].clamp(min=1)[None, None, :, None]
        elif kind.startswith("rotation"):
            frequencies = 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
            if kind == "rotation by number":
                angles = numbers[:, None] * frequencies
            else:
                angles = (torch.arange(LONGEST)[:, None] * frequencies)[:length]
            q, k = (_rotated(t, torch.cat([angles, angles], -1)) for t in (q, k))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        if kind == "slopes by distance":
            scores = scores - self.slopes * (numbers[:, None] - numbers).abs()
        elif kind == "forgetting":
            kept = F.logsigmoid(self.forget(x)).cumsum(1).transpose(1, 2)
            scores = scores + kept[..., :, None] - kept[..., None, :]
        seen = seen & (self.tril[:, :, :length, :length] > 0)
        if kind == "window of positions":
            seen = seen & ((positions[:, :, None] - positions[:, None, :]) < 5)[:, None]
        scores = scores.masked_fill(~seen, -1e9)
        if kind == "sinks":
            sinks = self.sink.view(1, HEADS, 1, 1).expand(batch, HEADS, length, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(WIDTH) for name in ("a", "b")})
        self.attention = Attention(kind)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attention(self.norms["a"](x), seen, positions)
        return x + self.down(F.gelu(self.up(self.norms["b"](x))))


class Decoder(nn.Module):
    """A decoder of two layers; forward(input_ids, attention_mask, position_ids) -> logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.learned = nn.Parameter(torch.zeros(1, LONGEST, WIDTH))
        self.register_buffer("waves", torch.arange(LONGEST * WIDTH).view(LONGEST, WIDTH).sin())
        self.layers = nn.ModuleList(Block(kind) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        kind, length = self.kind, input_ids.shape[1]
        x = self.embed(input_ids)
        if kind == "slice of a table":
            x = x + self.places.weight[:length]
        elif kind == "slice of a parameter":
            x = x + self.learned[:, :length]
        elif kind == "slice of a buffer":
            x = x + self.waves[:length]
        elif kind == "narrow of a buffer":
            x = x + self.waves.narrow(0, 0, length)
        elif kind == "buffer of numbers":
            x = x + self.places(torch.arange(LONGEST).expand(1, -1)[:, :length])
        elif kind == "waves":
            angles = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
            x = x + torch.cat([angles.sin(), angles.cos()], -1)
        elif kind == "ids before":
            x = x + self.places(F.pad(input_ids, (1, -1)) % LONGEST)
        elif kind == "counted by cumsum":
            x = x + self.places(torch.ones_like(input_ids).cumsum(1) - 1)
        else:
            x = x + 0.3 * self.places(position_ids)
        seen = (attention_mask > 0)[:, None, None]
        if kind == "documents":
            document = (input_ids < 30).cumsum(1)
            seen = seen & (document[:, :, None] == document[:, None, :])[:, None]
        elif kind == "padding by id":
            seen = (input_ids != 7)[:, None, None]
        for layer in self.layers:
            x = layer(x, seen, position_ids)
        if kind == "running maximum":
            x = x + x.cummax(1).values
        return self.head(self.norm(x))
