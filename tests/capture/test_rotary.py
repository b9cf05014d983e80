"""Every kind of rotary scaling of transformers, on both sides of the length where it may switch.

Parameters are drawn. The captured program, `model.py` for a CPU and for a GPU (its reference form)
and the ONNX graph are compared with eager transformers: whole texts, padded batches, and texts
whose cache crosses the original length.
"""

from __future__ import annotations

import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from emitted import load_file
from families import TOLERANCE, Case, error
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program
from graphopt.ir.ops import is_aten
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.lowering.torch import TorchEmitter
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache
from graphopt.support.progress import silent

ORIGINAL = 12
"""Tokens of the original length; one step more and the long factors hold."""

OLD_NAMES = ("su", "yarn")
"""What checkpoints of Phi-3 called LongRoPE before it had its name; transformers reads them so."""

VOCAB = 64
CPU = onnxruntime.SessionOptions()
CPU.intra_op_num_threads = 1


def rope_parameters(kind: str, pairs: int, seed: int) -> dict[str, Any]:
    """Draw the parameters of one kind, for `pairs` pairs of features."""
    draw = random.Random(f"{kind} {seed}")
    made: dict[str, Any] = {"rope_type": kind, "rope_theta": draw.choice([1e4, 5e5, 1234.5])}
    if kind not in ("default", "longrope"):
        made["factor"] = draw.choice([2.0, 3.5, 8.0])
    if kind in ("yarn", "llama3", "longrope"):
        made["original_max_position_embeddings"] = ORIGINAL
    if kind == "yarn":
        betas, scales = (
            {"beta_fast": 20.0, "beta_slow": 2.0},
            {"mscale": 0.8, "mscale_all_dim": 0.5},
        )
        made |= draw.choice([{}, betas, scales, {"attention_factor": 1.3}, {"truncate": False}])
    if kind == "llama3":
        made |= {"low_freq_factor": draw.choice([1.0, 0.5]), "high_freq_factor": 4.0}
    if kind == "longrope":
        for name, most in (("short_factor", 2.0), ("long_factor", 9.0)):
            made[name] = sorted(round(draw.uniform(1.0, most), 3) for _ in range(pairs))
        made |= draw.choice([{}, {"attention_factor": 1.4}, {"factor": 6.0}])
    return made


def rope_model(family: str, kind: str, seed: int) -> PreTrainedModel:
    """Return a random model of a family with one kind of rotary parameters."""
    head_dim, partial = 32, 0.5 if family in ("phi3", "stablelm") else 1.0
    meant = "longrope" if family == "phi3" and kind in OLD_NAMES else kind
    parameters = rope_parameters(meant, int(head_dim * partial) // 2, seed) | {"rope_type": kind}
    if partial < 1:
        parameters["partial_rotary_factor"] = partial
    config: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": parameters,
        "max_position_embeddings": ORIGINAL if kind == "dynamic" else 8 * ORIGINAL,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "phi3" and meant == "longrope":
        config["original_max_position_embeddings"] = ORIGINAL
    if family == "phimoe":
        config |= {"num_local_experts": 2, "original_max_position_embeddings": ORIGINAL}
        parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    if family == "gemma3_text":
        other = {"rope_type": "default", "rope_theta": 1e4}
        config |= {
            "head_dim": head_dim,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": parameters, "sliding_attention": other},
        }
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        CONFIG_MAPPING[family](**config), dtype=torch.float32
    )
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model


def forget(model: nn.Module) -> None:
    """Drop kept long frequencies: transformers 5.17 fails where it has those of a layer type."""
    for part in model.modules():
        for name in [name for name in vars(part) if name.endswith("long_inv_freq")]:
            delattr(part, name)


def fresh(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Run transformers; what a longer text left behind in dynamic frequencies goes first."""
    forget(model)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=False)
        return model(**inputs, **options)


def batches(length: int) -> list[Case]:
    """Return a text alone, and three of which two are padded on the left."""
    generator = torch.Generator().manual_seed(length)
    found = []
    for batch in (1, 3):
        ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in range(1, batch):
            mask[row, : length * row // 4] = 0
        found.append(Case(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)))
    return found


LENGTHS = (3, ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL)


def steps(length: int) -> list[tuple[int, int]]:
    """A prompt, several tokens at once, and one; a long text crosses the original length."""
    ends = [0, max(1, min(length - 3, ORIGINAL - 2)), length - 1, length]
    return [pair for pair in itertools.pairwise(ends) if pair[0] < pair[1]]


def eager_in_steps(model: nn.Module, case: Case) -> Tensor:
    cache, parts = DynamicCache(), []
    for start, stop in steps(case.input_ids.shape[1]):
        inputs = {name: x[:, start:stop] for name, x in case.inputs.items()}
        inputs["attention_mask"] = case.attention_mask[:, :stop]
        forget(model)
        with torch.no_grad():
            parts.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


def onnx_in_steps(session: onnxruntime.InferenceSession, case: Case, whole: bool) -> Tensor:
    batch, length = case.input_ids.shape
    past = {
        item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32)
        for item in session.get_inputs() if item.name.startswith("past")
    }  # fmt: skip
    names, parts = [item.name for item in session.get_outputs()], []
    for start, stop in [(0, length)] if whole else steps(length):
        feed = {name: x[:, start:stop].numpy() for name, x in case.inputs.items()}
        feed["attention_mask"] = case.attention_mask[:, :stop].numpy()
        made = dict(zip(names, session.run(None, feed | past), strict=True))
        parts.append(torch.from_numpy(made.pop("logits")))
        past = {name.replace("present", "past_key_values"): x for name, x in made.items()}
    return torch.cat(parts, 1)


def torch_in_steps(model: Any, case: Case, whole: bool) -> Tensor:
    cache, parts = None, []
    length = case.input_ids.shape[1]
    for start, stop in [(0, length)] if whole else steps(length):
        with torch.no_grad():
            logits, cache = model(
                case.input_ids[:, start:stop], case.attention_mask[:, :stop],
                case.position_ids[:, start:stop], cache,
            )  # fmt: skip
        parts.append(logits)
    return torch.cat(parts, 1)


def onnx_session(program: Program, folder: Path) -> onnxruntime.InferenceSession:
    emitter = OnnxEmitter()
    emitter.check(program, "cpu")
    emitter.emit(program, folder, "cpu", silent)
    return onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", CPU)


def torch_model(program: Program, folder: Path, target: str) -> Any:
    emitter = TorchEmitter(in_compute_dtype=False)
    emitter.check(program, target)
    folder.mkdir()
    emitter.emit(program, folder, target, silent)
    device = {} if target == "cpu" else {"device": "cpu", "dtype": torch.float32}
    return load_file(folder / "model.py").load(folder, **device)


KINDS = sorted(set(ROPE_INIT_FUNCTIONS) - {"axial"} | {"default"})
"""All but the one for images."""

SWITCHING = ("dynamic", "longrope")
QUICK = ("yarn",)
"""What the inner loop runs."""
MATRIX = [
    *(("llama", kind, 0) for kind in KINDS),
    ("phi3", "longrope", 1),
]
REST = [
    ("stablelm", "dynamic", 2),
    ("gemma3_text", "longrope", 3),
    ("phimoe", "longrope", 4),
    *(("llama", kind, seed) for kind in KINDS for seed in (5, 6)),
    *(("phi3", kind, 7) for kind in ("default", *OLD_NAMES, "longrope")),
    *(("stablelm", kind, 8) for kind in ("linear", "longrope")),
    *(("gemma3_text", kind, 9) for kind in ("dynamic", "yarn", "llama3", "proportional")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "seed"),
    [
        *(pytest.param(*row, marks=pytest.mark.slow) for row in MATRIX if row[1] not in QUICK),
        *(row for row in MATRIX if row[1] in QUICK),
        *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in REST),
    ],
)
def test_every_kind_equals_eager_on_both_sides(
    family: str, kind: str, seed: int, tmp_path: Path
) -> None:
    targets = ("cpu", "ampere") if kind in SWITCHING and family == "llama" else ("cpu",)
    model = rope_model(family, kind, seed)
    program = capture(model)
    if family != "phimoe":
        functions = program.functions.values()
        assert not [n.op for f in functions for n in f.nodes if is_aten(n.op)]
    runner = Runner(program)
    cached = InsertKVCache().run(program, Context()).program
    session = onnx_session(cached, tmp_path / "onnx")
    models = {target: torch_model(cached, tmp_path / target, target) for target in targets}
    for length in LENGTHS:
        for case in batches(length):
            expected = fresh(model, case.inputs, use_cache=False).logits
            assert error(expected, runner.logits(case.inputs), case) < TOLERANCE, str(case)
            fresh(model, {"input_ids": case.input_ids[:, :1]})
            crossed = eager_in_steps(model, case)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that a GPU's form runs on a CPU
                found = {
                    f"{name}, {'whole' if whole else 'in steps'}": run(item, case, whole)
                    for name, item, run in (
                        ("onnx", session, onnx_in_steps),
                        *((target, made, torch_in_steps) for target, made in models.items()),
                    )
                    for whole in (True, False)
                }
            for name, logits in found.items():
                wanted = expected if "whole" in name else crossed
                assert error(wanted, logits, case) < TOLERANCE, f"{name}: {case}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "op"), [("longrope", "by_length"), ("dynamic", "ntk_frequencies")]
)
def test_frequencies_that_depend_on_the_length_are_one_node(kind: str, op: str) -> None:
    program = capture(rope_model("llama", kind, 0))
    nodes = [n for f in program.functions.values() for n in f.nodes if n.op == op]
    assert [node.attrs["length"] for node in nodes] == [ORIGINAL]
    # The test can tell: with the frequencies of short texts a long one comes out otherwise.
    case = batches(5 * ORIGINAL)[0]
    right = Runner(program).logits(case.inputs)
    nodes[0].attrs["length"] = 10 * ORIGINAL
    assert error(right, Runner(program).logits(case.inputs), case) > 100 * TOLERANCE


@pytest.mark.slow
def test_equal_factors_for_short_and_long_texts_are_a_constant() -> None:
    model = rope_model("llama", "longrope", 0)
    parameters = {**model.config.rope_parameters}
    parameters["long_factor"] = parameters["short_factor"]
    config = CONFIG_MAPPING["llama"](**{**model.config.to_dict(), "rope_parameters": parameters})
    program = capture(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
    assert "by_length" not in {n.op for f in program.functions.values() for n in f.nodes}


class _Odd(nn.Module):
    """A rotary module that switches, but to frequencies it holds nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(torch.arange(16) / 16)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        longest = position_ids.max() + 1
        angles = position_ids[..., None].float() * self.inv_freq
        angles = angles / (longest / 7 if longest > 7 else 1)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


@pytest.mark.slow
def test_another_dependence_on_the_length_is_refused_in_a_sentence() -> None:
    model = rope_model("llama", "default", 0)
    model.model.rotary_emb = _Odd()
    with pytest.raises(CaptureError, match=r"^model\.rotary_emb: its rotary tables depend on the"):
        capture(model)


class _Counting(nn.Module):
    """A language model that counts its calls, or that writes a buffer before it reads it."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.state = nn.Buffer(torch.ones(4))
        self.counts = counts

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.counts:
            self.state.add_(1)
        else:
            self.state.copy_(self.head.weight.square().mean(0))
        return self.head(self.embed(input_ids) * self.state)


@pytest.mark.slow
def test_a_buffer_that_the_forward_pass_changes_is_no_result() -> None:
    """It may be forgotten where it is written before it is read; else the model has a memory."""
    model = _Counting(counts=False)
    ids = torch.tensor([[1, 2, 3]])
    found = Runner(capture(model)).logits({"input_ids": ids})
    torch.testing.assert_close(found, model(ids).detach())
    with pytest.raises(CaptureError, match="changes the buffer 'state' and reads it in the next"):
        capture(_Counting(counts=True))
