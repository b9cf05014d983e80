"""ONNX graphs whose steps read the pages that policies select: the interpreter's tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from programs import tiny_program

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Program
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv_policies import policy_from_dict
from graphopt.lowering.onnx.genai import why_not

BUDGET = {"page": 4, "pages": 3, "sink": 1, "local": 1}


def attached(kind: str, pages: int = 3, **options: Any) -> Program:
    """Return a program of three layers, the first of which reads all keys."""
    program = tiny_program(cache=True, layers=3, **options)
    policy = policy_from_dict({"kind": kind, **BUDGET, "pages": pages})
    return with_policies(program, dict.fromkeys([*program.states][1:], policy))


@pytest.mark.parametrize("kind", ["quest", "sink-local"])
@pytest.mark.parametrize("options", [{}, {"sinks": True, "softcap": 2.0}], ids=["plain", "capped"])
def test_logits_are_the_interpreters(kind, options, tmp_path):
    """Prompts around edges of pages, padded rows, several tokens on a past, and single ones."""
    program = attached(kind, **options)
    go.emit(program, tmp_path / "out", emit=("onnx",), dtype="float32")
    model = open_language_model(str(tmp_path / "out"), "onnx")
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for cuts in ([0, 16, *range(17, 30), 33, *range(34, 41)], [0, 19, *range(20, 27)],
                 [*range(22)]):  # fmt: skip
        runner, past, cache = Runner(program), None, model.start(2)
        seen = torch.ones_like(mask) if cuts[1] == 1 else mask
        for start, stop in itertools.pairwise(cuts):
            step = {"input_ids": ids[:, start:stop], "attention_mask": seen[:, :stop]}
            positions = (seen[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
            (wanted,), past = runner.run({**step, "position_ids": positions}, past)
            found, cache = model.step({**step, "position_ids": positions}, cache)
            real = seen[:, start:stop].bool()
            # Some hundred roundings in fp32 of logits of order 1.
            torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["quest", "sink-local"])
def test_a_budget_of_everything_is_the_plain_graph(kind, tmp_path):
    ids = torch.randint(0, 97, (1, 26), generator=torch.Generator().manual_seed(6))
    models = []
    for name, program in (
        ("policy", attached(kind, pages=7)),
        ("plain", tiny_program(cache=True, layers=3)),
    ):
        go.emit(program, tmp_path / name, emit=("onnx",), dtype="float32")
        models.append(open_language_model(str(tmp_path / name), "onnx"))
    caches = [model.start(1) for model in models]
    for start, stop in itertools.pairwise([0, 9, *range(10, 27)]):
        step = {
            "input_ids": ids[:, start:stop],
            "attention_mask": torch.ones(1, stop, dtype=torch.long),
            "position_ids": torch.arange(start, stop)[None],
        }
        (one, caches[0]), (other, caches[1]) = (
            model.step(step, cache) for model, cache in zip(models, caches, strict=True)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_what_graphs_do_not_have_is_refused(tmp_path):
    with pytest.raises(LoweringError, match=r"policies quest, sink-local, and this is snapkv"):
        go.emit(attached("snapkv"), tmp_path / "out", emit=("onnx",))
    assert why_not(attached("quest")) == ("it hands on no state of a policy beside keys and values")
