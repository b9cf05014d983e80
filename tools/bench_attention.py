"""Measure the attention kernels on this GPU beside torch's own, or find the fastest tiles.

    python tools/bench_attention.py [--out benchmarks/attention.json]
    python tools/bench_attention.py --tune TARGET

Operations of a causal attention count half. Kernels for a target older than this GPU, such as
Ampere's, are compiled for that target and their PTX given to the driver, so that they run with the
older machine's instructions; what is measured then says how good the code is, and not how fast an
A100 runs it. `--tune` writes the table of tiles that the planner prefers,
`graphopt/targets/TARGET.tuned.json`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.runtime.attention import Keys
from graphopt.support.recorded import record
from graphopt.targets import all_targets, get_target

ROOT = Path(__file__).parents[1]
TOKENS, HIDDEN = 16384, 2048  # of a prefill, whatever the length of a sequence
LENGTHS = (1024, 2048, 4096, 8192, 16384)
CACHES = (8192, 32768, 131072)
ROUNDS = 3
PEERS = {"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PACKAGES = ("torch", "triton", "numpy")
Run = Callable[[], Any]


def milliseconds(run: Run) -> float:
    """Return the median time of a run, after some to warm up."""
    return float(triton.testing.do_bench(run, warmup=25, rep=60, return_mode="median"))


def rounds(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Return the times of every run in milliseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return times


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def prefill_operands(width: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (TOKENS // length, HIDDEN // width, length, width)
    return random(*shape), random(*shape), random(*shape)


def runner(
    plan: AttentionPlan, q: Tensor, keys: Keys, cache: dict[str, Any], **options: Any
) -> Run:
    """Return what runs a prefill by a plan, its kernel compiled once in `cache`."""
    scale = q.shape[3] ** -0.5
    # Plans that differ in nothing the kernel is made of share it.
    family = get_family(plan.kernel)
    made_of = f"{plan.kernel} {family.constants(plan)}"
    if made_of not in cache:
        cache[made_of] = family.load(plan)
    return lambda: cache[made_of](q, keys, scale=scale, **options)


def spec_of(q: Tensor, k: Tensor, **fields: Any) -> AttentionSpec:
    return AttentionSpec(
        head_dim=q.shape[3], heads=q.shape[1], kv_heads=k.shape[1], dtype="bf16", **fields
    )


def peer(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Run:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


# Prefill ------------------------------------------------------------------------------------------


def bench_prefill(target: str, with_peers: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for every head size, mask and length."""
    cache: dict[str, Any] = {}
    for width, causal, length in itertools.product((64, 128), (True, False), LENGTHS):
        q, k, v = prefill_operands(width, length)
        plan = plan_attention(spec_of(q, k, causal=causal), get_target(target))
        runs = {target: runner(plan, q, Keys(k, v), cache)}
        if with_peers:
            runs |= {n: peer(b, q, k, v, is_causal=causal) for n, b in PEERS.items()}
        operations = 4 * TOKENS * length * HIDDEN * (0.5 if causal else 1)
        for name, times in rounds(runs).items():
            row = {"kernel": name, "head_dim": width, "causal": causal, "length": length}
            speeds = [operations / time / 1e9 for time in times]
            row |= {"tflops": statistics.median(speeds), "milliseconds": times}
            yield row | ({"tiles": plan.tiles, "choice": plan.choice} if name == target else {})


def compile_for(target: str) -> None:
    """Make Triton compile for a target older than this GPU, and leave the rest to the driver.

    It holds for this process; for a target that this GPU is, nothing changes.
    """
    from triton.backends.nvidia.compiler import CUDABackend

    if get_target(target).compute_capability == torch.cuda.get_device_capability():
        return
    os.environ["TRITON_OVERRIDE_ARCH"] = get_target(target).isa.replace("_", "")
    CUDABackend.make_cubin = lambda self, src, *rest, **more: src.encode() + b"\0"


def rows_of_older(target: str, arguments: list[str]) -> Any:
    """Run this file in a process that compiles for a target, and return the JSON it writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *arguments, "--older", target, "--rows", str(path)]
        subprocess.run(command, check=True)
        return json.loads(path.read_text())


# Decode -------------------------------------------------------------------------------------------


def recorded(runs: list[Run]) -> tuple[Run, int]:
    """Return one CUDA graph of several runs, and how many they are."""

    def all_of_them() -> None:
        for run in runs:
            run()

    return record(all_of_them)[0].replay, len(runs)


def bench_decode(target: str) -> Iterator[dict[str, Any]]:
    """Yield rows for one token over caches of 32 query and 8 key heads of 128."""
    heads, groups, width = 32, 8, 128
    for length in CACHES:
        size = 2 * groups * length * width * 2
        # Several caches in turn, together larger than what stays on the chip.
        sets = max(2, 400_000_000 // size + 1)
        caches = [(random(1, groups, length, width), random(1, groups, length, width))
                  for _ in range(sets)]  # fmt: skip
        q = random(1, heads, 1, width)
        spec = spec_of(q, caches[0][0], phase="decode")
        plan = plan_attention(spec, get_target(target))
        kernel = get_family(plan.kernel).load(plan)

        def ours(k: Tensor, v: Tensor, q: Tensor = q, kernel: Any = kernel) -> Run:
            return lambda: kernel(q, Keys(k, v), scale=width**-0.5)

        runs = {target: [ours(k, v) for k, v in caches]}
        for name, backend in PEERS.items():
            runs[name] = [peer(backend, q, k, v, enable_gqa=True) for k, v in caches]
        graphs = {name: recorded(steps) for name, steps in runs.items()}
        for name, times in rounds({n: replay for n, (replay, _) in graphs.items()}).items():
            microseconds = [1000 * time / graphs[name][1] for time in times]
            median = statistics.median(microseconds)
            yield {"kernel": name, "keys": length, "microseconds": median,
                   "tb_per_s": size / median / 1e6, "all_microseconds": microseconds}  # fmt: skip


def copy_bandwidth() -> float:
    """Return bytes a second of a copy on the device, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1000


# Other forms --------------------------------------------------------------------------------------


def bench_forms(target: str) -> Iterator[dict[str, Any]]:
    """Yield rows for a cap, a window and sequences of unequal length, beside FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    cache: dict[str, Any] = {}
    cap, window = 30.0, 1024

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    def windowed(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < window)

    def capped(score: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        return cap * torch.tanh(score / cap)

    for width, length in itertools.product((64, 128), (4096, 16384)):
        q, k, v = prefill_operands(width, length)
        lengths = torch.randint(64, 2048, (64,), generator=torch.Generator().manual_seed(0))
        ends = lengths.cumsum(0)
        ends = torch.cat((torch.tensor([0]), ends[ends < TOKENS], torch.tensor([TOKENS])))
        document = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff()).cuda()

        def of_document(b: Any, h: Any, i: Any, j: Any, document: Tensor = document) -> Any:
            return (i >= j) & (document[i] == document[j])

        forms: dict[str, tuple[dict[str, Any], Any, Any]] = {
            "softcap": ({"softcap": cap}, causal, capped),
            "window": ({"window": window}, windowed, None),
        }
        if length == TOKENS:
            forms["varlen"] = ({"varlen": True}, of_document, None)
        for name, (fields, mask_mod, score_mod) in forms.items():
            plan = plan_attention(spec_of(q, k, **fields), get_target(target))
            options: dict[str, Any] = {}
            keys = Keys(k, v)
            if name == "varlen":
                on_device = ends.int().cuda()
                keys = Keys(k, v, cu_seqlens=on_device)
                options = {"cu_seqlens_q": on_device, "max_seqlen_q": int(ends.diff().max())}
            block_mask = create_block_mask(mask_mod, None, None, length, length, device="cuda")
            runs = {
                target: runner(plan, q, keys, cache, **options),
                "FlexAttention": lambda q=q, k=k, v=v, m=block_mask, s=score_mod: flex(
                    q, k, v, score_mod=s, block_mask=m
                ),
            }
            # Each form is a compilation of its own, and there is a limit to those of a function.
            torch._dynamo.reset()
            found = runs[target]()[0]
            expected = runs["FlexAttention"]()
            difference = float((found.float() - expected.float()).abs().max())
            times = rounds(runs)
            yield {"form": name, "head_dim": width, "length": length, "milliseconds": times,
                   "kernel": plan.kernel, "largest_difference": difference,
                   "faster": statistics.median(times["FlexAttention"])
                   / statistics.median(times[target])}  # fmt: skip


# Tuning -------------------------------------------------------------------------------------------


def tune(target: str, widths: list[int]) -> list[dict[str, Any]]:
    """Return the fastest tiles of each kernel for each head size and mask."""
    machine = get_target(target)
    rows: list[dict[str, Any]] = []
    for kernel, width, causal in itertools.product(machine.kernels, widths, (True, False)):
        operands = [prefill_operands(width, length) for length in (2048, 8192)]
        spec = spec_of(*operands[0][:2], causal=causal)
        planner = get_family(kernel).planner
        best: tuple[float, dict[str, int]] | None = None
        for tiles in worth_trying(kernel, spec, target):
            inequalities = planner.inequalities(spec, machine, tiles)
            if not all(inequality.holds for inequality in inequalities):
                continue
            plan = AttentionPlan(spec, target, kernel, tiles, tuple(inequalities), "tuning")
            cache: dict[str, Any] = {}
            try:
                times = [
                    milliseconds(runner(plan, q, Keys(k, v), cache)) / length
                    for (q, k, v), length in zip(operands, (2048, 8192), strict=True)
                ]
            except Exception as error:
                print(kernel, width, causal, tiles, f"{type(error).__name__}: {str(error)[:80]}")
                continue
            if best is None or sum(times) < best[0]:
                best = sum(times), tiles
        if best is not None:
            form = {"phase": "prefill", "head_dim": width, "values": width, "causal": causal}
            rows.append({"kernel": kernel, "attention": form, "tiles": best[1]})
            print(kernel, form, best[1], flush=True)
    return rows


def worth_trying(kernel: str, spec: AttentionSpec, target: str) -> list[dict[str, int]]:
    """Return the model's candidates, those that have been fast anywhere."""
    found = list(get_family(kernel).planner.candidates(spec, get_target(target)))
    if kernel == "triton":
        most = max(tiles["BLOCK_M"] for tiles in found)
        return [tiles for tiles in found if tiles["BLOCK_M"] == most and tiles["BLOCK_N"] >= 32
                and tiles["num_stages"] > 1]  # fmt: skip
    if kernel == "hopper-cuda":
        return [tiles for tiles in found if tiles["BLOCK_N"] >= 80 and tiles["CONSUMERS"] > 1]
    return found


def tunable() -> list[str]:
    """Return the targets whose kernels take what is measured: bf16, on a GPU."""
    return [
        target.name
        for target in all_targets().values()
        if target.kind == "gpu" and target.kernels and "bf16" in target.dtypes
    ]


def write_table(target: str, widths: str, rows: list[dict[str, Any]]) -> None:
    table = {"device": torch.cuda.get_device_name(), "date": today(), "versions": versions()}
    command = f"python tools/bench_attention.py --tune {target} --head-dims {widths}"
    table |= {"command": command, "rows": rows}
    path = ROOT / "graphopt" / "targets" / f"{target}.tuned.json"
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def today() -> str:
    return datetime.date.today().isoformat()


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "attention.json")
    parser.add_argument("--tune", choices=tunable(), help="a target that this GPU can stand in for")
    parser.add_argument("--head-dims", default="64,128,256", help="to tune for")
    parser.add_argument("--older", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    widths = [int(width) for width in args.head_dims.split(",")]
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")
    if args.older:
        compile_for(args.older)
        rows = tune(args.older, widths) if args.tune else list(bench_prefill(args.older, False))
        args.rows.write_text(json.dumps(rows))
        return
    if args.tune:
        capability = get_target(args.tune).compute_capability
        assert capability is not None
        here = torch.cuda.get_device_capability()
        if capability > here:
            parser.error(f"{args.tune} is sm_{capability[0]}{capability[1]}, newer than this GPU")
        elif capability < here:
            tuning = ["--tune", args.tune, "--head-dims", args.head_dims]
            rows = rows_of_older(args.tune, tuning)
        else:
            rows = tune(args.tune, widths)
        write_table(args.tune, args.head_dims, rows)
        return
    result = {
        "command": "python tools/bench_attention.py",
        "date": today(),
        "device": torch.cuda.get_device_name(),
        "python": sys.version.split()[0],
        "versions": versions(),
        "copy_tb_per_s": copy_bandwidth() / 1e12,
        "prefill": [*bench_prefill("hopper", True), *rows_of_older("ampere", [])],
        "decode": list(bench_decode("hopper")),
        "forms": list(bench_forms("hopper")),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_summary(result)


def print_summary(result: dict[str, Any]) -> None:
    """Print speeds by length, the caches and the forms."""
    by_form: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in result["prefill"]:
        key = (row["head_dim"], "causal" if row["causal"] else "full", row["kernel"])
        by_form.setdefault(key, {})[row["length"]] = row["tflops"]
    for key, speeds in sorted(by_form.items()):
        print(*key, *(f"{speeds[length]:.0f}" for length in LENGTHS))
    print(f"copy {result['copy_tb_per_s']:.2f} TB/s")
    for row in result["decode"]:
        print(
            row["keys"], row["kernel"], f"{row['microseconds']:.1f} us {row['tb_per_s']:.2f} TB/s"
        )
    for row in result["forms"]:
        print(row["form"], row["head_dim"], row["length"], row["kernel"],
              f"x{row['faster']:.2f}", f"{row['largest_difference']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
