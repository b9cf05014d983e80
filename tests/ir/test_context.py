"""How many tokens a program takes: stated, compiled for, or held by a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_models import emit, run_in_steps, session
from programs import tiny_program
from tiny_models import save_tiny, tiny_model

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.capture import capture
from graphopt.compiler import CompileOptions, compile_model
from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir.context import context_length, position_table, set_max_length, stated_length
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

SMALL = {"num_hidden_layers": 1, "max_position_embeddings": 16}


BART = {
    "is_decoder": True, "is_encoder_decoder": False, "d_model": 16, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 7}, 7),
        ({"n_positions": 8}, 8),
        ({"text_config": {"max_position_embeddings": 9}}, 9),
        ({"max_position_embeddings": None, "n_ctx": 5}, 5),
        ({"text_config": None}, None),
        (
            {
                "max_position_embeddings": 8,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.5},
            },
            20,
        ),
    ],
)
def test_configs_call_it_by_many_names(config: dict[str, object], length: int | None) -> None:
    assert stated_length(config) == length


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "rows"),
    [
        pytest.param("llama", SMALL, None, marks=pytest.mark.exhaustive),
        ("gpt2", {"n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}, 16),
        # Two rows in front are for no position.
        ("opt", SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 32}, 16),
        pytest.param("gptj", SMALL | {"rotary_dim": 4}, 16, marks=pytest.mark.exhaustive),
        # The same by an addition, to an index that is counted.
        ("mbart", BART, 16),
        ("bloom", {"n_layer": 1, "n_head": 2, "hidden_size": 16}, None),
    ],
)
def test_tables_of_positions_have_an_end(
    family: str, changes: dict[str, Any], rows: int | None, tmp_path: Path
) -> None:
    program = capture(tiny_model(family, **changes))
    found = position_table(program)
    assert (found and found[1]) == rows
    go.emit(program, tmp_path / "out", emit=("torch",))
    written = (tmp_path / "out/model.py").read_text()
    assert f"\nPOSITIONS: int | None = {rows} " in written
    if rows is None:
        set_max_length(program, 4096)
        assert context_length(program) == 4096
    else:
        assert context_length(program) == rows
        with pytest.raises(UsageError, match=f"has {rows} of them: texts cannot have 17 tokens"):
            set_max_length(program, rows + 1)
        set_max_length(program, 3)
        assert context_length(program) == 3


def test_onnx_goes_on_behind_what_the_config_states(tmp_path: Path) -> None:
    """From nothing and with a cache, past positions whose angles are large."""
    program = tiny_program(head_dim=16)
    program.config = {"max_position_embeddings": 4}
    cached = InsertKVCache().run(program, Context()).program
    model = session(emit(cached, tmp_path)[1])
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = complete_inputs({"input_ids": ids})
    for shift in (0, 200_000):
        inputs["position_ids"] = inputs["position_ids"] + shift
        expected = Runner(program).logits(inputs)
        found = run_in_steps(model, inputs, (7, 9, 12))
        # An angle of 2e5 has an error of 2e5 * 6e-8 in fp32, whoever computes it.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if not shift else 2e-2)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("length")
    save_tiny(folder / "model", **SMALL)
    compile_model(
        str(folder / "model"),
        folder / "out",
        CompileOptions(emit=("onnx", "torch"), verify=False, max_length=40),
    )
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "torch", "program"])
def test_every_form_takes_what_it_was_compiled_for(compiled: Path, backend: str) -> None:
    model = open_language_model(str(compiled), backend)  # type: ignore[arg-type]
    assert model.positions == 40
    ids = torch.arange(30)[None] + 3
    assert model.logits(ids).isfinite().all()


def test_genai_is_told(compiled: Path) -> None:
    config = json.loads((compiled / "onnx" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 40


@pytest.mark.slow
def test_more_than_a_table_holds_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "gpt2", n_positions=16, n_layer=1, n_head=2, n_embd=16)
    with pytest.raises(UsageError, match="which has 16 of them") as caught:
        compile_model(str(tmp_path / "model"), tmp_path / "out", CompileOptions(max_length=17))
    assert "--max-length 16 or less" in caught.value.remedy
    assert not (tmp_path / "out").exists()
