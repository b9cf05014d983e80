"""Small random mixtures of experts of several families, and leaving them with fewer experts."""

from __future__ import annotations

import functools
from typing import Any

from families import FAMILIES, UNLISTED, random_model
from torch import nn

from graphopt.capture import capture
from graphopt.ir import Program
from graphopt.ir.blocks import find_blocks
from graphopt.ir.layer_config import shrink_expert_counts
from graphopt.ir.mixture import Mixture, find_mixtures, keep_experts
from graphopt.ir.verify import verify

_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
          "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 40}  # fmt: skip
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
           "v_head_dim": 16, "first_k_dense_replace": 1, "n_routed_experts": 8,
           "moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_group": 2,
           "topk_group": 1}  # fmt: skip

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 16, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy", "n_shared_experts": 1},
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24},
    "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                 "first_k_dense_replace": 1, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
}  # fmt: skip


def mixture_model(family: str, **changes: Any) -> nn.Module:
    """Return a random model of two blocks with eight experts, and every bias in use."""
    if family not in FAMILIES:
        UNLISTED[family] = FAMILIES[family] = {}
    return random_model(family, **{**_SIZES, **MIXTURES[family], **changes})


def program_of(model: nn.Module) -> Program:
    program = capture(model)
    program.config = model.config.to_dict()
    return program


@functools.cache
def mixture(family: str) -> tuple[nn.Module, Program]:
    """Return a family's random model, which nobody may change, and its program, likewise."""
    model = mixture_model(family)
    return model, program_of(model)


def drop(program: Program, kept: list[int]) -> Program:
    """Return a program with these experts left in all mixtures."""
    places = {block.position: index for index, block in enumerate(find_blocks(program))}
    mixtures = find_mixtures(program)
    assert all(isinstance(mixture, Mixture) for _, mixture in mixtures)
    pruned = program.copy()
    keep_experts(pruned, {places[block.position]: kept for block, _ in mixtures})
    shrink_expert_counts(pruned.config, 8, len(kept))
    verify(pruned)
    return pruned
