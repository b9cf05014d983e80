"""Packed weights: what their tensors mean, and that every consumer reads them alike."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_programs import packed_weight, projections, with_packed
from programs import tiny_program
from sampling import slow_but

from graphopt.backends.opening import open_language_model
from graphopt.compiler import emit
from graphopt.errors import LoweringError, SourceError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Dequantised, Packed, Program, Type, Weight
from graphopt.ir.compare import first_difference
from graphopt.ir.cost import total_cost
from graphopt.ir.encoding import BITS, pack
from graphopt.ir.functional import unpack
from graphopt.ir.imprint import Imprint
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.verify import verify
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.lowering.onnx.quantised import reads_two_bits
from graphopt.storage.artifact import load_program, save_program
from graphopt.storage.snapshot import Snapshots
from graphopt.support.progress import silent

FOUR = Packed(4, 16)


def dense(program: Program) -> Program:
    """Return the program with the values of its packed weights as dense ones."""
    result = program.copy()
    for weight in program.weights:
        if weight.encoding is not None:
            result.weights.replace(Weight(weight.name, Array(weight.load()), weight.checkpoint))
    return result


INPUTS = {
    "input_ids": torch.tensor([[5, 3, 9, 2, 11], [1, 0, 7, 8, 4]]),
    "attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]]),
}

ENCODINGS = st.builds(
    Packed,
    bits=st.sampled_from((2, 3, 4, 8)),
    group=st.sampled_from((1, 3, 4, 8, 12, 24)),
    axis=st.sampled_from((0, 1)),
    symmetric=st.booleans(),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ENCODINGS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_codes_mean_what_the_layout_says(encoding, groups, rows, seed):
    """Element by element, by the formula of the module's first lines, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    length = groups * encoding.group
    shape = (rows, length) if encoding.axis == 1 else (length, rows)
    kinds = encoding.stored(shape, torch.float64)
    tensors = {
        suffix: torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        if dtype == torch.uint8
        else torch.rand(size, generator=generator, dtype=dtype)
        for suffix, (size, dtype) in kinds.items()
    }
    weight = Weight("w", Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()}))
    value = weight.load()
    assert value.shape == weight.shape == shape and value.dtype == weight.dtype

    def code(data: torch.Tensor, index: int) -> int:
        """Return code `index` of bytes, read bit by bit from a whole number."""
        number = int.from_bytes(bytes(data.flatten().tolist()), "little")
        return (number >> (index * encoding.bits)) % 2**encoding.bits

    for row in range(rows):
        for place in range(length):
            group = place // encoding.group
            zero = 2 ** (encoding.bits - 1)
            if not encoding.symmetric:
                zero = code(tensors["zeros"][row], group)
            # A group begins with a byte.
            mine = tensors["packed"][row, group]
            scale = float(tensors["scales"][row, group])
            wanted = (code(mine, place % encoding.group) - zero) * scale
            found = value[row, place] if encoding.axis == 1 else value[place, row]
            assert float(found) == wanted
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert weight.producer.load_rows(0, 1).equal(value[:1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ENCODINGS, st.integers(0, 99))
def test_rounding_is_to_the_nearest_code(encoding, seed):
    """No element is off by more than half a step."""
    matrix = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)).double()
    tensors = encoding.quantise(matrix)
    error = (encoding.dequantise(tensors) - matrix).abs().movedim(encoding.axis, -1)
    step = tensors["scales"][..., None]
    assert bool((error.unflatten(-1, (-1, encoding.group)) <= 0.5 * step * (1 + 1e-12)).all())


@given(st.lists(st.integers(0, 255), min_size=1, max_size=19))
def test_packing_is_undone_by_unpacking(codes):
    for bits in BITS:
        row = torch.tensor([codes], dtype=torch.uint8) & (2**bits - 1)
        data = pack(row, bits)
        assert data.shape[-1] == -(-len(codes) * bits // 8)
        assert unpack(data, bits)[:, : len(codes)].equal(row)
        # What is left over is 0.
        assert not unpack(data, bits)[:, len(codes) :].any()


def test_a_group_of_zeros_stays_zero():
    for symmetric in (True, False):
        encoding = Packed(4, 4, symmetric=symmetric)
        assert not encoding.dequantise(encoding.quantise(torch.zeros(2, 8))).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 8), "codes of 5 bits"), ((4, 0), "has one at least"), ((4, 8, 2), "axes 0 and 1")],
)
def test_encodings_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Packed(*arguments)


def test_only_matrices_whose_groups_come_out_even():
    with pytest.raises(ValueError, match="no multiple of 16"):
        FOUR.quantise(torch.randn(4, 24))
    with pytest.raises(ValueError, match="is no matrix"):
        FOUR.quantise(torch.randn(16))
    tensors = FOUR.quantise(torch.randn(4, 32))
    tensors["scales"] = tensors["scales"][:2]
    with pytest.raises(ValueError, match="packed"):
        Dequantised(FOUR, **{s: Array(t) for s, t in tensors.items()})


def test_the_interpreter_computes_on_what_codes_stand_for():
    program = with_packed(tiny_program(), projections(FOUR))
    for mode in ("torch", "reference"):
        runner = Runner(program, dtype=torch.float64, mode=mode)
        expected = Runner(dense(program), dtype=torch.float64, mode=mode)
        assert runner.logits(INPUTS).equal(expected.logits(INPUTS))


def test_ops_that_read_dense_weights_alone_refuse_packed_ones():
    program = tiny_program()
    program.weights.replace(
        Weight("norm.weight", packed_weight(program.weights["embed.weight"], FOUR).producer)
    )
    with pytest.raises(VerifyError, match=r"operand 'weight' is f32.*packed.*reads dense ones"):
        verify(program)
    with pytest.raises(VerifyError, match="rows are looked up where axis 1 is packed"):
        with_packed(tiny_program(vocab=96), lambda n: Packed(4, 16, 0) if "embed" in n else None)


def test_two_weights_cannot_have_one_tensor():
    program = with_packed(tiny_program(), projections(FOUR))
    program.weights.add(Weight("embed.weight.scales", Array(torch.zeros(1))))
    with pytest.raises(VerifyError, match=r"a tensor that is called 'embed\.weight\.scales'"):
        verify(program)


def test_costs_count_the_bytes_of_the_codes():
    program = tiny_program()
    packed = with_packed(program, projections(FOUR))
    size = {weight.name: weight.nbytes for weight in packed.weights}
    # 4 bits an element and an fp32 scale for 16 of them: 6 bits where there were 32.
    assert size["layers.0.mlp.up_proj.weight"] == 48 * 32 * 6 // 8
    costs = [total_cost(p) for p in (program, packed)]
    assert costs[0].flops == costs[1].flops
    # The embedding's bytes are counted as activations, those of the head as a weight.
    assert costs[1].weight_bytes < costs[0].weight_bytes / 4
    assert Type((4, 32), torch.float16, FOUR).bytes == 4 * (16 + 4)


def test_comparisons_see_the_encoding():
    program = tiny_program()
    packed = with_packed(program, projections(FOUR))
    assert first_difference(packed, packed.copy()) is None
    assert "is packed(bits=4, group=16, axis=1, symmetric), not dense" in str(
        first_difference(packed, program)
    )
    assert Imprint(packed).difference(packed.copy()) is None
    assert Imprint(packed).difference(dense(packed)) is not None


def tensors_of(program: Program):
    return {tensor.name: tensor.producer for tensor in program.weights.tensors()}


def test_saved_programs_keep_encodings():
    program = with_packed(tiny_program(), projections(Packed(8, 8, symmetric=False)))
    data = json.loads(json.dumps(program_to_json(program)))
    opened = program_from_json(data, tensors_of(program))
    assert program_to_json(opened) == program_to_json(program)
    assert Runner(opened).logits(INPUTS).equal(Runner(program).logits(INPUTS))
    for changed, message in (
        ({"bits": 5}, "codes of 5 bits"),
        ({"group": 7}, "multiple of 7"),
        ({"axis": 5}, "axis"),
    ):
        broken = json.loads(json.dumps(data))
        weight = next(w for w in broken["weights"] if w["encoding"])
        weight["encoding"] |= changed
        with pytest.raises(SourceError, match=message):
            program_from_json(broken, tensors_of(program))


def test_output_folders_and_snapshots_hold_the_codes(tmp_path):
    program = with_packed(tiny_program(), projections(FOUR))
    save_program(program, tmp_path, {})
    opened = load_program(tmp_path)
    assert {w.name: w.encoding for w in opened.weights} == {
        w.name: w.encoding for w in program.weights
    }
    assert Runner(opened).logits(INPUTS).equal(Runner(program).logits(INPUTS))
    stored = sum(weight.nbytes for weight in program.weights)
    assert stored < (tmp_path / "model.safetensors").stat().st_size < stored + 10_000

    snapshots = Snapshots(tmp_path / "snapshots", tiny_program(), "salt")
    snapshots.save(program, "quantise", 1, [], {})
    found = Snapshots(tmp_path / "snapshots", tiny_program(), "salt").load("quantise", 1)
    assert found is not None
    assert Runner(found[0]).logits(INPUTS).equal(Runner(program).logits(INPUTS))


MIXED = {
    "layers.0.self_attn.q_proj.weight": FOUR,
    "layers.0.mlp.up_proj.weight": Packed(8, 16, symmetric=False),
    "layers.1.mlp.down_proj.weight": Packed(4, 48),
    "layers.1.self_attn.o_proj.weight": Packed(8, 8, axis=0),
    "layers.2.mlp.down_proj.weight": Packed(4, 8, axis=0, symmetric=False),
    "embed.weight": Packed(4, 32, symmetric=False),
}


@pytest.mark.oldest
@pytest.mark.parametrize("tied", [False, True])
def test_emitted_models_compute_the_same(tied, tmp_path):
    """Groups that ONNX Runtime's own ops read, and others, in layers that differ."""
    program = with_packed(tiny_program(layers=3, tied=tied, cache=True), MIXED.get)
    emit(program, tmp_path / "out", target="cpu", emit=("torch", "onnx"))
    expected = Runner(program).logits(INPUTS)
    real = INPUTS["attention_mask"].bool()
    text = (tmp_path / "out" / "model.py").read_text()
    assert "QuantisedWeight(weights, " in text and "def dequantise(" in text
    for backend in ("torch", "onnx"):
        logits = open_language_model(str(tmp_path / "out"), backend).logits(*INPUTS.values())
        assert torch.allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5), backend
    opened = load_program(tmp_path / "out")
    assert opened.weights["layers.0.self_attn.q_proj.weight"].encoding == FOUR
    assert Runner(opened).logits(INPUTS).equal(expected)


ODD = {
    "layers.0.self_attn.q_proj.weight": Packed(3, 32, symmetric=False),
    "layers.0.mlp.up_proj.weight": Packed(3, 4),
    "layers.1.mlp.down_proj.weight": Packed(2, 3, symmetric=False),
    "layers.1.self_attn.o_proj.weight": Packed(4, 1, axis=0),
    "embed.weight": Packed(3, 8, symmetric=False),
}


def test_a_torch_package_reads_every_width_and_group(tmp_path):
    program = with_packed(tiny_program(layers=2, tied=False, cache=True), ODD.get)
    emit(program, tmp_path / "out", target="cpu", emit=("torch",))
    expected = Runner(program).logits(INPUTS)
    logits = open_language_model(str(tmp_path / "out"), "torch").logits(*INPUTS.values())
    real = INPUTS["attention_mask"].bool()
    assert torch.allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.oldest
@pytest.mark.parametrize("symmetric", slow_but([True, False], False))
@pytest.mark.parametrize(
    ("bits", "group", "axis"),
    [(4, 32, 1), (8, 16, 1), (2, 16, 1), (4, 1, 1), (4, 4, 0), (8, 8, 0), (4, 33, 1), (8, 33, 1),
     (4, 11, 1), (4, 96, 1)],
)  # fmt: skip
def test_onnx_reads_every_group(bits, group, axis, symmetric, tmp_path):
    """Rows of odd length as well, whose last byte is not full."""
    hidden = 32 if 32 % group == 0 else group if group % 11 else 33
    program = tiny_program(layers=1, tied=False, hidden=hidden)
    if bits == 2 and not reads_two_bits():
        pytest.skip("this ONNX Runtime has no kernel for codes of 2 bits")
    encoding = Packed(bits, group, axis, symmetric)
    names = ["layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"]
    names += ["embed.weight"] if bits > 2 and axis == 1 else []
    program = with_packed(program, lambda name: encoding if name in names else None)
    emit(program, tmp_path / "out", target="cpu", emit=("onnx",))
    expected = Runner(program).logits(INPUTS)
    logits = open_language_model(str(tmp_path / "out"), "onnx").logits(*INPUTS.values())
    real = INPUTS["attention_mask"].bool()
    assert torch.allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5)


def test_scales_that_blocks_repeat_are_planned_for(tmp_path):
    program = with_packed(tiny_program(ffn=96, cache=True), projections(Packed(4, 32)))
    down = "layers.1.mlp.down_proj.weight"
    program.weights.replace(packed_weight(dense(program).weights[down], Packed(4, 96)))
    emitter = OnnxEmitter()
    planned = emitter.tensors(program, "cpu")
    stored = emitter.emit(program, tmp_path, "cpu", silent).storage
    blocks = {name: place.shape for name, place in stored.items() if ".blocks_of_" in name}
    # 96 codes with one scale are three blocks of 32.
    assert blocks == {f"{down}.scales.blocks_of_32": (32, 3)}
    assert {name for name in planned if ".blocks_of_" in name} == {
        f"model.onnx.data/{name}" for name in blocks
    }
    assert planned[f"model.onnx.data/{down}.scales.blocks_of_32"] == ((32, 3), torch.float32)
    report = emit(program, tmp_path / "out", target="cpu", emit=("onnx",))
    assert [form.dtype for form in report.artifact.forms] == ["codes of 4 bits"]


def test_onnx_reads_codes_in_blocks_where_it_can(tmp_path):
    import onnx

    program = with_packed(tiny_program(layers=3, tied=False), MIXED.get)
    emit(program, tmp_path / "out", target="cpu", emit=("onnx",))
    model = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False)
    ops = [node.op_type for node in model.graph.node]
    # Groups of 48 are read as three blocks of 16 that repeat a scale.
    assert ops.count("MatMulNBits") == 3 and ops.count("GatherBlockQuantized") == 1
    assert ops.count("DequantizeLinear") == 2


def test_what_cannot_be_emitted_says_why(tmp_path):
    for encoding, message in (
        (Packed(3, 16), "no tensors of 3-bit codes, and MatMulNBits takes 2, 4 and 8"),
        (Packed(2, 8), "codes of 2 bits in groups along the input that are multiples of 16"),
    ):
        program = with_packed(tiny_program(), projections(encoding))
        with pytest.raises(LoweringError, match=message):
            emit(program, tmp_path / "onnx", target="cpu", emit=("onnx",))
    with pytest.raises(LoweringError, match="captured from a module without a transformers config"):
        emit(program, tmp_path / "hf", target="cpu", emit=("hf",))
