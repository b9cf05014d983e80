"""Paths that lead nowhere: what is said of one, wherever it is given, names it and what to do."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import runner
from tiny_models import save_tiny

from graphopt.cli.commands import app
from graphopt.errors import SourceError, UsageError
from graphopt.pass_manager.contract import make_pass
from graphopt.support.inputs import read_bytes
from graphopt.support.near_paths import path_remedy

NO_PATHS = frozenset(
    {"align", "also", "backend", "bos", "capacity", "device", "dtype", "emit", "gguf_type", "kv",
     "kv_policy", "launcher", "memory", "onnx_accuracy", "onnx_moe", "passes", "phase", "prompt",
     "resume", "stop_after", "swap_bandwidth", "system", "target", "target_peak", "offload"}
)  # fmt: skip
"""Options and arguments that are a text and no path. One that is not here is taken for a path."""
NAMES = {("passes", "name"), ("targets", "name")}
MADE = {("compile", "out"), ("compile", "dump_ir")}
"""What a command makes, with the folders above."""

COMMANDS = {
    "compile": ["MODEL", "-o", "made", "--dry-run"],
    "inspect": ["MODEL"],
    "eval": ["MODEL", "--text", "text.txt"],
    "generate": ["MODEL", "--prompt", "What?"],
    "memory": ["MODEL"],
    "train-kv-policy": ["MODEL", "--calib", "text.txt", "-o", "made.safetensors"],
    "measure-host": [],
    "passes": [],
    "diff": ["MODEL", "MODEL"],
}
INSTEAD = {("generate", "prompts"): ["MODEL"],
           ("memory", "plan"): [], ("compile", "config"): ["-o", "made"]}  # fmt: skip
"""What is given beside a path where it is not given to the usual command."""


def _paths() -> Iterator[tuple[str, str, str]]:
    """Yield command, parameter and option ("" for an argument) of every path that one may give."""
    for info in app.registered_commands:
        assert info.callback is not None and info.name is not None
        for name, parameter in inspect.signature(info.callback).parameters.items():
            base, *meta = typing.get_args(parameter.annotation)
            text = not any(kind in str(base) for kind in ("Path", "int", "float", "bool"))
            if (text and name in NO_PATHS) or (info.name, name) in NAMES:
                continue
            if not text and "Path" not in str(base):
                continue
            is_option = type(meta[0]).__name__ == "OptionInfo"
            declared = [d for d in meta[0].param_decls or () if d.startswith("--")]
            option = (declared or ["--" + name.replace("_", "-")])[0] if is_option else ""
            yield info.name, name, option


PATHS = sorted(set(_paths()) - {(c, n, o) for c, n, o in _paths() if (c, n) in MADE})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text("Some words of a text. " * 200, encoding="utf-8")
    return folder


def test_the_paths_of_all_commands_are_known() -> None:
    """A new option is among them, or has to be said to be none."""
    found = {f"{command} {option or name}" for command, name, option in PATHS}
    assert found >= {
        "compile --calib", "compile --recipe", "compile --config", "compile --plugin",
        "eval --text", "eval --piqa", "eval --pictures", "eval --report", "eval model",
        "generate --prompts", "generate --image", "memory --plan", "memory --save", "diff b",
        "inspect model", "train-kv-policy --calib", "measure-host --out", "passes --plugin",
    }  # fmt: skip
    assert {command for command, *_ in PATHS} <= set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "name", "option"),
    [  # a second model is looked for behind the first one's capture
        pytest.param(*path, marks=pytest.mark.slow if path[:2] == ("diff", "b") else ())
        for path in PATHS
    ],
)
def test_a_path_that_leads_nowhere(
    command: str, name: str, option: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    missing = "nowhere/some.txt"
    given = INSTEAD.get((command, name), COMMANDS[command])
    if name == "config":
        given = [part for part in given if part != "MODEL"]
    words = [part.replace("MODEL", "model") for part in given]
    if not option:
        place_of = {"model": 0, "a": 0, "b": 1}[name]
        words[place_of] = missing
    elif option in words or ("-o" in words and name == "out"):
        words[words.index(option if option in words else "-o") + 1] = missing
    else:
        words += [option, missing]
    before = sorted(place.rglob("*"))
    result = runner().invoke(app, [command, *words])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.stderr
    # What, where, and in a line of its own what to do.
    said = result.stderr[result.stderr.index("error: ") :].strip().splitlines()
    assert "nowhere" in said[0], said
    assert len(said) >= 2 and said[1].endswith((".", "?")), said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [("place-kv", {"gpu": "24GB", "context": 4096, "figures": "nowhere/host.json"}),
     ("attach-kv-policy", {"kind": "predictor", "checkpoint": "nowhere/p.safetensors"})],
)  # fmt: skip
def test_files_that_options_of_passes_name(name: str, options: dict[str, object]) -> None:
    with pytest.raises((SourceError, UsageError), match="nowhere") as refusal:
        make_pass(name, {"target": "hopper", **options})
    assert refusal.value.remedy


def test_what_is_to_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "valid.txt").write_text("", encoding="utf-8")
    (tmp_path / "gone.txt").symlink_to("away.txt")
    for path, remedy in {
        "valld.txt": "Did you mean 'valid.txt'?",
        "other.json": f"Check its name: it was looked for in {str(tmp_path)!r}.",
        "a/b/c.txt": f"Check the path: {str(tmp_path)!r} has no folder 'a'.",
        "gone.txt": "It is a link that leads nowhere: give the file itself.",
        "valid.txt/under": f"Check the path: {str(tmp_path)!r} has no folder 'valid.txt'.",
    }.items():
        with pytest.raises(SourceError, match="cannot be read") as refusal:
            read_bytes(Path(path), 10)
        assert refusal.value.remedy == remedy
    assert "right to read" in path_remedy(Path("x"), PermissionError())
    assert path_remedy(Path("a\0b"), ValueError()) == "Check the path."
