"""How queries score pages of keys, a few rows of scores at a time."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.execute import page_attention
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.page_attention import CausalAttention, attention_layers
from graphopt.ir.graph import resolve_attrs
from graphopt.ir.ops import get_op
from graphopt.support.per_device import PerDevice

F64, PAGE = torch.float64, 4
IDS = torch.randint(5, 90, (3, 22), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("scores", [2**25, 700])  # all rows at once, and a few
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": True}], ids=str)
def test_probabilities_of_pages_are_those_of_the_attention(options, scores, monkeypatch):
    monkeypatch.setattr(page_attention, "SCORES_AT_ONCE", PerDevice(cpu=scores, gpu=scores))
    program, first = tiny_program(layers=2, **options), 5
    layers = attention_layers(program)
    assert [layer.left_alone for layer in layers] == [None, None]
    for block in HiddenStateStream(Runner(program, F64), IDS):
        node = layers[block.index].node
        wanted = CausalAttention.wanted(node)
        values = dict(zip(wanted, block.values(0, wanted), strict=True))
        found = CausalAttention.of_values(node, block.call, values).page_scores(first, PAGE)
        operands = [None if v is None else values[v] for v in node.inputs]
        attrs = {**resolve_attrs(node, block.call), "lse": True, "page_max": PAGE}
        _, lse, maxima = get_op("attention").reference(operands, attrs)
        expected = torch.exp(maxima - lse[..., None]).unflatten(1, (-1, 2)).amax(2)[:, :, first:]
        # Sums of a few numbers in fp64, in another order.
        torch.testing.assert_close(found.probabilities(), expected, rtol=1e-12, atol=1e-14)
        mass = found.mass()
        torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), rtol=1e-12, atol=0)


def test_attentions_with_windows_are_left_alone():
    reasons = [layer.left_alone for layer in attention_layers(tiny_program(layers=3, window=6))]
    assert reasons == ["it has a window of 6 tokens", None, "it has a window of 6 tokens"]
