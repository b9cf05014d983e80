"""ONNX with a cache against eager transformers: padding x lengths x steps x batch x graph.

Models whose queries and keys are rotated in every way there is, and some that rotate nothing. Each
is run whole by transformers and step by step by ONNX Runtime: where a row's positions and its
places in the cache differ, a prefill alone shows nothing, for rotation is relative.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TOLERANCE, Case, eager_logits, error, mostly_slow, random_model
from onnx_models import emit, run_in_one_buffer, run_in_steps, session
from tiny_models import byte_tokenizer
from torch import nn

from graphopt.capture import capture
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

LENGTH = 9
TWO: dict[str, Any] = {"num_hidden_layers": 2}
ONE: dict[str, Any] = {"num_hidden_layers": 1}
"""Where layers do not differ: that they have caches of their own shows in the others."""
PLAIN = TWO | {"attention_bias": False, "mlp_bias": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", PLAIN),
    "biases": ("qwen2", TWO | {"max_window_layers": 1}),
    "part of a head": ("phi", ONE),
    "neighbours": ("glm", ONE),
    "neighbours, part, in parallel": ("gptj", {"n_layer": 1}),
    "norms of heads": ("qwen3", ONE),
    "norms of all heads": ("olmo2", ONE),
    "windows": ("mistral", ONE),
    "windows, caps": ("gemma2", TWO),
    "two rotations": ("gemma3_text", TWO | {"layer_types": ["sliding_attention"] * 2}),
    "sinks": ("gpt_oss", TWO),
    "layers without": ("smollm3", TWO | {"no_rope_layers": [1, 0]}),
    "values of another width": ("deepseek_v3", {"num_hidden_layers": 1}),
    "no rotation": ("gpt2", {"n_layer": 1}),
    "slopes": ("bloom", {"n_layer": 1}),
    # GroupQueryAttention rotates heads of multiples of 16, and takes multiples of 8.
    "heads of 24": ("llama", PLAIN | ONE | {"head_dim": 24}),
    "heads of 20": ("llama", PLAIN | ONE | {"head_dim": 20}),
}
MASKS = {
    "whole": [[1] * 9] * 3,
    "one row": [[1] * 9],
    "one row, left": [[0] * 3 + [1] * 6],
    "left": [[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2],
    "left, the first row too": [[0] * 5 + [1] * 4, [0] * 2 + [1] * 7],
    "right of the prompt": [[1] * 4 + [0] * 2 + [1] * 3, [1] * 9],
    "both sides": [[0, 0, 1, 1, 0, 0, 1, 1, 1], [0] + [1] * 8],
}
STOPS = ((9,), (8, 9), (6, 7, 8, 9), (4, 7, 8, 9), (1, 2, 9))


def batch(mask: list[list[int]]) -> Case:
    """Return random ids; a token's position is how many real ones precede it."""
    real = torch.tensor(mask)
    ids = torch.randint(3, 128, real.shape, generator=torch.Generator().manual_seed(2))
    return Case(ids, real, (real.cumsum(-1) - 1).clamp(min=0))


def can(graph: str, case: Case, stops: tuple[int, ...]) -> bool:
    """GroupQueryAttention takes several rows and tokens only from nothing: the graph for genai."""
    several = any(b - a > 1 for a, b in itertools.pairwise(stops))
    return graph == "model" or case.input_ids.shape[0] == 1 or not several


@functools.cache
def captured(label: str) -> tuple[nn.Module, Program]:
    """Return a model and its program with a cache."""
    family, changes = MODELS[label]
    model = random_model(family, **changes)
    program = InsertKVCache().run(capture(model), Context()).program
    assert program.states
    # A form may depend on it, and a module alone has none.
    program.config = model.config.to_dict()
    return model, program


def emitted(label: str, folder: Path) -> tuple[nn.Module, Path]:
    """Return a model and the path of its `model.onnx`, beside which `genai.onnx` lies."""
    model, program = captured(label)
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    program.tokenizer = str(folder / "tokenizer")
    return model, emit(program, folder / "out")[1]


QUICK = ("plain", "windows, caps", "heads of 24")
LIKE_OTHERS = ("biases", "neighbours", "norms of heads", "norms of all heads", "windows",
               "heads of 20", "part of a head", "layers without")  # fmt: skip
"""What in the others is met with something else beside: parallel parts, caps, rotations of two
kinds or none."""


@pytest.mark.slow
@pytest.mark.parametrize("label", mostly_slow(MODELS, QUICK, LIKE_OTHERS))
def test_every_padding_and_every_split(label: str, tmp_path: Path) -> None:
    model, path = emitted(label, tmp_path)
    graphs = {"model": session(path)}
    if path.with_name("genai.onnx").exists():
        graphs["genai"] = session(path.with_name("genai.onnx"))
    for name, mask in MASKS.items():
        case = batch(mask)
        expected = eager_logits(model, case)
        for graph, runtime in graphs.items():
            for stops in STOPS:
                if can(graph, case, stops):
                    found = run_in_steps(runtime, case.inputs, stops)
                    assert error(expected, found, case) < TOLERANCE, (name, graph, stops)


@pytest.mark.slow
@pytest.mark.parametrize("label", mostly_slow((*QUICK, "sinks"), QUICK))
def test_past_and_present_in_one_buffer(label: str, tmp_path: Path) -> None:
    """As onnxruntime-genai runs it, with more room than the text needs."""
    model, path = emitted(label, tmp_path)
    runtime = session(path.with_name("genai.onnx"))
    for name, mask in MASKS.items():
        case = batch(mask)
        expected = eager_logits(model, case)
        for stops in STOPS:
            if can("genai", case, stops):
                found = run_in_one_buffer(runtime, case.inputs, stops, room=13)
                assert error(expected, found, case) < TOLERANCE, (name, stops)
