"""Write the tables of the documentation from the results under benchmarks/.

    python tools/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; NAME is a function below.
With --check nothing is written, and the exit code is 1 where a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md",)
_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end table -->", re.DOTALL)


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    return found


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measured_on(result: dict[str, Any], *packages: str) -> str:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages)
    return (
        f"Measured on {result['date']}, {result['device']}, with {versions}: `{result['command']}`."
    )


def demo() -> str:
    """SmolLM2 beside onnxruntime-genai's model builder."""
    result = _result("demo")
    found = result["summary"]
    speed, equal = found["decode_tokens_per_second"], found["prompts_with_equal_tokens"]
    prompts = found["prompts"]

    def seconds(name: str) -> str:
        return f"{found[f'{name}_seconds']:.1f} s"

    def memory(name: str) -> str:
        return f"{found[f'{name}_peak_bytes'] / 1e9:.2f} GB"

    rows = [
        ["time to compile", seconds("unverified"), seconds("builder")],
        ["the same, every pass verified", seconds("verified"), "-"],
        ["peak memory, verified", memory("verified"), memory("builder")],
        [
            "decoding under onnxruntime-genai, tokens a second",
            f"{speed['graphopt']:.1f}",
            f"{speed['builder']:.1f}",
        ],
        [
            "greedy tokens equal to transformers' in fp32, prompts",
            f"{equal['graphopt']} of {prompts}",
            f"{equal['builder']} of {prompts}",
        ],
    ]
    table = _rows(["SmolLM2-135M-Instruct, fp32", "graphopt", "model builder"], rows)
    packages = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
    return f"{table}\n\n{_measured_on(result, *packages)} Medians of three runs, taken in turns."


def quality() -> str:
    """The same model in three forms."""
    result = _result("quality")
    rows = [
        [
            name,
            f"{run['perplexity']:.4f}",
            f"{run['tokens']}",
            f"{run['piqa_accuracy']:.2%}",
            f"{run['piqa_rows']}",
        ]
        for name, run in result["runs"].items()
    ]
    head = ["form", f"perplexity on {result['text']}", "tokens", "PIQA", "questions"]
    packages = ("torch", "transformers", "onnxruntime")
    return f"{_rows(head, rows)}\n\n{_measured_on(result, *packages)}"


def scale() -> str:
    """What a large model costs."""
    result = _result("scale")
    found = result["summary"]
    rows = [
        [
            "`graphopt inspect --config` of a 70B Llama, 80 layers",
            f"{found['inspect_70b_seconds']:.1f} s",
            f"{found['inspect_70b_peak_bytes'] / 1e9:.2f} GB resident",
        ],
        [
            f"`graphopt compile --emit hf` of {found['compile_1_5b_parameters'] / 1e9:.2f}B "
            f"parameters, bf16 in {found['compile_1_5b_shards']} shards",
            f"{found['compile_1_5b_seconds']:.1f} s",
            f"{found['compile_1_5b_anonymous_bytes_above_imports'] / 1e9:.2f} GB anonymous above "
            "the imports",
        ],
    ]
    table = _rows(["", "time", "memory"], rows)
    runs = len(result["inspect_runs"])
    measured = _measured_on(result, "torch", "transformers")
    return f"{table}\n\n{measured} The slowest and the largest of {runs} runs each."


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "quality": quality, "scale": scale}


def render(text: str) -> str:
    """Return a page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end table -->"

    return _TABLE.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say what is out of date")
    args = parser.parse_args()
    stale = False
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh == text:
            continue
        stale = True
        if args.check:
            print(f"{name} is out of date: run `python tools/tables.py`")
        else:
            page.write_text(fresh, encoding="utf-8")
            print(f"{name} written")
    sys.exit(1 if stale and args.check else 0)


if __name__ == "__main__":
    main()
