"""Families of kernels: what each says of itself, and that its plans run by it alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from carved import carved
from programs import tiny_program

from graphopt.errors import LoweringError
from graphopt.ir import collectives, functional
from graphopt.ir.feed_forward import Split
from graphopt.lowering.kernels import (
    LayerFamily,
    all_families,
    get_family,
    get_layer_family,
    plan_attention,
    register_family,
    register_layer_family,
)
from graphopt.lowering.kernels.triton import TritonFamily, expert_tiles
from graphopt.lowering.torch.lowered_kernels import lower_attentions
from graphopt.plan import AttentionSpec
from graphopt.runtime import compiled
from graphopt.runtime import expert_tiles as runtime_tiles
from graphopt.runtime.attention import Extras, Keys
from graphopt.targets import all_targets, get_target


def test_every_family_of_every_target_is_known():
    for target in all_targets().values():
        for name in target.kernels:
            assert get_family(name).name == name
        for name in target.layer_kernels:
            assert get_layer_family(name).name == name


@pytest.mark.parametrize("get", [get_family, get_layer_family])
def test_an_unknown_family_is_refused_with_the_nearest_name(get):
    with pytest.raises(LoweringError, match="'tritn'") as error:
        get("tritn")
    assert "triton" in str(error.value)


def test_a_name_belongs_to_one_family():
    with pytest.raises(ValueError, match="'triton' is registered twice"):
        register_family(TritonFamily)
    with pytest.raises(ValueError, match="'triton' is registered twice"):
        register_layer_family(LayerFamily("triton", ()))


def test_launchers_and_layers_have_the_functions_that_emitted_models_ask_for():
    for family in all_families().values():
        module = importlib.import_module(f"graphopt.runtime.{family.launcher}")
        assert callable(module.load)
    for group in get_layer_family("triton").groups:
        module = importlib.import_module(f"graphopt.runtime.{group.module}")
        setup = group.setup(get_target("hopper")) if group.setup else None
        made = () if setup is None else setup.makes
        for name in group.functions:
            plain = getattr(functional, name, None) or getattr(collectives, name)
            assert callable(plain)
            assert name in made or getattr(module, name) is not plain
        for where, names in ({} if setup is None else setup.imports).items():
            assert where in (group.module, *group.helpers)
            there = importlib.import_module(f"graphopt.runtime.{where}")
            assert all(hasattr(there, name) for name in names)


def experts_for(target):
    """Return the kernels of a model with experts."""
    return lower_attentions(carved(tiny_program(head_dim=32, ffn=56), Split(24, 4, 2)), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", [t.name for t in all_targets().values() if t.experts])
def test_an_emitted_model_has_the_experts_tiles_of_its_target(target):
    lowered = experts_for(target)
    text = lowered.files()["__init__.py"]
    statement = text[text.index("EXPERTS = ") : text.index("moe = ")]
    assert "expert_tiles.py" in lowered.files()
    scope: dict[str, object] = {}
    exec(statement, vars(runtime_tiles), scope)
    tiles = expert_tiles(get_target(target))
    assert scope["EXPERTS"] == tiles and tiles.many[-1].tokens == 0
    assert all(row.expand.rows == row.reduce.rows for row in tiles.many)
    assert tiles.sorted_tokens(10**6).expand.rows == max(r.expand.rows for r in tiles.many)
    assert tiles.sorted_tokens(10**6, 32).expand.rows == 32 and tiles.sorted_tokens(0).tokens == 0


@pytest.mark.slow
def test_without_tiles_experts_run_in_plain_torch_and_that_is_said():
    lowered = experts_for("ampere")
    assert lowered.without_layer_kernels() == []
    lowered.target = dataclasses.replace(lowered.target, experts=None)
    ((what, why),) = lowered.without_layer_kernels()
    assert "moe" in what and "ampere.toml has no figures" in why
    files = lowered.files()
    assert "moe.py" not in files and "experts.py" not in files and "moe" not in lowered.functions()
    plain = tiny_program(head_dim=32)
    assert "moe.py" not in lower_attentions(plain, "ampere").files()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("phase", "queries"), [("prefill", 20), ("decode", 1)])
def test_a_family_loads_what_runs_its_plan(phase, queries):
    spec = AttentionSpec(head_dim=32, heads=4, kv_heads=2, phase=phase)
    plan = plan_attention(spec, get_target("ampere"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, 32, generator=generator).half().to(device)
        for heads, tokens in ((4, queries), (2, 20), (2, 20))
    )
    run = get_family(plan.kernel).load(plan)
    found = run(q, Keys(k, v), scale=0.2, extras=Extras())[0]
    expected = functional.attention(q.double(), k.double(), v.double(), scale=0.2)
    # Outputs of f16 are rounded once; weights of at most 1 are rounded before they are summed.
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=2**-9)


def test_activations_of_kernels_in_cuda_are_those_that_gates_may_have():
    source = (Path(compiled.__file__).parent / "kernels" / "activations.cu").read_text("utf-8")
    (listed,) = re.findall(r"enum \{([^}]*)\}", source)
    names = [name.strip().lower() for name in listed.split(",")]
    assert tuple(names) == compiled.ACTIVATIONS and {*names} == {*functional.ACTIVATIONS}
    # The last is what is left where no case is.
    cases = [name.lower() for name in re.findall(r"case (\w+):", source)]
    assert cases == names[:-1]
