"""Answers of decoders of one emitted model, some of whose keys may lie in the host's memory."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def inner(module: ModuleType, name: str) -> ModuleType:
    """A module of the folder `kernels` of an emitted model."""
    return importlib.import_module(f"{module.kernels.__name__}.{name}")


def plain(module: ModuleType, model: Any, capacity: int, batch: int) -> Any:
    """A decoder of the same package with all keys on the device."""
    base = inner(module, "decoder").Decoder
    own = {"positions": module.POSITIONS, "records": module.RECORDS}
    return type("Plain", (base,), own)(model, capacity, batch)


def answers(
    decoder: Any, vocab: int, lengths: Sequence[int], given: list[Any] | None = None
) -> tuple[list[Any], Tensor]:
    """Tokens and logits of two texts of unlike lengths: prompts, steps, and more to read.

    Args:
        lengths: Tokens of the texts, the longer one first.
        given: What a decoder answered: a step reads the token that it gave before that step. By
            default it reads its own.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    tokens, logits = [], []

    def took(token: Any) -> None:
        tokens.append(token)
        logits.append(decoder.logits.clone())

    took(decoder.start(texts))
    for number in range(9):
        took(decoder.step() if given is None else decoder.step(given[number]))
    took(decoder.extend([[5, 6, 7, 8], [9]]))
    for _ in range(5):
        took(decoder.step([11, 12]))
    # From the start, where other keys lie, and where steps of as many tokens were before.
    for again in ([texts[1], texts[0][:5]], texts):
        took(decoder.start(again))
        took(decoder.step([13, 14]))
    return tokens, torch.stack(logits)
