"""Small transformers models, tokenizers and GGUF files that tests write to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from graphopt.capture.model import attention_implementation

VOCAB = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
CHAT_TEMPLATE = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"


def tiny_model(model_type: str = "llama", **entries: Any) -> PreTrainedModel:
    """Return a random model with weights large enough that every feature shows in the logits."""
    sizes = {} if model_type == "gpt2" else SIZES
    torch.manual_seed(0)
    given = {key: value for key, value in (sizes | entries).items() if value is not None}
    config = AutoConfig.for_model(model_type, **given)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, attn_implementation=attention_implementation(config)
    )
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    return model


def byte_tokenizer(
    chat: bool = False, begin: Sequence[str] = (), end: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 256 bytes, two merges and the end token <end>.

    Args:
        begin, end: Special tokens that a post-processor puts before and behind every text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", *begin, *end])
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*begin, *end)],
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<end>",
        bos_token=begin[0] if begin else None,
        chat_template=CHAT_TEMPLATE if chat else None,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(folder: Path, model_type: str = "llama", shard: str = "5GB", **entries: Any) -> Path:
    """Write a random model with a tokenizer and return its folder."""
    tiny_model(model_type, **entries).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


GGUF_ARCHITECTURES: dict[str, tuple[gguf.MODEL_ARCH, dict[str, Any]]] = {
    "llama": (gguf.MODEL_ARCH.LLAMA, {"tie_word_embeddings": False}),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, {"tie_word_embeddings": True}),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma2": (
        gguf.MODEL_ARCH.GEMMA2,
        {
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        gguf.MODEL_ARCH.GEMMA3,
        {
            "num_hidden_layers": 7,  # the sixth is the first without a window
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": (
        gguf.MODEL_ARCH.PHI3,
        {"head_dim": None, "sliding_window": 8, "pad_token_id": 0, "tie_word_embeddings": False},
    ),
    "gpt2": (
        gguf.MODEL_ARCH.GPT2,
        {"vocab_size": VOCAB, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4,
         "n_positions": 128},
    ),
}  # fmt: skip
"""transformers' type -> (the format's architecture, config entries of the test model)."""


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows as llama.cpp's conversion of Llama does."""
    rows = weight.shape[0] // heads
    order = [h * rows + half * rows // 2 + i
             for h in range(heads) for i in range(rows // 2) for half in (0, 1)]  # fmt: skip
    return weight[order]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: gguf.MODEL_ARCH,
    *,
    encoding: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    tokenizer: bool = False,
    entries: dict[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter would, with names from the gguf package's own map.

    Args:
        path: File to write.
        model: What it holds.
        architecture: The format's name for it.
        encoding: Of the matrices.
        extra: Further tensors.
        tokenizer: Write the vocabulary of `byte_tokenizer` too.
        entries: Metadata that is set, or left out where None; names that begin with a dot are of
            the architecture. A pair is a value and its type in the format.
        change: Changes the tensors, by the format's names, before they are written.
    """
    config = model.config
    name = gguf.MODEL_ARCH_NAMES[architecture]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = config.n_inner if name == "gpt2" else config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = getattr(config, "head_dim", None) or 8
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        rope = config.rope_parameters
        if name == "gemma3":
            rope = rope["full_attention"]
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.get("factor", 1.0))
        writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "sliding_window", None) and name != "qwen2":
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if tokenizer:
        add_tokenizer(writer)
    for key, value in (entries or {}).items():
        full = name + key if key.startswith(".") else key
        writer.kv_data[0].pop(full, None)
        if value is not None:
            stated = value if isinstance(value, tuple) else (value, None)
            kind = stated[1] or gguf.GGUFValueType.get_type(stated[0])
            writer.add_key_value(full, stated[0], kind)
    tensors = gguf_tensors(model, architecture)
    if change is not None:
        change(tensors)
    for target, array in tensors.items():
        plain = array.ndim == 1 or encoding == gguf.GGMLQuantizationType.F32
        if plain:
            writer.add_tensor(target, array)
        else:
            writer.add_tensor(target, gguf.quants.quantize(array, encoding), raw_dtype=encoding)
    for key, array in (extra or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: PreTrainedModel, architecture: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    """Return a model's tensors under the format's names and in its layout."""
    config, name = model.config, gguf.MODEL_ARCH_NAMES[architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, key
        if name == "llama" and ".q_proj." in key:
            value = pairs_from_halves(value, config.num_attention_heads)
        if name == "llama" and ".k_proj." in key:
            value = pairs_from_halves(value, config.num_key_value_heads)
        if name.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        if name == "gpt2" and key.endswith(".weight") and (".c_" in key):
            value = value.t()
        tensors[target] = value.contiguous().numpy()
    return tensors


def add_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    """Write the vocabulary of `byte_tokenizer` as metadata."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(CHAT_TEMPLATE)
