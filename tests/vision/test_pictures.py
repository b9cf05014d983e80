"""Pictures from files: generating from one, and perplexity of answers given one."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import pytest
import torch
from run_lines import run as run_line
from sampling import exhaustive_but
from tiny_models import save_tiny
from typer.testing import CliRunner
from vision_models import save_with_processor

import graphopt as go
from graphopt.cli.commands import app
from graphopt.errors import SourceError, UsageError
from graphopt.runtime.picture_prompts import open_picture
from graphopt.support.plain import plain_text
from graphopt.vision.picture_rows import read_picture_rows
from graphopt.vision.processor import Processor
from graphopt.vision.sighted_model import SightedModel, answer_log_likelihoods

Image = pytest.importorskip("PIL.Image")
TEMPLATE = (
    "{% for m in messages %}<user>{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}</user>{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    save_with_processor(root / "model")
    save_with_processor(root / "chat", template=TEMPLATE)
    noise = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        values = torch.randint(0, 256, (20, 24, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(root / f"{name}.png")
    rows = [
        {"image": "a.png", "prompt": "<image>What is it?", "answer": " noise"},
        {"image": ["a.png", "b.png"], "prompt": "<image> and <image>:", "answer": " the two"},
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def eager(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    return model, AutoProcessor.from_pretrained(folder / "model")


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_generating_from_a_picture(folder, eager):
    model, processor = eager
    asked = "<image>What is it?"
    given = processor(images=[open_picture(folder / "a.png")], text=[asked], return_tensors="pt")
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        written = model.generate(**given, max_new_tokens=8, do_sample=False)[0, length:]
    wanted = processor.tokenizer.decode(written, skip_special_tokens=True)
    said = run("generate", folder / "model", "--prompt", asked, "--image", folder / "a.png",
               "--max-new-tokens", 8, "--greedy", "--json")  # fmt: skip
    assert said["text"] == wanted and said["backend"] == "program"


@pytest.mark.slow
@pytest.mark.parametrize("form", exhaustive_but(["model", "chat"], "chat"))
def test_run_lines_of_a_package(folder, tmp_path, monkeypatch, form):
    """Each line that compile prints is run as printed, with a picture where it names one."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = go.CompileOptions(emit=("torch",), verify=False)
    report = go.compile_model(str(folder / form), tmp_path / "out", options)
    model = AutoModelForImageTextToText.from_pretrained(folder / form).eval()
    processor = AutoProcessor.from_pretrained(folder / form)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(folder / "a.png", "picture.png")
    lines = report.artifact.usage
    assert len(lines) == 3 and "--image picture.png" in lines[2]
    for line in lines:
        asked = shlex.split(line, comments=True)[3 + line.startswith("graphopt")]
        text, pictures = asked, [open_picture("picture.png")] if "--image" in line else None
        if form == "chat":
            text = f"<user>{'<image>' if pictures else ''}{asked}</user>"
        given = processor(images=pictures, text=[text], return_tensors="pt")
        length = given["input_ids"].shape[1]
        with torch.no_grad():
            written = model.generate(**given, max_new_tokens=8, do_sample=False)[0, length:]
        wanted = plain_text(processor.tokenizer.decode(written, skip_special_tokens=True))
        # The last bytes may be the beginning of a letter.
        assert run_line(line).startswith(wanted.rstrip("\ufffd")) and len(wanted) > 3, line


@pytest.mark.slow
def test_a_package_looks_at_pictures(folder, tmp_path):
    """`generate` and `eval` run the package of an output folder, as they do the program."""
    model, out = folder / "model", tmp_path / "out"
    options = go.CompileOptions(emit=("torch", "hf"), verify=False)
    go.compile_model(str(model), out, options)
    assert not (out / "vision.safetensors").exists()  # the package reads it in the checkpoint
    args = ("--prompt", "<image>Q", "--image", folder / "b.png", "--max-new-tokens", 6, "--greedy",
            "--json")  # fmt: skip
    said = [
        run("generate", *form, *args) for form in ((model,), (out,), (out, "--backend=program"))
    ]
    assert [one["backend"] for one in said] == ["program", "torch", "program"]
    assert said[0]["text"] == said[1]["text"] == said[2]["text"]
    found = [run("eval", of, "--pictures", folder / "rows.jsonl", "--json") for of in (model, out)]
    assert found[1]["backend"] == "torch"
    # Two fp32 computations of a mean of logits of order 1.
    first, second = (one["picture_perplexity"] for one in found)
    assert second == pytest.approx(first, rel=1e-4)
    (out / "pictures" / "picture_tower.py").write_text("print('changed')")
    refused = CliRunner().invoke(app, ["generate", str(out), *map(str, args)])
    assert refused.exit_code == 1 and "is not the file that graphopt writes" in refused.output


@pytest.mark.slow
def test_a_compiled_model_looks_at_pictures_and_keeps_its_cache(folder, tmp_path, eager):
    go.compile_model(
        str(folder / "model"), tmp_path / "out", go.CompileOptions(emit=("hf",), verify=False)
    )
    args = ("--prompt", "<image>Q", "--image", folder / "b.png", "--max-new-tokens", 6, "--greedy",
            "--json")  # fmt: skip
    # One has a KV cache and goes on by it, the other reads the whole text for every token.
    cached, plain = (run("generate", m, *args) for m in (tmp_path / "out", folder / "model"))
    assert cached["text"] == plain["text"]
    program = go.capture(str(tmp_path / "out"))
    assert program.states and (tmp_path / "out" / "hf" / "processor_config.json").exists()


@pytest.mark.slow
def test_perplexity_of_answers(folder, eager):
    model, processor = eager
    total, count = 0.0, 0
    for row in read_picture_rows(folder / "rows.jsonl"):
        images = [open_picture(path) for path in row.images]
        prompt = processor(images=images, text=[row.prompt], return_tensors="pt")
        answer = processor.tokenizer(row.answer, return_tensors="pt")["input_ids"]
        ids = torch.cat((prompt["input_ids"], answer), 1)
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                pixel_values=prompt["pixel_values"],
            ).logits.double()  # fmt: skip
        rows = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
        total -= float(rows.gather(-1, answer[0, :, None]).sum())
        count += answer.shape[1]
    found = run("eval", folder / "model", "--pictures", folder / "rows.jsonl", "--json")
    # Two fp32 computations of a mean of logits of order 1.
    assert found["picture_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (found["picture_answers"], found["picture_tokens"]) == (2, count)


def test_the_picture_counts(folder):
    program = go.capture(str(folder / "model"))
    processor, model = Processor(program), SightedModel(program)
    found = []
    for name in ("a.png", "b.png"):
        inputs = processor.inputs("<image>What is it?", [folder / name])
        found.append(answer_log_likelihoods(model, *processor.with_answer(inputs, " noise")))
    assert not torch.allclose(*found, atol=1e-3)


def test_the_chat_template_places_pictures(folder):
    processor = Processor(go.capture(str(folder / "chat")))
    inputs = processor.inputs("What is it?", [folder / "a.png", folder / "b.png"])
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == f"<user>{'<image>' * 32}What is it?</user>"
    assert len(inputs["pixel_values"]) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("What is it?", "the prompt has 0 image tokens, and 1 pictures go with it"),
        ("<image> or <image>?", "the prompt has 2 image tokens, and 1 pictures go with it"),
    ],
)
def test_prompts_without_their_image_tokens(folder, prompt, message):
    processor = Processor(go.capture(str(folder / "model")))
    with pytest.raises(UsageError, match=f"rows, line 3: {message}.*Put '<image>' where"):
        processor.inputs(prompt, [folder / "a.png"], "rows, line 3")


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SourceError, match=r"text\.png cannot be read as a picture"):
        open_picture(tmp_path / "text.png")
    whole = tmp_path / "whole.png"
    Image.new("RGB", (64, 64), "red").save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:60])
    with pytest.raises(SourceError, match=r"cut\.png cannot be read as a picture"):
        open_picture(tmp_path / "cut.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    with pytest.raises(SourceError, match=r"large\.png has 9000 x 9000 pixels, more than"):
        open_picture(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("{", r"rows\.jsonl, line 1"),
        ('{"image": "a.png", "prompt": "x"}', "answer"),
        ('{"image": [], "prompt": "x", "answer": "y"}', "image"),
        ('{"image": "none.png", "prompt": "x", "answer": "y"}', r"there is no picture .*none\.png"),
        ('{"image": "../out.png", "prompt": "x", "answer": "y"}', r"out\.png"),
    ],
)
def test_malformed_rows(tmp_path, line, message):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    (folder / "rows.jsonl").write_text(line)
    with pytest.raises(SourceError, match=message):
        read_picture_rows(folder / "rows.jsonl")


@pytest.mark.slow
def test_inspect_says_what_is_around_the_decoder(folder):
    result = CliRunner().invoke(app, ["inspect", str(folder / "model")])
    program = go.capture(str(folder / "model"))
    count = sum(weight.numel for weight in program.vision.carried)
    assert result.exit_code == 0
    assert f"vision   {count / 1000:.1f}K parameters around the decoder" in result.output


@pytest.mark.slow
def test_models_and_forms_without_pictures(folder, tmp_path):
    save_tiny(tmp_path / "text")
    for args, message in (
        (("generate", tmp_path / "text", "--prompt", "x", "--image", folder / "a.png"),
         "is a model of text alone and takes no pictures"),
        (("eval", tmp_path / "text", "--pictures", folder / "rows.jsonl"),
         "is a model of text alone and takes no pictures"),
        (("generate", folder / "model", "--prompt", "x", "--image", folder / "a.png", "--backend",
          "onnx"), "holds no onnx artifact"),
        (("generate", folder / "model", "--image", folder / "a.png"), "goes with one --prompt"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code != 0 and message in " ".join(result.output.split()), result.output
