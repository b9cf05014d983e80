"""Measure a model of Llama-3.1-8B's shape on one GPU and, emitted for two ranks, on two.

    python tools/bench_shard.py [--target hopper] [--out benchmarks/shard.json]
    python tools/bench_shard.py --shape tiny --device cpu --out /tmp/shard.json     # does it run?
    python tools/bench_shard.py --kill --out /tmp/k.json   # only: how long a rank takes to end
    python tools/bench_shard.py --overlap --out /tmp/o.json   # only: attention by rows, or whole

Weights are random, and made where they are needed: a rank makes its own part of each by the number
of the part, and the one GPU puts the same parts together. In each of two launches the ranks read a
prompt and decode one text, in turns with the one GPU: once with sums by NCCL alone, and once with
the package's kernels for them. Tokens are compared between the ranks and with those of one GPU;
where they differ, both models are given the one GPU's tokens, and the logits of the two that they
would choose stand beside each other. At the end a rank is killed while both replay their recorded
steps, and the time is taken until the other one has ended; with --kill also under torchrun, and
where kernels wait for each other. With --overlap two ranks alone read prompts in three ways, in
turns: as planned, with attention as a whole, and with attention in chunks whatever the plan says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.reduction_plan import chunkings

ROOT = Path(__file__).parents[1]
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16384,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TINY = LLAMA_8B | {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SHAPES = {
    "llama8b": {
        "config": LLAMA_8B,
        "prefill": 8192,
        "prompts": (512, 8192),
        "new": 64,
        "overlap": (4096, 8192, 16376),
    },
    "tiny": {"config": TINY, "prefill": 48, "prompts": (5, 48), "new": 6, "overlap": (48,)},
}
SUMS = ("nccl", "kernels")
RANKS, TURNS, WARM_UP = 2, 5, 2
DEATHS = (("nccl", False), ("kernels", False), ("nccl", True))
"""Sums, and whether torchrun watches; all of them with --kill, and else the first."""
LIMIT = 120
"""Seconds after which a launch is given up."""


# What is written once: the packages, without weights ----------------------------------------------


def write_packages(work: Path, config: dict[str, Any], target: str) -> None:
    """Write the package of one GPU and that of two, and what their weights are made by."""
    from graphopt.capture import capture
    from graphopt.files.safetensors import SafetensorsWriter
    from graphopt.lowering.torch import source_files
    from graphopt.lowering.torch.lowered_kernels import FOLDER, lower_attentions
    from graphopt.lowering.torch.ranks import tensor_splits
    from graphopt.pass_manager.contract import Context, make_pass
    from graphopt.pass_manager.pipeline import DEFAULT_RECIPE

    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    one = capture(f"config:{work / 'config.json'}")
    for name in DEFAULT_RECIPE.split(","):
        one = make_pass(name, {}).run(one, Context()).program
    two = make_pass("shard", {"tp": RANKS}).run(one.copy(), Context()).program
    for name, program in (("one", one), ("two", two)):
        kernels = lower_attentions(program, target)
        files: dict[str, bytes] = {
            path: text.encode() for path, text in source_files(program, target).items()
        }
        if kernels is not None:
            files |= {f"{FOLDER}/{path}": data for path, data in kernels.compile().items()}
        for path, data in files.items():
            (work / name / path).parent.mkdir(parents=True, exist_ok=True)
            (work / name / path).write_bytes(data)
        # Ranks compare their packages, the file of weights among them.
        with SafetensorsWriter(work / name / "model.safetensors", {}):
            pass
    splits = dict(tensor_splits(two))
    constants = {weight.name: weight.load() for weight in two.weights if weight.constant}
    torch.save(constants, work / "constants.pt")
    shapes = {
        weight.name: [list(weight.shape), list(splits[weight.name])]
        for weight in two.weights
        if not weight.constant
    }
    (work / "weights.json").write_text(json.dumps(shapes), encoding="utf-8")


# What a rank does ---------------------------------------------------------------------------------


class Opened:
    """Tensors in memory, asked for as those of an open safetensors file are."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> Sliced:
        return Sliced(self.tensors[name])


class Sliced:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def get_shape(self) -> list[int]:
        return list(self.value.shape)

    def __getitem__(self, place: Any) -> Tensor:
        return self.value[place]


def emitted(path: Path) -> ModuleType:
    """Import a `model.py`."""
    spec = spec_from_file_location(f"emitted_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Weights:
    """Random weights of both packages, part by part.

    Args:
        split: The class by which a package says how ranks share a tensor.
    """

    def __init__(self, work: Path, device: torch.device, dtype: torch.dtype, split: Any) -> None:
        text = (work / "weights.json").read_text(encoding="utf-8")
        self.shapes = {
            name: (shape, split(*parts)) for name, (shape, parts) in json.loads(text).items()
        }
        self.constants: dict[str, Tensor] = torch.load(work / "constants.pt")
        self.device, self.dtype = device, dtype

    def part(self, name: str, number: int) -> Tensor:
        """Return a part of a weight, the same wherever it is made."""
        shape, split = self.shapes[name]
        assert split.sections == 1 and not split.summed and not split.bits
        sizes = list(shape)
        if split.axis is not None:
            sizes[split.axis] //= RANKS // split.copies
        value = torch.empty(sizes, dtype=self.dtype, device=self.device)
        if len(sizes) == 1:
            return value.fill_(1.0)  # the gain of a norm
        seed = zlib.crc32(f"{name}, part {number}".encode())
        generator = torch.Generator(self.device).manual_seed(seed)
        return value.normal_(0.0, 0.02, generator=generator)

    def whole(self) -> dict[str, Tensor]:
        """Return the weights of one device."""
        found = {name: torch.nn.Buffer(v.to(self.device)) for name, v in self.constants.items()}
        for name, (_, split) in self.shapes.items():
            parts = 1 if split.axis is None else RANKS // split.copies
            value = [self.part(name, number) for number in range(parts)]
            whole = value[0] if parts == 1 else torch.cat(value, split.axis)
            found[name] = torch.nn.Parameter(whole, requires_grad=False)
        return found

    def of_rank(self, module: ModuleType, rank: int) -> dict[str, Tensor]:
        """Return the weights of a rank."""
        file = Opened(self.constants)
        found = {
            name: torch.nn.Buffer(module.own_part(file, name, rank).to(self.device))
            for name in self.constants
        }
        for name, (_, split) in self.shapes.items():
            number = 0 if split.axis is None else rank // split.copies
            found[name] = torch.nn.Parameter(self.part(name, number), requires_grad=False)
        return found


def as_rank(work: Path, options: argparse.Namespace) -> None:
    """Measure as one of the ranks; the first one writes what was found."""
    module = emitted(work / "two" / "model.py")
    mine = module.ranks.join(RANKS, options.device, work / "two", work / "two")
    dtype = torch.bfloat16 if mine.device.type == "cuda" else torch.float32
    if options.sums == "nccl" and hasattr(module.kernels, "_SUMS"):
        module.kernels._SUMS._figures = None
    weights = Weights(work, mine.device, dtype, module.Split)
    model = module.Model(weights.of_rank(module, mine.rank)).eval()
    found: dict[str, Any] = {"sums": options.sums, "weight_bytes": memory(mine.device)}
    shape = SHAPES[options.shape]
    if options.mode == "die":
        decode_until_the_end(work, module, model, mine.rank)
        return
    if options.mode == "overlap":
        with torch.no_grad():
            found["overlap"] = overlapped(mine, module, model, shape)
        if mine.rank == 0:
            (work / "overlap.json").write_text(json.dumps(found), encoding="utf-8")
        return
    alone = None
    if mine.rank == 0:
        one = emitted(work / "one" / "model.py")
        alone = one.Model(weights.whole()).eval()
    vocab = shape["config"]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, vocab, (max(shape["prompts"]),), generator=generator).tolist()
    room = max(shape["prompts"]) + 2 * shape["new"] + 8

    def decoders() -> tuple[Any, Any]:
        return module.Decoder(model, room), alone and one.Decoder(alone, room)

    with torch.no_grad():
        two_decoder, one_decoder = decoders()
        found["prefill"] = in_turns(
            mine,
            one_decoder and (lambda: one_decoder.start(text[: shape["prefill"]])),
            lambda: two_decoder.start(text[: shape["prefill"]]),
        )
        found["decode"] = {}
        for length in shape["prompts"]:
            prompt = text[:length]

            def steps(decoder: Any, prompt: list[int] = prompt) -> Callable[[], Any]:
                decoder.start(prompt)
                count = shape["new"] // 2
                return lambda: [decoder.step() for _ in range(count)]

            found["decode"][length] = in_turns(
                mine, one_decoder and (lambda: steps(one_decoder)), lambda: steps(two_decoder),
                prepare=True, per=shape["new"] // 2,
            )  # fmt: skip
        found["tokens"] = [
            compared(mine, one_decoder, two_decoder, text[:length], shape["new"])
            for length in shape["prompts"]
        ]
        if mine.device.type == "cuda":
            found["sum_microseconds"] = times_of_sums(module, shape)
    if mine.rank == 0:
        path = work / f"{options.sums}.json"
        path.write_text(json.dumps(found), encoding="utf-8")


def overlapped(
    mine: Any, module: ModuleType, model: Any, shape: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the seconds of prompts with attention as planned, whole, and by rows all the same."""
    sums = module.kernels._SUMS
    reductions: Any = sys.modules[type(sums).__module__]
    in_order, planner = sums.attention_linear_all_reduce, reductions.plan_attention_linear

    def in_chunks(attention: Any, *given: Any) -> Any:
        half = -(-attention.texts * attention.tokens // 2)
        cuts = chunkings(half, half)
        plan = planner(attention, *given)
        return replace(plan, how="attention-chunks", chunks=cuts[min(2, len(cuts) - 1)])

    ways = {
        "planned": (in_order, planner),
        "whole": (lambda attention, w: sums.linear_all_reduce(attention.whole(), w), planner),
        "chunks": (in_order, in_chunks),
    }
    generator = torch.Generator().manual_seed(0)
    vocab, rows = shape["config"]["vocab_size"], []
    for tokens in shape["overlap"]:
        text = torch.randint(3, vocab, (tokens,), generator=generator).tolist()
        decoder = module.Decoder(model, tokens + 8)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        first: dict[str, int] = {}
        plans: dict[str, list[str]] = {}
        for turn in range(WARM_UP + TURNS):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                module.attention_linear_all_reduce, reductions.plan_attention_linear = ways[name]
                sums._attention_plans.clear()
                synchronize(mine.device)
                mine.of_first(None)
                started = time.perf_counter()
                first[name] = decoder.start(text)
                synchronize(mine.device)
                took = max(mine.gathered(time.perf_counter() - started))
                plans[name] = [str(plan) for plan in sums._attention_plans.values()]
                if turn >= WARM_UP:
                    seconds[name].append(took)
        rows.append({"tokens": tokens, "seconds": seconds, "first": first, "chunks": plans})
    return rows


def memory(device: torch.device) -> int | None:
    """Return the bytes of a rank's weights on its GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def in_turns(
    mine: Any,
    one: Callable[[], Any] | None,
    two: Callable[[], Any],
    *,
    prepare: bool = False,
    per: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of what one device runs, and of what the ranks do, in turns.

    Args:
        one: None where another rank has it.
        prepare: They make what is to be timed.
        per: By how much seconds are divided.
    """
    seconds: dict[str, list[float]] = {"one": [], "two": []}

    def timed(run: Callable[[], Any]) -> float:
        work = run() if prepare else run
        synchronize(mine.device)
        mine.of_first(None) if run is two else None
        started = time.perf_counter()
        work()
        synchronize(mine.device)
        return (time.perf_counter() - started) / per

    for turn in range(WARM_UP + TURNS):
        for name in ("one", "two")[:: -1 if turn % 2 else 1]:
            run = one if name == "one" else two
            took = 0.0 if run is None else timed(run)
            mine.of_first(None)  # the others wait here, not on a GPU
            if turn >= WARM_UP:
                # The ranks are done when the last of them is.
                seconds[name].append(max(mine.gathered(took)))
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compared(mine: Any, one: Any, two: Any, prompt: list[int], count: int) -> dict[str, Any]:
    """Compare greedy tokens between the ranks, and with one device's; and logits by its tokens."""
    answer = [two.start(prompt), *(two.step() for _ in range(count - 1))]
    answers = mine.gathered(answer)
    alone = None
    if one is not None:
        alone = [one.start(prompt), *(one.step() for _ in range(count - 1))]
    alone = mine.of_first(alone)
    assert alone is not None
    found: dict[str, Any] = {
        "prompt": len(prompt), "new": count,
        "equal_on_all_ranks": all(other == answer for other in answers),
        "equal_from_the_first": equal_from_the_first(alone, answer),
    }  # fmt: skip
    differ, errors, gaps = [], [], []
    for number in range(count):
        for decoder in (one, two):
            if decoder is not None:
                decoder.step(alone[number - 1]) if number else decoder.start(prompt)
        if one is None:
            continue
        a, b = (decoder.logits[0].float() for decoder in (one, two))
        errors.append(float((a - b).abs().max()))
        best, second = a.topk(2).values.tolist()
        gaps.append(best - second)
        if int(a.argmax()) != int(b.argmax()):
            other = int(b.argmax())
            differ.append({"step": number, "gap": best - float(a[other]), "largest": best})
    if one is not None:
        found |= {
            "steps_that_differ_given_one_text": differ, "largest_difference_of_logits": max(errors),
            "median_gap_to_the_second": statistics.median(gaps),
        }  # fmt: skip
    return found


def equal_from_the_first(a: list[int], b: list[int]) -> int:
    """Return how many tokens are equal before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def times_of_sums(module: ModuleType, shape: dict[str, Any]) -> dict[str, float]:
    """Return the microseconds of a sum over the ranks, of one token and of a prompt."""
    from graphopt.support.recorded import record

    width = shape["config"]["hidden_size"]
    found: dict[str, float] = {}
    for rows in (1, shape["prefill"]):
        x = torch.randn(1, rows, width, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            module.all_reduce(x)

        def twenty(x: torch.Tensor = x) -> None:
            for _ in range(20):
                module.all_reduce(x)

        graph, _ = record(twenty, runs=0)
        graph.replay()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        found[f"{rows} x {width}"] = (time.perf_counter() - started) / 100 * 1e6
    return found


def decode_until_the_end(work: Path, module: ModuleType, model: Any, rank: int) -> None:
    """Decode, texts without end, until this process is ended."""
    (work / f"pid.{rank}").write_text(str(os.getpid()))
    while True:
        decoder = module.Decoder(model, 64)
        decoder.start([1, 2, 3, 4])
        for _ in range(50):
            decoder.step()
            (work / f"alive.{rank}").touch()


# What starts the ranks ----------------------------------------------------------------------------


def start(work: Path, options: argparse.Namespace, *more: str, watched: bool) -> list[Any]:
    """Start the ranks, under torchrun or by themselves; return the processes started here."""
    script = [str(Path(__file__).resolve()), "--as-rank", str(work)]
    script += ["--shape", options.shape, "--device", options.device, *more]
    environment = dict(os.environ)
    if watched:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command.append("--local-addr=127.0.0.1")
        command += [f"--nproc-per-node={RANKS}", *script]
        return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    return [
        subprocess.Popen(
            [sys.executable, *script], stderr=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]  # fmt: skip


def run_launch(
    work: Path, options: argparse.Namespace, sums: str, mode: str = "measure"
) -> dict[str, Any]:
    """Run a launch that measures; return what it found, or how it failed."""
    (process,) = start(work, options, "--sums", sums, "--mode", mode, watched=True)
    try:
        said = process.communicate(timeout=LIMIT)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends the ranks, which are of sessions of their own
        said = f"given up after {LIMIT} s\n{process.communicate()[1]}"
    path = work / f"{sums if mode == 'measure' else mode}.json"
    if process.returncode or not path.is_file():
        print(said, file=sys.stderr)
        return {"sums": sums, "failed": said[-4000:]}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_death(
    work: Path, options: argparse.Namespace, sums: str, *, watched: bool
) -> dict[str, Any]:
    """Kill the second rank; return how long the first one took to end, and what was said."""
    for path in (*work.glob("pid.*"), *work.glob("alive.*")):
        path.unlink()
    processes = start(work, options, "--mode", "die", "--sums", sums, watched=watched)
    limit = time.monotonic() + LIMIT
    alive = [work / f"alive.{rank}" for rank in range(RANKS)]
    while not all(path.exists() for path in alive) and time.monotonic() < limit:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.05)
    time.sleep(1.0)
    first, second = (int((work / f"pid.{rank}").read_text()) for rank in range(RANKS))
    started = time.monotonic()
    os.kill(second, signal.SIGKILL)
    while running(first) and time.monotonic() < started + 120:
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if running(first):
        os.kill(first, signal.SIGKILL)
    said = "".join(process.communicate(timeout=60)[1] for process in processes)
    lines = [line for line in said.splitlines() if " ends: " in line]
    return {
        "sums": sums, "torchrun": watched, "seconds": seconds, "said": lines,
        "exit_codes": [process.returncode for process in processes],
    }  # fmt: skip


def running(pid: int) -> bool:
    """Return whether a process runs, and is no zombie that waits to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def summarised(launches: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield of each launch the median times of one GPU's speed."""
    for launch in launches:
        if "failed" in launch:
            continue
        rows = {"prefill": launch["prefill"]}
        rows |= {f"decode behind {n}": row for n, row in launch["decode"].items()}
        yield (
            launch["sums"],
            {
                name: statistics.median(row["one"]) / statistics.median(row["two"])
                for name, row in rows.items()
            },
        )


def told_of_overlap(launch: dict[str, Any]) -> None:
    """Print the medians of an overlap's launch, or how it failed."""
    if "failed" in launch:
        sys.exit(f"the launch failed: {launch['failed']}")
    for row in launch["overlap"]:
        times = {name: 1e3 * statistics.median(found) for name, found in row["seconds"].items()}
        told = ", ".join(f"{name} {found:.2f} ms" for name, found in times.items())
        same = "" if len(set(row["first"].values())) == 1 else f", first tokens {row['first']}"
        print(f"{row['tokens']} tokens: {told}; chunks as planned {row['chunks']['planned']}{same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "shard.json")
    parser.add_argument("--target", default="hopper")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama8b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sums", choices=SUMS, help="only these; by default both, in two launches")
    parser.add_argument("--kill", action="store_true", help="only kill a rank")
    parser.add_argument("--overlap", action="store_true", help="only attention by rows, or whole")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank is not None:
        as_rank(options.as_rank, options)
        return
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="bench-shard-"))
    try:
        write_packages(work, SHAPES[options.shape]["config"], options.target)
        print(f"packages written after {time.monotonic() - started:.0f} s", flush=True)
        result: dict[str, Any] = {
            "command": f"python tools/bench_shard.py --shape {options.shape}"
            + " --overlap" * options.overlap,
            "date": datetime.date.today().isoformat(),
            "device": f"{RANKS} {torch.cuda.get_device_name()} of one host"
            if options.device == "cuda"
            else f"{platform.machine()} CPU",
            "python": platform.python_version(),
            "versions": {n: metadata.version(n) for n in ("torch", "triton", "transformers")},
            "shape": options.shape, "prefill": SHAPES[options.shape]["prefill"],
            "target": options.target, "launches": [], "deaths": [],
        }  # fmt: skip
        if options.device == "cuda":
            result["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))

        def keep() -> None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        if options.overlap:
            found = run_launch(work, options, "kernels", "overlap")
            result["launches"].append(found)
            keep()
            told_of_overlap(found)
            return
        for sums in [] if options.kill else [options.sums] if options.sums else SUMS:
            result["launches"].append(run_launch(work, options, sums))
            keep()
            print(f"{sums} after {time.monotonic() - started:.0f} s", flush=True)
        for sums, watched in DEATHS if options.kill else DEATHS[:1]:
            result["deaths"].append(run_death(work, options, sums, watched=watched))
            keep()
        result["summary"] = dict(summarised(result["launches"]))
        keep()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for sums, times in result["summary"].items():
        print(sums, ", ".join(f"{name} x{value:.3f}" for name, value in times.items()))
    for launch in result["launches"]:
        for row in launch.get("tokens", []):
            print(launch["sums"], json.dumps(row))
        print(launch["sums"], launch.get("sum_microseconds", launch.get("failed", "")))
    for death in result["deaths"]:
        print("killed:", json.dumps(death))
    print(f"{time.monotonic() - started:.0f} s in all")
    if any("failed" in launch for launch in result["launches"]):
        sys.exit("a launch failed")


if __name__ == "__main__":
    main()
