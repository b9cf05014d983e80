"""Names of a saved program in the Python that is written of it: they stay names."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import tiny_program

from graphopt.backends.code import import_model
from graphopt.errors import GraphoptError
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.verify import verify
from graphopt.lowering.torch import source_files

WORK = "open('RAN', 'w').close()"
PAYLOADS = (
    f'x"); {WORK}; ("', f"x'); {WORK}; ('", f'"""\n{WORK}\n"""', f"\n{WORK}\n#", f"x\r{WORK}",
    f"{{{WORK}}}", f"x}} {{{WORK}", "\\", f'\\"); {WORK}; ("', f"x\x0c\n{WORK}", f"\u2028{WORK}",
    f"x{WORK}", "__import__", "lambda", "ﬁle", "self", "torch", "a.b.__class__", "%s{0}", "0",
)  # fmt: skip


def rename(data: Any, old: str, new: str) -> Any:
    """Rename whatever is called `old`, keys included."""
    if isinstance(data, dict):
        return {new if key == old else key: rename(item, old, new) for key, item in data.items()}
    if isinstance(data, list):
        return [rename(item, old, new) for item in data]
    return new if data == old else data


def damaged(where: str, payload: str, data: dict[str, Any]) -> dict[str, Any]:
    block = data["functions"][1]
    match where:
        case "program":
            data["name"] = data["source"] = payload
        case "note":
            data["notes"] = [[payload, payload]]
        case "path":
            for call in data["calls"]:
                call["path"] = payload
        case "config":
            data["config"] = {"model_type": payload, "architectures": [payload]}
        case "function":
            return rename(data, block["name"], payload)
        case "parameter":
            return rename(data, block["params"][0], payload)
        case "value":
            return rename(data, block["nodes"][0]["out"][0], payload)
        case "slot":
            return rename(data, next(iter(block["weights"])), payload)
        case "weight":
            return rename(data, data["weights"][2]["name"], payload)
        case "state":
            return rename(data, data["states"][0]["name"], payload)
        case "attribute":
            for function in data["functions"]:
                for node in function["nodes"]:
                    if node["attrs"].get("window") == {"param": "window"}:
                        node["attrs"]["window"] = {"param": payload}
            for call in data["calls"]:
                if "window" in call["attrs"]:
                    call["attrs"][payload] = call["attrs"].pop("window")
    return data


WHERE = ("program", "note", "path", "config", "function", "parameter", "value", "slot", "weight",
         "state", "attribute")  # fmt: skip


@functools.cache
def saved() -> str:
    program = tiny_program(layers=2, window=3, cache=True, hidden=64, head_dim=32, heads=2)
    return json.dumps(program_to_json(program))


@functools.cache
def plain_sources(target: str) -> dict[str, str]:
    """Return the files of the program as it is."""
    files = sources("", "", target)
    assert files is not None
    return files


def sources(where: str, payload: str, target: str) -> dict[str, str] | None:
    """Return the files of a program with a name changed; None where it is refused."""
    try:
        changed = program_from_json(damaged(where, payload, json.loads(saved())), {})
        verify(changed)
        return source_files(changed, target)
    except GraphoptError:
        return None


def called(text: str) -> set[str]:
    """What a file calls by name, and what it imports."""
    tree = ast.parse(text)
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {callee.id for callee in calls if isinstance(callee, ast.Name)}
    return names | {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
def test_names_in_model_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    plain = plain_sources("cpu")
    written = 0
    # Every payload goes to some places, and every place gets some of each kind.
    chosen = PAYLOADS[WHERE.index(where) % 4 :: 4]
    for number, payload in enumerate(chosen):
        files = sources(where, payload.replace("RAN", str(tmp_path / "ran")), "cpu")
        if files is None:
            continue
        written += 1
        path = tmp_path / f"{number}.py"
        path.write_text(files["model.py"], encoding="utf-8", newline="\n")
        own = called(files["model.py"]) - called(plain["model.py"])
        assert not own & set(dir(importlib.import_module("builtins"))), own
        module = import_model(path)
        assert not (tmp_path / "ran").exists(), payload
        del sys.modules[module.__name__]
    assert written > len(chosen) // 2


@pytest.mark.slow
@pytest.mark.parametrize("where", ["program", "path", "attribute"])
def test_names_in_the_files_of_kernels(where: str) -> None:
    """The folder of kernels mentions no name of the program at all."""
    plain = plain_sources("ampere")
    for payload in PAYLOADS[:2]:
        files = sources(where, payload, "ampere")
        if files is not None:
            assert {k: v for k, v in files.items() if k != "model.py"} == {
                k: v for k, v in plain.items() if k != "model.py"
            }
            assert called(files["model.py"]) >= {"package"}
