"""Steps of a program whose memory is looked at, and what fits; functions of a user's file."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from programs import tiny_program
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.execute.memory_fit import largest_batch, largest_seq, predict_step
from graphopt.execute.workloads import PHASES, program_workload
from graphopt.ir.graph import Program
from graphopt.memory.stand_in import StandIn
from graphopt.memory.trace import FREE, KIND_NAMES, MALLOC, Trace
from graphopt.memory.workload import script_workload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program(cache=True)


def events(trace: Trace) -> list[tuple[int, int, str, str]]:
    trace.check()
    columns = (trace.kind.tolist(), trace.instance.tolist(), trace.op.tolist())
    # By strides of length 1, which kernels are free in, torch takes one product or the other.
    names = [name.replace("aten.bmm.", "aten.mm.") for name in trace.op_names]
    return [
        (kind, trace.instances[i].size, trace.instances[i].category, names[op])
        for kind, i, op in zip(*columns, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_has_the_same_events_with_and_without_values(program: Program, phase: str) -> None:
    options = {"batch": 2, "seq": 6, "dtype": torch.float32}
    with FakeTensorMode():
        fake = program_workload(program, phase, CPU, **options).record(3)
    real = program_workload(program, phase, CPU, **options).record(3)
    assert real.complete
    assert len(real) > 50
    assert events(fake) == events(real)
    # Later steps are alike, but for decode steps, whose cache grows, in kind and operation.
    marks = [*real.iteration_marks, len(real)]
    second, third = (events(real)[a:b] for a, b in itertools.pairwise(marks[1:]))
    assert [(e[0], e[3]) for e in second] == [(e[0], e[3]) for e in third]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_made_up_weights_take_the_memory_of_true_ones(program: Program, phase: str) -> None:
    made = program_workload(program, phase, CPU, batch=2, seq=5, dtype=torch.float32).record()
    runner = Runner(program)
    weights = {w.name: runner.weight(w.name) for w in program.used_weights()}
    assert {i.name: i.size for i in made.instances if i.category == "weight"} == {
        name: weight.untyped_storage().nbytes() for name, weight in weights.items()
    }


def test_categories_are_what_tensors_hold(program: Program) -> None:
    train = program_workload(program, "train", CPU, batch=2, seq=6, dtype=torch.float32).record(2)
    bytes_of = {
        category: sum(i.size for i in train.instances if i.category == category and i.died is None)
        for category in ("weight", "optimizer")
    }
    trained = [w for w in program.used_weights() if not w.constant]
    count = sum(w.numel for w in trained)
    # Adam has two moments of every weight, and a number of steps.
    assert bytes_of["optimizer"] == 2 * 4 * count + 4 * len(trained)
    assert bytes_of["weight"] >= 4 * count
    assert any(i.category == "gradient" for i in train.instances)
    assert any(i.saved and i.category == "activation" for i in train.instances)
    prefill = program_workload(program, "prefill", CPU, batch=2, seq=6, dtype=torch.float32)
    kv = sum(i.size for i in prefill.record().instances if i.category == "kv")
    assert kv == sum(4 * 2 * s.heads * 6 * (s.k_dim + s.v_dim) for s in program.states.values())


def test_a_decode_step_writes_a_cache_one_token_longer(program: Program) -> None:
    trace = program_workload(program, "decode", CPU, batch=1, seq=7, dtype=torch.float32).record(2)
    state = next(iter(program.states.values()))
    k_sizes = {4 * state.heads * tokens * state.k_dim for tokens in (7, 8, 9)}
    assert k_sizes <= {i.size for i in trace.instances if i.category == "kv"}


def test_a_prediction_is_the_trace_on_a_gpu_that_stands_in(program: Program) -> None:
    small = predict_step(program, "train", batch=1, seq=8)
    large = predict_step(program, "train", batch=64, seq=8)
    small.trace.check()
    assert small.allocated < large.allocated <= large.reserved
    assert {i.device for i in small.trace.instances} == {"cuda:0"}
    assert small.libraries.keys() == {"cuBLAS", "cuBLAS, backward"}
    # What is in use at the peak is what the prediction says, and the workspaces.
    alive = sum(small.categories.values()) + sum(small.libraries.values())
    assert alive == small.live


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_the_largest_batch_fits_and_one_more_does_not(program: Program, phase: str) -> None:
    memory = 100 * 2**20
    fit = largest_batch(program, memory, phase=phase, seq=512)
    assert fit.value > 1
    assert fit.prediction.fits
    assert fit.prediction.reserved <= memory
    assert not predict_step(program, phase, batch=fit.value + 1, seq=512, limit=memory).fits


@pytest.mark.slow
def test_a_length_may_be_searched_and_what_never_fits_is_0(program: Program) -> None:
    fit = largest_seq(program, 80 * 2**20, phase="prefill", batch=4, most=512)
    assert fit.value > 16
    none = largest_seq(program, 2**20, phase="prefill", batch=4)
    assert (none.value, none.prediction.fits) == (0, False)


def test_a_search_ends_where_nothing_larger_is_asked_for(program: Program) -> None:
    fit = largest_batch(program, 200 * 2**20, phase="calibrate", seq=16, most=12)
    assert (fit.value, fit.bounded) == (12, True)


@pytest.mark.parametrize(
    ("phase", "options", "reason"),
    [
        ("infer", {}, "Unknown phase 'infer'"),
        ("prefill", {"batch": 0}, "batch is 0"),
        ("train", {"seq": -1}, "seq is -1"),
    ],
)
def test_bad_sizes_are_refused(
    program: Program, phase: str, options: dict[str, int], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        program_workload(program, phase, CPU, **options)


def test_a_program_without_a_cache_has_no_decode_step() -> None:
    with pytest.raises(UsageError, match="insert-kv-cache"):
        program_workload(tiny_program(), "decode", CPU)


SCRIPT = """
import torch

def step(device, batch):
    return torch.ones(batch, 8, device=device) + 1

def train(seq=3):
    model = torch.nn.Linear(8, 8)
    def step():
        model(torch.ones(seq, 8)).sum().backward()
        model.zero_grad()
    return step

def needs(more):
    pass

def fails():
    torch.ones(4)
    raise RuntimeError("half way")
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_function_of_a_file_is_a_step(script: str) -> None:
    trace = script_workload(f"{script}:step", CPU, batch=4).record(2)
    kinds = [KIND_NAMES[k] for k in trace.kind]
    assert kinds[: len(kinds) // 2] == kinds[len(kinds) // 2 :]
    assert {i.size for i in trace.instances} == {4 * 8 * 4}


@pytest.mark.parametrize("valueless", [False, True])
def test_a_function_may_set_up_a_step(script: str, valueless: bool) -> None:
    if valueless:
        with StandIn() as stand_in:
            trace = script_workload(f"{script}:train", stand_in.device, seq=5).record(3)
    else:
        trace = script_workload(f"{script}:train", CPU, seq=5).record(3)
    trace.check()
    weights = [i for i in trace.instances if i.category == "weight"]
    assert sorted(i.size for i in weights) == [32, 256]
    assert {i.device for i in trace.instances} == ({"cuda:0"} if valueless else {"cpu"})
    marks = [*trace.iteration_marks, len(trace)]
    assert marks[2] - marks[1] == marks[3] - marks[2]


def test_a_function_that_fails_gives_what_was_traced(script: str) -> None:
    trace = script_workload(f"{script}:fails", CPU).record()
    assert not trace.complete
    assert (trace.kind == MALLOC).sum() == (trace.kind == FREE).sum() == 1
    assert "half way" in trace.notes[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("stop", "Did you mean 'step'"), ("needs", "needs 'more'"), ("torch", "Unknown function")],
)
def test_what_is_no_step_is_refused(script: str, name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        script_workload(f"{script}:{name}", CPU)


def test_what_would_run_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lazy.py"
    path.write_text("def step():\n    yield 1\n\nasync def later():\n    pass\n")
    for name in ("step", "later"):
        with pytest.raises(UsageError, match="a call of it runs nothing"):
            script_workload(f"{path}:{name}", CPU)


def test_a_file_is_run_on_the_device_and_finds_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("import torch\n\nWIDTH = torch.ones(8)\n")
    path = tmp_path / "steps.py"
    path.write_text(
        "import functools\nfrom beside_it import WIDTH\n\n"
        "def scaled(by):\n    return WIDTH * by\n\nstep = functools.partial(scaled, 2)\n"
    )
    before = list(sys.path)
    with StandIn() as stand_in:
        trace = script_workload(f"{path}:step", stand_in.device).record(2)
    assert [(i.size, i.device, i.external) for i in trace.instances] == [
        (32, "cuda:0", True),
        (32, "cuda:0", False),
        (32, "cuda:0", False),
    ]
    assert sys.path == before


def test_a_file_that_is_missing_or_fails_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        script_workload(f"{tmp_path}/none.py:step", CPU)
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        script_workload(f"{tmp_path}/bad.py:step", CPU)
