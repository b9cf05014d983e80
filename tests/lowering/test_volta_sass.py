"""Machine code for Volta read as text, and the issue model over it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volta_forms import FORMS

from graphopt.errors import LoweringError
from graphopt.lowering.cuda import nvrtc_version, volta_counts
from graphopt.lowering.cuda.issue_model import (
    CLOCK,
    LAUNCH,
    Causal,
    fitted,
    loop_path,
    round_cycles,
    seconds,
)
from graphopt.lowering.cuda.sass import Instruction, find_nvdisasm, parse_sass, usage
from graphopt.lowering.cuda.volta_counts import matrix_instructions, shared_loads
from graphopt.plan.volta_layout import padded

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "benchmarks" / "volta.json").read_text(encoding="utf-8"))


def instruction(opcode, stall=1, writes=None, reads=None, waits=(), operands=""):
    return Instruction("", opcode, operands, stall, writes, reads, tuple(waits))


# ---- parsing ----


def printed(lines, name="kernel", registers=40):
    """What nvdisasm -hex prints; a line is a label, or an instruction's text and its control."""
    text = [
        f'\t.section\t.text.{name},"ax",@progbits',
        '\t.sectionflags\t@"SHF_BARRIERS=1"',
        f'\t.sectioninfo\t@"SHI_REGISTERS={registers}"',
        f".text.{name}:",
    ]
    address = 0
    for line in lines:
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        code, stall, writes, reads, waits = line
        control = stall | 1 << 4 | writes << 5 | reads << 8 | sum(1 << 11 + i for i in waits)
        low, high = 0x00000A00FF017624, control << 41 | 0x78E00FF
        text.append(f"        /*{address:04x}*/    {code} ;      /* 0x{low:016x} */")
        text.append(f"{'':40}/* 0x{high:016x} */")
        address += 16
    return "\n".join([*text, '\t.section\t.nv.info,"",@"SHT_CUDA_INFO"', "\t.align\t4", ""])


LOOP = [
    ("MOV R1, RZ", 1, 7, 7, ()),
    ".L_x_1",
    ("@!P0 LDS.U.128 R4, [R13+0x800]", 4, 2, 5, ()),
    ("@P1 BRA `(.L_x_2)", 5, 7, 7, ()),
    ("ISETP.GE.AND P0, PT, R7, R4, PT", 3, 7, 7, (2,)),
    ("FSEL R5, R4, -INF , P0", 2, 7, 7, ()),
    ".L_x_2",
    ("@P2 BRA `(.L_x_3)", 5, 7, 7, ()),
    ("FMUL R5, R4, R6", 4, 7, 7, ()),
    ".L_x_3",
    ("@P2 BRA `(.L_x_4)", 5, 7, 7, ()),
    ("ISETP.GE.AND P0, PT, R7, R4, PT", 3, 7, 7, ()),
    ("LDG.E.128.CONSTANT.SYS R8, [R2]", 4, 0, 1, ()),
    ".L_x_4",
    ("HMMA.884.F32.F32.STEP0 R8, R4.reuse.ROW, R6.COL, R8", 2, 7, 7, (0, 2)),
    ("@!P3 BRA `(.L_x_1)", 5, 7, 7, ()),
    ("EXIT", 5, 7, 7, ()),
]


def test_an_instruction_has_its_guard_its_name_and_its_scoreboards():
    found = parse_sass(printed(LOOP) + printed([("EXIT", 5, 7, 7, ())], "other", 8))
    assert list(found) == ["kernel", "other"] and len(found["other"].instructions) == 1
    kernel = found["kernel"]
    assert (kernel.registers, found["other"].registers) == (40, 8)
    load, product = kernel.instructions[1], kernel.instructions[10]
    assert load == Instruction("!P0", "LDS.U.128", "R4, [R13+0x800]", 4, 2, 5, ())
    assert (load.name, product.waits, product.writes) == ("LDS", (0, 2), None)
    assert kernel.count("LDS") == 1 and kernel.count(r"HMMA\.884") == 1 and kernel.count("STL") == 0


def test_the_loop_with_the_products_is_found():
    kernel = parse_sass(printed(LOOP))["kernel"]
    assert kernel.main_loop() == range(1, 12)
    (other,) = parse_sass(printed([(".nothing", 1, 7, 7, ()), ("EXIT", 5, 7, 7, ())])).values()
    with pytest.raises(LoweringError, match="kernel has no loop with matrix instructions"):
        other.main_loop()


def test_code_without_its_encoding_is_refused():
    text = "\n".join(line for line in printed(LOOP).splitlines() if not line.startswith(" " * 40))
    with pytest.raises(LoweringError, match="no encoding below") as caught:
        parse_sass(text)
    assert "-hex" in caught.value.remedy


def test_what_ptxas_says_of_registers_spills_and_shared_memory():
    log = (
        "ptxas info    : Compiling entry function 'one' for 'sm_70'\n"
        "    132 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads\n"
        "ptxas info    : Used 255 registers, 512+0 bytes smem, 400 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_70'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers, 400 bytes cmem[0]\n"
    )
    found = {name: dataclasses.astuple(used) for name, used in usage(log).items()}
    assert found == {"one": (255, 132, 512), "two": (32, 0, 0)}


def program(path, version):
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    path.chmod(0o755)
    return str(path)


def test_a_disassembler_of_cuda_12_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    newer, older = program(tmp_path / "newer", "13.1"), program(tmp_path / "older", "12.4")
    assert find_nvdisasm(newer, older) == older
    with pytest.raises(LoweringError, match=r"newer is of CUDA 13\.1, which no longer") as caught:
        find_nvdisasm(newer)
    assert "pip download --no-deps triton==3.1.0" in caught.value.remedy


# ---- loads from shared memory ----


@pytest.mark.parametrize("phase", ["causal", "decode"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_loads_take_the_fewest_wavefronts_and_unpadded_rows_do_not(size, phase, monkeypatch):
    constants = {**FORMS[f"{phase} {size}"].constants(), "P_PATH": 1}
    loads = shared_loads(constants)
    assert set(loads) == {"Q", "K", "V", "P"}
    assert all(load.wavefronts == load.ideal for load in loads.values())
    monkeypatch.setattr(volta_counts, "operand_layout", padded)
    monkeypatch.setattr(volta_counts, "value_layout", padded)
    unpadded = shared_loads(constants)
    for name in "QKV":
        assert unpadded[name].wavefronts > unpadded[name].ideal


# ---- the model: a round ----

STEPS = [instruction(f"HMMA.884.F32.F32.STEP{i}", stall=2) for i in range(4)]


@pytest.mark.parametrize(("warps", "turns"), [(4, 1), (8, 2), (16, 4)])
def test_products_take_what_was_measured(warps, turns):
    assert round_cycles(STEPS, warps=warps) == pytest.approx(8.38 * turns)


def test_a_load_is_waited_for():
    load = instruction("LDS.U.128", stall=2, writes=0)
    alone = [load, instruction("FADD", stall=4, waits=(0,))]
    # Four wavefronts, the latency, and the stall after what waited for it.
    assert round_cycles(alone, warps=1) == pytest.approx(4 + 26.4 + 4)
    cached = [instruction("LDG.E.128.SYS", stall=2, writes=0), alone[1]]
    assert round_cycles(cached, warps=1) == pytest.approx(4 + 211 + 4)
    assert round_cycles([load], warps=1) == pytest.approx(4, abs=2)


def test_warps_hide_latencies_until_a_unit_is_busy():
    path = [instruction("LDS.U.64", stall=2, writes=0), instruction("FADD", stall=4, waits=(0,))]
    times = [round_cycles(path, warps=4 * n) for n in (1, 2, 4, 8, 16)]
    assert times == sorted(times)
    assert times[1] < 1.3 * times[0]
    # Sixteen warps a part ask for 128 wavefronts of the one path.
    assert times[-1] == pytest.approx(2 * 64, rel=0.05)


def test_a_block_waits_at_a_barrier_and_two_blocks_do_not_wait_for_each_other():
    path = [*STEPS, instruction("LDS.U.128", writes=0), instruction("FADD", 4, waits=(0,))]
    barrier = [*path, instruction("BAR.SYNC", stall=1)]
    assert round_cycles(barrier, warps=8) >= round_cycles(path, warps=8) - 1e-6
    assert round_cycles(barrier, warps=4, blocks=2) <= round_cycles(barrier, warps=8) + 1e-6


OPCODES = st.sampled_from(
    ["HMMA.884.F32.F32.STEP0", "FADD", "LOP3.LUT", "MUFU.EX2", "LDS.U.64", "STS.128", "SHFL.BFLY"]
)


@st.composite
def paths(draw):
    found = []
    for _ in range(draw(st.integers(2, 12))):
        opcode = draw(OPCODES)
        writes = draw(st.none() | st.integers(0, 5))
        waits = draw(st.sets(st.integers(0, 5), max_size=2))
        found.append(instruction(opcode, draw(st.integers(1, 6)), writes, None, waits))
    return found


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(paths(), st.data())
def test_a_round_is_no_faster_than_its_units_and_fewer_instructions_never_make_it_slower(
    path, data
):
    time = round_cycles(path, warps=1)
    assert time >= sum(max(i.stall, 1) for i in path) - 1e-6
    assert time >= sum(8.38 / 4 for i in path if i.name == "HMMA") - 1e-6
    assert round_cycles(path, warps=8) >= 2 * len(path) - 1e-6  # two warps a scheduler
    left_out = data.draw(st.integers(0, len(path) - 1))
    shorter = path[:left_out] + path[left_out + 1 :]
    assert round_cycles(shorter, warps=1) <= time + 1e-6


def test_only_tiles_at_an_edge_run_the_masks():
    kernel = parse_sass(printed(LOOP))["kernel"]
    inner, edge = (
        [i.name for i in loop_path(kernel, edge=masked)] for masked in (False, True)
    )  # fmt: skip
    assert inner == ["LDS", "BRA", "BRA", "FMUL", "BRA", "ISETP", "LDG", "HMMA", "BRA"]
    assert edge == ["LDS", "BRA", "ISETP", "FSEL", *inner[2:]]


# ---- the model: a launch ----


@given(st.integers(1, 400), st.sampled_from([(64, 32), (32, 64), (128, 64), (48, 16)]))
@settings(deadline=None)
def test_tiles_are_those_a_mask_leaves(length, tile):
    m, n = tile
    seen = np.tril(np.ones((length, length), bool))
    expected = []
    for start in range(0, length, m):
        rows = seen[start : start + m]
        kinds = [rows[:, key : key + n] for key in range(0, length, n)]
        # A tile that reaches behind the last key has keys to mask as well.
        whole = [k.all() and k.shape[1] == n for k in kinds]
        expected.append((sum(whole), sum(k.any() for k in kinds) - sum(whole)))
    problem = Causal(length, 64, 2, m, n, longest_first=False)
    assert problem.tiles() == expected * 2
    assert dataclasses.replace(problem, longest_first=True).tiles() == expected[::-1] * 2


@settings(deadline=None, max_examples=40)
@given(st.integers(64, 2000), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_more_cores_and_shorter_rounds_are_never_slower(length, heads, cores, longest_first):
    problem = Causal(length, 64, heads, 64, 32, longest_first)

    def time(cores, inner=1000.0):
        # Each core has the same share of the memory.
        return seconds(problem, inner, 1.1 * inner, cores=cores, bandwidth=1e10 * cores)

    assert time(cores + 1) <= time(cores) * (1 + 1e-9)
    assert time(cores, 900.0) <= time(cores)
    # No schedule beats all cores at work to the end.
    work = sum(whole + 1.1 * masked for whole, masked in problem.tiles()) * 1000 / CLOCK
    assert time(cores) >= LAUNCH + work / cores


def test_half_the_work_tends_to_half_the_time():
    def ratio(length):
        problem = Causal(length, 64, 16, 64, 32, longest_first=True)
        full = (length / 64) * (length / 32) * 16 * 1000 / CLOCK / 8
        return seconds(problem, 1000.0, 1000.0, cores=8, bandwidth=1e15) / full

    ratios = [ratio(length) for length in (256, 1024, 4096, 16384)]
    assert ratios == sorted(ratios, reverse=True)
    assert 0.5 < ratios[-1] < 0.51


def test_the_factor_is_found_again():
    problem, machine = Causal(2048, 256, 6, 64, 32, False), {"cores": 72, "bandwidth": 9e11}
    time = seconds(problem, 5000.0, 5100.0, factor=1.234, **machine)
    assert fitted(problem, time, 5000.0, 5100.0, **machine) == pytest.approx(1.234, abs=2e-4)
    with pytest.raises(ValueError, match="out of the model's reach"):
        fitted(problem, LAUNCH / 2, 5000.0, 5100.0, **machine)


# ---- what tools/check_volta.py recorded ----


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "check_volta.py"
    spec = importlib.util.spec_from_file_location("check_volta", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_has_kernels_without_fault(tool):
    assert {(r["phase"], r["head_dim"]) for r in RECORDED["ours"]} == {
        (phase, size) for phase in ("prefill", "decode") for size in (64, 128, 256)
    }
    for row in RECORDED["ours"]:
        assert tool.faults(row) == []
        assert row["two_byte_stores"] == 0 and row["registers"] <= 255
        assert row["unpadded_wavefronts"]["Q"] > row["shared_loads"]["Q"]["ideal"]
    worse = {**RECORDED["ours"][0], "hmma": 1, "local": 2, "shared_bytes": 98305}
    assert len(tool.faults(worse)) == 3


def test_the_model_is_within_a_quarter_of_the_lengths_it_was_not_fitted_to():
    model = RECORDED["model"]
    errors = model["fits"][str(model["fitted_length"])]["error"]
    assert errors.keys() == model["published_tflops"].keys()
    assert all(abs(error) <= 0.25 for error in errors.values())
    assert abs(errors[str(model["fitted_length"])]) < 1e-3


def _disassembler():
    try:
        return find_nvdisasm(), nvrtc_version(12)
    except LoweringError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize("row", RECORDED["ours"], ids=lambda r: f"{r['phase']} {r['head_dim']}")
def test_the_record_is_what_the_kernels_compile_to(row, tool):
    nvdisasm, version = _disassembler()
    if RECORDED["versions"]["nvrtc"] != ".".join(map(str, version)):
        pytest.skip(f"recorded with NVRTC {RECORDED['versions']['nvrtc']}")
    made = tool.our_row(row["head_dim"], row["phase"], nvdisasm)
    assert json.loads(json.dumps(made)) == row
    _, constants = tool.planned(row["head_dim"], row["phase"])
    assert made["hmma"] == matrix_instructions(constants)


@pytest.mark.slow
def test_the_recorded_model_is_what_the_machine_code_gives(tool):
    nvdisasm, version = _disassembler()
    if RECORDED["versions"]["nvrtc"] != ".".join(map(str, version)):
        pytest.skip(f"recorded with NVRTC {RECORDED['versions']['nvrtc']}")
    made = tool.published_model(*tool.published_rounds(nvdisasm))
    assert json.loads(json.dumps(made)) == RECORDED["model"]
    assert tool.predictions(made["fits"], nvdisasm) == RECORDED["predicted"]
