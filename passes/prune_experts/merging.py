"""Merging experts that go into those that are left: paired neurons, averaged by their tokens.

Source: M-SMoE (arXiv 2310.01334) aligns experts by permutation and averages them by how often they
are chosen; HC-SMoE (arXiv 2410.08589) says which are alike by their outputs. Here the router's rows
of the dropped experts go, since a config has a row for each expert: the tokens that chose them are
routed anew, and are not sent to the merged expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.calibration.expert_saliency import ExpertActivity
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import TOKENS_AT_ONCE, BlockStep, HiddenStateStream
from graphopt.ir.expert_neurons import columns_of_mixture
from graphopt.ir.graph import Program, Value
from graphopt.ir.mixture import Mixture, stack_of, tables_of
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.ir.weights import Array
from graphopt.solvers.matching import greedy_pairs
from graphopt.support.progress import Progress

LEAST_TOKENS = 64
"""Tokens on which experts are compared at least; else as many as a block is run over at once."""


@dataclass(frozen=True)
class Merged:
    """Which experts of a mixture were merged.

    Attributes:
        into: For each expert that goes the one it was merged into, by their numbers before.
        likeness: For each the cosine of the outputs of the two.
    """

    into: dict[int, int]
    likeness: dict[int, float]


def merge_experts(
    program: Program,
    pruned: Program,
    mixtures: Mapping[int, Mixture],
    kept: Mapping[int, Sequence[int]],
    activity: Mapping[int, ExpertActivity],
    windows: Tensor,
    device: torch.device,
    progress: Progress,
) -> dict[int, Merged]:
    """Put merged weights into a program whose experts were dropped, in place.

    Args:
        program: The program before, whose experts are compared and merged.
        pruned: The same with the experts that are kept alone.
        mixtures: Of `program`, by the index of their block among `find_blocks`.
        kept: The experts that are left, by the index of their block.
        activity: How many tokens ran each expert, likewise.
        windows: Text whose tokens experts are compared on, int64 [N, S].
    """
    runner = calibration_runner(program, device)
    stream = HiddenStateStream(runner, windows, progress=progress, what="merging experts")
    kinds, _ = infer_program(program)
    merged: dict[int, Merged] = {}
    for block in stream:
        mixture = mixtures.get(block.index)
        if mixture is None:
            continue
        experts = _Experts(block, mixture, kinds[block.block.position], windows.numel())
        tokens = activity[block.index].tokens.double()
        merged[block.index] = experts.merge(kept[block.index], tokens.tolist())
        call = pruned.calls[block.block.position]
        for slot, value in experts.merged_weights(kept[block.index]).items():
            weight = pruned.weights[call.weights[slot]]
            value = value.to(weight.dtype).cpu().contiguous()
            pruned.weights.replace(weight.with_producer(Array(value)))
    return merged


class _Experts:
    """The experts of one mixture: their weights, and what they do on the same tokens.

    Args:
        block: In front of which the stream of hidden states is.
        types: Types of the values of its function.
        tokens: How many tokens the text has.

    Attributes:
        columns: Of which columns of each first product's results neurons are made.
        stacks: The slot of each product's stack, whether it is transposed for it, and its value.
        tables: The slots of tables of biases, and of which of these products.
        given, weights: Values of all of these by slot, as they are given and merged.
        hidden: The neurons [experts, T, N].
        outputs: What experts give, [experts, T, D].
    """

    def __init__(
        self, block: BlockStep, mixture: Mixture, types: Mapping[Value, Type], tokens: int
    ) -> None:
        self.mixture, function = mixture, block.function
        self.columns = columns_of_mixture(function, types, mixture)
        places = [stack_of(function, product) for product in (*mixture.first, mixture.last)]
        self.tables = tables_of(function, mixture, types)
        slots = [slot for slot, _ in places] + list(self.tables)
        self.given = {slot: block.weights[slot].float() for slot in slots}
        self.weights = {slot: value.clone() for slot, value in self.given.items()}
        self.stacks = [(slot, transposed, self.given[slot]) for slot, transposed in places]
        self.hidden, self.outputs = self._compare(block, tokens)

    def _compare(self, block: BlockStep, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the neurons [experts, T, N] and outputs [experts, T, D] of some tokens.

        Args:
            tokens: How many the text has.
        """
        mixture, device = self.mixture, block.stream.device
        most = max(TOKENS_AT_ONCE.on(device) // mixture.experts, LEAST_TOKENS)
        # Every so many tokens of the text, whatever batches and ranks it is divided into.
        every = max(1, tokens // most)
        place = block.stream.first_window * block.stream.ids[0].shape[1]
        parts: list[Tensor] = []
        for batch in range(len(block.hidden)):
            (states,) = block.values(batch, [mixture.tokens])
            parts.append(states[-place % every :: every])
            place += len(states)
        x_TD = block.stream.ranks.gathered(torch.cat(parts))[:most]
        experts = torch.arange(mixture.experts, device=device)
        given = {
            mixture.rows: x_TD.repeat(mixture.experts, 1),
            mixture.expert_of_row: experts.repeat_interleave(len(x_TD)),
            mixture.ends: ((experts + 1) * len(x_TD)).int(),
        }
        found = block.values(0, [mixture.hidden, mixture.outputs], given)
        hidden, outputs = (value.float().unflatten(0, (mixture.experts, -1)) for value in found)
        return hidden, outputs

    def merge(self, kept: Sequence[int], tokens: Sequence[float]) -> Merged:
        """Merge each expert that goes into the one of those that are left which is most alike."""
        into: dict[int, int] = {}
        likeness: dict[int, float] = {}
        flat = F.normalize(self.outputs.flatten(1), dim=1)
        weight = {expert: max(tokens[expert], 1.0) for expert in range(self.mixture.experts)}
        total = dict(weight)
        for expert in range(self.mixture.experts):
            if expert in kept:
                continue
            alike = flat[list(kept)] @ flat[expert]
            place = int(alike.argmax())
            into[expert], likeness[expert] = kept[place], float(alike[place])
            share = weight[expert] / (total[kept[place]] + weight[expert])
            total[kept[place]] += weight[expert]
            self._blend(kept[place], expert, share)
        return Merged(into, likeness)

    def _blend(self, kept: int, gone: int, share: float) -> None:
        """Average an expert into another one, whose neurons keep their order."""
        _, transposed, last = self.stacks[-1]
        down = [last[e].t() if transposed else last[e] for e in (kept, gone)]
        # What two neurons add to the output has so much in common.
        gain = (self.hidden[kept].t() @ self.hidden[gone]) * (down[0] @ down[1].t())
        pairs = greedy_pairs(gain)
        orders = [self._columns_of(pairs, columns) for columns in self.columns]
        for place, (slot, transposed, stack) in enumerate(self.stacks):
            if place < len(orders):
                moved = stack[gone][orders[place]] if transposed else stack[gone][:, orders[place]]
            else:
                moved = stack[gone][:, pairs] if transposed else stack[gone][pairs]
            self.weights[slot][kept].lerp_(moved, share)
        for slot, place in self.tables.items():
            table = self.given[slot]
            moved = table[gone][orders[place]] if place < len(orders) else table[gone]
            self.weights[slot][kept].lerp_(moved, share)

    @staticmethod
    def _columns_of(pairs: Tensor, columns: Tensor) -> Tensor:
        """Return which column of a first product comes to each place, by pairs of neurons."""
        columns = columns.to(pairs.device)
        order = torch.arange(columns.numel(), device=pairs.device)
        order[columns.flatten()] = columns[pairs].flatten()
        return order

    def merged_weights(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """Return the merged stacks and tables of biases, of the experts that are left alone."""
        return {slot: value[list(kept)] for slot, value in self.weights.items()}
