"""Rounded activations times packed weights in ONNX: integers, with nothing rounded on the way."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_models import emit, session

from graphopt.ir import (
    Array,
    B,
    Call,
    Dequantised,
    Function,
    Packed,
    Program,
    S,
    Type,
    Value,
    Weight,
)
from graphopt.ir.functional import dequantise, quantise_dequantise, unpack

WIDTH = 48


def program(weight_bits, bits, *, rows=24, width=WIDTH, clip=None, group=None, bias=True):
    """Return x -> linear(quantise_dequantise(x)), and the packed weight's tensors."""
    ids, x = Type((B, S), torch.int64), Type((B, S, width), torch.float32)
    made = Program("one", inputs={"input_ids": ids, "x": x}, outputs=["logits"])
    function = Function("main", params=[Value("x")])
    generator = torch.Generator().manual_seed(weight_bits * bits)
    encoding = Packed(weight_bits, group or width)
    tensors = encoding.quantise(torch.randn(rows, width, generator=generator))
    made.weights.add(
        Weight("w", Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()}))
    )
    held = {"b": torch.randn(rows, generator=generator)} if bias else {}
    held |= {} if clip is None else {"clip": torch.tensor([clip])}
    for name, value in held.items():
        made.weights.add(Weight(name, Array(value)))
    for name in ("w", *held):
        function.weights[name] = Value(name)
    clips = [] if clip is None else [function.weights["clip"]] * 2
    rounded = function.add(
        "quantise_dequantise", [function.params[0], *clips], {"bits": bits, "symmetric": True}
    )
    operands = [rounded.output, function.weights["w"]]
    operands += [function.weights["b"]] if bias else []
    function.results = [function.add("linear", operands).output]
    made.functions["main"] = function
    used = {name: name for name in function.weights}
    made.calls = [Call("main", ["x"], ["logits"], used)]
    return made, tensors, held


def activations(width=WIDTH):
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    x[1, 2, 7] = 300.0
    return x


def feeds_of(x):
    return {"x": x.numpy(), "input_ids": np.zeros(x.shape[:2], np.int64)}


@pytest.mark.parametrize(("weight_bits", "bits"), [(4, 4), (4, 8), (8, 8), (8, 4), (4, 3)])
@pytest.mark.parametrize("clip", [None, 0.75])
@pytest.mark.parametrize("width", [48, 33])
def test_integers_are_exact_and_scales_come_behind(weight_bits, bits, clip, width, tmp_path):
    made, tensors, held = program(weight_bits, bits, clip=clip, width=width)
    path = emit(made, tmp_path)[1]
    model = onnx.load(path)
    assert [n.op_type for n in model.graph.node].count("MatMulInteger") == 1
    # The sums themselves, as one more output.
    (product,) = [n for n in model.graph.node if n.op_type == "MatMulInteger"]
    sums = onnx.helper.make_tensor_value_info(product.output[0], onnx.TensorProto.INT32, None)
    model.graph.output.append(sums)
    onnx.save(model, tmp_path / "sums.onnx")
    x = activations(width)
    feeds = feeds_of(x)
    found, integers = session(tmp_path / "sums.onnx").run(None, feeds)

    clips = [] if clip is None else [held["clip"]] * 2
    rounded = quantise_dequantise(x, *clips, bits=bits, symmetric=True).double()
    last = 2 ** (bits - 1) - 1
    reach = x.abs().amax(-1, keepdim=True) * (1 if clip is None else clip)
    scale = torch.where(reach == 0, 1, reach / last)
    codes = (rounded / scale.double()).round().long()
    middle = 2 ** (weight_bits - 1)
    weight_codes = unpack(tensors["packed"], weight_bits)[:, 0, :width].long() - middle
    assert np.array_equal(integers, (codes @ weight_codes.T).numpy())

    matrix = dequantise(tensors["packed"], tensors["scales"], bits=weight_bits, group=width)
    expected = rounded @ matrix.double().T + held["b"].double()
    # Three products and a sum are rounded to fp32, of terms as large as the largest.
    torch.testing.assert_close(
        torch.from_numpy(found).double(), expected, rtol=0,
        atol=float(expected.abs().max()) * 4 * 2**-24,
    )  # fmt: skip


def test_groups_multiply_what_was_rounded_without_rounding_it_again(tmp_path):
    """Also where a graph is asked for products of integers elsewhere."""
    from graphopt.lowering.onnx import OnnxEmitter
    from graphopt.support.progress import silent

    made, tensors, held = program(4, 4, group=16)
    OnnxEmitter(accuracy_level=4).emit(made, tmp_path, "cpu", silent)
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    (node,) = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    levels = {a.name: a.i for a in node.attribute}
    assert levels["accuracy_level"] == 1
    x = activations()
    (found,) = session(tmp_path / "onnx" / "model.onnx").run(None, feeds_of(x))
    rounded = quantise_dequantise(x, bits=4, symmetric=True).double()
    matrix = dequantise(tensors["packed"], tensors["scales"], bits=4, group=16)
    expected = rounded @ matrix.double().T + held["b"].double()
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=0, atol=2e-4)


def test_the_level_of_products_is_an_option_of_emission(tmp_path):
    import graphopt as go
    from graphopt.errors import UsageError

    made, _, _ = program(8, 8, group=16, bias=False)
    (node,) = [n for n in made.functions["main"].nodes if n.op == "linear"]
    rounding = node.inputs[0].node
    node.inputs[0] = rounding.inputs[0]
    made.functions["main"].nodes.remove(rounding)
    for level in (1, 4):
        go.emit(made, tmp_path / str(level), emit=("onnx",), onnx_accuracy=level)
        model = onnx.load(tmp_path / str(level) / "onnx" / "model.onnx")
        (node,) = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
        assert {a.name: a.i for a in node.attribute}["accuracy_level"] == level
    with pytest.raises(UsageError, match="--onnx-accuracy 2 is none"):
        go.emit(made, tmp_path / "no", emit=("onnx",), onnx_accuracy=2)
    with pytest.raises(UsageError, match="is for the ONNX form, and what is emitted is torch"):
        go.emit(made, tmp_path / "no", emit=("torch",), onnx_accuracy=4)


def plain_form(encoding, tensors, rows):
    """The same product as DequantizeLinear and MatMul, which ONNX Runtime fuses."""
    middle = 2 ** (encoding.bits - 1)
    codes = unpack(tensors["packed"], 4)[..., : encoding.group].flatten(1) - middle
    signed = codes.to(torch.int8).T.contiguous().numpy()
    packed = onnx.helper.make_tensor(
        "codes", onnx.TensorProto.INT4, signed.shape, signed.flatten().tolist()
    )
    scales = onnx.numpy_helper.from_array(tensors["scales"].T.contiguous().numpy(), "scales")
    nodes = [
        onnx.helper.make_node(
            "DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=encoding.group
        ),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "plain", [onnx.helper.make_tensor_value_info("x", kind, [None, WIDTH])],
        [onnx.helper.make_tensor_value_info("y", kind, [None, rows])], [packed, scales],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 23)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=11)


def test_what_a_plain_form_would_become(tmp_path):
    """DequantizeLinear and MatMul, which are exact, become products that round activations.

    So our graphs name MatMulNBits themselves, with its level, and sessions are told one too.
    """
    encoding = Packed(4, 16)
    matrix = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))
    tensors = encoding.quantise(matrix)
    model = plain_form(encoding, tensors, 32).SerializeToString()
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)) * 10
    expected = x.double() @ encoding.dequantise(tensors).double().T
    errors = {}
    for level in (None, "1"):
        options = ort.SessionOptions()
        if level is not None:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        run = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (found,) = run.run(None, {"x": x.numpy()})
        errors[level] = float((torch.from_numpy(found) - expected).abs().max() / expected.std())
    assert errors["1"] < 1e-5
    if errors[None] < 1e-5:
        pytest.skip("this ONNX Runtime, on this machine, does not fuse them")
    assert errors[None] > 1e-3
