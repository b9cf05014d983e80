"""What each page of keys gets of a model's attention, over texts."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.calibration.attention_traces import attention_traces
from graphopt.execute import page_attention
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.page_attention import CausalAttention
from graphopt.ir.graph import resolve_attrs
from graphopt.ir.ops import get_op
from graphopt.support.per_device import PerDevice

F64, PAGE = torch.float64, 4
IDS = torch.randint(5, 90, (3, 22), generator=torch.Generator().manual_seed(4))


def stream_of(program, rows):
    return HiddenStateStream(Runner(program, F64), IDS, tokens_at_once=rows * IDS.shape[1])


@pytest.mark.parametrize("scores", [2**25, 700])  # all rows at once, and a few
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": True}], ids=str)
def test_a_trace_is_the_largest_probability_of_each_page(options, scores, monkeypatch):
    monkeypatch.setattr(page_attention, "SCORES_AT_ONCE", PerDevice(cpu=scores, gpu=scores))
    program = tiny_program(layers=2, **options)
    first, whole = 5, stream_of(program, 3)
    traces = list(attention_traces(stream_of(program, 2), PAGE, first=first))
    assert [(trace.layer.index, trace.batch) for trace in traces] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    for block in whole:
        here = [trace for trace in traces if trace.layer.index == block.index]
        found = torch.cat([trace.probabilities_BGSN for trace in here])
        node = here[0].layer.node
        wanted = CausalAttention.wanted(node)
        values = dict(zip(wanted, block.values(0, wanted), strict=True))
        operands = [None if v is None else values[v] for v in node.inputs]
        attrs = {**resolve_attrs(node, block.call), "lse": True, "page_max": PAGE}
        _, lse, maxima = get_op("attention").reference(operands, attrs)
        expected = torch.exp(maxima - lse[..., None]).unflatten(1, (-1, 2)).amax(2)[:, :, first:]
        # Sums of a few numbers in fp64, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        for trace in here:
            rows = len(trace.probabilities_BGSN)
            assert trace.lengths.last_B.tolist() == [IDS.shape[1] - 1] * rows
    assert not whole.index < len(whole.blocks)


def test_an_attention_with_a_window_has_no_trace():
    program = tiny_program(layers=3, window=6)
    traces = attention_traces(stream_of(program, 3), PAGE)
    assert [trace.layer.index for trace in traces] == [1]
