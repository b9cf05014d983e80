"""Every way a program can be malformed, and the sentence it gets."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from programs import tiny_program

from graphopt.errors import VerifyError
from graphopt.ir import Array, B, Call, Function, In, Node, Param, S, Type, Value, Weight
from graphopt.ir.ops.aten import resolve_target
from graphopt.ir.shapes import infer_program
from graphopt.ir.verify import verify, verify_function


@pytest.fixture
def program():
    return tiny_program(window=3, cache=True)


def first(program, op, function="block"):
    return next(node for node in program.functions[function].nodes if node.op == op)


def rename(program):
    first(program, "silu").output.name = "h"


def no_output(program):
    first(program, "silu").outputs = []


def unknown_op(program):
    first(program, "silu").op = "sillu"


def too_many(program):
    node = first(program, "silu")
    node.inputs = node.inputs * 2


def too_few(program):
    first(program, "mul").inputs.pop()


def absent(program):
    first(program, "attention").inputs[1] = None


def too_early(program):
    nodes = program.functions["block"].nodes
    nodes.append(nodes.pop(0))


def of_another_function(program):
    first(program, "silu").inputs = [program.functions["head"].params[0]]


def stolen_output(program):
    first(program, "silu").output.node = first(program, "mul")


def wrong_index(program):
    node = first(program, "attention")
    node.outputs = [node.outputs[0], node.outputs[2], node.outputs[1]]


def lost_result(program):
    program.functions["block"].results = [Value("y")]


def lost_cache(program):
    program.functions["block"].caches[0].present_v = Value("y")


def no_function(program):
    program.calls[1].function = "blok"


def few_args(program):
    program.calls[1].args.pop()


def more_results(program):
    program.calls[1].results.append("more")


def early_call(program):
    program.calls.reverse()


def missing_slot(program):
    del program.calls[1].weights["mlp.up_proj.weight"]


def spare_slot(program):
    program.calls[0].weights["spare"] = "embed.weight"


def no_weight(program):
    program.weights.remove("norm.weight")


def no_cache(program):
    program.calls[2].caches = {}


def no_state(program):
    del program.states["kv.1"]


def no_attribute(program):
    del program.calls[2].attrs["window"]


def no_output_of_all(program):
    program.outputs = ["logits", "loss"]


def bad_width(program):
    program.calls[2].weights["mlp.down_proj.weight"] = "embed.weight"


def few_outputs(program):
    node = first(program, "rope_table", "embed")
    node.outputs.pop()
    program.functions["embed"].results.pop()
    program.calls[0].results.pop()
    for call in program.calls[1:3]:
        call.args[-1] = "cos"


def no_types(program):
    node = first(program, "silu")
    node.op, node.attrs = "aten.silu.default", {"args": [In(0)]}


def no_eps(program):
    first(program, "split_heads").attrs.clear()


BLOCK = "function 'block': "
MALFORMED = {
    rename: f"{BLOCK}two values are called 'h'.",
    no_output: f"{BLOCK}a silu node has no output.",
    unknown_op: f"{BLOCK}act = sillu: no such op.",
    too_many: f"{BLOCK}act = silu: 2 operands for ('x',).",
    too_few: f"{BLOCK}m = mul: 1 operands for ('a', 'b').",
    absent: f"{BLOCK}a = attention: a required operand is missing.",
    too_early: f"{BLOCK}q = linear: reads 'h' before it is made.",
    of_another_function: f"{BLOCK}act = silu: reads 'x' before it is made.",
    stolen_output: f"{BLOCK}act = silu: output 'act' points at another node.",
    wrong_index: f"{BLOCK}a = attention: output 'present_v' points at another node.",
    lost_result: f"{BLOCK}result 'y' is never made.",
    lost_cache: f"{BLOCK}result 'y' is never made.",
    no_function: "call of 'blok' at layers.0: no such function.",
    few_args: "call of 'block' at layers.0: 3 args for 4.",
    more_results: "call of 'block' at layers.0: 2 results, not as the function.",
    early_call: "call of 'head' at head: reads 'x' before it is made.",
    missing_slot: "call of 'block' at layers.0: weight slot 'mlp.up_proj.weight' does not match "
    "the function.",
    spare_slot: "call of 'embed' at embed: weight slot 'spare' does not match the function.",
    no_weight: "call of 'head' at head: slot 'norm.weight' names no weight 'norm.weight'.",
    no_cache: "call of 'block' at layers.1: cache slots do not match the function.",
    no_state: "call of 'block' at layers.1: no state 'kv.1'.",
    no_attribute: "call of 'block' at layers.1: attribute 'window' is not set.",
    no_output_of_all: "program output 'loss' is never made.",
    bad_width: "layers.1: down = linear: linear of f32[B,S,48] with weight f32[97,32].",
    few_outputs: "embed: cos = rope_table: 1 outputs where there are 2.",
    no_types: "layers.0: act = aten.silu.default: attribute 'types' is not set.",
    no_eps: "layers.0: q_heads = split_heads: attribute 'head_dim' is not set.",
}


def test_a_sound_program_passes(program):
    verify(program)
    mentioned = verify_function(program.functions["block"])
    assert mentioned == {"window"} and verify_function(program.functions["head"]) == set()


@pytest.mark.parametrize("damage", MALFORMED, ids=lambda damage: damage.__name__)
def test_malformed_programs_are_refused(program, damage):
    damage(program)
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert str(caught.value) == MALFORMED[damage]


def test_unused_functions_are_checked_too(program):
    spare = Function("spare", params=[Value("x")])
    spare.nodes = [Node("tanh", [Value("z")], {}, [])]
    program.functions["spare"] = spare
    with pytest.raises(VerifyError, match="'spare': a tanh node has no output"):
        verify(program)


def test_functions_of_one_name_are_told_apart():
    """Types are looked up by the name that calls use."""
    program = tiny_program(layers=0)
    head = program.functions["head"]
    clone = head.clone()
    linear = clone.results[0].node
    linear.op, linear.inputs = "mul", [linear.inputs[0]] * 2
    del clone.weights["lm_head.weight"]
    program.functions["twin"] = clone
    program.functions["other"] = other = clone.clone()
    other.results = other.nodes[0].outputs
    other.nodes.pop()
    other.add("tanh", [other.results[0]])
    weights = {"norm.weight": "norm.weight"}
    program.calls[1:] = [Call("twin", ["x"], ["a"], weights), Call("other", ["x"], ["b"], weights)]
    program.outputs = ["a", "b"]
    verify(program)
    types, _ = infer_program(program)
    assert set(clone.values()) == set(types[1]) and set(other.values()) == set(types[2])


def test_layers_may_differ_in_sizes():
    """One function, one narrower feed-forward, one window: structure is shared, sizes are not."""
    program = tiny_program(window=3)
    for slot, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"layers.1.mlp.{slot}_proj.weight"
        narrow = program.weights[name].load().narrow(axis, 0, 20)
        program.weights.replace(Weight(name, Array(narrow)))
    verify(program)
    types, _ = infer_program(program)
    act = first(program, "silu").output
    assert [types[i][act].shape[-1] for i in (1, 2)] == [48, 20]
    assert types[1][act] == Type((B, S, 48), torch.float32)
    assert first(program, "attention").attrs["window"] == Param("window")


@pytest.mark.slow
def test_operators_of_saved_programs_are_registered_first():
    """In a process of its own: here, capture may have registered them already."""
    find = "from graphopt.ir.ops.aten import resolve_target as r; r({!r})"
    command = [sys.executable, "-c", find.format("transformers.grouped_mm_fallback.default")]
    subprocess.run(command, check=True)


UNKNOWN = ("aten.nothing.default", "aten.add.Nothing", "nobody.add.default", "aten.add", "a.b.c.d",
           "aten.from_file.default")  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_that_are_not_there(name):
    with pytest.raises(KeyError, match=f"no torch operator {name!r}"):
        resolve_target(name)
