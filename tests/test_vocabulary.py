"""Distilling on some tokens of a vocabulary: which, and what is compared, against brute force."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.calibration import vocabulary
from graphopt.calibration.vocabulary import narrow_head, tokens_to_compare, vocabulary_size
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.support.per_device import PerDevice
from graphopt.training.losses import LogitObjective

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([1, 5, 8, 40, 96])


def scaled(program: Program) -> Program:
    """Return the program with its logits times 3, capped and in a function behind the head."""
    call = program.calls[-1]
    function = program.functions[call.function]
    value = function.add("scale", [function.results[0]], {"factor": 3.0}).output
    function.results = [function.add("softcap", [value], {"cap": 5.0}).output]
    return program


@pytest.mark.parametrize("change", [lambda program: program, scaled])
def test_the_logits_are_those_columns_of_all(change) -> None:
    program = change(tiny_program())
    narrowed = narrow_head(program, TOKENS)
    assert narrowed is not None and vocabulary_size(narrowed) == 5
    inputs = {"input_ids": IDS}
    expected = Runner(program).logits(inputs)[..., TOKENS]
    torch.testing.assert_close(Runner(narrowed).logits(inputs), expected, rtol=1e-6, atol=1e-6)
    # The given program and its weights stay what they were.
    assert vocabulary_size(program) == 97


def test_the_loss_is_the_divergence_over_those_tokens() -> None:
    teacher, student = tiny_program(), tiny_program(seed=1)
    blocks = find_blocks(student)
    stop = blocks[-1].position + 1
    narrowed = narrow_head(student, TOKENS)
    assert narrowed is not None
    runner = BlockRunner(narrowed, blocks[0].position, stop, {}, CPU)
    other = BlockRunner(teacher, blocks[0].position, stop, {}, CPU)
    with torch.no_grad():
        values, wanted = runner.window_inputs(IDS), other.window_inputs(IDS)
        runner.run_range(values, 0, stop)
        other.run_range(wanted, 0, stop)
        loss = LogitObjective().measure(runner, dict(values), wanted[other.exit], learn=False)
        full = BlockRunner(student, blocks[0].position, stop, {}, CPU)
        logits = [LogitObjective._logits(full, values, stream, 0, len(IDS))[..., TOKENS].double()
                  for stream in (values[runner.exit], wanted[other.exit])]  # fmt: skip
    q, p = (torch.log_softmax(part, -1) for part in logits)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_frequent_and_expected_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny_program()
    monkeypatch.setattr(vocabulary, "KEPT", PerDevice(cpu=16, gpu=16))
    # Six tokens make up the text: all are kept, and ten that the program expects.
    text = torch.tensor([[3, 3, 50, 7, 7, 7, 90, 11, 60, 60]])
    tokens = tokens_to_compare(program, text, CPU, torch.float32)
    assert tokens is not None and len(tokens) == 16 and tokens.tolist() == sorted(tokens.tolist())
    seen = set(text.flatten().tolist())
    expected = Runner(program).logits({"input_ids": text}).softmax(-1).sum((0, 1))
    order = [token for token in expected.argsort(descending=True).tolist() if token not in seen]
    assert set(tokens.tolist()) == seen | set(order[:10])


def test_a_small_vocabulary_is_compared_whole() -> None:
    assert tokens_to_compare(tiny_program(), IDS, CPU, torch.float32) is None


def test_a_head_that_is_no_projection_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny_program()
    function = program.functions[program.calls[-1].function]
    function.results = [function.add("add", [function.results[0], function.results[0]], {}).output]
    monkeypatch.setattr(vocabulary, "KEPT", PerDevice(cpu=16, gpu=16))
    assert narrow_head(program, TOKENS) is None
    assert tokens_to_compare(program, IDS, CPU, torch.float32) is None
