"""Compare every attention kernel with fp64 on descriptions drawn at random.

    python tools/sweep_attention.py --seed 1 --count 600 --out benchmarks/attention_sweep.json
    python tools/sweep_attention.py --seed 1 --count 60 --sanitizer     # compute-sanitizer memcheck
    python tools/sweep_attention.py --seed 1 --count 600 --only 17      # one of them, here

Description number N hangs on the seed, on N and on which kernels are asked for. They run in
processes of their own, since an illegal access ends all that follow: one that crashes, hangs or
finds its GPU unusable is noted and started anew. What is drawn: `tests/attention_sweep.py`; how far
off a result may be: `judge` of `tests/attention_verdict.py`, with the derivation.

The Ampere kernel is compiled for sm_80 and its PTX given to the driver, as in
`tools/bench_attention.py`; Volta's PTX likewise (NVRTC of CUDA 12 compiles it). Where there is no
GPU the Triton kernels run by the interpreter, on short sequences and in f16; Ascend's do so
everywhere. What cannot run here is counted, with the reason.

The exit code is 1 where a result is beyond what is allowed, a description refused, a process lost.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

PATIENCE = 180
"""Seconds after which a process that answers nothing is ended."""
AT_ONCE = 5
"""Descriptions of a process under the sanitizer."""


def answer(drawn: Any) -> tuple[dict[str, Any], bool]:
    """Return the row of a description, and whether this process can go on."""
    from attention_verdict import run

    from graphopt.errors import GraphoptError

    try:
        return run(drawn), True
    except GraphoptError as error:
        return {"verdict": "refused", "why": str(error)}, True
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        return {"verdict": "crash", "why": text}, not usable_no_more()


def usable_no_more() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(8, device="cuda").sum().item()
    except Exception:
        return True
    return False


def work() -> None:
    """Answer descriptions from standard input, a line each, until there are no more."""
    from attention_sweep import Drawn

    for line in sys.stdin:
        row, goes_on = answer(Drawn(**json.loads(line)))
        print(json.dumps(row), flush=True)
        if not goes_on:
            return


# The processes ------------------------------------------------------------------------------------


def environment(target: str, kernel: str) -> dict[str, str]:
    """Return the environment of a process that runs a kernel of a target."""
    from attention_sweep import kernel_is_interpreted

    found = dict(os.environ)
    if kernel_is_interpreted(kernel):
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif kernel == "triton":
        found["GRAPHOPT_SWEEP_TARGET"] = target
    return found


class Pool:
    """Processes that take descriptions of one kind, each started when it is first needed."""

    def __init__(self, processes: int, until: float) -> None:
        self.free = asyncio.Semaphore(processes)
        self.idle: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
        self.until = until

    async def row(self, drawn: Any) -> dict[str, Any]:
        async with self.free:
            if time.monotonic() > self.until:
                return {"verdict": "not run", "why": "no time was left"}
            kind = (drawn.target, drawn.kernel)
            process = self.idle[kind].pop() if self.idle[kind] else await self.start(kind)
            text = json.dumps(dataclasses.asdict(drawn)).encode() + b"\n"
            try:
                process.stdin.write(text)
                await process.stdin.drain()
                line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
            except TimeoutError:
                process.kill()
                return {"verdict": "crash", "why": f"no answer in {PATIENCE} s"}
            except (BrokenPipeError, ConnectionResetError):
                line = b""
            if not line:
                code = await process.wait()
                return {"verdict": "crash", "why": f"the process ended with {code}"}
            row = json.loads(line)
            if row["verdict"] == "crash":
                # It may have ended itself; one that has not is not trusted any more.
                if process.returncode is None:
                    process.kill()
            else:
                self.idle[kind].append(process)
            return dict(row)

    async def start(self, kind: tuple[str, str]) -> Any:
        others = [k for k, processes in self.idle.items() if processes]
        if others and sum(map(len, self.idle.values())) > 2 * len(self.idle):
            self.idle[others[0]].pop().kill()
        return await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", __file__, "--work", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=environment(*kind), limit=2**20,
        )  # fmt: skip

    async def end(self) -> None:
        for processes in self.idle.values():
            for process in processes:
                process.stdin.close()
                await process.wait()


async def sweep(drawn: list[Any], processes: int, seconds: float) -> list[dict[str, Any]]:
    """Return the row of every description."""
    pool = Pool(processes, time.monotonic() + seconds)

    async def one(index: int, each: Any) -> dict[str, Any]:
        row = await pool.row(each)
        if row["verdict"] not in ("right", "not run"):
            print(index, row["verdict"], row["why"], json.dumps(dataclasses.asdict(each)))
        return row

    rows = await asyncio.gather(*(one(*pair) for pair in enumerate(drawn)))
    await pool.end()
    return list(rows)


async def sanitized(drawn: list[Any], processes: int) -> list[dict[str, Any]]:
    """Return a row for every few descriptions that run under memcheck in one process."""
    free = asyncio.Semaphore(processes)
    by_kind: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
    for each in drawn:
        by_kind[each.target, each.kernel].append(each)

    async def some(kind: tuple[str, str], few: list[Any]) -> dict[str, Any]:
        text = "".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in few)
        # Freed memory goes back to the driver, which then knows every tensor's end.
        settings = {**environment(*kind), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
                   sys.executable, "-W", "ignore", __file__, "--work"]  # fmt: skip
        async with free:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env=settings,
            )  # fmt: skip
            said, _ = await process.communicate(text.encode())
        lines = said.decode(errors="replace").splitlines()
        verdicts = [json.loads(line)["verdict"] for line in lines if line.startswith("{")]
        clean = "ERROR SUMMARY: 0 errors" in said.decode(errors="replace")
        right = clean and process.returncode == 0 and verdicts == ["right"] * len(few)
        row = {"target": kind[0], "kernel": kind[1], "verdict": "right" if right else "wrong",
               "count": len(few), "verdicts": verdicts}  # fmt: skip
        if not right:
            row["said"] = [line for line in lines if not line.startswith("{")][:40]
            print(json.dumps(row), text)
        return row

    tasks = [
        some(kind, all_[i : i + AT_ONCE])
        for kind, all_ in by_kind.items()
        for i in range(0, len(all_), AT_ONCE)
    ]
    return list(await asyncio.gather(*tasks))


# The command --------------------------------------------------------------------------------------


def head(arguments: list[str]) -> dict[str, Any]:
    import torch

    names = ("torch", "triton", "numpy", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: interpreted"
    return {
        "command": " ".join(["python tools/sweep_attention.py", *arguments]),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def told(drawn: Any) -> dict[str, Any]:
    """Return a description without the fields that say that something is not."""
    whole = dataclasses.asdict(drawn)
    fields = {k: v for k, v in whole["fields"].items() if k == "causal" or v not in (None, False)}
    return {**whole, "fields": fields}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many of each kernel came to what, and the worst of what is right."""
    found = []
    for kind in dict.fromkeys((row["target"], row["kernel"]) for row in rows):
        mine = [row for row in rows if (row["target"], row["kernel"]) == kind]
        counts = collections.Counter(row["verdict"] for row in mine)
        right = [row for row in mine if row["verdict"] == "right"]
        found.append({
            "target": kind[0], "kernel": kind[1], **counts,
            "largest_part_used": max((row["used"] for row in right), default=None),
            "largest_error": max((row["error"] for row in right), default=None),
        })  # fmt: skip
    return found


def main() -> int:
    """Run the command line."""
    import torch
    from attention_sweep import KERNELS, kernel_is_interpreted, number

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=600, metavar="M", help="descriptions")
    parser.add_argument("--target", choices=sorted({t for t, _ in KERNELS}), help="one alone")
    parser.add_argument("--kernel", choices=sorted({k for _, k in KERNELS}), help="one alone")
    parser.add_argument("--only", type=int, metavar="N", help="run number N in this process")
    parser.add_argument("--sanitizer", action="store_true", help="run under compute-sanitizer")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--seconds", type=float, default=1e9, help="start none after that time")
    parser.add_argument("--out", type=Path, help="a file for all descriptions and verdicts")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        if "GRAPHOPT_SWEEP_TARGET" in os.environ:
            sys.path.insert(0, str(ROOT / "tools"))
            from bench_attention import compile_for

            compile_for(os.environ["GRAPHOPT_SWEEP_TARGET"])
        work()
        return 0
    here = torch.cuda.is_available()
    kinds = [
        (target, kernel) for target, kernel in KERNELS
        if args.target in (None, target) and args.kernel in (None, kernel)
        and not (args.sanitizer and kernel_is_interpreted(kernel))
    ]  # fmt: skip
    short = args.sanitizer or not here
    if args.only is not None:
        drawn = number(args.seed, args.only, kinds, short)
        os.environ |= environment(drawn.target, drawn.kernel)
        print(json.dumps(dataclasses.asdict(drawn)))
        row, _ = answer(drawn)
        print(json.dumps(row, indent=1))
        return 0 if row["verdict"] == "right" else 1
    drawn = [number(args.seed, index, kinds, short) for index in range(args.count)]
    if args.sanitizer:
        rows = asyncio.run(sanitized(drawn, args.processes))
        key = "sanitizer"
    else:
        found = asyncio.run(sweep(drawn, args.processes, args.seconds))
        rows = [{**told(d), **row} for d, row in zip(drawn, found, strict=True)]
        key = "rows"
    result = head(sys.argv[1:])
    if not args.sanitizer:
        result["summary"] = summary(rows)
        for line in result["summary"]:
            print(json.dumps(line))
    else:
        clean = sum(row["count"] for row in rows if row["verdict"] == "right")
        result["clean"] = clean
        print(f"{clean} of {len(drawn)} clean")
    if args.out:
        text = json.dumps({**result, key: rows}, indent=None).replace('}, {"', '},\n {"')
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row["verdict"] in ("right", "not run") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
