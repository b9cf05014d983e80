"""The pages `add a target` and `add an op`: their examples run, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from programs import tiny_program

from graphopt import targets
from graphopt.execute.interpreter import Runner
from graphopt.ir.ops import base, get_op
from graphopt.lowering.onnx.ops import registry
from graphopt.lowering.torch import forms

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def scope(monkeypatch):
    """Return names for examples; what they register goes when the test ends."""
    for module, name, example in (
        (base, "_OPS", "softplus"), (registry, "_TRANSLATIONS", "softplus"),
        (forms, "_CALLEES", "softplus"), (forms, "_FORMS", "softplus"),
        (targets, "_REGISTERED", "ada"),
    ):  # fmt: skip
        known = {key: value for key, value in getattr(module, name).items() if key != example}
        monkeypatch.setattr(module, name, known)
    # The repository may have come to have what the examples add.
    files = {name: file for name, file in targets._own_files().items() if name != "ada"}
    monkeypatch.setattr(targets, "_own_files", lambda: files)
    return {"__name__": __name__, "model": tiny_program(cache=True, head_dim=32)}


def run(page, scope):
    text = (DOCS / page).read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, f"docs/{page}", "exec", dont_inherit=True), scope)


def test_an_op_is_added(scope, capsys, tmp_path):
    run("add-an-op.md", scope)
    assert "softplus(" in capsys.readouterr().out
    op, x = get_op("softplus"), torch.linspace(-40, 40, 81, dtype=torch.float64)
    # torch takes x itself beyond 20, which leaves out less than e^-20.
    fast, plain = op.torch([x], {})[0], op.reference([x], {})[0]
    torch.testing.assert_close(fast, plain, rtol=1e-15, atol=math.exp(-20))
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = Runner(scope["model"], dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    path = tmp_path / "model.py"
    path.write_text(scope["text"], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("with_softplus", path)
    emitted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emitted)
    weights = {
        w.name: torch.nn.Parameter(w.load(torch.float64), requires_grad=False)
        for w in scope["model"].weights
    }
    found, _ = emitted.Model(weights)(ids)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_an_op_with_two_forms_is_refused():
    for register in (lambda: forms.torch_callee("silu", "F.silu"), lambda: forms.torch_form("add")):
        with pytest.raises(ValueError, match="has a form in torch already"):
            register()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_target_is_added(scope, capsys):
    run("add-a-target.md", scope)
    shown = capsys.readouterr().out
    assert "target     ada" in shown and "kernel     triton" in shown
    assert all(inequality.holds for inequality in scope["plan"].inequalities)
    assert "NVIDIA RTX 4090" in scope["files"]["kernels/__init__.py"]
    with pytest.raises(ValueError, match="'ada' is there already"):
        targets.register_target(scope["ADA"])
    assert [name for name in scope["all_families"]() if name in shown]


def test_what_the_examples_register_is_gone(request):
    before = set(base.all_ops()), set(targets.all_targets())
    scope = request.getfixturevalue("scope")
    run("add-an-op.md", scope)
    run("add-a-target.md", scope)
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.undo()
    assert (set(base.all_ops()), set(targets.all_targets())) == before
