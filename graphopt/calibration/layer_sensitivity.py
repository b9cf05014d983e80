"""The sensitivity of a model to its feed-forward parts: what it loses where one has fewer neurons.

It is measured once for each part, with as many groups of it as parts run on average: the divergence
of the model's next-token distributions with that part alone narrowed. All parts are measured in one
walk (`graphopt.calibration.scores`). How it changes with the number of groups is read off the
energy of the neurons that are left out, of which a small divergence is a linear function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.neuron_energy import mean_energies, relative_energies, static_order
from graphopt.calibration.output_path import OutputPath
from graphopt.calibration.scores import final_output_metric, scoring_stream
from graphopt.calibration.token_power import token_power
from graphopt.errors import PassError
from graphopt.execute.hidden_states import BlockStep
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.feed_forward import FeedForward
from graphopt.ir.graph import Program
from graphopt.support.progress import Progress, silent


@dataclass(frozen=True)
class LayerSensitivity:
    """The sensitivity of a model to one part.

    Attributes:
        size: Neurons of a group.
        kl: KL divergence of the model's next-token distributions, in nats, with `kept` groups of
            the part, the same for every token.
        kept: How many these are.
        lost: For every number of groups from 0 to all of them the energy of the neurons that are
            left out, in units of the stream's square behind the block.
    """

    size: int
    kl: float
    kept: int
    lost: tuple[float, ...]

    def kl_at(self, groups: int) -> float:
        """Return the divergence that is to be expected with a number of groups.

        Infinite, where groups lose something and as many as were measured do not: how much is not
        known, and none of it has to be lost.
        """
        if not self.lost[groups]:
            return 0.0
        measured = self.lost[self.kept]
        return self.kl * self.lost[groups] / measured if measured else math.inf


def measure_sensitivity(
    program: Program,
    parts: Mapping[int, FeedForward],
    windows: Tensor,
    groups: int,
    kept: int,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> dict[int, LayerSensitivity]:
    """Measure parts on text.

    Args:
        parts: The parts, by the index of their block among `find_blocks`.
        windows: int64 [N, S].
        groups: How many groups of neurons every part is made of.
        kept: How many of the groups a part has while it is measured.

    Returns:
        For each part, by the same index, what is lost by it.

    Raises:
        PassError: What the model gives with a part narrowed is no number.
    """
    device = device or torch.device("cpu")
    dtype = scoring_dtype(program, device)
    stream = scoring_stream(program, windows, device=device, dtype=dtype, progress=progress)
    lost: dict[int, tuple[float, ...]] = {}
    sizes: dict[int, int] = {}

    def narrowed(block: BlockStep) -> dict[int, list[Tensor]]:
        if block.index not in parts:
            return {}
        part, index = parts[block.index], block.index
        slots = block.function.slots_by_value()
        slot = slots[part.down.inputs[1]]  # type: ignore[index]
        down = block.weights[slot]
        path = OutputPath.behind(block.function, block.block.stream, part.down)
        norm = None if path is None else path.output_norm(program, block)

        def energy_of(batch: int) -> Tensor:
            hidden, behind = block.values(batch, [part.hidden, block.function.results[0]])
            power = token_power(behind).flatten(0, -2)
            return relative_energies(hidden.flatten(0, -2), power, down, norm)

        means = mean_energies(map(energy_of, range(len(stream.ids))), stream.ranks)
        order = static_order(means)
        size = sizes[index] = -(-len(order) // groups)
        rest = means.double()[order].flip(0).cumsum(0).flip(0).tolist()
        edges = [min(number * size, len(rest)) for number in range(groups + 1)]
        lost[index] = tuple(rest[edge] if edge < len(rest) else 0.0 for edge in edges)
        rows = torch.zeros(len(order), dtype=down.dtype, device=down.device)
        rows[order[: kept * size]] = 1
        changed = {slot: down * rows}
        return {index: [block.run(batch, changed=changed) for batch in range(len(stream.ids))]}

    with torch.inference_mode():
        kl = final_output_metric(stream, narrowed, "kl")
    for index, value in kl.items():
        if not math.isfinite(value):
            raise PassError(
                f"{stream.name_of(index)}: with {kept} of {groups} groups of its feed-forward part "
                "the model gives NaN or Inf.",
                "Take --device cpu, which computes in fp32, or leave layerwise_budget out.",
            )
    return {index: LayerSensitivity(sizes[index], kl[index], kept, lost[index]) for index in parts}
