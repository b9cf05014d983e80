"""What a config.json may say, before transformers makes a config of it.

transformers' config classes check the types of some entries and the sizes of none: a layer count
of 2^70 fills the memory while the class lists its layers, and none at all gives a model without
blocks. The sizes that every family has are checked here, under the name that a family gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pydantic

from graphopt.errors import SourceError
from graphopt.support.inputs import OpenSchema, parse
from graphopt.support.plain import shown

Token = Annotated[int, pydantic.Field(ge=-1, le=2**31)]


Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Factors = Annotated[list[Positive], pydantic.Field(max_length=2**13)]


class RopeEntries(OpenSchema):
    """What the rotary embedding is computed from, of all layers or of the layers of one type."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Annotated[int, pydantic.Field(ge=1, le=2**31)] | None = None
    attention_factor: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    partial_rotary_factor: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    truncate: bool | None = None


class ConfigEntries(OpenSchema):
    """The entries that are no sizes and that code relies on."""

    model_type: Annotated[str, pydantic.Field(max_length=100)] | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    layer_types: list[str] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None


SIZES: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 512),
    "hidden_size": (1, 2**18),
    "intermediate_size": (1, 2**22),
    "num_attention_heads": (1, 2**13),
    "num_key_value_heads": (1, 2**13),
    "head_dim": (1, 2**13),
    "vocab_size": (1, 2**24),
    "max_position_embeddings": (1, 2**26),
    "num_local_experts": (0, 2**15),
    "num_experts": (0, 2**15),
    "n_routed_experts": (0, 2**15),
    "num_experts_per_tok": (0, 2**13),
    "moe_intermediate_size": (0, 2**22),
    "kv_lora_rank": (0, 2**18),
    "q_lora_rank": (0, 2**18),
    "qk_rope_head_dim": (0, 2**13),
    "qk_nope_head_dim": (0, 2**13),
    "v_head_dim": (0, 2**13),
}
"""The least and the largest value of sizes, by transformers' own names. The largest known are 126
layers, a width of 18,432 and 10 million positions; the bounds keep what is built in reach."""


def _sizes(value: Any) -> Iterator[Any]:
    """Yield a size, or the sizes of a list with one a layer."""
    if isinstance(value, list):
        yield from value
    elif value is not None:
        yield value


def check_config(path: Any, data: Any, names: Mapping[str, str]) -> None:
    """Check the entries of a config that hold for every family, in configs within it as well.

    Args:
        path: The file, for messages.
        data: What the JSON file holds.
        names: transformers' names of sizes -> the family's own.

    Raises:
        SourceError: Naming the entry, what it is and what it may be.
    """
    remedy = "Correct the entry, or download the file again."
    entries = parse(ConfigEntries, data, str(path), remedy=remedy)
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(f"{path}: {name}", getattr(entries, name) or {}, remedy)
    check_sizes(path, data, names, remedy=remedy)


def _check_rope(where: str, entries: dict[str, Any], remedy: str) -> None:
    parse(RopeEntries, entries, where, remedy=remedy)
    for layers, own in entries.items():
        if isinstance(own, dict):  # of the layers of one type
            parse(RopeEntries, own, f"{where}.{layers}", remedy=remedy)


def check_sizes(
    path: Any, entries: Mapping[str, Any], names: Mapping[str, str], *, remedy: str
) -> None:
    """Check sizes of a config, in configs within it as well; see `check_config`."""
    for name, (least, most) in SIZES.items():
        for own in {name, names.get(name, name)}:
            for size in _sizes(entries.get(own)):
                if type(size) is not int or not least <= size <= most:
                    raise SourceError(
                        f"{path}: the entry {own!r} is {shown(size)}, and it should be a whole "
                        f"number from {least} to {most}.",
                        remedy,
                    )
    for value in entries.values():
        if isinstance(value, dict):
            check_sizes(path, value, names, remedy=remedy)


CODE_ENTRIES = (
    "auto_map", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels",
    "custom_generate",
)  # fmt: skip
"""Entries by which a config names code: classes of the checkpoint, and kernels that transformers
downloads from the hub and imports. A leading underscore and an end `_internal` are the same."""


def without_code(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config, and of configs within it, but for those that name code."""
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if str(name).lstrip("_").removesuffix("_internal") not in CODE_ENTRIES:
            kept[name] = without_code(value) if isinstance(value, dict) else value
    return kept


def check_saved_config(path: Any, data: dict[str, Any]) -> None:
    """Check the config that an output folder keeps; see `check_config`.

    Raises:
        SourceError: Naming the entry, what it is and what it may be.
    """
    from transformers import CONFIG_MAPPING

    model_type = data.get("model_type")
    names: Mapping[str, str] = {}
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        names = getattr(CONFIG_MAPPING[model_type], "attribute_map", {})
    check_config(f"{path}: config", data, dict(names))
