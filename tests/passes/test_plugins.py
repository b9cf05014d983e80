"""Passes of a user's own: a file named by --plugin, and the example that the documentation has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import runner
from programs import tiny_program
from small import check_text
from tiny_models import save_tiny

import graphopt as go
from graphopt.cli.commands import app
from graphopt.errors import PassError, UsageError
from graphopt.pass_manager import contract
from graphopt.pass_manager.contract import add_plugin, declared_passes, get_pass, make_pass

EXAMPLE = Path(__file__).parents[2] / "examples" / "fold_norm_gains.py"
NAME = "fold-norm-gains"

BEFORE = """
program small
def block(x, scale):
    h = rms_norm(x, norm, eps=1e-05)
    y = linear(h, up) * linear(h, gate)
    z = rms_norm(y, other, eps=1e-05) * scale
    return z
run(input_ids: i64[B,S], x: f32[B,S,8], scale: f32[B,S,8]):
    x = block(x, scale) at layers.0
    return x
weights:
    layers.0.norm: f32[8]
    layers.0.up: f32[8,8]
    layers.0.gate: f32[8,8]
    layers.0.other: f32[8]
"""

FAILING = '''
from dataclasses import dataclass
from typing import ClassVar
import graphopt as go

@go.register_pass
@dataclass
class Failing(go.Pass):
    """Fail.

    Options:
        when: Where it fails: in `check`, in `run`, or when it is made.
    """

    name: ClassVar[str] = "failing"
    when: str = "run"

    def check_options(self):
        if self.when == "made":
            raise KeyError("made")

    def check(self, program):
        if self.when == "check":
            [].pop()

    def run(self, program, context):
        return {}["no such key"]
'''


def forget() -> None:
    """Let what was imported of plugins be unknown again."""
    for name in [name for name in sys.modules if name.startswith("graphopt_plugin_")]:
        del sys.modules[name]
    for name, item in list(contract._PASSES.items()):
        if item.__module__.startswith("graphopt_plugin_"):
            del contract._PASSES[name]


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is known in it alone."""
    monkeypatch.setattr(contract, "_PLUGINS", {})
    yield
    forget()


def plugin_file(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def example() -> Any:
    add_plugin(EXAMPLE)
    return make_pass(NAME, {})


def gains(program: go.Program) -> dict[str, torch.Tensor]:
    return {w.name: w.load() for w in program.weights if len(w.shape) == 1 and not w.constant}


# The example --------------------------------------------------------------------------------------


def test_the_example_folds_gains_and_says_what_it_leaves() -> None:
    # Powers of two: no product is rounded, so that results are equal bit for bit.
    generator = torch.Generator().manual_seed(0)
    powers = {
        f"layers.0.{name}": 2.0 ** torch.randint(-3, 4, shape, generator=generator)
        for name, shape in {"norm": (8,), "up": (8, 8), "gate": (8, 8), "other": (8,)}.items()
    }
    result = check_text(example(), BEFORE, BEFORE, powers)
    assert (result.matched, result.changed) == (2, 1)
    assert [(s.where, s.reason) for s in result.skipped] == [
        ("layers.0.other", "something else than a matrix reads the norm's result")
    ]
    after = {w.name: w.load() for w in result.program.weights}
    assert torch.equal(after["layers.0.norm"], torch.ones(8))
    expected = powers["layers.0.up"] * powers["layers.0.norm"]
    assert torch.equal(after["layers.0.up"], expected)
    again = make_pass(NAME, {}).run(result.program, go.Context())
    assert (again.matched, again.changed) == (1, 0)


def test_a_gain_with_an_offset_is_folded_with_it() -> None:
    """Gemma's norms multiply by 1 + what is stored, which then has to be 0."""
    text = BEFORE.replace("norm, eps=1e-05", "norm, eps=1e-05, offset=1.0")
    norm = torch.tensor([1.0, 3.0, 7.0, 0.0, -0.5, 1.0, 3.0, 1.0])  # plus 1: powers of two
    result = check_text(example(), text, text, {"layers.0.norm": norm})
    after = {w.name: w.load() for w in result.program.weights}
    assert torch.equal(after["layers.0.norm"], torch.zeros(8))
    assert torch.equal(after["layers.0.gate"], (norm + 1).expand(8, 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("linear(h, gate)", "linear(h, up)"), "up is read in another place of the model too"),
        (("up: f32[8,8]", "up: bf16[8,8]"), "up is not stored in fp32"),
        (("linear(h, up)", "linear(h, up) * h"), "something else than a matrix reads"),
        (("linear(h, up)", "linear(h, silu(up))"), "a matrix behind it is computed, not stored"),
    ],
)
def test_what_could_not_stay_exact_is_left_alone(change: tuple[str, str], reason: str) -> None:
    text = BEFORE.replace(*change)
    if "gate" not in text.split("weights:")[0]:
        text = text.replace("    layers.0.gate: f32[8,8]\n", "")
    from graphopt.ir.parse import parse_program

    program = parse_program(text)
    values = {w.name: torch.full(w.shape, 2.0, dtype=w.dtype) for w in program.weights}
    result = example().run(parse_program(text, values), go.Context())
    assert (result.changed, len(result.skipped)) == (0, 2)
    assert reason in result.skipped[0].reason


def test_the_pipeline_verifies_the_example() -> None:
    program = tiny_program()
    folded, report = go.Pipeline(["canonicalise", example(), "insert-kv-cache"]).run(program)
    entry = report.passes[1]
    assert entry.verification == "passed" and entry.changed and entry.parameters_after
    ones = [torch.equal(value, torch.ones_like(value)) for value in gains(folded).values()]
    assert sum(ones) == entry.changed


@pytest.mark.exhaustive
@pytest.mark.network
def test_the_example_fires_on_the_demo(demo: str) -> None:
    folded, report = go.Pipeline(["canonicalise", example()]).run(go.capture(demo))
    entry = report.passes[1]
    # Two norms a layer; the last one is in front of the table that is the embedding as well.
    assert (entry.matched, entry.changed, entry.verification) == (61, 60, "passed")
    assert [skip.where for skip in entry.skipped] == ["model.norm.weight"]
    assert folded.parameter_count() == report.passes[0].parameters_after


# --plugin -----------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return runner().invoke(app, list(arguments))


@pytest.mark.slow
def test_compile_runs_a_pass_of_a_file_and_its_recipe_needs_it_again(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "tiny"))
    out = tmp_path / "out"
    command = ("compile", model, "-o", str(out), "--emit", "torch", "--passes", NAME)
    refused = run(*command)
    assert refused.exit_code == 2 and "needs --plugin FILE.py" in refused.stderr
    done = run(*command, "--plugin", str(EXAMPLE))
    assert done.exit_code == 0, done.stderr
    assert f"- {NAME}" in (out / "recipe.yaml").read_text()
    again = ("compile", model, "-o", str(tmp_path / "again"), "--recipe", str(out / "recipe.yaml"))
    forget()
    contract._PLUGINS.clear()
    assert run(*again, "--dry-run").exit_code == 2
    assert run(*again, "--dry-run", "--plugin", str(EXAMPLE)).exit_code == 0


def test_a_plugin_is_listed_before_anything_of_it_is_run(tmp_path: Path) -> None:
    heavy = "import no_such_module_anywhere\n" + FAILING
    path = plugin_file(tmp_path, heavy)
    listed = run("passes", "failing", "--plugin", str(path), "--json")
    assert listed.exit_code == 0 and '"meaning": "Where it fails' in listed.stdout
    assert declared_passes()["failing"].name == "failing"
    with pytest.raises(UsageError, match=r"mine.py cannot be imported: ModuleNotFoundError"):
        get_pass("failing")
    assert not [name for name in sys.modules if name.startswith("graphopt_plugin_")]


def test_a_declaration_that_cannot_stand_alone_has_its_file_run(tmp_path: Path) -> None:
    text = FAILING.replace('when: str = "run"', "when: str = __file__[-7:]")
    add_plugin(plugin_file(tmp_path, text))
    assert make_pass("failing", {}).options() == {}
    assert declared_passes()["failing"]().when == "mine.py"


def test_two_files_of_one_name_and_a_file_twice(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = plugin_file(tmp_path, FAILING)
    add_plugin(one)
    add_plugin(one)
    add_plugin(plugin_file(tmp_path / "b", FAILING.replace('"failing"', '"other"')))
    assert type(make_pass("failing", {})).__module__ != type(make_pass("other", {})).__module__
    with pytest.raises(UsageError, match=r"copy.py registers a pass 'failing', and so does mine"):
        add_plugin(plugin_file(tmp_path, FAILING, "copy.py"))
    own = FAILING.replace('"failing"', '"canonicalise"')
    with pytest.raises(UsageError, match=r"and so does graphopt\.passes\.canonicalise"):
        add_plugin(plugin_file(tmp_path, own, "own.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"mine.py registers no pass"),
        ("def f(:\n", r"mine.py, line 1: this is not Python: [^()]*\.$"),
        (FAILING.replace("@dataclass\n", ""), r"cannot be imported: ValueError: .*not a dataclass"),
        ("\0", r"this is not Python"),
    ],
)
def test_what_is_no_plugin_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        add_plugin(plugin_file(tmp_path, text))
        make_pass("failing", {})
    assert caught.value.remedy


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UsageError):
            add_plugin(path)
    assert run("passes", "--plugin", str(tmp_path / "none.py")).exit_code == 2
    named = os.fsdecode(b"\xff.py")
    assert "not UTF-8" in run("passes", "--plugin", named).stderr


@pytest.mark.parametrize(
    ("when", "error"), [("run", "KeyError"), ("check", "IndexError"), ("made", "KeyError")]
)
def test_an_error_in_a_users_pass_is_not_called_a_bug_of_graphopt(
    tmp_path: Path, when: str, error: str
) -> None:
    add_plugin(plugin_file(tmp_path, FAILING))
    with pytest.raises(PassError, match=rf"'failing' failed in mine.py, line \d+: {error}") as told:
        go.Pipeline([make_pass("failing", {"when": when})]).run(tiny_program())
    assert "--debug" in told.value.remedy


def test_one_line_for_each_part_of_a_program() -> None:
    program = tiny_program()
    call = program.calls[1]
    function = program.function_of(call)
    weight = next(iter(program.weights))
    parts = [program, call, function, function.nodes[0], function.params[0], weight]
    for shown in (*parts, weight.producer, program.weights, weight.type, go.PassResult(program)):
        assert len(repr(shown)) < 200 and "\n" not in repr(shown), repr(shown)
    assert repr(weight.type) == f"Type({weight.type})"
    assert weight.name in repr(weight) and function.name in repr(call)
    assert {"Weight", "Param", "Function", "Node", "capture", *go.__all__} <= set(dir(go))
    for name in go.__all__:
        assert callable(getattr(go, name))
