"""Where a model runs: by itself on a GPU that is there, or as asked for.

The stand-in for a GPU is `cpu:0`, which is another device than `cpu` by its name and computes;
safetensors does not know it, so that it is looked at what a torch artifact is opened with.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import runner
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.backends import opening, placement
from graphopt.backends.opening import open_language_model
from graphopt.cli import compile as compile_command
from graphopt.cli.commands import app
from graphopt.errors import GraphoptError, UsageError
from graphopt.ir.graph import Program
from graphopt.support import devices
from graphopt.support.devices import usable_device

STAND_IN = torch.device("cpu", 0)
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("devices") / "tiny")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices") / "out"
    go.emit(tiny_program(cache=True), folder, emit=("torch", "onnx"))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Let a GPU be found."""
    monkeypatch.setattr(placement, "found_gpu", lambda: STAND_IN)
    names = {STAND_IN: "a GPU"}
    monkeypatch.setattr(placement, "describe_device", lambda device: names.get(device, "a CPU"))
    return STAND_IN


class Opened(SimpleNamespace):
    """In the place of a torch artifact."""

    backend = "torch"

    def __init__(self, root: Path, program: Program, *, device: torch.device, **_: Any) -> None:
        super().__init__(device=device)


@pytest.fixture
def torch_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a torch artifact be asked for a device alone."""
    monkeypatch.setattr(opening, "TorchArtifactModel", Opened)


def test_a_gpu_is_found(out: Path, gpu: torch.device) -> None:
    model = open_language_model(str(out), "program")
    assert model.device == gpu and model.placement == "program on a GPU"
    plain = open_language_model(str(out), "program", device="cpu")
    assert plain.device == torch.device("cpu") and plain.placement == "program on a CPU"
    assert torch.equal(model.logits(IDS), plain.logits(IDS))
    assert torch.equal(model.log_likelihoods(IDS), plain.log_likelihoods(IDS))


@pytest.mark.usefixtures("torch_artifacts")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_torch_artifact_runs_on_the_gpu_that_is_found(
    out: Path, gpu: torch.device, backend: Any
) -> None:
    assert open_language_model(str(out), backend).device == gpu
    assert open_language_model(str(out), backend, device="cpu").device == torch.device("cpu")


def test_a_source_runs_on_the_gpu_that_is_found(source: Path, gpu: torch.device) -> None:
    model = open_language_model(str(source))
    assert (model.backend, model.device) == ("program", gpu)


def test_onnx_stays_on_the_cpu(out: Path, gpu: torch.device) -> None:
    for spec in (out, out / "onnx"):
        model = open_language_model(str(spec), "onnx")
        assert model.device == torch.device("cpu")
        assert "no GPU kernels in fp32" in model.placement


def test_what_does_not_fit_the_gpu_stays_on_the_cpu(
    out: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)
    model = open_language_model(str(out), "program")
    assert model.device == torch.device("cpu")
    assert model.placement.endswith("GB of weights, and 0.0 GB are free on a GPU")


def test_texts_are_read_on_a_gpu_that_has_no_room_a_layer_at_a_time(
    out: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_language_model(str(out), "program", by_layer=True)
    assert not whole.reads_weights
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)
    model = open_language_model(str(out), "program", by_layer=True)
    assert model.device == gpu and model.reads_weights
    assert "a layer at a time, with 0.0 GB of weights" in model.placement
    # An artifact holds all of its weights.
    assert open_language_model(str(out), "torch", by_layer=True).device == torch.device("cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("torch_artifacts")
def test_an_artifact_for_a_gpu_is_counted_in_16_bits(
    tmp_path: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny_program(cache=True, head_dim=32)
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    size = sum(weight.numel for weight in program.used_weights())
    for free, fits in ((2.4 * size, False), (2.8 * size, True)):
        monkeypatch.setattr(placement, "free_bytes", lambda device, free=free: free)
        found = open_language_model(str(tmp_path / "out"), "torch")
        assert (found.device == gpu) == fits


def test_without_a_gpu_nothing_is_found(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_language_model(str(out)).placement == "torch on the CPU"


def test_onnx_on_a_gpu_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (opening, placement):
        monkeypatch.setattr(module, "usable_device", torch.device)
    with pytest.raises(UsageError, match=r"ONNX form cannot run on 'cuda'.*--backend torch"):
        open_language_model(str(out), "onnx", device="cuda")
    with pytest.raises(UsageError, match="ONNX form cannot run on 'cuda'"):
        open_language_model(str(out / "onnx"), device="cuda")


def test_on_a_gpu_a_folder_without_torch_runs_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go.emit(tiny_program(cache=True), tmp_path / "out", emit=("onnx",))
    assert open_language_model(str(tmp_path / "out")).backend == "onnx"
    monkeypatch.setattr(placement, "usable_device", lambda name: STAND_IN)
    monkeypatch.setattr(opening, "usable_device", lambda name: torch.device("cuda"))
    model = open_language_model(str(tmp_path / "out"), device="cuda")
    assert (model.backend, model.device) == ("program", STAND_IN)


@pytest.mark.parametrize(
    ("recipe", "name", "device"),
    [
        ("canonicalise", "auto", "cpu"),
        ("prune-blocks{blocks=1}", "auto", "cpu:0"),
        ("prune-blocks{blocks=1}", "cpu", "cpu"),
        ("canonicalise", "cuda:1", "cuda:1"),
    ],
)
def test_lossy_passes_compute_on_the_gpu_that_is_found(
    recipe: str,
    name: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(devices, "found_gpu", lambda: STAND_IN)
    assert compile_command._device(name, go.Pipeline.parse(recipe)) == device
    assert ("--device cpu keeps them on the CPU" in capsys.readouterr().err) == (device == "cpu:0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "Unknown device 'gpu'.*auto, cpu, cuda, cuda:N"),
        ("cuda:x", "Unknown device"),
        ("meta", "device 'meta' cannot be used here.*Leave --device out"),
        ("cuda:99", "device 'cuda:99' cannot be used here"),
    ],
)
def test_wrong_devices_are_refused(name: str, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        usable_device(name)


@pytest.mark.parametrize("built", [False, True])
def test_a_torch_without_cuda_is_said_to_be_the_reason(
    built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has CUDA and there is no GPU, the driver's reason stands there."""

    def refuse(*size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("No CUDA GPUs are available\nsome trace")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(GraphoptError) as refused:
        usable_device("cuda")
    reason = "No CUDA GPUs are available" if built else "was built without CUDA"
    assert reason in refused.value.message and "Leave --device out" in refused.value.remedy
    assert ("install a torch with CUDA" in refused.value.remedy) is not built


@pytest.mark.parametrize("command", [["eval", "--text", "text.txt"], ["generate", "--prompt", "a"]])
def test_a_wrong_device_is_refused_before_a_model_is_opened(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text")
    done = runner().invoke(app, [*command, "no-such-folder", "--device", "tpu"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: Unknown device 'tpu'.") and not done.stdout


@pytest.mark.slow
def test_where_it_runs_is_said(source: Path, tmp_path: Path, gpu: torch.device) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 9)
    for command in (
        ["eval", str(source), "--text", str(text), "--seqlen", "32", "--windows", "1"],
        ["generate", str(source), "--prompt", "hi", "--max-new-tokens", "1"],
    ):
        done = runner().invoke(app, command)
        assert done.exit_code == 0, done.stderr
        assert done.stderr.startswith("program on a GPU")


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "fraction", "expected"),
    [
        (60, 0, 0, 1.0, 60),  # others have 40
        (60, 30, 10, 1.0, 80),  # 20 are held by torch without being used
        (60, 30, 10, 0.25, 15),  # this process may take 25
        (60, 30, 30, 0.25, 0),
    ],
)
def test_free_memory_of_a_gpu(
    free: int,
    reserved: int,
    allocated: int,
    fraction: float,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def share(device: torch.device | int) -> float:
        # As torch: a device without an index is an error here, and nowhere else of the four.
        assert device == 1 or (isinstance(device, torch.device) and device.index == 1)
        return fraction

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share)
    assert devices.free_bytes(torch.device("cuda")) == expected
    assert devices.free_bytes(torch.device("cuda:1")) == expected
