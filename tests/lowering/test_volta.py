"""The Volta kernels without a Volta: run on the CPU, and compiled ahead of time."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
from attention_reference import random_case
from sampling import exhaustive_but, slow_but
from volta_emulator import COMPILER, emulated, place
from volta_forms import FORMS, Form, case_of, check, close, run

from graphopt.errors import LoweringError
from graphopt.lowering.cuda import compile_cuda, nvrtc_version
from graphopt.lowering.cuda.sass import disassemble, find_nvdisasm, usage
from graphopt.lowering.cuda.volta_counts import matrix_instructions, shared_loads
from graphopt.lowering.kernels.volta_cuda import (
    compile_volta,
    volta_source,
)
from graphopt.plan.volta_layout import operand_layout, value_layout
from graphopt.runtime import nvrtc
from graphopt.runtime.attention import Keys, prefill
from graphopt.runtime.volta import DECODE, MERGE, PREFILL, decode_kernels, prefill_kernel

needs_gcc = pytest.mark.skipif(COMPILER is None, reason="there is no g++ to run the kernels with")
SAMPLE = (
    "causal 64", "full 32", "key mask 64", "window, top left 96", "chunk 64",
    "bias 64", "varlen 64", "pages of 16, 64", "ring 64",
    "unequal 40 72", "everything 64", "weights in shared memory 80", "decode 256",
    "decode, one key head 64", "decode, everything 128", "decode, unequal 40 72",
    "decode, weights in shared memory 64",
)  # fmt: skip

EVERY_DAY = (
    "chunk 64", "bias 64", "pages of 16, 64", "unequal 40 72", "everything 64", "varlen 64",
    "decode, one key head 64", "decode, everything 128", "decode, weights in shared memory 64",
)  # fmt: skip
"""Of the sample, those that between them have every mask, layout and way of tiles."""


# ---- run on the CPU ----


@pytest.mark.slow
@needs_gcc
@pytest.mark.parametrize("name", exhaustive_but(SAMPLE, *EVERY_DAY))
def test_a_form(name):
    constants = FORMS[name].constants()
    check(FORMS[name], emulated(constants), constants, lengths=(1, 65), unequal=((7, 64), (64, 7)))


@needs_gcc
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FORMS)
def test_a_form_at_more_lengths(name):
    constants = FORMS[name].constants()
    lengths, unequal = (1, 7, 63, 64, 65, 127), ((7, 64), (64, 7), (65, 127))
    check(FORMS[name], emulated(constants), constants, lengths=lengths, unequal=unequal)


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_rows_that_see_nothing_are_zero(phase):
    form = Form(64, {"padding_mask": True, "sinks": True, "phase": phase})
    constants = form.constants()
    kernels = emulated(constants)
    case = case_of(form, 5, 40)
    case.mask[1] = 0
    out, lse = run(form, kernels, constants, case)
    close(out, lse, case)
    assert out[1].eq(0).all() and out[0].ne(0).any()
    # More queries than keys: the first stand before all keys.
    form = Form(64, {"phase": phase})
    constants = form.constants()
    out, lse = run(form, emulated(constants), constants, case_of(form, 9, 4))
    assert out[:, :, :5].eq(0).all() and lse[:, :, :5].eq(float("-inf")).all()


@pytest.mark.slow
@needs_gcc
def test_scores_far_from_zero_stay_finite():
    constants = FORMS["causal 64"].constants()
    for sign in (1, -1):
        case = random_case((1, 4, 2, 40, 40, 64, 64), {})
        case.q[:], case.k[:] = 60.0, 125.0 * sign
        case.k[..., 0] += torch.arange(40).to(torch.float16) % 7
        assert 5.9e4 < case.scores(torch.float64).abs().nan_to_num(0, posinf=0).max() < 6.1e4
        close(*run(FORMS["causal 64"], emulated(constants), constants, case), case)


@pytest.mark.slow
@needs_gcc
def test_split_and_unsplit_agree_and_a_row_does_not_hang_on_its_batch():
    form = FORMS["decode 64"]
    constants = form.constants()
    kernels = emulated(constants)
    case = case_of(form, 1, 700)
    whole, _ = run(form, kernels, constants, case, splits=1)
    for splits in (2, 3, 7):
        found, _ = run(form, kernels, constants, case, splits=splits)
        assert torch.equal(found, run(form, kernels, constants, case, splits=splits)[0])
        assert (found.double() - whole.double()).abs().max().item() <= 2 * case.bound()[1]
    out, _ = run(form, kernels, constants, case)
    alone = dataclasses.replace(case, q=case.q[1:], k=case.k[1:], v=case.v[1:])
    assert torch.equal(out[1:], run(form, kernels, constants, alone)[0])


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("form", [Form(64), Form(80), Form(40, value_size=72), Form(256)])
def test_shared_memory_is_laid_out_as_the_bank_model_has_it(form):
    constants = form.constants()
    keys, values = form.size, form.value_size or form.size
    for which, size, layout in ((0, keys, operand_layout(keys)), (1, values, value_layout(values))):
        for row in range(32):
            for chunk in range(size // 8):
                assert place(constants, which, row, chunk) == layout(row, 16 * chunk)


@needs_gcc
@pytest.mark.slow
def test_a_missing_barrier_is_noticed():
    """What the emulation is good for: without any barrier a tile is overwritten too early."""
    form = Form(64, {"causal": False}, heads=1, groups=1)
    constants = form.constants()
    calls = [match.start() for match in re.finditer(r"\n +wait_for_owners\(\);", volta_source())]
    assert len(calls) == 3
    noticed = 0
    for start in calls:
        source = volta_source()
        source = source[:start] + re.sub(
            r"wait_for_owners\(\);", "", source[start:], count=1
        )  # fmt: skip
        kernels = emulated(constants, source)
        try:
            check(form, kernels, constants, lengths=(300,), unequal=())
        except AssertionError:
            noticed += 1
    assert noticed == 3


# ---- what the launcher refuses ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {n: getattr(c, n).bfloat16() for n in "qkv"}, "q is torch.bfloat16"),
        (lambda c: {"k": torch.zeros(2, 2, 8, 65)[..., 1:].half()}, None),
        # Rows that begin anywhere are copied before a kernel sees them.
        (lambda c: {"k": torch.zeros(2, 2, 8, 68).half()[..., 4:]}, None),
        (lambda c: {"scale": -1.0}, "scale is -1.0"),
    ],
)
def test_operands_that_do_not_fit_are_refused_before_anything_starts(change, message):
    form = FORMS["full 64"]
    constants = form.constants()
    case = dataclasses.replace(case_of(form, 8, 8), **change(case_of(form, 8, 8)))
    kernel = prefill_kernel(b"", constants)
    # Nothing is loaded: a tensor of the CPU is refused at last where all else is right.
    with pytest.raises(ValueError, match=message or "one CUDA device, not of cpu"):
        prefill(kernel, case.q, Keys(case.k, case.v), constants, scale=case.scale)


def test_parameters_are_those_of_the_source():
    source = re.sub(r"//.*", "", volta_source())

    def names(text, decode):
        lines, keep = [], [True]
        for line in text.splitlines():
            if line.startswith("#if"):
                keep.append(decode != ("!" in line))
            elif line.startswith("#else"):
                keep[-1] = not keep[-1]
            elif line.startswith("#endif"):
                keep.pop()
            elif all(keep):
                lines.append(line)
        return [part.split()[-1].lstrip("*") for part in " ".join(lines).split(",")]

    (attention,) = re.findall(r"\bKERNEL\((.*?)\) \{", source, re.DOTALL)
    (merge,) = re.findall(r"\battention_merge\((.*?)\) \{", source, re.DOTALL)
    assert names(attention, False) == list(PREFILL)
    assert names(attention, True) == list(DECODE)
    assert names(merge, True) == list(MERGE)
    constants = FORMS["decode 64"].constants()
    assert [kernel.name for kernel in decode_kernels(b"", constants)] == [
        "attention_decode",
        "attention_merge",
    ]


# ---- compiled ahead of time ----


def _nvrtc():
    try:
        return nvrtc_version(12), ""
    except LoweringError as error:
        return None, error.message


def _nvdisasm():
    try:
        return find_nvdisasm(), ""
    except LoweringError as error:
        return None, error.message


VERSION, WHY = _nvrtc()
needs_nvrtc = pytest.mark.skipif(VERSION is None, reason=WHY)
NVDISASM, WHY_NOT_DISASSEMBLED = _nvdisasm()


COMPILED = (
    "causal 32", "causal 64", "causal 80", "causal 96", "causal 128", "causal 192", "causal 256",
    "unequal 40 72", "everything 64", "everything 256", "alibi, key mask 128", "bias in fp32 128",
    "varlen, window 128", "pages of 64, 192", "ring 64", "weights in shared memory 256",
    "decode 64", "decode 128", "decode 192", "decode 256", "decode, everything 128",
    "decode, one key head 64",
)  # fmt: skip


@functools.cache
def machine_code(name):
    """The constants of a form, and what they are compiled to, which two tests look at."""
    constants = FORMS[name].constants()
    return constants, compile_volta(constants, "sm_70")


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("name", slow_but(COMPILED, "causal 64", "decode 128"))
def test_machine_code(name):
    constants, compiled = machine_code(name)
    assert compiled.image == compiled.cubin and compiled.cubin[:4] == b"\x7fELF"
    assert ".target sm_70" in compiled.ptx
    used = usage(compiled.log)
    assert all(u.registers <= 255 and u.spilled == 0 and u.shared == 0 for u in used.values())
    assert len(used) == 1 + constants["DECODE"]


@needs_nvrtc
@pytest.mark.skipif(NVDISASM is None, reason=WHY_NOT_DISASSEMBLED)
@pytest.mark.parametrize("name", slow_but(COMPILED, "causal 64", "decode 128"))
def test_instructions(name):
    constants, compiled = machine_code(name)
    kernels = disassemble(compiled.cubin, NVDISASM)
    kernel = kernels["attention_decode" if constants["DECODE"] else "attention_prefill"]
    expected = matrix_instructions(constants)
    assert kernel.count(r"HMMA\.884\.F32\.F32\.STEP\d") == kernel.count("HMMA") == expected
    assert sum(k.count("LDL|STL|LDSM|LDGSTS") for k in kernels.values()) == 0
    # What the bank model is asked about is what the body of a tile loads.
    loop = [kernel.instructions[i].opcode for i in kernel.main_loop()]
    for width in (8, 16):
        loads = [x.count for x in shared_loads(constants).values() if x.width == width]
        assert sum(f".{8 * width}" in op and op.startswith("LDS") for op in loop) == sum(loads)


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize(
    "name", slow_but(["causal 64", "everything 256", "decode 128"], "causal 64")
)
def test_ptx_for_the_driver_to_compile(name):
    constants = FORMS[name].constants()
    compiled = compile_volta(constants, "compute_70")
    assert compiled.cubin is None and compiled.image.endswith(b"\0")
    # An emitted model has it from the compilation of the machine code.
    assert compiled.ptx == machine_code(name)[1].ptx
    assert ".target sm_70" in compiled.ptx
    # A step of K is one product of a warp, and four instructions.
    products = matrix_instructions(constants) // 4
    assert compiled.ptx.count("mma.sync.aligned.m8n8k4.row") == products
    for newer in ("cp.async", "ldmatrix", "bf16", "m16n8k"):
        assert newer not in compiled.ptx
    entries = re.findall(r"\.entry (\w+)", compiled.ptx)
    assert (
        "attention_decode" in entries if constants["DECODE"] else entries == ["attention_prefill"]
    )


@needs_nvrtc
@pytest.mark.exhaustive
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("size", range(32, 257, 8))
def test_no_head_size_spills(size, phase):
    for fields in ({}, {"bias": True, "alibi": True}, {"kv": "paged", "page": 16, "window": 100}):
        compiled = compile_volta(Form(size, {**fields, "phase": phase}).constants())
        assert all(used.spilled == 0 for used in usage(compiled.log).values()), fields


@needs_nvrtc
def test_a_source_that_does_not_compile_is_shown_with_the_compilers_words():
    with pytest.raises(LoweringError, match=r"wrong\.cu does not compile for sm_70") as caught:
        compile_cuda("__global__ void f() { nothing(); }", "wrong.cu", "sm_70", {"SIZE": 3})
    assert 'identifier "nothing" is undefined' in caught.value.message
    assert "SIZE=3" in caught.value.remedy


@needs_nvrtc
def test_macros_have_the_type_of_their_value():
    source = (
        'static_assert(sizeof(A) == 4 && A == 2.5f, ""); static_assert(B == 1 && C == 7, "");'
        'extern "C" __global__ void f() {}'
    )
    compiled = compile_cuda(source, "macros.cu", "compute_70", {"A": 2.5, "B": True, "C": 7})
    assert ".entry f" in compiled.ptx


class FakeNvrtc:
    def __init__(self, major):
        self.major = major

    def nvrtcVersion(self, major, minor):
        major._obj.value, minor._obj.value = self.major, 0
        return 0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "NVRTC, the CUDA compiler, is not installed"),
        ([13], "NVRTC 13.0 no longer compiles for this architecture: CUDA 12 was the last"),
        ([11], "is not installed"),
    ],
)
def test_a_compiler_that_is_missing_or_too_new(found, message, monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([str(major) for major in found]))
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda path: FakeNvrtc(int(path)))
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(LoweringError, match=message) as caught:
            compile_volta(FORMS["causal 64"].constants())
        assert "pip install 'graphopt[cuda]'" in caught.value.remedy
    finally:
        nvrtc._library.cache_clear()


def test_the_compiler_that_can_is_taken_where_there_are_several(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["13", "12"]))
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda path: FakeNvrtc(int(path)))
    nvrtc._library.cache_clear()
    try:
        assert nvrtc_version(12) == (12, 0) and nvrtc_version() == (13, 0)
    finally:
        nvrtc._library.cache_clear()
