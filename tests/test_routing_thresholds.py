"""Thresholds of carved programs are set by what other text gives."""

from __future__ import annotations

import pytest
import torch
from carved import carved
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.calibration.expert_load import expert_loads
from graphopt.calibration.routing_thresholds import calibrate_thresholds
from graphopt.ir.feed_forward import Split, add_gate_operands
from graphopt.ir.ops.experts import routing_threshold
from graphopt.ir.weights import Array, Weight

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("biased", [False, True])
def test_after_calibration_every_part_runs_the_mean_number_of_experts(biased: bool) -> None:
    program = carved(tiny_program(layers=3), Split(8, 5, 2, threshold=True))
    if biased:
        names = add_gate_operands(program, selection_bias=True, gate_scale=True)
        for name in names["selection_bias"]:
            program.weights.replace(Weight(name, Array(torch.linspace(-0.3, 0.3, 5))))
    before = {weight.name: weight.load().clone() for weight in program.weights}
    # Routers are random, and so is what they run.
    assert all(abs(sum(load) - 2) > 0.01 for _, load in expert_loads(program, IDS, CPU))
    moved = calibrate_thresholds(program, IDS, CPU)
    # A later part is calibrated on what the calibrated ones before it give, so all hold at once.
    assert [sum(load) for _, load in expert_loads(program, IDS, CPU)] == pytest.approx([2, 2, 2])
    changed = {
        n for n, value in before.items() if not torch.equal(program.weights[n].load(), value)
    }
    assert len(moved) == 3 and changed == set(moved) and all("router.bias" in n for n in moved)
    for name in moved:
        by = program.weights[name].load() - before[name]
        assert torch.allclose(by, by[:1].expand(5), atol=1e-6)


def test_experts_of_fixed_number_have_no_threshold() -> None:
    program = carved(tiny_program(layers=2), Split(8, 5, 2))
    assert calibrate_thresholds(program, IDS, CPU) == []


@given(
    st.integers(2, 5).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))),
    st.integers(1, 6),
    st.integers(0, 2**16),
)
def test_a_threshold_is_as_far_as_can_be_from_every_token(
    sizes: tuple[int, int], tokens: int, seed: int
) -> None:
    experts, mean = sizes
    # Different multiples of 1/8, so that all are exact.
    order = torch.randperm(tokens * experts, generator=torch.Generator().manual_seed(seed))
    ranked = (order.view(tokens, experts) - 7) ** 3 / 8.0
    threshold = routing_threshold(ranked, mean)
    assert int((ranked > threshold).sum()) == mean * tokens
    if mean < experts:
        above, below = ranked[ranked > threshold].min(), ranked[ranked <= threshold].max()
        assert threshold == (above + below) / 2 and below < threshold < above


def test_equal_logits_and_neighbours_in_their_dtype_do_not_run_too_many_experts() -> None:
    equal = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert int((equal > routing_threshold(equal, 1)).sum()) == 0
    # Two lie above 1 and two on it, of which one would be the third.
    equal = torch.tensor([[2.0, 1.0], [1.0, 3.0], [0.0, 0.0]])
    assert int((equal > routing_threshold(equal, 1)).sum()) == 2
    for dtype in (torch.float32, torch.bfloat16):
        for low in (1.0, 1 + torch.finfo(dtype).eps):
            value = torch.tensor(low, dtype=dtype)
            pair = torch.stack([value, torch.nextafter(value, torch.tensor(2.0, dtype=dtype))])
            assert (pair > routing_threshold(pair, 1)).tolist() == [False, True]
