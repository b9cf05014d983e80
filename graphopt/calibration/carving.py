"""Which neurons of a feed-forward part belong together, and what tells that a token needs them.

A neuron is a column of the hidden activations: a row of the gate and up projections and a column
of the down projection. Source: CMoE, arXiv 2502.04416, section 4.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graphopt.errors import PassError
from graphopt.execute.student import Student
from graphopt.ir import functional
from graphopt.ir.blocks import block_name, find_blocks
from graphopt.ir.graph import Program, Value
from graphopt.ir.ops.experts import edge
from graphopt.solvers.least_squares import RIDGES, LeastSquares, best_ridge


def top_marks(hidden_TN: Tensor, count: int) -> Tensor:
    """Return the `count` neurons of largest magnitude for every token, int64 [T, count].

    Of equal magnitudes the lowest index is marked, on every device. The order within a row is
    not defined.

    Raises:
        PassError: There are fewer neurons.
    """
    tokens, width = hidden_TN.shape
    if not 0 < count <= width:
        raise PassError(
            f"{count} of {width} neurons cannot be marked in every token.",
            f"Give a number from 1 to {width}.",
        )
    sizes = hidden_TN.abs()
    if count == width:
        return torch.arange(width, device=hidden_TN.device).expand(tokens, width)
    values, marks = sizes.topk(count + 1, dim=-1)
    # `topk` says nothing about ties; they matter only where one runs over the edge.
    tied = (values[:, count] == values[:, count - 1]).nonzero()[:, 0]
    marks = marks[:, :count]
    if len(tied):
        order = sizes[tied].sort(dim=-1, descending=True, stable=True).indices
        marks[tied] = order[:, :count]
    return marks


def normalised_hidden(x: Tensor, gate: Tensor | None, up: Tensor, act: str) -> Tensor:
    """Return hidden activations of inputs and rows that are all scaled to length 1, fp32 [T, N].

    A neuron's activation is then one of cosines alone: neither the length of its rows nor a
    token's own has a part in it. Biases are left out. Source: CMoE's code marks neurons by these;
    its paper (arXiv 2502.04416, section 4.1) says the activations themselves.

    Args:
        x: [T, D].
        gate, up: [N, D].
        act: The activation's name as an op.
    """
    x, up = (F.normalize(rows.float(), dim=-1) for rows in (x, up))
    if gate is None:
        return functional.ACTIVATIONS[act](x @ up.t())
    gate = F.normalize(gate.float(), dim=-1)
    return functional.ACTIVATIONS[act](x @ gate.t()) * (x @ up.t())


def mark_counts(marks_TK: Tensor, width: int) -> Tensor:
    """Return in how many tokens each neuron is marked, int64 [width]."""
    return torch.bincount(marks_TK.flatten(), minlength=width)


def overlaps(marks_TK: Tensor, centres_TC: Tensor, width: int) -> Tensor:
    """Return the inner products of every neuron's marks with centres [T, C], fp32 [width, C].

    A neuron's marks are a vector over tokens, 1 where it is marked; it is never built.
    """
    count = marks_TK.shape[1]
    found = centres_TC.new_zeros(width, centres_TC.shape[1], dtype=torch.float32)
    rows = centres_TC.float().repeat_interleave(count, 0)
    return found.index_add_(0, marks_TK.flatten(), rows)


def balanced_assignment(gain_NC: Tensor, capacity: Sequence[int]) -> Tensor:
    """Assign every row to a column so that each gets its capacity and the sum is largest.

    Exact. Every row first takes its best column at prices that nearly balance the columns; then,
    as long as a column holds too many, one unit is moved along the path over columns that costs
    least. Either keeps the assignment the best one for its loads (successive shortest paths,
    Ahuja, Magnanti and Orlin, Network Flows, section 9.7). The same gains give the same
    assignment.

    Args:
        gain_NC: fp [N, C].
        capacity: Of every column; together they hold the rows exactly.

    Returns:
        int64 [N] on the CPU.

    Raises:
        PassError: The capacities do not hold the rows exactly, or a gain is no number.
    """
    gain: NDArray[np.float64] = gain_NC.detach().cpu().double().numpy()
    if len(gain) != sum(capacity):
        raise PassError(
            f"{len(gain)} neurons do not fill {len(capacity)} experts with room for "
            f"{sum(capacity)}.",
            "Take another number of experts.",
        )
    if not np.isfinite(gain).all():
        raise PassError("A neuron's activations hold NaN or infinity, so it has no expert.")
    return torch.from_numpy(_Assignment(gain, np.array(capacity)).solve())


PRICE_ROUNDS = 8
"""Rounds over the columns in which each sets the price at which just its capacity wants it."""


def _prices(gain: NDArray[np.float64], capacity: NDArray[np.int64]) -> NDArray[np.float64]:
    count, columns = gain.shape
    prices = np.zeros(columns)
    for _ in range(PRICE_ROUNDS if columns > 1 else 0):
        for column in range(columns):
            rest = gain - prices
            rest[:, column] = -np.inf
            margin = gain[:, column] - rest.max(1)
            edge = min(count - int(capacity[column]), count - 1)
            prices[column] = np.partition(margin, edge)[edge]
    return prices


class _Assignment:
    def __init__(self, gain: NDArray[np.float64], capacity: NDArray[np.int64]) -> None:
        self.gain, self.capacity = gain, capacity
        self.columns = gain.shape[1]
        # Prices change every assignment of the same loads by the same sum.
        self.place: NDArray[np.int64] = (gain - _prices(gain, capacity)).argmax(1)
        self.loads = np.bincount(self.place, minlength=self.columns)
        # For every pair of columns what it costs to move a row of the first to the second.
        self.heaps: list[list[list[tuple[float, int]]]] = [
            [[] for _ in range(self.columns)] for _ in range(self.columns)
        ]
        for column in range(self.columns):
            rows = np.flatnonzero(self.place == column)
            costs = gain[rows, column, None] - gain[rows]
            for other in range(self.columns):
                if other != column:
                    heap = list(zip(costs[:, other].tolist(), rows.tolist(), strict=True))
                    heapq.heapify(heap)
                    self.heaps[column][other] = heap
        self.costs = np.full((self.columns, self.columns), np.inf)
        for column in range(self.columns):
            self._refresh(column)

    def solve(self) -> NDArray[np.int64]:
        while (self.loads > self.capacity).any():
            path = self._shortest_path()
            moves = [(a, b, self.heaps[a][b][0][1]) for a, b in itertools.pairwise(path)]
            for a, b, row in moves:
                self._move(row, a, b)
            for column in path:
                self._refresh(column)
        return self.place

    def _shortest_path(self) -> list[int]:
        """Return the cheapest path of columns from one that holds too many to one with room."""
        far = np.where(self.loads > self.capacity, 0.0, np.inf)
        before = np.full(self.columns, -1)
        for _ in range(self.columns - 1):
            through = far[:, None] + self.costs
            best = through.argmin(0)
            cost = through[best, np.arange(self.columns)]
            # Rounding must not let a path circle.
            better = cost < far - 1e-12 * (1 + np.where(np.isfinite(far), np.abs(far), 0.0))
            if not better.any():
                break
            far = np.where(better, cost, far)
            before = np.where(better, best, before)
        room = np.where(self.loads < self.capacity, far, np.inf)
        path = [int(room.argmin())]
        while before[path[0]] >= 0 and len(path) <= self.columns:
            path.insert(0, int(before[path[0]]))
        return path

    def _move(self, row: int, a: int, b: int) -> None:
        self.place[row] = b
        self.loads[a] -= 1
        self.loads[b] += 1
        own = self.gain[row]
        for other in range(self.columns):
            if other != b:
                heapq.heappush(self.heaps[b][other], (float(own[b] - own[other]), row))

    def _refresh(self, column: int) -> None:
        """Drop what has left a column from its heaps, and read what a move costs."""
        for other in range(self.columns):
            heap = self.heaps[column][other]
            while heap and self.place[heap[0][1]] != column:
                heapq.heappop(heap)
            self.costs[column, other] = heap[0][0] if heap else np.inf


def cluster(marks_TK: Tensor, members: Tensor, width: int, experts: int) -> tuple[Tensor, Tensor]:
    """Divide neurons into experts of equal size by the tokens in which they are marked.

    Centres start as the marks of the most often marked members; then members are assigned so
    that their inner products with the centres are largest. For marks and equal sizes that
    assignment is also the one of least distance, absolute and squared:
    |c - v|_1 = |v|_1 + |c| - 2 <c, v>, and likewise for the square. Source: CMoE,
    arXiv 2502.04416, section 4.2.

    Args:
        marks_TK: From `top_marks`.
        members: int64 [N], the neurons to divide, N a multiple of `experts`.
        width: Number of neurons that marks speak of.

    Returns:
        int64 [experts, N / experts]: the neurons of every expert, in ascending order; and the
        means of their marks, fp32 [T, experts].
    """
    tokens = len(marks_TK)
    counts = mark_counts(marks_TK, width)
    seeds = members[counts[members].sort(descending=True, stable=True).indices[:experts]]
    centres = torch.zeros(tokens, experts, device=marks_TK.device)
    for number, seed in enumerate(seeds.tolist()):
        centres[:, number] = (marks_TK == seed).any(-1).float()
    capacity = len(members) // experts
    gains = overlaps(marks_TK, centres, width)[members]
    place = balanced_assignment(gains, [capacity] * experts).to(members.device)
    groups = torch.stack([members[place == number].sort().values for number in range(experts)])
    owner = torch.full((width,), experts, device=marks_TK.device)
    for number in range(experts):
        owner[groups[number]] = number
    marked = torch.zeros(tokens, experts + 1, device=marks_TK.device)
    marked.scatter_add_(1, owner[marks_TK], torch.ones_like(marks_TK, dtype=marked.dtype))
    return groups, marked[:, :experts] / capacity


@dataclass(frozen=True)
class Division:
    """Neurons divided into shared ones and experts.

    Attributes:
        order: int64 [N], every neuron once: the shared ones, then the experts' side by side.
        shared: How many are shared.
        router: What tells experts from the part's input, by what it is called in
            `graphopt.ir.feed_forward.with_experts`; {} without experts.
        rounds: How often neurons changed places before nothing moved, or the limit.
    """

    order: Tensor
    shared: int
    router: dict[str, Tensor]
    rounds: int = 0


FIRST_MARKS = 0.1
"""Share of the neurons that are marked in a token for the first clusters."""


def energies(hidden_TN: Tensor, down: Tensor) -> Tensor:
    """Return the square of what each neuron adds to the output, fp32 [T, N].

    Args:
        down: The down projection [out, N].
    """
    return (hidden_TN.float() * down.float().norm(dim=0)).square()


def static_order(energy_TN: Tensor) -> Tensor:
    """Return all neurons, the ones that add most on average first; int64 [N]."""
    return energy_TN.sqrt().mean(0).sort(descending=True, stable=True).indices


def first_marks(width: int) -> int:
    """Return how many neurons are marked in a token for the first clusters."""
    return max(1, round(FIRST_MARKS * width))


@dataclass(frozen=True)
class Tokens:
    """What a part has of some tokens.

    Attributes:
        x: Its input [T, D].
        energy: From `energies` [T, N].
    """

    x: Tensor
    energy: Tensor


def divide_by_fit(
    learn: Tokens,
    held_out: Tokens,
    shared: int,
    experts: int,
    active: int,
    rounds: int,
    *,
    threshold: bool = False,
) -> Division:
    """Divide neurons so that a linear router loses as little energy as it can.

    In turns, until no neuron moves: the router is fitted to the square root of every expert's
    energy, by least squares with the pull that is best on held-out tokens; every token takes
    its `active` experts of highest score; and neurons are assigned anew, each to where the
    tokens that run it hold most of its energy, which is exact for those tokens
    (`balanced_assignment`). The shared neurons are one more place, which every token runs. No
    turn lowers the energy that the tokens keep, up to the change of the router. The first
    clusters are those of CMoE. Scores are scaled so that those of a token have a standard
    deviation of 1 on average: their softmax is neither flat nor all one expert's. With
    `threshold` their constants are such that the experts of held-out tokens with scores above 0
    are `active` on average.

    Args:
        learn: What neurons are assigned by and routers fitted to.
        held_out: What the router's pull, and the threshold, are chosen by.
        shared: Number of shared neurons.
        active: Experts of a token, or with `threshold` their mean.
    """
    energy = learn.energy
    width = energy.shape[1]
    size = (width - shared) // experts
    order = static_order(energy)
    marks = top_marks(energy, first_marks(width))
    groups, _ = cluster(marks, order[shared:].sort().values, width, experts)
    place = torch.zeros(width, dtype=torch.int64, device=energy.device)
    for number in range(experts):
        place[groups[number]] = number + 1
    router = _RouterFit(learn, held_out, experts)
    turns = 0
    while turns < rounds:
        turns += 1
        scores = router.features[0] @ router.fit(place)
        runs = chosen(scores, active, threshold=threshold)
        runs = torch.cat([scores.new_ones(len(scores), 1), runs], 1)
        gain = energy.t() @ runs
        new = balanced_assignment(gain, [shared] + [size] * experts).to(place.device)
        moved = not torch.equal(new, place)
        place = new
        if not moved:
            break
    weight = router.fit(place)
    if experts > 1:
        spread = (router.features[0] @ weight).std(-1).mean()
        weight = weight / spread.clamp(min=1e-12)
    if threshold:
        weight[-1] -= edge(router.features[1] @ weight, active)
    made = {"router": weight[:-1].t().contiguous(), "router.bias": weight[-1].clone()}
    return Division(place.sort(stable=True).indices, shared, made, turns)


def divide_as_published(
    hidden_TN: Tensor, gate: Tensor | None, up: Tensor, shared: int, experts: int, marks: int
) -> Division:
    """Divide neurons and make the router as CMoE does (arXiv 2502.04416, section 4).

    The neurons that are marked in most tokens are shared; the others are clustered once by their
    marks; and the scores of an expert are those of the member nearest to its centre, with rows
    of the projections scaled to length 1. With few marks that is the member that is marked
    least: |c - v|_1 = |v|_1 + |c| - 2 <c, v>, and v is below a half everywhere.

    Args:
        gate, up: The projections [N, D].
        marks: Marked neurons of a token.
    """
    width = hidden_TN.shape[1]
    marked = top_marks(hidden_TN, marks)
    counts = mark_counts(marked, width)
    order = counts.sort(descending=True, stable=True).indices
    members = order[shared:].sort().values
    groups, centres = cluster(marked, members, width, experts)
    # Up to what depends on the centre alone, the distance to it.
    far = counts[:, None] - 2 * overlaps(marked, centres, width)
    chosen_neurons = torch.stack(
        [group[far[group, number].argmin()] for number, group in enumerate(groups)]
    )
    router = {"router": F.normalize(up[chosen_neurons].float(), dim=-1)}
    if gate is not None:
        router["router.gate"] = F.normalize(gate[chosen_neurons].float(), dim=-1)
    return Division(torch.cat([order[:shared].sort().values, groups.flatten()]), shared, router, 1)


def chosen(scores_TE: Tensor, active: int, *, threshold: bool = False) -> Tensor:
    """Return 1 for the experts that tokens run and 0 for the others, as `top_gates` does.

    Args:
        threshold: Run what lies above one edge for all tokens, `active` experts on average.
    """
    if threshold:
        return (scores_TE > edge(scores_TE, active)).to(scores_TE.dtype)
    return functional.top_gates(scores_TE, count=active)


def _energy_of(energy_TN: Tensor, place_N: Tensor, experts: int) -> Tensor:
    """Return every expert's energy [T, E]; place 0 is what is shared."""
    found = energy_TN.new_zeros(len(energy_TN), experts + 1)
    return found.index_add_(1, place_N, energy_TN)[:, 1:]


class _RouterFit:
    """Routers of the same features, the part's input and a constant."""

    def __init__(self, learn: Tokens, held_out: Tokens, experts: int) -> None:
        self.tokens, self.experts = (learn, held_out), experts
        self.features = [
            torch.cat([tokens.x.float(), tokens.x.new_ones(len(tokens.x), 1).float()], 1)
            for tokens in self.tokens
        ]
        self.sums: list[LeastSquares] = []

    def fit(self, place: Tensor) -> Tensor:
        """Return the weights [D + 1, E], the constant's last."""
        targets = [_energy_of(tokens.energy, place, self.experts).sqrt() for tokens in self.tokens]
        both = list(zip(self.features, targets, strict=True))
        if self.sums:
            self.sums = [s.retarget(*pair) for s, pair in zip(self.sums, both, strict=True)]
        else:
            self.sums = [LeastSquares(), LeastSquares()]
            for sums, pair in zip(self.sums, both, strict=True):
                sums.add(*pair)
        # Where nothing predicts better than 0 does, the strongest pull predicts least.
        learn, held_out = self.sums
        return learn.solve(best_ridge(learn, held_out)[0] or max(RIDGES)).float()


LOADED = 4
"""Windows that are run at once to count what tokens run."""


def expert_loads(
    program: Program, windows: Tensor, device: torch.device
) -> list[tuple[str, list[float]]]:
    """Return the share of tokens that run each expert, of every part of a carved program.

    Args:
        windows: int64 [N, S].

    Returns:
        For each part its block's name, and for each of its experts a share from 0 to 1.
    """
    blocks = find_blocks(program)
    first, stop = blocks[0].position, blocks[-1].position + 1
    student = Student(program, first, stop, {}, device, keep_weights=False)
    found: dict[str, Tensor] = {}
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    for ids in windows.split(LOADED):
        values: dict[str, Any] = student.inputs(ids.to(device))
        with torch.no_grad():
            student.run(values, 0, first)
            for block in blocks:
                where = block_name(program, block)

                def watch(value: Value, gates: Tensor, where: str = where) -> None:
                    if value.node is not None and value.node.op == "top_gates":
                        runs = (gates != 0).flatten(0, -2).double().sum(0)
                        found[where] = found.get(where, nothing) + runs

                student.run(values, block.position, block.position + 1, watch)
    return [(where, (runs / windows.numel()).tolist()) for where, runs in found.items()]
