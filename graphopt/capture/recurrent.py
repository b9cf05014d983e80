"""Finding recurrent mixers before a model is traced, which may take minutes to no end."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from graphopt.capture.layer_calls import repeated_layers
from graphopt.errors import CaptureError

STATE_ARGUMENTS = frozenset(
    {"cache_params", "state", "conv_state", "recurrent_state", "recurrent_states", "ssm_state"}
)
"""What forward passes of transformers call a memory of fixed size; keys and values are
`past_key_values`."""

STATE_TYPES = frozenset({"linear_attention", "mamba", "mamba2", "recurrent"})
"""Entries of `layer_types` that transformers keeps such a memory for. `conv` is none of them: a
short convolution over tokens is a graph like any other, and only has no cache; and what is
`hybrid` is told by its parts."""

REMEDY = (
    "graphopt takes decoders whose layers attend to keys and values (and short convolutions, "
    "without a cache); a state that is carried from token to token has no form in it."
)


def refuse_recurrent(module: nn.Module) -> None:
    """Refuse a language model with a layer that carries a state from token to token.

    It is told by the module tree: a forward pass that takes such a state, or a layer that the
    config calls recurrent. Hybrids without such a layer pass.

    Raises:
        CaptureError: Naming the first such module, what tells it, and how many layers have one.
    """
    layers = repeated_layers(module)
    kinds = layer_types(getattr(module, "config", None))
    found: list[tuple[str, str]] = []
    for number, (path, layer) in enumerate(layers.items()):
        where = _stateful_part(path, layer)
        # Which layer a type belongs to is known where the model has one list of layers.
        kind = kinds[number] if len(kinds) == len(layers) else ""
        if where is not None:
            found.append(where)
        elif kind in STATE_TYPES:
            found.append((path, f"its config calls the layer {kind!r}"))
    if not found and len(kinds) != len(layers):
        found += [(f"layer {i}", f"its config calls it {k!r}") for i, k in enumerate(kinds)
                  if k in STATE_TYPES]  # fmt: skip
    if found:
        path, told = found[0]
        raise CaptureError(
            f"{path} is a recurrent mixer ({told}), one of {len(found)} in {len(layers)} layers.",
            REMEDY,
        )


def layer_types(config: Any) -> list[str]:
    """Return the types of the layers that a config lists, or none."""
    for entry in ("layer_types", "layers_block_type"):
        stated = getattr(config, entry, None)
        if isinstance(stated, list | tuple):
            return [str(kind) for kind in stated]
    return []


def _stateful_part(path: str, layer: nn.Module) -> tuple[str, str] | None:
    """Return the innermost first part of a layer whose forward pass takes a state, and which."""
    found = None
    for name, part in layer.named_modules():
        taken = STATE_ARGUMENTS & inspect.signature(type(part).forward).parameters.keys()
        if taken and (found is None or name.startswith(found[0])):
            found = name, sorted(taken)[0], type(part).__name__
    if found is None:
        return None
    name, argument, kind = found
    return f"{path}.{name}".rstrip("."), f"{kind}, whose forward pass takes {argument!r}"
