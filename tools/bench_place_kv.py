"""Measure keys in host memory: the CPU kernel, the planner's choices, and a model on a small GPU.

    python tools/bench_place_kv.py [--only bandwidth,choices,model] [--out benchmarks/place_kv.json]

* `bandwidth`: attention of one token over 65,536 keys by the C++ kernel, beside one `sum` over the
  same memory and torch's attention. Layers take turns, so that no cache holds what is read.
* `choices`: in ten settings what a layer's attention takes with all its keys read by the host,
  copied to the device, or divided, beside what the planner expects of each by figures that were
  measured before; and how far the outputs are from attention on the device.
* `model`: a Llama-8B shape with random weights on a GPU that is limited to 24 GB, and random keys
  of up to 524,288 tokens: tokens a second as planned, and with all keys copied in every step. A
  real prompt is read too, with its keys on the device and written out, and the answers compared.

Without a GPU `choices` and `model` run small on the CPU: that says only whether this script runs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import turns
from measure import keep, random_llama, target_here
from results import given_words

from graphopt.backends.code import import_model
from graphopt.ir.kv_host import HostShare, piece_tokens
from graphopt.ir.kv_memory import append_kv, pack_rows, row_bytes
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.lowering.torch import source_files
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.plan import AttentionSpec
from graphopt.plan.host_kv import HostedLayer, Machine, layer_plan, whole_layer
from graphopt.plan.measure_host import measure_host, processor, write_measured_host
from graphopt.runtime import host_kv
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.copies import pin
from graphopt.runtime.dispatch import by_reference
from graphopt.runtime.host_attention import (
    Job,
    fill_job,
    host_kernel,
    host_memory,
    host_sum,
    levels_here,
)
from graphopt.runtime.host_kv import HostKV
from graphopt.runtime.host_parts import LayerShape
from graphopt.targets import HostFigures, Target, get_target

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16
ROUNDS = 9
WITHIN = 1.03
"""A choice is right if it takes no more than the fastest way, times this."""

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 524288,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TINY = {
    **LLAMA_8B, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def times(run: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Return the seconds of runs behind one that is not counted."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


# Bandwidth ----------------------------------------------------------------------------------------


def bandwidth(keys: int, rounds: int) -> dict[str, Any]:
    """Measure the kernel, `sum` and torch's attention over the same memory, in turns."""
    dim, heads, groups, layers = 128, 32, 8, 6
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    whole = layers * 2 * groups * keys * dim * 4
    memory = host_memory(whole, whole // layers // 2)
    _filled(memory)
    numbers = memory.view(torch.float32)
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "sum, torch": (whole, numbers.sum),
        "sum, the kernel's threads": (whole, lambda: host_sum(memory)),
    }
    lens = torch.full((1,), keys, dtype=torch.int32)
    out, lse = torch.empty(1, heads, 1, dim), torch.empty(1, heads, 1)
    kinds = {"bf16": DTYPE, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.uint8}
    for name, dtype in kinds.items():
        row = row_bytes(dim, 8) if name == "int8" else dim
        half = groups * keys * row * dtype.itemsize
        held = memory[: 2 * layers * half]
        if name == "int8":
            held = host_memory(2 * layers * half, half)
            _repeated(held, pack_rows(torch.randn(2**18, dim), 8).view(-1))
        parts = [part.view(dtype).view(1, 1, groups, keys, row) for part in held.split(half)]
        q = torch.randn(1, heads, 1, dim).to(torch.float32 if name == "int8" else dtype)
        for level in ("", *(["avx2"] if name == "bf16" and "avx2" in levels_here() else [])):
            jobs = []
            for k, v in zip(parts[::2], parts[1::2], strict=True):
                job = Job()
                fill_job(
                    job, q, k, v, lens, out, lse, width=dim, scale=dim**-0.5,
                    level=levels_here().index(level) + 1 if level else 0,
                )  # fmt: skip
                jobs.append(job)
            runs[f"kernel, {name}{', ' * bool(level)}{level}"] = 2 * layers * half, _all(jobs)
        if name in ("bf16", "fp32"):
            runs[f"torch, {name}"] = 2 * half, _by_torch(q, parts[0][0], parts[1][0])
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (_, run) in runs.items():
            if name.startswith("torch") and turn > 3:
                continue  # it is slow
            start = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - start)
    rows: dict[str, dict[str, Any]] = {}
    for name, (nbytes, _) in runs.items():
        rate = nbytes / median(taken[name])
        rows[name] = {"bytes": nbytes, "seconds": taken[name], "bytes_a_second": rate}
        print(f"  {name:28} {rate / 1e9:7.1f} GB/s", flush=True)
    share = rows["kernel, bf16"]["bytes_a_second"] / rows["sum, torch"]["bytes_a_second"]
    print(f"  bf16 reads at {share:.0%} of torch's sum", flush=True)
    return {
        "processor": processor(), "threads": int(host_kernel().graphopt_threads()),
        "instructions": levels_here()[-1], "keys": keys, "layers": layers, "heads": heads,
        "key_heads": groups, "dim": dim, "load": os.getloadavg()[0], "rows": rows,
        "share_of_sum": share,
    }  # fmt: skip


def _by_torch(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _all(jobs: Sequence[Job]) -> Callable[[], None]:
    step = host_kernel().graphopt_host_step

    def run() -> None:
        for job in jobs:
            step(ctypes.byref(job))

    return run


def _filled(memory: Tensor) -> None:
    """Fill memory with random numbers of bf16, the same 128 MB again and again."""
    _repeated(memory.view(DTYPE), torch.randn(2**26).to(DTYPE))


def _repeated(memory: Tensor, some: Tensor) -> None:
    """Fill memory with the same numbers again and again."""
    for start in range(0, len(memory), len(some)):
        part = memory[start : start + len(some)]
        part.copy_(some[: len(part)])


# Choices ------------------------------------------------------------------------------------------

SETTINGS = [
    # batch, keys, query heads, key heads
    (1, 4096, 32, 8), (1, 16384, 32, 8), (1, 65536, 32, 8), (1, 262144, 32, 8), (8, 2048, 32, 8),
    (8, 32768, 32, 8), (2, 65536, 64, 8), (1, 65536, 32, 32), (4, 65536, 16, 2), (1, 131072, 8, 4),
]  # fmt: skip
LAYERS = 4


class Pool:
    """Host memory that is pinned once, and of which every cache of a bench is a part."""

    def __init__(self, nbytes: int) -> None:
        nbytes -= nbytes % 64  # numbers of any dtype fill it
        self.memory = host_memory(nbytes, nbytes)
        _filled(self.memory)
        if ON_GPU:
            pin(self.memory, self)

    def lend(self, module: Any) -> None:
        """Let a module of `HostKV` take this memory in place of its own."""
        module.host_memory = lambda nbytes, part: self.memory[:nbytes]
        module.pin = lambda memory, owner: None
        module.free_bytes = lambda device: len(self.memory)


def attention_by(heads: int, groups: int, target: Target) -> Callable[..., Any]:
    """Return attention of one token to keys in front of it, with its log-sum-exp."""
    if not ON_GPU:
        return by_reference
    spec = AttentionSpec(
        head_dim=128, heads=heads, kv_heads=groups, dtype="bf16", phase="decode", causal=False,
        kv_lens=True, lse=True,
    )  # fmt: skip
    plan = plan_attention(spec, target)
    run = get_family(plan.kernel).load(plan)

    def attend(
        q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, None]:
        out, lse, *_ = run(q, keys, scale=options["scale"], extras=extras)
        return out, lse, None

    return attend


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph, which is waited for, and on a CPU the function itself."""
    if not ON_GPU:
        return run
    graph = turns.recorded(run)

    def replay() -> None:
        graph()
        torch.cuda.synchronize()

    return replay


def layer_seconds(
    share: HostShare, keys: int, heads: int, groups: int, attend: Callable[..., Any], rounds: int
) -> list[float]:
    """Return what a layer's attention takes."""
    lens = torch.full((share.batch,), keys, dtype=torch.int32, device=DEVICE)
    shape = LayerShape(groups, 128, 128, DTYPE)
    kv = HostKV([share] * LAYERS, [shape] * LAYERS, keys + 1, lens)
    q = torch.randn(share.batch, heads, 1, 128, device=DEVICE).to(DTYPE)
    k, v = (torch.randn(share.batch, groups, 1, 128, device=DEVICE).to(DTYPE) for _ in range(2))
    out = torch.zeros_like(q)

    def step() -> None:
        kv.begin_step([keys] * share.batch, decoding=True)
        for layer in kv.layers:
            out.copy_(layer.attend(q, k, v, None, {"scale": 128**-0.5}, attend, append_kv))

    torch.manual_seed(1)
    for x in (q, k, v):
        x.normal_()
    replay = recorded(step)
    return [s / LAYERS for s in times(replay, rounds)]


def choices(figures: HostFigures, target: Target, pool: Pool, rounds: int) -> dict[str, Any]:
    """Measure every way in every setting, and compare with what the planner chooses."""
    assert target.decode is not None
    machine = Machine(figures, target.decode.bandwidth, target.decode.launch)
    rows = []
    pool.lend(host_kv)
    settings = SETTINGS if ON_GPU else [(1, 600, 8, 2), (2, 900, 4, 4)]
    for batch, keys, heads, groups in settings:
        layer = HostedLayer("kv", 2 * groups * 128 * DTYPE.itemsize)
        context = keys + 1
        plan = layer_plan(layer, 0, context, batch, machine)
        piece = piece_tokens(context, batch)
        inner = [n * piece for n in range(1, -(-context // piece)) if n * piece < context]
        # The best division, also where the planner expects one way alone to be faster.
        streamed = plan.streamed if plan.way == "split" else round(context / 2 / piece) * piece
        ways = {"host": 0, "streamed": context} | ({"split": streamed} if inner else {})
        attend, measured = attention_by(heads, groups, target), {}
        for way, tokens in ways.items():
            share = HostShare(context, batch, 0, tokens)
            measured[way] = layer_seconds(share, keys, heads, groups, attend, rounds)
        expected = {"streamed": whole_layer(layer, context, batch, machine, True).seconds,
                    "host": whole_layer(layer, context, batch, machine, False).seconds,
                    plan.way: plan.seconds}  # fmt: skip
        best = min(measured, key=lambda way: median(measured[way]))
        right = median(measured[plan.way]) <= WITHIN * median(measured[best])
        rows.append({
            "batch": batch, "keys": keys, "heads": heads, "key_heads": groups, "chosen": plan.way,
            "streamed_tokens": streamed, "expected": expected, "seconds": measured, "best": best,
            "right": right,
        })  # fmt: skip
        shown = ", ".join(f"{way} {1e3 * median(s):.3f} ms" for way, s in measured.items())
        print(f"  B{batch} T{keys} H{heads}/{groups}: {plan.way} chosen "
              f"({1e3 * plan.seconds:.3f} ms expected); {shown}; {'right' if right else 'WRONG'}",
              flush=True)  # fmt: skip
    return {"processor": processor(), "layers": LAYERS, "within": WITHIN, "rows": rows,
            "right": sum(row["right"] for row in rows)}  # fmt: skip


def equality(target: Target, pool: Pool) -> dict[str, Any]:
    """Compare the output of every way with attention in fp32 on the device."""
    pool.lend(host_kv)
    keys, heads, groups = (65536, 32, 8) if ON_GPU else (900, 8, 2)
    attend, found = attention_by(heads, groups, target), {}
    for name, resident, streamed in (
        ("host", 0, 0), ("streamed", 0, keys + 1), ("split", 0, keys // 2),
        ("three parts", keys // 4 // 64 * 64, keys // 2),
    ):  # fmt: skip
        share = HostShare(keys + 1, 1, resident, streamed)
        lens = torch.full((1,), keys, dtype=torch.int32, device=DEVICE)
        kv = HostKV([share], [LayerShape(groups, 128, 128, DTYPE)], keys + 1, lens)
        layer = kv.layers[0]
        torch.manual_seed(2)
        q = torch.randn(1, heads, 1, 128, device=DEVICE).to(DTYPE)
        k, v = (torch.randn(1, groups, 1, 128, device=DEVICE).to(DTYPE) for _ in range(2))
        whole = [x.permute(1, 2, 0, 3, 4).flatten(2, 3).to(DEVICE)[:, :, : keys - resident]
                 for x in (layer.k, layer.v)]  # fmt: skip
        if layer.front is not None:
            for part in layer.front:
                part.normal_()
            whole = [torch.cat((front[:, :, :resident], rest), 2)
                     for front, rest in zip(layer.front, whole, strict=True)]  # fmt: skip
        whole = [torch.cat((rest, new), 2).float() for rest, new in zip(whole, (k, v), strict=True)]
        kv.begin_step([keys], decoding=True)
        out = layer.attend(q, k, v, None, {"scale": 128**-0.5}, attend, append_kv)
        exact = F.scaled_dot_product_attention(q.float(), *whole, scale=128**-0.5, enable_gqa=True)
        found[name] = float((out.float() - exact).abs().max() / exact.abs().max())
    print("  relative to the largest output:", found, flush=True)
    return found


# A model ------------------------------------------------------------------------------------------


def emitted(program: Any, target: str, work: Path) -> ModuleType:
    """Write the package of a program, without its weights, and import it."""
    for name, text in source_files(program, target).items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return import_model(work / "model.py")


def random_weights(program: Any) -> dict[str, Tensor]:
    """Return random weights on the device, as `load` would."""
    found: dict[str, Tensor] = {}
    generator = torch.Generator(DEVICE).manual_seed(0)
    for weight in program.used_weights():
        if weight.constant:
            found[weight.name] = nn.Buffer(weight.load().to(DEVICE))
            continue
        value = torch.empty(weight.shape, dtype=DTYPE if ON_GPU else torch.float32, device=DEVICE)
        value.normal_(0, 0.02, generator=generator)
        if weight.name.endswith("norm.weight"):
            value.fill_(1.0)
        found[weight.name] = nn.Parameter(value, requires_grad=False)
    return found


def decoding(module: ModuleType, model: Any, context: int, steps: int) -> dict[str, Any]:
    """Return the seconds of steps behind `context` tokens whose keys are random."""
    decoder = module.Decoder(model, context + steps + 2)
    held = context - 1
    decoder.held = [held]
    decoder.seq_lens.fill_(held)
    for layer in decoder.kv.layers:
        for part in layer.front or ():
            part.normal_()
    for cache in decoder.cache:
        if cache not in decoder.kv.layers:
            cache.k.normal_()
            cache.v.normal_()
    start = time.perf_counter()
    decoder.step()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        decoder.step()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    return {"seconds": seconds, "first": first, "tokens_a_second": 1 / median(seconds),
            "gpu_bytes": peak}  # fmt: skip


def model_part(figures: Path, target: str, pool: Pool, contexts: Sequence[int], gpu: str,
               prompt: int, steps: int) -> dict[str, Any]:  # fmt: skip
    """Measure decoding and reading a prompt with a whole model."""
    config = LLAMA_8B if ON_GPU else TINY
    program = random_llama(torch.device("cpu"), config)
    program = make_pass("insert-kv-cache", {}).run(program, Context()).program
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"gpu": gpu, "contexts": rows, "processor": processor()}
    if not ON_GPU:
        # So much that the first layer's keys have room.
        whole = make_pass("place-kv", {"gpu": "9GB", "context": max(contexts)})
        record = whole.run(program, Context()).record
        gpu = str(record.gpu - record.room + record.device // 2)
    with tempfile.TemporaryDirectory() as work:
        options = {"gpu": gpu, "target": target, "figures": str(figures)}
        longest = make_pass("place-kv", {**options, "context": max(contexts)})
        placed = longest.run(program, Context()).program
        module = emitted(placed, target, Path(work))
        pool.lend(sys.modules[f"{module.kernels.__name__}.host_kv"])
        model = module.Model(random_weights(program)).eval()
        for context in contexts:
            room = context + steps + 2
            made = make_pass("place-kv", {**options, "context": room}).run(program, Context())
            record = made.record
            shares = [state.host for state in made.program.states.values()]
            row: dict[str, Any] = {
                "context": context, "line": record.line(), "expected": record.seconds,
                "expected_streamed": record.streamed_seconds, "host_bytes": record.host,
                "moved_bytes": record.moved, "read_bytes": record.read,
                "device_bytes": record.device,
                "layers": [[x.way, x.resident, x.streamed, x.computed] for x in record.layers],
            }  # fmt: skip
            print(f"  {context:,}: {record.line()}", flush=True)
            if any(shares):
                copied = [HostShare(room, 1, 0, room)] * len(shares)
                for name, given in (("planned", shares), ("streamed", copied)):
                    model.kv_hosts = [None if s is None else (s.context, s.batch, s.resident,
                                      s.streamed) for s in given]  # fmt: skip
                    row[name] = decoding(module, model, context, steps)
                    print(f"    {name}: {row[name]['tokens_a_second']:.3f} tokens/s, first step "
                          f"{row[name]['first']:.1f} s", flush=True)  # fmt: skip
                    if ON_GPU:
                        torch.cuda.empty_cache()
            rows.append(row)
        found["prompt"] = reading(module, model, prompt, steps)
    return found


def reading(module: ModuleType, model: Any, prompt: int, steps: int) -> dict[str, Any]:
    """Read a prompt with all keys on the device, and with all of them on the host.

    How far logits are apart where the device alone reads the prompt in parts of half the length
    says what rounding makes of them.
    """
    ids = torch.randint(0, 200, (prompt,), generator=torch.Generator().manual_seed(3)).tolist()
    room, layers = prompt + steps + 2, len(model.kv_layouts)
    # Keys on the host have room for a text four times as long, as where they are needed.
    long = 4 * room
    base = sys.modules[f"{module.kernels.__name__}.decoder"].Decoder
    plain = type("Plain", (base,), {"positions": None, "records": module.Decoder.records})
    chunk = sys.modules[f"{module.kernels.__name__}.kv_host"].prefill_chunk(1)
    found: dict[str, Any] = {"tokens": prompt}
    logits: dict[str, list[Tensor]] = {}
    answer: list[int] = []
    for name in ("device", "device, smaller parts", "host", "divided"):
        share = {"host": (long, 1, 0, 0), "divided": (long, 1, room // 4, long // 3)}.get(name)
        model.kv_hosts = [share] * layers
        decoder = plain(model, room) if share is None else module.Decoder(model, long)
        seconds = []
        for _ in range(3 if ON_GPU else 1):
            start = time.perf_counter()
            if share is None:
                # In the same parts, so that both compute as much.
                decoder.held = [0]
                decoder.seq_lens.zero_()
                part = chunk if name == "device" else chunk // 2
                for begin in range(0, prompt, part):
                    decoder._read([ids[begin : begin + part]])
            else:
                decoder.start(ids)
            _ = decoder.token.tolist()
            seconds.append(time.perf_counter() - start)
        logits[name] = [decoder.logits.float().clone()]
        for number in range(steps):
            if name == "device":
                answer.append(int(decoder.token))
            decoder.step(answer[number])
            logits[name].append(decoder.logits.float().clone())
        found[name] = {"seconds": seconds}
        del decoder
    for name in ("device, smaller parts", "host", "divided"):
        pairs = list(zip(logits["device"], logits[name], strict=True))
        found[name]["relative"] = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        found[name]["same_greedy"] = sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs)
        found[name]["compared"] = len(pairs)
        found[name]["times_device"] = median(found[name]["seconds"]) / median(
            found["device"]["seconds"]
        )
        print(f"  a prompt of {prompt:,}, {name}: {found[name]['times_device']:.3f} times the time "
              f"on the device; logits differ by {found[name]['relative']:.2e} of the largest, "
              f"{found[name]['same_greedy']} of {len(pairs)} greedy tokens the same",
              flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "place_kv.json")
    parser.add_argument("--only", default="bandwidth,choices,model")
    parser.add_argument("--keys", type=int, default=65536, help="of `bandwidth`")
    parser.add_argument("--contexts", default="524288,262144,131072" if ON_GPU else "3000,700")
    parser.add_argument("--gpu", default="24GB" if ON_GPU else "1.2GB")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    parts, command = args.only.split(","), ["python tools/bench_place_kv.py", given_words()]
    started = time.perf_counter()

    def kept(name: str, found: Mapping[str, Any]) -> None:
        keep(args.out, name, command, DEVICE, found)
        print(f"{name}: {time.perf_counter() - started:.0f} s so far", flush=True)

    torch.manual_seed(0)
    with torch.no_grad():
        if "bandwidth" in parts:
            kept("bandwidth", bandwidth(args.keys, args.rounds))
        if not {"choices", "model"} & set(parts):
            return
        target = get_target(target_here() if ON_GPU else "hopper")
        measured = measure_host(DEVICE) if ON_GPU else measure_host(DEVICE, keys=4096, layers=2)
        print(f"  {measured}", flush=True)
        kept("host", measured.model_dump() | {"of": "graphopt measure-host"})
        if "choices" in parts:
            most = max(b * t * g for b, t, _, g in SETTINGS) * 2 * 128 * 2 * LAYERS
            pool = Pool(int(1.1 * most) if ON_GPU else 2**26)
            same = equality(target, pool)
            kept("choices", choices(measured.figures(), target, pool, args.rounds)
                 | {"relative_error": same})  # fmt: skip
            del pool
        if "model" in parts:
            if ON_GPU:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(24e9 / total)
            contexts = [int(text) for text in args.contexts.split(",")]
            config = LLAMA_8B if ON_GPU else TINY
            width = config["hidden_size"] // config["num_attention_heads"]
            token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * width * 2
            nbytes = int(1.03 * token * max(contexts)) + 2**28
            pool = Pool(nbytes if ON_GPU else 2 * nbytes)
            with tempfile.TemporaryDirectory() as work:
                figures = Path(work) / "host.json"
                write_measured_host(figures, measured)
                found = model_part(
                    figures, target.name, pool, contexts, args.gpu, 32768 if ON_GPU else 500,
                    args.steps,
                )  # fmt: skip
            kept("model", found)


if __name__ == "__main__":
    main()
