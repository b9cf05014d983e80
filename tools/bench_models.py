"""Measure methods on many models, each beside what it has to beat.

    python tools/bench_models.py --calib FILE --text FILE [--piqa FILE] [--device cuda]
                                 [--models trained NAME=MODEL ...] [--methods NAME,NAME]
                                 [--seeds 0,1,2] [--draws 3] [--tuning 10] [--seconds 200] [--go-on]

`trained` are the tiny models under benchmarks/models, of six families; any other MODEL is what the
command line of graphopt takes, and NAME what it is called in the results. A method's control is the
naive way to the same end: random blocks, static experts, random experts, no training. Each run
is kept in benchmarks/models.json with its seed, and so is what had no time left, which --go-on
makes up for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import random
import shlex
import string
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import Yardstick, keep, run_recipe
from model_tables import methods_on_models, not_better, told

from graphopt.capture import capture
from graphopt.errors import GraphoptError, UsageError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.ir.mixture import Mixture, find_mixtures

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / "benchmarks" / "models"


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Attributes:
        recipe: With $blocks for how many go, $random for blocks that are drawn, $tuning for the
            seconds of training, and $mixtures for what carves experts where a model has some.
        controls: Names of the methods that it has to beat.
    """

    recipe: str
    controls: tuple[str, ...] = ()

    @property
    def drawn(self) -> bool:
        """Whether the recipe names random blocks, so that it is run for several draws."""
        return "$random" in self.recipe


_PRUNE = "prune-blocks{blocks=$blocks}"
_STATIC_8 = "carve-moe{shared=6,active=0,experts=8$mixtures}"
_STATIC_16 = "carve-moe{shared=4,active=0,experts=16$mixtures}"
_ROUTED_16 = "carve-moe{shared=2,active=2,experts=16$mixtures}"
_TUNE = ",tune-moe{seconds=$tuning}"


def _routed_8(option: str = "") -> str:
    return f"carve-moe{{shared=3,active=3,experts=8$mixtures{option}}}"


METHODS = {
    "random blocks": Method("prune-blocks{remove=$random,windows=1}"),
    "prune-blocks": Method(_PRUNE, ("random blocks",)),
    "prune-blocks, fuse-blocks": Method(
        f"{_PRUNE},fuse-blocks{{seconds=$tuning}}", ("prune-blocks",)
    ),
    "static S6A0E8": Method(_STATIC_8),
    "S3A3E8": Method(_routed_8(), ("static S6A0E8",)),
    "S3A3E8, threshold": Method(_routed_8(",threshold=true"), ("static S6A0E8",)),
    "S3A3E8, layerwise budget": Method(_routed_8(",layerwise_budget=true"), ("static S6A0E8",)),
    "static S6A0E8, tuned": Method(_STATIC_8 + _TUNE),
    "S3A3E8, tuned": Method(
        _routed_8(",control=false") + _TUNE, ("static S6A0E8, tuned", "S3A3E8")
    ),
    "static S4A0E16": Method(_STATIC_16),
    "S2A2E16": Method(_ROUTED_16, ("static S4A0E16",)),
    "S2A2E16, tuned": Method(
        "carve-moe{shared=2,active=2,experts=16$mixtures,control=false}" + _TUNE, ("S2A2E16",)
    ),
    "random experts": Method("prune-experts{ratio=0.25,score=random}"),
    "prune-experts": Method("prune-experts{ratio=0.25}", ("random experts",)),
    "prune-experts, merge": Method(
        "prune-experts{ratio=0.25,method=merge}", ("random experts",)
    ),
    "prune-experts, REAP": Method(
        "prune-experts{ratio=0.25,score=reap,reconstruct=false}", ("random experts, dropped",)
    ),
    "random experts, dropped": Method("prune-experts{ratio=0.25,score=random,reconstruct=false}"),
    "random half of the experts": Method("prune-experts{ratio=0.5,score=random}"),
    "prune-experts, half": Method("prune-experts{ratio=0.5}", ("random half of the experts",)),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run to be made: a method with a seed, and where blocks are drawn with a draw."""

    method: str
    seed: int
    draw: int = 0

    def recipe(self, program: Program, tuning: float) -> str:
        """Return the recipe for a model; a quarter of its blocks goes, to the nearest number."""
        total = len(find_blocks(program))
        count = max(1, round(total / 4))
        generator = random.Random(self.seed)
        drawn: dict[tuple[int, ...], None] = {}
        # Every draw of a seed is another set, where there are so many.
        while len(drawn) <= min(self.draw, math.comb(total, count) - 1):
            drawn[tuple(sorted(generator.sample(range(total), count)))] = None
        mixtures = any(isinstance(part, Mixture) for _, part in find_mixtures(program))
        return string.Template(METHODS[self.method].recipe).substitute(
            blocks=count,
            tuning=f"{tuning:g}",
            random=str(list(list(drawn)[-1])).replace(" ", ""),
            mixtures=",mixtures=true" if mixtures else "",
        )


def runs(methods: Sequence[str], seeds: Sequence[int], draws: int) -> Iterator[Run]:
    """Yield the runs: every method with the first seed, then every one with the next."""
    for seed in seeds:
        for method in methods:
            for draw in range(draws if METHODS[method].drawn else 1):
                yield Run(method, seed, draw)


def measure(name: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the methods on a model, and keep each run.

    PIQA is asked of a model that knows more of it than chance: by two standard errors.
    """
    deadline = min(options.deadline, time.time() + options.share)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dense = capture(model)
    yardstick = Yardstick.of(dense, options.text, device, options.windows, options.piqa)
    base = yardstick.measure(dense)
    questions = yardstick.questions or ()
    if questions and base["piqa"] < 0.5 + len(questions) ** -0.5:
        yardstick = Yardstick(yardstick.windows, None, device, yardstick.at_once)
    print(f"{name}: dense {base}", flush=True)
    found: dict[str, Any] = {
        "dense": base,
        "blocks": len(find_blocks(dense)),
        "parameters": dense.parameter_count(),
        "text": options.text.name,
        "calib": options.calib.name,
        "windows": list(yardstick.windows.shape),
        "tuning_seconds": options.tuning,
        "methods": {method: list(METHODS[method].controls) for method in options.methods},
        "runs": kept_runs(name, yardstick, options) if options.go_on else [],
        "no_time_left": [],
    }
    took: dict[str, float] = {}
    for run in runs(options.methods, options.seeds, options.draws):
        recipe = run.recipe(dense, options.tuning)
        about = dataclasses.asdict(run)
        if any(all(kept.get(key) == about[key] for key in about) for kept in found["runs"]):
            continue
        # What has never run may take as long as what has, and its training.
        unknown = max(took.values(), default=0.0) + options.tuning
        started = time.time()
        if started + took.get(run.method, unknown) > deadline:
            found["no_time_left"].append(about)
            continue
        try:
            _, record = run_recipe(
                dense, recipe, options.calib, yardstick, base["perplexity"], run.seed
            )
        except GraphoptError as error:
            record = {"recipe": recipe, "refused": str(error)}
        except Exception as error:  # a bug, which is told; the other runs are worth their time
            traceback.print_exc()
            record = {"recipe": recipe, "failed": f"{type(error).__name__}: {error}"}
        took[run.method] = time.time() - started
        found["runs"].append({**about, **record})
        outcome = (
            record.get("refused")
            or record.get("failed")
            or (f"{record['times_dense']:.3f} x dense, {record['seconds']:.1f} s")
        )
        print(f"{name}: {run.method}, seed {run.seed}: {outcome}", flush=True)
        save(name, options, found)
    save(name, options, found)
    return found


def kept_runs(name: str, yardstick: Yardstick, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs that were kept of a model and device, to go on behind them."""
    if not options.out.is_file():
        return []
    parts = json.loads(options.out.read_text(encoding="utf-8"))
    part = parts.get(f"{name} on {options.device}")
    if part is None:
        return []
    settings = {
        "tuning_seconds": options.tuning,
        "text": options.text.name,
        "calib": options.calib.name,
        "windows": list(yardstick.windows.shape),
    }
    if any(part[key] != value for key, value in settings.items()):
        raise UsageError(
            f"{options.out} has runs of {name} with other texts, windows or seconds of training.",
            "Give the same, another --out, or leave --go-on out.",
        )
    return list(part["runs"])


def save(name: str, options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    command = [
        "python tools/bench_models.py",
        f"--models {shlex.quote(name)} --device {options.device}",
    ]
    command += [
        f"--{option} {getattr(options, option).name}"
        for option in ("calib", "text", "piqa")
        if getattr(options, option) is not None
    ]
    command += [f"--windows {options.windows}"] if options.windows else []
    command.append(f"--seeds {','.join(map(str, options.seeds))} --draws {options.draws}")
    command.append(f"--tuning {options.tuning:g}")
    keep(options.out, name, command, torch.device(options.device), found)


def named(models: Sequence[str]) -> dict[str, str]:
    """Return the models that are asked for, by the names under which they are kept."""
    found: dict[str, str] = {}
    for model in models:
        if model == "trained":
            found |= {
                path.parent.name: str(path.parent) for path in sorted(TRAINED.glob("*/config.json"))
            }
            continue
        name, _, place = model.rpartition("=")
        found[name or Path(place).stem] = place
    return found


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["trained"], help="NAME=MODEL, or trained")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--piqa", type=Path, help="questions, as for graphopt eval --piqa")
    parser.add_argument("--methods", default="", help="names, with semicolons; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, help="of the evaluation text; all by default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--draws", type=int, default=3, help="of random blocks, with each seed")
    parser.add_argument("--tuning", type=float, default=10.0, help="seconds of each training")
    parser.add_argument("--seconds", type=float, default=3600.0, help="in all, at most")
    parser.add_argument("--go-on", action="store_true", help="run what --out has not yet")
    parser.add_argument("--jobs", type=int, default=1, help="models measured at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "models.json")
    options = parser.parse_args()
    options.deadline = time.time() + options.seconds
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.methods = options.methods.split(";") if options.methods else list(METHODS)
    unknown = sorted(set(options.methods) - set(METHODS))
    if unknown:
        parser.error(f"no methods {unknown}; there are {', '.join(METHODS)}")
    models = named(options.models)
    # Models that wait for their turn get their part of the time.
    options.share = options.seconds / math.ceil(len(models) / options.jobs)
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        started = {name: pool.submit(measure, name, models[name], options) for name in models}
        for name, run in started.items():
            found[name] = run.result()
    print(methods_on_models(found))
    for name, part in found.items():
        for method in part["methods"]:
            if controls := not_better(part, method):
                lines = "; ".join(told(part, method)) or "nothing"
                print(f"{name}, {method}: not better than {', '.join(controls)}; said: {lines}")
        if part["no_time_left"]:
            print(f"{name}: no time left for {len(part['no_time_left'])} runs")


if __name__ == "__main__":
    main()
