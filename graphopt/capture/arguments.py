"""The arguments of a layer as flat lists, with the mappings that layers pass tensors on through.

A layer may write into a mapping that a later layer reads: Gemma 3n and 4 share keys and values so.
What such a mapping holds counts as arguments, and what a layer adds to it as results.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

Mapping = MutableMapping[Any, Any]


@dataclass(frozen=True)
class _Held:
    """Stands for a mapping among the leaves; its own leaves follow behind all others."""

    kind: type
    spec: Any
    count: int


def flatten(args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], Any, list[Mapping]]:
    """Return the leaves of a call's arguments, how they flatten, and the mappings among them."""
    leaves, spec = pytree.tree_flatten(
        (args, kwargs), is_leaf=lambda x: isinstance(x, MutableMapping) and x is not kwargs
    )
    mappings: list[Mapping] = []
    for place in range(len(leaves)):
        if isinstance(leaves[place], MutableMapping):
            held, content = pytree.tree_flatten(dict(leaves[place]))
            mappings.append(leaves[place])
            leaves[place] = _Held(type(leaves[place]), content, len(held))
            leaves += held
    return leaves, spec, mappings


def unflatten(
    leaves: Sequence[Any], spec: Any
) -> tuple[tuple[Any, ...], dict[str, Any], list[Mapping]]:
    """Return arguments that `flatten` gave, with new mappings, and these."""
    outer, rest = list(leaves[: spec.num_leaves]), list(leaves[spec.num_leaves :])
    mappings: list[Mapping] = []
    for place, leaf in enumerate(outer):
        if isinstance(leaf, _Held):
            content = pytree.tree_unflatten(rest[: leaf.count], leaf.spec)
            outer[place] = leaf.kind(content)
            mappings.append(outer[place])
            del rest[: leaf.count]
    args, kwargs = pytree.tree_unflatten(outer, spec)
    return args, kwargs, mappings


def added(before: Sequence[dict[Any, Any]], mappings: Sequence[Mapping]) -> list[dict[Any, Any]]:
    """Return what a layer wrote into its mappings, which held `before`."""
    return [
        {key: value for key, value in now.items() if key not in was or value is not was[key]}
        for was, now in zip(before, mappings, strict=True)
    ]
