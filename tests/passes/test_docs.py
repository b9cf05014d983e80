from __future__ import annotations

import re
from pathlib import Path

from programs import tiny_program

from graphopt.pass_manager.contract import declared_passes
from graphopt.pass_manager.recipe import recipe_from_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_example_of_the_documentation_runs(capsys):
    model = tiny_program(layers=3)
    for node in model.functions["block"].nodes:
        if node.op == "silu":
            node.op = "gelu"
    # Dataclasses look up their annotations in the module of that name.
    scope = {"__name__": __name__, "model": model}
    for code in blocks("python"):
        exec(compile(code, "docs/passes.md", "exec", dont_inherit=True), scope)
    entry = scope["report"].passes[1]
    assert (entry.matched, entry.changed) == (3, 2)
    assert [(s.where, s.reason) for s in entry.skipped] == [
        ("layers.0", "one of the first 1 layers")
    ]
    assert 0 < entry.kl < 1e-2 and entry.verification == "measured"
    assert scope["report"].passes[2].verification == "passed"
    functions = [call.function for call in scope["program"].calls]
    assert functions == ["embed", "block", "block_tanh", "block_tanh", "head"]
    assert capsys.readouterr().out.startswith("tanh-gelu 3 2")
    scope["test_a_second_relu_goes"]()


def test_the_recipe_and_the_table_are_of_this_version():
    (recipe,) = blocks("yaml")
    assert [item.name for item in recipe_from_yaml(recipe)] == [
        "canonicalise",
        "fold-constants",
        "insert-kv-cache",
    ]
    listed = re.findall(r"^\| `([a-z-]+)` \|", PAGE, flags=re.MULTILINE)
    own = {n for n, c in declared_passes().items() if c.__module__.startswith("graphopt.passes.")}
    assert set(listed) == own, f"docs/passes.md needs a row for each of {own ^ set(listed)}"
