"""Generating text: prompts and conversations, and the tokens that follow, one by one."""

from graphopt.generate.conversation import Conversation, generate
from graphopt.generate.decoding import PieceDecoder, end_tokens, generate_ids
from graphopt.generate.prompts import encode_prompt, read_prompts
from graphopt.generate.sampling import Sampling, pick_token, token_odds

__all__ = [
    "Conversation",
    "PieceDecoder",
    "Sampling",
    "encode_prompt",
    "end_tokens",
    "generate",
    "generate_ids",
    "pick_token",
    "read_prompts",
    "token_odds",
]
