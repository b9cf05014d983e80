"""Hold the Volta kernels to what their machine code shows, beside what Triton 3.1.0 makes.

    python tools/check_volta.py [--triton DIR] [--nvdisasm FILE] [--out benchmarks/volta.json]

needs no GPU, but NVRTC of CUDA 12 (`pip install 'graphopt[cuda]'`) and Python 3.11 or 3.12. Three
parts:

* The planned kernels for heads of 64, 128 and 256: matrix instructions against their closed form,
  spills, registers, shared memory, and the loads from it in the bank model.
* The Triton attention in every form, by Triton 3.1.0, the last release that uses Volta's matrix
  units. It is put into a folder of its own, once; its disassembler serves both.
* The issue model: what it says of a published kernel, and of ours. It has one constant, fitted to
  one published length.

Nothing is run. The exit code is 1 where a kernel of ours is not as it should be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "runtime" / "kernels"
VERSION = "3.1.0"
INSTRUCTION = "mma.sync.aligned.m8n8k4"

# ---- the Triton form: imported by Triton 3.1.0's own process, without graphopt ----

PLAIN: dict[str, Any] = {
    "HEAD_DIM": 64, "VALUE_DIM": 64, "D0": 64, "D1": 0, "V0": 64, "V1": 0, "GROUP": 1,
    "BLOCK_M": 64, "BLOCK_N": 64, "CAUSAL": True, "TOP_LEFT": False, "WINDOW": 0, "CHUNK": 0,
    "SOFTCAP": 0.0, "PADDING_MASK": False, "BIAS": False, "ALIBI": False, "SINKS": False,
    "VARLEN": False, "KV_LENS": False, "RING": 0, "PAGE": 0, "SELECTED": False, "LSE": False,
    "PAGE_MAX": False, "KV_BITS": 16, "WORDS": False,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "D 64": {},
    "D 128": {"HEAD_DIM": 128, "VALUE_DIM": 128, "D0": 128, "V0": 128},
    "D 256": {"HEAD_DIM": 256, "VALUE_DIM": 256, "D0": 256, "V0": 256},
    "D 32": {"HEAD_DIM": 32, "VALUE_DIM": 32, "D0": 32, "V0": 32},
    "D 80": {"HEAD_DIM": 80, "VALUE_DIM": 80, "D1": 16, "V1": 16},
    "full": {"CAUSAL": False},
    "window": {"WINDOW": 100},
    "softcap": {"SOFTCAP": 2.0},
    "key mask": {"PADDING_MASK": True, "LSE": True},
    "alibi": {"ALIBI": True},
    "bias": {"BIAS": True, "CAUSAL": False},
    "sinks": {"SINKS": True, "KV_LENS": True},
    "varlen": {"VARLEN": True},
    "paged": {"PAGE": 64, "KV_LENS": True},
    "ring": {"RING": 100, "KV_LENS": True},
}
_FLOATS = ("lse_ptr", "page_max_ptr", "slopes_ptr", "sinks_ptr")
_HALVES = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "bias_ptr")


def kind(name: str) -> str:
    """Return the type of an argument of the kernel, as Triton writes it."""
    if name.endswith("_ptr"):
        if name == "mask_ptr":
            return "*i8"
        return "*fp16" if name in _HALVES else "*fp32" if name in _FLOATS else "*i32"
    return "fp32" if name == "scale" else "i32"


def compile_triton(folder: Path) -> None:
    """Compile every form with the Triton that is imported here, into numbered files."""
    import triton
    from prefill import attention_prefill
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.__version__ != VERSION:
        sys.exit(f"this is Triton {triton.__version__}, not {VERSION}: give another --triton")
    unknown = [p.name for p in attention_prefill.params if p.is_constexpr and p.name not in PLAIN]
    if unknown:
        sys.exit(f"the kernel has constants that PLAIN lacks: {', '.join(unknown)}")
    for number, fields in enumerate(FORMS.values()):
        constants = {**PLAIN, **fields}
        names = [n for n in attention_prefill.arg_names if n not in constants]
        made = triton.compile(
            ASTSource(attention_prefill, {n: kind(n) for n in names}, constants),
            target=GPUTarget("cuda", 70, 32),
            options={"num_warps": 4, "num_stages": 2},
        )
        (folder / f"{number}.ptx").write_text(made.asm["ptx"], encoding="utf-8")
        (folder / f"{number}.cubin").write_bytes(made.asm["cubin"])
        (folder / f"{number}.shared").write_text(str(made.metadata.shared), encoding="utf-8")


def install(folder: Path) -> Path:
    """Put Triton 3.1.0 into the folder, unless it is there; return its folder of programs."""
    if not (folder / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"triton=={VERSION}"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(
                f"Triton {VERSION} cannot be installed for Python {platform.python_version()}: "
                f"use 3.11 or 3.12.\n{done.stderr[-500:]}"
            )
    return folder / "triton" / "backends" / "nvidia" / "bin"


def triton_rows(folder: Path, programs: Path, nvdisasm: str) -> list[dict[str, Any]]:
    """Return what the machine code of every Triton form holds."""
    from graphopt.lowering.cuda.sass import disassemble, usage

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        made = Path(name)
        done = subprocess.run(
            [sys.executable, __file__, "--compile", name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(KERNELS)])},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"Triton {VERSION} does not compile the kernel:\n{done.stderr[-2000:]}")
        for number, form in enumerate(FORMS):
            ptx = made / f"{number}.ptx"
            command = [
                str(programs / "ptxas"),
                "-v",
                "--gpu-name=sm_70",
                "-o",
                os.devnull,
                str(ptx),
            ]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            (used,) = usage(said.stdout + said.stderr).values()
            (listing,) = disassemble((made / f"{number}.cubin").read_bytes(), nvdisasm).values()
            rows.append(
                {
                    "form": form,
                    "tile": [PLAIN["BLOCK_M"], PLAIN["BLOCK_N"], 4],
                    "matrix_instructions_ptx": ptx.read_text(encoding="utf-8").count(INSTRUCTION),
                    "hmma": listing.count(r"HMMA\.884"),
                    "registers": used.registers,
                    "spilled_bytes": used.spilled,
                    "local": listing.count("LDL|STL"),
                    "two_byte_stores": listing.count(r"STS\.U16"),
                    "shared_bytes": int((made / f"{number}.shared").read_text(encoding="utf-8")),
                }
            )
    return rows


# ---- ours ----

SIZES = (64, 128, 256)
HEADS, KEY_HEADS = 32, 8


def planned(size: int, phase: str = "prefill", **tiles: int) -> tuple[Any, dict[str, Any]]:
    """Return the plan of a causal attention, and its constants with some tiles changed."""
    from graphopt.lowering.kernels import plan_attention
    from graphopt.lowering.kernels.volta_cuda import volta_constants
    from graphopt.plan import AttentionSpec
    from graphopt.targets import get_target

    spec = AttentionSpec(head_dim=size, heads=HEADS, kv_heads=KEY_HEADS, phase=phase)
    plan = plan_attention(spec, get_target("volta"))
    return plan, {**volta_constants(plan), **tiles}


def compiled(constants: dict[str, Any], nvdisasm: str) -> tuple[Any, Any]:
    """Return the machine code of the constants' attention, and what ptxas says of it."""
    from graphopt.lowering.cuda.sass import disassemble, usage
    from graphopt.lowering.kernels.volta_cuda import compile_volta

    made = compile_volta(constants, "sm_70")
    name = "attention_decode" if constants["DECODE"] else "attention_prefill"
    assert made.cubin is not None
    return disassemble(made.cubin, nvdisasm)[name], usage(made.log)[name]


def our_row(size: int, phase: str, nvdisasm: str) -> dict[str, Any]:
    """Return what the machine code of a planned kernel holds, and what it should."""
    from graphopt.lowering.cuda.volta_counts import matrix_instructions, shared_loads
    from graphopt.plan.volta_layout import operand_load, padded, tile_row, value_load, wavefronts
    from graphopt.runtime.volta import shared_bytes

    _, constants = planned(size, phase)
    listing, used = compiled(constants, nvdisasm)
    loop = [listing.instructions[i].opcode for i in listing.main_loop()]
    loads = shared_loads(constants)
    return {
        "phase": phase,
        "head_dim": size,
        "tile": [constants[name] for name in ("BLOCK_M", "BLOCK_N", "WARPS")],
        "hmma": listing.count(r"HMMA\.884\.F32\.F32\.STEP\d"),
        "hmma_expected": matrix_instructions(constants),
        "registers": used.registers,
        "spilled_bytes": used.spilled,
        "local": listing.count("LDL|STL"),
        "newer": listing.count("LDSM|LDGSTS"),
        "two_byte_stores": listing.count(r"STS\.U16"),
        "shared_bytes": used.shared + shared_bytes(constants),
        "shared_loads": {
            name: {**asdict(load), "ideal": load.ideal} for name, load in loads.items()
        },
        # Decode's loop also fetches the next tile's pages, and merges through shared memory after.
        "loop_loads": {
            str(width): sum(bool(re.fullmatch(rf"LDS(\.U)?\.{8 * width}", name)) for name in loop)
            for width in (8, 16)
        },
        "unpadded_wavefronts": {
            "Q": wavefronts(operand_load(padded(size), tile_row, 0), 16),
            "V": wavefronts(value_load(padded(size), 0), 8),
        },
    }


def faults(row: dict[str, Any]) -> list[str]:
    """Return what is not as it should be in a row of ours."""
    from graphopt.targets import get_target

    limit = get_target("volta").limits["shared_bytes_per_block"]
    found = []
    if row["hmma"] != row["hmma_expected"]:
        found.append(f"{row['hmma']} HMMA.884 instead of {row['hmma_expected']}")
    if row["spilled_bytes"] or row["local"]:
        found.append(f"spills {row['spilled_bytes']} bytes")
    if row["newer"]:
        found.append("has instructions that Volta lacks")
    if row["shared_bytes"] > limit:
        found.append(f"takes {row['shared_bytes']:,} bytes of shared memory, above {limit:,}")
    for name, load in row["shared_loads"].items():
        if load["wavefronts"] != load["ideal"]:
            found.append(f"loads {name} in {load['wavefronts']} wavefronts, not {load['ideal']}")
    for width, count in row["loop_loads"].items():
        loads = [x["count"] for x in row["shared_loads"].values() if x["width"] == int(width)]
        if sum(loads) != count:
            found.append(f"has {count} loads of {width} bytes a lane, not {sum(loads)}")
    return [f"{row['phase']} {row['head_dim']} {text}" for text in found]


# ---- the issue model ----

# 1CatAI/1Cat-vLLM, docs/design/sm70_*: D 256, 6 query heads a key head, tiles of 64 by 32 and 8
# warps, 253 to 255 registers, one block a core, on a card that their notes count 72 cores of.
PUBLISHED = {1024: 15.1, 4096: 29.0, 8192: 38.0}
# Long keys, where every core is busy to the end: 256K keys, and 15.7K queries by 125K keys.
PUBLISHED_LONG = {"256K keys": 43.0, "15.7K x 125K": 46.6}
MEASURED = {**{str(length): speed for length, speed in PUBLISHED.items()}, **PUBLISHED_LONG}
PUBLISHED_TILE, PUBLISHED_CORES, PUBLISHED_HEADS = (64, 32), 72, 6
FITTED_LENGTH = 4096
LENGTHS = (1024, 4096, 8192, 16384)
ASSUMED = (
    "the published kernel's machine code is not at hand: its round is that of ours at 128 by 16, 8 "
    "warps, weights through shared memory (as many products, operand loads and scores a warp as 64 "
    "by 32 shared out to 8 warps), with the tile's way in twice, as its tile has twice the keys",
    "one sequence of 6 query heads and one key head; blocks start in the order of their rows",
    "1.53 GHz, keys and values in the second cache, 5 us for a launch, 900 GB/s for queries and "
    "results, sums scaled in every round",
)


def published_rounds(nvdisasm: str) -> tuple[float, float]:
    """Return the cycles of a round of the published kernel, without and with masks."""
    from graphopt.lowering.cuda.issue_model import loop_path, round_cycles

    _, constants = planned(256, BLOCK_M=128, BLOCK_N=16, WARPS=8, P_PATH=1)
    listing, _ = compiled(constants, nvdisasm)
    found = []
    for edge in (False, True):
        path = []
        for instruction in loop_path(listing, edge=edge):
            way_in = instruction.name == "LDG" or instruction.opcode.startswith("STS.128")
            path += [instruction] * (2 if way_in else 1)
        found.append(round_cycles(path, warps=8))
    return found[0], found[1]


def fit_published(
    length: int, inner: float, edge: float, *, heads: int, longest_first: bool
) -> dict[str, Any]:
    """Return the factor fitted to one published length, and what it says of the others."""
    from graphopt.lowering.cuda.issue_model import CLOCK, Causal, fitted, seconds
    from graphopt.targets import get_target

    machine = {"cores": PUBLISHED_CORES, "bandwidth": get_target("volta").bandwidth}
    m, n = PUBLISHED_TILE
    problem = Causal(length, 256, heads, m, n, longest_first)
    factor = fitted(problem, problem.flops / (PUBLISHED[length] * 1e12), inner, edge, **machine)
    said = {}
    for other in PUBLISHED:
        problem = Causal(other, 256, heads, m, n, longest_first)
        time = seconds(problem, inner, edge, factor=factor, **machine)
        said[str(other)] = problem.flops / time / 1e12
    steady = 4 * m * n * 256 * PUBLISHED_CORES * CLOCK / (factor * inner) / 1e12
    said |= dict.fromkeys(PUBLISHED_LONG, steady)
    return {
        "factor": round(factor, 3),
        "tflops": {name: round(value, 1) for name, value in said.items()},
        "error": {name: round(said[name] / value - 1, 3) for name, value in MEASURED.items()},
    }


def published_model(inner: float, edge: float) -> dict[str, Any]:
    """Return the fits to each published length, and how far other assumptions would be out."""

    def worst(heads: int, longest_first: bool) -> float:
        fit = fit_published(FITTED_LENGTH, inner, edge, heads=heads, longest_first=longest_first)
        return max(fit["error"].values(), key=abs)

    return {
        "published_tflops": MEASURED,
        "cycles": {"inner": round(inner), "edge": round(edge)},
        "fitted_length": FITTED_LENGTH,
        "assumed": list(ASSUMED),
        "fits": {
            str(length): fit_published(
                length, inner, edge, heads=PUBLISHED_HEADS, longest_first=False
            )
            for length in PUBLISHED
        },
        "other_assumptions": [
            {"heads": heads, "longest_first": order, "largest_error": worst(heads, order)}
            for heads in (6, 12, 24)
            for order in (False, True)
        ],
    }


def predictions(fits: dict[str, Any], nvdisasm: str) -> list[dict[str, Any]]:
    """Return what the model says of our planned prefills on a whole V100.

    Args:
        fits: Those of the published kernel: the chosen one gives the figure, all of them its span.
    """
    from graphopt.lowering.cuda.issue_model import Causal, loop_path, round_cycles, seconds
    from graphopt.runtime.volta import shared_bytes
    from graphopt.targets import get_target

    target = get_target("volta")
    sizes = {memory.name: memory.bytes for memory in target.memories}
    assert target.cores and target.bandwidth and sizes["shared"] and sizes["registers"]
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        _, constants = planned(size)
        listing, used = compiled(constants, nvdisasm)
        warps = constants["WARPS"]
        # Registers are given out to a warp by 256, that is 8 a thread.
        registers = -(-used.registers // 8) * 8 * 4 * 32 * warps
        blocks = min(sizes["shared"] // shared_bytes(constants), sizes["registers"] // registers)
        inner, edge = (
            round_cycles(loop_path(listing, edge=masked), warps=warps, blocks=blocks)
            for masked in (False, True)
        )
        speeds, spans = {}, {}
        for length in LENGTHS:
            tiles = constants["BLOCK_M"], constants["BLOCK_N"]
            problem = Causal(length, size, HEADS, *tiles, longest_first=True)
            found = {
                name: problem.flops / 1e12 / seconds(
                    problem, inner, edge, cores=target.cores, bandwidth=target.bandwidth,
                    blocks=blocks, factor=fit["factor"],
                )
                for name, fit in fits.items()
            }  # fmt: skip
            speeds[str(length)] = round(found[str(FITTED_LENGTH)], 1)
            spans[str(length)] = [round(min(found.values()), 1), round(max(found.values()), 1)]
        rows.append(
            {
                "head_dim": size,
                "heads": HEADS,
                "blocks_a_core": blocks,
                "cycles": {"inner": round(inner), "edge": round(edge)},
                "tflops": speeds,
                "span": spans,
            }
        )
    return rows


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    head = ("kernel", "tile", "HMMA", "regs", "spill B", "STS.U16", "smem")
    print("{:24} {:>12} {:>5} {:>5} {:>8} {:>8} {:>7}".format(*head))
    for row in result["ours"]:
        print_row(f"ours, {row['phase']} {row['head_dim']}", row)
    for row in result["triton"]:
        print_row(f"Triton {VERSION}, {row['form']}", row)
    model = result["model"]
    print("\ncausal TFLOP/s of the published kernel, and the model fitted to one length at a time")
    print(f"{'published':24}", *(f"{n}: {x}" for n, x in model["published_tflops"].items()))
    for length, fit in model["fits"].items():
        name = f"fitted to {length}, x {fit['factor']}"
        said = (f"{n}: {x} ({fit['error'][n]:+.0%})" for n, x in fit["tflops"].items())
        print(f"{name:24}", *said)
    print("\nthe largest error, fitted to the same length, had the unknown been otherwise")
    for row in model["other_assumptions"]:
        order = "longest first" if row["longest_first"] else "in order"
        print(f"{row['heads']} heads, {order}: {row['largest_error']:+.0%}")
    print("\ncausal TFLOP/s predicted for ours on 80 cores, never measured")
    for row in result["predicted"]:
        name = f"D {row['head_dim']}, {row['heads']} heads"
        said = (
            f"{n}: {x} ({' to '.join(map(str, row['span'][n]))})" for n, x in row["tflops"].items()
        )
        print(f"{name:24}", *said)


def print_row(name: str, row: dict[str, Any]) -> None:
    """Print a kernel's line."""
    tile = " x ".join(map(str, row["tile"]))
    print(
        f"{name:24} {tile:>12} {row['hmma']:5} {row['registers']:5} {row['spilled_bytes']:8} "
        f"{row['two_byte_stores']:8} {row['shared_bytes']:7}"
    )


def main() -> int:
    """Run the command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphopt"
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", type=Path, default=cache / f"triton-{VERSION}")
    parser.add_argument("--nvdisasm", help="of CUDA 12; otherwise one is looked for")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "volta.json")
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_triton(args.compile)
        return 0

    from graphopt.errors import GraphoptError
    from graphopt.lowering.cuda import nvrtc_version
    from graphopt.lowering.cuda.sass import find_nvdisasm

    programs = install(args.triton)
    try:
        given = [args.nvdisasm] if args.nvdisasm else []
        nvdisasm = find_nvdisasm(*given, str(programs / "nvdisasm"))
        ours = [our_row(size, phase, nvdisasm) for phase in ("prefill", "decode") for size in SIZES]
        model = published_model(*published_rounds(nvdisasm))
        predicted = predictions(model["fits"], nvdisasm)
        version = ".".join(map(str, nvrtc_version(12)))
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {
        "command": "python tools/check_volta.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, no GPU: compiled for sm_70",
        "python": platform.python_version(),
        "versions": {"nvrtc": version, "triton": VERSION},
        "ours": ours,
        "triton": triton_rows(args.triton, programs, nvdisasm),
        "model": model,
        "predicted": predicted,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    wrong = [text for row in ours for text in faults(row)]
    wrong += [
        f"Triton, {row['form']} has no {INSTRUCTION}"
        for row in result["triton"]
        if not row["matrix_instructions_ptx"]
    ]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
