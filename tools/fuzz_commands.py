"""The command lines of `tools/fuzz_inputs.py`: what reads an input, and odd values of options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from pathlib import Path
from random import Random

from graphopt.cli.commands import app
from graphopt.pass_manager.contract import declared_passes

ODD_PATHS = [
    "",
    ".",
    "/",
    "nothing",
    "text.txt",
    "model",
    "x" * 300,
    "/dev/null",
    "/dev/zero",
    "pipe",
    "text.txt/x",
    "/proc/self/mem",
    "model/config.json",
    "\udcff",
    "a\nb",
    "~nobody/x",
    "/sys/x/y",
    "made",
    "-",
    "model.gguf",
    "made/onnx",
    "made/program.json",
    "loop",
    "loop/loop/loop",
    "locked",
    "socket",
    "out/../../x",
    "recipe.yaml",
    "nothing/" * 2000,
]
ODD_NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "2147483647",
    "2147483648",
    str(2**63 - 1),
    str(2**63),
    str(2**70),
    str(-(2**70)),
    "9" * 5000,
    "x",
    "",
    "1.5",
    "0x10",
    "-0",
    "1_0",
    "٣",
]
ODD_WORDS = [
    "",
    "x",
    "cpu",
    "cuda",
    "cuda:99",
    "cuda:-1",
    "mps",
    "hopper",
    "volta",
    "ascend910b",
    "../targets/cpu",
    "onnx",
    "torch,,onnx",
    ",",
    "hf",
    "\x1b[0m",
    "a" * 9999,
    "\udcff",
    "meta",
    "f64",
    "bf16",
    "decode",
    "top-left",
    "paged",
    "ring",
    "sinks,alibi",
    "first",
    "auto",
    "program",
    "torch",
]
ODD_MODELS = [
    *ODD_PATHS,
    "demo\x00",
    "a/b/c",
    "a/../b",
    "http://127.0.0.1:9/x",
    "hf://x",
    "x" * 9000,
    "owner/name",
    "config:model/config.json",
    "sharded",
    "moe/config.json",
    "made/model.safetensors",
    "/etc",
]
ODD_PROMPTS = ["", " ", "the", "\udcff", "\x00", "a" * 5000, "<end>" * 50, "\x1b[2J", "\u202e"]

RECIPE_TEXTS = [
    "",
    ",",
    "{",
    "canonicalise",
    "canonicalise,,dead-code-elimination",
    'prune-blocks{ratio="',
    "é",
    "dead-code-elimination{x=1}",
    "a" * 10_000,
    "{" * 10_000,
    "insert-kv-cache,insert-kv-cache",
    "insert-kv-cache,canonicalise",
    "canonicalise," * 300 + "canonicalise",
    "tune-moe",
    "fuse-blocks",
    "prune-blocks{blocks=1,blocks=2}",
    "prune-blocks{score=\x00}",
    "canonicalise,\ud800",
]

ODD_OPTION_VALUES = [
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "nan",
    "1e999",
    "none",
    "true",
    "x",
    '""',
    '"\x1b[2J"',
    "[]",
    "[0,0]",
    "[1,x]",
    "[[]]",
    "99999999999",
    str(2**70),
    "9" * 5000,
    "inf",
    "-0.0",
    "4096",
]
"""What an option of a pass may be given as; numbers of steps that would really run are left out."""

GOOD_OPTION_VALUES = {
    "prune-blocks": ["blocks=1", "ratio=0.5", "remove=[0]"],
    "carve-moe": ["experts=4", "windows=1"],
}


def odd_recipe(random: Random) -> str:
    """Return a recipe in text form, of one of the passes with odd options, or none at all."""
    if random.random() < 0.3:
        return random.choice(RECIPE_TEXTS)
    passes = declared_passes()
    name = random.choice(sorted(passes))
    options = [option.name for option in dataclasses.fields(passes[name])]
    given = [
        f"{option}={random.choice(ODD_OPTION_VALUES)}"
        for option in random.sample(options, min(len(options), random.choice((1, 1, 2))))
    ]
    if name in GOOD_OPTION_VALUES and random.random() < 0.5:
        given.append(random.choice(GOOD_OPTION_VALUES[name]))
    before = {"fuse-blocks": "prune-blocks{blocks=1},", "tune-moe": "carve-moe{experts=4},"}
    text = name + ("{" + ",".join(given) + "}" if given else "")
    return (before.get(name, "") if random.random() < 0.8 else "") + text


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option of a command; an argument has no name, and a switch no values."""

    name: str
    kind: type

    def odd(self, random: Random) -> list[str]:
        if self.kind is bool:
            return [self.name]
        return [*([self.name] if self.name else []), self._value(random)]

    def _value(self, random: Random) -> str:
        special = {
            "--passes": odd_recipe,
            "--prompt": lambda r: r.choice(ODD_PROMPTS),
            "--max-new-tokens": lambda r: r.choice(ODD_NUMBERS[:8]),
            "--dump-ir": lambda r: r.choice(("", "text.txt", "text.txt/x", "/proc/x", "out/ir")),
        }
        if self.name in special:
            return special[self.name](random)
        if not self.name:
            return random.choice(ODD_MODELS)
        if self.kind in (int, float):
            return random.choice(ODD_NUMBERS)
        return random.choice(ODD_PATHS if self.kind is Path else ODD_WORDS)


@functools.cache
def options() -> dict[str, list[_Option]]:
    """Return every option of every command, from the signatures that make them."""
    found: dict[str, list[_Option]] = {}
    for info in app.registered_commands:
        assert info.callback is not None
        own = found[info.name or info.callback.__name__] = []
        for parameter in inspect.signature(info.callback, eval_str=True).parameters.values():
            kind, given = typing.get_args(parameter.annotation)[:2]
            kinds = [k for k in typing.get_args(kind) if k is not type(None)]
            name = ""
            if type(given).__name__ == "OptionInfo":
                stated = [n for n in given.param_decls or () if n.startswith("--")]
                name = stated[0] if stated else "--" + parameter.name.replace("_", "-")
            own.append(_Option(name, kinds[0] if kinds else kind))
    return found


FIXED: dict[str, list[str]] = {
    "generate": ["--prompt", "the"],
    "eval": ["--text", "text.txt"],
    "plan-attention": ["--target", "hopper", "--head-dim", "64"],
}
"""What a command cannot do without."""

NEVER = ("--trust-remote-code", "--debug")
"""Options that let code run, and print tracebacks."""


def odd_command(random: Random) -> list[str]:
    """Return a command line with odd values of one to three options, of whichever command."""
    name = random.choice(list(options()))
    own = [option for option in options()[name] if option.name and option.name not in NEVER]
    positional = sum(not option.name for option in options()[name])
    chosen = random.sample(own, min(len(own), random.choice((1, 1, 2, 3))))
    given = [part for option in chosen for part in option.odd(random)]
    models = []
    if name not in ("passes", "targets"):
        models = [random.choice(("made", "made", "model")) for _ in range(positional)]
    elif random.random() < 0.5:
        models = [random.choice(ODD_WORDS)]
    if models and random.random() < 0.2:
        models[random.randrange(len(models))] = random.choice(ODD_MODELS)
    if random.random() < 0.05:
        given += random.choice((["--"], ["--nothing"], ["extra"], ["-o"], ["--seed"], ["-"]))
    fixed: list[str] = []
    needed = FIXED.get(name, [])
    for option, value in zip(needed[::2], needed[1::2], strict=True):
        if option not in given:
            fixed += [option, value]
    if name == "generate" and "--max-new-tokens" not in given:
        fixed += ["--max-new-tokens", "3"]
    return [name, *models, *fixed, *given]


def _spread(random: Random, choices: list[list[str]]) -> list[str]:
    return [part for choice in choices if random.random() < 0.3 for part in choice]


INTERRUPTED = {
    "out": [
        "model",
        "--no-verify",
        "--passes",
        "canonicalise,dead-code-elimination,fold-constants",
    ],
    "out2": ["two", "--no-verify", "--passes", "prune-blocks{blocks=1,windows=1,seqlen=16}"],
}
"""Compiles that were interrupted, by their output folders: their snapshots are there."""


def resumed(out: str) -> list[str]:
    return ["compile", *INTERRUPTED[out], "-o", out, "--calib", "text.txt"]


def commands(random: Random, what: str, name: str) -> list[list[str]]:
    """Return command lines that read the file `name`, which is of the format `what`."""
    first = name.split("/")[0]
    model = first if "/" in name else random.choice(("made", "made", "model"))
    emits = random.choice(("onnx", "torch", "hf", "onnx,torch", "torch,hf"))
    # Half of them stop before they write or run, which says as much of what was read.
    switches = [["--no-verify"], ["--target", "hopper"], ["--force"], ["--json"], ["--strict"]]
    emit = ["--emit", emits, *_spread(random, switches)]
    emit += random.choice(([], ["--dry-run"]))
    ask = ["--prompt", "the cat", "--max-new-tokens", "3", *random.choice(([], ["--raw"]))]
    measure = ["--text", "text.txt", "--windows", "1", "--seqlen", "16"]
    backend = ["--backend", random.choice(("auto", "program", "torch", "onnx"))]
    calibrated = "prune-blocks{blocks=1,windows=1,seqlen=16}"
    match what:
        case "families":
            return [
                ["inspect", "--config", name],
                ["compile", "--config", name, "--dry-run", "--emit", emits],
            ]
        case "moe-config":
            return [["compile", "moe", *emit], ["inspect", "--config", "moe/config.json"]]
        case "index":
            return [["compile", "sharded", *emit], ["inspect", "sharded"]]
        case "gguf":
            return [
                ["compile", name, *emit],
                ["generate", name, *ask],
                ["inspect", name],
                ["eval", name, *measure],
            ]
        case "program" | "manifest" | "artifact":
            return [
                ["inspect", "made"],
                ["generate", "made", *ask, *backend],
                ["eval", "made", *measure, *backend],
                ["compile", "made", *emit],
                ["diff", "made", "made"],
            ]
        case "onnx":
            return [
                ["generate", "made", *ask, "--backend", "onnx"],
                ["eval", "made", *measure, "--backend", "onnx"],
                ["generate", "made/onnx", *ask],
                ["eval", "made/onnx", *measure],
                ["inspect", "made/onnx"],
            ]
        case "report":
            return [["diff", "made", "made"]]
        case "snapshot":
            return [[*resumed(name.split(".")[1]), "--resume"]]
        case "recipe":
            return [
                ["compile", model, "--recipe", name, "--no-verify", "--emit", "torch"],
                ["compile", model, "--recipe", name, "--dry-run"],
            ]
        case "passes":
            recipe = ["--passes", odd_recipe(random), "--calib", "text.txt"]
            return [["compile", "two", *recipe, *random.choice(([], ["--dry-run"]))]]
        case "piqa":
            return [["eval", model, "--piqa", name, *backend]]
        case "text":
            return [
                ["eval", model, "--text", name],
                ["eval", model, *measure],
                ["compile", "two", "--calib", name, "--passes", calibrated],
                ["compile", model, "--calib", name, *emit],
            ]
        case "tokenizer" | "template" | "generation":
            return [
                ["generate", model, *ask],
                ["eval", model, *measure],
                ["compile", model, *emit],
            ]
    return [
        ["compile", "model", *emit],
        ["inspect", "model"],
        ["generate", "model", *ask],
        ["inspect", "--config", "model/config.json"],
        ["diff", "model", "made"],
    ]
