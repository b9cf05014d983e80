"""The keys that describe a model in a GGUF file, from the config of transformers.

The way back is `graphopt.sources.gguf.architectures`; the emitter reads what is written here by it,
and compares the two models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from graphopt.sources.gguf.rotary import FREQS, LONG, SHORT

Value: TypeAlias = int | float | bool | str | list[Any]


class Unwritable(Exception):
    """A config says something that the architecture has no key for; the text says what."""


@dataclass
class Described:
    """A model as a GGUF file describes it.

    Attributes:
        keys: Without the architecture's name in front.
        tensors: That belong to the rotary embedding, fp32.
    """

    keys: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    # llama.cpp files models of Mistral under llama, and has no window there.
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""The format's name of an architecture, by transformers' type."""


def describe(config: Any) -> Described:
    """Return the keys of a model of one of `ARCHITECTURES`.

    Raises:
        Unwritable: The config says what the architecture has no key for.
    """
    described = Described()
    _KEYS[ARCHITECTURES[config.model_type]](config, described)
    return described


def single(value: float) -> float:
    """Return a number as a reader of a file gets it: the shortest decimal of its fp32."""
    return float(str(np.float32(value)))


def _decoder(config: Any, described: Described) -> None:
    """The keys that all architectures but GPT-2 share."""
    described.keys |= {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(rope: Mapping[str, Any], config: Any, described: Described) -> None:
    """Add what a rotary embedding of whole or partial heads is computed from."""
    rotated = int(_head_dim(config) * (rope.get("partial_rotary_factor") or 1.0))
    kind = rope.get("rope_type") or "default"
    described.keys |= {
        "rope.dimension_count": rotated,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind == "default":
        return
    if kind not in _SCALINGS:
        raise Unwritable(f"positions are scaled by {kind!r}, which has no form in GGUF files")
    _SCALINGS[kind](rope, rotated, config, described)


def _linear(rope: Mapping[str, Any], rotated: int, config: Any, described: Described) -> None:
    described.keys |= {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": float(rope["factor"]),
    }


def _yarn(rope: Mapping[str, Any], rotated: int, config: Any, described: Described) -> None:
    described.keys |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings")
        or config.max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }


def _llama3(rope: Mapping[str, Any], rotated: int, config: Any, described: Described) -> None:
    """Llama 3.1's scaling as one divisor for each frequency, as llama.cpp's converter has it."""
    factor, original = float(rope["factor"]), int(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    divisors: list[float] = []
    for pair in range(rotated // 2):
        turns = original / (2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / rotated))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    described.tensors[FREQS] = torch.tensor(divisors, dtype=torch.float32)


def _longrope(rope: Mapping[str, Any], rotated: int, config: Any, described: Described) -> None:
    original = rope.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    original = original or config.max_position_embeddings
    factor = config.max_position_embeddings / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    described.keys |= {
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.attn_factor": float(attention),
    }
    for name, entry in ((LONG, "long_factor"), (SHORT, "short_factor")):
        described.tensors[name] = torch.tensor(rope[entry], dtype=torch.float32)


_SCALINGS: dict[str, Callable[[Mapping[str, Any], int, Any, Described], None]] = {
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}


def _full_attention(config: Any, described: Described) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) and layers != {"full_attention"}:
        raise Unwritable("its attention has a window, and llama.cpp reads none for it")
    _decoder(config, described)
    _rope(config.rope_parameters, config, described)


def _mistral_or_llama(config: Any, described: Described) -> None:
    if getattr(config, "sliding_window", None) is not None:
        raise Unwritable("its attention has a window, and llama.cpp's llama has none")
    _decoder(config, described)
    _rope(config.rope_parameters, config, described)


def _windows(config: Any, described: Described, period: int) -> None:
    """Add the window of every layer but each `period`-th, the only pattern that is written."""
    wanted = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != wanted:
        raise Unwritable(
            f"llama.cpp gives every layer but each {_NUMBERS[period]} a window, and the windows of "
            "this model lie otherwise"
        )
    described.keys["attention.sliding_window"] = config.sliding_window


_NUMBERS = {2: "second", 6: "sixth"}


def _gemma2(config: Any, described: Described) -> None:
    _decoder(config, described)
    _rope(config.rope_parameters, config, described)
    _windows(config, described, 2)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, name)) is None:
            raise Unwritable(f"it has no {name}, and llama.cpp's Gemma 2 always has")
        described.keys[name] = float(cap)


def _gemma3(config: Any, described: Described) -> None:
    _decoder(config, described)
    _rope(config.rope_parameters["full_attention"], config, described)
    _windows(config, described, 6)
    sliding = config.rope_parameters["sliding_attention"]
    if (sliding.get("rope_type") or "default") != "default":
        raise Unwritable("positions within windows are scaled, which has no form in GGUF files")
    described.keys["rope.freq_base_swa"] = float(sliding["rope_theta"])
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise Unwritable("its attention scores are capped, and those of llama.cpp's Gemma 3 not")
    if config.final_logit_softcapping is not None:
        described.keys["final_logit_softcapping"] = float(config.final_logit_softcapping)


def _phi3(config: Any, described: Described) -> None:
    _decoder(config, described)
    _rope(config.rope_parameters, config, described)
    described.keys["attention.sliding_window"] = config.sliding_window or 0


def _gpt2(config: Any, described: Described) -> None:
    described.keys |= {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


_KEYS: dict[str, Callable[[Any, Described], None]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _mistral_or_llama,
    "phi3": _phi3,
    "qwen2": _full_attention,
    "qwen3": _full_attention,
}
