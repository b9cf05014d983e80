"""What the verifier finds in sharded programs: mistakes in placements, shapes and collectives."""

from __future__ import annotations

import re

import pytest
from carved import carved
from programs import tiny_program

from graphopt.errors import VerifyError
from graphopt.ir import Placement
from graphopt.ir.feed_forward import Split as Neurons
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context, make_pass


def sharded(program, tp=2):
    return make_pass("shard", {"tp": tp, "device": "cpu"}).run(program, Context()).program


TEXT = print_program(sharded(tiny_program(cache=True, vocab=96, tied=False, bias=True)))
BOTH = "placed(cpu:0, cpu:1"

MISTAKES = {
    "a partial sum in a sum": ("x + all_reduce(o, ranks=2)", "x + o",
                               r"layers\.0: x_1 = add: it reads o, a partial sum that no all_re"),
    "a partial sum in a norm": ("h_1 = rms_norm(x_1", "h_1 = rms_norm(o", "reads o, a partial sum"),
    "a partial sum returned": ("return x_2", "return o", "o, a partial sum, is a result"),
    "a product of partial sums": ("x + all_reduce(o, ranks=2)", "x + all_reduce(o * o, ranks=2)",
                                  "reads o, a partial sum"),
    "added up twice": ("all_reduce(o, ranks=2)", "all_reduce(all_reduce(o, ranks=2), ranks=2)",
                       "is the same on every rank, not a partial sum"),
    "what is whole added up": ("h = rms_norm(x,", "h = rms_norm(all_reduce(x, ranks=2),",
                               "x is the same on every rank, not a partial sum"),
    "parts added up": ("merge_heads(a)", "all_reduce(merge_heads(a), ranks=2)",
                       "a part along axis 2, not a partial sum"),
    "parts returned": ("return logits_whole", "return logits",
                       r"result 'logits' is never|f32\[B,S,48\]|output 'logits' is a part"),
    "another axis put together": ("all_gather(logits, axis=2", "all_gather(logits, axis=1",
                                  "logits is a part along axis 2, not a part along axis 1"),
    "another number of ranks": ("all_reduce(o, ranks=2)", "all_reduce(o, ranks=4)",
                                "ranks=4, and the program has 2"),
    "a bias on every rank": (f"o_proj.bias: f32[32] {BOTH}, summed)",
                             f"o_proj.bias: f32[32] {BOTH})",
                             "o = linear: it does not work on parts like these"),
    "a bias of parts on one rank": (f"gate_proj.bias: f32[48] {BOTH}, axis=0)",
                                    f"gate_proj.bias: f32[48] {BOTH}, summed)", "gate = linear"),
    "columns where there are rows": (f"q_proj.weight: f32[32,32] {BOTH}, axis=0)",
                                     f"q_proj.weight: f32[32,32] {BOTH}, axis=1)", "q = linear"),
    "all rows of a matrix": (f"o_proj.weight: f32[32,32] {BOTH}, axis=1)",
                             f"o_proj.weight: f32[32,32] {BOTH})", "o = linear"),
    "a state of all heads": (f"v_dim=8 contiguous {BOTH}, axis=1)", f"v_dim=8 contiguous {BOTH})",
                             "a, present_k|attention of"),
    "a state split by tokens": (f"v_dim=8 contiguous {BOTH}, axis=1)",
                                f"v_dim=8 contiguous {BOTH}, axis=2)", "by their heads"),
    "all first rows": (f"first_rows: i64[2] constant {BOTH}, axis=0)",
                       f"first_rows: i64[2] constant {BOTH})", "x = vocab_parallel_embedding"),
    "other devices": (f"norm.weight: f32[32] {BOTH})", "norm.weight: f32[32] placed(cpu:0, cpu:2)",
                      r"placed\(cpu:0, cpu:2\), and others are on cpu:0, cpu:1"),
}  # fmt: skip


def test_a_sharded_program_is_sound():
    verify(parse_program(TEXT))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name):
    right, wrong, message = MISTAKES[name]
    assert right in TEXT
    with pytest.raises(VerifyError, match=message):
        verify(parse_program(TEXT.replace(right, wrong)))


def test_parts_of_other_sections_do_not_meet():
    """Shapes do not tell them apart: a rank has other neurons of the gate than of the up matrix."""
    neurons = Neurons(shared=16, experts=4, active=2)
    text = print_program(sharded(carved(tiny_program(cache=True), neurons)))
    verify(parse_program(text))
    wrong = re.sub(r"(gate_proj\.weight\.experts: .*), sections=4\)", r"\1)", text)
    assert wrong != text
    with pytest.raises(VerifyError, match="experts: it does not work on parts like these"):
        verify(parse_program(wrong))


def test_key_heads_of_other_ranks_do_not_meet():
    """Four ranks over two key heads: those of a rank are what its query heads read."""
    program = sharded(tiny_program(cache=True, heads=8, kv_heads=4, vocab=96), 4)
    for state in program.states.values():
        state.heads, state.placement = 2, Placement(state.placement.devices, 1, copies=2)
    with pytest.raises(VerifyError, match="attention: it does not work on parts like these"):
        verify(program)


def test_one_device_exchanges_nothing():
    text = """
program small
def block(x):
    y = all_reduce(linear(x, w), ranks=2)
    return y
run(x: f32[B,S,8]):
    y = block(x)
    return y
weights:
    w: f32[8,8]
"""
    verify(parse_program(text))  # a rank's own program has no placements
    with pytest.raises(VerifyError, match="y = all_reduce: the program is on one device"):
        verify(parse_program(text.replace("[8,8]", "[8,8] placed(cpu)")))
