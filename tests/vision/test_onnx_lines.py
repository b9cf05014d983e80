"""The line that a compile prints for pictures and an ONNX folder, run as it was printed."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
from run_lines import run
from transformers import Qwen2VLImageProcessorPil
from typer.testing import CliRunner
from vision_models import picture_tokenizer, save_with_processor, vision_model

import graphopt as go
from graphopt.cli.commands import app
from graphopt.runtime.picture_prompts import open_picture

Image = pytest.importorskip("PIL.Image")
TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "no template"])
def test_the_printed_line_answers_as_transformers(template, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save_with_processor(tmp_path / "model", template=template)
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


def save_qwen(folder):
    """Write a Qwen2-VL with the tokens and the steps for pictures that onnxruntime-genai reads."""
    tokenizer = picture_tokenizer()
    names = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    start, image, end = tokenizer.convert_tokens_to_ids(names)
    model = vision_model("qwen2_vl", eos_token_id=258)
    model.config.vision_start_token_id, model.config.vision_end_token_id = start, end
    model.config.image_token_id = image
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    images.save_pretrained(folder)
    return model, tokenizer, images


@pytest.mark.slow
def test_the_script_looks_at_a_picture(tmp_path):
    """Pixels of a picture that needs no resizing are those of transformers' processor."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model, tokenizer, images = save_qwen(tmp_path / "model")
    values = torch.randint(0, 256, (16, 24, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(values.byte().numpy()).save(tmp_path / "picture.png")
    program, _ = go.Pipeline.parse("canonicalise,insert-kv-cache").run(
        go.capture(str(tmp_path / "model"))
    )
    go.emit(program, tmp_path / "out", emit=("onnx",))
    asked = "<|vision_start|><|image_pad|><|vision_end|>What?"
    seen = images([open_picture(tmp_path / "picture.png")], return_tensors="pt")
    count = int(seen["image_grid_thw"].prod()) // 4
    text = asked.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = tokenizer([text], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **seen, do_sample=False,
            mm_token_type_ids=(ids == model.config.image_token_id).long(), max_new_tokens=8,
        )[0, ids.shape[1] :]  # fmt: skip
    folder, picture = tmp_path / "out" / "onnx", str(tmp_path / "picture.png")
    loaded = og.Model(str(folder))
    script = runpy.run_path(str(folder / "generate.py"))
    given = script["with_pictures"](loaded, og.Tokenizer(loaded), folder, asked, [picture])
    assert given["input_ids"].as_numpy().tolist() == ids.tolist()
    found = torch.from_numpy(given["pixel_values"].as_numpy()).view(seen["pixel_values"].shape)
    # Some units in the last place of fp32 numbers up to 3.
    assert float((found - seen["pixel_values"]).abs().max()) <= 2e-6
    params = og.GeneratorParams(loaded)
    params.set_search_options(max_length=ids.shape[1] + 8, do_sample=False)
    generator, tokens = og.Generator(loaded, params), []
    generator.set_inputs(given)
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert tokens == written.tolist()
    # The bytes of a random model are seldom text, so what is printed says little.
    run(f"python {folder}/generate.py --prompt '{asked}' --image {picture} --new 8 --greedy")
