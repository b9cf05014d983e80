"""Programs compute where their inputs lie, on a device that is no CPU: tensors without numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, captured, cases, sampled

from graphopt.execute.interpreter import Runner, complete_inputs


@pytest.mark.parametrize("family", sampled(FAMILIES, ("llama", "mixtral")))
def test_every_value_lies_on_the_device_of_the_inputs(family: str) -> None:
    """Also what an operator makes of no tensor, such as the places of tokens among experts."""
    program = captured(family)[1]
    runner = Runner(program, device=torch.device("meta"))
    inputs = {name: value.to("meta") for name, value in cases((7,))[2].inputs.items()}
    elsewhere: list[str] = []

    def observe(value: Any, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            elsewhere.append(f"{value} on the {tensor.device}")

    environment: dict[str, Any] = dict(complete_inputs(inputs, 0))
    past = runner.empty_cache(len(inputs["input_ids"]))
    for _ in runner.run_calls(
        [environment], 0, len(program.calls), pasts=[past], observe=observe
    ):  # fmt: skip
        pass
    assert not elsewhere
    assert all(environment[name].is_meta for name in program.outputs)
