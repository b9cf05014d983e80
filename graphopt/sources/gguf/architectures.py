"""The architectures of GGUF files that are read: their configs and the names of their modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import SourceError, first_line
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.keys import (
    Gemma2Keys,
    Gemma3Keys,
    Gpt2Keys,
    ModelKeys,
    Phi3Keys,
    RotaryKeys,
    model_keys,
    window_layers,
)
from graphopt.sources.gguf.rotary import FREQS, LONG, SHORT, rope_parameters
from graphopt.sources.gguf.schema import CHECKPOINT
from graphopt.sources.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """How models of one GGUF architecture are read.

    Attributes:
        model_type: transformers' name.
        causal_model: transformers' class, for `config.architectures`.
        schema: The keys that are read.
        config: The rest of the config, from the keys.
        outer: GGUF module name -> checkpoint module name, outside the layers.
        layers: The checkpoint's path of the layers.
        inner: The same as `outer`, inside a layer.
        biases: Modules that may have a bias. In the model's class those named together have one
            all or none, as the config entry says under which they stand; under an empty name they
            always have one.
        rotary: Tensors that belong to the rotary embedding, which are in the config.
        neutral: Keys and the value at which they do nothing here; see `model_keys`.
        paired_heads: Query and key rows are stored for interleaved rotary embedding.
        gains_plus_one: Norm gains are stored with one added.
        transposed: Checkpoint modules whose weight the checkpoint keeps as [in, out].
    """

    model_type: str
    causal_model: str
    schema: type[ModelKeys]
    config: Callable[[GgufFile, Any], dict[str, Any]]
    outer: dict[str, str]
    layers: str
    inner: dict[str, str]
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rotary: tuple[str, ...] = ()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    paired_heads: bool = False
    gains_plus_one: bool = False
    transposed: frozenset[str] = field(default_factory=frozenset)

    def has(self, part: str, suffix: str) -> bool:
        """Say whether a module may have a "weight" or a "bias"."""
        with_bias = (name for names in self.biases.values() for name in names)
        return suffix == "weight" or (suffix == "bias" and part in with_bias)


LLAMA_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LLAMA_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_INNER = {
    **LLAMA_INNER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3_INNER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_INNER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

QKV = ("attn_q", "attn_k", "attn_v")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
ATTENTION_BIAS = {"attention_bias": (*QKV, "attn_output")}
SILU, GELU = {"hidden_activation": "silu"}, {"hidden_activation": "gelu_pytorch_tanh"}
# The names of the layouts in which the rows of an architecture are expected.
PERMUTED = {"tensor_data_layout": "Meta AI original pth"}
AS_TRAINED = {"tensor_data_layout": "reference"}


def _decoder_config(file: GgufFile, keys: RotaryKeys) -> dict[str, Any]:
    """The entries that all architectures but GPT-2 share."""
    return {
        "hidden_size": keys.embedding_length,
        "intermediate_size": keys.feed_forward_length,
        "num_hidden_layers": keys.block_count,
        "num_attention_heads": keys.head_count,
        "num_key_value_heads": keys.key_heads,
        "head_dim": keys.head_dim,
        "max_position_embeddings": keys.context_length,
        "rms_norm_eps": keys.rms_norm_eps,
    }


def _whole_heads(file: GgufFile, keys: RotaryKeys) -> dict[str, Any]:
    """`rope_parameters` of a class that rotates every feature of a head."""
    rotated = keys.head_dim if keys.rotated is None else keys.rotated
    if rotated != keys.head_dim or rotated % 2:
        raise SourceError(
            f"{file.path} rotates {rotated} of {keys.head_dim} features of a head, which the "
            "model's class cannot.",
            CHECKPOINT,
        )
    return rope_parameters(file, keys, rotated)


def _full_attention_config(file: GgufFile, keys: RotaryKeys) -> dict[str, Any]:
    return _decoder_config(file, keys) | {"rope_parameters": _whole_heads(file, keys)}


def _score_scalar(keys: RotaryKeys, largest: int) -> int:
    """Gemma's `query_pre_attn_scalar`, which no key states.

    The largest model of a generation, told by its number of layers, scales queries by the width
    per head; the others do by the head.
    """
    if keys.block_count == largest:
        return keys.embedding_length // keys.head_count
    return keys.head_dim


def _gemma2_config(file: GgufFile, keys: Gemma2Keys) -> dict[str, Any]:
    return _full_attention_config(file, keys) | {
        "query_pre_attn_scalar": _score_scalar(keys, largest=46),
        # The class makes a mask of a window even where no layer has one.
        "sliding_window": keys.sliding_window or keys.context_length,
        "layer_types": window_layers(file, keys, period=2),
        "attn_logit_softcapping": keys.attn_logit_softcapping,
        "final_logit_softcapping": keys.final_logit_softcapping,
    }


def _gemma3_config(file: GgufFile, keys: Gemma3Keys) -> dict[str, Any]:
    return _decoder_config(file, keys) | {
        "query_pre_attn_scalar": _score_scalar(keys, largest=62),
        # The class makes a mask of a window even where no layer has one.
        "sliding_window": keys.sliding_window or keys.context_length,
        "layer_types": window_layers(file, keys, period=6),
        "final_logit_softcapping": keys.final_logit_softcapping or None,
        "rope_parameters": {
            "full_attention": _whole_heads(file, keys),
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.freq_base_swa},
        },
    }


def _phi3_config(file: GgufFile, keys: Phi3Keys) -> dict[str, Any]:
    config = _decoder_config(file, keys)
    head_dim = config.pop("head_dim")
    rotated = head_dim if keys.rotated is None else keys.rotated
    if rotated > head_dim or rotated % 2 or head_dim * keys.head_count != keys.embedding_length:
        raise SourceError(
            f"{file.path} rotates {rotated} of {head_dim} features of its {keys.head_count} heads, "
            "which Phi-3's class cannot.",
            CHECKPOINT,
        )
    share = rotated / head_dim
    if int(head_dim * share) != rotated:
        share = math.nextafter(share, 2.0)  # the class rounds down
    rope = rope_parameters(file, keys, rotated) | {"partial_rotary_factor": share}
    if rope["rope_type"] not in ("default", "longrope"):
        raise SourceError(
            f"{file.path} scales positions by {rope['rope_type']!r}, which Phi-3's class does not "
            "know.",
            CHECKPOINT,
        )
    return config | {
        "rope_parameters": rope,
        "partial_rotary_factor": share,
        "original_max_position_embeddings": keys.original_context or keys.context_length,
        "sliding_window": keys.sliding_window or None,
    }


def _gpt2_config(file: GgufFile, keys: Gpt2Keys) -> dict[str, Any]:
    if keys.key_heads != keys.head_count or (
        keys.head_dim * keys.head_count != keys.embedding_length
    ):
        raise SourceError(
            f"{file.path} has {keys.head_count} heads of {keys.head_dim} features, "
            f"{keys.key_heads} of them with keys, which GPT-2's class cannot hold.",
            CHECKPOINT,
        )
    return {
        "n_embd": keys.embedding_length,
        "n_inner": keys.feed_forward_length,
        "n_layer": keys.block_count,
        "n_head": keys.head_count,
        "n_positions": keys.context_length,
        "layer_norm_epsilon": keys.layer_norm_eps,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", RotaryKeys, _full_attention_config, LLAMA_OUTER,
        "model.layers", LLAMA_INNER, ATTENTION_BIAS | {"mlp_bias": FFN}, (FREQS, LONG, SHORT),
        SILU | PERMUTED, paired_heads=True,
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", RotaryKeys, _full_attention_config, LLAMA_OUTER,
        "model.layers", LLAMA_INNER, {"": QKV}, neutral=SILU | AS_TRAINED,
    ),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", RotaryKeys, _full_attention_config, LLAMA_OUTER,
        "model.layers", LLAMA_INNER | QK_NORMS, ATTENTION_BIAS, neutral=SILU | AS_TRAINED,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", Gemma2Keys, _gemma2_config, LLAMA_OUTER, "model.layers",
        GEMMA_INNER, ATTENTION_BIAS, neutral=GELU | AS_TRAINED, gains_plus_one=True,
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", Gemma3Keys, _gemma3_config, LLAMA_OUTER,
        "model.layers", GEMMA_INNER | QK_NORMS, ATTENTION_BIAS, neutral=GELU | AS_TRAINED,
        gains_plus_one=True,
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", Phi3Keys, _phi3_config, LLAMA_OUTER, "model.layers",
        PHI3_INNER, rotary=(LONG, SHORT), neutral=SILU | AS_TRAINED,
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel", Gpt2Keys, _gpt2_config, GPT2_OUTER, "transformer.h",
        GPT2_INNER, {"": (*GPT2_INNER, "output_norm")},
        neutral={"hidden_activation": "gelu_new"} | AS_TRAINED,
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ),
}  # fmt: skip
"""Architectures by the name that the file states; Mistral's files call themselves llama."""


def find_architecture(file: GgufFile) -> Architecture:
    """Return how the model of a file is read.

    Raises:
        SourceError: It is of an architecture that is not read.
    """
    if file.architecture not in ARCHITECTURES:
        raise SourceError(
            f"{file.path} holds a model of the architecture {file.architecture!r:.60}, which is "
            "not read from GGUF files.",
            f"Known are {', '.join(sorted(ARCHITECTURES))}; give the safetensors checkpoint of "
            "the model instead.",
        )
    return ARCHITECTURES[file.architecture]


def gguf_config(file: GgufFile, vocabulary: Vocabulary | None) -> PretrainedConfig:
    """Return the transformers config of a GGUF file.

    Args:
        vocabulary: The file's, which knows the special tokens.

    Raises:
        SourceError: The architecture is unknown, or an entry is missing, out of range or not read
            though it may change the model's numbers.
    """
    from transformers import AutoConfig

    architecture = find_architecture(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(
            f"{file.path} has no tensor 'token_embd.weight'.",
            "The file is incomplete; convert the model again.",
        )
    keys = model_keys(file, architecture.schema, architecture.neutral)
    entries: dict[str, Any] = {
        "architectures": [architecture.causal_model],
        # The tokens listed may be fewer than the rows of a padded embedding.
        "vocab_size": embedding.shape[0],
        # llama.cpp writes the output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": torch.float32,
    }
    for flag, parts in architecture.biases.items():
        if flag:
            entries[flag] = has_biases(file, parts)
    if vocabulary is not None and len(vocabulary.tokens) > embedding.shape[0]:
        raise SourceError(
            f"{file.path} lists {len(vocabulary.tokens)} tokens and embeds {embedding.shape[0]}.",
            "The file is damaged; convert the model again.",
        )
    special = vocabulary.special if vocabulary is not None else {}
    entries |= {f"{name}_token_id": special.get(name) for name in ("bos", "pad")}
    ends = vocabulary.ends if vocabulary is not None else []
    entries["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    entries |= architecture.config(file, keys)
    try:
        return AutoConfig.for_model(architecture.model_type, **entries)
    except Exception as error:
        # Config classes check their entries with assorted error types.
        raise SourceError(
            f"The metadata of {file.path} gives no valid {architecture.model_type} config: "
            f"{first_line(error)}.",
            "The file is incomplete; convert the model again.",
        ) from error


def has_biases(file: GgufFile, parts: tuple[str, ...]) -> bool:
    """Say whether one of the modules has a bias in any block of the file."""
    wanted = {f"{part}.bias" for part in parts}
    if set(QKV) & set(parts):
        wanted.add("attn_qkv.bias")
    return any(
        name.startswith("blk.") and name.split(".", 2)[-1] in wanted for name in file.tensors
    )
