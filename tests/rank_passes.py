"""Recipes that ranks share, run by one process or by each of several ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from mixtures import MIXTURES
from pretended_gpu import pretended_gpu
from programs import tiny_program
from tiny_models import save_tiny
from torch import Tensor
from trained import book, save_trained

import graphopt as go
from graphopt.errors import PassError
from graphopt.ir.blocks import remove_blocks
from graphopt.ir.graph import Program
from graphopt.ir.weights import Array
from graphopt.pass_manager.agreement import agree, digest
from graphopt.support.ranks import joined

PRUNED = "prune-blocks{blocks=1,seqlen=32,windows=5}"
LEARNT = "batch=3,seqlen=32,rate=1e-2"
TRAINED = f"steps=6,{LEARNT}"
COLD = "seqlen=32,rate=1e-2,warm_start=false"
CASES = {
    "prune": ("dense", "prune-blocks{blocks=2,seqlen=32,windows=5}"),
    "prune by influence": ("dense", "prune-blocks{blocks=1,score=bi,seqlen=32,windows=4}"),
    "fuse": ("dense", f"{PRUNED},fuse-blocks{{steps=6,batch=3,{COLD}}}"),
    "fuse by groups": (
        "dense",
        f"prune-blocks{{remove=[0]}},fuse-blocks{{mode=local,group=2,steps=6,batch=3,{COLD}}}",
    ),
    "fuse as published": ("dense", f"{PRUNED},fuse-blocks{{mode=published,group=3,{TRAINED}}}"),
    "fuse one window a step": ("dense", f"{PRUNED},fuse-blocks{{steps=3,batch=1,{COLD}}}"),
    "fuse by the clock": ("dense", f"{PRUNED},fuse-blocks{{seconds=3,batch=2,{COLD}}}"),
    "solve": ("dense", f"{PRUNED},fuse-blocks{{steps=0,seqlen=32}}"),
    "solve behind norms": ("normed", f"{PRUNED},fuse-blocks{{steps=0,seqlen=32}}"),
    "carve": ("dense", "carve-moe{experts=8,shared=2,active=3,windows=9,seqlen=32}"),
    "carve by layer": (
        "dense", "carve-moe{experts=8,shared=2,active=3,layerwise_budget=true,windows=9,seqlen=32}",
    ),
    "carve as published": (
        "dense",
        "carve-moe{mode=published,experts=8,shared=2,active=3,k_activations=5,windows=9,seqlen=32}",
    ),
    "carve by thresholds": (
        "dense", "carve-moe{experts=8,shared=2,active=3,threshold=true,windows=9,seqlen=32}",
    ),
    "tune": (
        "dense",
        f"carve-moe{{experts=8,shared=2,active=3,windows=9,seqlen=32}},tune-moe{{{TRAINED}}}",
    ),
    "carve experts": (
        "mixture", "carve-moe{mixtures=true,experts=4,shared=1,active=2,windows=9,seqlen=32}",
    ),
    "prune experts": ("mixture", "prune-experts{ratio=0.25,windows=9,seqlen=32}"),
    "merge experts": ("mixture", "prune-experts{ratio=0.25,method=merge,windows=9,seqlen=32}"),
    "round": ("dense", "quantize{w=4,group=16,windows=9,seqlen=32}"),
    "round scaled": ("dense", "quantize{w=3,group=16,scale=true,a=8,windows=9,seqlen=32}"),
    "tune codes": (
        "dense", f"quantize{{w=3,group=16,windows=9,seqlen=32}},tune-codes{{{TRAINED}}}",
    ),
    "transform": ("dense", "flatquant{w=4,a=4,kv=4,windows=9,distil=0,steps=1,batch=3,seqlen=32}"),
    "transform and distil": ("dense", f"flatquant{{w=4,a=16,kv=16,windows=9,{TRAINED}}}"),
    "transform as published": (
        "dense", f"flatquant{{method=published,w=4,a=4,kv=4,windows=9,{TRAINED}}}",
    ),
    "transform in closed form": ("dense", "insert-affine{kind=closed,windows=9,seqlen=32}"),
    "too few windows": ("dense", "quantize{w=4,group=16,windows=1,seqlen=32}"),
}  # fmt: skip
"""For each case its model and recipe: windows that two ranks share unevenly, steps of three."""


def prepare(folder: Path) -> None:
    """Write the models and the text."""
    save_trained(folder / "dense", layers=4, steps=40)
    save_tiny(folder / "normed", "gemma2", num_hidden_layers=3)
    save_tiny(folder / "mixture", "qwen3_moe", **MIXTURES["qwen3_moe"])
    (folder / "text.txt").write_text(book(60), encoding="utf-8")


def run_cases(
    folder: Path, names: list[str], *, pretend: bool = False
) -> dict[str, dict[str, Any]]:
    """Return for each case its weights, what its passes told, and a digest of its program.

    Args:
        pretend: On a GPU that is pretended, in place of the CPU.
    """
    found: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    for name in names:
        model, recipe = CASES[name]
        if model not in programs:
            programs[model] = go.capture(str(folder / model))
        device = "cuda" if pretend else "cpu"
        options = go.RunOptions(calib=folder / "text.txt", verify=False, device=device)
        with pretended_gpu() if pretend else contextlib.nullcontext():
            program, report = go.Pipeline.parse(recipe).run(programs[model], options)
        found[name] = {
            "weights": weights(program),
            "passes": [entry.to_json() for entry in report.passes],
            "digest": digest(program),
        }
    return found


def weights(program: Program) -> dict[str, Tensor]:
    """Return the dense tensors that a program's weights are stored as."""
    return {tensor.name: tensor.load().clone() for tensor in program.weights.tensors()}


def run_rank(rank: int, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Run cases as one of several ranks."""
    with joined("cpu"):
        return run_cases(folder, names)


def agreed(rank: int, off: float, blocks: int = 0) -> tuple[list[str], str] | str:
    """Return what comes of a pass that gives each rank another program: see `agree`.

    Args:
        off: By what share of itself a weight is off on the second rank.
        blocks: How many blocks are missing there.

    Returns:
        The names of weights that were not the same, and the program's digest; or the error.
    """
    with joined("cpu") as ranks:
        before = tiny_program()
        after = before.copy()
        weight = next(weight for weight in after.used_weights() if len(weight.shape) == 2)
        value = weight.load() * (1 + off * ranks.rank)
        after.weights.replace(weight.with_producer(Array(value)))
        if blocks and ranks.rank:
            remove_blocks(after, list(range(blocks)))
        try:
            return agree(ranks, "a-pass", before, after), digest(after)
        except PassError as error:
            return error.message
