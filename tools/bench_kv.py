"""What every KV policy does to a model on long texts: perplexity behind a prompt, recall, needles.

    python tools/bench_kv.py --text test-dev.txt [--model demo] [--contexts 4096,8192]
                             [--budgets 1/4,1/8,1/16] [--policies ema,quest] [--windows 4]
                             [--needles 50] [--predictor FILE] [--device cuda]
                             [--out benchmarks/kv.json] [--go-on]

Every policy that is registered runs at every budget, with what it has by default, and those that
can be calibrated and are not by default also with a dense step in sixteen; the predictor with the
checkpoint FILE. A policy that is named with options of its own runs with those alone, as in
`--policies 'quest,page-range{page=8}'`. Needles are asked for in the longest texts, with the
smallest budget. Results are kept after every run, beside what other devices gave; with --go-on
those that the file has of the same model and texts are not run again. On a GPU all of it takes
minutes; for a CPU one context and one budget are enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import keep

from graphopt.capture import capture
from graphopt.evaluate.kv_policy import PolicyResult, measure_policy
from graphopt.evaluate.needles import needle_tasks, retrieval
from graphopt.evaluate.perplexity import read_text, text_windows
from graphopt.evaluate.policy_spec import LEARNED, PolicySpec
from graphopt.execute.language_model import ProgramModel, load_tokenizer
from graphopt.ir.kv_policies import POLICIES
from graphopt.pass_manager.recipe import parse_named_options
from graphopt.support.devices import usable_device

ROOT = Path(__file__).resolve().parent.parent
OFTEN = "16"
"""Steps from one dense step to the next of policies that have none by default."""


def specs_of(
    policies: Sequence[tuple[str, Mapping[str, Any]]], budget: str, predictor: str | None
) -> list[PolicySpec]:
    """Return the forms of policies that are measured at a budget.

    Args:
        policies: Kinds and their options.
        predictor: The checkpoint of the predictor.
    """
    specs: list[PolicySpec] = []
    for kind, options in policies:
        if options:
            specs.append(PolicySpec.of(kind, {"budget": budget, **options}))
            continue
        learned = {"checkpoint": str(predictor)} if kind in LEARNED else {}
        specs.append(PolicySpec.of(kind, {"budget": budget, **learned}))
        fields = {field.name: field.default for field in dataclasses.fields(POLICIES[kind])}
        if fields.get("calibrate_every", 0) is None:
            specs.append(PolicySpec.of(kind, {"budget": budget, "calibrate": OFTEN}))
    return specs


def kept_runs(out: Path, part: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a file of results has of the same model and texts."""
    kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    same = ("model", "text", "tokens", "prompt", "texts")
    part_kept = kept.get(part, {})
    if any(part_kept.get(name) != found[name] for name in same):
        return []
    return list(part_kept["runs"])


def figures(spec: PolicySpec, result: PolicyResult, dense: PolicyResult) -> dict[str, Any]:
    """Return what is kept of a run with a policy."""
    recall, best, pages = result.recall, result.oracle_recall, result.pages_read
    assert recall is not None and best is not None and pages is not None
    return {
        "policy": spec.text,
        "kind": spec.kind,
        "budget": str(spec.budget),
        "budget_tokens": spec.budget_tokens(result.tokens),
        "perplexity": result.perplexity,
        "times_dense": result.perplexity / dense.perplexity,
        "by_position": result.by_position,
        "recall": recall,
        "oracle_recall": best,
        "share_of_oracle": recall / best,
        "tokens_read": pages * spec.page,
        "recall_by_layer": [layer.recall_G for layer in result.layers],
        "seconds": result.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--contexts", default="4096,8192")
    parser.add_argument("--budgets", default="1/4,1/8,1/16")
    parser.add_argument("--policies", default=",".join(sorted({*POLICIES} - {"dense"})))
    parser.add_argument("--windows", type=int, default=4, help="texts of each context")
    parser.add_argument("--needles", type=int, default=50, help="0 for none")
    parser.add_argument("--predictor", metavar="FILE", help="without one it is left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kv.json")
    parser.add_argument("--go-on", action="store_true", help="run what --out has not yet")
    args = parser.parse_args()
    device = usable_device(args.device)
    model = ProgramModel(capture(args.model), device=device)
    tokenizer, text = load_tokenizer(model), read_text(args.text)
    named = parse_named_options(args.policies, "KV policy", "policy")
    named = [(kind, own) for kind, own in named if args.predictor or kind not in LEARNED]
    contexts, budgets = [int(n) for n in args.contexts.split(",")], args.budgets.split(",")
    command = ["python", "tools/bench_kv.py", "--text", args.text.name, *_given(parser, args)]
    for context in contexts:
        rows, begin = text_windows(
            model, tokenizer, text, windows=args.windows, seqlen=context, bos="every"
        )
        tasks = None
        if args.needles and context == max(contexts):
            tasks = needle_tasks(tokenizer, text, context, args.needles)
        dense = measure_policy(model.runner, rows, None, begin=len(begin))
        found: dict[str, Any] = {
            "model": args.model,
            "text": args.text.name,
            "tokens": context,
            "prompt": dense.prompt,
            "texts": dense.texts,
            "dense": {"perplexity": dense.perplexity, "by_position": dense.by_position},
            "runs": [],
        }
        if args.go_on:
            found["runs"] = kept_runs(args.out, f"{context} tokens on {device.type}", found)
        done = {run["policy"] for run in found["runs"]}
        if tasks is not None:
            found["needles"] = len(tasks.ids)
            found["dense"]["needles"] = retrieval(model.runner, tasks, None).count
        print(f"{context} dense {found['dense']}", flush=True)
        for budget in budgets:
            asked = tasks is not None and Fraction(budget) == min(map(Fraction, budgets))
            for spec in specs_of(named, budget, args.predictor):
                if spec.text in done:
                    continue
                policy = spec.policy_for(model.runner.program, context, device)
                result = measure_policy(model.runner, rows, policy, begin=len(begin))
                run = figures(spec, result, dense)
                if asked and tasks is not None:
                    run["needles"] = retrieval(model.runner, tasks, policy).count
                found["runs"].append(run)
                keep(args.out, f"{context} tokens", command, device, found)
                print(
                    f"{context} {spec.text:40} x{run['times_dense']:.4f} "
                    f"recall {run['recall']:.4f} of {run['oracle_recall']:.4f}, "
                    f"{run['tokens_read']:.0f} tokens, needles {run.get('needles', '-')}, "
                    f"{run['seconds']:.1f} s",
                    flush=True,
                )


def _given(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return the options that are not at their defaults, but for files."""
    names = ("model", "contexts", "budgets", "policies", "windows", "needles", "device")
    changed = [name for name in names if getattr(args, name) != parser.get_default(name)]
    return [word for name in changed for word in (f"--{name}", str(getattr(args, name)))]


if __name__ == "__main__":
    main()
