"""A bare config has no weights: whoever needs some is told so, and what needs none goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import runner

from graphopt.capture import capture
from graphopt.cli.commands import app
from graphopt.errors import PassError
from graphopt.pass_manager.pipeline import Pipeline

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "bare" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA))
    (tmp_path / "text.txt").write_text("one two three")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "compile --config {config} -o {out}",
        "compile {config} -o {out} --passes prune-blocks{{blocks=1}}",
        "generate {config} --prompt hi",
        "eval {config} --text {text}",
    ],
)
def test_a_command_that_needs_weights_says_that_there_are_none(config: Path, command: str) -> None:
    out, text = config.parent / "out", config.parent.parent / "text.txt"
    words = command.format(config=config, out=out, text=text).split()
    done = runner().invoke(app, words)
    assert done.exit_code == 1 and "bare is a config without weights" in done.stderr
    assert "tokenizer" not in done.stderr and not out.exists()


def test_a_dry_run_needs_none(config: Path) -> None:
    command = ["compile", str(config), "--dry-run", "--passes", "prune-blocks{blocks=1}"]
    done = runner().invoke(app, command)
    assert done.exit_code == 0, done.stderr


def test_a_pass_that_reads_weights_is_named(config: Path) -> None:
    program = capture(str(config))
    with pytest.raises(PassError, match="bare is a config without weights, and prune-blocks reads"):
        Pipeline.parse("canonicalise,prune-blocks{blocks=1}").run(program)
    after, _ = Pipeline.parse("canonicalise,insert-kv-cache").run(program)
    assert after.states and not after.has_values()
