"""The test models are sharp: leaving out any one feature moves the logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from families import FAMILIES, LISTED, TOLERANCE, captured, cases, error, sampled

from graphopt.capture import capture_structure, model_of_config
from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Node, Param, Program

_LEAVE_OUT = {
    "window": None,
    "softcap": None,
    "causal": False,
    "scale": 1.0,
    "offset": 0,
    "interleaved": True,
}
_OPTIONAL = {
    "linear": {2: "bias"},
    "rms_norm": {1: "gain"},
    "layer_norm": {1: "gain", 2: "bias"},
    "attention": {3: "padding mask", 5: "ALiBi", 6: "sinks"},
}
_PASS_THROUGH = ("rope", "scale", "softcap", "silu", "gelu", "gelu_tanh", "relu")


def _without_features(program: Program) -> Iterator[tuple[str, Program]]:
    """Yield the program without one feature at a time: everywhere it is."""
    features = {
        (name, node.op, kind)
        for name, function in program.functions.items()
        for node in function.nodes
        for kind in _kinds(node)
    }
    for name, op, kind in sorted(features, key=str):
        changed = program.copy()
        for node in list(changed.functions[name].nodes):
            if node.op == op and kind in _kinds(node):
                _leave_out(changed, name, node, kind)
        yield f"{name}: {op} without {kind}", changed


def _kinds(node: Node) -> list[object]:
    kinds: list[object] = []
    for key, neutral in _LEAVE_OUT.items():
        value = node.attrs.get(key, neutral)
        if node.op in ("scale", "softcap") or (key == "interleaved" and node.op != "rope"):
            continue
        if value != neutral:
            kinds.append(key)
    for index in _OPTIONAL.get(node.op, {}):
        if index < len(node.inputs) and node.inputs[index] is not None:
            kinds.append(index)
    if node.op in _PASS_THROUGH:
        kinds.append("itself")
    return kinds


def _leave_out(program: Program, name: str, node: Node, kind: object) -> None:
    if kind == "itself":
        assert node.inputs[0] is not None
        program.functions[name].replace(node.output, node.inputs[0])
    elif isinstance(kind, int):
        node.inputs[kind] = None
    else:
        value = node.attrs.get(str(kind))
        if isinstance(value, Param):
            for call in program.calls:
                if call.function == name:
                    call.attrs[value.name] = _LEAVE_OUT[str(kind)]
        else:
            node.attrs[str(kind)] = copy.copy(_LEAVE_OUT[str(kind)])


@pytest.mark.parametrize("family", sampled(LISTED))
def test_leaving_out_a_feature_shows(family: str) -> None:
    _, program = captured(family)
    case = cases(lengths=(64,))[-1]
    expected = Runner(program).logits(case.inputs)
    found = 0
    for what, changed in _without_features(program):
        found += 1
        moved = error(expected, Runner(changed).logits(case.inputs), case)
        assert moved > 100 * TOLERANCE, f"{what} moves the logits by {moved:.1e} only"
    assert found >= 5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_scores_are_capped_whatever_attention_transformers_would_choose(family: str) -> None:
    """transformers 5.17 chooses fused attention for these, which leaves the cap out."""
    program = capture_structure(model_of_config({"model_type": family, **FAMILIES["gemma2"]}))
    found = [
        node.attrs["softcap"]
        for function in program.functions.values()
        for node in function.nodes
        if node.op == "attention"
    ]
    assert found and set(found) == {2.0}
