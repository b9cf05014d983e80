"""The ONNX form of whole programs and of every op, run by ONNX Runtime and read by others."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_models import emit, run, run_in_steps, session
from programs import IDS as IDS_TYPE
from programs import tiny_program
from tiny_models import byte_tokenizer

from graphopt.errors import LoweringError, SourceError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Array, B, Call, Function, Program, S, Type, Value, Weight
from graphopt.ir.ops import all_ops, get_op
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.lowering.onnx.external import DataFile
from graphopt.lowering.onnx.genai import why_not
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

VARIANTS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "interleaved": {"interleaved": True},
    "partly rotary": {"rotary_dim": 4},
    "untied": {"tied": False},
    "bias": {"bias": True},
    "layer norm": {"norm": "layer"},
    "one key head": {"kv_heads": 1},
    "no groups": {"kv_heads": 4},
    # GroupQueryAttention takes head sizes that are multiples of eight.
    "odd head size": {"head_dim": 6},
    "all": {"window": 4, "softcap": 2.0, "sinks": True, "bias": True, "rotary_dim": 4,
            "norm": "layer", "tied": False},
}  # fmt: skip
IDS = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [0] * 5 + [1] * 4])


def close(found, expected, mask):
    """fp32 against fp64 at real tokens.

    A few hundred roundings of 6e-8, one behind the other, and logits of order 1.
    """
    real = mask.bool()
    torch.testing.assert_close(found.double()[real], expected[real], rtol=0, atol=2e-5)


def reference(program, inputs):
    return Runner(program, dtype=torch.float64, mode="reference").logits(inputs)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_without_a_cache(options, tmp_path):
    program = tiny_program(**options)
    model = session(emit(program, tmp_path)[1])
    for ids, mask in ((IDS, MASK), (IDS[:1, :1], MASK[:1, :1])):
        inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
        logits, cache = run(model, inputs)
        close(logits, reference(program, inputs), mask)
        assert cache == {}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_steps_with_a_cache(options, tmp_path):
    """A first step, several rows going on by several tokens, and by one; then one row alone."""
    program = tiny_program(**options)
    model = session(emit(tiny_program(cache=True, **options), tmp_path)[1])
    for rows in (3, 1):
        ids, mask = IDS[:rows], MASK[:rows]
        inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
        close(run_in_steps(model, inputs, (4, 7, 8, 9)), reference(program, inputs), mask)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_graph_for_genai(options, tmp_path):
    """One row in steps of any length, several rows from nothing: the same as model.onnx.

    Exactly so at real tokens. No branch, so that a shared buffer can be extended in place.
    """
    program = tiny_program(cache=True, **options)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    program.tokenizer = str(tmp_path / "tokenizer")
    _, path = emit(program, tmp_path / "out")
    theirs = path.with_name("genai.onnx")
    assert not [node for node in onnx.load(theirs).graph.node if node.op_type == "If"]
    models = session(path), session(theirs)
    for ids, mask, stops in ((IDS[:1], MASK[:1], (4, 5, 9)), (IDS, MASK, (8, 9))):
        inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
        start, pasts = 0, (None, None)
        for stop in stops:
            step = {
                "input_ids": ids[:, start:stop],
                "attention_mask": mask[:, :stop],
                "position_ids": inputs["position_ids"][:, start:stop],
            }
            results = [run(model, step, past) for model, past in zip(models, pasts, strict=True)]
            (expected, cache), (found, other) = results
            seen, new = mask[:, :stop].bool(), mask[:, start:stop].bool()
            torch.testing.assert_close(found[new], expected[new], rtol=0, atol=0)
            for name, value in cache.items():
                rows = (
                    torch.from_numpy(held).transpose(1, 2)[seen] for held in (other[name], value)
                )
                torch.testing.assert_close(*rows, rtol=0, atol=0)
            start, pasts = stop, (cache, other)


# GroupQueryAttention takes multiples of eight; those of sixteen alone if it rotates.
HEAD_SIZES = (1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 30, 36, 40, 48, 50, 56, 64, 72)
LARGE_HEAD_SIZES = (80, 88, 96, 100, 104, 112, 120, 136, 152, 160, 192, 200, 248, 256, 264, 512)


@pytest.mark.parametrize("head_dim", HEAD_SIZES + LARGE_HEAD_SIZES)
def test_every_head_size(head_dim, tmp_path):
    """With as much of a head rotated as can be, and with half of that."""
    for part in {head_dim // 2 * 2, head_dim // 4 * 2}:
        options = {"rotary_dim": part} if part else {"alibi": True}
        program = tiny_program(head_dim=head_dim, layers=1, **options)
        program.config = {"max_position_embeddings": 64}
        cached = InsertKVCache().run(program, Context()).program
        model = session(emit(cached, tmp_path / str(part))[1])
        inputs = complete_inputs({"input_ids": IDS, "attention_mask": MASK})
        close(run_in_steps(model, inputs, (4, 7, 8, 9)), reference(program, inputs), MASK)


STOPS = st.lists(st.integers(1, 8), unique=True).map(lambda cuts: [*sorted(cuts), 9])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    program = tiny_program(**VARIANTS["all"])
    cached = tiny_program(cache=True, **VARIANTS["all"])
    return program, session(emit(cached, tmp_path_factory.mktemp("all"))[1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(STOPS, st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_any_split_and_padding(everything, stops, pads):
    program, model = everything
    ids, mask = IDS[: len(pads)], torch.ones(len(pads), 9, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
    close(run_in_steps(model, inputs, stops), reference(program, inputs), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_checkpoints_are_computed_in_fp32(dtype, tmp_path):
    program = tiny_program(cache=True, softcap=2.0)
    block = program.functions["block"]
    add = block.results[0].node
    scaled = block.add("scale", [add.inputs[1]], {"factor": 0.5}, before=add)
    add.inputs[1] = scaled.output
    for weight in list(program.weights):
        if not weight.constant:
            narrow = Array(weight.load().to(dtype))
            program.weights.replace(Weight(weight.name, narrow, weight.checkpoint))
    program.checkpoint_dtype = dtype
    model = session(emit(program, tmp_path)[1])
    assert {item.type for item in model.get_outputs()} == {"tensor(float)"}
    inputs = complete_inputs({"input_ids": IDS, "attention_mask": MASK})
    close(run(model, inputs)[0], reference(program, inputs), MASK)


# One op at a time ------------------------------------------------------------------------------

X, HEADS = Type((B, S, 8), torch.float32), Type((B, 4, S, 8), torch.float32)


def one_op(op, kinds, attrs=None, weights=(), outputs=1, pick=0):
    """A program of one node over inputs x0, x1, ..., and weights."""
    program = Program("one", inputs={"input_ids": IDS_TYPE}, outputs=["logits"])
    function = Function("node")
    program.functions["node"] = function
    operands, used = [], {}
    for index, kind in enumerate(kinds):
        if kind is None:
            operands.append(None)
        elif index in weights:
            slot = f"w{index}"
            function.weights[slot] = Value(slot)
            value = torch.randn(kind.shape, generator=torch.Generator().manual_seed(index))
            program.weights.add(Weight(slot, Array(value)))
            used[slot] = slot
            operands.append(function.weights[slot])
        else:
            name = f"x{index}"
            program.inputs[name] = kind
            function.params.append(Value(name))
            operands.append(function.params[-1])
    node = function.add(op, operands, attrs, ["y"] * outputs, outputs=outputs)
    function.results = [node.outputs[pick]]
    args = [param.name for param in function.params]
    program.calls.append(Call("node", args, ["logits"], used))
    return program


def compare(program, folder, atol=2e-6):
    model = session(emit(program, folder)[1])
    for seed, sizes in enumerate(({B: 3, S: 5}, {B: 1, S: 2})):
        generator = torch.Generator().manual_seed(seed)
        inputs = {}
        for name, kind in program.inputs.items():
            shape = kind.concrete(sizes)
            if kind.dtype.is_floating_point:
                inputs[name] = torch.randn(shape, generator=generator)
            else:
                inputs[name] = torch.randint(0, 2, shape, generator=generator)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        runner = Runner(program, dtype=torch.float64, mode="reference")
        (*_, (_, environments)) = runner.stream([wide])
        expected = environments[0]["logits"].double()
        names = {item.name for item in model.get_inputs()}
        feeds = {name: t.numpy() for name, t in inputs.items() if name in names}
        (found,) = model.run(["logits"], feeds)
        finite = expected.nan_to_num(neginf=0.0)
        allowed = atol * max(1.0, float(finite.abs().max()))
        torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=0, atol=allowed)


VECTOR, WIDE = Type((8,), torch.float32), Type((4, 1, 8), torch.float32)
TABLE = Type((B, S, 2), torch.float32)
PAIRS = Type((3,), torch.float32)
ROW = Type((B, S, 4, 8), torch.float32)
ATTENTION = {"scale": 0.4, "causal": True}
BIAS = Type((B, 1, S, S), torch.float32)


def _square(size):
    return Type((size, size), torch.float32)


OPS = {
    **{op: (op, [X]) for op in ("abs", "relu", "relu2", "silu", "sigmoid", "tanh", "gelu",
                                "gelu_tanh", "quick_gelu")},
    "softcap": ("softcap", [X], {"cap": 1e-3}),
    "scale": ("scale", [X], {"factor": -0.7}),
    "add": ("add", [X, VECTOR]),
    "mul": ("mul", [X, X]),
    "kronecker": ("kronecker", [X, _square(2), _square(4)], {}, (1, 2)),
    "kronecker, left": ("kronecker", [X, _square(4)], {}, (1,)),
    "kronecker, right": ("kronecker", [X, None, _square(2)], {}, (2,)),
    "kronecker, dense": ("kronecker", [X, None, _square(8)], {}, (2,)),
    "kronecker, heads": ("kronecker", [HEADS, None, _square(8)], {}, (2,)),
    "embedding": ("embedding", [IDS_TYPE, Type((2, 8), torch.float32)], {}, (1,)),
    "embedding, offset": ("embedding", [IDS_TYPE, Type((5, 8), torch.float32)], {"offset": 3},
                          (1,)),
    "top_k_gating": ("top_k_gating", [X], {"top_k": 3}),
    "top_k_gating, selection_bias": ("top_k_gating", [X, VECTOR], {"top_k": 3}, (1,)),
    "top_k_gating, gate_scale": ("top_k_gating", [X, VECTOR, VECTOR], {"top_k": 2}, (1, 2)),
    **{f"experts, {act}, {len(rest)} more": (
        "experts", [X, Type((B, S, 2), torch.float32), Type((6, 8), torch.float32),
                    Type((5, 6), torch.float32), *rest],
        {"act": act, "active": 1}, tuple(range(2, 4 + len(rest))),
    ) for act in ("silu", "relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "tanh")
       for rest in ([], [Type((6, 8), torch.float32)],
                    [Type((6, 8), torch.float32), *[Type((6,), torch.float32)] * 2])},
    "linear": ("linear", [X, Type((5, 8), torch.float32)], {}, (1,)),
    "linear, bias": ("linear", [X, Type((5, 8), torch.float32), Type((5,), torch.float32)], {},
                     (1, 2)),
    "linear, stored for another use": ("linear", [HEADS, Type((5, 8), torch.float32)]),
    "linear of rank two": ("linear", [Type((S, 8), torch.float32), Type((5, 8), torch.float32),
                                      Type((5,), torch.float32)]),
    "rms_norm": ("rms_norm", [X, VECTOR], {"eps": 0.01}, (1,)),
    "rms_norm, no gain": ("rms_norm", [X], {"eps": 0.01}),
    "rms_norm, no gain, offset": ("rms_norm", [X], {"eps": 0.01, "offset": 1.0}),
    "rms_norm, offset": ("rms_norm", [X, VECTOR], {"eps": 0.01, "offset": 1.0}, (1,)),
    "rms_norm, wide gain": ("rms_norm", [HEADS, WIDE], {"eps": 0.01, "offset": 1.0}, (1,)),
    "layer_norm": ("layer_norm", [X, VECTOR, VECTOR], {"eps": 0.01}, (1, 2)),
    "layer_norm, plain": ("layer_norm", [X], {"eps": 0.01}),
    "layer_norm, bias": ("layer_norm", [X, None, VECTOR], {"eps": 0.01}, (2,)),
    "layer_norm, wide": ("layer_norm", [HEADS, WIDE, WIDE], {"eps": 0.01}, (1, 2)),
    "layer_norm, wide bias": ("layer_norm", [HEADS, VECTOR, WIDE], {"eps": 0.01}, (1, 2)),
    "layer_norm, wide gain": ("layer_norm", [HEADS, WIDE], {"eps": 0.01}, (1,)),
    **{f"quantise_dequantise, {bits}, {symmetric}, {len(clips)}": (
        "quantise_dequantise", [x, *clips], {"bits": bits, "symmetric": symmetric},
        tuple(range(1, 1 + len(clips))),
    ) for symmetric in (True, False) for x, bits, clips in (
        (X, 4, []), (X, 8, []), (HEADS, 3, []), (HEADS, 4, [Type((1,), torch.float32)] * 2),
        (X, 4, [Type((1,), torch.float32)]), (X, 4, [None, Type((1,), torch.float32)]),
    )},
    "rope_table": ("rope_table", [IDS_TYPE, Type((3,), torch.float32)], {}, (1,), 2, 0),
    "rope_table, scaled": ("rope_table", [IDS_TYPE, Type((3,), torch.float32)], {"scale": 1.3},
                           (1,), 2, 1),
    **{f"axial_rope_table, {axes}": (
        "axial_rope_table", [Type((*axes, B, S), torch.int64), Type((4,), torch.float32)],
        {"time": 1, "height": 2, "width": 1, "scale": scale}, (1,), 2, pick,
    ) for axes, scale, pick in (((), 1.0, 0), ((3,), 1.3, 1))},
    **{f"picture_mask, {window}": (
        "picture_mask", [IDS_TYPE, IDS_TYPE], {"window": window}
    ) for window in (None, 2)},
    **{f"by_length, {length}": ("by_length", [IDS_TYPE, PAIRS, PAIRS], {"length": length}, (1, 2))
       for length in (1, 2)},
    **{f"ntk_frequencies, {length}": (
        "ntk_frequencies", [IDS_TYPE, PAIRS], {"base": 9.0, "factor": 3.0, "length": length}, (1,)
    ) for length in (1, 2)},
    **{f"rope {x}, {pairs}": ("rope", [x, TABLE, TABLE], {"interleaved": pairs,
                                                          "heads_first": x is HEADS})
       for x in (HEADS, ROW) for pairs in (False, True)},
    "rope of all features": ("rope", [HEADS, *[Type((B, S, 4), torch.float32)] * 2]),
    "split_heads": ("split_heads", [X], {"head_dim": 2}),
    "split_heads, in place": ("split_heads", [X], {"head_dim": 2, "swap": False}),
    "merge_heads": ("merge_heads", [HEADS]),
    "merge_heads, in place": ("merge_heads", [ROW], {"swap": False}),
    "transpose_heads": ("transpose_heads", [HEADS]),
    "attention": ("attention", [HEADS, HEADS, HEADS], ATTENTION),
    "attention, both ways": ("attention", [HEADS, HEADS, HEADS], ATTENTION | {"causal": False}),
    "attention, chunk": ("attention", [HEADS, HEADS, HEADS], ATTENTION | {"chunk": 2}),
    "attention, both ways in a window": (
        "attention", [HEADS, HEADS, HEADS], ATTENTION | {"causal": False, "window": 2}
    ),
    "attention, bias": ("attention", [HEADS, HEADS, HEADS, None, BIAS], ATTENTION),
    "attention, values of another width": (
        "attention",
        [HEADS, Type((B, 2, S, 8), torch.float32), Type((B, 2, S, 3), torch.float32)],
        ATTENTION | {"softcap": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", OPS)
def test_one_op(label, tmp_path):
    compare(one_op(*OPS[label]), tmp_path)


def test_every_op_has_a_form_that_is_tried():
    everywhere = {name for name, op in all_ops().items() if not op.fused}
    # tests/lowering/test_onnx_policy.py has programs with policies.
    tried = {op for op, *_ in OPS.values()}
    assert tried == everywhere - {"aten", "policy_attention"}, "a row in OPS: docs/add-an-op.md"


def test_minus_infinity_in_a_bias_blocks(tmp_path):
    """As models write masks of their own; two of them on one place stay finite."""
    program = one_op("attention", [HEADS, HEADS, HEADS, None, BIAS], ATTENTION)
    model = session(emit(program, tmp_path)[1])
    x = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 1:, 1] = bias[..., 2] = -torch.inf
    bias[..., 3, :2] = torch.finfo(torch.float32).min
    inputs = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "x4": bias}
    inputs |= {f"x{index}": x for index in range(3)}
    runner = Runner(program)
    (*_, (_, environments)) = runner.stream([inputs])
    names = {item.name for item in model.get_inputs()}
    feeds = {name: t.numpy() for name, t in inputs.items() if name in names}
    (found,) = model.run(["logits"], feeds)
    torch.testing.assert_close(torch.from_numpy(found), environments[0]["logits"])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clips", [False, True])
def test_rounded_activations_are_those_of_the_torch_form_bit_for_bit(
    bits, symmetric, clips, tmp_path
):
    """Division and rounding to even are the same operations; rows of zeros and NaN included."""
    kinds = [X, *([Type((1,), torch.float32)] * 2 if clips else [])]
    attrs = {"bits": bits, "symmetric": symmetric}
    program = one_op("quantise_dequantise", kinds, attrs, (1, 2))
    for slot, value in zip(("w1", "w2"), (0.875, 0.9375), strict=True):
        if clips:
            program.weights.replace(Weight(slot, Array(torch.tensor([value]))))
    model = session(emit(program, tmp_path)[1])
    x = torch.randn(4, 300, 8, generator=torch.Generator().manual_seed(bits))
    x[0] *= 10.0 ** torch.arange(-40, 20, 0.2)[:, None]
    x[1, :, 1:] = 0
    x[2, ::3] = 0
    x[2, 1::3] = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5])
    x[3, 0, 0], x[3, 1, 7], x[3, 2, 3] = torch.nan, torch.inf, -torch.inf
    names = {item.name for item in model.get_inputs()}
    feeds = {"input_ids": np.zeros((4, 300), np.int64), "x0": x.numpy()}
    (found,) = model.run(["logits"], {name: feeds[name] for name in names})
    values = [x, *(torch.tensor([value]) for value in (0.875, 0.9375) if clips)]
    (expected,) = get_op("quantise_dequantise").torch(values, attrs)
    assert expected[3, :3].isnan().all()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=0, equal_nan=True)


def chain(*steps):
    """embedding, then ops of one operand, then a linear map."""
    program = Program("chain", inputs={"input_ids": IDS_TYPE}, outputs=["logits"])
    f = Function("main", params=[Value("input_ids")])
    weights = {"table": torch.randn(11, 8), "head": torch.randn(5, 8)}
    for name, value in weights.items():
        program.weights.add(Weight(name, Array(value)))
        f.weights[name] = Value(name)
    x = f.add("embedding", [f.params[0], f.weights["table"]]).output
    for op, attrs in steps:
        x = f.add(op, [x], attrs).output
    f.results = [f.add("linear", [x, f.weights["head"]]).output]
    program.functions["main"] = f
    program.calls = [Call("main", ["input_ids"], ["logits"], {name: name for name in weights})]
    return program


STEPS_OF_FUNCTIONS = (
    ("softcap", {"cap": 1.5}),
    ("relu2", {}),
    ("softcap", {"cap": 0.25}),
    ("softcap", {"cap": 1.5}),
    ("relu2", {}),
)


def test_local_functions_have_a_body(tmp_path):
    program = chain(*STEPS_OF_FUNCTIONS)
    path = emit(program, tmp_path)[1]
    model = onnx.load(path)
    assert {f.name for f in model.functions} == {"Relu2", "Softcap_1_5", "Softcap_0_25"}
    assert all(f.domain == "graphopt" and len(f.node) for f in model.functions)
    onnx.checker.check_model(model, full_check=True)
    ids = IDS[:2] % 11
    expected = Runner(program, mode="reference").logits({"input_ids": ids})
    feeds = {"input_ids": ids.numpy()}
    (own,) = ReferenceEvaluator(model).run(["logits"], feeds)
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    flat = ort.InferenceSession(inlined.SerializeToString())
    for found in (own, flat.run(["logits"], feeds)[0], session(path).run(["logits"], feeds)[0]):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_soft_caps_whose_names_are_near_are_kept_apart(tmp_path):
    """Also where the names of their functions agree in the digits that are printed."""
    program = chain(("softcap", {"cap": 1.0000001}), ("softcap", {"cap": 2.0 / 3}),
                    ("softcap", {"cap": 0.66666674}))  # fmt: skip
    model = onnx.load(emit(program, tmp_path)[1])
    caps = [onnx.numpy_helper.to_array(f.node[0].attribute[0].t).item() for f in model.functions]
    written = [np.float32(cap).item() for cap in (1.0000001, 2.0 / 3, 0.66666674)]
    assert caps == written


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window": 3, "cache": True}])
def test_the_checker_has_nothing_to_say(options, tmp_path):
    """It knows the standard ops; those of com.microsoft it leaves alone."""
    emitted, path = emit(tiny_program(**options), tmp_path)
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] == 23
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata["graphopt.program"] == "tiny"
    assert emitted.files == [path, path.with_name("model.onnx.data")]


def test_the_cache_is_part_of_the_interface(tmp_path):
    model = onnx.load(emit(tiny_program(cache=True), tmp_path)[1], load_external_data=False)

    def shapes(values):
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    inputs, outputs = shapes(model.graph.input), shapes(model.graph.output)
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert outputs["logits"] == ["batch", "sequence", 97]
    for number in (0, 1):
        for part in ("key", "value"):
            assert inputs[f"past_key_values.{number}.{part}"] == ["batch", 2, "past", 8]
            assert outputs[f"present.{number}.{part}"] == ["batch", 2, "total", 8]


def test_weights_lie_aligned_in_the_data_file(tmp_path):
    program = tiny_program(layers=3)
    emitted, path = emit(program, tmp_path)
    model = onnx.load(path, load_external_data=False)
    stored = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            assert place["location"] == "model.onnx.data"
            stored[int(place["offset"])] = (int(place["length"]), list(tensor.dims))
    assert set(stored) == {place.offset for place in emitted.storage.values()}
    data = path.with_name("model.onnx.data").read_bytes()
    for name, place in emitted.storage.items():
        length, shape = stored[place.offset]
        assert place.file == "onnx/model.onnx.data" and list(place.shape) == shape
        raw = data[place.offset : place.offset + length]
        found = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(shape)
        found = found.t() if place.transposed else found
        rows = slice(None) if place.rows is None else slice(*place.rows)
        assert found[rows].equal(program.weights[name].load())
    end = 0
    for offset, (length, _) in sorted(stored.items()):
        assert offset % DataFile.alignment == 0 and offset >= end
        end = offset + length
    assert end <= len(data) < end + DataFile.alignment
    # What reads one input is one matrix.
    packed = [emitted.storage[f"layers.0.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert [place.rows for place in packed] == [(0, 32), (32, 48), (48, 64)]
    assert len({place.offset for place in packed}) == 1
    # Matrices that only products read lie as [in, out]; the tied embedding is also looked up.
    assert emitted.storage["layers.0.mlp.down_proj.weight"].transposed
    assert not emitted.storage["embed.weight"].transposed
    assert "norm.weight" not in emitted.storage  # small ones are in the model file


def test_a_tied_embedding_is_stored_once(tmp_path):
    sizes = {}
    for tied in (True, False):
        path = emit(tiny_program(tied=tied, vocab=4096), tmp_path / str(tied))[1]
        sizes[tied] = path.with_name("model.onnx.data").stat().st_size
    # Up to where the next tensor starts.
    assert 0 <= sizes[False] - sizes[True] - 4096 * 32 * 4 < DataFile.alignment


def test_genai_config_agrees_with_the_graph(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    program = tiny_program(layers=3, heads=8, kv_heads=2, cache=True)
    program.tokenizer = str(tmp_path / "tokenizer")
    program.config = {"vocab_size": 97, "hidden_size": 32, "max_position_embeddings": 64,
                      "eos_token_id": [5, 6], "bos_token_id": 4}  # fmt: skip
    emitted, path = emit(program, tmp_path / "out")
    config = json.loads(path.with_name("genai_config.json").read_text())
    assert path.with_name("genai_config.json") in emitted.files
    assert path.with_name("tokenizer.json") in emitted.files
    assert not [note for note in emitted.notes if "genai_config" in note[1]]
    model = config["model"]
    assert (model["vocab_size"], model["context_length"]) == (97, 64)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (4, [5, 6], 5)
    decoder = model["decoder"]
    layers = decoder["num_hidden_layers"]
    assert (layers, decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (3, 8, 2)
    assert (decoder["head_size"], decoder["hidden_size"]) == (8, 32)
    assert (path.parent / decoder["filename"]).is_file()
    graph = onnx.load(path, load_external_data=False).graph
    named = {"inputs": set(), "outputs": set()}
    for side in named:
        for name in decoder[side].values():
            named[side] |= {name % i for i in range(layers)} if "%d" in name else {name}
    assert named["inputs"] == {value.name for value in graph.input}
    assert named["outputs"] == {value.name for value in graph.output}


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "shared"), [(8, True), (24, True), (6, False), (20, False)])
def test_genai_shares_a_buffer_where_every_attention_can_write_into_it(head_dim, shared, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    program = tiny_program(cache=True, head_dim=head_dim)
    program.tokenizer = str(tmp_path / "tokenizer")
    _, path = emit(program, tmp_path / "out")
    config = json.loads(path.with_name("genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is shared


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "it has no KV cache"), ({"cache": True}, "it has no tokenizer")],
)
def test_without_genai_the_reason_is_said(options, message, tmp_path):
    emitted, path = emit(tiny_program(**options), tmp_path)
    ((where, reason),) = emitted.notes
    assert where == "onnx" and message in reason
    assert not path.with_name("genai_config.json").exists()


@pytest.mark.parametrize(
    ("layer", "width"), [("kv.0", "v_dim"), ("kv.1", "k_dim"), ("kv.1", "heads")]
)
def test_genai_takes_caches_of_one_shape(layer, width):
    program = tiny_program(cache=True)
    setattr(program.states[layer], width, 4)
    assert why_not(program) == "its layers' caches differ in heads or head size"


def test_an_op_without_a_form_is_refused_before_anything_is_read(tmp_path):
    program = chain(("tanh", {}))
    node = program.functions["main"].nodes[1]
    node.op = "aten.lgamma.default"
    message = (
        r"main: tanh = aten\.lgamma\.default: this ATen operator has no ONNX form.*--emit torch"
    )
    with pytest.raises(LoweringError, match=message):
        OnnxEmitter().check(program, "cpu")


@pytest.mark.parametrize("shape", [(97, 32), (32,)])
def test_a_weight_that_is_not_finite_is_refused(shape, tmp_path):
    """Whether it goes to the data file or into the model."""
    program = tiny_program()
    name = "embed.weight" if len(shape) == 2 else "norm.weight"
    value = torch.zeros(shape)
    value[3] = torch.nan
    program.weights.replace(Weight(name, Array(value)))
    with pytest.raises(SourceError, match=rf"'{name}' holds"):
        emit(program, tmp_path)


def test_the_model_can_be_read_back(tmp_path):
    path = emit(tiny_program(cache=True), tmp_path)[1]
    model = ir.load(path)
    assert model.graph.initializers["embed.weight"].const_value.numpy().shape == (97, 32)
