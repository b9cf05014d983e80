"""The keys of a GGUF file that describe the model: which are read, which do nothing.

llama.cpp's list is long, and most keys belong to a few architectures. For an architecture that is
read, a key is one of four kinds: an entry of its schema; one that never changes a number
(`HARMLESS`); one that changes none while it has a certain value (`NEUTRAL`); or any other, known
to llama.cpp or not, which is refused, since ignoring it could give a model with other numbers.
List of keys: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from graphopt.errors import SourceError
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.schema import (
    CHECKPOINT,
    Entries,
    Positive,
    Size,
    SizeOfAllBlocks,
    read_entries,
)


class ModelKeys(Entries):
    """What the decoders of all architectures state, named as in the file."""

    context_length: Size
    embedding_length: Size
    # llama.cpp's own bound.
    block_count: Annotated[int, Field(ge=1, le=512)]
    feed_forward_length: SizeOfAllBlocks
    head_count: SizeOfAllBlocks = Field(alias="attention.head_count")
    head_count_kv: SizeOfAllBlocks | None = Field(None, alias="attention.head_count_kv")
    key_length: Size | None = Field(None, alias="attention.key_length")
    value_length: Size | None = Field(None, alias="attention.value_length")

    @property
    def key_heads(self) -> int:
        return self.head_count if self.head_count_kv is None else self.head_count_kv

    @property
    def head_dim(self) -> int:
        return self.key_length or self.embedding_length // self.head_count


class RotaryKeys(ModelKeys):
    """Decoders with RMS norms and rotary embedding."""

    rms_norm_eps: Positive = Field(alias="attention.layer_norm_rms_epsilon")
    rotated: Size | None = Field(None, alias="rope.dimension_count")
    freq_base: Annotated[float, Field(gt=1)] = Field(10000.0, alias="rope.freq_base")
    scaling_type: str | None = Field(None, alias="rope.scaling.type")
    scaling_factor: Annotated[float, Field(ge=0)] = Field(0.0, alias="rope.scaling.factor")
    scale_linear: Annotated[float, Field(ge=0)] = Field(0.0, alias="rope.scale_linear")
    attn_factor: Positive | None = Field(None, alias="rope.scaling.attn_factor")
    original_context: Size | None = Field(None, alias="rope.scaling.original_context_length")
    yarn_ext_factor: float = Field(-1.0, alias="rope.scaling.yarn_ext_factor")
    yarn_attn_factor: Positive | None = Field(None, alias="rope.scaling.yarn_attn_factor")
    yarn_beta_fast: Positive = Field(32.0, alias="rope.scaling.yarn_beta_fast")
    yarn_beta_slow: Positive = Field(1.0, alias="rope.scaling.yarn_beta_slow")


class Phi3Keys(RotaryKeys):
    # Files of models without a window state 0.
    sliding_window: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, alias="attention.sliding_window"
    )


def _list_of_blocks(value: Any) -> Any:
    return (
        [bool(flag) if flag in (0, 1) else flag for flag in value]
        if isinstance(value, list)
        else value
    )


Pattern = Annotated[
    Annotated[int, Field(ge=0, le=512)] | list[bool], BeforeValidator(_list_of_blocks)
]
"""Which layers have a window: all but every n-th, or one flag a layer."""


class WindowKeys(RotaryKeys):
    """Decoders in which some layers have a window."""

    window_pattern: Pattern | None = Field(None, alias="attention.sliding_window_pattern")


class Gemma2Keys(WindowKeys):
    sliding_window: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        4096, alias="attention.sliding_window"
    )
    attn_logit_softcapping: Positive = 50.0
    final_logit_softcapping: Positive = 30.0


class Gemma3Keys(WindowKeys):
    sliding_window: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, alias="attention.sliding_window"
    )
    freq_base_swa: Annotated[float, Field(gt=1)] = Field(10000.0, alias="rope.freq_base_swa")
    final_logit_softcapping: Annotated[float, Field(ge=0)] = 0.0


class Gpt2Keys(ModelKeys):
    layer_norm_eps: Positive = Field(alias="attention.layer_norm_epsilon")


Keys = TypeVar("Keys", bound=ModelKeys)

HARMLESS = frozenset({"vocab_size", "rope.scaling.finetuned"})
"""Keys that never change a number: the tensors say how many tokens there are, and whether a
scaled model was trained further is a remark."""

_EXPERTS = ("expert", "moe_", "interleave_moe_layer_step", "router_logit_softcapping")
"""How keys about experts begin, which do nothing in a model that has none."""

_Rule = Callable[[Any, Mapping[str, Any]], bool]


def _is(neutral: float) -> _Rule:
    return lambda value, entries: isinstance(value, int | float) and value == neutral


def _same_as(key: str) -> _Rule:
    return lambda value, entries: key in entries and value == entries[key]


def _no_window(value: Any, entries: Mapping[str, Any]) -> bool:
    """A window as long as the context hides nothing; 0 is none."""
    context = entries.get("context_length")
    return value == 0 or (type(value) is type(context) is int and value >= context)


NEUTRAL: dict[str, _Rule] = {
    "embedding_length_out": _same_as("embedding_length"),
    "leading_dense_block_count": _is(0),
    "use_parallel_residual": _is(False),
    "nextn_predict_layers": _is(0),
    "n_deepstack_layers": _is(0),
    "pooling_type": _is(0),
    "logit_scale": _is(1.0),
    "residual_scale": _is(1.0),
    "embedding_scale": _is(1.0),
    "attn_logit_softcapping": _is(0.0),
    "final_logit_softcapping": _is(0.0),
    "swin_norm": _is(False),
    "rescale_every_n_layers": _is(0),
    "swiglu_clamp_exp": _is(0.0),
    "swiglu_clamp_shexp": _is(0.0),
    "attention.causal": _is(True),
    "attention.max_alibi_bias": _is(0.0),
    "attention.clamp_kqv": _is(0.0),
    "attention.scale": _is(0.0),
    "attention.output_scale": _is(1.0),
    "attention.value_scale": _is(1.0),
    "attention.temperature_length": _is(0),
    "attention.shared_kv_layers": _is(0),
    "attention.sliding_window": _no_window,
    "attention.sliding_window_pattern": lambda value, entries: _no_window(
        entries.get("attention.sliding_window", 0), entries
    ),
    "attention.key_length_swa": _same_as("attention.key_length"),
    "attention.value_length_swa": _same_as("attention.value_length"),
    "attention.layer_norm_epsilon": _same_as("attention.layer_norm_rms_epsilon"),
    "attention.layer_norm_rms_epsilon": _same_as("attention.layer_norm_epsilon"),
    "rope.dimension_count_swa": _same_as("rope.dimension_count"),
    "rope.freq_base_swa": _same_as("rope.freq_base"),
    "rope.dimension_sections": lambda value, entries: isinstance(value, list) and not any(value),
    "rope.scaling.alpha": _is(0.0),
    "rope.scaling.yarn_log_multiplier": _is(0.0),
}
"""Keys that change no number while the rule holds for their value and the other entries."""


def model_keys(file: GgufFile, schema: type[Keys], neutral: Mapping[str, Any]) -> Keys:
    """Return the keys that describe the model of a file.

    Args:
        schema: What is read for the file's architecture.
        neutral: Further keys and the one value that changes nothing for this architecture.

    Raises:
        SourceError: The file is of another thing than a model or holds a mixture of experts; or a
            key is missing, of another type or out of range, or is not read and may change numbers.
    """
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise SourceError(
            f"{file.path} holds no model: its general.type is {kind!r:.60}.",
            "Give the file of the language model itself.",
        )
    prefix = f"{file.architecture}."
    entries = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    if entries.get("expert_count", 0) != 0:
        raise SourceError(
            f"{file.path} holds a mixture of experts, which is not read from GGUF files.",
            CHECKPOINT,
        )
    read = schema.names()
    left = {
        key: value
        for key, value in entries.items()
        if key in read
        or not (
            key in HARMLESS
            or key.startswith(_EXPERTS)
            or (key in NEUTRAL and NEUTRAL[key](value, entries))
            or (key in neutral and type(value) is type(neutral[key]) and value == neutral[key])
        )
    }
    keys = read_entries(file.path, schema, left, prefix)
    if keys.head_dim < 1:
        raise SourceError(
            f"{file.path}: {keys.embedding_length} features do not make {keys.head_count} heads "
            f"({prefix}embedding_length, {prefix}attention.head_count).",
            "The file is incomplete; convert the model again.",
        )
    if keys.head_count % keys.key_heads:
        raise SourceError(
            f"{file.path}: {keys.head_count} query heads cannot share {keys.key_heads} key heads "
            f"({prefix}attention.head_count, {prefix}attention.head_count_kv).",
            "The file is incomplete; convert the model again.",
        )
    if keys.value_length not in (None, keys.head_dim):
        raise SourceError(
            f"{file.path}: the heads of keys have {keys.head_dim} features and those of values "
            f"{keys.value_length} ({prefix}attention.value_length), which the model's class "
            "cannot hold.",
            CHECKPOINT,
        )
    return keys


Layer = Literal["full_attention", "sliding_attention"]


def window_layers(file: GgufFile, keys: Gemma2Keys | Gemma3Keys, period: int) -> list[Layer]:
    """Return transformers' `layer_types`.

    Args:
        period: Every how manieth layer has no window, where the file does not say.

    Raises:
        SourceError: The file lists windows for another number of layers.
    """
    pattern = period if keys.window_pattern is None else keys.window_pattern
    if isinstance(pattern, int):
        flags = [pattern == 0 or block % pattern < pattern - 1 for block in range(keys.block_count)]
    else:
        flags = pattern
    if len(flags) != keys.block_count:
        raise SourceError(
            f"{file.path} lists the windows of {len(flags)} layers and has {keys.block_count} "
            "(attention.sliding_window_pattern, block_count).",
            "The file is incomplete; convert the model again.",
        )
    has_window = keys.sliding_window > 0
    return ["sliding_attention" if flag and has_window else "full_attention" for flag in flags]
