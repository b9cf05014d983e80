"""Every line that `compile` prints runs as printed, and answers as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, mostly_slow, random_model
from family_configs import families
from family_sweep import drawn_model, is_causal, saved_model
from programs import tiny_program
from run_lines import greedy_answer, run, save_tokenizer
from torch import nn

import graphopt as go
from graphopt.errors import GraphoptError, LoweringError

FORMS = ("torch", "onnx", "hf")
SAMPLES = ("llama", "gpt2", "gemma2", "bloom", "mixtral")
EVERY_DAY = ("llama", "bloom")  # with onnxruntime-genai and, having slopes, without


def check_lines(model: nn.Module, folder: Path, work: Path) -> list[str]:
    """Emit the model of a folder in every form that it has; run each line that is printed.

    Returns:
        The lines.
    """
    tokenizer = save_tokenizer(model, folder)
    expected = greedy_answer(model, tokenizer)
    program = go.capture(str(folder))
    program, _ = go.Pipeline.default().run(program, go.RunOptions(verify=False))
    lines: list[str] = []
    for form in FORMS:
        try:  # in a folder whose name a shell takes apart
            report = go.emit(program, work / f"out of {form}", emit=(form,))
        except LoweringError:
            continue
        assert report.artifact is not None
        lines += report.artifact.usage
    for line in lines:
        printed = run(line)
        answer = printed.removeprefix("Hello") if "transformers" in line else printed
        assert answer.startswith(expected), line
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    mostly_slow(sorted(FAMILIES), quick=("llama",), rare=sorted({*FAMILIES}.difference(EVERY_DAY))),
)
def test_every_line_gives_the_greedy_answer_of_transformers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = random_model(family)
    model.save_pretrained(tmp_path / "source")  # type: ignore[operator]
    lines = check_lines(model, tmp_path / "source", tmp_path)
    assert any(line.startswith("graphopt") for line in lines)
    for script in ("model.py", "generate.py", "python -c"):
        assert any(script in line for line in lines) or family not in SAMPLES


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", families())
def test_every_line_of_every_family_of_the_sweep(family: str, tmp_path: Path) -> None:
    drawn = drawn_model(family, 14, 0)
    if len(drawn) == 2:
        pytest.skip(f"transformers runs none: {drawn[0][:1]}")
    try:
        model, _ = saved_model(drawn[1], tmp_path / "source")
    except ValueError as error:
        pytest.skip(f"transformers does not open what it saved: {error!s:.80}")
    if not is_causal(model):
        pytest.skip("it sees both ways, and decodes nothing")
    try:
        assert check_lines(model, tmp_path / "source", tmp_path)
    except GraphoptError as refusal:
        pytest.skip(f"refused: {refusal.message}")


def test_a_model_without_a_tokenizer_is_run_by_token_ids(tmp_path: Path) -> None:
    report = go.emit(tiny_program(cache=True), tmp_path / "out", emit=("torch", "onnx"))
    assert report.artifact is not None
    (line,) = report.artifact.usage
    assert "token ids" in line
    assert len(run(line).split()) == 16
