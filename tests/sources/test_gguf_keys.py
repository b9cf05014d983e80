"""Every key of a GGUF header that changes numbers is read, or the file is refused."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import GGUF_ARCHITECTURES, VOCAB, tiny_model, write_gguf
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphopt.capture import capture
from graphopt.capture.model import attention_implementation
from graphopt.errors import SourceError
from graphopt.execute.interpreter import Runner
from graphopt.sources import open_model
from graphopt.sources.gguf.architectures import ARCHITECTURES
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.keys import HARMLESS, NEUTRAL, model_keys

pytestmark = pytest.mark.oldest


def written(path: Path, model_type: str, config: dict[str, Any], **changes: Any) -> PreTrainedModel:
    """Write a model, and return it."""
    architecture, entries = GGUF_ARCHITECTURES[model_type]
    model = tiny_model(model_type, **(entries | config))
    write_gguf(path, model, architecture, **changes)
    return model


def error_of(path: Path, model: PreTrainedModel, length: int = 90) -> float:
    """The largest difference of logits of the file's model, as a share of the largest logit."""
    source = open_model(str(path))
    again = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        source.config,
        dtype=torch.float32,
        attn_implementation=attention_implementation(source.config),
    ).eval()
    state = {name: producer.load() for name, producer in source.producers.items()}
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    again.tie_weights()
    ids = torch.randint(0, VOCAB, (2, length))
    with torch.no_grad():
        want, got = model(ids).logits, again(ids).logits
    return float((want - got).abs().max() / want.abs().max())


def yarn(**entries: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    return rope | {"original_max_position_embeddings": 32} | entries


YARN = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}
YARN |= {".rope.scaling.original_context_length": 32}
BETAS = {".rope.scaling.yarn_beta_fast": 4.0, ".rope.scaling.yarn_beta_slow": 2.0}
OWN = 0.1 * math.log(4.0) + 1.0

ROTARY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn": (YARN, yarn()),
    "yarn betas": (YARN | BETAS, yarn(beta_fast=4.0, beta_slow=2.0)),
    "yarn one beta": (
        YARN | {".rope.scaling.yarn_beta_slow": 3.0},
        yarn(beta_slow=3.0),
    ),
    "yarn without a length": (
        YARN | {".rope.scaling.original_context_length": None},
        yarn(original_max_position_embeddings=128),
    ),
    "yarn defaults stated": (
        YARN | {".rope.scaling.yarn_ext_factor": 1.0, ".rope.scaling.yarn_attn_factor": OWN,
                ".rope.scaling.attn_factor": 1.0, ".rope.scaling.yarn_log_multiplier": 0.0},
        yarn(),
    ),
    "linear": (
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 3.0},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    ),
    "a factor alone": (
        {".rope.scaling.factor": 3.0},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    ),
    "the old name of the factor": (
        {".rope.scale_linear": 3.0},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    ),
    "a factor that is not used": (
        {".rope.scaling.type": "none", ".rope.scaling.factor": 3.0},
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "a factor of 0": (
        {".rope.scaling.factor": 0.0},
        {"rope_type": "default", "rope_theta": 1e4},
    ),
    "no base": ({".rope.freq_base": None}, {"rope_type": "default", "rope_theta": 1e4}),
    "a base": ({}, {"rope_type": "default", "rope_theta": 123.0}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "case"),
    [
        *(("llama", case) for case in ROTARY),
        # The others take the same way.
        *itertools.product(["qwen2", "qwen3"], ["yarn betas", "linear"]),
    ],
)
def test_rotary_scaling(tmp_path: Path, case: str, model_type: str) -> None:
    """Betas of YaRN and the rest: the model of the same parameters in transformers."""
    keys, rope = ROTARY[case]
    config = {"rope_parameters": rope, "head_dim": 16}
    model = written(tmp_path / "m.gguf", model_type, config, entries=keys)
    assert error_of(tmp_path / "m.gguf", model) < 1e-5


@pytest.mark.slow
def test_rotary_scaling_in_the_program(tmp_path: Path) -> None:
    keys, rope = ROTARY["yarn betas"]
    config = {"rope_parameters": rope, "head_dim": 16, "num_hidden_layers": 1}
    model = written(tmp_path / "m.gguf", "llama", config, entries=keys)
    program = capture(str(tmp_path / "m.gguf"))
    ids = torch.randint(0, VOCAB, (1, 90))
    with torch.no_grad():
        want, got = model(ids).logits, Runner(program).logits({"input_ids": ids})
    assert float((want - got).abs().max() / want.abs().max()) < 1e-5


def test_phi3_rotation(tmp_path: Path) -> None:
    """A share of the head whose product rounds down, and both sets of LongRoPE's factors."""
    sizes = {"hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 1}
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.58 + 1e-9}
    model = written(
        tmp_path / "part.gguf", "phi3", sizes | {"rope_parameters": part},
        entries={".attention.key_length": 100, ".rope.dimension_count": 58},
    )  # fmt: skip
    assert model.model.rotary_emb.inv_freq.shape == (29,)
    assert error_of(tmp_path / "part.gguf", model) < 1e-5

    long, short = [1.5, 2.5, 4.0, 8.0], [1.0, 1.1, 1.3, 2.0]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": long, "short_factor": short}
    extra = {
        "rope_factors_long.weight": np.array(long, dtype=np.float32),
        "rope_factors_short.weight": np.array(short, dtype=np.float32),
    }
    factor = math.sqrt(1 + math.log(4.0) / math.log(32))
    model = written(
        tmp_path / "long.gguf", "phi3",
        {"rope_parameters": rope, "original_max_position_embeddings": 32}, extra=extra,
        entries={".rope.scaling.original_context_length": 32, ".rope.scaling.attn_factor": factor},
    )  # fmt: skip
    for length in (20, 90):
        assert error_of(tmp_path / "long.gguf", model, length) < 1e-5


def test_phi3_without_a_window(tmp_path: Path) -> None:
    entries = {".attention.sliding_window": 0}
    model = written(tmp_path / "m.gguf", "phi3", {"sliding_window": None}, entries=entries)
    assert error_of(tmp_path / "m.gguf", model) < 1e-5


WINDOWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "as ever": ({}, [1, 1, 1, 1, 1, 0, 1]),
    "period": ({".attention.sliding_window_pattern": 3}, [1, 1, 0, 1, 1, 0, 1]),
    "all": ({".attention.sliding_window_pattern": 0}, [1] * 7),
    "flags": (
        {".attention.sliding_window_pattern": [True, False, False, True, False, True, True]},
        [1, 0, 0, 1, 0, 1, 1],
    ),
    "none": ({".attention.sliding_window": None}, [0] * 7),
    "zero": ({".attention.sliding_window": 0}, [0] * 7),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_gemma3_windows(tmp_path: Path, case: str) -> None:
    entries, flags = WINDOWS[case]
    layers = ["sliding_attention" if flag else "full_attention" for flag in flags]
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    config = {"layer_types": layers, "rope_parameters": rope, "final_logit_softcapping": 2.0}
    stated = {".rope.freq_base_swa": 100.0, ".final_logit_softcapping": 2.0} | entries
    model = written(tmp_path / "m.gguf", "gemma3_text", config, entries=stated)
    assert error_of(tmp_path / "m.gguf", model, 30) < 1e-5


def test_gemma2_defaults(tmp_path: Path) -> None:
    """Files from before the keys were written."""
    config = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    names = (".attn_logit_softcapping", ".final_logit_softcapping", ".attention.sliding_window")
    model = written(
        tmp_path / "m.gguf", "gemma2", config | {"sliding_window": 4096},
        entries=dict.fromkeys(names),
    )  # fmt: skip
    assert error_of(tmp_path / "m.gguf", model, 30) < 1e-5
    assert open_model(str(tmp_path / "m.gguf")).config.sliding_window == 4096  # type: ignore[union-attr]


def joined(names: tuple[str, ...], fused: str) -> Callable[[dict[str, np.ndarray]], None]:
    """Join tensors of every block into one, as llama.cpp may."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for block, suffix in itertools.product(range(9), ("weight", "bias")):
            parts = [f"blk.{block}.{name}.{suffix}" for name in names]
            if all(part in tensors for part in parts):
                whole = np.concatenate([tensors.pop(part) for part in parts])
                tensors[f"blk.{block}.{fused}.{suffix}"] = whole

    return change


QKV = joined(("attn_q", "attn_k", "attn_v"), "attn_qkv")


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": False}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
        ("gemma3_text", {"num_hidden_layers": 2}),
    ],
)
def test_joined_projections(tmp_path: Path, model_type: str, config: dict[str, Any]) -> None:
    model = written(tmp_path / "m.gguf", model_type, config, change=QKV)
    assert error_of(tmp_path / "m.gguf", model, 20) < 1e-5


def test_phi3_projections_apart(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for block in range(2):
            q, k, v = np.split(tensors.pop(f"blk.{block}.attn_qkv.weight"), [32, 48])
            gate, up = np.split(tensors.pop(f"blk.{block}.ffn_up.weight"), 2)
            for name, part in (("attn_q", q), ("attn_k", k), ("attn_v", v),
                               ("ffn_gate", gate), ("ffn_up", up)):  # fmt: skip
                tensors[f"blk.{block}.{name}.weight"] = part

    model = written(tmp_path / "m.gguf", "phi3", {}, change=change)
    assert error_of(tmp_path / "m.gguf", model, 20) < 1e-5


BIASES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


@pytest.mark.parametrize("left", [3, 1, 2, 4, 6, 0])
def test_some_biases_alone(tmp_path: Path, left: int) -> None:
    """Biases of queries, keys and values alone, and any others that a file lacks."""
    config = {"attention_bias": True, "mlp_bias": True}
    architecture, entries = GGUF_ARCHITECTURES["llama"]
    model = tiny_model("llama", **entries, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "gate_proj": 4,
                    "up_proj": 5, "down_proj": 6}.get(name.split(".")[-2], -1)  # fmt: skip
            if name.endswith("bias") and part >= left:
                parameter.zero_()

    def change(tensors: dict[str, np.ndarray]) -> None:
        for block, part in itertools.product(range(2), BIASES[left:]):
            del tensors[f"blk.{block}.{part}.bias"]

    write_gguf(tmp_path / "m.gguf", model, architecture, change=change)
    assert error_of(tmp_path / "m.gguf", model, 20) < 1e-5
    made = open_model(str(tmp_path / "m.gguf")).config
    assert (made.attention_bias, made.mlp_bias) == (left > 0, left > 4)  # type: ignore[union-attr]


def test_biases_without_a_place(tmp_path: Path) -> None:
    for model_type, name in (("qwen2", "attn_output"), ("phi3", "attn_qkv"), ("gemma2", "ffn_up"),
                             ("llama", "attn_norm")):  # fmt: skip
        extra = {f"blk.0.{name}.bias": np.zeros(32, dtype=np.float32)}
        written(tmp_path / "m.gguf", model_type, {}, extra=extra)
        with pytest.raises(SourceError, match=rf"'blk\.0\.{name}\.bias' has no place"):
            open_model(str(tmp_path / "m.gguf"))


def header(name: str, entries: dict[str, Any]) -> GgufFile:
    """The header of a small model of an architecture, with entries changed or, at None, gone."""
    keys: dict[str, Any] = {
        "context_length": 128,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.key_length": 8,
        ("attention.layer_norm_epsilon" if name == "gpt2" else
         "attention.layer_norm_rms_epsilon"): 1e-6,
    }  # fmt: skip
    keys |= entries
    metadata = {f"{name}.{key}": value for key, value in keys.items() if value is not None}
    return GgufFile(Path("m.gguf"), {"general.architecture": name} | metadata, {}, "")


def opened(name: str, **entries: Any) -> Any:
    """The config entries that a header gives."""
    file, architecture = header(name, entries), ARCHITECTURES[name]
    keys = model_keys(file, architecture.schema, architecture.neutral)
    return architecture.config(file, keys)


# Older releases of the package lack some of the groups, and some keys.
KEY_GROUPS = ("LLM", "Attention", "Rope", "SSM", "WKV", "Classifier", "ShortConv", "KDA")
KEY_LIST = sorted(
    {
        value.removeprefix("{arch}.")
        for group in KEY_GROUPS
        for value in vars(getattr(gguf.Keys, group, object)).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    }
    | NEUTRAL.keys()
    | {"attention.indexer.top_k", "a_key_of_next_year"}
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_key_of_the_format(name: str) -> None:
    """At values that are nobody's default the config changes, or the file is refused.

    What is left must be a key that the tables say changes nothing, or one of a scaling that the
    file does not use.
    """
    has_window = name in ("gemma2", "gemma3", "phi3")
    window = {"attention.sliding_window": 16, "block_count": 4} if has_window else {}
    plain = opened(name, **window)
    ignored = set()
    assert len(KEY_LIST) > 80
    for key in KEY_LIST:
        for value in (3, 3.7, "other", [3, 5], [True, True]):
            try:
                if opened(name, **window | {key: value}) == plain:
                    ignored.add(key)
            except SourceError:
                pass
    experts = {key for key in ignored if key.startswith(("expert", "moe_"))}
    experts |= {"interleave_moe_layer_step", "router_logit_softcapping"}
    unused = {f"rope.scaling.{key}" for key in
              ("yarn_beta_fast", "yarn_beta_slow", "original_context_length")}  # fmt: skip
    if not has_window:
        unused.add("attention.sliding_window_pattern")
    assert ignored - experts <= HARMLESS | unused


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_that_do_nothing(key: str) -> None:
    """Accepted at the one value, refused at others."""
    neutral: dict[str, Any] = {
        "embedding_length_out": 32, "logit_scale": 1.0, "residual_scale": 1.0,
        "embedding_scale": 1.0, "attention.causal": True, "attention.output_scale": 1.0,
        "attention.value_scale": 1.0, "attention.key_length_swa": 8,
        "attention.layer_norm_epsilon": 1e-6, "rope.dimension_sections": [0, 0, 0, 0],
        "rope.dimension_count_swa": 8, "rope.freq_base_swa": 1e4,
        "attention.sliding_window": 128, "attention.value_length_swa": 8,
    }  # fmt: skip
    others = {"rope.dimension_count": 8, "rope.freq_base": 1e4, "attention.value_length": 8}
    if key == "attention.layer_norm_rms_epsilon":
        assert opened("gpt2", **{key: 1e-6}) == opened("gpt2")
        return
    assert opened("llama", **others, **{key: neutral.get(key, 0)}) == opened("llama", **others)
    if key == "attention.sliding_window_pattern":
        with pytest.raises(SourceError, match="sliding_window"):
            opened("llama", **others, **{key: 2, "attention.sliding_window": 7})
        return
    with pytest.raises(SourceError, match=rf"'llama\.{re.escape(key)}' is 7, which may change"):
        opened("llama", **others, **{key: 7})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"block_count": 0}, r"'llama\.block_count' is 0, and it should be greater than or"),
    ("llama", {"block_count": -2}, r"'llama\.block_count' is -2"),
    ("llama", {"block_count": 1 << 40}, r"'llama\.block_count' is 1099511627776"),
    ("llama", {"block_count": None}, r"'llama\.block_count' is missing"),
    ("llama", {"block_count": "2"}, r"'llama\.block_count' is '2', and it should be a valid"),
    ("llama", {"block_count": 2.0}, r"'llama\.block_count' is 2\.0"),
    ("llama", {"block_count": True}, r"'llama\.block_count' is True"),
    ("llama", {"block_count": [2, 2]}, r"'llama\.block_count' is \[2, 2\]"),
    ("llama", {"context_length": 1 << 31}, r"context_length"),
    ("llama", {"attention.head_count": 0}, r"head_count"),
    ("llama", {"attention.head_count": 64, "attention.key_length": None}, r"do not make 64 heads"),
    ("llama", {"attention.head_count_kv": 3}, r"4 query heads cannot share 3 key heads"),
    (
        "llama",
        {"attention.head_count_kv": [4, 2]},
        r"head_count_kv' is \[4, 2\], and differs from block to block \(4 in block 0, 2 in block 1",
    ),
    ("llama", {"feed_forward_length": [48, 40]}, r"differs from block to block"),
    ("llama", {"attention.head_count": []}, r"is \[\], and it names no block"),
    ("llama", {"attention.value_length": 16}, r"8 features and those of values 16"),
    ("llama", {"attention.layer_norm_rms_epsilon": math.nan}, r"is nan, and it should be a finite"),
    ("llama", {"attention.layer_norm_rms_epsilon": None}, r"rms_epsilon' is missing"),
    ("llama", {"rope.freq_base": 0.0}, r"freq_base' is 0\.0, and it should be greater than 1"),
    ("llama", {"rope.freq_base": math.inf}, r"freq_base' is inf"),
    ("llama", {"rope.dimension_count": 4}, r"rotates 4 of 8 features"),
    ("llama", {"attention.key_length": 7}, r"rotates 7 of 7 features"),
    ("llama", {"rope.scaling.type": "dynamic"}, r"by 'dynamic', which is not supported"),
    ("llama", {"rope.scaling.type": "longrope"}, r"lacks the tensor 'rope_factors_long\.weight'"),
    ("llama", {"rope.scaling.attn_factor": 1.2}, r"attn_factor beside .*'linear'"),
    ("llama", {"rope.scaling.yarn_ext_factor": 1.0}, r"yarn_ext_factor beside"),
    ("llama", {"rope.scaling.yarn_attn_factor": 2.0}, r"yarn_attn_factor beside"),
    ("llama", {"expert_count": 8}, r"holds a mixture of experts"),
    ("llama", {"tensor_data_layout": "reference"}, r"tensor_data_layout' is 'reference'"),
    ("llama", {"hidden_activation": "gelu"}, r"hidden_activation' is 'gelu', which may change"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping' is 50\.0"),
    ("gemma3", {"attention.sliding_window": 4, "attention.sliding_window_pattern": [True]},
     r"windows of 1 layers and has 2"),
    ("gpt2", {"attention.head_count_kv": 2}, r"2 of them with keys"),
    ("phi3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, r"by 'yarn', which Phi-3"),
    ("phi3", {"rope.dimension_count": 10}, r"rotates 10 of 8 features"),
]  # fmt: skip
STATED_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
REFUSED += [
    ("llama", STATED_YARN | {f"rope.scaling.{key}": value}, message)
    for key, value, message in [
        ("attn_factor", 1.3, "attn_factor beside YaRN"),
        ("yarn_attn_factor", 1.0, r"yarn_attn_factor 1\.0; of a scaling by 4\.0 only 1\.138629"),
        ("yarn_ext_factor", 0.0, r"yarn_ext_factor 0\.0, of which only 1"),
        ("yarn_ext_factor", 0.5, r"yarn_ext_factor 0\.5, of which only 1"),
        ("yarn_log_multiplier", 0.1, r"yarn_log_multiplier' is 0\.1, which may change"),
        ("yarn_beta_fast", 0.0, r"yarn_beta_fast' is 0\.0"),
        ("yarn_beta_slow", -1.0, r"yarn_beta_slow' is -1\.0"),
        ("original_context_length", 0, "original_context_length"),
    ]
]


@pytest.mark.parametrize(("name", "entries", "message"), REFUSED)
def test_refused_entries(name: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as refusal:
        opened(name, **entries)
    assert refusal.value.remedy and "\n" not in refusal.value.message


def test_lists_that_say_the_same_of_all_blocks() -> None:
    lists = {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2],
             "feed_forward_length": [48, 48]}  # fmt: skip
    assert opened("llama", **lists) == opened("llama", **{"attention.head_count_kv": 2})


def test_other_files_than_of_a_model(tmp_path: Path) -> None:
    for kind in ("adapter", "mmproj", 7):
        written(tmp_path / "m.gguf", "llama", {}, entries={"general.type": kind})
        with pytest.raises(SourceError, match=rf"holds no model: its general\.type is {kind!r}"):
            open_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("count", [1, 3])
def test_blocks_that_the_header_does_not_count(tmp_path: Path, count: int) -> None:
    written(tmp_path / "m.gguf", "llama", {}, entries={".block_count": count})
    with pytest.raises(
        SourceError, match=rf"states {count} blocks .* holds tensors of blocks 0 to 1"
    ):
        open_model(str(tmp_path / "m.gguf"))


def test_rotary_tensors_of_other_architectures(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(4, dtype=np.float32)}
    written(tmp_path / "m.gguf", "qwen2", {}, extra=extra)
    with pytest.raises(SourceError, match=r"'rope_freqs\.weight' has no place"):
        open_model(str(tmp_path / "m.gguf"))
    long = {"rope_factors_long.weight": extra["rope_freqs.weight"]}
    for stated, message in (
        ({}, r"no rope\.scaling\.attn_factor"),
        ({".rope.scaling.attn_factor": 1.0}, r"lacks the tensor 'rope_factors_short\.weight'"),
        ({".rope.scaling.factor": 2.0}, r"factor beside LongRoPE's factors"),
    ):
        keys = {".rope.scaling.original_context_length": 64} | stated
        written(tmp_path / "m.gguf", "llama", {}, extra=long, entries=keys)
        with pytest.raises(SourceError, match=message):
            open_model(str(tmp_path / "m.gguf"))
