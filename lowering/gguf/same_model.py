"""Whether a GGUF file is read as the model that it is written of."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.errors import CaptureError, SourceError
from graphopt.ir.compare import first_difference, slots_by_use
from graphopt.ir.graph import Program
from graphopt.lowering.gguf.keys import single
from graphopt.lowering.hf.checkpoint import in_one_form, made_by_config
from graphopt.sources.gguf.architectures import gguf_config
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.vocabulary import Vocabulary
from graphopt.sources.gguf.weights import gguf_producers

CLOSE = 2e-6
"""How far constants may be apart, relative: numbers of a file have 24 bits, twice rounded."""


def difference_when_read(
    program: Program, file: GgufFile, vocabulary: Vocabulary | None
) -> str | None:
    """Return in what the model that a file is read as is not a program; None where it is.

    Args:
        file: Its header, with the tensors that will be in it.
    """
    try:
        config = gguf_config(file, vocabulary)
        gguf_producers(file, config)
        want, _, _ = made_by_config(config.to_dict(), set())
    except (SourceError, CaptureError) as error:
        return error.message.rstrip(".")
    have = in_one_form(program)
    difference = first_difference(_in_single(have), _in_single(want), encodings=False)
    return difference if difference is not None else _other_constant(have, want)


def _in_single(program: Program) -> Program:
    """Return a copy whose attributes are rounded to fp32, as the numbers of a file are."""
    rounded = program.copy()
    for function in rounded.functions.values():
        for node in function.nodes:
            node.attrs = _rounded(node.attrs)
    for call in rounded.calls:
        call.attrs = _rounded(call.attrs)
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return single(value)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rounded(item) for item in value)
    return value


def _other_constant(have: Program, want: Program) -> str | None:
    """Return a constant that has another value in the other program; None where there is none."""
    for ours, theirs in zip(have.calls, want.calls, strict=True):
        slots = zip(
            *(slots_by_use(p.functions[c.function]) for p, c in ((have, ours), (want, theirs))),
            strict=True,
        )
        for slot, other in slots:
            weight, wanted = have.weights[ours.weights[slot]], want.weights[theirs.weights[other]]
            if wanted.constant and not torch.allclose(
                weight.load().double(), wanted.load().double(), rtol=CLOSE, atol=0
            ):
                return f"the constant {weight.name!r} has another value there"
    return None
