"""Small random models of many families, in which every feature shows in the logits.

Weights have standard deviation 0.15, biases are not zero, gains are random around one, soft-caps
are 2 and windows 5: leaving out any one feature moves the logits far beyond the tolerance.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.capture.model import attention_implementation
from graphopt.ir.graph import Program

TOLERANCE = 1e-4
"""Allowed error of logits, times max(1, largest logit)."""

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama(**changes: Any) -> dict[str, Any]:
    return {**_LLAMA, **changes}


LISTED: dict[str, dict[str, Any]] = {
    "llama": _llama(attention_bias=True, mlp_bias=True),
    "mistral": _llama(sliding_window=5),
    "qwen2": _llama(use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": _llama(head_dim=16),
    "gemma2": _llama(head_dim=16, sliding_window=5, query_pre_attn_scalar=24, **_CAPS),
    "gemma3_text": _llama(
        head_dim=16,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=24,
    ),
    "phi3": _llama(partial_rotary_factor=0.5),
    "gpt2": _GPT,
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 64,
        **_IDS,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "rotary_pct": 0.25,
        "max_position_embeddings": 256,
        **_IDS,
    },
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "multi_query": True,
        **_IDS,
    },
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 128, **_IDS},
    "stablelm": _llama(partial_rotary_factor=0.5, use_qkv_bias=True),
    "cohere": _llama(logit_scale=0.5, use_qk_norm=True),
    "olmo2": _llama(),
    "granite": _llama(
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "smollm3": _llama(no_rope_layers=[1, 0, 1, 0]),
}
"""The families that must capture, run and export."""

UNLISTED: dict[str, dict[str, Any]] = {
    "gemma": _llama(head_dim=16),
    "phi": _llama(partial_rotary_factor=0.5),
    "cohere2": _llama(logit_scale=0.5, sliding_window=5),
    "olmo": _llama(clip_qkv=1.0),
    "gptj": {**_GPT, "rotary_dim": 8},
    "codegen": {**_GPT, "rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "vocab_size": 128, "max_seq_len": 256},
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "vocab_size": 128,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "max_position_embeddings": 256,
        **_IDS,
    },
    "gpt_bigcode": _GPT,
    "starcoder2": _llama(sliding_window=5, use_bias=True),
    "nemotron": _llama(),
    "glm": _llama(head_dim=16, partial_rotary_factor=0.5),
    "persimmon": _llama(),
    "xglm": {
        "d_model": 64,
        "num_layers": 4,
        "attention_heads": 4,
        "ffn_dim": 96,
        "vocab_size": 128,
        **_IDS,
    },
    "biogpt": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        **_IDS,
    },
    "apertus": _llama(),
    "exaone4": _llama(sliding_window=5, sliding_window_pattern=2),
    "gpt_oss": _llama(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "mixtral": _llama(num_local_experts=4),
    "granitemoe": _llama(num_local_experts=4, residual_multiplier=0.5),
    "qwen3_moe": _llama(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "deepseek_v3": _llama(
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
    "llama4_text": _llama(
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        attention_chunk_size=5,
        no_rope_layers=[1, 1, 1, 0],
    ),
    "gemma4_text": _llama(
        head_dim=16,
        global_head_dim=32,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=5,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
    ),
    "jetmoe": {
        **_IDS,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
    },
    "ctrl": {**_GPT, "dff": 96},
    "diffllama": _llama(num_hidden_layers=2),  # no two layers are alike: each is captured
    "nanochat": _llama(),
    "olmo3": _llama(sliding_window=5),
}
"""Families nobody promised: capture looks at dataflow alone, so they work as well."""

FAMILIES = {**LISTED, **UNLISTED}

FEATURES = {
    "RMS norms, rotation of all of a head, a gate, heads in groups, biases": "llama",
    "learned positions, a tied head, transposed weights, fused QKV, no gate, layer norms": "gpt2",
    "parallel residual, QKV fused head by head, a part of a head rotated": "gpt_neox",
    "one key head, one norm for both parts": "falcon",
    "ALiBi, a norm of embeddings": "bloom",
    "QKV fused by rows, gate and up in one matrix": "phi3",
    "norms behind the parts, windows in every second layer, soft-caps, scaled embeddings": "gemma2",
    "neighbours rotated, norms of queries and keys, scaled logits": "cohere",
    "sinks, a mixture of experts with biases": "gpt_oss",
    "latent attention, shared experts, dense layers in front of mixtures": "deepseek_v3",
    "keys and values of another layer, two head sizes, embeddings of every layer": "gemma4_text",
}
"""What a program can be made of, and the family that stands for it.

Capture is held to eager in every family, each time. What stands on the program alone is tested on
these, which between them have every feature, and on the other families with -m exhaustive.
"""


def mostly_slow(
    values: Iterable[str],
    quick: Collection[str] = ("llama", "gpt2"),
    rare: Collection[str] = (),
) -> list[Any]:
    """Return values of a test's parameter; all but a few, which the inner loop runs, are slow.

    Those in `rare`, which others stand for, are exhaustive.
    """

    def marks(value: str) -> Any:
        if value in rare:
            return pytest.mark.exhaustive
        return () if value in quick else pytest.mark.slow

    return [pytest.param(value, marks=marks(value)) for value in values]


def sampled(families: Iterable[str], quick: Collection[str] = ("llama", "gpt2")) -> list[Any]:
    """Return families as a test's parameter; those that others stand for are exhaustive."""
    families = list(families)
    return mostly_slow(families, quick, rare=set(families).difference(FEATURES.values()))


@dataclass
class Case:
    """One batch: ids, mask and positions, all int64 [B, S]."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def __str__(self) -> str:
        pads = (self.attention_mask == 0).sum(1).tolist()
        return f"batch {len(pads)}, length {self.input_ids.shape[1]}, padding {pads}"


def random_model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a model of the family in which every parameter matters.

    Args:
        changes: Entries of the config that differ from the family's here.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**FAMILIES[family] | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention_implementation(config)
    )
    randomise(model, seed)
    return model.eval()


@functools.cache
def _captured(family: str) -> tuple[nn.Module, Program]:
    model = random_model(family)
    return model, capture(model)


def captured(family: str) -> tuple[nn.Module, Program]:
    """Return a family's random model, which nobody may change, and a program of it.

    Many tests begin with it, and a capture takes longer than most of what they do with it.
    """
    model, program = _captured(family)
    return model, program.copy()


EVERY_EXPERT = {
    name: {"num_experts_per_tok": 4}
    for name in ("gpt_oss", "mixtral", "granitemoe", "qwen3_moe", "deepseek_v3", "llama4_text",
                 "jetmoe")
}  # fmt: skip
"""Families with experts, and what makes each token run all of them: without a choice, rounding
moves the logits a little, and not to those of other experts."""


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter so that it matters: biases are not zero, gains are around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            is_gain = parameter.dim() == 1 and not any(w in name for w in ("bias", "sink"))
            parameter.copy_(noise + 1.0 if is_gain else noise)


def cases(lengths: tuple[int, ...] = (1, 7, 64), vocab: int = 128) -> list[Case]:
    """Return batches of one and three, with and without left padding."""
    generator = torch.Generator().manual_seed(1)
    found: list[Case] = []
    for batch in (1, 3):
        for length in lengths:
            for padded in (False, True) if batch > 1 and length > 1 else (False,):
                ids = torch.randint(3, vocab, (batch, length), generator=generator)
                mask = torch.ones(batch, length, dtype=torch.long)
                if padded:
                    mask[1, : length // 3] = 0
                    mask[2, :1] = 0
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                found.append(Case(ids, mask, positions))
    return found


def eager_logits(model: nn.Module, case: Case) -> Tensor:
    """Return what transformers computes, given as many of the inputs as the model takes."""
    accepted = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in case.inputs.items() if name in accepted}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def error(expected: Tensor, actual: Tensor, case: Case) -> float:
    """Return the largest error at real tokens, relative to max(1, largest logit)."""
    real = case.attention_mask.bool()
    largest = max(1.0, float(expected[real].abs().max()))
    return float((expected - actual)[real].abs().max()) / largest
