"""Every family: captured, run, and exported to ONNX, against eager fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    LISTED,
    TOLERANCE,
    Case,
    captured,
    cases,
    eager_logits,
    error,
    mostly_slow,
    sampled,
)
from same_programs import plain
from torch import Tensor

from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program
from graphopt.ir.ops import is_aten
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache
from graphopt.support.progress import silent

OLDEST = ("llama", "gemma2", "gemma3_text", "phi3", "gpt2", "bloom", "gpt_oss", "deepseek_v3",
          "gemma4_text", "mixtral")  # fmt: skip
"""Families that versions of transformers differ in: masks, rotary tables, stacked experts."""


def _with_oldest(parameters: list[Any]) -> list[Any]:
    """Mark those parameters which run with the oldest versions too."""
    return [
        pytest.param(
            *each.values, marks=(*each.marks, *[pytest.mark.oldest] * (each.values[0] in OLDEST))
        )
        for each in parameters
    ]


@pytest.mark.parametrize("family", _with_oldest(mostly_slow(FAMILIES)))
def test_programs_equal_eager(family: str) -> None:
    model, program = captured(family)
    runner = Runner(program)
    for case in cases():
        logits = eager_logits(model, case)
        assert error(logits, runner.logits(case.inputs), case) < TOLERANCE, str(case)
    if family in LISTED:
        cached = InsertKVCache().run(program.copy(), Context()).program
        assert cached.states, "a listed family gets a KV cache"
        left = [n.op for f in program.functions.values() for n in f.nodes if is_aten(n.op)]
        assert not left, "a listed family is raised completely"


@pytest.mark.parametrize("family", _with_oldest(sampled(FAMILIES)))
def test_onnx_equals_eager(family: str, tmp_path: Path) -> None:
    model, program = captured(family)
    cached = InsertKVCache().run(program, Context()).program
    session = _Session(cached, tmp_path)
    for case in cases():
        logits = eager_logits(model, case)
        whole, _ = session.step(case, 0, case.input_ids.shape[1], session.empty(case))
        assert error(logits, whole, case) < TOLERANCE, f"ONNX, {case}"
        if cached.states and case.input_ids.shape[1] > 2:
            assert error(logits, session.in_steps(case), case) < TOLERANCE, f"cached ONNX, {case}"


@pytest.mark.parametrize("family", mostly_slow(FAMILIES))
def test_programs_read_back_from_their_texts(family: str) -> None:
    _, program = captured(family)
    program.config = program.config or {"model_type": family}
    for item in (program, InsertKVCache().run(program, Context()).program):
        text = print_program(item)
        parsed = parse_program(text)
        assert plain(parsed) == plain(item)
        assert print_program(parsed) == text


class _Session:
    """An exported program in onnxruntime."""

    def __init__(self, program: Program, folder: Path) -> None:
        import onnxruntime

        emitter = OnnxEmitter()
        emitter.check(program, "cpu")
        emitter.emit(program, folder, "cpu", silent)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def empty(self, case: Case) -> dict[str, np.ndarray]:
        batch = case.input_ids.shape[0]
        return {
            i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values")
        }

    def step(
        self, case: Case, start: int, stop: int, past: dict[str, np.ndarray]
    ) -> tuple[Tensor, dict[str, np.ndarray]]:
        feed = {
            "input_ids": case.input_ids[:, start:stop].numpy(),
            "attention_mask": case.attention_mask[:, :stop].numpy(),
            "position_ids": case.position_ids[:, start:stop].numpy(),
            **past,
        }
        values = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        logits = torch.from_numpy(values.pop("logits"))
        return logits, {k.replace("present", "past_key_values"): v for k, v in values.items()}

    def in_steps(self, case: Case) -> Tensor:
        """Prefill half, go on by several tokens at once, then by one."""
        length = case.input_ids.shape[1]
        parts, past = [], self.empty(case)
        for start, stop in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
            logits, past = self.step(case, start, stop, past)
            parts.append(logits)
        return torch.cat(parts, 1)
