"""Compare models that see, of every family with a small config, with what graphopt makes of them.

    python tools/sweep_vision.py [--families llava,gemma3]

The sibling of tools/sweep_families.py: the small models are those of tests/vision_models.py, run on
prompts with one picture, with two, with none, and of unequal lengths. The result,
benchmarks/vision_families.json, has a row for each, which tools/tables.py makes a table of.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from emitted import load_file  # noqa: E402
from family_sweep import RECIPES, TEXT, attempt, verdict  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402
from vision_models import FAMILIES, prompts, save_vision, vision_model  # noqa: E402

import graphopt as go  # noqa: E402
from graphopt.execute.interpreter import Runner  # noqa: E402
from graphopt.ir.sighted import sighted  # noqa: E402
from graphopt.vision.tower import VisionTower  # noqa: E402

PACKAGES = ("torch", "transformers")
PROMPTS = {"one picture": [1], "two pictures": [2], "text alone": [0], "unequal": [1, 2]}
"""How many pictures the prompts of a batch have, by what it is called."""

TOLERANCE = 1e-4
"""How far a logit may be off, in shares of the largest one."""


def _error(found: Tensor, want: Tensor, mask: Tensor) -> float:
    real = mask.bool()
    return float((found - want)[real].abs().max() / want[real].abs().max())


def _program(program: go.Program, given: dict[str, Tensor]) -> Tensor:
    return Runner(sighted(program)).logits(VisionTower(program).inputs(**given))


def _errors(logits: Any, family: str, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return the errors of what gives logits of prompts, by what these are called."""
    found = {}
    for name, counts in PROMPTS.items():
        given = prompts(family, counts)
        with torch.no_grad():
            found[name] = _error(logits(given), wanted[name], given["attention_mask"])
    return found


def _torch(program: go.Program, out: Path, family: str, wanted: dict[str, Tensor]) -> Any:
    go.emit(program, out, emit=("torch",))
    module = load_file(out / "model.py")
    model = module.load(out)
    tower = module.tower(model, out)
    return _errors(lambda given: model(**tower.embeddings(**given))[0], family, wanted)


def _hf(program: go.Program, out: Path, family: str, wanted: dict[str, Tensor]) -> Any:
    go.emit(program, out, emit=("hf",))
    model, info = AutoModelForImageTextToText.from_pretrained(
        out / "hf", output_loading_info=True, trust_remote_code=True
    )
    if any(info.values()):
        raise AssertionError(f"{info}")
    model.eval()
    return _errors(lambda given: model(**given).logits, family, wanted)


FORMS = {"torch": _torch, "hf": _hf}


def sweep(family: str, work: Path) -> dict[str, Any]:
    """Return what every form makes of a family's small model, as JSON data.

    Args:
        work: Empty folder.
    """
    model = vision_model(family)
    wanted = {}
    for name, counts in PROMPTS.items():
        with torch.no_grad():
            wanted[name] = model(**prompts(family, counts)).logits
    source, held = str(save_vision(work / "model", family)), list[go.Program]()

    def capture() -> dict[str, Any]:
        program = go.capture(source)
        held.extend((program, go.Pipeline.default().run(program, go.RunOptions(verify=False))[0]))
        return {"carried": len(list(program.vision.carried)) if program.vision else 0}

    found: dict[str, Any] = {"capture": attempt(capture)}
    if not held:
        return {"results": found}
    program, cached = held
    found["program"] = attempt(lambda: _errors(lambda g: _program(cached, g), family, wanted))
    for name, form in FORMS.items():
        found[name] = attempt(lambda n=name, f=form: f(cached, work / n, family, wanted))  # type: ignore[misc]
    for name in RECIPES:
        found |= _passed(name, program, family, work)
    return {"results": found}


def _passed(name: str, program: go.Program, family: str, work: Path) -> dict[str, Any]:
    """Run a recipe; return how what it makes comes out, beside its program form."""
    text, made = work / "text.txt", list[go.Program]()
    text.write_text(TEXT, encoding="utf-8")

    def run() -> dict[str, Any]:
        options = go.RunOptions(calib=text, verify=False)
        passed, _ = go.Pipeline.parse(RECIPES[name]).run(program, options)
        made.append(go.Pipeline.default().run(passed, go.RunOptions(verify=False))[0])
        return {}

    ran = attempt(run)
    if not made:
        return {f"{name}, {form}": ran for form in FORMS}
    (result,) = made
    with torch.no_grad():
        wanted = {n: _program(result, prompts(family, counts)) for n, counts in PROMPTS.items()}
    return {
        f"{name}, {key}": attempt(
            lambda k=key, f=form: f(result, work / f"{name}-{k}", family, wanted)  # type: ignore[misc]
        )
        for key, form in FORMS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="", help="names, with commas; by default all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "vision_families.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    for family in args.families.split(",") if args.families else FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            row = sweep(family, Path(folder))
        row["verdicts"] = {
            name: verdict(result, None if name == "capture" else TOLERANCE)
            for name, result in row["results"].items()
        }
        rows[family] = row
        said = {n: text for n, text in row["verdicts"].items() if text != "right"}
        print(f"{family}:", said or "right", flush=True)
    result = {
        "command": "python tools/sweep_vision.py " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "families": rows,
    }
    args.out.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    wrong = [n for n, row in rows.items() if any(t[0] == "!" for t in row["verdicts"].values())]
    print(f"{len(rows)} families, {len(wrong)} wrong or without a sentence")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
