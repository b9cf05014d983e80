"""Programs in 16 bits: positions keep their angles, and what is not traced in fp32 gets through."""

from __future__ import annotations

import pytest
import torch
from families import LISTED, captured, cases, sampled

from graphopt.execute.interpreter import Runner, resident
from graphopt.ir.dataflow import angle_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", sampled(LISTED))
def test_every_listed_family_runs_in_bf16(family):
    _, program = captured(family)
    inputs = cases((64,))[0].inputs
    expected = Runner(program).logits(inputs)
    streamed = Runner(program, torch.bfloat16).logits(inputs)
    kept = Runner(resident(program, torch.bfloat16, CPU), torch.bfloat16).logits(inputs)
    assert torch.equal(streamed, kept)
    # Four blocks of some 30 roundings to 8 bits each, of independent signs: sqrt(120) * 2^-9.
    assert float((streamed - expected).norm() / expected.norm()) < 0.05


def test_a_far_position_has_the_angle_that_it_has_in_fp32():
    _, program = captured("llama")
    assert angle_weights(program) == {"rope.inv_freq"}
    held = resident(program, torch.bfloat16, CPU).weights["rope.inv_freq"].load()
    assert torch.equal(held, program.weights["rope.inv_freq"].load())
    call = program.calls[0]
    ids = torch.ones(1, 4, dtype=torch.long)
    far = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 200, 201]])}
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        _, (values,) = next(Runner(program, dtype).stream([{**far, "attention_mask": ids}]))
        tables.append([values[name].float() for name in call.results if "cos" in name])
    assert tables[0] and all(map(torch.equal, *tables))
