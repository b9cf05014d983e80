"""What benches have in common: recipes run on a model, shapes of large models, kept results."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import graphopt as go
from graphopt.calibration.text import held_out_perplexity, text_windows
from graphopt.capture import capture
from graphopt.evaluate.perplexity import read_text
from graphopt.evaluate.piqa import PiqaRow, piqa_accuracy, read_piqa
from graphopt.execute.interpreter import resident
from graphopt.execute.language_model import ProgramModel, load_tokenizer
from graphopt.ir.graph import Program
from graphopt.ir.weights import Producer, Weight
from graphopt.report.records import PassEntry
from graphopt.targets import all_targets

LOGITS_AT_ONCE = 2**24
"""Numbers that a batch of the evaluation text may give; small models wait for launches else."""

PACKAGES = ("torch", "transformers", "onnxruntime", "numpy")
LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def target_here() -> str:
    """Return the newest GPU target that this machine's GPU is not older than."""
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    able = [
        (target.compute_capability, target.name)
        for target in all_targets().values()
        if target.compute_capability is not None and target.compute_capability <= here
    ]
    return max(able)[1]


@dataclass(frozen=True)
class Yardstick:
    """What the quality of a model, and of all that is made of it, is measured by.

    Attributes:
        windows: Of the evaluation text, int64 [N, S]; S is 2,048, or what the model takes.
        questions: Of PIQA; None where none are asked.
        at_once: Windows of a batch.
    """

    windows: Tensor
    questions: Sequence[PiqaRow] | None
    device: torch.device
    at_once: int = 1

    @classmethod
    def of(
        cls,
        dense: Program,
        text: Path,
        device: torch.device,
        windows: int | None = None,
        piqa: Path | None = None,
    ) -> Yardstick:
        """Read the evaluation text by a model's tokenizer.

        Args:
            windows: How many are read, at most.
            piqa: Questions; without them no accuracy is measured.
        """
        length = min(2048, ProgramModel(dense).positions or 2048)
        ids = text_windows(dense, read_text(text), length)[:windows]
        at_once = max(1, LOGITS_AT_ONCE // (length * int(dense.config["vocab_size"])))
        return cls(ids, None if piqa is None else read_piqa(piqa), device, at_once)

    def measure(self, program: Program) -> dict[str, float]:
        """Return perplexity, and accuracy on the questions, in fp32."""
        program = resident(program, torch.float32, self.device)
        found = {
            "perplexity": held_out_perplexity(
                program, self.windows, self.device, torch.float32, self.at_once
            )
        }
        if self.questions is not None:
            model = ProgramModel(program, device=self.device)
            tokenizer = load_tokenizer(model)
            found["piqa"] = piqa_accuracy(model, tokenizer, self.questions, batch=32).accuracy
        return found


def run_recipe(
    dense: Program, recipe: str, calib: Path, yardstick: Yardstick, base: float, seed: int = 0
) -> tuple[Program, dict[str, Any]]:
    """Run a recipe; return what it makes, and the record of the run.

    What a training compiles is compiled anew in each run, as in a user's first.

    Args:
        base: The dense model's perplexity.
    """
    torch.compiler.reset()
    started = time.perf_counter()
    with fresh_cache():
        program, report = go.Pipeline.parse(recipe).run(
            dense, go.RunOptions(calib=calib, device=yardstick.device, verify=False, seed=seed)
        )
    seconds = time.perf_counter() - started
    measured = yardstick.measure(program)
    return program, {
        "recipe": recipe,
        "seconds": seconds,
        **measured,
        "times_dense": measured["perplexity"] / base,
        "passes": {entry.name: brief(entry.details) for entry in report.passes},
        "said": said(report.passes),
    }


def said(passes: Sequence[PassEntry]) -> list[str]:
    """Return what passes left alone or warned of: a line a reason, with the places."""
    lines = []
    for entry in passes:
        places: dict[str, list[str]] = {}
        for skip in entry.skipped:
            places.setdefault(skip.reason, []).append(skip.where)
        for reason, where in places.items():
            shown = ", ".join(where[:2]) + (f" and {len(where) - 2} more" if where[2:] else "")
            lines.append(f"{entry.name}: {shown}: {reason}")
    return lines


def run_recipes(
    recipes: Sequence[str],
    *,
    calib: Path,
    text: Path,
    device: torch.device,
    windows: int | None = None,
    piqa: Path | None = None,
    seed: int = 0,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
    made: Callable[[Program], None] = lambda program: None,
    more: Callable[[Program, Tensor, torch.device], dict[str, Any]] = lambda *_: {},
) -> dict[str, Any]:
    """Run recipes on the demo; perplexity of the whole evaluation text before and after.

    Args:
        windows: How many windows of 2,048 tokens of the text are read, at most.
        piqa: Questions; without them no accuracy is measured.
        save: Called with all results so far: a later run may be cut off.
        made: Called with what each recipe makes.
        more: What else to measure of it, given the windows and the device.
    """
    dense = capture("demo")
    yardstick = Yardstick.of(dense, text, device, windows, piqa)
    base = yardstick.measure(dense)
    print(f"dense {base}", flush=True)
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "dense": base,
        "text": text.name,
        "calib": calib.name,
        "windows": len(yardstick.windows),
        "runs": runs,
    }
    for recipe in recipes:
        program, run = run_recipe(dense, recipe, calib, yardstick, base["perplexity"], seed)
        runs.append({**run, **more(program, yardstick.windows, device)})
        quality = ", ".join(f"{name} {run[name]:.3f}" for name in base)
        print(
            f"{recipe}: {quality}, {run['times_dense']:.3f} x dense, {run['seconds']:.1f} s",
            flush=True,
        )
        save(found)
        made(program)
    return found


def brief(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pass tells, without the curves that its report is for; of parts the means."""
    left_out = ("scores", "candidates", "reconstructions", "loads")
    kept = {name: value for name, value in details.items() if name not in left_out}
    for several in ("parts", "blocks"):
        parts = kept.get(several)
        if isinstance(parts, list) and parts and isinstance(parts[0], dict):
            numbers = [name for name, value in parts[0].items() if isinstance(value, int | float)]
            kept[several] = {
                name: statistics.mean(part[name] for part in parts) for name in numbers
            } | {"count": len(parts)}
    if "training" in kept:
        kept["training"] = [
            {name: value for name, value in part.items() if name != "losses"}
            for part in kept["training"]
        ]
    return kept


@dataclass(frozen=True)
class Random(Producer):
    """Small random numbers, made anew on the device whenever they are asked for."""

    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype  # type: ignore[misc]
    device: str
    seed: int

    def load(self) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        value = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return value.normal_(0.0, 0.02, generator=generator)


def random_llama(device: torch.device, config: Mapping[str, Any] = LLAMA_7B) -> Program:
    """Return a Llama, a 7B by default, whose bf16 weights are random, and made when read."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "config.json"
        path.write_text(json.dumps(dict(config)), encoding="utf-8")
        program = capture(f"config:{path}")
    for seed, weight in enumerate(list(program.weights)):
        if not weight.constant:
            made = Random(weight.shape, torch.bfloat16, str(device), seed)
            program.weights.replace(Weight(weight.name, made, weight.checkpoint))
    return program


def keep(
    out: Path, name: str, command: Sequence[str], device: torch.device, found: Mapping[str, Any]
) -> None:
    """Put what a part of a bench gave beside what is there.

    Args:
        out: The file of results.
        name: The name of the part, under which and the device it stands.
        command: What gave it, a line of a shell in pieces; see `given_words`.
    """
    cores = len(os.sched_getaffinity(0))
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {cores} cores"
    part = {
        "command": " ".join(command),
        "date": datetime.date.today().isoformat(),
        "device": where,
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out.parent):
        kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        kept[f"{name} on {device.type}"] = part
        out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes that measure, a model each, from the results in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
