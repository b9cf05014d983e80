"""The line that a compile prints for pictures and an ONNX folder, run as it was printed."""

from __future__ import annotations

import json

import pytest
import torch
from run_lines import run
from typer.testing import CliRunner
from vision_models import save_with_processor

import graphopt as go
from graphopt.cli.commands import app
from graphopt.runtime.picture_prompts import open_picture

Image = pytest.importorskip("PIL.Image")
TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.slow
def test_the_printed_line_answers_as_transformers(tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save_with_processor(tmp_path / "model", template=TEMPLATE)
    values = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(values.byte().numpy()).save(tmp_path / "picture.png")
    report = go.compile_model(
        str(folder), tmp_path / "out", go.CompileOptions(emit=("onnx",), verify=False)
    )
    (line,) = (line for line in report.artifact.usage if "--image" in line)
    assert line.startswith(f"graphopt generate {tmp_path / 'out'} --backend onnx")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    given = processor(
        images=[open_picture(tmp_path / "picture.png")], text=["<image>What is in the picture?"],
        return_tensors="pt",
    )  # fmt: skip
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        written = model.generate(**given, max_new_tokens=12, do_sample=False)[0, length:]
    wanted = processor.tokenizer.decode(written, skip_special_tokens=True)
    monkeypatch.chdir(tmp_path)
    command = f"{line.partition('#')[0].strip()} --max-new-tokens 12 --greedy"
    said = json.loads(run(f"{command} --json"))
    assert (said["text"], said["backend"]) == (wanted, "onnx")
    assert run(command).endswith("\n")
    # A folder that has no other form is looked at by its graphs, and measured by them.
    row = {"image": "picture.png", "prompt": "<image>What?", "answer": " it"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    found = []
    for backend in ("onnx", "program"):
        args = ["eval", "out", "--pictures", "rows.jsonl", "--backend", backend, "--json"]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["picture_perplexity"])
    # Two fp32 computations of a mean of logits of order 1.
    assert found[0] == pytest.approx(found[1], rel=1e-4)
