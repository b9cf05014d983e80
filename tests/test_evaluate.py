"""Perplexity and PIQA against plain computations, and every way to run a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny_models import VOCAB, byte_tokenizer, save_tiny, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.opening import open_language_model
from graphopt.backends.torch_artifact import TorchArtifactModel
from graphopt.capture import capture
from graphopt.errors import SourceError, UsageError
from graphopt.evaluate.perplexity import perplexity, read_text
from graphopt.evaluate.piqa import PiqaRow, piqa_accuracy, read_piqa
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import LanguageModel, ProgramModel, load_tokenizer
from graphopt.execute.likelihoods import token_log_likelihoods
from graphopt.ir.graph import Program
from graphopt.ir.weights import Array
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

TEXT = "the quick brown fox jumps over the lazy dog, then the other one. " * 4


class Bigram(LanguageModel):
    """Logits that depend on the current token alone."""

    backend = "program"

    def __init__(self, table: Tensor) -> None:
        self.name, self.config, self.tokenizer = "bigram", {}, None
        self.table = table

    def start(self, batch: int) -> Any:
        return None

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        return self.table[inputs["input_ids"]], None


@pytest.fixture
def bigram() -> Bigram:
    torch.manual_seed(0)
    return Bigram(torch.randn(VOCAB, VOCAB))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model().double()


@pytest.mark.slow
def test_perplexity_of_a_model_equals_brute_force(folder: Path, reference: PreTrainedModel) -> None:
    model = open_language_model(str(folder))
    tokenizer = load_tokenizer(model)
    calls: list[tuple[str, int, int]] = []
    result = perplexity(
        model, tokenizer, TEXT, windows=3, seqlen=20, progress=lambda *call: calls.append(call)
    )
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    losses = []
    for start in (0, 20, 40):
        window = ids[None, start : start + 20]
        with torch.no_grad():
            losses.append(float(reference(window, labels=window).loss))
    # fp32 logits of size about 10 are off by 1e-5 at most, and so is their mean.
    assert math.log(result.perplexity) == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert (result.tokens, result.windows, result.seqlen) == (60, 3, 20)
    assert calls == [("perplexity", done, 3) for done in range(4)]


def test_perplexity_takes_all_whole_windows(bigram: Bigram) -> None:
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    result = perplexity(bigram, tokenizer, TEXT, seqlen=50)
    assert result.windows == len(ids) // 50 > 1
    logs = bigram.table.double().log_softmax(-1)[ids[:-1], ids[1:]]
    inside = torch.arange(1, len(ids)) % 50 != 0
    inside &= torch.arange(1, len(ids)) < result.windows * 50
    assert math.log(result.perplexity) == pytest.approx(float(-logs[inside].mean()), abs=1e-6)


class Mean(Bigram):
    """Adds what all tokens have in common to the logits of each."""

    def step(self, inputs: Any, cache: Any) -> tuple[Tensor, Any]:
        logits, cache = super().step(inputs, cache)
        return logits + logits.mean(1, keepdim=True), cache


def test_a_model_that_sees_both_ways_has_no_likelihoods(bigram: Bigram) -> None:
    model = Mean(bigram.table)
    rows = [PiqaRow("a goal", ("one", "two"), 0)]
    for refused in (
        lambda: perplexity(model, byte_tokenizer(), "some text " * 9, seqlen=16),
        lambda: piqa_accuracy(model, byte_tokenizer(), rows),
    ):
        with pytest.raises(SourceError, match="sees both ways"):
            refused()


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    result = perplexity(model, byte_tokenizer(), TEXT, seqlen=16)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_log_likelihoods_in_parts() -> None:
    logits = torch.randn(3, 200, 11) * 30
    targets = torch.randint(0, 11, (3, 200))
    expected = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    got = token_log_likelihoods(logits, targets)
    # Two fp32 numbers of size below 256 are subtracted.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("short", {"seqlen": 10}, SourceError, r"too short: its 5 tokens.*--seqlen 5"),
        ("", {"seqlen": 10}, SourceError, "too short: its 0 tokens"),
        ("text", {"seqlen": 1}, UsageError, "at least 2"),
        ("text", {"windows": 0}, UsageError, "at least 1"),
        ("text", {"seqlen": 200}, UsageError, r"exceeds the 128.*--seqlen 128"),
    ],
)
def test_perplexity_refusals(
    bigram: Bigram, text: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    bigram.config = {"max_position_embeddings": 128}
    with pytest.raises(error, match=message):
        perplexity(bigram, byte_tokenizer(), text, **options)


def test_lines_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("a b\r\nc\n\nd é\u2028\n".encode())
    assert read_text(tmp_path / "text") == "a b\n\nc\n\n\n\nd é\u2028"


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"a\xff", "not UTF-8.*0xff")]
)
def test_bad_text(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_text(tmp_path / "text")
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        read_text(tmp_path / "nothing")


ROWS = [
    PiqaRow("open a jar", ("turn the lid", "shout at the lid until it gives in"), 0),
    PiqaRow("boil water", ("freeze it", "heat it"), 1),
    PiqaRow("sleep", ("zzz", "lie down in the bed"), 1),
]


def brute_force_scores(reference: PreTrainedModel, row: PiqaRow) -> list[float]:
    tokenizer = byte_tokenizer()
    scores = []
    for solution in row.solutions:
        prompt = tokenizer(f"Question: {row.goal}\nAnswer:")["input_ids"]
        whole = tokenizer(f"Question: {row.goal}\nAnswer: {solution}")["input_ids"]
        total = 0.0
        for place in range(len(prompt), len(whole)):
            with torch.no_grad():
                logits = reference(torch.tensor([whole[:place]])).logits[0, -1]
            total += float(logits.log_softmax(-1)[whole[place]])
        scores.append(total / len(solution))
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_piqa_equals_brute_force(folder: Path, reference: PreTrainedModel, batch: int) -> None:
    model = open_language_model(str(folder))
    scores = [brute_force_scores(reference, row) for row in ROWS]
    assert all(abs(first - second) > 1e-3 for first, second in scores)
    # Every label that agrees counts, whatever the model's taste.
    for flipped in range(len(ROWS) + 1):
        rows = [
            PiqaRow(r.goal, r.solutions, int(s[1] > s[0]) ^ int(number < flipped))
            for number, (r, s) in enumerate(zip(ROWS, scores, strict=True))
        ]
        result = piqa_accuracy(model, byte_tokenizer(), rows, batch=batch)
        assert result.accuracy == (len(ROWS) - flipped) / len(ROWS)
    assert result.rows == len(ROWS)


def test_piqa_question_longer_than_the_model(bigram: Bigram) -> None:
    bigram.config = {"max_position_embeddings": 16}
    assert piqa_accuracy(bigram, byte_tokenizer(), ROWS).rows == 3


def test_read_piqa(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"goal": "g", "sol1": "a\\u2028", "sol2": "b", "label": 1}\n\n')
    assert read_piqa(path) == [PiqaRow("g", ("a\u2028", "b"), 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, column 2, is not valid JSON"),
        ("[]", "line 2 is .*, and it should be a valid dictionary"),
        ('{"goal": "g", "sol1": "a", "sol2": "b"}', "'label' is missing"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}', "'label' is 2, and it should be"),
        ('{"goal": "g", "sol1": 1, "sol2": "b", "label": 0}', "'sol1' is 1, and it should be"),
        (
            '{"goal": "g", "sol1": "", "sol2": "b", "label": 0}',
            "'sol1' is '', and it should have at least 1 character",
        ),
    ],
)
def test_bad_piqa_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}}\n{line}\n')
    with pytest.raises(SourceError, match=message):
        read_piqa(path)
    path.write_text("\n")
    with pytest.raises(SourceError, match="is empty"):
        read_piqa(path)


def steps_equal_whole(model: LanguageModel) -> None:
    """Whatever the steps, the logits are those of the whole sequence; padding included."""
    ids = torch.randint(0, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = model.logits(ids, mask)
    assert whole.dtype == torch.float32 and whole.shape[:2] == (2, 9)
    cache, parts = model.start(2), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        logits, cache = model.step(complete_inputs(inputs, start), cache)
        parts.append(logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_program_model(folder: Path, reference: PreTrainedModel, cached: bool) -> None:
    program = capture(str(folder))
    if cached:
        program = InsertKVCache().run(program, Context()).program
    assert bool(program.states) == cached
    model = ProgramModel(program, keep_weights=False)
    steps_equal_whole(model)
    ids = torch.randint(0, VOCAB, (1, 12))
    with torch.no_grad():
        expected = reference(ids).logits.float()
    torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_program_model_refuses_nan(folder: Path) -> None:
    program = capture(str(folder))
    weight = program.weights["model.norm.weight"]
    program.weights.replace(replace(weight, producer=Array(torch.full(weight.shape, torch.nan))))
    with pytest.raises(SourceError, match=r"'model\.norm\.weight' holds 32 NaN"):
        ProgramModel(program).logits(torch.tensor([[1, 2]]))


def write_bigram_onnx(folder: Path, table: Tensor, *, cached: bool, extra: str = "") -> Path:
    """A graph that looks logits up, and extends a cache it does not need."""
    past: list[str | int | None] = ["B", 2, "P", 4]
    present: list[str | int | None] = ["B", 2, "T", 4]
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    inputs = [info("input_ids", TensorProto.INT64, ["B", "S"])]
    outputs = [info("logits", TensorProto.FLOAT, ["B", "S", VOCAB])]
    constants = [onnx.numpy_helper.from_array(table.numpy(), "table")]
    if cached:
        inputs.append(info("attention_mask", TensorProto.INT64, ["B", "T"]))
        shape = [
            helper.make_node("Shape", ["input_ids"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "zero"], ["batch"]),
            helper.make_node("Gather", ["sizes", "one"], ["length"]),
            helper.make_node("Concat", ["batch", "heads", "length", "width"], ["new"], axis=0),
            helper.make_node("ConstantOfShape", ["new"], ["zeros"]),
        ]
        nodes += shape
        for name, number in (("zero", 0), ("one", 1), ("heads", 2), ("width", 4)):
            constants.append(helper.make_tensor(name, TensorProto.INT64, [1], [number]))
        for kind in ("key", "value"):
            old, now = f"past_key_values.0.{kind}", f"present.0.{kind}"
            nodes.append(helper.make_node("Concat", [old, "zeros"], [now], axis=2))
            inputs.append(info(old, TensorProto.FLOAT, past))
            outputs.append(info(now, TensorProto.FLOAT, present))
    if extra:
        inputs.append(info(extra, TensorProto.INT64, ["B"]))
    graph = helper.make_graph(nodes, "bigram", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize("cached", [True, False])
def test_onnx_model(tmp_path: Path, bigram: Bigram, cached: bool) -> None:
    folder = write_bigram_onnx(tmp_path / "onnx", bigram.table, cached=cached)
    byte_tokenizer().save_pretrained(folder)
    model = open_language_model(str(folder))
    assert isinstance(model, OnnxArtifactModel)
    steps_equal_whole(model)
    tokenizer = load_tokenizer(model)
    got = perplexity(model, tokenizer, TEXT, seqlen=30).perplexity
    assert got == pytest.approx(perplexity(bigram, tokenizer, TEXT, seqlen=30).perplexity)


def test_onnx_cache_has_the_shape_the_graph_states(tmp_path: Path, bigram: Bigram) -> None:
    model = OnnxArtifactModel(write_bigram_onnx(tmp_path, bigram.table, cached=True))
    cache = model.start(3)
    assert {n: v.shape for n, v in cache.items()} == {
        f"past_key_values.0.{kind}": (3, 2, 0, 4) for kind in ("key", "value")
    }
    _, cache = model.step(complete_inputs({"input_ids": torch.ones(3, 5).long()}), cache)
    assert cache["past_key_values.0.key"].shape == (3, 2, 5, 4)


def test_bad_onnx(tmp_path: Path, bigram: Bigram) -> None:
    folder = write_bigram_onnx(tmp_path, bigram.table, cached=True, extra="pixels")
    with pytest.raises(SourceError, match="'pixels' is unexpected"):
        OnnxArtifactModel(folder)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(SourceError, match=r"model\.onnx is no ONNX model"):
        OnnxArtifactModel(folder)


def _other_signature(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    def change(graph: Any) -> None:
        (value,) = (v for v in (*graph.input, *graph.output) if v.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, kind, shape))

    return change


def _table_of_one_row(graph: Any) -> None:
    (table,) = (tensor for tensor in graph.initializer if tensor.name == "table")
    table.CopyFrom(helper.make_tensor("table", TensorProto.FLOAT, [1, VOCAB], [0.0] * VOCAB))


def _one_row_of_logits(graph: Any) -> None:
    graph.node[0].input[1] = "zero"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_signature("past_key_values.0.key", ["B", "H", "P", 4]), "'past_key_values.0.key'"),
        (_other_signature("past_key_values.0.key", ["B", 2, "P"]), "cannot load|shape .'B', 2"),
        (_other_signature("past_key_values.0.key", ["B", 2**40, "P", 4]), "cannot load|shape .'B'"),
        (_other_signature("input_ids", ["B"], TensorProto.INT64), "cannot (load|run)"),
        (_other_signature("input_ids", ["B", "S"], TensorProto.INT32), "cannot run"),
        (_other_signature("attention_mask", [7, 7], TensorProto.INT64), "cannot run"),
        (_table_of_one_row, "cannot run"),
        (_one_row_of_logits, "gives logits of shape|cannot load"),
    ],
)
def test_onnx_that_loads_and_does_not_run(
    tmp_path: Path, bigram: Bigram, change: Any, message: str
) -> None:
    path = write_bigram_onnx(tmp_path, bigram.table, cached=True) / "model.onnx"
    changed = onnx.load(path)
    change(changed.graph)
    onnx.save(changed, path)
    with pytest.raises(SourceError, match=message):
        OnnxArtifactModel(tmp_path).logits(torch.ones(1, 5).long())


MODEL_PY = """
import torch

def load(folder, dtype=None, device=None):
    open(folder / "ran", "w").close()
    torch.manual_seed(0)
    return Model()

class Model(torch.nn.Module):
    table = torch.randn(300, 300)

    def empty_cache(self, batch):
        return batch

    def forward(self, input_ids, attention_mask, position_ids, cache):
        assert attention_mask.shape[0] == position_ids.shape[0] == cache
        return self.table[input_ids], cache
"""


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emitter, as far as it matters here: it always writes MODEL_PY."""
    module = ModuleType("graphopt.lowering.torch")
    module.source_files = lambda program, target: {"model.py": MODEL_PY}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "graphopt.lowering.torch", module)


def test_torch_model(tmp_path: Path, renderer: None) -> None:
    (tmp_path / "model.py").write_text(MODEL_PY)
    byte_tokenizer().save_pretrained(tmp_path)
    model = TorchArtifactModel(tmp_path, Program("small"))
    steps_equal_whole(model)
    assert model.tokenizer == tmp_path and (tmp_path / "ran").exists()


def test_changed_model_file_is_not_run(tmp_path: Path, renderer: None) -> None:
    (tmp_path / "model.py").write_text(MODEL_PY + "\n")
    with pytest.raises(SourceError, match=r"is not the file that graphopt writes.*--trust-remote"):
        TorchArtifactModel(tmp_path, Program("small"))
    assert not (tmp_path / "ran").exists()
    TorchArtifactModel(tmp_path, Program("small"), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_model_file_that_fails(tmp_path: Path, renderer: None) -> None:
    (tmp_path / "model.py").write_text(
        "def load(folder, dtype=None, device=None):\n    raise OSError('no weights')\n"
    )
    with pytest.raises(SourceError, match=r"model\.py cannot be loaded: no weights"):
        TorchArtifactModel(tmp_path, Program("small"), trust_remote_code=True)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_backend_that_was_not_emitted(folder: Path, backend: Any) -> None:
    with pytest.raises(UsageError, match=f"holds no {backend} artifact.*--emit {backend}"):
        open_language_model(str(folder), backend)


def test_tokenizer_refusals(tmp_path: Path, bigram: Bigram) -> None:
    with pytest.raises(SourceError, match="bigram has no tokenizer"):
        load_tokenizer(bigram)
    (tmp_path / "tokenizer.json").write_text("{}")
    bigram.tokenizer = tmp_path
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_tokenizer(bigram)
