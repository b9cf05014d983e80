"""Compile the Ascend kernels for a 910B without one, and hold the planner to the compiler.

    python tools/check_ascend.py [--venv DIR] [--shapes N] [--decodes N] [--runs N] [--out FILE]
    python tools/check_ascend.py --sums [--venv DIR] [--out FILE]

Shapes are drawn with a fixed seed. Each goes through triton-ascend to linalg and through
`bishengir-compile` to final HIVM for a 910B; whether it fits, and the bytes of unified buffer in
the compiler's memory report, are compared with the planner's. A second set is executed on this
machine: its linalg form is lowered with the same LLVM to a shared library, called once for every
program of the grid, and compared with attention in fp64. With `--sums` the kernel of linears that
two devices sum is compiled instead, with 48 sets of tiles.

triton-ascend takes the place of Triton, so it gets a virtual environment of its own, which is
made on the first run. What is not checked here: the object file (its compiler is closed), results
after the split over cube and vector cores, and speed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
KERNELS = REPOSITORY / "runtime" / "kernels"
# The kernels of a phase; each phase has a module, and the first kernel the module's name.
PHASES = {"prefill": ("ascend_prefill",), "decode": ("ascend_decode", "ascend_merge")}
SUM = "ascend_linear_all_reduce"
MODULES = {name: names[0] for names in (*PHASES.values(), (SUM,)) for name in names}
PACKAGES = {
    "torch": "2.13.0",
    "triton-ascend": "3.2.0",
    "ascendnpu-ir": "1.2.0",
    # Imported by triton-ascend and not declared.
    "pybind11": "",
    # Its interpreter and its driver stub use what numpy 2 took away.
    "numpy": "1.26.4",
}
LLVM = "/usr/lib/llvm-19"
SEED = 1
CHIP = "Ascend910B4"
# As triton-ascend's own backend calls it. The memory report is written by two threads at once
# and crashes now and then, hence without threads.
FLAGS = (
    f"--target={CHIP}", "--enable-auto-multi-buffer=True", "--enable-auto-bind-sub-block=True",
    "--enable-hfusion-compile=true", "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true", "--enable-memory-display", "--mlir-disable-threading",
)  # fmt: skip
LOWERING = (
    "--convert-elementwise-to-linalg", "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true", "--convert-bufferization-to-memref",
    "--annotation-lowering", "--expand-strided-metadata", "--convert-linalg-to-loops",
    "--lower-affine", "--convert-scf-to-cf", "--arith-expand", "--convert-vector-to-llvm",
    "--convert-math-to-llvm", "--convert-math-to-libm", "--finalize-memref-to-llvm",
    "--convert-func-to-llvm", "--convert-cf-to-llvm", "--convert-index-to-llvm",
    "--convert-arith-to-llvm", "--lower-affine", "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
)  # fmt: skip
POINTERS = {
    "lse_ptr": "*fp32", "table_ptr": "*fp16", "mask_ptr": "*i8", "sinks_ptr": "*fp32",
    "kv_lens_ptr": "*i32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32",
}  # fmt: skip


class Missing(Exception):
    """A tool is not here; the message says which, and what to install."""


def default_venv() -> Path:
    """Return where the separate environment lies if no folder is given."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "graphopt" / "ascend-venv"


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


def is_ready(venv: Path) -> bool:
    """Return whether the environment has been made, by the mark left behind at its end."""
    mark = venv / "graphopt-ascend.json"
    return mark.is_file() and json.loads(mark.read_text()) == PACKAGES


def prepare(venv: Path) -> None:
    """Make the environment with triton-ascend and ascendnpu-ir, unless it is there.

    Raises:
        Missing: The machine is not one they are built for, or they could not be installed.
    """
    if is_ready(venv):
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Missing(
            f"ascendnpu-ir has no build for {sys.platform} on {platform.machine()}: run this on "
            "Linux on x86-64."
        )
    print(f"making {venv}", file=sys.stderr)
    wanted = [f"{name}=={version}" if version else name for name, version in PACKAGES.items()]
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(venv_python(venv)), "-m", "pip", "install", "-q", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Missing(
                f"{' '.join(command)} failed: {done.stderr.strip()[-600:]}\nInstall these by hand "
                f"into {venv}, or give another folder by --venv."
            )
    (venv / "graphopt-ascend.json").write_text(json.dumps(PACKAGES))


def compiler(venv: Path, name: str) -> Path:
    """Return the path of a binary of ascendnpu-ir.

    Raises:
        Missing: It is not in the environment.
    """
    for found in venv.glob(f"lib/python*/site-packages/ascendnpuir/bin/{name}"):
        return found
    raise Missing(
        f"{name} is not in {venv}: remove that folder and run this again, which installs it."
    )


def native_tools() -> dict[str, str]:
    """Return what builds and links for this machine.

    Raises:
        Missing: LLVM 19's tools or a C compiler are not installed.
    """
    tools: dict[str, str | None] = {
        "mlir-translate": shutil.which("mlir-translate", path=f"{LLVM}/bin"),
        "llc": shutil.which("llc", path=f"{LLVM}/bin"),
        "cc": shutil.which("gcc") or shutil.which("cc"),
        "runtime": next(
            (str(path) for path in Path(LLVM, "lib").glob("libmlir_c_runner_utils.so*")), None
        ),
    }
    absent = [name for name, path in tools.items() if path is None]
    if absent:
        raise Missing(
            f"{', '.join(absent)} not found (looked in {LLVM} and on the path): "
            "apt-get install mlir-19-tools llvm-19 libmlir-19 gcc."
        )
    return {name: path for name, path in tools.items() if path is not None}


# --- In the separate environment: this file is run there, and imports nothing of graphopt. ---


def emit_linalg(requests: list[dict[str, Any]], folder: Path) -> None:
    """Write the linalg form of each request as `folder`/N.mlir, by triton-ascend."""
    import importlib
    import types

    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    # The kernels' package, without the packages around it: those import what is not here.
    for name in ("graphopt", "graphopt.runtime", "graphopt.runtime.kernels"):
        package = types.ModuleType(name)
        package.__path__ = [str(KERNELS)]
        sys.modules[name] = package
    target = GPUTarget("npu", CHIP, 0)
    backend = make_backend(target)
    for number, request in enumerate(requests):
        module = importlib.import_module(f"graphopt.runtime.kernels.{MODULES[request['kernel']]}")
        kernel = getattr(module, request["kernel"])
        constants = {n: v for n, v in request["constants"].items() if n in kernel.arg_names}
        element = {"f16": "*fp16", "bf16": "*bf16"}[request["dtype"]]
        signature = {
            name: POINTERS.get(name, element)
            if name.endswith("_ptr")
            else ("fp32" if name == "scale" else "i32")
            for name in kernel.arg_names
            if name not in constants
        }
        source = ASTSource(kernel, signature, constants)
        options = backend.parse_options({})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module_ir = source.make_ir(
            options, backend.get_codegen_implementation(), backend.get_module_map(), context
        )
        metadata = {"target": target, **options.__dict__, "hash": "graphopt"}
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options)
        text = stages["ttadapter"](stages["ttir"](module_ir, metadata), metadata)
        (folder / f"{number}.mlir").write_text(text)


# --- In graphopt's environment. ---


def linalg(venv: Path, requests: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Return the files of the requests' linalg forms."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [str(venv_python(venv)), str(Path(__file__).resolve()), "--emit", str(folder)]
    # torch would load its NPU backend, which needs CANN.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": ""}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"triton-ascend failed:\n{done.stderr[-3000:]}")
    return [folder / f"{number}.mlir" for number in range(len(requests))]


def to_hivm(venv: Path, source: Path, folder: Path) -> dict[str, Any]:
    """Compile a linalg file to final HIVM; return the verdict and the compiler's figures.

    `fits`; `overflow`: memory -> bits it would take; `ub_bytes`: the end of the last buffer of
    the unified buffer in the memory report; `failure`: the first error where nothing overflowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The last step hands the HIVM to a closed compiler: a stand-in lets the others end well.
    stub = folder / "bin" / "hivmc"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(compiler(venv, "bishengir-compile")), str(source), *FLAGS,
         f"--save-temps={folder / 'out'}", "-o", str(folder / "kernel")],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    overflow = {
        scope.lower(): int(bits)
        for scope, bits in re.findall(r"(\w+) overflow, requires (\d+) bits", done.stderr)
    }
    hivm = folder / "out" / "module.hivm.opt.mlir"
    result: dict[str, Any] = {"fits": done.returncode == 0 and hivm.is_file(), "overflow": overflow}
    if not result["fits"] and not overflow:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        telling = [line for line in errors if "Failed to run" not in line] or errors
        said = telling[0].split("error:")[-1].strip() if telling else f"exit {done.returncode}"
        result["failure"] = said
    report = folder / "memory_info_aiv.json"
    if result["fits"] and report.is_file():  # there is none where vector cores have nothing to do
        result["ub_bytes"] = _reported(report, "ub")
    elif "ub" in overflow:
        result["ub_bytes"] = overflow["ub"] // 8
    return result


def _reported(path: Path, scope: str) -> int:
    records = json.loads(path.read_text())["Record"]
    buffers = [b for r in records if r["scope"] == scope for b in r["memory_info_array"]]
    return max(offset + b["extent"] // 8 for b in buffers for offset in b["offset"])


def two_levels(venv: Path, folder: Path) -> list[dict[str, int]]:
    """Return what a round costs in final HIVM for larger and larger BLOCK_KV, all else equal.

    Counted in the cube core's loop of whole rounds: signals to the vector cores, and products
    written out to memory.
    """
    rows = []
    fields = {"head_dim": 128, "heads": 1, "kv_heads": 1, "dtype": "f16", "causal": False}
    sizes = (128, 256, 512)
    tiles = [{"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_KV": size} for size in sizes]
    requests = [
        {"kernel": "ascend_prefill", "constants": planned(fields, given)[0], "dtype": "f16"}
        for given in tiles
    ]
    files = linalg(venv, requests, folder / "levels")
    for size, file in zip(sizes, files, strict=True):
        place = folder / f"levels{size}"
        found = to_hivm(venv, file, place)
        if not found["fits"]:
            raise RuntimeError(f"BLOCK_KV={size} did not compile: {found}")
        text = (place / "out" / "module.hivm.opt.mlir").read_text()
        body = _first_round(text)
        rows.append(
            {
                "BLOCK_N": 128,
                "BLOCK_KV": size,
                "signals_a_round": body.count("sync_block_set"),
                "products_written_a_round": body.count("fixpipe"),
            }
        )
        shutil.rmtree(place, ignore_errors=True)
    return rows


def _first_round(hivm: str) -> str:
    """Return the innermost loops of the first loop over keys; each runs once a round."""
    lines = hivm.splitlines()
    for start, line in enumerate(lines):
        if "scf.for" not in line or not re.search(r"step %c\d+_i32", line):
            continue
        indent = len(line) - len(line.lstrip())
        end = next(
            i for i in range(start + 1, len(lines)) if lines[i].startswith(" " * indent + "}")
        )
        body = "\n".join(lines[start:end])
        if "sync_block_set" in body and "fixpipe" in body:
            return body
    raise RuntimeError("there is no loop over keys in the compiled kernel")


# Rows of tiles that are drawn.
ROWS = {"prefill": [32, 64, 128, 128, 256, 256], "decode": [16, 32, 128, 256, 256]}


def draw_shapes(count: int, seed: int = SEED, phase: str = "prefill") -> list[dict[str, Any]]:
    """Return attentions and tiles, drawn with a fixed seed; some 40 % ask for too much."""
    generator = random.Random(seed)
    drawn = []
    for _ in range(count):
        head = generator.choice([32, 64, 80, 96, 128, 128, 192, 256])
        tiles = {
            "BLOCK_M": generator.choice(ROWS[phase]),
            "BLOCK_N": generator.choice([32, 64, 128, 256, 256, 512]),
        }
        tiles["BLOCK_KV"] = tiles["BLOCK_N"] * generator.choice([1, 2, 4])
        fields = {
            "head_dim": head,
            "value_dim": head if generator.random() < 0.8 else generator.choice([32, 64, 128]),
            "heads": 4,
            "kv_heads": generator.choice([1, 2, 4]),
            "dtype": "bf16" if generator.random() < 0.25 else "f16",
            "causal": generator.random() < 0.7,
            "align": "top-left" if generator.random() < 0.2 else "bottom-right",
            "window": 512 if generator.random() < 0.3 else None,
            "softcap": 30.0 if generator.random() < 0.25 else None,
            "padding_mask": generator.random() < 0.25,
            "sinks": generator.random() < 0.2,
            "kv_lens": generator.random() < 0.2,
            "lse": generator.random() < 0.3,
            "phase": phase,
        }
        if phase == "decode":
            fields["heads"] = fields["kv_heads"] * generator.choice([1, 3, 4, 8])
            tiles["SPLITS"] = generator.choice([16, 32, 64, 64])
        drawn.append({"fields": fields, "tiles": tiles})
    return drawn


def planned(fields: dict[str, Any], tiles: dict[str, int]) -> tuple[dict[str, Any], Any]:
    """Return the kernel's constants for tiles that were not chosen by the planner, and the plan."""
    from graphopt.lowering.kernels.ascend_triton import ascend_constants
    from graphopt.plan import AttentionPlan, AttentionSpec
    from graphopt.plan.ascend import AscendPlanner
    from graphopt.targets import get_target

    planner, target, spec = AscendPlanner(), get_target("ascend910b"), AttentionSpec(**fields)
    whole = planner.complete(spec, tiles)
    plan = AttentionPlan(
        spec, target.name, planner.kernel, whole,
        tuple(planner.inequalities(spec, target, whole)), "given",
    )  # fmt: skip
    return ascend_constants(plan), plan


def compare(venv: Path, shapes: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return, for each shape, the planner's and the compiler's verdict and unified buffer.

    A decode's shape fits where both its kernels do; the merge's figures begin with `merge_`.
    """
    from graphopt.plan.ascend import merge_buffer, unified_buffer
    from graphopt.targets import get_target

    memories = {memory.name: memory.bytes for memory in get_target("ascend910b").memories}
    capacity = memories["UB"]
    assert capacity is not None
    plans = [planned(shape["fields"], shape["tiles"]) for shape in shapes]
    requests = [
        {"kernel": kernel, "constants": constants, "dtype": plan.spec.dtype}
        for constants, plan in plans
        for kernel in PHASES[plan.spec.phase]
    ]
    rows = []
    files = iter(linalg(venv, requests, folder / "linalg"))
    for number, (_, plan) in enumerate(plans):
        found = {}
        for kernel in PHASES[plan.spec.phase]:
            place = folder / f"hivm{number}"
            found[kernel] = to_hivm(venv, next(files), place)
            shutil.rmtree(place, ignore_errors=True)
        fits = all(each["fits"] for each in found.values())
        broken = [i.name for i in plan.inequalities if not i.holds]
        row = {
            **shapes[number],
            "planner_fits": not broken,
            "compiler_fits": fits,
            "agree": fits == (not broken),
            "planner_broken": broken,
        }
        for kernel, each in found.items():
            merges = kernel == "ascend_merge"
            buffer = merge_buffer(plan.tiles) if merges else unified_buffer(plan.spec, plan.tiles)
            figures = {"compiler_overflow_bits": each["overflow"]}
            figures |= {key: each[key] for key in ("failure",) if key in each}
            if "ub_bytes" in each:
                ours = buffer.reported(capacity)
                figures |= {
                    "compiler_ub_bytes": each["ub_bytes"],
                    "planner_ub_bytes": ours,
                    "ub_error": round(ours / each["ub_bytes"] - 1, 4),
                }
            row |= {f"merge_{key}" if merges else key: value for key, value in figures.items()}
        rows.append(row)
        mark = "agree" if row["agree"] else "DIFFER"
        print(f"{number + 1}/{len(shapes)} {mark} {row}", file=sys.stderr)
    return rows


SUM_TILES = [
    (m, n, k)
    for m in (32, 64, 128, 256) for n in (64, 128, 256, 512) for k in (64, 256, 512)
]  # fmt: skip


def compare_sums(
    venv: Path, tiles: list[tuple[int, int, int]], folder: Path
) -> list[dict[str, Any]]:
    """Return, for tiles of a linear summed over devices, the planner's and the compiler's verdict.

    Both of what a rank sums and of what it does not, which is a kernel of its own.
    """
    from graphopt.plan.ascend_sums import sum_inequalities
    from graphopt.targets import get_target

    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    given = [dict(zip(names, sizes, strict=True)) for sizes in tiles]
    requests = [
        {"kernel": SUM, "constants": {**sizes, "ADD": add}, "dtype": "f16"}
        for sizes in given for add in (False, True)
    ]  # fmt: skip
    rows = []
    files = iter(linalg(venv, requests, folder / "sums"))
    for number, sizes in enumerate(given):
        found = []
        for add in (False, True):
            place = folder / f"sum{number}{add}"
            found.append(to_hivm(venv, next(files), place))
            shutil.rmtree(place, ignore_errors=True)
        limits = sum_inequalities(get_target("ascend910b"), sizes, "f16")
        broken = [inequality.name for inequality in limits if not inequality.holds]
        fits = all(each["fits"] for each in found)
        buffer = next(i.value for i in limits if i.name == "unified buffer")
        row = {
            **sizes, "planner_fits": not broken, "compiler_fits": fits,
            "agree": fits == (not broken), "planner_broken": broken,
            "compiler_overflow_bits": found[1]["overflow"] or found[0]["overflow"],
            "planner_ub_bytes": buffer,
        }  # fmt: skip
        row |= {"compiler_ub_bytes": found[1]["ub_bytes"]} if "ub_bytes" in found[1] else {}
        rows.append(row)
        print(f"sum {number + 1}/{len(given)} {row}", file=sys.stderr)
    return rows


RUNS: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    # Fields; then B, H, G, S, T, D, Dv.
    ({}, (1, 2, 1, 128, 128, 64, 64)),
    ({}, (1, 2, 2, 65, 65, 128, 128)),
    ({"causal": False}, (1, 2, 1, 33, 127, 32, 32)),
    ({}, (2, 2, 1, 33, 300, 64, 64)),
    ({}, (1, 2, 1, 100, 40, 64, 64)),
    ({"align": "top-left"}, (1, 2, 1, 65, 127, 64, 64)),
    ({"window": 50}, (1, 2, 1, 200, 200, 64, 64)),
    ({"window": 9, "align": "top-left", "causal": False}, (1, 2, 1, 65, 65, 64, 64)),
    ({"softcap": 2.0}, (1, 2, 1, 65, 65, 96, 96)),
    ({"padding_mask": True}, (3, 2, 1, 65, 65, 64, 64)),
    ({"sinks": True, "kv_lens": True}, (2, 2, 1, 40, 90, 80, 48)),
    ({"window": 30, "softcap": 3.0, "padding_mask": True, "sinks": True, "kv_lens": True},
     (2, 4, 2, 65, 127, 192, 192)),
    ({}, (1, 1, 1, 65, 300, 256, 256)),
    ({"phase": "decode"}, (1, 8, 1, 1, 1000, 64, 64)),
    ({"phase": "decode"}, (2, 6, 2, 4, 65, 128, 128)),
    ({"phase": "decode"}, (1, 4, 1, 4, 1, 32, 32)),
    ({"phase": "decode", "window": 50, "padding_mask": True}, (3, 8, 2, 4, 300, 64, 64)),
    ({"phase": "decode", "window": 9, "align": "top-left", "causal": False},
     (1, 2, 2, 4, 64, 64, 64)),
    ({"phase": "decode", "softcap": 3.0, "sinks": True, "kv_lens": True},
     (2, 8, 1, 4, 700, 80, 48)),
)  # fmt: skip
RUN_TILES = {
    "prefill": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_KV": 128},
    "decode": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_KV": 128, "SPLITS": 16},
}


def execute(
    venv: Path, runs: list[tuple[dict[str, Any], tuple[int, ...]]], folder: Path
) -> list[dict[str, Any]]:
    """Execute the linalg form of each run on this machine; return the errors against fp64."""
    tools = native_tools()
    opt = compiler(venv, "bishengir-opt")
    requests, cases = [], []
    for fields, (batch, heads, groups, queries, keys, size, values) in runs:
        whole = {
            "head_dim": size, "value_dim": values, "heads": heads, "kv_heads": groups, "lse": True,
            **fields,
        }  # fmt: skip
        phase = fields.get("phase", "prefill")
        constants, plan = planned(whole, RUN_TILES[phase])
        requests += [
            {"kernel": kernel, "constants": constants, "dtype": plan.spec.dtype}
            for kernel in PHASES[phase]
        ]
        cases.append((constants, fields, (batch, heads, groups, queries, keys, size, values)))
    rows = []
    files = iter(linalg(venv, requests, folder / "run"))
    for number, (constants, fields, sizes) in enumerate(cases):
        libraries = {
            kernel: str(_library(opt, tools, next(files)))
            for kernel in PHASES[fields.get("phase", "prefill")]
        }
        # In a process of its own: a wrong address would end this one.
        request = folder / "run" / f"{number}.run.json"
        request.write_text(json.dumps([libraries, constants, fields, list(sizes)]))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--call", str(request)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the executed kernel failed:\n{done.stderr[-2000:]}")
        row = {"fields": fields, "sizes": list(sizes), **json.loads(done.stdout)}
        print(f"x86 {row}", file=sys.stderr)
        rows.append(row)
    return rows


def _library(opt: Path, tools: dict[str, str], file: Path) -> Path:
    """Return the shared library that a linalg file becomes on this machine."""
    lowered, text, item, library = (
        file.with_suffix(suffix) for suffix in (".llvm.mlir", ".ll", ".o", ".so")
    )
    for command in (
        [str(opt), str(file), *LOWERING, "-o", str(lowered)],
        [tools["mlir-translate"], "--mlir-to-llvmir", str(lowered), "-o", str(text)],
        [tools["llc"], "-O2", "-filetype=obj", "-relocation-model=pic", str(text),
         "-o", str(item)],
        [tools["cc"], "-shared", str(item), "-o", str(library), "-lm", tools["runtime"],
         f"-Wl,-rpath,{Path(tools['runtime']).parent}"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return library


class _Call:
    """Stands in for a Triton kernel: a launch calls the library for each program of the grid."""

    def __init__(self, kernel: str, library: str) -> None:
        text = (KERNELS / f"{MODULES[kernel]}.py").read_text()
        names = re.search(rf"def {kernel}\((.*?)\):", text, re.S)
        assert names is not None
        body = re.sub(r"#.*", "", names.group(1))
        self.arg_names = [part.split(":")[0].strip() for part in body.split(",") if part.strip()]
        self.constants = set(re.findall(r"(\w+): tl\.constexpr", body))
        self._function = getattr(ctypes.CDLL(library), kernel)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def memref(tensor: Any) -> list[Any]:
            address = ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
            size = 0 if tensor is None else tensor.untyped_storage().nbytes()
            return [address, address, *(ctypes.c_int64(i) for i in (0, size, 1))]

        def call(**given: Any) -> None:
            fixed = [*memref(None), *memref(None)]  # lock, workspace
            for name in self.arg_names:
                if name.endswith("_ptr"):
                    fixed += memref(given[name])
                elif name == "scale":
                    fixed.append(ctypes.c_float(given[name]))
                elif name not in self.constants:
                    fixed.append(ctypes.c_int32(given[name]))
            for program in range(grid[0]):
                places = (grid[0], 1, 1, program, 0, 0)
                self._function(*fixed, *(ctypes.c_int32(place) for place in places))

        return call


def call_library(request: Path) -> dict[str, Any]:
    """Run one compiled case and return its largest errors against fp64."""
    import torch

    sys.path.insert(0, str(REPOSITORY / "tests"))
    from attention_reference import random_case

    from graphopt.runtime.ascend import decode, prefill
    from graphopt.runtime.attention import Extras, Keys

    libraries, constants, fields, sizes = json.loads(request.read_text())
    case = random_case(tuple(sizes), fields, seed=1)
    run = decode if fields.get("phase") == "decode" else prefill
    out, lse = run(
        *(_Call(*each) for each in libraries.items()),
        case.q, Keys(case.k, case.v, kv_lens=case.kv_lens), constants,
        scale=case.scale, extras=Extras(mask=case.mask, sinks=case.sinks), programs=3,
    )  # fmt: skip
    exact, expected = case.run(torch.float64)
    assert lse is not None
    finite = torch.isfinite(expected)
    same = bool((torch.isfinite(lse) == finite).all())
    _, bound = case.bound()
    return {
        "max_error": (out.double() - exact).abs().max().item(),
        "bound": bound,
        "max_relative_error": ((out.double() - exact).abs() / exact.abs().clamp_min(1))
        .max()
        .item(),
        "lse_error": (lse.double() - expected)[finite].abs().max().item(),
        "unseen_rows_agree": same,
    }


def summarise(shapes: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the figures of one phase come to."""

    def errors(fits: bool) -> dict[str, Any]:
        # A memory that overflowed is named; a kernel that fits has a report.
        found = sorted(
            abs(row[f"{kernel}ub_error"])
            for row in shapes
            for kernel in ("", "merge_")
            if f"{kernel}ub_error" in row
            and ("ub" not in row[f"{kernel}compiler_overflow_bits"]) == fits
        )
        if not found:
            return {"figures": 0}
        return {
            "figures": len(found),
            "median": found[len(found) // 2],
            "max": found[-1],
            "within_20_percent": sum(error <= 0.2 for error in found),
        }

    return {
        "shapes": len(shapes),
        "do_not_fit": sum(not row["compiler_fits"] for row in shapes),
        "verdicts_agree": sum(row["agree"] for row in shapes) / max(len(shapes), 1),
        # Of the memory report, which there is for what fits; and of the overflow's message.
        "ub_error_of_report": errors(True),
        "ub_error_of_overflow": errors(False),
        "x86_runs": len(runs),
        "x86_max_error": max((row["max_relative_error"] for row in runs), default=None),
        "x86_within_bound": all(row["max_error"] <= row["bound"] for row in runs),
    }


def keep_sums(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write what `compare_sums` found, with what it comes to."""
    reported = [row for row in rows if "compiler_ub_bytes" in row]
    wrong = [row for row in reported if row["compiler_ub_bytes"] != row["planner_ub_bytes"]]
    result = {
        "command": "python tools/check_ascend.py --sums",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, no NPU: compiled for {CHIP}",
        "versions": {name: PACKAGES[name] for name in ("triton-ascend", "ascendnpu-ir")},
        "summary": {
            "tiles": len(rows),
            "do_not_fit": sum(not row["compiler_fits"] for row in rows),
            "verdicts_agree": sum(row["agree"] for row in rows),
            "unified_buffers_reported": len(reported),
            "unified_buffers_equal": len(reported) - len(wrong),
        },
        "tiles": rows,
    }
    _write(result, out or Path("benchmarks/ascend_sums.json"))


def _write(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=1))


def mask_bytes() -> dict[str, dict[str, int]]:
    """Return the memory of a causal mask, by a table and whole."""
    from graphopt.runtime.tiling_mask import table_bytes

    return {
        f"S={length // 1024}K": {
            "tiling_mask_fp16": table_bytes(256),
            "whole_mask_fp16": 2 * length * length,
        }
        for length in (1024, 4096, 16384, 65536)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=default_venv())
    parser.add_argument("--shapes", type=int, default=48, help="how many prefills are drawn")
    parser.add_argument("--decodes", type=int, default=32, help="how many decodes are drawn")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--runs", type=int, default=len(RUNS), help="how many are executed")
    parser.add_argument("--sums", action="store_true", help="linears summed over devices, alone")
    parser.add_argument("--out", type=Path, help="by default under benchmarks")
    parser.add_argument("--emit", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--call", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.emit:
        emit_linalg(json.loads((args.emit / "requests.json").read_text()), args.emit)
        return
    if args.call:
        print(json.dumps(call_library(args.call)))
        return
    if args.sums:
        try:
            prepare(args.venv)
            with tempfile.TemporaryDirectory(prefix="check-ascend-") as folder:
                keep_sums(compare_sums(args.venv, SUM_TILES, Path(folder)), args.out)
        except Missing as error:
            sys.exit(str(error))
        return
    try:
        if args.runs:
            native_tools()
        prepare(args.venv)
        with tempfile.TemporaryDirectory(prefix="check-ascend-") as folder:
            runs = execute(args.venv, list(RUNS[: args.runs]), Path(folder)) if args.runs else []
            levels = two_levels(args.venv, Path(folder))
            shapes = compare(args.venv, draw_shapes(args.shapes, args.seed), Path(folder))
            shapes += compare(
                args.venv, draw_shapes(args.decodes, args.seed, "decode"), Path(folder)
            )
    except Missing as error:
        sys.exit(str(error))
    result = {
        "command": "python tools/check_ascend.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, no NPU: compiled for {CHIP}, executed as linalg",
        "versions": {name: version for name, version in PACKAGES.items() if version}
        | {"llvm": "19.1.7"},
        "seed": args.seed,
        "summary": {
            phase: summarise(
                [row for row in shapes if row["fields"]["phase"] == phase],
                [row for row in runs if row["fields"].get("phase", "prefill") == phase],
            )
            for phase in PHASES
        },
        "mask_bytes": mask_bytes(),
        "two_levels": levels,
        "runs": runs,
        "shapes": shapes,
    }
    _write(result, args.out or Path("benchmarks/ascend.json"))


if __name__ == "__main__":
    main()
