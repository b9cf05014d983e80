"""Mistakes planted behind quantize are found by what it states, each for what it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import tiny_program
from sampling import slow_but
from tiny_models import byte_tokenizer
from trained import book

from graphopt.errors import VerifyError
from graphopt.ir import Array, Dequantised, Packed, Value, Weight
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


def a_clip(program):
    function, node = roundings(program)[0]
    for call in program.calls:
        if call.function == function.name:
            call.weights["clip"] = "clip"
    program.weights.add(Weight("clip", Array(torch.tensor([0.1]))))
    function.weights["clip"] = Value("clip")
    node.inputs = [node.inputs[0], function.weights["clip"], function.weights["clip"]]


def with_a_gradient(program):
    roundings(program)[0][1].attrs["straight_through"] = True


def other_dtype(program):
    weight = program.weights[UP]
    dequantised(program, UP, scales=weight.producer.scales.load().bfloat16())


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
        (a_clip, "is not rounded to 4 bits"),
        (with_a_gradient, "is not rounded to 4 bits"),
        (other_dtype, "it is of torch.bfloat16, not torch.float32"),
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


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a program with a tokenizer, and a context with a text for it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    program = tiny_program(vocab=512)
    program.tokenizer = str(folder)
    return program, Context(text=book(60))


def zeros(encoding, value):
    """Return what every element of is 0, as codes of scales of which it is the nearest."""
    tensors = encoding.quantise(value)
    tensors["scales"] = torch.full_like(tensors["scales"], 1e4)
    return tensors | {"packed": encoding.quantise(torch.zeros_like(value))["packed"]}


def coarse(encoding, value):
    """Return nearest codes of scales that are three times as large as the full range's."""
    tensors = encoding.quantise(value)
    scales = tensors["scales"] * 3
    codes = (value.unflatten(-1, (-1, encoding.group)) / scales[..., None]).round()
    return encoding.pack((codes + 2 ** (encoding.bits - 1)).flatten(-2), scales)


def negated(encoding, value):
    tensors = encoding.quantise(value)
    return tensors | {"scales": -tensors["scales"]}


@pytest.mark.parametrize(("length", "accepted"), [(1.9, True), (3.0, False)])
def test_codes_for_rounded_inputs_may_be_far_from_their_matrix(length, accepted, text):
    """Errors of inputs that are made up for may be larger than the matrix itself."""
    program, context = text
    result = make_pass("quantize", {"w": 4, "windows": 2, "seqlen": 16}).run(program, context)
    source, encoding = program.weights[UP].load(), result.program.weights[UP].encoding
    # Of a length, and at right angles to the matrix but for a little.
    apart = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    apart -= source * (apart * source).sum() / source.square().sum()
    apart = 0.2 * source + apart * (source.norm() / apart.norm() * length)
    dequantised(result.program, UP, **encoding.quantise(apart))
    value = result.program.weights[UP].load()
    error = float((value - source).double().square().sum() / source.double().square().sum())
    stated = tuple(
        dataclasses.replace(w, error=error) if w.name == UP else w for w in result.statement.weights
    )
    checked = dataclasses.replace(result.statement, weights=stated).check(program, result.program)
    assert (checked is None or "at most for such codes" not in checked) is accepted


@pytest.mark.parametrize("bits", slow_but([2, 4], 4))
@pytest.mark.parametrize(
    ("method", "scale", "codes"),
    [
        ("rtn", False, zeros), ("rtn", False, coarse), ("rtn", True, coarse),
        ("gptq", False, zeros), ("gptq", False, negated), ("gptq", True, zeros),
    ],
)  # fmt: skip
def test_an_error_that_is_stated_as_it_is_has_a_bound_all_the_same(
    method, scale, codes, bits, text
):
    program, context = text
    options = {"w": bits, "method": method, "scale": scale, "windows": 2, "seqlen": 16}
    item = make_pass("quantize", options)
    result = item.run(program, context)
    assert result.statement.check(program, result.program) is None
    source = (result.statement.scaled or program).weights[UP].load()
    encoding = result.program.weights[UP].encoding
    dequantised(result.program, UP, **codes(encoding, source.float()))
    value = result.program.weights[UP].load()
    error = float((value - source).double().square().sum() / source.double().square().sum())
    stated = tuple(
        dataclasses.replace(w, error=error) if w.name == UP else w for w in result.statement.weights
    )
    statement = dataclasses.replace(result.statement, weights=stated)
    assert "at most for such codes" in statement.check(program, result.program)
