"""A real model through everything: compiled once, run in every form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.backends.opening import open_language_model
from graphopt.compiler import CompileOptions, compile_model
from graphopt.evaluate.perplexity import perplexity, read_text
from graphopt.execute.language_model import load_tokenizer

pytestmark = [pytest.mark.network, pytest.mark.slow]

PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ")
TOKENS = 24


@pytest.fixture(scope="module")
def out(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    report = compile_model(demo, folder, CompileOptions(emit=("hf", "torch", "onnx")))
    assert report.passes[-1].verification == "passed"
    return folder


def test_onnxruntime_genai_decodes_what_transformers_does(out: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32).eval()
    model = og.Model(str(out / "onnx"))
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            )[0].tolist()
        params = og.GeneratorParams(model)
        length = len(ids) + TOKENS
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(token) for token in generator.get_sequence(0)] == expected


def test_every_form_has_the_same_perplexity(demo: str, out: Path, test_text: Path) -> None:
    text = read_text(test_text)
    found = {}
    for name, spec, backend in (
        ("source", demo, "auto"),
        ("program", str(out), "program"),
        ("torch", str(out), "torch"),
        ("onnx", str(out), "onnx"),
        ("hf", str(out / "hf"), "auto"),
    ):
        model = open_language_model(spec, backend)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(model)
        found[name] = perplexity(model, tokenizer, text, windows=1, seqlen=128).perplexity
    assert 10 < found["source"] < 60
    for name, value in found.items():
        # One sum of products in another order: far inside the promised 0.1 %.
        assert value == pytest.approx(found["source"], rel=1e-4), name
