"""genai_config.json: what onnxruntime-genai needs to run a model."""

from __future__ import annotations

import inspect
from typing import Any

from graphopt.ir.context import context_length, rotary_switch
from graphopt.ir.graph import Program
from graphopt.lowering.onnx import genai_generate
from graphopt.sources.generation import GenerationSettings
from graphopt.support.plain import plain_text_source

GENAI_NAME = "genai.onnx"
"""The graph for onnxruntime-genai, which shares its data file with `model.onnx`.

Around its attentions there is no branch, through which a cache could not be extended in place.
"""

RUN_NAME = "generate.py"
"""The script that runs it: `run_script`."""


def run_script() -> str:
    """Return the text of `generate.py`: `genai_generate`, and what it imports of graphopt."""
    text = inspect.getsource(genai_generate)
    outside = "from graphopt.support.plain import plain_text\n"
    return text.replace("import json\n", "import json\nimport re\n").replace(
        outside, plain_text_source()
    )


def why_not(program: Program) -> str | None:
    """Return why onnxruntime-genai cannot run the program; None where it can."""
    states = list(program.states.values())
    if not states:
        return "it has no KV cache (insert-kv-cache gives it one, or says why not)"
    if any(state.policy is not None for state in states):
        return "it hands on no state of a policy beside keys and values"
    first = states[0]
    if any((s.heads, s.k_dim, s.v_dim) != (first.heads, first.k_dim, first.k_dim) for s in states):
        return "its layers' caches differ in heads or head size"
    if program.tokenizer is None:
        return "it has no tokenizer"
    return None


_PHI3_SWITCH = 4096
"""Where genai reads the one text of a generation again, for models of type `phi3`.

Source: onnxruntime-genai's pull request 1161; the length is not taken from the config.
"""


def _type(program: Program) -> str:
    """Return a name of genai's own list for plain decoders; nothing else hangs on it."""
    return "phi3" if rotary_switch(program) == _PHI3_SWITCH else "llama"


def genai_config(program: Program, heads: int, in_place: bool) -> dict[str, Any]:
    """Return the config of a program that `why_not` has nothing against.

    Args:
        heads: Query heads of an attention.
        in_place: Every attention can write new keys into the buffer that holds the old ones.
    """
    config = program.config
    text = config.get("text_config") or config
    states = list(program.states.values())
    settings = GenerationSettings.of(config, program.generation)
    ends = list(settings.eos_token_id) or [0]
    pad = ends[0] if settings.pad_token_id is None else settings.pad_token_id
    length = context_length(program) or 2048
    hidden = text.get("hidden_size") or text.get("n_embd") or heads * states[0].k_dim
    return {
        "model": {
            "bos_token_id": settings.bos_token_id or 0,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GENAI_NAME,
                "head_size": states[0].k_dim,
                "hidden_size": hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": heads,
                "num_hidden_layers": len(states),
                "num_key_value_heads": states[0].heads,
            },
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": pad,
            "type": _type(program),
            "vocab_size": text.get("vocab_size", 0),
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": settings.do_sample and settings.temperature > 0,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": length,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": in_place,
            "repetition_penalty": settings.repetition_penalty,
            "temperature": settings.temperature or 1.0,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        },
    }
