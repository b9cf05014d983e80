"""Models emitted with packed and with dense weights, of one shape and random, to be decoded."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measure import LLAMA_7B, random_llama
from turns import ON_GPU, Result, Rows

from graphopt.compiler import emit
from graphopt.ir import Array, Dequantised, Packed, Program, Weight
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.targets import get_target

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LLAMA_1B = LLAMA_7B | (
    {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_key_value_heads": 4,
    }
    if ON_GPU
    else {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }
)  # fmt: skip
PROMPT, NEW, TURNS = (64, 128, 5) if ON_GPU else (5, 3, 1)


def with_codes(program: Program, encoding: Packed) -> Program:
    """Return a copy whose projections and head have random codes."""
    made = program.copy()
    generator = torch.Generator().manual_seed(0)
    for weight in program.weights:
        if not weight.name.endswith(("_proj.weight", "lm_head.weight")):
            continue
        shapes = encoding.stored(weight.shape, torch.bfloat16)
        (shape, _), (rows, _) = shapes["packed"], shapes["scales"]
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.full(rows, 0.25 / weight.shape[1] ** 0.5, dtype=torch.bfloat16)
        producer = Dequantised(encoding, Array(codes), Array(scales))
        made.weights.replace(Weight(weight.name, producer, weight.checkpoint))
    return made


def emitted(program: Program, out: Path, target: str) -> ModuleType:
    """Emit a program for a target and return its `model.py`."""
    emit(program, out, target=target, emit=("torch",))
    spec = importlib.util.spec_from_file_location(f"emitted_{out.name}", out / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_kernels(module: ModuleType, model: Any) -> Result:
    """Compare the logits of a prompt, and of a few tokens, with those of dense weights.

    Raises:
        AssertionError: They are farther apart than roundings of 16 bits.
    """
    kernels = sys.modules[f"{module.kernels.__name__}.quantised_linear"]
    found: Result = {}
    for tokens in (1, 4, PROMPT):
        ids = torch.arange(1, tokens + 1, device=DEVICE)[None]
        by_codes = model(ids)[0].float()
        read = kernels.QuantisedWeight.packed_codes
        kernels.QuantisedWeight.packed_codes = lambda self: None
        try:
            dense = model(ids)[0].float()
        finally:
            kernels.QuantisedWeight.packed_codes = read
        error = float((by_codes - dense).abs().max() / dense.abs().max())
        found[f"error_of_{tokens}"] = error
        # Some hundred roundings to bf16 on the way, most of them averaged out.
        assert error < 3e-2, error
    return found


class Decoded:
    """An emitted model that decodes, in turns with others.

    Attributes:
        model: What the package loads.
        rates: Tokens a second of each turn, by the wall clock.
        times: Microseconds of a step in each turn, of the GPU alone: steps that were queued.
    """

    def __init__(self, module: ModuleType, folder: Path) -> None:
        self.model = module.load(folder, device=DEVICE)
        self._decoder = module.Decoder(self.model, PROMPT + NEW + 1)
        self.rates: list[float] = []
        self.times: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._decoder.start(list(range(1, PROMPT + 1)))
        self._decoder.step()
        if ON_GPU:
            torch.cuda.synchronize()

    def turn(self) -> None:
        """Decode an answer twice: as a user does, and with nobody who reads it."""
        self._begin()
        started = time.perf_counter()
        for _ in self._decoder.steps(NEW - 1):
            pass
        self.rates.append((NEW - 1) / (time.perf_counter() - started))
        if ON_GPU:
            self._begin()
            (graph,) = self._decoder.graphs.values()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(NEW - 1):
                graph.replay()
            end.record()
            end.synchronize()
            self.times.append(1e3 * start.elapsed_time(end) / (NEW - 1))

    def kernels(self) -> dict[str, Result]:
        """Return what `kernels_of` does of a step."""
        self._begin()
        return kernels_of(self._decoder.step)


def kernels_of(step: Callable[[], Any], steps: int = 8) -> dict[str, Result]:
    """Return how often a step launches each kernel, and the microseconds that it takes of a step.

    A kernel that starts before the one in front has ended counts from there, so that sums may be
    more than a step takes.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return {
        event.key: {
            "launches": event.count / steps,
            "microseconds": round(event.device_time_total / steps, 2),
        }
        for event in events
    }


def _stem(label: str) -> str:
    """Return a label as the name of a folder and of a module."""
    return "".join(filter(str.isalnum, label))


@contextlib.contextmanager
def transforms_apart(target: str) -> Iterator[None]:
    """Let transforms be kernels of their own, whatever the target says."""
    table = get_target(target).quantised
    if table is None or table["front"] is None:
        yield
        return
    before = table["front"]["tokens"]
    table["front"]["tokens"] = 0
    try:
        yield
    finally:
        table["front"]["tokens"] = before


def model_part(rows: Rows, target: str, only: Collection[str] = ()) -> None:
    """Emit models and let them decode, in turns.

    Args:
        only: Labels of the models, in their order; all by default.
    """
    program = random_llama(DEVICE, LLAMA_1B)
    for name in ("canonicalise", "insert-kv-cache"):
        program = make_pass(name, {}).run(program, Context()).program
    transformed = program.copy()  # which passes change in place
    for step, options in (("insert-affine", {"kind": "hadamard"}), ("fold-affine", {})):
        transformed = make_pass(step, options).run(transformed, Context()).program
    group = 128 if ON_GPU else 32
    models = {
        "bf16": (program, None),
        f"int4 group {group}": (program, group),
        "int4 group 32": (program, 32),
        f"int4 group {group}, transforms": (transformed, group),
        f"int4 group {group}, transforms apart": (transformed, group),
    }
    decoded: dict[str, tuple[Decoded, Result]] = {}
    with tempfile.TemporaryDirectory() as work:
        for label in [label for label in only or models if label in models]:
            made, size = models[label]
            packed = made if size is None else with_codes(made, Packed(4, size))
            apart = transforms_apart(target) if "apart" in label else contextlib.nullcontext()
            try:
                with apart:
                    decoded[label] = _ready(label, packed, Path(work) / _stem(label), target)
            except Exception as error:
                rows.fail(f"model {label}", error)
        for turn in range(-1, TURNS):
            # Whose turn is first changes, so that none has always the warmer GPU.
            for label in [*decoded][:: -1 if turn % 2 else 1]:
                try:
                    decoded[label][0].turn()
                except Exception as error:
                    rows.fail(f"model {label}", error)
                    del decoded[label]
        for one, _ in decoded.values():
            del one.rates[0], one.times[:1]
        base = decoded["bf16"][0] if "bf16" in decoded else None
        for label, (one, result) in decoded.items():
            rows.add(f"model {label}", lambda one=one, result=result: _row(one, result, base))


def _ready(label: str, program: Program, folder: Path, target: str) -> tuple[Decoded, Result]:
    """Emit a model, check that it is the one of its label, and compare its kernels with torch's.

    Raises:
        AssertionError: It is another one, or its logits are wrong.
    """
    module = emitted(program, folder, target)
    text = (folder / "model.py").read_text(encoding="utf-8")
    fronted = "transformed_packed_linear(" in text
    assert not (fronted and "apart" in label), "not the model that it is called"
    transforms = "transformed(" in text or fronted
    assert transforms == ("transforms" in label), "not the model that it is called"
    made = Decoded(module, folder)
    return made, check_kernels(module, made.model) if "int4" in label else {}


def _row(one: Decoded, result: Result, base: Decoded | None) -> tuple[Result, str]:
    """Return what is kept of a model, and a line of it.

    Args:
        base: What it is compared with.
    """
    result = {**result, "tokens_per_second": one.rates}
    shown = f"{statistics.median(one.rates):.0f} tokens a second"
    if ON_GPU:
        result["gpu_microseconds"] = one.times
        shown += f", a step {statistics.median(one.times):.0f} us of the GPU"
    if base is not None and base is not one:
        result["times_bf16"] = statistics.median(one.rates) / statistics.median(base.rates)
        shown += f", x{result['times_bf16']:.2f} of bf16"
        if ON_GPU:
            by_gpu = statistics.median(base.times) / statistics.median(one.times)
            result["times_bf16_by_gpu"] = by_gpu
            shown += f" (x{result['times_bf16_by_gpu']:.2f} by the GPU's time)"
    if ON_GPU:
        result["kernels_of_a_step"] = one.kernels()
        launches = sum(kernel["launches"] for kernel in result["kernels_of_a_step"].values())
        shown += f"; {launches:.0f} launches"
    return result, shown
