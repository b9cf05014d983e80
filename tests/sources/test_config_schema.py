"""Configs with entries that no model has are refused by the entry's name, whatever the family."""

from __future__ import annotations

import json
import math

import pytest
from tiny_models import SIZES as TINY
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from graphopt.capture import capture
from graphopt.errors import GraphoptError, SourceError
from graphopt.files.config_schema import SIZES, check_config, check_sizes
from graphopt.sources.huggingface import read_config
from graphopt.support.inputs import parse_json

pytestmark = pytest.mark.oldest

OTHER_NAMES = {"gpt2": {"num_hidden_layers": "n_layer", "hidden_size": "n_embd"}}


def config(folder, model_type="llama", **entries):
    sizes = TINY if model_type != "gpt2" else {"n_embd": 32, "n_layer": 1, "n_head": 2}
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **sizes, **entries}))
    return path


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("value", [0, -2, 2**31, 2**70, True, 2.5, "2", [0], [2**70]])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size"])
def test_sizes_that_no_model_has(tmp_path, model_type, name, value):
    own = OTHER_NAMES.get(model_type, {}).get(name, name)
    path = config(tmp_path, model_type, **{own: value})
    with pytest.raises(SourceError, match=rf"config\.json: the entry '{own}' is .*, and it should"):
        read_config(path)


@pytest.mark.parametrize("layers", [10**5, 2**70])
def test_layers_beyond_reach_are_refused_before_they_are_listed(tmp_path, layers):
    with pytest.raises(SourceError, match="'num_hidden_layers' is"):
        read_config(config(tmp_path, num_hidden_layers=layers))


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"architectures": "LlamaForCausalLM"}, "'architectures' is 'LlamaForCausalLM', and it"),
        ({"architectures": [1]}, r"'architectures\.0' is 1"),
        ({"architectures": {"a": 1}}, "'architectures'"),
        ({"dtype": ["float32"]}, "'dtype' is"),
        ({"torch_dtype": 3}, "'torch_dtype' is 3"),
        ({"dtype": "float99"}, "config.json"),
        ({"layer_types": "full_attention"}, "'layer_types'"),
        ({"rope_scaling": [2.0]}, "'rope_scaling'"),
        ({"rope_parameters": "yarn"}, "'rope_parameters'"),
        (
            {"rope_parameters": {"rope_type": ["yarn"]}},
            r"parameters: the entry 'rope_type' is",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: the entry 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, "'factor' is -1.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.nan}}, "'factor' is nan"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, "x"]}},
            r"'short_factor\.1' is 'x'",
        ),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 0}}}, "rope_theta' is 0"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings'"),
        ({"eos_token_id": 2**70}, "'eos_token_id"),
        ({"num_attention_heads": 64}, "'head_dim'|head"),
        ({"head_dim": 0}, "'head_dim' is 0"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"hidden_act": "exec"}, "exec"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_entries_of_the_wrong_kind(tmp_path, entries, match):
    """Refused when the config is read or when the model is built, in one line."""
    given = {"head_dim": None} | entries if "num_attention_heads" in entries else entries
    path = config(tmp_path, **given)
    with pytest.raises(GraphoptError, match=match) as caught:
        capture(str(path))
    assert "\n" not in caught.value.message


def test_special_floats_of_transformers(tmp_path):
    for value in ('{"__float__": "Infinity"}', "Infinity"):
        path = config(tmp_path)
        path.write_text(path.read_text()[:-1] + f', "time_step_max": {value}}}')
        assert read_config(path).time_step_max == math.inf


@pytest.mark.slow
def test_every_family_passes_with_its_own_sizes():
    seen = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        names = dict(kind.attribute_map)
        try:
            text = kind().to_json_string(use_diff=False)
        except Exception:
            continue  # a class without defaults
        data = parse_json(text.encode(), "file")
        check_config("file", data, names)
        check_sizes("file", data, names, remedy="")
        seen += 1
    assert seen > 80 and set(SIZES) and "llama" in CONFIG_MAPPING
