"""Programs whose weights are split over ranks, as packages for several devices are made of."""

from __future__ import annotations

from typing import Any

from programs import tiny_program

from graphopt.ir import Program
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context, make_pass

VOCAB = 96


def sharded(program: Program, ranks: int = 2) -> Program:
    """Return a copy of a program with a KV cache, as what each of several ranks runs."""
    split = make_pass("shard", {"tp": ranks}).run(program.copy(), Context()).program
    verify(split)
    return split


def sharded_tiny(ranks: int = 2, **features: Any) -> Program:
    """Return `tiny_program` with a KV cache and 96 tokens, split over ranks."""
    return sharded(tiny_program(cache=True, vocab=VOCAB, **features), ranks)
