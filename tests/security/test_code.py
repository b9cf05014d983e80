"""Code in a model folder runs only where the user said so, and only what can be read."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import io
import json
import marshal
import os
import py_compile
import shutil
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import change
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.backends import code as emitted
from graphopt.backends.opening import open_language_model
from graphopt.cli import commands as cli
from graphopt.cli import console as ui
from graphopt.errors import GraphoptError, SourceError
from graphopt.execute.language_model import load_tokenizer
from graphopt.files.config_schema import without_code
from graphopt.sources.huggingface import read_config
from graphopt.sources.tokenizer import read_tokenizer


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that evil code makes."""
    return tmp_path / "ran"


def evil(ran: Path) -> str:
    return f"open({str(ran)!r}, 'w').close()\n"


def plant(source: Path, ran: Path, mode: str) -> None:
    """Put compiled evil code where Python's import looks for that of a genuine file."""
    cache = Path(importlib.util.cache_from_source(str(source)))
    cache.parent.mkdir(exist_ok=True)
    code = marshal.dumps(compile(evil(ran), str(source), "exec"))
    stat = source.stat()
    if mode == "unchecked":
        head = (1).to_bytes(4, "little") + bytes(8)
    elif mode == "checked hash":
        head = (3).to_bytes(4, "little") + importlib.util.source_hash(source.read_bytes())
    else:
        times = (int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF)
        head = bytes(4) + b"".join(number.to_bytes(4, "little") for number in times)
    cache.write_bytes(importlib.util.MAGIC_NUMBER + head + code)


MODES = ("unchecked", "checked hash", "time")


@pytest.mark.parametrize("mode", MODES)
def test_such_a_file_does_run_where_python_imports(tmp_path: Path, ran: Path, mode: str) -> None:
    """Or the tests below would show nothing."""
    (tmp_path / "plain.py").write_text("x = 1\n")
    plant(tmp_path / "plain.py", ran, mode)
    spec = importlib.util.spec_from_file_location("plain", tmp_path / "plain.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert ran.exists()


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_code_beside_model_py(artifact: Path, ran: Path, mode: str, trusted: bool) -> None:
    """Whoever trusts a folder trusts what can be read there."""
    plant(artifact / "model.py", ran, mode)
    (artifact / "model.pyc").write_bytes(
        (artifact / "__pycache__").iterdir().__next__().read_bytes()
    )
    model = open_language_model(str(artifact), "torch", trust_remote_code=trusted)
    assert model.logits(torch.tensor([[1, 2]])).shape == (1, 2, 300)
    assert not ran.exists()


@pytest.fixture(scope="module")
def for_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu") / "out"
    go.emit(tiny_program(layers=1, cache=True, head_dim=32, hidden=128), root, emit=("torch",),
            target="ampere")  # fmt: skip
    return root


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [False, True])
def test_compiled_code_beside_kernels(
    for_a_gpu: Path, tmp_path: Path, ran: Path, trusted: bool
) -> None:
    artifact = Path(shutil.copytree(for_a_gpu, tmp_path / "artifact"))
    for path in (artifact / "kernels").glob("*.py"):
        plant(path, ran, "unchecked")
    (artifact / "kernels" / "fused.abi3.so").write_bytes(b"\x7fELF")
    (artifact / "kernels" / "dispatch").mkdir()  # a package of a module's name comes before it
    (artifact / "kernels" / "dispatch" / "__init__.py").write_text(evil(ran))
    open_language_model(str(artifact), "torch", trust_remote_code=trusted)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["model.py", "kernels/__init__.py", "kernels/dispatch.py",
                                  "kernels/prefill.py"])  # fmt: skip
def test_changed_sources(for_a_gpu: Path, tmp_path: Path, ran: Path, name: str) -> None:
    artifact = Path(shutil.copytree(for_a_gpu, tmp_path / "artifact"))
    with (artifact / name).open("a") as file:
        file.write(evil(ran))
    with pytest.raises(SourceError, match=r"is not the file that graphopt writes"):
        open_language_model(str(artifact), "torch")
    assert not ran.exists()


def test_images_of_kernels_are_compiled_anew(
    for_a_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the folder under their names is not what a driver gets."""
    from graphopt.lowering.torch.lowered_kernels import LoweredKernels
    from graphopt.sources import open_model

    program = open_model(str(for_a_gpu)).program
    assert program is not None
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {"volta_prefill_0.cubin": b"ours"})
    (for_a_gpu / "kernels" / "volta_prefill_0.cubin").write_bytes(b"theirs")
    code = emitted.checked_code(for_a_gpu, program, "ampere", images=True)
    images = {path.name: path.read_bytes() for path in code.root.rglob("*.cubin")}
    (for_a_gpu / "kernels" / "volta_prefill_0.cubin").unlink()
    assert images == {"volta_prefill_0.cubin": b"ours"}


def test_nothing_is_written_into_the_folder(artifact: Path) -> None:
    before = sorted(path for path in artifact.rglob("*"))
    open_language_model(str(artifact), "torch").logits(torch.tensor([[1]]))
    assert sorted(path for path in artifact.rglob("*")) == before


# Tokenizers and models that bring code ----------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked for on the terminal; every answer is yes."""
    found: list[str] = []

    def answer(prompt: str = "") -> str:
        found.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return found


def bring_code(folder: Path, ran: Path, form: str) -> None:
    """Make a tokenizer, and its model, name code in the folder."""
    (folder / "evil.py").write_text(evil(ran))
    for name in ("tokenization_evil.py", "configuration_evil.py", "modeling_evil.py"):
        (folder / name).write_text(evil(ran))
    maps: dict[str, Any] = {
        "pair": {"AutoTokenizer": ["evil.Tokenizer", "evil.TokenizerFast"]},
        "fast alone": {"AutoTokenizer": [None, "evil.TokenizerFast"]},
        "list": ["evil.Tokenizer", "evil.TokenizerFast"],
        "other repository": {"AutoTokenizer": [None, "owner/name--evil.Tokenizer"]},
    }
    change(
        folder,
        lambda data: data.update(auto_map=maps[form], tokenizer_class="EvilTokenizer"),
        "tokenizer_config.json",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [pytest.param("pair", marks=pytest.mark.slow), "fast alone", "list", "other repository"],
)
def test_a_tokenizer_with_code(tmp_path: Path, ran: Path, asked: list[str], form: str) -> None:
    model = save_tiny(tmp_path / "model")
    bring_code(model, ran, form)
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": "evil.Tokenizer",
                "AutoModelForCausalLM": "evil.Model"}  # fmt: skip
    change(model, lambda data: data.update(auto_map=auto_map), "config.json")
    attempts: list[Callable[[], Any]] = [
        lambda: read_tokenizer(model),
        lambda: load_tokenizer(open_language_model(str(model))),
    ]
    if form == "pair":
        attempts.append(
            lambda: go.compile_model(
                str(model), tmp_path / "out", go.CompileOptions(emit=("torch",))
            )
        )
    for attempt in attempts:
        try:
            attempt()
        except GraphoptError as error:
            assert "tokenizer" in error.message, error
    assert not ran.exists() and not asked
    assert not list((tmp_path / "out").rglob("evil*"))


@pytest.mark.parametrize("key", ["text_config", "decoder"])
def test_code_of_a_config_inside_a_config(
    tmp_path: Path, ran: Path, asked: list[str], key: str
) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "evil.py").write_text(evil(ran))
    inner = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}
    change(model, lambda data: data.update({key: inner}), "config.json")
    with contextlib.suppress(GraphoptError):
        go.capture(str(model))
    assert not ran.exists() and not asked


@pytest.mark.parametrize(
    "key",
    ["attn_implementation", "_attn_implementation", "_attn_implementation_internal",
     "experts_implementation", "use_kernels"],
)  # fmt: skip
def test_a_config_names_no_kernels(tmp_path: Path, key: str) -> None:
    """transformers would download them from the hub and import them."""
    model = save_tiny(tmp_path / "model")
    for place in ({key: "owner/name"}, {"text_config": {key: "owner/name"}}):
        change(model, lambda data, place=place: data.update(place), "config.json")
        config = json.loads((model / "config.json").read_text())
        assert "owner/name" not in json.dumps(without_code(config))
        read = read_config(model / "config.json")
        assert "owner/name" not in repr(vars(read))


def test_nothing_reads_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process that `main` makes; an answer would be taken as one of the user's."""
    given = io.StringIO("y\n" * 100)
    monkeypatch.setattr(sys, "stdin", given)
    answers: list[str] = []

    def ask() -> None:
        with contextlib.suppress(EOFError):
            answers.append(input())

    monkeypatch.setattr(cli, "app", ask)
    monkeypatch.setattr(ui, "keep_logs_plain", lambda: None)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(cli.atexit, "_run_exitfuncs", lambda: None)
    before = gc.get_threshold()
    cli.main()
    gc.set_threshold(*before)
    assert answers == [] and given.tell() == 0


@pytest.mark.slow
def test_pip_imports_nothing_from_the_working_folder(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.sources import demo

    for name in ("pip.py", "zipfile.py", "runpy.py"):
        (tmp_path / name).write_text(evil(ran))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "wheel").mkdir()
    with pytest.raises(SourceError, match="could not be downloaded"):
        demo._download(tmp_path / "wheel")
    assert not ran.exists()


def sources() -> list[Path]:
    """The package's Python files, wherever its folders lie."""
    found = [Path(str(resources.files("graphopt"))), *(
        Path(str(resources.files(f"graphopt.{name}"))) for name in ("lowering", "passes", "runtime")
    )]  # fmt: skip
    return sorted({path.resolve() for root in found for path in root.rglob("*.py")})


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in sources()}), ids=lambda f: f.name
)
def test_every_loader_says_that_no_code_is_trusted(folder: Path) -> None:
    for path in sources():
        if path.parent == folder:
            check_loaders(path)


def check_loaders(path: Path) -> None:
    """And nothing asks, nor runs text, but where it is said why that is right."""
    may_run = {
        "backends/code.py": 1,  # what graphopt itself wrote, byte for byte
        "hf/carved.py": 1,  # likewise
        # The declaration of a pass, of a module that an installed distribution names as its own
        # and that is imported to be run.
        "pass_manager/declarations.py": 1,
    }
    runs = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        where = f"{path}:{node.lineno}: {name}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name.endswith((".from_pretrained", ".from_config")) or name in (
            "cached_file", "get_class_from_dynamic_module",
        ):  # fmt: skip
            assert "trust_remote_code" in given, where
            value = given["trust_remote_code"]
            if isinstance(value, ast.Constant) and value.value is True:
                # The one place behind the option itself.
                assert path.name == "huggingface.py", where
        if path.name != "keyboard.py":  # where the user types to a chat, and nothing else is asked
            assert name != "input", where
        assert name not in ("eval", "os.system", "os.popen", "sys.stdin.read"), where
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), where
        assert name not in ("numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"), where
        if name == "torch.load":
            assert ast.literal_eval(given["weights_only"]) is True, where
        if name in ("subprocess.run", "subprocess.Popen"):
            assert "shell" not in given and given.keys() & {"stdin", "input"}, where
        runs += name == "exec"
    assert runs == may_run.get(f"{path.parent.name}/{path.name}", 0), path


def test_python_compiles_files_where_it_is_told_to(tmp_path: Path) -> None:
    """`py_compile` and this process agree on where compiled files go."""
    (tmp_path / "a.py").write_text("")
    made = py_compile.compile(str(tmp_path / "a.py"))
    assert made is not None and os.path.samefile(
        made, importlib.util.cache_from_source(str(tmp_path / "a.py"))
    )
