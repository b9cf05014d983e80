"""quantize: what is rounded in every family, how well, what is stated, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import LISTED, captured, sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import mixture
from programs import tiny_program
from sampling import exhaustive_but
from tiny_models import byte_tokenizer
from trained import book, trained_program

import graphopt as go
from graphopt.calibration.text import calibration_windows, held_out_perplexity, pick
from graphopt.compiler import emit
from graphopt.errors import PassError, UsageError
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Dequantised, Packed, Program, Value, Weight
from graphopt.ir.blocks import find_blocks
from graphopt.ir.encoding import group_of
from graphopt.ir.imprint import Imprint
from graphopt.ir.verify import verify
from graphopt.pass_manager.claims import check_claims
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.passes.quantize.record import QuantizedModel
from graphopt.passes.quantize.tables import find_tables

WHOLE = 16
INPUTS = {"input_ids": torch.tensor([[5, 3, 9, 2, 11, 7], [1, 4, 7, 8, 4, 6]])}


def quantize(program: Program, context: Context | None = None, **options):
    """Run the pass on a program, and check what it states."""
    item = make_pass("quantize", options)
    item.check(program)
    imprint = Imprint(program)
    result = item.run(program, context or Context())
    verify(result.program)
    check_claims(item, result, imprint, program)
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a program with a tokenizer, and a context with a text for it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    program = tiny_program(vocab=512, hidden=32)
    program.tokenizer = str(folder)
    return program, Context(text=book(60))


# What is rounded -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", sampled(LISTED, ("llama", "gpt2", "gpt_neox")))
def test_every_family_is_rounded_and_computes_nearly_the_same(family):
    """Roundings by 1/127 of the range, some twenty in a row, move logits by a few hundredths."""
    _, program = captured(family)
    result = quantize(program, w=8, a=8, kv=8, group=32, method="rtn", head=8, embedding=8)
    made = result.program
    packed = {weight.name for weight in made.weights if weight.encoding is not None}
    left = [
        weight.name
        for weight in made.used_weights()
        if weight.name not in packed and len(weight.shape) > 1 and not weight.constant
    ]
    # Learned positions, and gains of a head's norm each, are no matrices of linears.
    assert all(any(p in name for p in ("position", "wpe", "norm")) for name in left), left
    assert not result.skipped
    blocks = [made.calls[block.position] for block in find_blocks(made)]
    for call in blocks:
        function = made.functions[call.function]
        for node in function.nodes:
            if node.op == "linear":
                assert node.inputs[0].node.op == "quantise_dequantise"
                assert node.inputs[0].node.attrs == {"bits": 8, "symmetric": True}
            if node.op == "attention":
                for value in node.inputs[1:3]:
                    assert value.node.attrs == {"bits": 8, "symmetric": False}
    before, after = (Runner(p, dtype=torch.float64).logits(INPUTS) for p in (program, made))
    moved = float((after - before).square().mean() / before.square().mean()) ** 0.5
    assert 0 < moved < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["mixtral", "gpt_oss"], "gpt_oss"))
def test_of_mixtures_attention_is_packed_and_experts_are_left_with_the_reason(family):
    _, program = mixture(family)
    result = quantize(program, method="rtn", w=4, a=8)
    packed = [w.name for w in result.program.weights if w.encoding is not None]
    assert packed and all("self_attn" in name for name in packed)
    reasons = {skip.where: skip.reason for skip in result.skipped}
    assert any("experts are chosen by it" in reason for reason in reasons.values())
    assert any("takes dense matrices alone" in reason for reason in reasons.values())


def test_linears_of_one_input_share_a_rounding():
    program = tiny_program(cache=True)
    result = quantize(program, w=4, a=4, kv=4, method="rtn")
    (function,) = [f for f in result.program.functions.values() if "attention" in str(f.nodes)]
    rounded = [n for n in function.nodes if n.op == "quantise_dequantise"]
    # Of queries, keys and values; of the output projection; of gate and up; of down; and k and v.
    assert [n.attrs["symmetric"] for n in rounded].count(True) == 4
    assert [n.attrs["symmetric"] for n in rounded].count(False) == 2
    record = result.record
    assert isinstance(record, QuantizedModel) and record.roundings == (8, 2)
    # A step with a cache sees what was rounded, as a whole text does.
    whole = Runner(result.program).logits(INPUTS)
    runner, cache = Runner(result.program), None
    parts = []
    for start, stop in ((0, 4), (4, 6)):
        step = {
            "input_ids": INPUTS["input_ids"][:, start:stop],
            "attention_mask": torch.ones(2, stop, dtype=torch.long),
        }
        (logits, *_), cache = runner.run(step, cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def packed_layer(program, layer):
    """Return the program with the matrices of a layer as codes of 8 bits already."""
    made = program.copy()
    for weight in list(made.weights):
        if weight.name.startswith(f"layers.{layer}.") and len(weight.shape) == 2:
            encoding = Packed(8, weight.shape[1])
            tensors = {s: Array(t) for s, t in encoding.quantise(weight.load()).items()}
            made.weights.replace(weight.with_producer(Dequantised(encoding, **tensors)))
    return made


def inputs_of_linears(program):
    """Return what produces the inputs of the blocks' linears."""
    names = {program.calls[block.position].function for block in find_blocks(program)}
    nodes = [node for name in names for node in program.functions[name].nodes]
    return [node.inputs[0].node for node in nodes if node.op == "linear"]


@pytest.mark.parametrize("packed", [(), (0,), (0, 1)], ids=str)
@pytest.mark.parametrize("options", [{"a": 8}, {"kv": 4}, {"a": 4, "kv": 8}], ids=str)
def test_activations_alone_are_rounded_however_weights_are_stored(packed, options):
    program = tiny_program()
    for layer in packed:
        program = packed_layer(program, layer)
    result = quantize(program, w=WHOLE, **options)
    rounded = [node is not None and node.op == "quantise_dequantise"
               for node in inputs_of_linears(result.program)]  # fmt: skip
    assert all(rounded) if "a" in options else not any(rounded)
    assert result.record.roundings == (8 * ("a" in options), 2 * ("kv" in options))
    assert not result.record.weights and not result.skipped


def test_inputs_that_are_rounded_already_are_not_rounded_again():
    program = quantize(tiny_program(), w=4, a=4, method="rtn").program
    result = quantize(program, w=WHOLE, a=8)
    assert result.record.roundings == (0, 0) and not result.changed
    assert {skip.reason for skip in result.skipped} == {"it is rounded to 4 bits already"}
    assert quantize(program, w=WHOLE, a=3).record.roundings == (8, 0)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_every_layer_is_packed_by_how_its_own_weights_are_stored(layer, scale, method, text):
    """Layers of one function: the one that is packed stays as it is, bit by bit."""
    whole, context = text
    program = packed_layer(whole, layer)
    result = quantize(
        program, context, w=4, a=8, method=method, scale=scale, windows=2, seqlen=16
    )  # fmt: skip
    names = {w.name for w in program.weights if "layers." in w.name and len(w.shape) == 2}
    kept = {name for name in names if f"layers.{layer}." in name}
    assert {weight.name for weight in result.record.weights} == names - kept
    for name in names:
        before, after = (p.weights[name] for p in (program, result.program))
        assert after.encoding.bits == (8 if name in kept else 4)
        if name in kept:
            for one, other in zip(before.tensors(), after.tensors(), strict=True):
                assert torch.equal(one.load(), other.load())
    said = {skip.where: skip.reason for skip in result.skipped}
    assert all(said[name].startswith("it is packed(bits=8") for name in kept)
    assert not any(name in said for name in names - kept)
    assert result.record.roundings == (8, 0)


@given(st.integers(0, 300), st.integers(1, 600))
def test_groups_divide_a_row(group, length):
    found = group_of(group, length)
    assert length % found == 0
    if group == 0 or found == length:
        assert group == 0 or length % group or group == length
    else:
        assert found >= 16 or found == group
        assert group % found == 0


def test_a_group_that_does_not_divide_is_halved_and_said():
    program = tiny_program(hidden=32, ffn=48)
    result = quantize(program, method="rtn", group=32)
    groups = {w.name: w.encoding.group for w in result.program.weights if w.encoding}
    assert {g for name, g in groups.items() if "down" in name} == {16}
    assert {g for name, g in groups.items() if "down" not in name} == {32}
    said = [skip for skip in result.skipped if "down_proj" in skip.where]
    assert said[0].reason == "its 48 features are no multiple of 32: a scale for groups of 16"


# How well --------------------------------------------------------------------------------------


def streams(result):
    return [block.stream for block in result.record.blocks]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"w": 3}, {"w": 4, "kv": 4}, {"w": 3, "group": 16, "symmetric": False},
     {"w": 3, "scale": True}],
    ids=str,
)  # fmt: skip
def test_by_text_a_trained_model_loses_less(options, tmp_path_factory):
    """Than with nearest codes: of what these lose, at most two thirds."""
    program = trained_program(tmp_path_factory, 3)
    context = Context(text=book())
    windows = calibration_windows(program, Context(text=book(1300)), 96)[-16:]
    fitted = quantize(program, context, **options, windows=32, seqlen=96)
    plain = quantize(program, context, **options | {"scale": False}, method="rtn")
    dense, *others = (
        math.log(held_out_perplexity(p, windows, torch.device("cpu"), torch.float32))
        for p in (program, fitted.program, plain.program)
    )
    assert others[0] - dense < 2 / 3 * (others[1] - dense)
    assert all(0 < error < 1 for error in streams(fitted))
    assert streams(plain) == [None] * 3


def test_the_error_of_the_stream_is_that_of_the_program(text):
    """What the record says of the last block, computed anew by the interpreter."""
    program, context = text
    result = quantize(program, context, w=3, windows=4, seqlen=24)
    hidden = []
    for model in (program, result.program):
        stream = HiddenStateStream(
            Runner(model), pick(calibration_windows(program, context, 24), 4, 0)
        )
        stream.run_to(len(stream.blocks))
        hidden.append(torch.cat(stream.hidden))
    dense, made = hidden
    error = (made - dense).square().sum(-1) / dense.square().sum(-1)
    assert streams(result)[-1] == pytest.approx(float(error.mean()), rel=1e-3)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from((2, 3, 4, 8)), st.sampled_from((0, 16)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_more_bits_are_never_worse(bits, group, symmetric, clip):
    program = tiny_program(layers=1)
    options = {"group": group, "symmetric": symmetric, "clip": clip, "method": "rtn"}
    errors = [
        sum(weight.error for weight in quantize(program, w=width, **options).record.weights)
        for width in (bits, 8)
    ]
    assert errors[1] <= errors[0]


def test_scaled_features_cost_less_where_a_few_are_large(text):
    """Outliers in what a norm gives, which its gain makes: their columns are rounded finely."""
    program, context = text
    program = program.copy()
    for layer in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = program.weights[f"layers.{layer}.{norm}.weight"]
            value = gain.load().clone()
            value[::8] *= 30
            program.weights.replace(gain.with_producer(Array(value)))
    options = {"w": 4, "method": "rtn", "windows": 8, "seqlen": 48}
    results = [quantize(program, context, **options, scale=scale) for scale in (False, True)]
    # What norms give, and what the down projection reads, of two layers.
    assert [r.record.scaled for r in results] == [0, 6]
    ids = {"input_ids": calibration_windows(program, context, 48)[:4]}
    dense, *others = (Runner(p).logits(ids) for p in (program, *(r.program for r in results)))
    plain, scaled = (float((logits - dense).square().mean()) for logits in others)
    assert scaled < 0.8 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_of_the_dtype_of_weights(dtype):
    """Codes are chosen for the scales as they are stored, of which the statement is made."""
    program = tiny_program()
    for weight in list(program.weights):
        if not weight.constant:
            program.weights.replace(weight.with_producer(Array(weight.load().to(dtype))))
    result = quantize(program, w=8, method="rtn", head=8, embedding=8)
    made = result.program.weights["layers.0.mlp.up_proj.weight"]
    assert made.dtype == dtype
    source = program.weights["layers.0.mlp.up_proj.weight"].load().double()
    step = made.producer.scales.load().double().abs()
    # Half a step, and a value's own rounding.
    off = (made.load().double() - source).abs() - torch.finfo(dtype).eps * source.abs()
    assert (off <= 0.5 * step * 1.001).all()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_features_leaves_every_weight_in_its_dtype(dtype, method, text):
    """It is folded in fp32, of which neither gains nor scales of codes keep anything."""
    program, context = text
    program = program.copy()
    for weight in list(program.weights):
        if not weight.constant:
            program.weights.replace(weight.with_producer(Array(weight.load().to(dtype))))
    before = {weight.name: weight.dtype for weight in program.weights}
    result = quantize(program, context, method=method, scale=True, windows=2, seqlen=16)
    assert result.record.scaled
    assert {weight.name: weight.dtype for weight in result.program.weights} == before
    assert result.statement.scaled.weights["layers.0.input_layernorm.weight"].dtype != dtype


def test_linears_of_one_input_may_be_of_unlike_dtypes(text):
    """As behind a pass that folded a scale into one of them: each has scales of its own dtype."""
    program, context = text
    program = program.copy()
    for weight in list(program.weights):
        if "gate_proj" in weight.name:
            program.weights.replace(weight.with_producer(Array(weight.load().half())))
    before = {weight.name: weight.dtype for weight in program.weights}
    result = quantize(program, context, windows=2, seqlen=16)
    assert {weight.name: weight.dtype for weight in result.program.weights} == before
    assert result.statement.check(program, result.program) is None


def test_it_is_the_same_every_time(text):
    program, context = text
    options = {"w": 4, "a": 8, "windows": 4, "seqlen": 32}
    made = [quantize(program, context, **options).program for _ in range(2)]
    for one, other in zip(*(p.weights.tensors() for p in made), strict=True):
        assert torch.equal(one.load(), other.load())


# What is told ----------------------------------------------------------------------------------


def test_the_record_adds_up():
    program = tiny_program()
    result = quantize(program, w=4, method="rtn", group=16, head=8, embedding=8)
    record = result.record
    assert record.bytes == tuple(
        sum(w.nbytes for w in p.used_weights()) for p in (program, result.program)
    )
    packed = [w for w in result.program.weights if w.encoding is not None]
    assert {w.name for w in packed} == {w.name for w in record.weights}
    bits = 8 * sum(w.nbytes for w in packed) / sum(w.numel for w in packed)
    assert record.bits_per_weight == pytest.approx(bits)
    assert "15 matrices at" in record.line() and "by rtn" in record.line()
    assert "bits a weight" in record.card()
    again = QuantizedModel.model_validate(json.loads(json.dumps(record.to_json())))
    assert again.line() == record.line()


@pytest.mark.slow
def test_a_pipeline_runs_and_emits_it(tmp_path, text):
    program, _ = text
    program = go.Pipeline.parse("insert-kv-cache").run(program.copy())[0]
    recipe = go.Pipeline.parse("quantize{w=4,a=8,kv=8,method=rtn,head=8,embedding=8}")
    made, report = recipe.run(program)
    (entry,) = report.passes
    assert entry.kl is not None and entry.kl > 0
    emit(made, tmp_path / "out", target="cpu", emit=("torch", "onnx"))
    expected = Runner(made).logits(INPUTS)
    from graphopt.backends.opening import open_language_model

    for backend in ("torch", "onnx"):
        model = open_language_model(str(tmp_path / "out"), backend)
        logits = model.logits(INPUTS["input_ids"], torch.ones(2, 6, dtype=torch.long))
        # A code on the edge may fall to either side, by a rounding in front of it.
        close = (logits - expected).abs() < 1e-4 * float(expected.abs().max())
        assert close.float().mean() > 0.9, backend


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w": 5}, "w=5, and codes of weights have 2, 3, 4 or 8 bits"),
        ({"w": 1}, "w=1 is below 2"),
        ({"w": 4, "head": 6}, "head=6, and codes of weights"),
        ({"a": 12}, "a=12, and activations are rounded to 2 to 8 bits"),
        ({"kv": 9}, "kv=9, and activations"),
        ({"w": WHOLE}, "rounds nothing"),
        ({"w": 16, "kv": 4, "scale": True}, "scale=true is for weights that are rounded"),
        ({"group": -1}, "group=-1 is below 0"),
        ({"method": "awg"}, "knows no method"),
    ],
)
def test_bits_that_there_are_not(options, message):
    with pytest.raises(UsageError, match=message):
        make_pass("quantize", options)


def _head_function(program):
    (call,) = [call for call in program.calls if program.outputs[0] in call.results]
    return call, program.functions[call.function]


def test_the_head_is_the_linear_that_gives_the_logits():
    """Not another one behind it, whose results nobody reads as logits."""
    program = tiny_program()
    call, function = _head_function(program)
    (linear,) = [node for node in function.nodes if node.op == "linear"]
    program.weights.add(Weight("probe.weight", Array(torch.ones(4, 32))))
    call.weights["probe"] = "probe.weight"
    function.weights["probe"] = Value("probe_w")
    probe = function.add("linear", [linear.inputs[0], function.weights["probe"]], {}, ["probe"])
    function.results.append(probe.output)
    call.results.append("probe")
    assert find_tables(program).head == call.weights[function.slots_by_value()[linear.inputs[1]]]


@pytest.mark.parametrize("option", ["head", "embedding"])
def test_a_table_that_cannot_be_rounded_as_asked_is_refused(option):
    program = quantize(tiny_program(tied=False), w=WHOLE, **{option: 8}, method="rtn").program
    with pytest.raises(PassError, match=r"weight is packed\(bits=8.* already"):
        quantize(program, w=WHOLE, **{option: 4}, method="rtn")
    program = tiny_program()
    _, function = _head_function(program)
    (linear,) = [node for node in function.nodes if node.op == "linear"]
    other = function.add("add", [linear.inputs[1], linear.inputs[1]], {}, ["twice"], before=linear)
    linear.inputs[1] = other.output
    with pytest.raises(PassError, match="logits are not the products of one stored matrix"):
        make_pass("quantize", {"head": 8, "method": "rtn"}).check(program)


def test_what_is_advised_is_about_what_was_rounded():
    assert make_pass("quantize", {"w": WHOLE, "a": 4, "kv": 8}).milder([]) == (
        "give activations more bits ({a=8}), or leave keys and values as before ({kv=16})"
    )
    weights = make_pass("quantize", {"w": 4, "group": 16}).milder([])
    assert weights == "give weights more bits (quantize{w=8}), or train the weights (tune-codes)"
    assert "group=32" in make_pass("quantize", {"w": 8}).milder([])
    for option, what in (("head", "output matrix"), ("embedding", "table of embeddings")):
        advice = make_pass("quantize", {"w": WHOLE, option: 4}).milder([])
        assert advice == f"give the {what} more bits ({{{option}=8}})"


def test_a_text_that_is_not_finite_where_no_fit_looks_is_refused(text, monkeypatch):
    """In the window alone on which fits are compared."""
    program, context = text
    broken = program.copy()
    (table,) = [weight for weight in broken.weights if "embed" in weight.name]
    value = table.load().clone()
    value[9] = torch.inf
    broken.weights.replace(table.with_producer(Array(value)))
    windows = torch.arange(10, 74).view(4, 16)
    windows[-1, 3] = 9
    monkeypatch.setattr("graphopt.passes.quantize.run.pick", lambda *_: windows)
    with pytest.raises(PassError, match="reads cannot be measured: the activations hold NaN"):
        quantize(broken, context, seqlen=16)


def test_moments_without_an_inverse_are_refused(text, monkeypatch):
    program, context = text
    monkeypatch.setattr(
        "graphopt.passes.quantize.run.damped", lambda gram: -torch.eye(len(gram)).double()
    )
    with pytest.raises(PassError, match=r"second moments of what .* reads have no inverse"):
        quantize(program, context, windows=2, seqlen=16)


def test_what_cannot_be_rounded_says_why(text):
    program = tiny_program(tied=True)
    with pytest.raises(PassError, match="one weight as its output matrix"):
        quantize(program, head=8, method="rtn")
    packed = quantize(program, method="rtn").program
    with pytest.raises(PassError, match=r"no linear whose weight can be packed: it is packed"):
        quantize(packed, method="rtn")
    broken = tiny_program()
    name = "layers.1.mlp.up_proj.weight"
    value = broken.weights[name].load().clone()
    value[3, 5] = torch.nan
    broken.weights.replace(Weight(name, Array(value)))
    with pytest.raises(PassError, match=rf"{name!r} holds NaN or infinity"):
        quantize(broken, method="rtn")
    program, context = text
    huge = program.copy()
    gain = huge.weights["layers.0.input_layernorm.weight"]
    huge.weights.replace(gain.with_producer(Array(gain.load() * torch.inf)))
    with pytest.raises(PassError, match="reads cannot be measured: the activations hold NaN"):
        quantize(huge, context, windows=2, seqlen=16)
