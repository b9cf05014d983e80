"""Compile the Triton attention for Volta with Triton 3.1.0, the last that uses its tensor cores.

    python tools/check_volta_triton.py [--triton DIR] [--out benchmarks/volta_triton.json]

Later releases compile for sm_70 with plain multiplications, or not at all. Triton 3.1.0 is put
into a folder of its own, once, and needs no GPU to compile: every form is brought to machine code
for sm_70, and its `mma.sync.m8n8k4` are counted. Nothing is run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "runtime" / "kernels"
VERSION = "3.1.0"
INSTRUCTION = "mma.sync.aligned.m8n8k4"

PLAIN: dict[str, Any] = {
    "HEAD_DIM": 64, "VALUE_DIM": 64, "D0": 64, "D1": 0, "V0": 64, "V1": 0, "GROUP": 1,
    "BLOCK_M": 64, "BLOCK_N": 64, "CAUSAL": True, "TOP_LEFT": False, "WINDOW": 0, "CHUNK": 0,
    "SOFTCAP": 0.0, "KEY_MASK": False, "BIAS": False, "ALIBI": False, "SINKS": False,
    "VARLEN": False, "LENGTHS": False, "RING": 0, "PAGE": 0, "SELECTED": False, "LSE": False,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "D 32": {"HEAD_DIM": 32, "VALUE_DIM": 32, "D0": 32, "V0": 32},
    "D 80": {"HEAD_DIM": 80, "VALUE_DIM": 80, "D1": 16, "V1": 16},
    "D 128": {"HEAD_DIM": 128, "VALUE_DIM": 128, "D0": 128, "V0": 128},
    "full": {"CAUSAL": False},
    "window": {"WINDOW": 100},
    "softcap": {"SOFTCAP": 2.0},
    "key mask": {"KEY_MASK": True, "LSE": True},
    "alibi": {"ALIBI": True},
    "bias": {"BIAS": True, "CAUSAL": False},
    "sinks": {"SINKS": True, "LENGTHS": True},
    "varlen": {"VARLEN": True},
    "paged": {"PAGE": 64, "LENGTHS": True},
    "ring": {"RING": 100, "LENGTHS": True},
}
_FLOATS = ("lse_ptr", "slopes_ptr", "sinks_ptr")
_HALVES = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "bias_ptr")


def kind(name: str) -> str:
    """Return the type of an argument of the kernel, as Triton writes it."""
    if name.endswith("_ptr"):
        if name == "mask_ptr":
            return "*i8"
        return "*fp16" if name in _HALVES else "*fp32" if name in _FLOATS else "*i32"
    return "fp32" if name == "scale" else "i32"


def compile_all() -> list[dict[str, Any]]:
    """Compile every form with the Triton that is imported here."""
    import triton
    from prefill import attention_prefill
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.__version__ != VERSION:
        sys.exit(f"this is Triton {triton.__version__}, not {VERSION}: give another --triton")
    rows: list[dict[str, Any]] = []
    for name, fields in FORMS.items():
        constants = {**PLAIN, **fields}
        names = [n for n in attention_prefill.arg_names if n not in constants]
        source = ASTSource(attention_prefill, {n: kind(n) for n in names}, constants)
        start = time.perf_counter()
        made = triton.compile(
            source,
            target=GPUTarget("cuda", 70, 32),
            options={"num_warps": 4, "num_stages": 2},
        )
        rows.append(
            {
                "form": name,
                "matrix_instructions": made.asm["ptx"].count(INSTRUCTION),
                "shared_bytes": made.metadata.shared,
                "cubin_bytes": len(made.asm["cubin"]),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    return rows


def install(folder: Path) -> None:
    """Put Triton 3.1.0 into the folder, unless it is there."""
    if (folder / "triton").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"triton=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"Triton {VERSION} cannot be installed for Python {platform.python_version()}: "
            f"use 3.11 or 3.12.\n{done.stderr[-500:]}"
        )


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphopt"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", type=Path, default=cache / f"triton-{VERSION}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "volta_triton.json")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(compile_all()))
        return
    install(args.triton)
    path = os.pathsep.join([str(args.triton), str(KERNELS)])
    done = subprocess.run(
        [sys.executable, __file__, "--compile"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"Triton {VERSION} does not compile the kernel:\n{done.stderr[-2000:]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    result = {
        "command": "python tools/check_volta_triton.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, no GPU: compiled for sm_70",
        "python": platform.python_version(),
        "versions": {"triton": VERSION},
        "forms": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['form']:10} {row['matrix_instructions']:4} {INSTRUCTION}")
    if not all(row["matrix_instructions"] for row in rows):
        sys.exit("a form has no matrix instruction")


if __name__ == "__main__":
    main()
