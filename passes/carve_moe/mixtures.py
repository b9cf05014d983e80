"""Carving each expert of a mixture: its neurons are cut, or divided with a router of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.neuron_energy import mean_energies, static_order
from graphopt.calibration.reconstruction import Reconstruction
from graphopt.calibration.token_power import token_power
from graphopt.execute.hidden_states import BlockStep
from graphopt.ir.expert_neurons import keep_neurons, mask_neurons, neuron_count
from graphopt.ir.graph import Program, Value
from graphopt.ir.mixture import Mixture, own_slots, put_producer, stack_of
from graphopt.ir.types import Type
from graphopt.ir.weights import Array
from graphopt.pass_manager.expert_statements import CarvedMixture
from graphopt.passes.carve_moe.division import Division, Tokens, chosen, divide_by_fit
from graphopt.passes.carve_moe.record import Carved
from graphopt.solvers.least_squares import LeastSquares, best_ridge

LEAST_ROWS = 32
"""Tokens routed to an expert, of each of those learnt from and those held out, without which no
router is fitted to it: its groups are then chosen by their order."""


ALIGNED = 8
"""The number of neurons that an expert is left with is a multiple of so many."""


@dataclass(frozen=True)
class ExpertSplit:
    """How the neurons of each expert are divided.

    Attributes:
        shared: Groups that every token runs.
        active: Of the others how many a token runs; 0 leaves them out.
        groups: How many there are in all.
        rounds: At most so many turns of fitting neurons and routers.
        reconstruct: Whether the down projections are solved for anew.
    """

    shared: int
    active: int
    groups: int
    rounds: int
    reconstruct: bool

    def left_of(self, neurons: int) -> int:
        """Return how many of an expert's neurons are left: where none are active, a multiple of 8.

        Grouped products of PyTorch take rows that begin at multiples of 16 bytes.
        """
        if self.active:
            return neurons
        return min(neurons, -(-self.shared * (neurons // self.groups) // ALIGNED) * ALIGNED)


@dataclass(frozen=True)
class _Rows:
    """The rows of one expert.

    Attributes:
        x: What it reads, [R, D].
        hidden: Its neurons, [R, N].
        gates: Its gates, in units of the root of the residual stream's power, [R, 1].
        outputs: What it gives, without its bias, [R, D].
        energy: The energy of its neurons, times the square of `gates`, [R, N].
    """

    x: Tensor
    hidden: Tensor
    gates: Tensor
    outputs: Tensor
    energy: Tensor

    @property
    def tokens(self) -> Tokens:
        return Tokens([self.x], [self.energy])


class ExpertCarving:
    """Carves the experts of one block's mixture.

    Args:
        block: The block, whose stream is in front of it.
        types: Types of the values of its function.

    Attributes:
        own_weights: The names of the weights that experts are made of, in the program as given.
    """

    def __init__(
        self, block: BlockStep, mixture: Mixture, types: Mapping[Value, Type], split: ExpertSplit
    ) -> None:
        self.block, self.mixture, self.split = block, mixture, split
        neurons = neuron_count(types, mixture)
        self.size = neurons // split.groups
        self.shared = split.shared * self.size if split.active else split.left_of(neurons)
        self.own_weights = frozenset(
            block.call.weights[slot] for slot in own_slots(block.function, mixture, types)
        )
        slot, transposed = stack_of(block.function, mixture.last)
        stack = block.weights[slot].float()
        self.slot, self.transposed = slot, transposed
        self.down = stack.transpose(1, 2) if transposed else stack  # [experts, N, D]
        self.rows = [self._rows(held_out) for held_out in (False, True)]

    def _rows(self, held_out: bool) -> list[_Rows]:
        """Return each expert's rows of the batches that are learnt from, or held out."""
        mixture, block = self.mixture, self.block
        wanted = [
            mixture.expert_of_row, mixture.rows, mixture.hidden, mixture.gates,
            mixture.token_of_row, block.function.results[0],
        ]  # fmt: skip
        found: list[list[Tensor]] = []
        for batch, held in enumerate(block.stream.held_out):
            if held == held_out:
                *values, tokens_R, behind = block.values(batch, wanted)
                root_T1 = token_power(behind).sqrt().flatten(0, -2)
                values[3] = values[3].float() / root_T1[tokens_R]
                found.append(values)
        # An expert's rows are few, and every rank fits to those of all.
        owner, x, hidden, weight = (
            block.stream.ranks.gathered(torch.cat(values)) for values in zip(*found, strict=True)
        )
        made: list[_Rows] = []
        for expert, down in enumerate(self.down):
            own = owner == expert
            hidden_RN, gate = hidden[own].float(), weight[own].float()
            energy = (hidden_RN * gate * down.norm(dim=1)).square()
            made.append(_Rows(x[own].float(), hidden_RN, gate, hidden_RN @ down, energy))
        return made

    def divide(self) -> list[Division]:
        """Return for each expert its neurons: the shared ones first, then its groups'."""
        found: list[Division] = []
        for learn, held_out, down in zip(*self.rows, self.down, strict=True):
            order = self._static_order(learn, down)
            routed = self.split.groups - self.split.shared
            if not self.split.active:
                found.append(Division(order[: self.shared].sort().values, self.shared, {}))
            elif min(len(learn.x), len(held_out.x)) < LEAST_ROWS:
                # The first of the groups that are left are run by all tokens.
                router = {
                    "router": down.new_zeros(routed, learn.x.shape[1]),
                    "router.bias": -torch.arange(routed, dtype=down.dtype, device=down.device),
                }
                found.append(Division(order, self.shared, router))
            else:
                division = divide_by_fit(
                    learn.tokens, held_out.tokens, self.shared, routed, self.split.active,
                    self.split.rounds,
                )  # fmt: skip
                found.append(division)
        return found

    @staticmethod
    def _static_order(rows: _Rows, down: Tensor) -> Tensor:
        """Return all neurons, those of most energy first; of an expert without tokens by weight."""
        return static_order(mean_energies([rows.energy]) if len(rows.x) else down.norm(dim=1))

    def put(self, program: Program, divisions: Sequence[Division]) -> None:
        """Put the neurons, and the routers if there are any, into the program."""
        orders = [division.order.tolist() for division in divisions]
        keep_neurons(program, {self.block.index: orders})
        if self.split.active:
            router = torch.stack([division.router["router"].t() for division in divisions])
            bias = torch.stack([division.router["router.bias"] for division in divisions])
            mask_neurons(program, self.block.index, self.shared, self.split.active, router, bias)

    def _runs(self, rows: _Rows, division: Division) -> Tensor:
        """Return 1 for the neurons that rows run, in the division's order, [R, n]."""
        ones = rows.x.new_ones(len(rows.x), self.shared)
        if not division.router:
            return ones
        logits = rows.x @ division.router["router"].t() + division.router["router.bias"]
        gates = chosen(logits, self.split.active)
        return torch.cat([ones, gates.repeat_interleave(self.size, 1)], 1)

    def reconstruct(self, program: Program, divisions: Sequence[Division]) -> Reconstruction:
        """Solve for each expert's down projection so that its outputs are nearest to the dense."""
        before = after = power = 0.0
        made: list[Tensor] = []
        for expert, division in enumerate(divisions):
            down = self.down[expert][division.order]
            fits: list[LeastSquares] = []
            for rows in (part[expert] for part in self.rows):
                features = rows.hidden[:, division.order] * self._runs(rows, division) * rows.gates
                fit = LeastSquares()
                fit.add(features, rows.gates * rows.outputs - features @ down)
                fits.append(fit)
            learn, held_out = fits
            ridge, error = best_ridge(learn, held_out)
            before, after = before + held_out.error(None), after + error
            outputs = self.rows[1][expert].gates * self.rows[1][expert].outputs
            power += float(outputs.square().sum())
            change = None if ridge is None else (learn + held_out).solve(ridge).float()
            made.append(down if change is None else down + change)
        stack = torch.stack(made)
        stack = (stack.transpose(1, 2) if self.transposed else stack).contiguous().cpu()
        call = program.calls[self.block.block.position]
        dtype = program.weights[call.weights[self.slot]].dtype
        put_producer(program, call, self.slot, Array(stack.to(dtype)))
        power = max(power, 1e-30)
        return Reconstruction(f"{self.block.name}: experts", before / power, after / power, None)

    def measure(self, divisions: Sequence[Division], seed: int) -> Carved:
        """Measure the divisions on held-out rows, all experts together."""
        keep = self.shared + self.split.active * self.size
        generator = torch.Generator().manual_seed(seed)
        # Energies that rows keep, by which neurons they run.
        kept = dict.fromkeys(("all", "static", "shared", "random", "oracle", "routed"), 0.0)
        agreeing = count = rounds = 0
        for learn, rows, division, down in zip(*self.rows, divisions, self.down, strict=True):
            energy = rows.energy[:, division.order]
            kept["all"] += float(rows.energy.sum())
            kept["static"] += float(rows.energy[:, self._static_order(learn, down)[:keep]].sum())
            kept["shared"] += float(energy[:, : self.shared].sum())
            rounds = max(rounds, division.rounds)
            if not division.router:
                continue
            energy_RE = energy[:, self.shared :].unflatten(1, (-1, self.size)).sum(-1)
            runs = self._runs(rows, division)[:, self.shared :: self.size]
            best = chosen(energy_RE, self.split.active)
            noise = torch.rand(runs.shape, generator=generator).to(runs)
            for name, groups in (
                ("random", chosen(noise, self.split.active)), ("oracle", best), ("routed", runs)
            ):  # fmt: skip
                kept[name] += float((energy_RE * groups).sum())
            agreeing += int((runs == best).all(-1).sum())
            count += len(runs)
        whole = max(kept["all"], 1e-30)

        def lost(name: str) -> float:
            beside = kept["shared"] if self.split.active and name != "static" else 0.0
            return 1 - (kept[name if self.split.active else "static"] + beside) / whole

        return Carved(
            f"{self.block.name}: experts", self.split.shared, 0, rounds,
            lost("static"), lost("random"), lost("oracle"), lost("routed"),
            kept["routed"] / kept["oracle"] if kept["oracle"] else 1.0,
            agreeing / count if count else 1.0, [],
        )  # fmt: skip

    def statement(self, divisions: Sequence[Division]) -> CarvedMixture:
        """Return what is stated of them."""
        return CarvedMixture(
            self.block.index,
            tuple(tuple(division.order.tolist()) for division in divisions),
            self.shared,
            self.split.active,
            reconstructed=self.split.reconstruct,
        )
