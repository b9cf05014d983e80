"""Experts in ONNX Runtime: numerics for every routing, weights that lie once, decoding."""

from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from carved import carved
from expert_parts import SPLITS, TOKENS, WIDTH, Part, random
from onnx.reference import ReferenceEvaluator
from programs import IDS, tiny_program
from tiny_models import byte_tokenizer

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Array, B, Call, Function, Program, S, Type, Value, Weight
from graphopt.ir.feed_forward import Split
from graphopt.ir.ops import get_op
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.storage.artifact import load_program
from graphopt.support.progress import silent

pytestmark = pytest.mark.oldest

PARTS = {
    "gated": ("silu", (4,)),
    "gated, biases": ("gelu_tanh", (4, 5, 6)),
    "two matrices": ("relu", ()),
    "two matrices, bias": ("gelu", (5,)),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", PARTS)
def test_chosen_experts(split, part, tmp_path):
    count, active = SPLITS[split]
    built = Part(tmp_path, count, active, *PARTS[part], routed=())
    for batch, length in TOKENS:
        scores = random(batch, length, count, seed=1)
        (gates,) = get_op("top_k_gating").reference([scores], {"top_k": active})
        assert bool((gates.sum(-1) == active).all())
        built.check(random(batch, length, WIDTH), scores, gates)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_gates_other_than_one(part, with_bias, tmp_path):
    """Also negative ones: a trained `gate_scale` has no bound."""
    count, active = 6, 2
    bias = 0.1 * random(count) if with_bias else None
    gate_scale = torch.tensor([-3.0, 2.0, -4.0, 1.0, 3.0, -2.0])
    built = Part(tmp_path, count, active, *PARTS[part], routed=(bias, gate_scale))
    for batch, length in TOKENS:
        scores = random(batch, length, count, seed=1)
        wide = [v if v is None else v.double() for v in (scores, bias, gate_scale)]
        (gates,) = get_op("top_k_gating").reference(wide, {"top_k": active})
        sizes = (gates != 0) * (1 + gate_scale.double().abs())
        built.check(random(batch, length, WIDTH), scores, gates, sizes)
    assert bool((gates < 0).any()) and bool((gates > 1).any())


@pytest.mark.parametrize("part", PARTS)
def test_any_gates(part, tmp_path):
    """All tokens at one expert, some at none, fewer than `active`, and an expert for all."""
    count, active = 4, 3
    built = Part(tmp_path, count, active, *PARTS[part])
    batch, length = 2, 30
    x = random(batch, length, WIDTH)
    one = torch.zeros(batch, length, count)
    one[..., 2] = 1
    some = random(batch, length, count, seed=4)
    some[..., 1] = 0
    some[0, 3:9] = 0
    some[1, ::2, 0] = 0
    for gates in (one, some, torch.zeros_like(one)):
        expected = built.check(x, gates, gates)
        assert bool((expected != 0).any()) == bool((gates != 0).any())


@pytest.mark.parametrize("part", PARTS)
def test_all_experts_of_all_tokens_are_the_dense_part(part, tmp_path):
    count, size = 8, 10
    built = Part(tmp_path, count, count, *PARTS[part], routed=(), neurons=size)
    x, scores = random(2, 7, WIDTH), random(2, 7, count)
    feeds = {"x": x.numpy(), "gates": scores.numpy()}
    feeds["input_ids"] = np.zeros((2, 7), dtype=np.int64)
    (found,) = built.session.run(None, {n: v for n, v in feeds.items() if n in built.inputs})
    act, weights = PARTS[part][0], {i: w.double() for i, w in built.weights.items()}
    wide = x.double() @ weights[2].t() + weights.get(5, 0)
    first = wide if 4 not in weights else x.double() @ weights[4].t() + weights.get(6, 0)
    (hidden,) = get_op(act).reference([first], {})
    dense = (hidden if 4 not in weights else hidden * wide) @ weights[3].t()
    assert float((torch.from_numpy(found) - dense).abs().max()) < 1e-5 * float(dense.abs().max())


def test_weights_lie_once_and_experts_are_rows_of_them(tmp_path):
    built = Part(tmp_path, 5, 2, "silu", (4, 5, 6), routed=(), neurons=64)
    graph = onnx.load(built.path).graph
    held = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    for index, turned in ((2, False), (3, True), (4, False), (5, False), (6, False)):
        value = built.weights[index].t() if turned else built.weights[index]
        for number, rows in enumerate(value.chunk(5)):
            assert np.array_equal(held[f"w{index}.{number}"], rows.numpy())
        assert f"w{index}" not in held and f"w{index}" in built.emitted.storage
    ends = [place.offset + 4 * np.prod(place.shape) for place in built.emitted.storage.values()]
    size = built.path.with_name("model.onnx.data").stat().st_size
    assert max(ends) <= size < max(ends) + 4096
    assert size < 4 * sum(w.numel() for w in built.weights.values()) + 5 * 4096


def test_standard_operators_are_enough(tmp_path):
    """A reference interpreter, which knows no others, gives what ONNX Runtime does."""
    built = Part(tmp_path, 5, 2, "gelu_tanh", (4, 5, 6), routed=(None, random(5)))
    model = onnx.load(built.path)
    assert {node.domain for node in model.graph.node} == {""}
    feeds = {"x": random(2, 6, WIDTH).numpy(), "gates": random(2, 6, 5).numpy()}
    feeds["input_ids"] = np.zeros((2, 6), dtype=np.int64)
    feeds = {name: value for name, value in feeds.items() if name in built.inputs}
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    (expected,) = built.session.run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_operands_that_are_no_weights(tmp_path):
    """Experts' matrices that the graph computes are split when it runs."""
    program = Program("part", inputs={"input_ids": IDS}, outputs=["logits"])
    function = Function("part", params=[Value("x"), Value("gates")])
    kinds = {"up": (36, 8), "down": (5, 36)}
    values = {name: random(*shape) for name, shape in kinds.items()}
    for name, value in values.items():
        function.weights[name] = Value(name)
        program.weights.add(Weight(name, Array(value)))
    matrices = [function.add("scale", [function.weights[n]], {"factor": 0.5}).output for n in kinds]
    attrs = {"act": "silu", "active": 1}
    function.results = [function.add("experts", [*function.params, *matrices], attrs).output]
    program.inputs |= {"x": Type((B, S, 8), torch.float32), "gates": Type((B, S, 3), torch.float32)}
    program.functions["part"] = function
    program.calls.append(Call("part", ["x", "gates"], ["logits"], {n: n for n in kinds}))
    OnnxEmitter().emit(program, tmp_path, "cpu", silent)
    session = ort.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    x, gates = random(2, 6, 8), torch.eye(3)[torch.arange(12).view(2, 6) % 3]
    names = {item.name for item in session.get_inputs()}
    feeds = {"input_ids": np.zeros((2, 6), dtype=np.int64), "x": x.numpy(), "gates": gates.numpy()}
    (found,) = session.run(None, {n: v for n, v in feeds.items() if n in names})
    wide = [x.double(), gates.double(), *(values[n].double() / 2 for n in kinds)]
    (expected,) = get_op("experts").reference(wide, attrs)
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=0, atol=1e-5)


# A carved model -------------------------------------------------------------------------------

IDS_OF_ROWS = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [0] * 5 + [1] * 4])


def moe_nodes(path):
    return [node for node in onnx.load(path, load_external_data=False).graph.node
            if node.op_type == "MoE"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("split", [Split(18, 5, 3), Split(0, 8, 2)], ids=str)
def test_a_carved_model_decodes(split, bias, moe, tmp_path):
    """A prefill, steps of several tokens and of one, rows padded on the left."""
    options = {"bias": bias, "layers": 3}
    program = carved(tiny_program(**options), split)
    cached = carved(tiny_program(cache=True, **options), split)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    cached.tokenizer = str(tmp_path / "tokenizer")
    go.emit(cached, tmp_path / "out", emit=("onnx",), onnx_moe=moe)
    assert len(moe_nodes(tmp_path / "out" / "onnx" / "model.onnx")) == 3 * moe
    model = OnnxArtifactModel(tmp_path / "out" / "onnx")
    whole = complete_inputs({"input_ids": IDS_OF_ROWS, "attention_mask": MASK})
    expected = Runner(program, dtype=torch.float64, mode="reference").logits(whole)
    cache, pieces = model.start(3), []
    for start, stop in itertools.pairwise((0, 4, 7, 8, 9)):
        step = {"input_ids": IDS_OF_ROWS[:, start:stop], "attention_mask": MASK[:, :stop]}
        step["position_ids"] = whole["position_ids"][:, start:stop]
        logits, cache = model.step(step, cache)
        pieces.append(logits)
    found, real = torch.cat(pieces, 1).double(), MASK.bool()
    # A few hundred roundings of 6e-8, one behind the other, and logits of order 1.
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moe", [False, True])
def test_a_carved_artifact_opens_again_with_its_weights(moe, bias, tmp_path):
    """Biases of 384 neurons are long enough for the data file."""
    program = tiny_program(cache=True, ffn=512, hidden=32, bias=bias)
    program = carved(program, Split(128, 4, 2))
    go.emit(program, tmp_path / "out", emit=("onnx",), onnx_moe=moe)
    again = load_program(tmp_path / "out")
    routed = [weight for weight in program.weights if weight.name.endswith(".experts")]
    places = json.loads((tmp_path / "out" / "program.json").read_text())["storage"]
    assert len(routed) == 2 * (5 if bias else 3)
    assert {places[weight.name]["file"] for weight in routed} == {"onnx/model.onnx.data"}
    for weight in program.weights:
        assert torch.equal(again.weights[weight.name].load(), weight.load()), weight.name


@pytest.mark.parametrize("moe", [False, True])
def test_a_carved_model_runs_in_genai(moe, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    program = carved(tiny_program(cache=True, vocab=512, head_dim=16), Split(18, 5, 3))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    program.tokenizer = str(tmp_path / "tokenizer")
    program.config = {"vocab_size": 512, "hidden_size": 32, "max_position_embeddings": 64,
                      "eos_token_id": 511, "bos_token_id": 1}  # fmt: skip
    go.emit(program, tmp_path / "out", emit=("onnx",), onnx_moe=moe)
    assert len(moe_nodes(tmp_path / "out" / "onnx" / "genai.onnx")) == 2 * moe
    prompt, count = [3, 17, 99, 4, 250], 12
    model = og.Model(str(tmp_path / "out" / "onnx"))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + count)
    generator = og.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = list(generator.get_sequence(0))
    ids = prompt[:]
    runner = Runner(carved(tiny_program(vocab=512, head_dim=16), Split(18, 5, 3)))
    for _ in range(count):
        logits = runner.logits(complete_inputs({"input_ids": torch.tensor([ids])}))
        ids.append(int(logits[0, -1].argmax()))
    assert found == ids
