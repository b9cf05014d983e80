"""The tries of `tools/fuzz_inputs.py`: good inputs, what is damaged, and which command runs."""

from __future__ import annotations

import contextlib
import itertools
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
from fuzz_commands import commands, odd_command, resumed
from fuzz_gguf import mutate_gguf
from fuzz_onnx import mutate_onnx

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


FAMILIES = (
    "bloom", "dbrx", "deepseek_v3", "falcon", "falcon_h1", "gemma2", "gemma3_text", "gpt_neo",
    "gpt_oss", "gpt2", "granitemoe", "jamba", "llama", "llama4_text", "mamba2", "ministral3",
    "mixtral", "opt", "phi3", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
)  # fmt: skip
"""Families whose configs differ in what they hold."""

SLOW = ("vocab.json", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json")

FORMATS: dict[str, list[Place]] = {
    "config": [("model/config.json", damage.mutate_json_file)],
    "moe-config": [("moe/config.json", damage.mutate_json_file)],
    "families": [(f"families/{name}.json", damage.mutate_json_file) for name in FAMILIES],
    "generation": _both("generation_config.json", damage.mutate_json_file),
    "tokenizer": [
        *_both("tokenizer.json", damage.mutate_json_file),
        *_both("tokenizer_config.json", damage.mutate_json_file),
        *[(f"slow/{name}", damage.mutate_json_file) for name in SLOW],
        ("slow/merges.txt", damage.mutate_text),
    ],
    "template": _both("chat_template.jinja", damage.mutate_template),
    "safetensors": [
        ("model/model.safetensors", damage.mutate_safetensors),
        ("made/model.safetensors", damage.mutate_safetensors),
    ],
    "index": [("sharded/model.safetensors.index.json", damage.mutate_json_file)],
    "gguf": [("model.gguf", mutate_gguf), ("spm.gguf", mutate_gguf)],
    "program": [("made/program.json", damage.mutate_json_file)],
    "manifest": [("made/manifest.json", damage.mutate_json_file)],
    "report": [("made/report.json", damage.mutate_json_file)],
    "artifact": [
        ("made/model.py", damage.mutate_text),
        ("made/onnx/genai_config.json", damage.mutate_json_file),
        ("made/onnx/model.onnx.data", damage.mutate_bytes),
    ],
    "onnx": [("made/onnx/model.onnx", mutate_onnx)],
    "snapshot": [("SNAPSHOT", damage.mutate_json_file)],
    "recipe": [("recipe.yaml", damage.mutate_yaml)],
    "piqa": [("piqa.jsonl", damage.mutate_json_file)],
    "text": [("text.txt", damage.mutate_plain)],
    "options": [],
    "passes": [],
    "kind": [],
    "folder": [],
}
"""What is damaged: the files of which one is chosen, each with its mutator."""

WEIGHTS = {
    "config": 5,
    "families": 4,
    "options": 6,
    "passes": 3,
    "safetensors": 4,
    "gguf": 6,
    "program": 5,
    "tokenizer": 5,
    "onnx": 3,
    "text": 2,
    "snapshot": 2,
    "kind": 2,
}


def base_inputs(folder: Path) -> None:
    """Write good inputs of every format into `folder`, the working folder of each try."""
    import gguf
    from family_configs import draw
    from tiny_models import byte_tokenizer, save_tiny, tiny_model, write_gguf
    from transformers import CONFIG_MAPPING
    from typer.testing import CliRunner
    from vocabularies import scored

    from graphopt.cli.commands import app
    from graphopt.errors import GraphoptError

    folder.mkdir(parents=True)
    save_tiny(folder / "model", **SIZES)
    byte_tokenizer(chat=True).save_pretrained(folder / "model")
    save_tiny(folder / "sharded", shard="10KB", **SIZES)
    save_tiny(folder / "two", **{**SIZES, "num_hidden_layers": 2})
    moe = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    save_tiny(folder / "moe", "qwen3_moe", **moe)
    save_tiny(folder / "slow", "gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=300)
    _old_tokenizer(folder / "slow")
    model = tiny_model(**SIZES)
    write_gguf(folder / "model.gguf", model, gguf.MODEL_ARCH.LLAMA, tokenizer=True)
    words = {f"tokenizer.ggml.{key}": value for key, value in scored().items()}
    sizes = {"intermediate_size": 64, "vocab_size": len(words["tokenizer.ggml.tokens"])}
    gemma = tiny_model("gemma2", sliding_window=8, query_pre_attn_scalar=8, **sizes)
    encoding = gguf.GGMLQuantizationType.Q8_0
    architecture = gguf.MODEL_ARCH.GEMMA2
    write_gguf(folder / "spm.gguf", gemma, architecture, encoding=encoding, entries=words)
    (folder / "families").mkdir()
    for name in FAMILIES:
        for number in itertools.count():
            # Classes refuse some of what is drawn.
            with contextlib.suppress(Exception):
                config = CONFIG_MAPPING[name](**draw(name, Random(f"{name}/{number}")))
                break
        config.to_json_file(folder / "families" / f"{name}.json", use_diff=False)
    (folder / "recipe.yaml").write_text(damage.RECIPES[0])
    (folder / "text.txt").write_text("The cat sat on the mat, and the other thing. " * 60)
    row = {"goal": "the thing", "sol1": "a the", "sol2": "the then", "label": 0}
    (folder / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    with contextlib.chdir(folder):
        made = CliRunner().invoke(
            app, ["compile", "model", "-o", "made", "--emit", "onnx,torch,hf", "--no-verify"]
        )
        assert made.exit_code == 0, made.output
        # Interrupted compiles: their snapshots stay.
        stop = mock.patch("graphopt.compiler._write", side_effect=GraphoptError("stopped"))
        for out in ("out", "out2"):
            with stop:
                stopped = CliRunner().invoke(app, resumed(out))
            assert stopped.exit_code == 1 and Path(f".{out}.work").is_dir(), stopped.output


def _old_tokenizer(folder: Path) -> None:
    """Put the files of a tokenizer in the place of tokenizer.json, as they were before it."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    vocabulary = saved["model"]["vocab"]
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]
    ]
    texts = {
        "vocab.json": vocabulary,
        "special_tokens_map.json": {
            "eos_token": {"content": "<end>", "lstrip": False, "normalized": False},
            "additional_special_tokens": ["<a>", "<b>"],
        },
        "added_tokens.json": {"<end>": len(vocabulary), "<a>": len(vocabulary) + 1},
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "eos_token": "<end>",
            "model_max_length": 64,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(len(vocabulary)): {"content": "<end>", "special": True, "lstrip": False}
            },
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@dataclass
class Try:
    """One try, and what came of it.

    Attributes:
        number: With the seed, what makes it again.
        damaged: What was damaged.
        command: The command line.
        outcome: "done", "refused", or what is wrong.
        said: The last lines on stderr.
        seconds: How long its processes computed.
        peak_bytes: The largest resident memory of its processes together.
    """

    number: int
    damaged: str
    command: list[str]
    outcome: str = ""
    said: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)


KINDS = (
    "pipe", "folder", "device", "outside", "socket", "sparse", "empty", "loop", "absent", "endless",
    "locked",
)  # fmt: skip


def replace_kind(random: Random, path: Path) -> str:
    """Put something that is no such file in the place of `path`; return what."""
    kind = random.choice(KINDS)
    if kind == "locked":
        content = path.read_bytes()
        path.unlink()  # it is linked to the good one
        path.write_bytes(content)
        path.chmod(0)
        return kind
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
        case "endless":
            path.symlink_to("/proc/self/mem")
        case "socket":
            _socket(path)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**42)
        case "empty":
            path.write_bytes(b"")
        case "loop":
            path.symlink_to(path.name)
    return kind


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


STRAY = (b"\xff.json", b"\xff.safetensors", b"\xff.jinja", b"a\nb.json", b"\x1b[2J.txt", b"x.model")


def odd_folder(random: Random, folder: Path) -> str:
    """Put into a model folder what does not belong there; return where and what."""
    place = folder / random.choice(("model", "made", "made/onnx", "sharded", "slow"))
    kind = random.choice(("cycle", "stray", "stray folder", "whole", "deep", "many", "locked"))
    match kind:
        case "cycle":
            (place / "again").symlink_to(".")
            (place / "additional_chat_templates").symlink_to("..")
        case "stray":
            Path(os.fsdecode(bytes(place) + b"/" + random.choice(STRAY))).write_bytes(b"{}")
        case "stray folder":
            Path(os.fsdecode(bytes(place) + b"/" + random.choice(STRAY))).mkdir()
        case "whole":
            shutil.rmtree(place)
            place.symlink_to(random.choice((place.name, "..", "/proc/self", "/", "nothing")))
        case "deep":
            deep = place
            for _ in range(60):
                deep = deep / ("x" * 60)
            deep.mkdir(parents=True)
        case "many":
            for number in range(300):
                (place / f"{number}.json").write_text("[")
        case "locked":
            place.chmod(0)
    return f"{place.relative_to(folder)}: {kind}"


def prepare(seed: int, number: int, base: Path, folder: Path) -> Try:
    """Make the working folder of a try from good inputs, damage one, and choose the command."""
    random = Random(f"{seed}/{number}")
    names = list(FORMATS)
    (what,) = random.choices(names, [WEIGHTS.get(name, 1) for name in names])
    shutil.copytree(base, folder, copy_function=os.link, symlinks=True)
    if what == "options":
        os.mkfifo(folder / "pipe")
        _socket(folder / "socket")
        (folder / "loop").symlink_to(".")
        (folder / "locked").mkdir(mode=0)
        return Try(number, what, odd_command(random))
    if what == "passes":
        return Try(number, what, random.choice(commands(random, what, "two/config.json")))
    if what == "folder":
        described = odd_folder(random, folder)
        name = described.split(":")[0] + "/x"
        reads = random.choice(("onnx", "artifact")) if "made" in name else "tokenizer"
        return Try(number, described, random.choice(commands(random, reads, name)))
    reads = what
    if what == "kind":
        reads = random.choice([name for name in names if FORMATS[name]])
    name, mutator = random.choice(FORMATS[reads])
    if name == "SNAPSHOT":
        found = sorted(path for path in folder.glob(".*.work/**/*") if path.is_file())
        path = random.choice(
            [p for p in found if p.suffix == ".json" or random.random() < 0.3] or found
        )
        name = str(path.relative_to(folder))
    path = folder / name
    if what == "kind":
        described = f"{name}: {replace_kind(random, path)}"
    else:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            mutator = damage.mutate_safetensors
        elif path.suffix != ".json" and reads == "snapshot":
            mutator = damage.mutate_bytes
        try:
            changed = mutator(random, content)
        except (OverflowError, struct.error):
            changed = damage.mutate_bytes(random, content)
        path.unlink()  # it is linked to the good one
        path.write_bytes(changed)
        described = name
    return Try(number, described, random.choice(commands(random, reads, name)))
