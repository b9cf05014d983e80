"""Configs of models that lose layers or experts: entries that count or list them follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers",
)  # fmt: skip
"""What configs call the number of layers."""

LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""What configs call a number of layers at the beginning that are of another kind."""

INDEX_LISTS = (
    "moe_layers", "mlp_only_layers", "hybrid_layer_ids", "attn_layer_indices", "full_attn_idxs",
    "local_layer_ids", "ple_layer_ids",
)  # fmt: skip
"""What configs call lists of the indices of some layers."""

INDEX_MAPPINGS = ("per_layer_config",)
"""What configs call mappings from the index of a layer to what is special about it."""

NO_LAYER_LISTS = (
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "time_step_limit",
    "mlp_multipliers", "ssm_multipliers", "axial_pos_shape", "axial_pos_embds_dim",
    "attention_types", "languages", "H_cycles", "L_bp_cycles", "keys_to_ignore_at_inference",
)  # fmt: skip
"""Lists that have as many entries as there are layers by chance alone."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of routed experts."""

EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
"""What configs call the number of neurons of an expert, where it has an entry of its own first."""


def decoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that describe a decoder: of a model that sees, those of its text part."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "vision_config" in config else config


def shrink_expert_width(config: dict[str, Any], neurons: int, left: int) -> None:
    """Make a config say that its experts have `left` of so many neurons, in place."""
    key = next((key for key in EXPERT_WIDTHS if config.get(key) == neurons), None)
    if key is not None:
        config[key] = left


def shrink_expert_counts(config: dict[str, Any], count: int, left: int) -> None:
    """Make a config say that its mixtures have `left` of `count` experts, in place."""
    for key in EXPERT_COUNTS:
        value = config.get(key)
        if value == count:
            config[key] = left
        elif isinstance(value, list) and set(value) == {count}:
            config[key] = [left] * len(value)


def shrink_config(config: dict[str, Any], count: int, removed: set[int]) -> None:
    """Make a config say that `removed` of `count` layers are gone, in place."""
    kept = [index for index in range(count) if index not in removed]
    _keep_experts(config, count, kept)
    for key, value in config.items():
        if key in LAYER_COUNTS and value == count:
            config[key] = len(kept)
        elif key in LEADING_COUNTS and isinstance(value, int):
            config[key] = sum(index < value for index in kept)
        elif key in INDEX_LISTS and isinstance(value, list):
            config[key] = [place for place, index in enumerate(kept) if index in value]
        elif key in INDEX_MAPPINGS and isinstance(value, dict):
            config[key] = _renumbered(value, kept)
        elif key == "attention_types" and isinstance(value, list):
            # GPT-Neo's: [[kinds, how often they are repeated], ...].
            kinds = [kind for pattern, times in value for kind in list(pattern) * times]
            if len(kinds) == count:
                config[key] = [[[kinds[index] for index in kept], 1]]
        elif key not in NO_LAYER_LISTS and isinstance(value, list) and len(value) == count:
            config[key] = [value[index] for index in kept]


def _renumbered(mapping: dict[Any, Any], kept: Sequence[int]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in mapping.items():
        if str(key).isdecimal():
            if int(key) not in kept:
                continue
            place = kept.index(int(key))
            key = str(place).zfill(len(key)) if isinstance(key, str) else place
        made[key] = value
    return made


def _keep_experts(config: dict[str, Any], count: int, kept: Sequence[int]) -> None:
    """Say which layers have experts where a config says it by every how many.

    What cannot be said is left, and then the layers are not what the config makes.
    """
    step = config.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        dense = config.get("mlp_only_layers") or []
        config["mlp_only_layers"] = [i for i in range(count) if i in dense or (i + 1) % step]
        config["decoder_sparse_step"] = 1
    first, last, every = (
        config.get(f"moe_layer_{name}") for name in ("start_index", "end_index", "interval")
    )
    if isinstance(first, int) and isinstance(last, int) and isinstance(every, int):
        last = count - 1 if last < 0 else last
        sparse = [first <= index <= last and (index + 1) % every == 0 for index in kept]
        places = [place for place, experts in enumerate(sparse) if experts]
        if places and all(sparse[places[0] : places[-1] + 1]):
            config["moe_layer_start_index"], config["moe_layer_end_index"] = places[0], places[-1]
            config["moe_layer_interval"] = 1
