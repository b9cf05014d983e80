"""What prune-experts states is checked against weights and graph, and mistakes are found."""

from __future__ import annotations

import functools

import pytest
from mixtures import drop, mixture
from planted import change, scaled, swapped

from graphopt.ir import Program
from graphopt.ir.blocks import find_blocks
from graphopt.pass_manager.expert_statements import KeptExperts, KeptOfMixture


@functools.cache
def _dropped() -> tuple[Program, Program, KeptExperts]:
    program = mixture("mixtral")[1]
    kept = (0, 2, 3, 5, 6, 7)
    statement = KeptExperts(tuple(KeptOfMixture(i, kept, merged=False) for i in range(2)))
    return program, drop(program, list(kept)), statement


def _name(program: Program, part: str, layer: int = 1) -> str:
    names = [name for call in program.calls for name in call.weights.values()]
    return next(name for name in names if f"layers.{layer}." in name and part in name)


def _attr(op: str, act):
    def plant(program: Program) -> None:
        call = program.calls[find_blocks(program)[1].position]
        for node in program.functions[call.function].nodes:
            if node.op == op:
                act(node)

    return plant


def _weight(part: str, act):
    return lambda program: change(program, _name(program, part), act)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "found"),
    [
        (_weight("gate_up_proj", swapped(0, 1)), "gate_up_proj is not the source's"),
        (_weight("down_proj", scaled(1.0001, 3)), "down_proj is not the source's"),
        (_weight("gate.weight", swapped(2, 3)), "gate.weight is not the source's"),
        (_weight("q_proj", scaled(1.001)), "q_proj.weight is not the source's"),
        (_weight("post_attention", scaled(1.001)), "post_attention_layernorm.weight is not"),
        (lambda p: change(p, "model.norm.weight", scaled(2.0)), "head changed as well"),
        (_attr("aten.histc.default", lambda n: n.attrs["args"].__setitem__(3, 6)),
         "computes something else"),
        (_attr("aten.topk.default", lambda n: n.attrs["args"].__setitem__(1, 1)),
         "computes something else"),
        (_attr("silu", lambda n: setattr(n, "op", "gelu")), "computes something else"),
    ],
)  # fmt: skip
def test_a_mistake_is_found(act, found):
    before, after, statement = _dropped()
    assert statement.check(before, after) is None
    wrong = after.copy()
    act(wrong)
    assert found in (statement.check(before, wrong) or "")


def test_what_is_stated_must_be_what_was_kept():
    before, after, statement = _dropped()
    other = KeptExperts(
        tuple(KeptOfMixture(m.block, (0, 1, *m.experts[2:]), m.merged) for m in statement.mixtures)
    )
    assert "is not the source's" in (other.check(before, after) or "")
    one = KeptExperts(statement.mixtures[:1])
    assert "layers.1 changed as well" in (one.check(before, after) or "")


def test_only_experts_own_weights_may_differ_where_they_were_merged():
    before, after, statement = _dropped()
    merged = KeptExperts(tuple(KeptOfMixture(m.block, m.experts, True) for m in statement.mixtures))
    own = after.copy()
    change(own, _name(own, "down_proj"), scaled(0.5))
    assert merged.check(before, own) is None
    solved = KeptExperts(
        tuple(KeptOfMixture(m.block, m.experts, False, True) for m in statement.mixtures)
    )
    assert solved.check(before, own) is None
    change(own, _name(own, "gate_up_proj"), scaled(0.5))
    assert "gate_up_proj is not the source's" in (solved.check(before, own) or "")
    change(own, _name(own, "gate.weight"), scaled(0.5))
    assert "gate.weight is not the source's" in (merged.check(before, own) or "")
