"""Weights that a class ties, and checkpoints that hold them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphopt.ir.weights import Producer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def untie(
    module: PreTrainedModel, find: Callable[[str], Producer | None], dtype: torch.dtype
) -> list[tuple[str, str]]:
    """Give a module two parameters where a checkpoint holds two values of one that it ties.

    transformers decides so from 5.17 to 5.23 (`PreTrainedModel.tie_weights`): a pair is tied
    where the checkpoint holds one of the two, or both with equal values.

    Args:
        module: Parameters stand on meta; it is changed in place.
        find: Returns the checkpoint's value of a parameter of this name, or None.
        dtype: In which values are compared: what the checkpoint is loaded in.

    Returns:
        The (parameter, the one it is tied to) pairs that are apart.
    """
    pairs: dict[str, str] = dict(getattr(module, "all_tied_weights_keys", None) or {})
    apart: list[tuple[str, str]] = []
    for target, source in pairs.items():
        first, second = find(target), find(source)
        if first is None or second is None or _equal(first, second, dtype):
            continue
        path, _, leaf = target.rpartition(".")
        owner = module.get_submodule(path)
        old = owner.get_parameter(leaf)
        owner.register_parameter(leaf, nn.Parameter(torch.empty_like(old), requires_grad=False))
        module.all_tied_weights_keys.pop(target)
        apart.append((target, source))
    return apart


def say_untied(config: dict[str, Any]) -> None:
    """Make a config, and those inside it, say that no embeddings are tied.

    Pairs that stay tied are then two parameters with one value.
    """
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            say_untied(part)


def _equal(first: Producer, second: Producer, dtype: torch.dtype) -> bool:
    from graphopt.files.safetensors import blocks

    if first is second:
        return True
    if tuple(first.shape) != tuple(second.shape):
        return False
    if first.dtype != second.dtype:  # which are cut into other blocks
        return torch.equal(first.load().to(dtype), second.load().to(dtype))
    parts = zip(blocks(first), blocks(second), strict=True)
    return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in parts)
