"""What a division of a part leaves out, on tokens that it was not learnt from."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.calibration.neuron_energy import mean_energies, static_order
from graphopt.passes.carve_moe.activations import PartActivations
from graphopt.passes.carve_moe.division import Division, chosen
from graphopt.passes.carve_moe.record import Carved


def measure_division(
    part: PartActivations,
    division: Division,
    gates: list[Tensor],
    active: int,
    groups: int,
    *,
    threshold: bool,
    seed: int,
) -> Carved:
    """Measure a division on held-out tokens.

    Args:
        gates: What the router gave, [T, E] for every batch of all tokens; empty without experts.
        active: How many experts are run.
        groups: Neuron groups of the part: those that every token runs, and the experts.
        threshold: Whether these are a mean, and each token has as many as it needs.
        seed: Of the random choice of experts that the router's is compared with.
    """
    size = part.width // groups
    keep = (part.shared + active) * size
    ranks = part.ranks
    best = static_order(mean_energies(part.learnt.energy, ranks))[:keep]
    order, shared = division.order, division.shared
    total = of_best = of_shared = 0.0
    of_experts: list[Tensor] = []
    for energy_TN in part.held_out.energy:
        total += float(energy_TN.sum())
        of_best += float(energy_TN[:, best].sum())
        of_shared += float(energy_TN[:, order[:shared]].sum())
        if gates:
            routed = energy_TN[:, order[shared:]]
            of_experts.append(routed.unflatten(1, (gates[0].shape[1], size)).sum(-1))
    total, of_best, of_shared = ranks.totals(total, of_best, of_shared)
    static = 1 - of_best / total
    if not gates:
        return Carved(
            part.block.name, part.shared, part.added, 0,
            static, static, static, static, 1.0, 1.0, [],
        )  # fmt: skip
    energy_TE = ranks.gathered(torch.cat(of_experts))
    runs = ranks.gathered((torch.cat(gates[part.learn :]) != 0).float())
    oracle = chosen(energy_TE, active, threshold=threshold)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(runs.shape, generator=generator).to(runs)

    def lost(runs: Tensor) -> float:
        return 1 - (of_shared + float((energy_TE * runs).sum())) / total

    return Carved(
        part.block.name, part.shared, part.added, division.rounds,
        static, lost(chosen(noise, active)), lost(oracle), lost(runs),
        float((energy_TE * runs).sum() / (energy_TE * oracle).sum()),
        float((runs == oracle).all(-1).float().mean()), runs.mean(0).tolist(),
    )  # fmt: skip
