"""What lossy passes state of their results is checked, and what they do unsaid is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from planted import alone, change, layer_call, nodes, scaled, skip, swapped
from programs import tiny_program

from graphopt.ir import Array, Program
from graphopt.ir.blocks import find_blocks, remove_sub_blocks, sub_blocks
from graphopt.ir.feed_forward import Split, carve_call, feed_forwards, with_experts
from graphopt.pass_manager.statements import (
    ChangedBlocks,
    DividedNeurons,
    DividedPart,
    RemovedParts,
)


def four_layers(**options) -> Program:
    return tiny_program(layers=4, **options)


@pytest.mark.parametrize(
    "parts",
    [
        ((1, "block"),),
        ((3, "block"), (0, "block")),
        ((2, "attention"),),
        ((0, "ffn"), (2, "attention")),
        ((1, "attention"), (1, "ffn"), (2, "ffn")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"cache": True}])
def test_removed_parts_hold(parts, options):
    before = four_layers(**options)
    after = before.copy()
    remove_sub_blocks(after, parts)
    assert RemovedParts(parts).check(before, after) is None
    assert RemovedParts(((0, "block"),)).check(before, after) is not None


@pytest.mark.parametrize("parts", [((1, "ffn"),), ((1, "attention"), (2, "ffn"))])
def test_terms_that_are_added_to_each_other_first_are_gone_together(parts):
    """As of routed and shared experts, which are one sum beside the stream."""
    before = four_layers()
    function = before.functions["block"]
    last = function.nodes[-1]
    stream, down = last.inputs
    beside = function.add("silu", [nodes(before, "rms_norm", "block")[1].output], before=last)
    both = function.add("add", [down, beside.output], before=last)
    last.inputs = [stream, both.output]
    assert [part.kind for part in sub_blocks(function, 0)] == ["attention", "ffn", "ffn"]
    after = before.copy()
    remove_sub_blocks(after, parts)
    assert RemovedParts(parts).check(before, after) is None
    assert RemovedParts(((0, "ffn"),)).check(before, after) is not None


def _second_weights(program: Program) -> None:
    layer_call(program, 2).weights.update(layer_call(program, 3).weights)


def _swap_windows(program: Program) -> None:
    for layer in (2, 3):
        call = layer_call(program, layer)
        call.attrs["window"] = None if call.attrs["window"] else 3


def _eps(program: Program) -> None:
    nodes(program, "rms_norm", "head")[0].attrs["eps"] = 1e-4


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (
            lambda p: remove_sub_blocks(p, [(0, "block")]),
            "3 blocks are left, and the program has 2",
        ),
        (_second_weights, "layers.2 is not what is left of layers.2"),
        (lambda p: skip(p, "rms_norm", "h", 0), "layers.0 is not what is left of layers.0"),
        (_swap_windows, "layers.2 is not"),
        (lambda p: change(p, "layers.3.mlp.up_proj.weight", scaled(1.0001)), "layers.3 is not"),
        (_eps, "what is not in a block changed as well"),
        (lambda p: change(p, "norm.weight", scaled(1.01)), "what is not in a block changed"),
    ],
)
def test_removing_more_than_is_stated_is_found(act: Callable[[Program], object], found: str):
    before = four_layers(window=3)
    after = before.copy()
    remove_sub_blocks(after, [(1, "block")])
    act(after)
    assert (RemovedParts(((1, "block"),)).check(before, after) or "").startswith(found)


def test_changed_blocks_change_nothing_else():
    before = four_layers()
    after = before.copy()
    change(after, "layers.1.mlp.up_proj.weight", scaled(2.0))
    assert ChangedBlocks(frozenset({1})).check(before, after) is None
    assert ChangedBlocks().check(before, after) is None
    assert ChangedBlocks(frozenset({2})).check(before, after) == "layers.1 changed as well"
    change(after, "embed.weight", scaled(2.0))
    assert ChangedBlocks().check(before, after) == "embed changed as well"
    remove_sub_blocks(after, [(0, "block")])
    assert ChangedBlocks().check(before, after) == "there were 4 blocks, and there are 3"


def divided(program: Program, padded: int = 0, experts: int = 4) -> tuple[Program, DividedNeurons]:
    """Divide the parts of the second block at random, and say how."""
    after = program.copy()
    block = find_blocks(after)[1]
    call = after.calls[block.position]
    (part,) = feed_forwards(after.function_of(call), block.stream)
    split = Split(16, experts, 2 if experts else 0)
    order = torch.randperm(48 + padded, generator=torch.Generator().manual_seed(1))
    order = order if experts else order[:16]
    rewritten, made = with_experts(after.function_of(call), part, split, "block_experts")
    after.functions[rewritten.name] = rewritten
    router = {"router": torch.randn(4, 32), "router.bias": torch.randn(4)}
    carve_call(after, call, part, rewritten, made, order, 16, router)
    after.prune_unused()
    return after, DividedNeurons((DividedPart(1, tuple(order.tolist()), 16, reconstructed=False),))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("padded", "experts"), [(0, 4), (4, 4), (0, 0)])
def test_divided_neurons_hold(bias, padded, experts):
    before = tiny_program(bias=bias)
    after, statement = divided(before, padded, experts)
    assert statement.check(before, after) is None


def _name(program: Program, part: str) -> str:
    return next(name for name in layer_call(program, 1).weights.values() if part in name)


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (("up_proj.weight.experts", swapped(0, 1)), "the neurons of up are not"),
        (("gate_proj.weight.shared", scaled(1.001)), "the neurons of gate are not"),
        (("down_proj.weight.experts", scaled(0.5)), "the neurons of down are not"),
        (("q_proj", scaled(0.5)), "layers.1.self_attn.q_proj.weight is not read"),
    ],
)
def test_neurons_that_are_not_the_sources_are_found(act, found):
    before = tiny_program()
    after, statement = divided(before)
    name, change_value = act
    change(after, _name(after, name), change_value)
    assert found in (statement.check(before, after) or "")


def test_a_reconstructed_projection_may_differ_and_an_order_must_not_repeat():
    before = tiny_program()
    after, statement = divided(before)
    change(after, _name(after, "down_proj.weight.shared"), scaled(0.5))
    (part,) = statement.parts
    assert DividedNeurons((replace(part, reconstructed=True),)).check(before, after) is None
    twice = replace(part, order=(part.order[1], *part.order[1:]))
    assert "twice" in (DividedNeurons((twice,)).check(before, after) or "")
    change(after, "layers.0.mlp.up_proj.weight", scaled(0.5))
    assert statement.check(before, after) == "layers.0 changed as well"


def test_other_weights_may_differ_where_they_are_named():
    before = tiny_program()
    after, statement = divided(before)
    gain = "layers.1.post_attention_layernorm.weight"
    change(after, gain, scaled(0.5))
    assert f"{gain} is not read" in (statement.check(before, after) or "")
    (part,) = statement.parts
    solved = DividedNeurons((replace(part, solved=frozenset({gain})),))
    assert solved.check(before, after) is None


def test_a_block_of_its_own_function_is_the_same_block():
    before = four_layers()
    after = before.copy()
    alone(after, 2)
    weight = after.weights["layers.2.mlp.up_proj.weight"]
    after.weights.replace(weight.with_producer(Array(weight.load().clone())))
    assert ChangedBlocks(frozenset()).check(before, after) is None
