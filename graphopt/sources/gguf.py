"""GGUF models: their metadata as a transformers config, their tensors under checkpoint names.

llama.cpp renames tensors, permutes the rows of Llama's query and key projections, adds one to
Gemma's norm gains and transposes GPT-2's projections. All of it is undone here, lazily, tensor by
tensor, so that a GGUF file captures like the checkpoint it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import SourceError, reason
from graphopt.ir.weights import Producer, Transposed
from graphopt.sources.base import Kind, ModelSource
from graphopt.sources.gguf_file import GgufFile, read_gguf
from graphopt.sources.gguf_tokenizer import gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class HalvesFromPairs(Producer):
    """Rows of each head put back from rotary pairs (0, 1), (2, 3), ... to halves (0, D/2), ...

    llama.cpp stores Llama's query and key projections for the interleaved form of rotary
    embedding; transformers computes the other one.
    """

    source: Producer
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        value = self.source.load()
        pairs = value.view(self.heads, -1, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)


@dataclass(frozen=True)
class LessOne(Producer):
    """The tensor minus one: Gemma's gains are `1 + weight`, which llama.cpp stores whole."""

    source: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load() - 1


@dataclass(frozen=True)
class Architecture:
    """How models of one GGUF architecture are read.

    Attributes:
        model_type: transformers' name.
        causal_model: transformers' class, for `config.architectures`.
        config: The rest of the config, from the header.
        outer: GGUF module name -> checkpoint module name, outside the layers.
        layers: The checkpoint's path of the layers.
        inner: The same as `outer`, inside a layer.
        paired_heads: Query and key rows are stored for interleaved rotary embedding.
        gains_plus_one: Norm gains are stored with one added.
        transposed: Checkpoint modules whose weight the checkpoint keeps as [in, out].
    """

    model_type: str
    causal_model: str
    config: Callable[[GgufFile], dict[str, Any]]
    outer: dict[str, str]
    layers: str
    inner: dict[str, str]
    paired_heads: bool = False
    gains_plus_one: bool = False
    transposed: frozenset[str] = field(default_factory=frozenset)


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

# Tensors that belong to the rotary embedding, not to a module of the checkpoint.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def _decoder_config(file: GgufFile) -> dict[str, Any]:
    """The entries that all architectures but GPT-2 share."""
    arch, entries = file.architecture, file.metadata
    heads = file.expect(f"{arch}.attention.head_count", int)
    hidden = file.expect(f"{arch}.embedding_length", int)
    head_dim = entries.get(f"{arch}.attention.key_length") or (hidden // heads)
    if entries.get(f"{arch}.expert_count", 0) > 0:
        raise SourceError(
            f"{file.path} holds a mixture of experts, which is not read from GGUF files.",
            "Give the safetensors checkpoint of the model.",
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": file.expect(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": file.expect(f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": entries.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.expect(f"{arch}.context_length", int),
        "rms_norm_eps": file.expect(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(file, head_dim),
    }


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """transformers' `rope_parameters`.

    Raises:
        SourceError: The file scales positions in a way that cannot be expressed.
    """
    arch, entries = file.architecture, file.metadata
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(entries.get(f"{arch}.rope.freq_base", 10000.0)),
    }
    kind = entries.get(f"{arch}.rope.scaling.type", "none")
    factor = entries.get(f"{arch}.rope.scaling.factor", entries.get(f"{arch}.rope.scale_linear"))
    if factor is not None and kind == "none":
        kind = "linear"
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, rope, head_dim)
    if "rope_factors_long.weight" in file.tensors:
        original = file.expect(f"{arch}.rope.scaling.original_context_length", int)
        rope |= {
            "rope_type": "longrope",
            "long_factor": file.tensors["rope_factors_long.weight"].load().tolist(),
            "short_factor": file.tensors["rope_factors_short.weight"].load().tolist(),
            "original_max_position_embeddings": original,
        }
        attention_factor = entries.get(f"{arch}.rope.scaling.attn_factor")
        return rope if attention_factor is None else rope | {"attention_factor": attention_factor}
    if kind == "linear" and factor is not None:
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor is not None:
        original = file.expect(f"{arch}.rope.scaling.original_context_length", int)
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    if kind != "none":
        raise SourceError(
            f"{file.path} scales positions by {kind!r}, which is not supported.",
            "Give the safetensors checkpoint of the model.",
        )
    return rope


def _llama3_rope(file: GgufFile, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, whose GGUF form is one divisor per rotary frequency.

    The file keeps the divisors and not the four numbers they come from. Every release used the
    same three of them, so the fourth is the largest divisor, and the result is compared.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = file.tensors["rope_freqs.weight"].load()
    scaled = rope | {
        "rope_type": "llama3",
        "factor": float(stated.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=scaled
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    divisors = rope["rope_theta"] ** -exponents / frequencies.double()
    if divisors.shape != stated.shape or not torch.allclose(divisors.float(), stated, rtol=1e-4):
        raise SourceError(
            f"{file.path} scales its rotary frequencies in a way other than Llama 3's.",
            "Give the safetensors checkpoint of the model.",
        )
    return scaled


def _llama_config(file: GgufFile) -> dict[str, Any]:
    config = _decoder_config(file)
    rotated = file.metadata.get(f"{file.architecture}.rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise SourceError(
            f"{file.path} rotates {rotated} of {config['head_dim']} features of a head, which "
            "Llama cannot.",
            "Give the safetensors checkpoint of the model.",
        )
    return config | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _gemma2_config(file: GgufFile) -> dict[str, Any]:
    arch, entries = file.architecture, file.metadata
    config = _decoder_config(file)
    # The 27B model, told by its 46 layers, scales queries by the width per head, not by the head.
    large = config["num_hidden_layers"] == 46
    return config | {
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        ),
        "sliding_window": file.expect(f"{arch}.attention.sliding_window", int),
        "attn_logit_softcapping": entries.get(f"{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": entries.get(f"{arch}.final_logit_softcapping"),
    }


def _gemma3_config(file: GgufFile) -> dict[str, Any]:
    arch, entries = file.architecture, file.metadata
    config = _decoder_config(file)
    # As in Gemma 2; here the 27B model has 62 layers.
    large = config["num_hidden_layers"] == 62
    local_theta = float(entries.get(f"{arch}.rope.freq_base_swa", 10000.0))
    return config | {
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        ),
        "sliding_window": file.expect(f"{arch}.attention.sliding_window", int),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _phi3_config(file: GgufFile) -> dict[str, Any]:
    arch, entries = file.architecture, file.metadata
    config = _decoder_config(file)
    rotated = entries.get(f"{arch}.rope.dimension_count", config["head_dim"])
    share = rotated / config.pop("head_dim")
    rope = dict(config["rope_parameters"], partial_rotary_factor=share)
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    return config | {
        "rope_parameters": rope,
        "partial_rotary_factor": share,
        "original_max_position_embeddings": original,
        "sliding_window": entries.get(f"{arch}.attention.sliding_window"),
    }


def _gpt2_config(file: GgufFile) -> dict[str, Any]:
    return {
        "n_embd": file.expect("gpt2.embedding_length", int),
        "n_inner": file.expect("gpt2.feed_forward_length", int),
        "n_layer": file.expect("gpt2.block_count", int),
        "n_head": file.expect("gpt2.attention.head_count", int),
        "n_positions": file.expect("gpt2.context_length", int),
        "layer_norm_epsilon": file.expect("gpt2.attention.layer_norm_epsilon", float),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _llama_config, LLAMA_OUTER, "model.layers", LLAMA_INNER,
        paired_heads=True,
    ),
    "qwen2": Architecture(
        "qwen2", "Qwen2ForCausalLM", _decoder_config, LLAMA_OUTER, "model.layers", LLAMA_INNER
    ),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", _decoder_config, LLAMA_OUTER, "model.layers",
        LLAMA_INNER | QK_NORMS,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _gemma2_config, LLAMA_OUTER, "model.layers", GEMMA_INNER,
        gains_plus_one=True,
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _gemma3_config, LLAMA_OUTER, "model.layers",
        GEMMA_INNER | QK_NORMS, gains_plus_one=True,
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", _phi3_config, LLAMA_OUTER, "model.layers", PHI3_INNER
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel", _gpt2_config, GPT2_OUTER, "transformer.h", GPT2_INNER,
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ),
}  # fmt: skip
"""By the name the file states; Mistral's files call themselves llama."""

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def _find_architecture(file: GgufFile) -> Architecture:
    if file.architecture not in ARCHITECTURES:
        raise SourceError(
            f"{file.path} holds a model of the architecture {file.architecture!r}, which is not "
            "read from GGUF files.",
            f"Known are {', '.join(sorted(ARCHITECTURES))}; give the safetensors checkpoint of "
            "the model instead.",
        )
    return ARCHITECTURES[file.architecture]


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """Return the transformers config of a GGUF file.

    Raises:
        SourceError: The architecture is unknown, or an entry is missing or out of range.
    """
    from transformers import AutoConfig

    architecture = _find_architecture(file)
    if "token_embd.weight" not in file.tensors:
        raise SourceError(
            f"{file.path} has no tensor 'token_embd.weight'.",
            "The file is incomplete; convert the model again.",
        )
    entries: dict[str, Any] = {
        "architectures": [architecture.causal_model],
        # The tokens listed may be fewer than the rows of a padded embedding.
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        # llama.cpp writes the output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": torch.float32,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        entries[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    try:
        entries |= architecture.config(file)
        return AutoConfig.for_model(architecture.model_type, **entries)
    except SourceError:
        raise
    except Exception as error:
        # Config classes check their entries with assorted error types.
        raise SourceError(
            f"The metadata of {file.path} gives no valid {architecture.model_type} config: "
            f"{reason(error)}.",
            "The file is incomplete; convert the model again.",
        ) from error


def gguf_producers(file: GgufFile, config: PretrainedConfig) -> dict[str, Producer]:
    """Return the tensors of a GGUF file under their checkpoint names, as the checkpoint had them.

    Raises:
        SourceError: A tensor has no place in a model of this architecture.
    """
    architecture = _find_architecture(file)
    producers: dict[str, Producer] = {}
    for name, tensor in file.tensors.items():
        if name in ROPE_TENSORS:
            continue  # they are in the config
        match = _LAYER.fullmatch(name)
        if match:
            layer, part, suffix = match.groups()
            module = architecture.inner.get(part)
            path = f"{architecture.layers}.{layer}.{module}"
        else:
            part, _, suffix = name.rpartition(".")
            module = architecture.outer.get(part)
            path = f"{module}"
        if module is None:
            raise SourceError(
                f"{file.path}: the tensor {name!r} has no place in a "
                f"{architecture.model_type} model.",
                "Give the safetensors checkpoint of the model.",
            )
        producer: Producer = tensor
        if architecture.paired_heads and part in ("attn_q", "attn_k"):
            query = part == "attn_q"
            heads = config.num_attention_heads if query else config.num_key_value_heads
            if tensor.shape[0] % (2 * heads):
                raise SourceError(
                    f"{file.path}: {tensor.shape[0]} rows of {name!r} do not make {heads} heads.",
                    "The file is incomplete; convert the model again.",
                )
            producer = HalvesFromPairs(tensor, heads)
        if architecture.gains_plus_one and part.endswith("norm"):
            producer = LessOne(tensor)
        if suffix == "weight" and module in architecture.transposed:
            producer = Transposed(tensor)
        producers[f"{path}.{suffix}"] = producer
    return producers


def open_gguf(spec: str, path: Path, kind: Kind = "gguf", name: str = "") -> ModelSource:
    """Open a .gguf file.

    Args:
        spec: What the user named.
        path: The file.
        kind: "demo" for the embedded model.
        name: Short name; by default the file's.

    Raises:
        SourceError: The file is damaged or its architecture or tokenizer is not supported.
    """
    file = read_gguf(path)
    config = gguf_config(file)
    return ModelSource(
        spec=spec,
        name=name or path.stem,
        kind=kind,
        config=config,
        producers=gguf_producers(file, config),
        tokenizer=gguf_tokenizer(file),
        dtype=torch.float32,
    )
