"""Drawn configs of every decoder family that the installed transformers has.

What a family's config is called is looked up in its config class; what is sensible for an entry
of that name is said here once for all families, and where a family needs more in `OWN`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

VOCAB = 300
"""Enough for the byte-level tokenizer of the tests."""

POSITIONS = 128


@dataclass(frozen=True)
class Sizes:
    """What the entries of one config have to agree in."""

    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    inner: int
    experts: int = 4

    @classmethod
    def draw(cls, rng: random.Random, *, free: bool, multi_head: bool) -> Sizes:
        """Draw sizes.

        Args:
            free: Whether the config states the head size, so that the width need not be heads
                times that.
            multi_head: Whether every query head has a key head of its own.
        """
        while True:
            heads = rng.choice((2, 3, 4, 6, 8))
            head_dim = rng.choice((8, 12, 16, 20, 24, 32))
            if 32 <= heads * head_dim <= 96:
                break
        groups = heads if multi_head else rng.choice([g for g in (1, 2, 3, 4) if heads % g == 0])
        hidden = rng.choice((40, 48, 64)) if free and rng.random() < 0.5 else heads * head_dim
        return cls(
            rng.choice((2, 3, 4)), heads, groups, head_dim, hidden, rng.choice((40, 48, 72, 96))
        )


Draw = Callable[[random.Random, Sizes, Any], Any]
"""(generator, sizes, the class's default) -> the entry's value."""


def _fixed(value: Any) -> Draw:
    return lambda rng, sizes, default: value


def _one_of(*values: Any) -> Draw:
    return lambda rng, sizes, default: rng.choice(values)


def _kept_or(*values: Any) -> Draw:
    return lambda rng, sizes, default: rng.choice((default, default, *values))


def _types(rng: random.Random, sizes: Sizes, default: Any) -> Any:
    """A kind for every layer, from the kinds that the default has."""
    kinds = sorted(set(default)) if default else []
    if "sliding_attention" in kinds:
        kinds = sorted({*kinds, "full_attention"})
    if not kinds:
        return None
    return [rng.choice(kinds) for _ in range(sizes.layers)]


def _both(rng: random.Random, sizes: Sizes, *kinds: str) -> list[str]:
    """Every kind at least once, in any order."""
    drawn = [*kinds, *rng.choices(kinds, k=sizes.layers)][: max(sizes.layers, len(kinds))]
    return rng.sample(drawn, len(drawn))


def _flags(rng: random.Random, sizes: Sizes, default: Any) -> list[int]:
    return [rng.choice((0, 1)) for _ in range(sizes.layers)]


_BOOL = _one_of(False, True)

ENTRIES: dict[str, Draw] = {
    # Sizes.
    "vocab_size": _fixed(VOCAB),
    "max_position_embeddings": _fixed(POSITIONS),
    "hidden_size": lambda rng, s, d: s.hidden,
    "num_hidden_layers": lambda rng, s, d: s.layers,
    "num_attention_heads": lambda rng, s, d: s.heads,
    "decoder_layers": lambda rng, s, d: s.layers,
    "decoder_attention_heads": lambda rng, s, d: s.heads,
    "encoder_ffn_dim": lambda rng, s, d: s.inner,
    "decoder_ffn_dim": lambda rng, s, d: s.inner,
    "num_key_value_heads": lambda rng, s, d: s.groups,
    "num_kv_heads": lambda rng, s, d: s.groups,
    "head_dim": lambda rng, s, d: s.head_dim,
    "intermediate_size": lambda rng, s, d: s.inner,
    "ffn_dim": lambda rng, s, d: s.inner,
    "n_inner": lambda rng, s, d: rng.choice((None, s.inner)),
    "dff": lambda rng, s, d: s.inner,
    "ffn_hidden_size": lambda rng, s, d: s.inner,
    "intermediate_size_mlp": lambda rng, s, d: s.inner,
    "type_vocab_size": _fixed(2),
    "pad_token_id": _fixed(0),
    "bos_token_id": _fixed(1),
    "eos_token_id": _fixed(2),
    # What the terms of a layer are.
    "tie_word_embeddings": _BOOL,
    "attention_bias": _BOOL,
    "mlp_bias": _BOOL,
    "use_bias": _BOOL,
    "bias": _BOOL,
    "use_qkv_bias": _BOOL,
    "qkv_bias": _BOOL,
    "lm_head_bias": _BOOL,
    "attention_out_bias": _BOOL,
    "norm_bias": _BOOL,
    "use_qk_norm": _BOOL,
    "qk_layernorm": _BOOL,
    "use_parallel_residual": _BOOL,
    "parallel_attn": _BOOL,
    "multi_query": _BOOL,
    "new_decoder_architecture": _BOOL,
    "alibi": _BOOL,
    "scale_attn_weights": _BOOL,
    "scale_attn_by_inverse_layer_idx": _BOOL,
    "apply_residual_connection_post_layernorm": _BOOL,
    "scale_embedding": _BOOL,
    "do_layer_norm_before": _BOOL,
    "enable_bias": _BOOL,
    "layer_norm_elementwise_affine": _BOOL,
    "mup_enabled": _BOOL,
    "is_decoder": _fixed(True),
    "hidden_act": _kept_or("gelu_pytorch_tanh"),
    "activation_function": _kept_or("relu"),
    "hidden_activation": _kept_or("gelu_pytorch_tanh"),
    "clip_qkv": _one_of(None, 1.0),
    "final_logit_softcapping": _one_of(None, 2.0),
    "attn_logit_softcapping": _one_of(None, 2.0),
    "query_pre_attn_scalar": _one_of(24, 40),
    "embedding_multiplier": _fixed(3.0),
    "logits_scaling": _fixed(2.0),
    "residual_multiplier": _fixed(0.5),
    "attention_multiplier": _fixed(0.3),
    "logit_scale": _fixed(0.5),
    # Which layers are of which kind.
    "layer_types": _types,
    "mlp_layer_types": _types,
    "sliding_window": _one_of(5, 8),
    "use_sliding_window": _BOOL,
    "max_window_layers": lambda rng, s, d: rng.randint(0, s.layers),
    "sliding_window_pattern": _one_of(2, 3),
    "window_size": _fixed(5),
    "attention_chunk_size": _fixed(5),
    "no_rope_layers": _flags,
    "global_attn_every_n_layers": _fixed(2),
    # Experts.
    "num_experts": lambda rng, s, d: s.experts,
    "num_local_experts": lambda rng, s, d: s.experts,
    "n_routed_experts": lambda rng, s, d: s.experts,
    "moe_num_experts": lambda rng, s, d: s.experts,
    "num_experts_per_tok": _one_of(1, 2),
    "num_experts_per_token": _one_of(1, 2),
    "moe_topk": _one_of(1, 2),
    "moe_k": _one_of(1, 2),
    "n_group": _one_of(1, 2),
    "num_expert_group": _one_of(1, 2),
    "topk_group": _fixed(1),
    "n_shared_experts": _one_of(1, 2),
    "num_shared_experts": _one_of(1, 2),
    "moe_num_shared_experts": _one_of(1, 2),
    "moe_intermediate_size": _one_of(24, 32),
    "shared_expert_intermediate_size": _one_of(24, 32),
    "shared_intermediate_size": _one_of(24, 32),
    "dense_intermediate_size": _one_of(24, 32),
    "expert_ffn_hidden_size": _one_of(24, 32),
    "moe_shared_expert_intermediate_size": _one_of(24, 32),
    "prefix_dense_intermediate_size": _one_of(24, 32),
    "norm_topk_prob": _BOOL,
    "routed_scaling_factor": _one_of(1.0, 1.5),
    "first_k_dense_replace": lambda rng, s, d: rng.randint(0, s.layers - 1),
    "num_dense_layers": lambda rng, s, d: rng.randint(0, s.layers - 1),
    "decoder_sparse_step": _one_of(1, 2),
    "mlp_only_layers": _one_of([], [0]),
    "moe_layer_start_index": _one_of(0, 1),
    "moe_layer_end_index": _fixed(-1),
    "moe_layer_interval": _one_of(1, 2),
    "interleave_moe_layer_step": _one_of(1, 2),
    "router_jitter_noise": _fixed(0.0),
    "swiglu_limit": _fixed(2.0),
    "zero_expert_num": _fixed(2),
    # Embeddings of a token for every layer.
    "vocab_size_per_layer_input": _fixed(VOCAB),
    "hidden_size_per_layer_input": _fixed(8),
    # Compressed keys and values.
    "q_lora_rank": _one_of(None, 24),
    "kv_lora_rank": _fixed(16),
    "qk_rope_head_dim": _one_of(8, 12),
    "qk_nope_head_dim": _one_of(8, 12),
    "v_head_dim": _one_of(12, 16),
    # Recurrent parts.
    "linear_num_key_heads": _fixed(2),
    "linear_num_value_heads": _fixed(4),
    "linear_key_head_dim": _fixed(8),
    "linear_value_head_dim": _fixed(8),
    "mamba_d_state": _fixed(8),
    "mamba_n_heads": _fixed(8),
    "mamba_d_head": lambda rng, s, d: s.hidden * 2 // 8,
    "mamba_chunk_size": _fixed(8),
    "mamba_dt_rank": _fixed(4),
    "state_size": _fixed(8),
    "time_step_rank": _fixed(4),
    "ssm_state_size": _fixed(8),
    "mamba_num_heads": _fixed(8),
    "mamba_head_dim": _fixed(8),
    "chunk_size": _fixed(8),
    "n_groups": _fixed(2),
    "index_n_heads": _fixed(2),
    "index_head_dim": _fixed(16),
    "index_topk": _fixed(64),
}  # fmt: skip

_MULTI_HEAD = ("kv_lora_rank",)
"""Entries of configs whose layers have as many key heads as query heads."""

_SCALED: tuple[Callable[[random.Random], dict[str, Any]], ...] = (
    lambda rng: {"rope_type": "linear", "factor": 2.0},
    lambda rng: {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": POSITIONS // 4,
    },
    lambda rng: {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": POSITIONS // 4,
    },
)


def _rope(rng: random.Random, default: Mapping[str, Any]) -> dict[str, Any]:
    """Draw rope parameters: one of the types, and a rotated share where the family has one."""
    if any(isinstance(value, dict) for value in default.values()):
        # One for each kind of layers; a kind without rotation has none.
        return {kind: value and _rope(rng, value) for kind, value in default.items()}
    made: dict[str, Any] = {"rope_theta": rng.choice((1e3, 1e4)), "rope_type": "default"}
    if rng.random() < 0.4:
        made |= rng.choice(_SCALED)(rng)
    if "partial_rotary_factor" in default:
        made["partial_rotary_factor"] = rng.choice((0.5, 1.0))
    return made


def _yarn(rng: random.Random) -> dict[str, Any]:
    """Ministral 3's, which also scales queries beyond the original length."""
    return {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": POSITIONS // 4,
        "llama_4_scaling_beta": rng.choice((0.1, 0.5)),
    }  # fmt: skip


def _windowed(rng: random.Random, layers: int) -> list[str]:
    """Kinds of layers of which the last has no window."""
    kinds = ("sliding_attention", "full_attention")
    return [*(rng.choice(kinds) for _ in range(layers - 1)), "full_attention"]


def _shared(rng: random.Random, layers: int) -> dict[str, Any]:
    """Kinds of layers, of which the last take keys and values of earlier ones, or none does."""
    shared = rng.choice((0, 1, 2))
    own = ["sliding_attention", "full_attention", *_windowed(rng, layers)]
    return {
        "num_hidden_layers": len(own) + shared,
        "layer_types": own + _windowed(rng, shared) if shared else own,
        "num_kv_shared_layers": shared,
    }


def _gemma3n(rng: random.Random, sizes: Sizes) -> dict[str, Any]:
    kinds = _shared(rng, 2)
    layers = kinds["num_hidden_layers"]
    return kinds | {
        "intermediate_size": [sizes.inner] * layers,
        "activation_sparsity_pattern": [rng.choice((0.0, 0.5)) for _ in range(layers)],
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "final_logit_softcapping": 2.0,
        "hidden_size": sizes.heads * sizes.head_dim,
    }


def _gemma4(rng: random.Random, sizes: Sizes) -> dict[str, Any]:
    experts = rng.random() < 0.5
    return _shared(rng, 2) | {
        "global_head_dim": rng.choice((16, 32)),
        "enable_moe_block": experts,
        "num_experts": sizes.experts if experts else None,
        "top_k_experts": 2 if experts else None,
        "moe_intermediate_size": 24 if experts else None,
        "use_double_wide_mlp": rng.random() < 0.5,
        "attention_k_eq_v": rng.random() < 0.5,
        "hidden_size_per_layer_input": rng.choice((0, 8)),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e4,
                               "partial_rotary_factor": rng.choice((0.25, 0.5))},
        },
    }  # fmt: skip


def _assistant(family: str) -> Callable[[random.Random, Sizes], dict[str, Any]]:
    """An assistant, whose layers all take the keys and values of another model."""

    def entries(rng: random.Random, sizes: Sizes) -> dict[str, Any]:
        text = draw(family, rng) | {
            "model_type": family,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
        }
        text["num_kv_shared_layers"] = text["num_hidden_layers"]
        return {"text_config": text, "backbone_hidden_size": sizes.hidden}

    return entries


_MUSIC = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}

_TEXT_PARTS = ("text_config", "decoder")
"""Where a config holds the config of its language model."""

Own = Callable[[random.Random, Sizes], dict[str, Any]]

_RECURRENT = ("linear_attention", "full_attention")

OWN: dict[str, Own] = {
    "big_bird": lambda rng, s: {"attention_type": "original_full"},
    "cohere_compass_text": lambda rng, s: {
        "hidden_size": s.heads * 16,
        "layer_types": _both(rng, s, "full_attention", "sliding_attention"),
        "rope_parameters": {
            # Shares of eight pairs for height, width and time, which are one in text.
            "sliding_attention": _rope(rng, {}) | {"mrope_section": [3, 3, 2]},
            "full_attention": rng.choice((None, _rope(rng, {}) | {"mrope_section": [3, 3, 2]})),
        },
    },
    "beam": lambda rng, s: {"layer_types": _both(rng, s, "full_attention", "sliding_attention")},
    "codegen": lambda rng, s: {"n_head": 4, "n_embd": s.head_dim * 4, "rotary_dim": 8},
    "dbrx": lambda rng, s: {
        "tie_word_embeddings": False,
        "attn_config": {
            "kv_n_heads": s.groups,
            "clip_qkv": rng.choice((None, 1.0)),
            "rope_theta": 1e4,
        },
        "ffn_config": {"ffn_hidden_size": s.inner, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": lambda rng, s: {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": _gemma3n,
    "gemma4_assistant": _assistant("gemma4_text"),
    "gemma4_text": _gemma4,
    "gemma4_unified_assistant": _assistant("gemma4_unified_text"),
    "gpt_neo": lambda rng, s: {
        "num_layers": 4,
        "attention_types": [[["global", "local"], 1], [["local"], 2]],
    },
    "gpt_oss": lambda rng, s: {"num_experts_per_tok": 2},
    "gptj": lambda rng, s: {"rotary_dim": rng.choice((4, 8))},
    "jamba": lambda rng, s: {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": lambda rng, s: {"layer_types": _both(rng, s, "conv", "full_attention")},
    "longcat_flash": lambda rng, s: {"q_lora_rank": 24, "qk_rope_head_dim": 8, "head_dim": 8},
    "mamba2": lambda rng, s: {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "musicgen": lambda rng, s: _MUSIC,
    "musicgen_melody": lambda rng, s: _MUSIC,
    "ministral3": lambda rng, s: {"rope_parameters": _yarn(rng)},
    "phimoe": lambda rng, s: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3_5_text": lambda rng, s: {"layer_types": _both(rng, s, *_RECURRENT)},
    "qwen3_next": lambda rng, s: {"layer_types": _both(rng, s, *_RECURRENT)},
    "recurrent_gemma": lambda rng, s: {"block_types": ["recurrent", "attention"]},
    "reformer": lambda rng, s: {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "attention_head_size": 12,
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 32],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 32,
        "lsh_attn_chunk_length": 32,
        "num_buckets": 4,
    },
    "xmod": lambda rng, s: {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": lambda rng, s: {"num_experts_per_tok": 1},
}
"""What a family needs beside or instead of `ENTRIES`."""


def families() -> list[str]:
    """Return every type of config for which transformers has a causal language model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def draw(family: str, rng: random.Random) -> dict[str, Any]:
    """Return the entries of a drawn config of a family."""
    from transformers import CONFIG_MAPPING

    kind, own = CONFIG_MAPPING[family], OWN.get(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            default = kind()
        except Exception:  # a class without defaults
            if own is None:
                raise
            return own(rng, Sizes.draw(rng, free=False, multi_head=False))
    known = default.to_dict()
    maps: dict[str, str] = dict(getattr(kind, "attribute_map", None) or {})
    names = set(known) | {name for name, own in maps.items() if own in known}
    multi_head = any(name in names for name in _MULTI_HEAD)
    sizes = Sizes.draw(rng, free="head_dim" in known and not multi_head, multi_head=multi_head)
    made: dict[str, Any] = {}
    for name, entry in ENTRIES.items():
        if name not in names or maps.get(name) in ENTRIES:
            continue
        made[maps.get(name, name)] = entry(rng, sizes, known.get(maps.get(name, name)))
    if multi_head:
        made.pop("head_dim", None)
    if isinstance(known.get("rope_parameters"), dict):
        made["rope_parameters"] = _rope(rng, known["rope_parameters"])
    made = {key: value for key, value in made.items() if value is not None or known.get(key)}
    for name in _TEXT_PARTS:
        part = known.get(name)
        if isinstance(part, dict) and part.get("model_type") in CONFIG_MAPPING:
            made[name] = draw(part["model_type"], rng)
    return made | (own(rng, sizes) if own is not None else {})
