"""Kills, full disks and two compiles at once: nothing is left, and the old output stays."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from programs import tiny_program

import graphopt as go
from graphopt import compiler
from graphopt.errors import GraphoptError, SourceError, UsageError
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.storage import output_folder
from graphopt.storage.snapshot import SNAPSHOT_NAME, resuming_from

CAPTURE = importlib.import_module("graphopt.capture")
OUT = Path("out")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def capture(source, **options):
        program = tiny_program()
        program.source = source
        return program

    monkeypatch.setattr(CAPTURE, "capture", capture)
    return tmp_path


def names():
    return sorted(path.name for path in Path().iterdir())


def compile_tiny(out=OUT, **options):
    return compiler.compile_model("tiny", out, compiler.CompileOptions(emit=["torch"], **options))


def in_child(work):
    """Run `work` in a forked process until it says it is ready; return the process."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(60)
    return process


def hold(ready):
    with output_folder.locked(OUT), output_folder.output_folder(OUT, force=True) as folder:
        (folder / "half").write_text("half")
        ready.set()
        signal.pause()


def test_a_folder_that_is_being_written_is_refused_with_its_writer():
    process = in_child(hold)
    try:
        message = rf"'out' is being written by process {process.pid} on '.*' since 20"
        for work in (compile_tiny, lambda: go.emit(tiny_program(), OUT)):
            with pytest.raises(GraphoptError, match=message) as caught:
                work()
            assert caught.value.remedy == "Wait until it is done, or name another folder."
        compile_tiny(Path("other"))  # its neighbour is free
    finally:
        process.kill()
        process.join()
    assert ".out.lock" in names()


def test_what_a_killed_compile_left_is_cleaned_by_the_next():
    process = in_child(hold)
    process.kill()
    process.join()
    left = set(names())
    assert ".out.lock" in left and any(name.endswith(".part") for name in left)
    unfinished = Path(".out.work/.new-abc")
    unfinished.mkdir(parents=True)
    for name in (".out.x.abcdefgh.part", ".out2.abcdefgh.part", ".out.mine.part"):
        Path(name).mkdir()  # of another output, or no part of ours
    compile_tiny()
    kept = [".out.mine.part", ".out.x.abcdefgh.part", ".out2.abcdefgh.part", "out"]
    assert names() == kept


def test_an_output_that_was_set_aside_when_its_compile_was_killed_comes_back():
    compile_tiny()
    OUT.rename(".out.abcdefgh.old")
    with pytest.raises(UsageError, match="exists"):
        compile_tiny()
    assert names() == ["out"] and (OUT / "report.json").is_file()


def test_the_lock_and_the_folders_above_go_when_nothing_came_of_it():
    with pytest.raises(ZeroDivisionError), output_folder.locked(Path("a/b/out")):
        assert Path("a/b/.out.lock").is_file()
        raise ZeroDivisionError
    assert names() == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOENT])
def test_a_folder_that_cannot_be_made_is_named(monkeypatch, code):
    """As /proc answers, where rights allow what the file system does not."""

    def refuse(path, flags, mode):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(output_folder.os, "open", refuse)
    with pytest.raises(GraphoptError) as refused, output_folder.locked(Path("a/out")):
        pass
    assert refused.value.message == f"Output folder 'a/out' cannot be made: {os.strerror(code)}."
    assert "can be written to" in refused.value.remedy and not Path("a").exists()


def test_the_lock_is_taken_anew_where_its_file_was_deleted_meanwhile(monkeypatch):
    """The holder deletes the file between another's opening and locking it."""
    real, tries = output_folder._try_lock, []

    def lock(file):
        if not tries:
            Path(".out.lock").unlink()
        tries.append(1)
        return real(file)

    monkeypatch.setattr(output_folder, "_try_lock", lock)
    with output_folder.locked(OUT):
        assert len(tries) == 2 and Path(".out.lock").is_file()


def test_file_systems_without_locks(monkeypatch):
    monkeypatch.setattr(output_folder, "_try_lock", lambda file: None)
    Path(".out.abcdefgh.part").mkdir()
    compile_tiny()
    assert names() == [".out.abcdefgh.part", "out"]  # it may be somebody's


@pytest.mark.parametrize("name", [".", "..", "/", "x/.."])
def test_folders_without_a_name(name):
    with pytest.raises(UsageError):
        output_folder.check_output(Path(name), force=True)


class FullDisk:
    """Refuses to write once a number of writes were done, as a full disk does."""

    def __init__(self, monkeypatch, after):
        self.left = after
        for kind, name in ((Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir")):
            monkeypatch.setattr(kind, name, self.wrap(getattr(kind, name)))
        for name in ("_write", "_put"):
            kind = importlib.import_module("graphopt.files.safetensors").SafetensorsWriter
            if hasattr(kind, name):
                monkeypatch.setattr(kind, name, self.wrap(getattr(kind, name)))

    def wrap(self, real):
        def write(*args, **options):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
            return real(*args, **options)

        return write


@pytest.mark.slow
def test_a_full_disk_at_any_write_leaves_the_old_output(monkeypatch):
    compile_tiny()
    before = (OUT / "report.json").read_bytes()
    for after in range(0, 100, 4):
        with monkeypatch.context() as patch:
            FullDisk(patch, after)
            try:
                compile_tiny(force=True, verify=False, recipe=Pipeline(["insert-kv-cache"]))
            except (OSError, GraphoptError):
                assert (OUT / "report.json").read_bytes() == before
                assert set(names()) <= {"out", ".out.work"}
                assert not list(Path().glob(".out.work/.new-*"))
                continue
        break
    assert after > 5 and names() == ["out"]


def interrupted(**options):
    """Compile up to the writing of the output; its snapshots stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_write", lambda *_: (_ for _ in ()).throw(SourceError("stop")))
        with pytest.raises(SourceError, match="stop"):
            compile_tiny(**options)
    return sorted(Path(".out.work").glob(f"*/{SNAPSHOT_NAME}"))


def test_a_resumed_report_has_the_figures_of_the_probe():
    whole = compile_tiny(Path("whole"))
    assert whole.probe is not None
    assert interrupted()
    resumed = compile_tiny(resume=True)
    assert all(entry.resumed for entry in resumed.passes)
    assert (resumed.probe, resumed.windows) == (whole.probe, whole.windows)


@pytest.mark.slow
def test_snapshots_with_other_types():
    options = {"recipe": Pipeline(["canonicalise"]), "verify": False}
    (path,) = interrupted(**options)
    state = json.loads(path.read_text())
    for key in state:
        for value in (None, [], 3, "x", {}, {"a": 1}, {"a": ["b", "c"]}, [[]], [{"name": 1}]):
            if value == state[key]:
                continue
            path.write_text(json.dumps({**state, key: value}))
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(compiler, "_write", lambda *_: None)
                    compile_tiny(resume=True, **options)
            except SourceError as error:
                assert "\n" not in str(error)
                continue
            assert key in ("entries", "figures")  # {} and [] say less, and nothing wrong
            interrupted(**options)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["figures"].update(probe="x"),
        lambda state: state["figures"].update(probe={"tokens": 1}),
        lambda state: state["figures"].update(windows=[]),
        lambda state: state["figures"].update(windows={"bos": "every", "begin": ["x"]}),
        lambda state: state["entries"].clear(),
        lambda state: state["entries"].extend(state["entries"]),
        lambda state: state["entries"][0].update(name="dead-code-elimination"),
        lambda state: state["entries"][0].update(details={}),
        lambda state: state["entries"][0]["details"].update(rules={"swap": None}),
        lambda state: state["entries"][0]["details"].update(more=1),
    ],
)
def test_what_a_snapshot_keeps_of_the_report(change):
    options = {"recipe": Pipeline(["canonicalise"]), "verify": False}
    (path,) = interrupted(**options)
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(SourceError, match=r"Leave --resume out\."):
        compile_tiny(resume=True, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda program: program["inputs"].popitem(),
        lambda program: program["calls"].pop(0),
        lambda program: program["outputs"].append(program["outputs"][0]),
        lambda program: program["outputs"].clear(),
        lambda program: program["weights"].pop(),
        lambda program: program.update(config={"num_hidden_layers": -1}),
    ],
)
def test_a_program_in_a_snapshot_that_no_pass_makes(change):
    options = {"recipe": Pipeline(["canonicalise"]), "verify": False}
    (path,) = interrupted(**options)
    state = json.loads(path.read_text())
    change(state["program"])
    path.write_text(json.dumps(state))
    with pytest.raises(SourceError, match=r"snapshot\.json|program\.json"):
        compile_tiny(resume=True, **options)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04", b"\x80\x04N."])
def test_saved_states_that_are_damaged(content):
    path = Path("state.pt")
    path.write_bytes(content)
    damaged = pytest.raises(SourceError, match=r"state\.pt is damaged: .+\. Leave --resume out")
    with damaged, resuming_from(path):
        torch.load(path, weights_only=True)
    torch.save({"other": 1}, path)
    damaged = pytest.raises(SourceError, match=r"state\.pt is damaged: KeyError 'done'")
    with damaged, resuming_from(path):
        torch.load(path, weights_only=True)["done"]
