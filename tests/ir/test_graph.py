"""Editing functions and programs, and copies that share nothing that can change."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.ir import Array, Call, Function, KVState, Param, Value, Weight, resolve_attrs
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import unique_name
from graphopt.ir.printer import print_function
from graphopt.ir.verify import verify


def chain():
    """y = tanh(x) * w, results y twice."""
    f = Function("f", params=[Value("x")], weights={"w": Value("w")})
    t = f.add("tanh", [f.params[0]], names=["t"]).output
    y = f.add("mul", [t, f.weights["w"]], names=["y"]).output
    f.results = [y, y]
    return f, t, y


def text(function):
    return print_function(function).splitlines()[1:]


def test_names_are_made_unique():
    f, _, _ = chain()
    node = f.add("rope_table", [None, None], names=["x", "y"], outputs=2)
    assert [value.name for value in node.outputs] == ["x_1", "y_1"]
    assert [(value.node, value.index) for value in node.outputs] == [(node, 0), (node, 1)]
    clone = f.add("rope_table", [None, None], outputs=2)
    assert [value.name for value in clone.outputs] == ["rope_table", "rope_table_1"]
    assert f.add("aten.exp.default", [f.params[0]]).output.name == "exp"
    assert unique_name("a", {"a", "a_1", "a_3"}) == "a_2"
    names = [value.name for value in f.values()]
    assert len(names) == len(set(names)) and f.value_names() == set(names)


def test_the_names_of_weights_and_caches_are_taken_too():
    program = tiny_program(cache=True)
    block = program.functions["block"]
    for taken in ("past_k", "self_attn_q_proj_w", "attention_mask"):
        assert taken in block.value_names()
        assert block.add("tanh", [block.params[0]], names=[taken]).output.name == f"{taken}_1"


def test_insertion_before_a_node():
    f, t, y = chain()
    before = f.add("silu", [t], names=["s"], before=y.node)
    assert f.nodes.index(before) == 1
    y.node.inputs[0] = before.output
    verify_order(f)
    assert text(f) == ["    y = silu(tanh(x)) * w", "    return y, y"]


def verify_order(function):
    known = {*function.params, *function.weights.values()}
    for node in function.nodes:
        assert all(value in known for value in node.inputs if value is not None)
        known |= set(node.outputs)


def test_output_of_several_is_an_error():
    f, t, _ = chain()
    assert t.node.output is t
    with pytest.raises(ValueError, match="unpack"):
        _ = f.add("rope_table", [None, None], outputs=2).output


def test_uses_say_who_reads_what_and_where():
    f, t, y = chain()
    f.add("add", [t, t], names=["z"])
    uses = f.uses()
    assert [(node.op, index) for node, index in uses[t]] == [("mul", 0), ("add", 0), ("add", 1)]
    assert uses[y] == [] and f.outside_values() == {y}


def test_replace_reaches_readers_results_and_caches():
    program = tiny_program(cache=True)
    block = program.functions["block"]
    (cache,) = block.caches
    attention = cache.present_k.node
    copied = [block.add("scale", [v], {"factor": 1.0}).output for v in attention.outputs]
    readers = [copy.node for copy in copied]
    for old, new in zip(attention.outputs, copied, strict=True):
        block.replace(old, new)
        new.node.inputs = [old]  # which replace changed as well
    assert [cache.present_k, cache.present_v] == copied[1:]
    uses = block.uses()
    for old, reader in zip(attention.outputs, readers, strict=True):
        assert [node for node, _ in uses[old]] == [reader]
    old_result = block.results[0]
    new_result = block.add("tanh", [block.params[0]]).output
    block.replace(old_result, new_result)
    assert block.results == [new_result]


def test_dead_nodes_and_slots_go():
    f, t, _ = chain()
    spare = f.weights.setdefault("spare", Value("spare"))
    waste = f.add("mul", [t, spare], names=["waste"]).output
    f.add("silu", [waste], names=["more"])
    assert remove_dead(f) == 2
    assert list(f.weights) == ["w"] and remove_dead(f) == 0
    assert text(f) == ["    y = tanh(x) * w", "    return y, y"]


def test_what_the_next_step_reads_is_alive():
    program = tiny_program(cache=True)
    block = program.functions["block"]
    block.results = [block.params[0]]  # nothing but the cache needs the layer now
    remove_dead(block)
    assert "attention" in [node.op for node in block.nodes]
    assert "mlp.up_proj.weight" not in block.weights


def test_a_clone_shares_nothing():
    program = tiny_program(window=3, cache=True)
    block = program.functions["block"]
    before = print_function(block)
    clone = block.clone("clone")
    assert clone.name == "clone" and block.name == "block"
    assert print_function(clone) == before.replace("def block", "def clone")
    assert not set(clone.values()) & set(block.values())
    for node in clone.nodes:
        assert all(value.node is node for value in node.outputs)
    assert all(value.node is None for value in [*clone.params, *clone.weights.values()])
    for node in clone.nodes:
        node.attrs["more"] = 1
        node.inputs.reverse()
    clone.replace(clone.params[0], clone.add("tanh", [clone.params[0]]).output)
    clone.nodes.clear()
    clone.caches[0].slot = "other"
    clone.results.clear()
    assert print_function(block) == before and block.caches[0].slot == "kv"


def test_a_clone_does_not_share_lists_in_attributes():
    f = Function("f", params=[Value("x")])
    f.results = [f.add("aten.view.default", [f.params[0]], {"args": [[1, 2]]}).output]
    f.clone().nodes[0].attrs["args"][0].append(3)
    assert f.nodes[0].attrs["args"] == [[1, 2]]


def test_a_copied_program_is_independent():
    program = tiny_program(window=3, cache=True)
    program.config = {"rope": {"theta": 1.0}}
    program.notes = [("here", "why")]
    before, calls = str(program), [repr(call.weights) for call in program.calls]
    clone = program.copy()
    assert str(clone) == before
    assert clone.weights["embed.weight"].producer is program.weights["embed.weight"].producer
    clone.functions["block"].nodes.pop()
    clone.functions["new"] = Function("new")
    for call in clone.calls:
        call.args.append("more")
        call.results.append("more")
        call.weights["more"] = "more"
        call.attrs["window"] = 9
        call.caches["more"] = "more"
    clone.calls.pop()
    clone.weights.remove("embed.weight")
    clone.weights.add(Weight("new", Array(torch.ones(1))))
    clone.weights.replace(Weight("norm.weight", Array(torch.ones(1))))
    clone.states["kv.0"].heads = 9
    clone.states.pop("kv.1")
    clone.inputs.pop("position_ids")
    clone.outputs.append("more")
    clone.config["rope"]["theta"] = 2.0
    clone.notes.append(("there", "why"))
    assert str(program) == before
    assert [repr(call.weights) for call in program.calls] == calls
    assert program.weights["norm.weight"].shape == (32,) and "new" not in program.weights
    assert program.states["kv.0"] == KVState("kv.0", 2, 8, 8) and "kv.1" in program.states
    assert program.config == {"rope": {"theta": 1.0}} and len(program.notes) == 1
    verify(program)


def test_prune_unused_drops_what_no_call_mentions():
    program = tiny_program(cache=True)
    program.functions["orphan"] = Function("orphan")
    program.weights.add(Weight("orphan", Array(torch.ones(3))))
    block = program.functions["block"]
    up = block.weights.pop("mlp.up_proj.weight")
    block.nodes = [node for node in block.nodes if up not in node.inputs]
    program.calls = [call for call in program.calls if call.path != "layers.1"]
    program.prune_unused()
    assert list(program.functions) == ["embed", "block", "head"]
    assert "mlp.up_proj.weight" not in program.calls[1].weights
    assert list(program.states) == ["kv.0"]
    names = {weight.name for weight in program.weights}
    assert names == {name for call in program.calls for name in call.weights.values()}
    assert "layers.0.mlp.up_proj.weight" not in names and "orphan" not in names


def test_parameters_count_once_and_constants_not_at_all():
    tied, untied = tiny_program(tied=True), tiny_program(tied=False)
    assert untied.parameter_count() - tied.parameter_count() == 97 * 32
    assert tied.weights["rope.inv_freq"].constant
    layers = tiny_program(layers=3).parameter_count() - tiny_program(layers=2).parameter_count()
    projections = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    assert layers == projections + 2 * 32
    tied.weights.add(Weight("unused", Array(torch.ones(10**4))))
    assert tied.parameter_count() == tiny_program().parameter_count()


def test_blocks_are_runs_of_one_function():
    program = tiny_program(layers=3)
    program.calls.insert(3, Call("head", ["x"], ["early"], dict(program.calls[-1].weights)))
    assert [(part, len(calls)) for part, calls in program.blocks()] == [
        ("embed", 1), ("block", 2), ("head", 1), ("block", 1), ("head", 1)
    ]  # fmt: skip


def test_attributes_of_a_call_take_the_place_of_params():
    t = chain()[1]
    t.node.attrs = {"window": Param("w"), "scale": 2.0}
    call = Call("f", ["x"], ["y"], attrs={"w": None, "other": 1})
    assert resolve_attrs(t.node, call) == {"window": None, "scale": 2.0}
    with pytest.raises(KeyError, match="w"):
        resolve_attrs(t.node, Call("f", ["x"], ["y"]))
