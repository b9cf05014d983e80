"""How text is to be generated with a model: what ends it, and how tokens are drawn.

Hugging Face folders say it in generation_config.json, older ones in config.json, GGUF files in
their metadata. A program keeps it in `generation`, in the words of generation_config.json; emitters
write it in those of each runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from graphopt.files.confined import inside
from graphopt.support.inputs import OpenSchema, parse, read_json

GENERATION_NAME = "generation_config.json"

MAX_BYTES = 2**20
"""The largest generation_config.json; lists of suppressed tokens are the longest things in it."""

TokenId = Annotated[int, pydantic.Field(ge=-(2**31), lt=2**31)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

NO_EFFECT = frozenset(
    {
        "_from_model_config", "_commit_hash", "transformers_version", "use_cache", "max_length",
        "max_new_tokens", "cache_implementation", "return_dict_in_generate", "output_scores",
        "output_attentions", "output_hidden_states", "output_logits", "num_return_sequences",
        "length_penalty", "early_stopping", "max_time",
    }
)  # fmt: skip
"""Entries that change no token of a text that is generated one by one, up to a length given."""

NEUTRAL: Mapping[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1,
    "diversity_penalty": 0.0, "num_beam_groups": 1, "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "top_h": 1.0,
    "encoder_no_repeat_ngram_size": 0, "renormalize_logits": False,
}  # fmt: skip
"""Values with which other entries change nothing."""


class GenerationSettings(OpenSchema):
    """What graphopt takes of a generation_config.json.

    Attributes:
        bos_token_id: Begins a text.
        eos_token_id: Tokens that end a text.
        pad_token_id: Fills up shorter texts of a batch.
        do_sample: Draw tokens, rather than take the likeliest.
        temperature: The logits are divided by it.
        top_k: Draw from so many of the likeliest; 0 for all.
        top_p: Draw from the fewest tokens whose probabilities reach this sum.
        min_p: Draw from tokens at least this share as likely as the likeliest.
        repetition_penalty: Logits of tokens that are in the text are divided by it where they are
            positive, and multiplied by it where they are not.
    """

    bos_token_id: TokenId | None = None
    eos_token_id: Annotated[tuple[TokenId, ...], pydantic.Field(max_length=1024)] = ()
    pad_token_id: TokenId | None = None
    do_sample: bool = False
    temperature: Annotated[float, pydantic.Field(ge=0, le=1e4)] = 1.0
    top_k: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 50
    top_p: Share = 1.0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, pydantic.Field(gt=0, le=1e4)] = 1.0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """Null is what is not stated, and one end token is a list of one."""
        if not isinstance(data, Mapping):
            raise ValueError("it should be an object")
        found = {name: value for name, value in data.items() if value is not None}
        ends = found.get("eos_token_id", ())
        found["eos_token_id"] = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
        return found

    @pydantic.field_validator("bos_token_id", "pad_token_id")
    @classmethod
    def _no_negative(cls, token: int | None) -> int | None:
        """Some configs state -1 for a token that there is not."""
        return None if token is None or token < 0 else token

    @pydantic.field_validator("eos_token_id")
    @classmethod
    def _known(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(token for token in tokens if token >= 0))

    @classmethod
    def of(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> GenerationSettings:
        """Return the settings of a model.

        What its generation config states comes before what its config does, as transformers has
        it; and of a config, the outer one before that of its language model.

        Raises:
            SourceError: An entry is of a wrong type or out of range.
        """
        stated: dict[str, Any] = {}
        inner = config.get("text_config")
        for data in (inner if isinstance(inner, Mapping) else {}, config):
            stated |= {name: data[name] for name in _TOKENS if data.get(name) is not None}
        stated |= {name: value for name, value in generation.items() if value is not None}
        return parse(cls, stated, "The generation settings", remedy=_REMEDY)


_REMEDY = f"Correct {GENERATION_NAME}, or compile the model again."


def read_generation(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a model folder says of generation, in the words of generation_config.json.

    Args:
        config: The content of its config.json, which says it where there is no such file.

    Raises:
        SourceError: The file is a link out of the folder or no JSON object, or an entry is of a
            wrong type or out of range.
    """
    path = folder / GENERATION_NAME
    if path.exists():
        data = read_json(inside(folder, GENERATION_NAME), limit=MAX_BYTES)
        where, remedy = str(path), "Correct it, or delete the file."
    else:
        wanted = [*GenerationSettings.model_fields, *NEUTRAL]
        data = {name: (config or {})[name] for name in wanted if name in (config or {})}
        where, remedy = str(folder / "config.json"), "Correct the entry."
    parse(GenerationSettings, data, where, remedy=remedy)
    return {name: value for name, value in data.items() if value is not None}


def not_applied(generation: Mapping[str, Any]) -> list[str]:
    """Return the entries that would change the text, and that graphopt does not heed."""
    return sorted(
        name
        for name, value in generation.items()
        if name not in GenerationSettings.model_fields
        and name not in NO_EFFECT
        and value not in (None, [], {}, False)
        and not (name in NEUTRAL and value == NEUTRAL[name])
    )
