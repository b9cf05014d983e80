from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from importlib import metadata
from typing import get_type_hints

import pytest

from graphopt.errors import UsageError
from graphopt.pass_manager import contract
from graphopt.pass_manager.contract import declared_passes, get_pass, make_pass
from graphopt.pass_manager.declarations import ENTRY_POINTS, declarations
from graphopt.pass_manager.description import describe_passes
from graphopt.pass_manager.options import default_of

LISTING = """
import sys
from graphopt.cli.commands import app
app({arguments!r}, standalone_mode=False)
heavy = {{"torch", "transformers", "onnx", "sympy"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["passes"], ["passes", "fuse-blocks"], ["passes", "--json"], ["targets"]]
)
def test_listing_imports_nothing_that_computes(arguments):
    program = LISTING.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_what_a_module_declares_is_what_it_registers():
    """The declaration that is read out of the source equals the class that an import gives."""
    seen = [item for item in declarations() if item.module.startswith("graphopt.passes.")]
    assert seen
    for item in seen:
        assert item.declared is not None, f"{item.module} has to be imported to be listed"
        imported = get_pass(item.declared.name)
        assert imported.__module__ == item.module and imported is not item.declared
        assert inspect.getdoc(item.declared) == inspect.getdoc(imported)
        for name in ("name", "exact", "reads_weights", "requires"):
            assert getattr(item.declared, name) == getattr(imported, name)
        fields, own = (dataclasses.fields(cls) for cls in (item.declared, imported))
        assert [f.name for f in fields] == [f.name for f in own]
        assert [default_of(f) for f in fields] == [default_of(f) for f in own]
        hints, types = get_type_hints(item.declared), get_type_hints(imported)
        assert all(hints[f.name] == types[f.name] for f in fields)


PLUGIN = '''
"""A pass of another distribution."""

from __future__ import annotations

import {module}_needs_this as needed
from dataclasses import dataclass, field
from typing import ClassVar

import graphopt as go

MOST = 4
LAYERS = [MOST, 2 * MOST]


class Helper(needed.Base):
    pass


@go.register_pass
@dataclass
class Plugin(go.Pass):
    """Do nothing.

    Legality:

    1. Always.
    """

    name: ClassVar[str] = "{module}"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("dead-code-elimination",)
    helper: ClassVar[type] = Helper

    layers: list[int] = field(default_factory=lambda: list(LAYERS))
    most: int = {most}

    def run(self, program: go.Program, context: go.Context) -> go.PassResult:
        return go.PassResult(needed.touch(program))
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Return a function that installs the pass as a module under an entry point."""

    def install(module, **values):
        (tmp_path / f"{module}_needs_this.py").write_text(
            "class Base:\n    pass\n\n\nDEFAULT = 7\n\n\ndef touch(program):\n    return program\n"
        )
        (tmp_path / f"{module}.py").write_text(PLUGIN.format(module=module, **values))
        point = metadata.EntryPoint(module, module, ENTRY_POINTS)
        monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
        contract._declarations.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    contract._declarations.cache_clear()


def test_a_plugin_is_listed_without_what_it_runs_and_made_with_it(plugin):
    plugin("plugged_a", most="MOST")
    (found,) = describe_passes("plugged_a")
    assert found["summary"] == "Do nothing." and "1. Always." in found["doc"]
    assert found["exact"] is False and found["requires"] == ["dead-code-elimination"]
    assert [(o["name"], o["default"]) for o in found["options"]] == [
        ("layers", [4, 8]), ("most", 4),
    ]  # fmt: skip
    assert not {"plugged_a", "plugged_a_needs_this"} & set(sys.modules)
    made = make_pass("plugged_a", {"most": 3})
    assert "plugged_a_needs_this" in sys.modules
    assert made.run("program", contract.Context()).program == "program" and made.most == 3


def test_a_declaration_that_needs_its_module_has_it_imported(plugin):
    plugin("plugged_b", most="getattr(Helper(), 'most', needed.DEFAULT)")
    declared = declared_passes()["plugged_b"]
    assert [default_of(f) for f in dataclasses.fields(declared)] == [[4, 8], 7]


def test_a_declaration_that_cannot_stand_alone_is_imported(plugin):
    # Read alone, `__file__` is not known.
    plugin("plugged_c", most="len(__file__) * 0 + 5")
    assert "plugged_c" not in sys.modules
    assert default_of(dataclasses.fields(declared_passes()["plugged_c"])[1]) == 5
    assert "plugged_c" in sys.modules


def test_an_entry_point_without_a_module_is_named(plugin, monkeypatch):
    plugin("plugged_d", most="1")
    point = metadata.EntryPoint("mine", "no_such_module_anywhere", ENTRY_POINTS)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    with pytest.raises(UsageError, match=r"'mine' of .* names no_such_module") as caught:
        declared_passes()
    assert caught.value.remedy
