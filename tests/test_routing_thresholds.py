"""Thresholds of carved programs are set by what other text gives."""

from __future__ import annotations

import pytest
import torch
from carved import carved
from programs import tiny_program

from graphopt.calibration.expert_load import expert_loads
from graphopt.calibration.routing_thresholds import calibrate_thresholds
from graphopt.ir.feed_forward import Split, add_gate_operands
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
