"""The tries of `tools/fuzz_inputs.py`: good inputs, what is damaged, and which command runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

import fuzz_mutations as damage

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

Place = tuple[str, damage.Mutator]


def _both(name: str, mutator: damage.Mutator) -> list[Place]:
    """The file in an output folder, which opens at once, and now and then in a checkpoint."""
    return [(f"{folder}/{name}", mutator) for folder in ("made", "made", "made", "model")]


FORMATS: dict[str, list[Place]] = {
    "config": [("model/config.json", damage.mutate_json_file)],
    "moe-config": [("moe/config.json", damage.mutate_json_file)],
    "generation": _both("generation_config.json", damage.mutate_json_file),
    "tokenizer": _both("tokenizer.json", damage.mutate_json_file),
    "tokenizer-config": _both("tokenizer_config.json", damage.mutate_json_file),
    "template": _both("chat_template.jinja", damage.mutate_template),
    "safetensors": [("model/model.safetensors", damage.mutate_safetensors)],
    "index": [("sharded/model.safetensors.index.json", damage.mutate_json_file)],
    "gguf": [("model.gguf", damage.mutate_gguf)],
    "program": [("made/program.json", damage.mutate_json_file)],
    "manifest": [("made/manifest.json", damage.mutate_json_file)],
    "report": [("made/report.json", damage.mutate_json_file)],
    "artifact": [
        ("made/onnx/model.onnx", damage.mutate_bytes),
        ("made/model.py", damage.mutate_text),
        ("made/onnx/genai_config.json", damage.mutate_json_file),
        ("made/model.safetensors", damage.mutate_safetensors),
    ],
    "snapshot": [("SNAPSHOT", damage.mutate_json_file)],
    "recipe": [("recipe.yaml", damage.mutate_yaml)],
    "piqa": [("piqa.jsonl", damage.mutate_json_file)],
    "text": [("text.txt", damage.mutate_text)],
    "options": [],
    "kind": [],
}
"""What is damaged: the files of which one is chosen, each with its mutator."""

WEIGHTS = {"config": 5, "options": 4, "safetensors": 3, "gguf": 4, "program": 4, "tokenizer": 2}


def base_inputs(folder: Path) -> None:
    """Write good inputs of every format into `folder`, the working folder of each try."""
    import gguf
    from tiny_models import byte_tokenizer, save_tiny, tiny_model, write_gguf
    from typer.testing import CliRunner

    from graphopt.cli import app
    from graphopt.errors import GraphoptError

    folder.mkdir(parents=True)
    save_tiny(folder / "model", **SIZES)
    byte_tokenizer(chat=True).save_pretrained(folder / "model")
    save_tiny(folder / "sharded", shard="10KB", **SIZES)
    moe = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    save_tiny(folder / "moe", "qwen3_moe", **moe)
    model = tiny_model(**SIZES)
    write_gguf(folder / "model.gguf", model, gguf.MODEL_ARCH.LLAMA, tokenizer=True)
    (folder / "recipe.yaml").write_text(damage.RECIPES[0])
    (folder / "text.txt").write_text("The cat sat on the mat, and the other thing. " * 60)
    row = {"goal": "the thing", "sol1": "a the", "sol2": "the then", "label": 0}
    (folder / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    with contextlib.chdir(folder):
        made = CliRunner().invoke(
            app, ["compile", "model", "-o", "made", "--emit", "onnx,torch,hf", "--no-verify"]
        )
        assert made.exit_code == 0, made.output
        # An interrupted compile: its snapshots stay.
        stop = mock.patch("graphopt.compiler._write", side_effect=GraphoptError("stopped"))
        with stop:
            stopped = CliRunner().invoke(app, ["compile", *INTERRUPTED])
        assert stopped.exit_code == 1 and Path(".out.work").is_dir(), stopped.output


INTERRUPTED = ["model", "--no-verify", "--passes", "normalise,dead-code,fold-constants"]
"""A compile that was interrupted: its snapshots are there."""


@dataclass
class Try:
    """One try, and what came of it.

    Attributes:
        number: With the seed, what makes it again.
        damaged: What was damaged.
        command: The command line.
        outcome: "done", "refused", or what is wrong.
        said: The last lines on stderr.
    """

    number: int
    damaged: str
    command: list[str]
    outcome: str = ""
    said: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def spread(random: Random, options: list[list[str]]) -> list[str]:
    return [part for option in options if random.random() < 0.3 for part in option]


def commands(random: Random, what: str, model: str) -> list[list[str]]:
    """Return command lines that read what is damaged, of the folder `model` where that may be."""
    emits = random.choice(("onnx", "torch", "hf", "onnx,torch", "torch,hf"))
    # Half of them stop before they write or run, which says as much of what was read.
    emit = ["--emit", emits, *spread(random, [["--no-verify"], ["--target", "hopper"]])]
    emit += random.choice(([], ["--dry-run"]))
    ask = ["--prompt", "the cat", "--max-new-tokens", "3", *random.choice(([], ["--raw"]))]
    measure = ["--text", "text.txt", "--windows", "1", "--seqlen", "16"]
    match what:
        case "moe-config":
            return [["compile", "moe", *emit], ["inspect", "--config", "moe/config.json"]]
        case "index":
            return [["compile", "sharded", *emit], ["inspect", "sharded"]]
        case "gguf":
            return [
                ["compile", "model.gguf", *emit],
                ["generate", "model.gguf", *ask],
                ["inspect", "model.gguf"],
            ]
        case "program" | "manifest" | "artifact":
            backend = ["--backend", random.choice(("auto", "program", "torch", "onnx"))]
            return [
                ["inspect", "made"],
                ["generate", "made", *ask, *backend],
                ["eval", "made", *measure, *backend],
                ["compile", "made", *emit],
                ["diff", "made", "made"],
            ]
        case "report":
            return [["diff", "made", "made"]]
        case "snapshot":
            return [["compile", *INTERRUPTED, "--resume"]]
        case "recipe":
            return [
                ["compile", model, "--recipe", "recipe.yaml", "--no-verify", "--emit", "torch"],
                ["compile", model, "--recipe", "recipe.yaml", "--dry-run"],
            ]
        case "piqa":
            return [["eval", model, "--piqa", "piqa.jsonl"]]
        case "text":
            return [["eval", model, *measure], ["compile", model, "--calib", "text.txt", *emit]]
        case "tokenizer" | "tokenizer-config" | "template" | "generation":
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
]
ODD_NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "nan",
    "inf",
    "1e400",
    "2147483647",
    "2147483648",
    str(2**63),
    str(2**70),
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
    "mps",
    "hopper",
    "volta",
    "onnx",
    "torch,,onnx",
    ",",
    "hf",
    "\x1b[0m",
    "a" * 9999,
    "meta",
    "f64",
    "decode",
    "paged",
    "ring",
]

OPTIONS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "compile": (
        ["made"],
        {
            "--out": ODD_PATHS,
            "--target": ODD_WORDS,
            "--emit": ODD_WORDS,
            "--passes": damage.RECIPE_TEXTS,
            "--recipe": ODD_PATHS,
            "--calib": ODD_PATHS,
            "--stop-after": ODD_WORDS,
            "--dump-ir": ["", "text.txt", "text.txt/x", "/proc/x", "out/ir"],
            "--device": ODD_WORDS,
            "--seed": ODD_NUMBERS,
            "--config": ODD_PATHS,
        },
    ),
    "inspect": (
        ["made"],
        {
            "--batch": ODD_NUMBERS,
            "--seq": ODD_NUMBERS,
            "--past": ODD_NUMBERS,
            "--config": ODD_PATHS,
        },
    ),
    "eval": (
        ["made"],
        {
            "--text": ODD_PATHS,
            "--windows": ODD_NUMBERS,
            "--seqlen": ODD_NUMBERS,
            "--piqa": ODD_PATHS,
            "--backend": ODD_WORDS,
        },
    ),
    "generate": (
        ["made", "--max-new-tokens", "3"],
        {
            "--prompt": ["", "the", "\udcff", "\x00", "a" * 5000],
            "--max-new-tokens": ODD_NUMBERS[:6],
            "--temperature": ODD_NUMBERS,
            "--top-p": ODD_NUMBERS,
            "--seed": ODD_NUMBERS,
            "--backend": ODD_WORDS,
        },
    ),
    "plan-attention": (
        ["--target", "hopper", "--head-dim", "64"],
        {
            "--target": ODD_WORDS,
            "--head-dim": ODD_NUMBERS,
            "--heads": ODD_NUMBERS,
            "--kv-heads": ODD_NUMBERS,
            "--value-dim": ODD_NUMBERS,
            "--dtype": ODD_WORDS,
            "--phase": ODD_WORDS,
            "--align": ODD_WORDS,
            "--window": ODD_NUMBERS,
            "--chunk": ODD_NUMBERS,
            "--softcap": ODD_NUMBERS,
            "--kv": ODD_WORDS,
            "--page": ODD_NUMBERS,
            "--kv-bits": ODD_NUMBERS,
            "--with": ODD_WORDS,
        },
    ),
    "passes": ([], {"": ODD_WORDS}),
    "targets": ([], {"": ODD_WORDS}),
    "diff": (["model"], {"": ODD_PATHS}),
}


def odd_options(random: Random) -> list[str]:
    """Return a command line with odd values of one to three options."""
    name = random.choice(list(OPTIONS))
    fixed, options = OPTIONS[name]
    command = [name, *(fixed or [])]
    for option in random.sample(list(options), min(len(options), random.choice((1, 1, 2, 3)))):
        value = random.choice(options[option])
        command += [option, value] if option else [value]
    if name in ("eval", "compile", "inspect") and random.random() < 0.2:
        command[1] = random.choice(ODD_PATHS)
    if name == "generate" and "--prompt" not in command:
        command += ["--prompt", "the"]
    if name == "eval" and "--text" not in command and "--piqa" not in command:
        command += ["--text", "text.txt"]
    return command + random.choice(([], ["--json"]))


KINDS = ("pipe", "folder", "device", "outside", "socket", "sparse", "empty", "loop", "absent")


def replace_kind(random: Random, path: Path) -> str:
    """Put something that is no such file in the place of `path`; return what."""
    kind = random.choice(KINDS)
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "outside":
            path.symlink_to("/etc/passwd")
        case "socket":
            with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
                server.bind(path.name)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**42)
        case "empty":
            path.write_bytes(b"")
        case "loop":
            path.symlink_to(path.name)
    return kind


def prepare(seed: int, number: int, base: Path, folder: Path) -> Try:
    """Make the working folder of a try from good inputs, damage one, and choose the command."""
    random = Random(f"{seed}/{number}")
    names = list(FORMATS)
    (what,) = random.choices(names, [WEIGHTS.get(name, 1) for name in names])
    shutil.copytree(base, folder, copy_function=os.link, symlinks=True)
    if what == "options":
        os.mkfifo(folder / "pipe")
        return Try(number, what, odd_options(random))
    reads = what
    if what == "kind":
        reads = random.choice([name for name in names if FORMATS[name]])
    name, mutator = random.choice(FORMATS[reads])
    path = folder / name
    if name == "SNAPSHOT":
        found = sorted((folder / ".out.work").glob("*/*"))
        path = random.choice(
            [p for p in found if p.suffix == ".json" or random.random() < 0.3] or found
        )
    if what == "kind":
        described = f"{path.relative_to(folder)}: {replace_kind(random, path)}"
    else:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            mutator = damage.mutate_safetensors
        try:
            changed = mutator(random, content)
        except (OverflowError, struct.error):
            changed = damage.mutate_bytes(random, content)
        path.unlink()  # it is linked to the good one
        path.write_bytes(changed)
        described = str(path.relative_to(folder))
    model = name.split("/")[0] if "/" in name else random.choice(("made", "made", "model"))
    return Try(number, described, random.choice(commands(random, reads, model)))
