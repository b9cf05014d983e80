"""One family's drawn models in every form, against eager transformers.

A form is right where no logit of a real token is further from eager's than the tolerance, in
shares of the largest logit. The tolerance is sixteen times the distance of eager in fp32 from
eager in fp64, both of the same weights, and no less than 2e-5: what a sum of a few hundred
products in another order may differ by, through a few layers.
"""

from __future__ import annotations

import inspect
import random
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from families import randomise
from family_configs import VOCAB, draw
from tiny_models import byte_tokenizer
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.torch_artifact import TorchArtifactModel
from graphopt.errors import GraphoptError, VerifyError
from graphopt.execute.language_model import LanguageModel, ProgramModel
from graphopt.storage.artifact import load_program

FORMS = ("program", "torch", "onnx", "hf")
RECIPES = {
    "prune-blocks": "prune-blocks{blocks=1,windows=1,seqlen=32}",
    "carve-moe": "carve-moe{windows=4,seqlen=32}",
}
TEXT = "Some calm words of a text that goes on and on, and then some more of them. " * 8
STEPS = ((0, 8), (8, 11), (11, 12), (12, 17))
"""Where a cached run is cut: several and single tokens on a past."""

LEAST_TOLERANCE = 2e-5
ROUNDINGS = 16
DRAWS = 12
MOST_PARAMETERS = 20_000_000

Batch = tuple[Tensor, Tensor, Tensor]
"""input_ids, attention_mask and position_ids, all int64 [B, S]."""


def batches() -> Iterator[Batch]:
    """Yield one sequence, and three of which two are padded on the left."""
    generator = torch.Generator().manual_seed(1)
    length = STEPS[-1][1]
    for padding in ((0,), (0, 5, 1)):
        ids = torch.randint(3, VOCAB, (len(padding), length), generator=generator)
        mask = torch.ones_like(ids)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        yield ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def eager(model: nn.Module, batch: Batch) -> Tensor:
    """Return eager's logits, given as many of the inputs as the model takes."""
    names = ("input_ids", "attention_mask", "position_ids")
    accepted = inspect.signature(model.forward).parameters
    given = {name: value for name, value in zip(names, batch, strict=True) if name in accepted}
    with torch.no_grad():
        logits: Tensor = model(**given, use_cache=False).logits
    return logits


def error(want: Tensor, got: Tensor, mask: Tensor, start: int = 0) -> float:
    """Return the largest error at real tokens in shares of the largest logit.

    Args:
        want: Of the whole sequences, [B, S, vocab].
        got: From token `start` on.
    """
    real = mask[:, start : start + got.shape[1]].bool()
    apart = (got - want[:, start : start + got.shape[1]])[real]
    # A mask may pad every token of a step.
    return float(apart.abs().max() / want[mask.bool()].abs().max()) if len(apart) else 0.0


def is_causal(model: nn.Module) -> bool:
    """Return whether in eager no token's logits depend on what comes behind it."""
    ids, mask, positions = next(batches())
    other = ids.clone()
    other[:, -1] = 3 + (ids[:, -1] - 2) % (VOCAB - 3)
    before, after = (eager(model, (x, mask, positions))[:, :-1] for x in (ids, other))
    return error(before, after, mask[:, :-1]) <= LEAST_TOLERANCE


def compare(
    form: LanguageModel, wanted: Sequence[Tensor], *, causal: bool = True
) -> dict[str, float]:
    """Return the errors of a form, by what was run.

    Args:
        causal: Of eager. Where it is not, steps, which know no later tokens, compare with nothing.
    """
    found: dict[str, float] = {}
    for (ids, mask, positions), want in zip(batches(), wanted, strict=True):
        rows = f"batch {len(ids)}"

        def step(start: int, stop: int, cache: Any, batch: Batch = (ids, mask, positions)) -> Any:
            ids, mask, positions = batch
            return form.step(
                {
                    "input_ids": ids[:, start:stop],
                    "attention_mask": mask[:, :stop],
                    "position_ids": positions[:, start:stop],
                },
                cache,
            )

        whole, _ = step(0, ids.shape[1], form.start(len(ids)))
        found[f"prefill, {rows}"] = error(want, whole, mask)
        if not causal:
            continue
        cache = form.start(len(ids))
        for start, stop in STEPS:
            logits, cache = step(start, stop, cache)
            count = "one" if stop - start == 1 else "several"
            name = f"{count} on a past, {rows}" if start else f"beginning, {rows}"
            found[name] = max(found.get(name, 0.0), error(want, logits, mask, start))
    return found


def _implementation(config: Any) -> str:
    """Return the attention of transformers that is the reference.

    It is the one written out, but for Falcon with ALiBi: there it adds the bias that the mask has
    already, while the one that transformers chooses adds it once.
    """
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def _build(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=_implementation(config)
    )
    return model.eval()


Drawn = tuple[Any, nn.Module, list[Tensor]]
"""A config, its model and eager's logits."""


def drawn_model(family: str, seed: int, number: int) -> Drawn | tuple[list[str], Any]:
    """Return what was drawn; or why nothing of it runs in transformers, and the last config."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    problems: list[str] = []
    config = None
    for again in range(DRAWS):
        rng = random.Random(f"{seed} {family} {number} {again}")
        try:
            config = CONFIG_MAPPING[family](**draw(family, rng))
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size} parameters")
            model = _build(config)
            randomise(model, seed)
            wanted = [eager(model, batch) for batch in batches()]
            if not all(bool(logits.isfinite().all()) for logits in wanted):
                raise ValueError("logits are not finite")
        except Exception as reason:  # transformers' own, of any kind
            problems.append(f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}")
            continue
        return config, model, wanted
    return sorted(set(problems)), config


def _open(folder: Path) -> nn.Module:
    """Return the model of a checkpoint as transformers loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=_implementation(config),
        trust_remote_code=True,
    )  # fmt: skip
    return model.eval()


def saved_model(model: nn.Module, folder: Path) -> tuple[nn.Module, list[str]]:
    """Save a model; return what transformers loads again, and the weights it then gave values.

    Youtu has a row of its embedding set to 0 whenever a checkpoint is loaded. What is compared
    is a model that loads as it was saved.
    """
    changed: list[str] = []
    for _ in range(2):
        model.save_pretrained(folder)  # type: ignore[operator]
        again = _open(folder)
        held = again.state_dict()
        other = [k for k, v in model.state_dict().items() if not torch.equal(v, held[k])]
        model, changed = again, changed or other
        if not other:
            break
    return model, changed


def _rounding(config: Any, model: nn.Module, wanted: Sequence[Tensor]) -> float:
    """Return how far eager in fp32 is from eager in fp64, in shares of the largest logit."""
    try:
        exact = _build(config, torch.float64)
        exact.load_state_dict(model.state_dict())
        return max(
            error(eager(exact, batch), want.double(), batch[1])
            for batch, want in zip(batches(), wanted, strict=True)
        )
    except (RuntimeError, TypeError):  # a family that computes in fp32 alone
        return 0.0


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` found, its refusal, or what broke; with the seconds it took."""
    started = time.perf_counter()
    try:
        found = work()
    except VerifyError as wrong:  # a sentence too, but to the developer of a pass
        found = {"broken": str(wrong)[:400]}
    except GraphoptError as refusal:
        found = {"refused": re.sub(r"\S*/(?=model\b|config/)", "", refusal.message)}
    except Exception as reason:  # what is looked for here
        found = {"broken": f"{type(reason).__name__}: {reason}"[:400]}
        traceback.print_exc()
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _form(
    name: str, program: go.Program, out: Path, wanted: Sequence[Tensor], *, causal: bool
) -> dict[str, float]:
    """Emit a form, open it and compare it."""
    if name == "program":
        return compare(ProgramModel(program), wanted, causal=causal)
    go.emit(program, out, emit=(name,))
    if name == "torch":
        return compare(TorchArtifactModel(out, load_program(out)), wanted, causal=causal)
    if name == "onnx":
        return compare(OnnxArtifactModel(out / "onnx"), wanted, causal=causal)
    again = _open(out / "hf")
    errors = [
        error(want, eager(again, batch), batch[1])
        for batch, want in zip(batches(), wanted, strict=True)
    ]
    return {"reloaded": max(errors)}


def sweep(
    family: str,
    seed: int,
    number: int,
    work: Path,
    forms: Sequence[str] = FORMS,
    recipes: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw one config of a family and return what each form makes of it, as JSON data.

    Args:
        number: Of the draw; the same seed and number give the same config.
        work: Empty folder.
        recipes: Names among `RECIPES`; what they make is compared with its program form.
    """
    from transformers import CONFIG_MAPPING

    row: dict[str, Any] = {"draw": number}
    drawn = drawn_model(family, seed, number)
    if len(drawn) == 2:
        problems, config = drawn
        row["undrawn"] = problems[:3]
        try:
            (config or CONFIG_MAPPING[family]()).save_pretrained(work / "config")
        except Exception as reason:  # the class has no default, or cannot write it
            return {**row, "capture": {"refused": f"transformers: {reason}"[:200]}}
        place = str(work / "config" / "config.json")
        row["capture"] = attempt(lambda: {"captured": go.capture(place).name})
        return row
    config, model, wanted = drawn
    try:
        model, row["set on loading"] = saved_model(model, work / "model")
    except ValueError:  # transformers cannot load what it saved, such as Emu3's text model
        row["set on loading"] = []
    byte_tokenizer().save_pretrained(work / "model")
    if row["set on loading"]:
        wanted = [eager(model, batch) for batch in batches()]
    causal = is_causal(model)
    if not causal:
        row["causal"] = False
    rounding = _rounding(config, model, wanted)
    row["tolerance"] = max(ROUNDINGS * rounding, LEAST_TOLERANCE)
    row["config"] = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
    held: list[go.Program] = []

    def capture() -> dict[str, Any]:
        program = go.capture(str(work / "model"))
        held.extend((program, go.Pipeline.default().run(program, go.RunOptions(verify=False))[0]))
        assert causal or not held[1].states, "a cache although tokens see later ones"
        return {"cached": bool(held[1].states), "notes": [note for _, note in held[1].notes][:3]}

    row["capture"] = attempt(capture)
    if not held:
        return row
    program, cached = held
    row["forms"] = {
        name: attempt(
            lambda name=name: _form(name, cached, work / name, wanted, causal=causal)  # type: ignore[misc]
        )
        for name in forms
    }
    row["passes"] = {
        name: attempt(
            lambda name=name: _passed(name, program, work, causal=causal)  # type: ignore[misc]
        )
        for name in recipes
    }
    return row


def _passed(name: str, program: go.Program, work: Path, *, causal: bool) -> dict[str, Any]:
    """Run a recipe; return how its program comes out as ONNX and as a checkpoint."""
    text = work / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    made, report = go.Pipeline.parse(RECIPES[name]).run(
        program, go.RunOptions(calib=text, verify=False)
    )
    made, _ = go.Pipeline.default().run(made, go.RunOptions(verify=False))
    form = ProgramModel(made)
    wanted = [form.logits(ids, mask) for ids, mask, _ in batches()]
    found: dict[str, Any] = {"changed": report.passes[0].changed}
    for emitted in ("onnx", "hf"):
        out = work / f"{name}-{emitted}"
        found[emitted] = attempt(
            lambda e=emitted, o=out: _form(e, made, o, wanted, causal=causal)  # type: ignore[misc]
        )
        shutil.rmtree(out, ignore_errors=True)
    return found


def verdicts(row: dict[str, Any]) -> dict[str, str]:
    """Return for each form and pass "right", the refusal, or what is wrong (with a mark "!")."""
    if "ended" in row:
        return {"capture": f"! {row['ended']}"}
    found = {"capture": verdict(row.get("capture", {}), None)}
    if "undrawn" in row and found["capture"] == "right":
        found["capture"] = f"not drawn: {row['undrawn'][0]}"
    tolerance = row.get("tolerance")
    for name, result in row.get("forms", {}).items():
        found[name] = verdict(result, tolerance)
    for name, result in row.get("passes", {}).items():
        if "hf" not in result:
            found[name] = verdict(result, None)
            continue
        found[f"{name}, onnx"] = verdict(result["onnx"], tolerance)
        found[f"{name}, hf"] = verdict(result["hf"], tolerance)
    return found


def verdict(result: dict[str, Any], tolerance: float | None) -> str:
    if "broken" in result:
        return f"! {result['broken']}"
    if "refused" in result:
        return str(result["refused"])
    wrong = {
        name: value
        for name, value in result.items()
        if tolerance is not None and name != "seconds" and not value <= tolerance
    }
    if wrong:
        return "! " + ", ".join(f"{name}: {value:.2g}" for name, value in wrong.items())
    return "right"
