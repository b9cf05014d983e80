"""Likelihoods of a text are those of its logits, whatever part of them is in memory at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, captured, mostly_slow
from programs import tiny_program
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.execute import likelihoods
from graphopt.execute.interpreter import Runner
from graphopt.execute.language_model import ProgramModel
from graphopt.execute.likelihoods import ProgramLikelihoods, token_log_likelihoods
from graphopt.ir.weights import Weight

IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))


def logits_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that fills with the shapes of the logits that are made."""
    shapes: list[tuple[int, ...]] = []

    def recorded(logits: Tensor, targets: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape[:2]))
        return token_log_likelihoods(logits, targets)

    monkeypatch.setattr(likelihoods, "token_log_likelihoods", recorded)
    return shapes


KINDS = {"bloom", "gemma2", "gpt2", "gpt_oss", "llama"}
"""Families that stand for others: masks of each kind, learned positions, sinks, a mixture."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    mostly_slow(
        sorted(FAMILIES), quick=("llama", "bloom"), rare=sorted({*FAMILIES}.difference(KINDS))
    ),
)
def test_parts_of_the_tokens_give_what_all_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = captured(family)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    expected = logits.double().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    # A few hundred products in another order: see family_sweep.LEAST_TOLERANCE.
    near = {"rtol": 0, "atol": 2e-5 * float(logits.abs().max())}
    torch.testing.assert_close(
        ProgramModel(program).log_likelihoods(IDS).double(), expected, **near
    )
    shapes = logits_seen(monkeypatch)
    monkeypatch.setattr(likelihoods, "NUMBERS_AT_ONCE", 3 * 2 * logits.shape[-1])
    got = ProgramModel(program).log_likelihoods(IDS)
    torch.testing.assert_close(got.double(), expected, **near)
    assert shapes == [(2, 3), (2, 3), (2, 3), (2, 1)]


def test_rows_may_be_padded_behind() -> None:
    model = ProgramModel(tiny_program())
    whole = model.log_likelihoods(IDS)
    padded = torch.cat([IDS[:, :7], torch.zeros(2, 4, dtype=torch.long)], 1)
    got = model.log_likelihoods(padded)[:, :6]
    torch.testing.assert_close(got, whole[:, :6], rtol=0, atol=1e-5)


def test_the_blocks_see_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny_program()
    monkeypatch.setattr(likelihoods, "NUMBERS_AT_ONCE", 1)
    found = ProgramLikelihoods(Runner(program))
    shapes = logits_seen(monkeypatch)
    assert found.of(IDS).shape == (2, 10) and shapes == [(2, 1)] * 10
    # Without the call behind the blocks, the last one has attention in it.
    program.calls.pop()
    assert ProgramLikelihoods(Runner(program))._first == len(program.calls)


@pytest.mark.parametrize("together", [2**16, 22])
def test_a_weight_is_read_once_for_all_texts_of_a_walk(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny_program()
    ids = IDS.repeat(3, 1)
    expected = ProgramModel(program).log_likelihoods(ids)
    reads: list[str] = []
    load = Weight.load

    def counted(weight: Weight, *args: Any) -> Tensor:
        reads.append(weight.name)
        return load(weight, *args)

    monkeypatch.setattr(Weight, "load", counted)
    monkeypatch.setattr(likelihoods, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(likelihoods, "TOKENS_TOGETHER", together)
    steps: list[tuple[str, int, int]] = []
    runner = Runner(program, keep_weights=False)
    found = ProgramLikelihoods(runner).of(
        ids, at_once=1, progress=lambda *step: steps.append(step), what="reading"
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    walks = 1 if together > ids.numel() else 3
    used = [name for call in program.calls for name in call.weights.values()]
    assert sorted(reads) == sorted(used * walks)
    total = walks * (len(program.calls) - 1) + len(ids)
    assert steps == [("reading", done, total) for done in range(total + 1)]
    assert not runner._kept


class Mean(nn.Module):
    """Adds to each token what all have in common, behind everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(90, 8), nn.Linear(8, 90, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        logits: Tensor = self.head(hidden + hidden.mean(1, keepdim=True))
        return logits


def test_an_operator_that_looks_at_other_tokens_sees_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = Mean()
    program = capture(model)
    monkeypatch.setattr(likelihoods, "NUMBERS_AT_ONCE", 1)
    with torch.no_grad():
        expected = token_log_likelihoods(model(IDS)[:, :-1], IDS[:, 1:])
    got = ProgramModel(program).log_likelihoods(IDS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
