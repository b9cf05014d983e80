"""Layer sensitivity, against runs of narrowed models, and allocating a budget by it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.calibration.layer_sensitivity import LayerSensitivity, measure_sensitivity
from graphopt.calibration.neuron_energy import neuron_energies
from graphopt.errors import PassError
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.feed_forward import feed_forwards
from graphopt.ir.weights import Array, Weight
from graphopt.solvers.budget import allocate_budget

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(5))
GROUPS, KEPT = 4, 3


def logits(program):
    return torch.log_softmax(Runner(program).logits({"input_ids": IDS}).double(), -1)


def test_needs_are_those_of_models_with_one_part_narrowed():
    program = tiny_program(layers=3, ffn=56)
    blocks = find_blocks(program)
    parts = {}
    for index in (0, 2):
        call = program.calls[blocks[index].position]
        (parts[index],) = feed_forwards(program.functions[call.function], blocks[index].stream)
    sensitivities = measure_sensitivity(program, parts, IDS, GROUPS, KEPT)
    assert set(sensitivities) == {0, 2}
    whole = logits(program)
    for index, part in sensitivities.items():
        call = program.calls[blocks[index].position]
        form, function = parts[index], program.functions[call.function]
        slot = next(s for s, v in function.weights.items() if v is form.down.inputs[1])
        down = program.weights[call.weights[slot]]
        student = BlockRunner(program, blocks[0].position, blocks[-1].position + 1, {}, CPU)
        values, seen = student.window_inputs(IDS), {}

        def watch(value, tensor, seen=seen):
            seen[value] = tensor.flatten(0, -2)

        with torch.no_grad():
            student.run_range(values, 0, blocks[index].position)
            at = blocks[index].position
            for _ in student.run_calls([values], at, at + 1, observe=watch):
                pass
        stream = values[call.results[0]].flatten(0, -2)
        relative = neuron_energies(seen[form.hidden], down.load())
        relative = relative / stream.square().sum(-1, keepdim=True)
        order = relative.mean(0).argsort(descending=True)
        assert part.size == 14 and part.kept == KEPT
        for number, lost in enumerate(part.lost):
            expected = float(relative[:, order[number * 14 :]].sum(-1).mean())
            assert lost == pytest.approx(expected, rel=1e-4, abs=1e-9)
        pruned = program.copy()
        narrow = down.load().clone()
        narrow[:, order[KEPT * 14 :]] = 0
        pruned.weights.replace(Weight(down.name, Array(narrow), down.checkpoint))
        found = logits(pruned)
        kl = float((whole.exp() * (whole - found)).sum(-1).mean())
        assert part.kl == pytest.approx(kl, rel=1e-2, abs=1e-7)
        assert part.kl_at(KEPT) == part.kl and part.kl_at(GROUPS) == 0.0
        assert part.kl_at(0) > part.kl_at(1) > part.kl_at(2) > part.kl


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1),
    st.integers(0, 40),
)  # fmt: skip
def test_a_budget_is_shared_out_as_by_trying_everything(seed, parts, most, least, more):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(parts, most + 1, generator=generator, dtype=torch.float64).tolist()
    sizes = [2 * int(n) for n in torch.randint(1, 4, (parts,), generator=generator)]
    total = least * sum(sizes) + more
    found = allocate_budget(costs, sizes, least, total)

    def cost(numbers):
        return sum(own[number] for own, number in zip(costs, numbers, strict=True))

    fitting = [
        numbers
        for numbers in itertools.product(range(most + 1), repeat=parts)
        if sum((least + n) * size for n, size in zip(numbers, sizes, strict=True)) <= total
    ]
    assert sum(n * size for n, size in zip(found, sizes, strict=True)) <= total
    best = min(map(cost, fitting))
    assert cost([n - least for n in found]) == pytest.approx(best)


def test_a_part_whose_groups_lose_nothing_keeps_as_many_as_that_takes():
    free = LayerSensitivity(size=2, kl=0.0, kept=3, lost=(0.5, 0.2, 0.0, 0.0, 0.0))
    other = LayerSensitivity(size=2, kl=0.1, kept=3, lost=(0.5, 0.3, 0.2, 0.1, 0.0))
    costs = [[part.kl_at(number) for number in range(1, 5)] for part in (free, other, free)]
    assert costs[0] == [math.inf, 0.0, 0.0, 0.0]
    # Nine groups: what one part does not need is left to the other.
    assert allocate_budget(costs, [2, 2, 2], 1, 18) == [2, 4, 2]


def test_a_model_that_gives_no_number_is_refused_with_the_part():
    program = tiny_program(layers=2, ffn=56)
    blocks = find_blocks(program)
    call = program.calls[blocks[1].position]
    parts = {1: feed_forwards(program.functions[call.function], blocks[1].stream)[0]}
    name = next(name for slot, name in call.weights.items() if "norm" in slot)
    weight = program.weights[name]
    broken = Array(torch.full(tuple(weight.shape), math.nan))
    program.weights.replace(Weight(name, broken, weight.checkpoint))
    with pytest.raises(PassError, match="with 3 of 4 groups") as caught:
        measure_sensitivity(program, parts, IDS, GROUPS, KEPT)
    assert "--device cpu" in caught.value.remedy


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="fit into 11 neurons"):
        allocate_budget([[1.0], [1.0]], [3, 3], 2, 11)
