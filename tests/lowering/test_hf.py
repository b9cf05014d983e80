"""Checkpoints for transformers, of dense and of carved models of families of every layout."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from carved import carved
from checkpoints import CLOSE, loaded, own_modules, padded_case
from families import captured, eager_logits, error, mostly_slow, random_model
from programs import tiny_program
from sampling import exhaustive_but
from torch import Tensor, nn
from transformers import AutoConfig

import graphopt as go
from graphopt.capture import capture
from graphopt.capture.model import attention_implementation
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.files.safetensors import read_checkpoint
from graphopt.ir import KVLayout
from graphopt.ir.blocks import remove_blocks
from graphopt.ir.feed_forward import Split
from graphopt.ir.relayout import with_layouts
from graphopt.ir.weights import Array, Missing, Rows, Transposed, Weight
from graphopt.lowering.hf import HfEmitter, shards
from graphopt.lowering.hf.checkpoint_assembly import Fragment, assemble

LAYOUTS = ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "phi3", "gemma2", "mpt", "mixtral",
           "codegen"]  # fmt: skip
"""Plain, transposed, interleaved, multi-query, fused by heads, fused by rows, tied, renamed,
experts one by one, fused and interleaved."""

EVERY_DAY = [family for family in LAYOUTS if family not in ("mpt", "codegen")]
"""Layouts with a name each; the two others are GPT-2's, renamed, and GPT-NeoX's, in parts."""

CARVED: dict[str, tuple[str, tuple[Split | None, ...], str]] = {
    # With biases; a layer as it was, one with fewer neurons and no experts.
    "llama": ("llama", (Split(32, 4, 2), None, Split(0, 8, 3), Split(64, 0, 0)), "linear"),
    "phi3": ("phi3", (Split(32, 4, 2),), "linear"),  # one matrix for gate and up
    "gpt2": ("gpt2", (Split(64, 3, 1),), "linear"),  # transposed
    "opt": ("opt", (Split(32, 4, 2), Split(0, 4, 1)) * 2, "linear"),  # no module of their own
    "bloom": ("bloom", (Split(0, 8, 2),), "linear"),  # a module that adds the stream
    "falcon": ("falcon", (Split(64, 3, 2),), "linear"),  # beside attention
    "a router of neurons": ("gpt2", (Split(32, 4, 2),), "neuron"),
    "fewer neurons": ("bloom", (Split(48, 0, 0),), "linear"),  # which no config says
}
"""What is carved, how, and with what router."""

OFTEN = ("llama", "phi3", "gpt2", "opt", "bloom", "falcon")
"""One of each kind of class that is written; the others differ in split and router."""

Source = Callable[[str], "tuple[nn.Module, Path, go.Program]"]
Alone = dict[str, "tuple[Tensor, dict[str, Any], Path]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return what gives a family's random model, its checkpoint, and the program of that."""

    @functools.cache
    def checkpoint(family: str) -> tuple[nn.Module, Path, go.Program]:
        # Layers that alternate are captured one by one, and three do.
        fewer = {"num_hidden_layers": 3} if family == "gemma2" else {}
        model, folder = random_model(family, **fewer), tmp_path_factory.mktemp(family)
        return model, folder, _program(model, folder)

    return checkpoint


def _program(model: nn.Module, folder: Path) -> go.Program:
    model.save_pretrained(folder)
    program, _ = go.Pipeline.default().run(go.capture(str(folder)), go.RunOptions(verify=False))
    return program


def _loaded(folder: Path) -> nn.Module:
    # As `random_model` has it: two implementations of attention differ in the last bits.
    implementation = attention_implementation(AutoConfig.from_pretrained(folder))
    return loaded(folder, attn_implementation=implementation)


@pytest.mark.slow
def test_an_output_folder_is_a_model_again(source: Source, tmp_path: Path) -> None:
    (model, _, program), case = source("gpt2"), padded_case()
    go.emit(program, tmp_path / "out", emit=("hf",))
    program = go.capture(str(tmp_path / "out"))
    assert error(eager_logits(model, case), Runner(program).logits(case.inputs), case) < 1e-5
    # What lies in hf/ is not stored twice; weights cut out of a fused one are.
    stored = set(read_checkpoint(tmp_path / "out"))
    trained = {weight.name for weight in program.used_weights() if not weight.constant}
    assert stored & trained == {name for name in trained if ".c_attn." in name}


@pytest.mark.slow
def test_layouts_of_caches_are_no_part_of_a_checkpoint(source: Source) -> None:
    _, _, program = source("llama")
    HfEmitter().check(with_layouts(program, {"kv.1": KVLayout("paged", 4)}), "cpu")


@pytest.mark.slow
def test_large_checkpoints_are_sharded(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LARGEST_SHARD", 100_000)
    (model, _, program), case = source("llama"), padded_case()
    go.emit(program, tmp_path / "out", emit=("hf",))
    files = sorted(path.name for path in (tmp_path / "out/hf").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(eager_logits(model, case), eager_logits(_loaded(tmp_path / "out/hf"), case))


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(LAYOUTS, *EVERY_DAY))
def test_a_checkpoint_goes_through_and_comes_back_the_same(
    family: str, source: Source, tmp_path: Path
) -> None:
    (model, folder, program), case = source(family), padded_case()
    go.emit(program, tmp_path / "out", emit=("hf",))
    again = _loaded(tmp_path / "out" / "hf")
    # The same class with the same weights: bit for bit.
    assert torch.equal(eager_logits(model, case), eager_logits(again, case))
    names = [set(read_checkpoint(path)) for path in (folder, tmp_path / "out/hf")]
    assert names[0] == names[1]
    assert again.config.use_cache == model.config.use_cache
    assert again.config.architectures == [type(model).__name__]


ALONE = """
import inspect
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
inputs = torch.load(root / "inputs.pt")
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    found = {}
    try:
        AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=False)
    except ValueError as error:
        found["refused"] = str(error)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "hf", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    found["info"] = {key: list(value) for key, value in info.items() if value}
    model.eval()
    with torch.no_grad():
        names = inspect.signature(model.forward).parameters
        accepted = {key: value for key, value in inputs.items() if key in names}
        found["logits"] = model(**accepted).logits
        prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        found["texts"] = [
            model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        model.save_pretrained(folder / "again")
        again = AutoModelForCausalLM.from_pretrained(
            folder / "again", trust_remote_code=True, dtype=torch.float32
        )
        found["again"] = again.eval()(**accepted).logits
    torch.save(found, folder / "found.pt")
assert "graphopt" not in sys.modules
"""


@pytest.fixture(scope="module")
def alone(
    request: pytest.FixtureRequest, source: Source, tmp_path_factory: pytest.TempPathFactory
) -> Alone:
    """Every carved model emitted, and read by a process that knows nothing of graphopt."""
    root = tmp_path_factory.mktemp("alone")
    case = padded_case()
    torch.save(case.inputs, root / "inputs.pt")
    expected = {}
    every = any("exhaustive" in item.keywords for item in request.session.items)
    for label in CARVED if every else OFTEN:
        family, splits, router = CARVED[label]
        program = carved(source(family)[2], *splits, router=router)
        expected[label] = Runner(program).logits(case.inputs)
        report = go.emit(program, root / label, emit=("hf",))
        assert report.artifact is not None
        assert "trust_remote_code=True" in report.artifact.usage[0]
    modules = tmp_path_factory.mktemp("modules")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(root)],
        capture_output=True, text=True, check=False,
        env={"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        label: (logits, torch.load(root / label / "found.pt"), root / label)
        for label, logits in expected.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("label", exhaustive_but(CARVED, *OFTEN))
def test_transformers_alone_gives_what_the_carved_program_gives(alone: Alone, label: str) -> None:
    expected, found, _ = alone[label]
    assert found["info"] == {}
    assert error(expected, found["logits"], padded_case()) < CLOSE
    assert torch.equal(*found["texts"])
    assert torch.equal(found["again"], found["logits"])
    assert "trust_remote_code=True" in found["refused"]


@pytest.mark.slow
@pytest.mark.usefixtures(own_modules.__name__)
def test_a_carved_output_folder_and_its_checkpoint_are_models_again(alone: Alone) -> None:
    expected, _, folder = alone["llama"]
    for place, trusted in ((folder, False), (folder / "hf", True)):
        program = go.capture(str(place), trust_remote_code=trusted)
        logits = Runner(program).logits(padded_case().inputs)
        assert error(expected, logits, padded_case()) < CLOSE
    with pytest.raises(go.GraphoptError, match="trust"):
        go.capture(str(folder / "hf"))


@pytest.mark.slow
def test_the_code_of_carved_models_is_formatted_and_says_which_class(alone: Alone) -> None:
    pytest.importorskip("ruff")
    codes = {
        family: folder / "hf" / "modeling_carved.py" for family, (_, _, folder) in alone.items()
    }
    settings = str(Path(__file__).parents[2] / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", settings, *codes.values()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    for label, code in codes.items():
        config = json.loads((code.parent / "config.json").read_text())
        (name,) = config["architectures"]
        assert f"class {name}(" in code.read_text(), label
        assert config["auto_map"]["AutoModelForCausalLM"] == f"modeling_carved.{name}"
        assert "graphopt" not in code.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon"])
def test_fewer_neurons_in_all_layers_are_a_config(
    family: str, source: Source, tmp_path: Path
) -> None:
    """GPT-2's entry is null, Phi-3 has one matrix for gate and up."""
    program, case = carved(source(family)[2], Split(48, 0, 0)), padded_case()
    go.emit(program, tmp_path / "out", emit=("hf",))
    assert not list((tmp_path / "out/hf").glob("*.py"))
    model = loaded(tmp_path / "out/hf", trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.")
    assert error(Runner(program).logits(case.inputs), eager_logits(model, case), case) < CLOSE


def _refused(program: go.Program) -> str:
    with pytest.raises(LoweringError) as caught:
        HfEmitter().check(program, "cpu")
    assert caught.value.remedy
    return caught.value.message


@pytest.mark.slow
def test_what_no_config_makes_is_refused_with_the_reason(source: Source) -> None:
    _, _, program = source("gemma2")
    HfEmitter().check(program, "cpu")

    changed = program.copy()
    for node in changed.functions["block"].nodes:
        if node.op == "gelu_tanh":
            node.op = "gelu"
    assert "model.layers.0: gelu(" in _refused(changed)
    assert "not gelu_tanh(" in _refused(changed)

    shorter = program.copy()
    del shorter.calls[2]
    shorter.calls[2].args = list(program.calls[2].args)
    assert "it has 4 calls, not 5" in _refused(shorter)
    shorter.config["num_hidden_layers"] = 2
    del shorter.config["layer_types"][1]
    HfEmitter().check(shorter, "cpu")  # without a block it is a checkpoint again, with its config

    wide = program.copy()
    for part, shape in {"gate": (102, 64), "up": (102, 64), "down": (64, 102)}.items():
        name = wide.calls[1].weights[f"mlp.{part}_proj.weight"]
        wide.weights.replace(Weight(name, Array(torch.zeros(shape)), name))
    assert "_proj.weight' is [" in _refused(wide)

    untied = program.copy()
    head = untied.calls[-1].weights
    value = untied.weights[head["lm_head.weight"]].load().clone()
    untied.weights.add(Weight("own", Array(value)))
    head["lm_head.weight"] = "own"
    assert "the config ties" in _refused(untied)
    untied.config["tie_word_embeddings"] = False
    HfEmitter().check(untied, "cpu")

    turned = program.copy()
    slot = next(s for s in turned.calls[0].weights if "inv_freq" in s)
    name = turned.calls[0].weights[slot]
    value = turned.weights[name].load() * 2
    turned.weights.replace(Weight(name, Array(value), constant=True))
    assert "is not what the config makes it" in _refused(turned)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", exhaustive_but(["olmo3", "gemma3_text", "gpt_neo"], "gemma3_text")
)
def test_layers_of_one_kind_alone_are_what_a_config_makes(family: str, tmp_path: Path) -> None:
    """Captured with both kinds, and again with one: parameters and operands in another order."""
    (model, program), case = captured(family), padded_case()
    program.config = model.config.to_dict()
    windows = model.config.layer_types if family != "gpt_neo" else model.config.attention_layers
    for kind in set(windows):
        pruned = program.copy()
        remove_blocks(pruned, [index for index, own in enumerate(windows) if own == kind])
        go.emit(pruned, tmp_path / kind, emit=("hf",))
        again = _loaded(tmp_path / kind / "hf")
        expected = Runner(pruned).logits(case.inputs)
        assert error(expected, eager_logits(again, case), case) < 1e-5
        assert again.config.num_hidden_layers == len(windows) - windows.count(kind)


@pytest.mark.slow
def test_trained_buffers_are_weights(tmp_path: Path) -> None:
    """The bias of DeepSeek's router is a buffer of the class, and differs from layer to layer."""
    model = random_model("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=0)
    case = padded_case()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    program = _program(model, tmp_path / "source")
    assert error(eager_logits(model, case), Runner(program).logits(case.inputs), case) < 1e-4
    go.emit(program, tmp_path / "out", emit=("hf",))
    assert torch.equal(eager_logits(model, case), eager_logits(_loaded(tmp_path / "out/hf"), case))


def test_a_module_without_a_config_has_no_checkpoint() -> None:
    assert "without a transformers config" in _refused(tiny_program())


def test_parts_must_fill_the_tensor() -> None:
    whole = torch.arange(24.0).view(4, 6)
    base = Missing((4, 6), torch.float32, "w")
    cut = (Transposed(base), Rows(Transposed(base), slice(0, 6, 2)))
    rest = (Transposed(base), Rows(Transposed(base), (1, 3, 5)))
    even, odd = Fragment(cut, Array(whole.t()[::2])), Fragment(rest, Array(whole.t()[[1, 3, 5]]))
    assert torch.equal(assemble((4, 6), [even, odd]).load(), whole)
    with pytest.raises(ValueError, match="12 of its 24 elements"):
        assemble((4, 6), [even])


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow(["llama", "mixtral"], ("llama",)))
def test_weights_of_16_bits_have_a_checkpoint_with_a_cache_too(family, tmp_path):
    model = random_model(family, num_hidden_layers=2).bfloat16()
    model.save_pretrained(tmp_path / "source")
    program = capture(str(tmp_path / "source"))
    program, _ = go.Pipeline.default().run(program, go.RunOptions(verify=False))
    assert {state.dtype for state in program.states.values()} >= {torch.bfloat16}
    go.emit(program, tmp_path / "out", emit=("hf",))
    again = loaded(tmp_path / "out/hf", dtype=torch.bfloat16)
    given = model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in again.state_dict().items())
