"""Mistakes planted behind flatquant are found by what it states, each for what it is."""

from __future__ import annotations

import pytest
from programs import tiny_program
from tiny_models import byte_tokenizer
from trained import book

from graphopt.errors import VerifyError
from graphopt.ir import Array, Dequantised, Packed
from graphopt.ir.imprint import Imprint
from graphopt.pass_manager.claims import check_claims
from graphopt.pass_manager.contract import Context
from graphopt.passes.flatquant.flatquant import FlatQuant

UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture
def program(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    program = tiny_program(vocab=512)
    program.tokenizer = str(tmp_path)
    return program


def roundings(program):
    function = program.functions["block"]
    return function, [node for node in function.nodes if node.op == "quantise_dequantise"]


def without(symmetric):
    def change(program):
        function, nodes = roundings(program)
        node = next(node for node in nodes if node.attrs["symmetric"] is symmetric)
        function.replace(node.output, node.inputs[0])

    return change


def other_bits(program):
    roundings(program)[1][0].attrs["bits"] = 7


def rounded_twice(program):
    function, nodes = roundings(program)
    again = function.add(
        nodes[0].op, [nodes[0].inputs[0]], {"bits": 3, "symmetric": True}, ["x"], before=nodes[0]
    )
    nodes[0].inputs[0] = again.output


def dense(program):
    weight = program.weights[UP]
    program.weights.replace(weight.with_producer(Array(weight.load())))


def other_encoding(program):
    weight, encoding = program.weights[UP], Packed(4, 8)
    tensors = {name: Array(t) for name, t in encoding.quantise(weight.load()).items()}
    program.weights.replace(weight.with_producer(Dequantised(encoding, **tensors)))


def zeroed(program):
    weight = program.weights[UP]
    parts = {t.name.removeprefix(f"{UP}."): t.producer for t in weight.tensors()}
    parts["packed"] = Array(parts["packed"].load() * 0 + 0x88)
    program.weights.replace(weight.with_producer(Dequantised(weight.encoding, **parts)))


def a_gain_outside(program):
    weight = program.weights["norm.weight"]
    program.weights.replace(weight.with_producer(Array(weight.load() * 1.01)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: None, None),
        (without(True), "operand 0 of linear is not rounded to 4 bits"),
        (without(False), "of attention is not rounded to 4 bits"),
        (other_bits, "operand 0 of linear is not rounded to 4 bits"),
        (rounded_twice, "is rounded as well"),
        (dense, f"{UP} is dense, not packed"),
        (other_encoding, f"{UP} is packed.*group=8.*, not packed"),
        (zeroed, f"{UP}: its squared error"),
        (a_gain_outside, "changed as well"),
    ],
)
def test_mistakes_are_found(program, change, message):
    item = FlatQuant(kind="none", clip=False, steps=0, seqlen=16, windows=2)
    imprint = Imprint(program)
    result = item.run(program.copy(), Context(text=book(60), dense=program))
    change(result.program)
    if message is None:
        check_claims(item, result, imprint, program)
        return
    with pytest.raises(VerifyError, match=message):
        check_claims(item, result, imprint, program)
