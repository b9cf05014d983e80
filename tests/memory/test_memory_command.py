"""`graphopt memory`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import runner
from tiny_models import save_tiny

from graphopt.cli.commands import app
from graphopt.memory.trace import Trace

SCRIPT = """
import torch

def train(batch=2, device="cpu"):
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4), torch.nn.Tanh()
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(batch, 8, device=device)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step

def fails():
    a = torch.ones(1000)
    b = a * 2
    raise RuntimeError("half of <it>")

def asks():
    x = torch.randn(4)
    return x * 2 if x.sum() > 0 else x

def speaks():
    x = torch.ones(3)
    print("to whom", x)

def idle():
    pass

def leaves():
    x = torch.ones(3)
    raise SystemExit(3)

def resizes():
    x = torch.ones(16)
    x.resize_(64)
    return x + torch.zeros(0).sum()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "steps.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object):
    return runner().invoke(app, ["memory", *map(str, arguments)])


def told(*arguments: object) -> dict:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("device", ["fake", "cpu"])
def test_a_function_of_a_script(script, elsewhere, device):
    out, trace = elsewhere / "seen.html", elsewhere / "trace.json"
    data = told(
        f"{script}:train", "--device", device, "--batch", 16, "--iterations", 5, "-o", out,
        "--perfetto", elsewhere / "perfetto.json", "--save", trace,
    )  # fmt: skip
    assert data["clock"] == {"fake": "cost model", "cpu": "host"}[device]
    assert data["period"]["repeats"] >= 3 and data["by_category"]["weight"] > 0
    assert data["planned_bytes"] >= data["rounded_peak_bytes"] >= data["peak_bytes"]
    assert "<h1>" in out.read_text() and data["page"] == str(out)
    events = json.loads((elsewhere / "perfetto.json").read_text())["traceEvents"]
    counted = [e["args"]["bytes"] for e in events if e["ph"] == "C" and "bytes" in e["args"]]
    assert max(counted) == data["peak_bytes"] == Trace.load(trace).peak().bytes
    # What was saved is looked through again without running.
    again = told(trace, "--swap-bandwidth", "1GB")
    assert (again["period"], again["peak_bytes"]) == (data["period"], data["peak_bytes"])
    assert again["link"]["out_bytes"] == 1e9


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode", "train", "calibrate"])
def test_phases_of_a_model(tiny, elsewhere, phase):
    done = run(tiny, "--phase", phase, "--batch", 2, "--seq", 16, "--device", "fake")
    assert done.exit_code == 0, done.output
    assert "cost model" in done.stdout and "memory.html" in done.stdout
    assert (elsewhere / "memory.html").exists()
    period = next(line for line in done.stdout.splitlines() if line.startswith("period"))
    expected = {"train": "times, ", "decode": "no exact period"}
    assert expected.get(phase, "none") in period


@pytest.mark.slow
def test_a_target_is_reached_by_what_can_be_spared(tiny):
    data = told(tiny, "--phase", "train", "--batch", 4, "--seq", 64, "--device", "fake")
    target = int(data["peak_bytes"] * 0.9)
    data = told(
        tiny, "--phase", "train", "--batch", 4, "--seq", 64, "--device", "fake",
        "--target-peak", target, "--swap-bandwidth", "10TB",
    )  # fmt: skip
    assert data["target"]["target"] == target >= data["target"]["after"]
    assert data["target"]["choices"] and not data["target"]["left"]


def test_a_callable_that_fails_midway_is_shown_up_to_there(script, elsewhere):
    done = run(f"{script}:fails", "--device", "cpu")
    assert done.exit_code == 1
    assert "Iteration 1 of 3 failed" in done.stdout and "half of <it>" in done.stdout
    page = (elsewhere / "memory.html").read_text()
    assert "half of &lt;it&gt;" in page and "what follows is a part" in page
    assert "8.0 kB" in done.stdout


def test_what_a_script_prints_is_not_part_of_json(script):
    data = told(f"{script}:speaks", "--device", "cpu", "--iterations", 1)
    assert data["peak_bytes"] == 12


def test_nothing_is_said_of_sizes_that_a_function_does_not_take(script):
    first = run(f"{script}:train", "--device", "fake", "--batch", 1200).stdout.splitlines()[0]
    assert "batch 1,200" in first and "tokens" not in first and "script:" not in first
    nothing = run(f"{script}:idle", "--device", "cpu").stdout
    assert "No operator of torch" in nothing and "batch" not in nothing


def test_what_leaves_the_program_is_a_failure(script):
    done = run(f"{script}:leaves", "--device", "cpu")
    assert done.exit_code == 1 and "Iteration 1 of 3 failed" in done.stdout


@pytest.mark.parametrize("option", ["-o", "--perfetto", "--save"])
def test_a_place_that_cannot_be_written_is_refused_first(script, elsewhere, option):
    mark = elsewhere / "ran"
    (elsewhere / "marks.py").write_text(f"def step():\n    open({str(mark)!r}, 'w').close()\n")
    for out, said in ((elsewhere, "is a folder"), (elsewhere / "none" / "x", "there is no folder")):
        done = run(f"{elsewhere}/marks.py:step", "--device", "cpu", option, out)
        assert done.exit_code == 2 and said in done.stderr and not mark.exists()


def test_no_file_that_is_read_or_written_already_is_written_over(elsewhere):
    script, saved = elsewhere / "once.py", elsewhere / "once.json"
    script.write_text("import torch\n\n\ndef step():\n    torch.zeros(8)\n")
    arguments = f"{script}:step", "--device", "cpu"
    assert run(*arguments, "--save", saved, "-o", elsewhere / "x.html").exit_code == 0
    kept = {path: path.read_bytes() for path in (script, saved)}
    for given, said in (
        ((*arguments, "-o", script), "-o {script}: that file is what is read"),
        ((saved, "-o", saved), "-o {saved}: that file is what is read"),
        ((*arguments, "--save", saved, "-o", saved), "--save {saved}: that file is what -o writes"),
    ):
        done = run(*given)
        assert done.exit_code == 2
        assert said.format(script=script, saved=saved) in " ".join(done.stderr.split())
    assert kept == {path: path.read_bytes() for path in kept}


def test_control_flow_by_values_is_refused_without_values(script):
    done = run(f"{script}:asks", "--device", "fake")
    assert done.exit_code == 2 and "tensors without values" in done.stderr
    assert f"{script}:asks cannot be followed" in done.stderr
    assert run(f"{script}:asks", "--device", "cpu").exit_code == 0


def test_storages_that_are_resized_and_of_no_bytes(script):
    data = told(f"{script}:resizes", "--device", "cpu", "--iterations", 1)
    assert data["peak_bytes"] >= 64 * 4 + 16 * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Name one model"),
        (("demo", "--phase", "dreaming"), "dreaming"),
        (("demo", "--dtype", "float7"), "float7"),
        (("demo", "--target-peak", "much"), "--target-peak 'much' is no size"),
        (("demo", "--capacity", 5), "--capacity is of --plan"),
        (("demo", "--plan", "x.csv"), "Both a model and --plan"),
        (("none.py:train",), "There is no file"),
        (("{script}:nothing",), "nothing"),
        (("{script}",), "names no function"),
        (("{script}:train", "--phase", "train"), "--phase is of models"),
        (("{script}:train", "--seconds", -1), "--seconds is -1"),
        (("{script}:train", "--device", "abacus"), "auto, fake, cpu"),
        (("--plan", "{script}", "--perfetto", "x.json"), "--perfetto is not of --plan"),
        (("{script}:train", "--device", "abacus"), "abacus"),
        (("{script}:train", "--swap-bandwidth", "fast"), "--swap-bandwidth 'fast'"),
    ],
)
def test_what_is_refused(script, arguments, said):
    done = run(*(str(a).format(script=script) for a in arguments))
    assert done.exit_code in (1, 2) and said in done.stderr, done.output


def test_a_damaged_trace_is_refused(elsewhere):
    path = elsewhere / "trace.json"
    path.write_text('{"graphopt_memory_trace":1,"clock":"sundial"}')
    done = run(path)
    assert done.exit_code == 1 and "trace.json" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu(script):
    data = told(f"{script}:train", "--device", "cuda", "--batch", 1024, "--iterations", 5)
    assert data["clock"] == "cuda events" and data["period"]["repeats"] >= 3
    held = data["allocator"]
    assert held["reserved"] >= held["active"] >= held["requested"] > 0
    assert data["link"]["source"].startswith("measured on")
    # What nobody runs has the same blocks in the same order.
    fake = told(f"{script}:train", "--device", "fake", "--batch", 1024, "--iterations", 5)
    assert data["by_category"]["weight"] == fake["by_category"]["weight"]
