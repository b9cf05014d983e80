"""Configs of models that lose layers."""

from __future__ import annotations

import pytest

from graphopt.ir.layer_config import shrink_config


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["b", "d"]}),
        ({"first_k_dense_replace": 2}, {"first_k_dense_replace": 1}),
        ({"num_dense_layers": 3}, {"num_dense_layers": 1}),
        ({"moe_layers": [1, 2]}, {"moe_layers": [0]}),
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": []},
            {"decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
        (
            {"decoder_sparse_step": 3, "mlp_only_layers": [1]},
            {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]},
        ),
        (
            {"moe_layer_start_index": 2, "moe_layer_end_index": -1, "moe_layer_interval": 1},
            {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1},
        ),
        (
            {"attention_types": [[["global", "local"], 2]]},
            {"attention_types": [[["local", "local"], 1]]},
        ),
        (
            {"per_layer_config": {"00": {"x": 1}, "03": {"x": 2}}},
            {"per_layer_config": {"01": {"x": 2}}},
        ),
        # Four entries by chance.
        ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
    ],
)
def test_entries_follow_when_layers_0_and_2_of_4_go(config, want):
    config = {"num_hidden_layers": 4, **config}
    shrink_config(config, 4, {0, 2})
    assert config == {"num_hidden_layers": 2, **want}
