"""What memory a session of ONNX Runtime takes, and how it is told beside our own figures."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from command_line import runner
from onnx_models import emit
from programs import tiny_program

from graphopt.backends import onnx_memory
from graphopt.backends.onnx_memory import ArenaStep, arena_steps, session_memory, why_not_measured
from graphopt.cli.commands import app
from graphopt.cli.memory_onnx import graph_to_measure, measured_beside
from graphopt.errors import SourceError, UsageError

BATCH, SEQ = 2, 256
needs_proc = pytest.mark.skipif(
    why_not_measured() is not None, reason=f"memory can't be measured: {why_not_measured()}"
)


@pytest.fixture(scope="module")
def program():
    return tiny_program(cache=True)


@pytest.fixture(scope="module")
def graph(program, tmp_path_factory) -> Path:
    return emit(program, tmp_path_factory.mktemp("out"))[1]


def node(in_use: int, delta: int, peak: int, held: int, grown: int = 0) -> dict:
    values = {
        "mem_bytes_in_use": in_use, "mem_in_use_delta": delta, "mem_in_use_peak": peak,
        "mem_arena_held": held, "mem_arena_held_delta": grown,
    }  # fmt: skip
    return {"cat": "Node", "name": "x", "args": {name: str(n) for name, n in values.items()}}


RUN = {"cat": "Session", "name": "model_run", "args": {}}


def test_steps_of_a_profile():
    events = [
        # Opening once had 900 in use, which is no peak of this step.
        node(110, 10, 900, 1500, 500), node(400, 290, 900, 2500, 1000), RUN,
        # Within its second node, what it frees itself raised the mark of all time.
        node(150, 50, 900, 2500), node(160, 10, 1300, 2500), RUN,
        # A block for the whole step was taken in front of its first node.
        node(350, 0, 1300, 2500), node(320, -30, 1300, 2500), RUN,
    ]  # fmt: skip
    assert arena_steps(events) == [
        ArenaStep(300, 1500), ArenaStep(1200, 1500), ArenaStep(250, 1500)
    ]  # fmt: skip
    without = [{"cat": "Node", "name": "x", "args": {"output_size": "8"}}, RUN]
    assert arena_steps(without) == []


@needs_proc
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_session_beside_our_own_step(program, graph, phase):
    beside = measured_beside(graph, program, phase, BATCH, SEQ)
    session, own = beside.session, beside.own
    assert session is not None and own is not None
    assert session.version == onnxruntime.__version__ and len(session.steps) == 4
    state = [size for s in program.states.values() for size in (s.k_dim, s.v_dim)]
    heads = next(iter(program.states.values())).heads
    token = 4 * BATCH * heads * sum(state)  # bytes of a token's keys and values, fp32
    tokens = SEQ if phase == "prefill" else SEQ + 1
    # Token ids are int64; the mask of a decoding step is made in it.
    assert own.given == BATCH * SEQ * 8 if phase == "prefill" else SEQ * token + BATCH * 8
    assert own.planned >= own.live >= tokens * token
    # What a step returns is in memory at its peak: caches, which no implementation can do without.
    assert session.first.peak >= tokens * token / 2 and session.opening.kept > 0
    if session.arena:
        assert all(step.in_use >= tokens * token for step in session.arena)
        assert session.arena[-1].held >= session.arena[0].in_use
    told = beside.to_json()
    assert told["graphopt"]["live_bytes"] == own.live and told["counts"]["resident"]
    text = "\n".join(f"{label} {said}" for label, said in beside.rows())
    assert "first step" in text and "live at the peak" in text and "clock" in text


@needs_proc
def test_a_session_without_an_arena_has_no_statistics(graph):
    found = session_memory(graph, "decode", seq=8, later=1, arena=False, pattern=False)
    assert found.arena == [] and "no arena" in found.untold and len(found.steps) == 2


@needs_proc
def test_a_graph_that_cannot_be_opened(tmp_path, graph, monkeypatch):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(graph.read_bytes())  # without its weights, which lie in another file
    monkeypatch.setattr("graphopt.files.onnx_file.check_onnx", lambda *_: None)
    with pytest.raises(SourceError, match="cannot run"):
        session_memory(broken, "prefill")
    with pytest.raises(UsageError, match="train"):
        session_memory(graph, "train")


def test_when_a_session_is_measured(tmp_path, graph, monkeypatch):
    root = graph.parent.parent
    (root / "program.json").touch()
    (tmp_path / "program.json").touch()
    assert graph_to_measure(str(root), "decode", None) == graph
    assert graph_to_measure(str(root), "decode", False) is None
    assert graph_to_measure(str(root), "train", None) is None
    assert graph_to_measure(str(tmp_path), "decode", None) is None
    for folder, phase, said in (
        (tmp_path, "decode", "no ONNX form"), ("demo", "decode", "no ONNX form"),
        (root, "train", "no phase 'train'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            graph_to_measure(str(folder), phase, True)
    monkeypatch.setattr(onnx_memory, "why_not_measured", lambda: "no /proc on Mars")
    with pytest.raises(UsageError, match="no /proc on Mars"):
        graph_to_measure(str(root), "decode", True)
    beside = measured_beside(graph, None, "decode", 1, 1)
    assert beside.rows() == [("onnx", "not measured: no /proc on Mars")]
    assert beside.to_json() == {"not_measured": "no /proc on Mars"}


def test_the_command_refuses_a_model_without_an_onnx_form():
    done = runner().invoke(app, ["memory", "demo", "--onnx"])
    assert done.exit_code == 2 and "no ONNX form" in done.stderr
