"""Mistakes planted behind quantize are found by what it states, each for what it is."""

from __future__ import annotations

import pytest
from programs import tiny_program
from tiny_models import byte_tokenizer
from trained import book

from graphopt.errors import VerifyError
from graphopt.ir import Array, Dequantised, Packed
from graphopt.ir.imprint import Imprint
from graphopt.pass_manager.claims import check_claims
from graphopt.pass_manager.contract import Context, make_pass


def planted(result, change):
    """Return a result whose program was changed behind the pass's back."""
    program = result.program.copy()
    change(program)
    result.program = program
    return result


def dequantised(program, name, **tensors):
    weight = program.weights[name]
    parts = {t.name.removeprefix(f"{name}."): t.producer for t in weight.tensors()}
    parts |= {suffix: Array(value) for suffix, value in tensors.items()}
    program.weights.replace(weight.with_producer(Dequantised(weight.encoding, **parts)))


UP = "layers.1.mlp.up_proj.weight"


def one_code(program):
    packed = program.weights[UP].producer.packed.load().clone()
    packed[0, 0, 0] ^= 0x70
    dequantised(program, UP, packed=packed)


def a_scale(program):
    scales = program.weights[UP].producer.scales.load().clone()
    scales[2] *= 1.5
    dequantised(program, UP, scales=scales)


def other_encoding(program):
    value = program.weights[UP].load()
    encoding = Packed(4, 16)
    tensors = {s: Array(t) for s, t in encoding.quantise(value).items()}
    weight = program.weights[UP]
    program.weights.replace(weight.with_producer(Dequantised(encoding, **tensors)))


def test_scales_that_do_not_cancel_are_found(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    program, context = tiny_program(vocab=512), Context(text=book(60))
    program.tokenizer = str(tmp_path)
    item = make_pass("quantize", {"method": "rtn", "scale": True, "windows": 2, "seqlen": 16})
    result = item.run(program, context)
    assert result.statement.check(program, result.program) is None
    for scaled in (result.statement.scaled, result.program):
        a_gain(scaled)
    assert "with features scaled, logits differ" in result.statement.check(program, result.program)


def a_gain(program):
    weight = program.weights["layers.0.input_layernorm.weight"]
    program.weights.replace(weight.with_producer(Array(weight.load() * 1.01)))


def swapped_weights(program):
    for call in program.calls:
        if call.path.endswith("0"):
            weights = call.weights
            gate, up = (next(s for s in weights if part in s) for part in ("gate", "up_"))
            weights[gate], weights[up] = weights[up], weights[gate]


def roundings(program):
    return [
        (function, node)
        for function in program.functions.values()
        for node in function.nodes
        if node.op == "quantise_dequantise"
    ]


def no_rounding(program):
    function, node = roundings(program)[0]
    for other in function.nodes:
        other.inputs = [node.inputs[0] if v is node.output else v for v in other.inputs]
    function.nodes.remove(node)


def other_bits(program):
    next(node for _, node in roundings(program) if node.attrs["symmetric"]).attrs["bits"] = 5


def rounded_twice(program):
    function, node = roundings(program)[0]
    again = function.add(
        node.op, [node.inputs[0]], {"bits": 3, "symmetric": True}, ["again"], before=node
    )
    node.inputs[0] = again.output


def values_for_keys(program):
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "attention" and node.inputs[1].node.op == "quantise_dequantise":
                node.inputs[1].node.attrs["symmetric"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_code, "its squared error is|nearest"),
        (a_scale, "its squared error is|nearest"),
        (other_encoding, "group=16.*not packed"),
        (a_gain, "something else than the weights and roundings stated"),
        (swapped_weights, "something else than the weights and roundings stated"),
        (no_rounding, "is not rounded to 4 bits"),
        (other_bits, "is not rounded to 4 bits"),
        (rounded_twice, "is rounded as well"),
        (values_for_keys, "operand 1 of attention is not rounded to 8 bits"),
    ],
)
def test_mistakes_are_found(change, message):
    program = tiny_program()
    item = make_pass("quantize", {"a": 4, "kv": 8, "method": "rtn", "clip": False})
    imprint = Imprint(program)
    result = planted(item.run(program, Context()), change)
    with pytest.raises(VerifyError, match=message):
        check_claims(item, result, imprint, program)
