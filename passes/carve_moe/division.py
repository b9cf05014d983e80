"""Which neurons of a feed-forward part belong together, and what tells that a token needs them.

A neuron is a column of the hidden activations: a row of the gate and up projections and a column
of the down projection. Source: CMoE, arXiv 2502.04416, section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.calibration.neuron_energy import mean_energies, static_order
from graphopt.errors import PassError
from graphopt.execute.hidden_states import PerBatch
from graphopt.ir import functional
from graphopt.ir.ops.experts import routing_threshold
from graphopt.solvers.assignment import balanced_assignment
from graphopt.solvers.least_squares import RIDGES, LeastSquares, best_ridge
from graphopt.support.ranks import ALONE, Ranks


def top_k_indicators(hidden_TN: Tensor, count: int) -> Tensor:
    """Return the activation indicators of tokens: the neurons that are 1, int64 [T, count].

    They are the `count` neurons of largest magnitude of every token; of equal magnitudes those of
    lowest index, on every device. The order within a row is not defined.

    Raises:
        PassError: There are fewer neurons.
    """
    tokens, width = hidden_TN.shape
    if not 0 < count <= width:
        raise PassError(
            f"{count} of {width} neurons cannot be the largest of every token.",
            f"Give a number from 1 to {width}.",
        )
    sizes = hidden_TN.abs()
    if count == width:
        return torch.arange(width, device=hidden_TN.device).expand(tokens, width)
    values, indicators = sizes.topk(count + 1, dim=-1)
    # `topk` says nothing about ties; they matter only where one runs over the edge.
    tied = (values[:, count] == values[:, count - 1]).nonzero()[:, 0]
    indicators = indicators[:, :count]
    if len(tied):
        order = sizes[tied].sort(dim=-1, descending=True, stable=True).indices
        indicators[tied] = order[:, :count]
    return indicators


def cosine_hidden(x: Tensor, gate: Tensor | None, up: Tensor, act: str) -> Tensor:
    """Return hidden activations of inputs and rows that are all scaled to length 1, fp32 [T, N].

    A neuron's activation is then one of cosines alone: neither the length of its rows nor a
    token's own has a part in it. Biases are left out. Source: CMoE's code takes the indicators of
    these; its paper (arXiv 2502.04416, section 4.1) says those of the activations themselves.

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


def indicator_counts(indicators_TK: Tensor, width: int) -> Tensor:
    """Return for how many tokens the indicator of each neuron is 1, int64 [width]."""
    return torch.bincount(indicators_TK.flatten(), minlength=width)


def overlaps(indicators_TK: Tensor, centres_TC: Tensor, width: int) -> Tensor:
    """Return the inner products of every neuron's indicators with centres, fp32 [width, C].

    A neuron's indicators are a vector of 0 and 1 over tokens, one row of a matrix that is built for
    these tokens: adding up rows by their neurons instead has a GPU wait at each neuron's sum.

    Args:
        indicators_TK: From `top_k_indicators`.
        centres_TC: [T, C].
        width: Number of neurons.
    """
    ones_TN = centres_TC.new_zeros(len(indicators_TK), width, dtype=torch.float32)
    ones_TN.scatter_(1, indicators_TK, 1.0)
    return ones_TN.t() @ centres_TC.float()


def cluster(
    indicators: Sequence[Tensor],
    members: Tensor,
    width: int,
    experts: int,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Divide neurons into experts of equal size by their activation indicators.

    Centres start as the indicators of the members whose indicators are 1 most often; then members
    are assigned so that their inner products with the centres are largest. For indicators and
    equal sizes that assignment is also the one of least distance, absolute and squared:
    |c - v|_1 = |v|_1 + |c| - 2 <c, v>, and likewise for the square. Source: CMoE,
    arXiv 2502.04416, section 4.2.

    Args:
        indicators: From `top_k_indicators`, a tensor [T, K] for every batch of tokens;
            iterated twice.
        members: int64 [N], the neurons to divide, N a multiple of `experts`.
        width: Number of neurons that have indicators.
        ranks: Who shares the tokens.

    Returns:
        int64 [experts, N / experts]: the neurons of every expert, in ascending order.
    """
    counts = sum_of((indicator_counts(some_TK, width) for some_TK in indicators), ranks)
    seeds = members[counts[members].sort(descending=True, stable=True).indices[:experts]]

    def gains(indicators_TK: Tensor) -> Tensor:
        centres = [(indicators_TK == seed).any(-1).float() for seed in seeds.tolist()]
        return overlaps(indicators_TK, torch.stack(centres, 1), width)[members]

    capacity = len(members) // experts
    assigned = balanced_assignment(sum_of(map(gains, indicators), ranks), [capacity] * experts)
    place = assigned.to(members.device)
    return torch.stack([members[place == number].sort().values for number in range(experts)])


def cluster_centres(indicators_TK: Tensor, groups: Tensor, width: int) -> Tensor:
    """Return the means of the indicators of every expert's neurons, fp32 [T, experts].

    Args:
        groups: From `cluster`, int64 [experts, N / experts].
    """
    experts, size = groups.shape
    owner = torch.full((width,), experts, device=indicators_TK.device)
    owner[groups] = torch.arange(experts, device=groups.device)[:, None]
    active = torch.zeros(len(indicators_TK), experts + 1, device=indicators_TK.device)
    active.scatter_add_(1, owner[indicators_TK], torch.ones_like(indicators_TK, dtype=active.dtype))
    return active[:, :experts] / size


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


INITIAL_ACTIVATION_SHARE = 0.1
"""Share of the neurons whose indicators of a token are 1 for the initial clusters."""


def initial_k_activations(width: int) -> int:
    """Return how many indicators of a token are 1 for the initial clusters."""
    return max(1, round(INITIAL_ACTIVATION_SHARE * width))


@dataclass(frozen=True)
class Tokens:
    """A part's activations on some tokens, in batches.

    Attributes:
        x: Its input, [T, D] for every batch.
        energy: The energy of its neurons, from `relative_energies`, [T, N] for every batch.
        ranks: Who shares the tokens.
        held: Whether they are held in memory, rather than made anew each time.
    """

    x: Sequence[Tensor]
    energy: Sequence[Tensor]
    ranks: Ranks = ALONE
    held: bool = False


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
    energy, by least squares with the ridge strength that is best on held-out tokens; every token
    takes its `active` experts of highest router logits; and neurons are assigned again, each to
    where the tokens that run it hold most of its energy, which is exact for those tokens
    (`balanced_assignment`). The shared neurons are one more place, which every token runs; the
    first clusters are those of CMoE. Of all turns the one counts that keeps most energy on
    held-out tokens: an assignment is the best one for the router that it was made by, and the
    next router may do worse with it.

    Scores are scaled so that those of a token have a standard deviation of 1 on average: their
    softmax is neither flat nor all one expert's. With `threshold` their constants are such that the
    experts of held-out tokens with scores above 0 are `active` on average.

    Args:
        learn: What neurons are assigned by and routers fitted to.
        held_out: What the ridge strengths, the turn and the threshold are chosen by.
        shared: Number of shared neurons.
        active: Experts of a token, or with `threshold` their mean.
    """
    ranks = learn.ranks
    energies = mean_energies(learn.energy, ranks)
    width = len(energies)
    size = (width - shared) // experts
    order = static_order(energies)
    count = initial_k_activations(width)
    indicators = PerBatch.of(
        learn.energy, lambda energy_TN: top_k_indicators(energy_TN, count), learn.held or None
    )
    groups = cluster(indicators, order[shared:].sort().values, width, experts, ranks)
    place = torch.zeros(width, dtype=torch.int64, device=order.device)
    for number in range(experts):
        place[groups[number]] = number + 1
    routers = _RouterFit(learn, held_out, experts)
    best: tuple[float, Tensor, Tensor] | None = None
    turns = 0
    while True:
        weight = routers.fit(place)
        scores = routers.scores(held_out, weight)
        runs = chosen(scores, active, threshold=threshold, ranks=ranks)
        gain = _energy_by_place(held_out.energy, runs, ranks)
        kept = float(gain.gather(1, place[:, None]).sum())
        if best is None or kept > best[0]:
            best = kept, place, weight
        if turns == rounds:
            break
        turns += 1
        scores = routers.scores(learn, weight)
        runs = chosen(scores, active, threshold=threshold, ranks=ranks)
        gain = _energy_by_place(learn.energy, runs, ranks)
        new = balanced_assignment(gain, [shared] + [size] * experts).to(place.device)
        if torch.equal(new, place):
            break
        place = new
    _, place, weight = best
    if experts > 1:
        spreads = routers.scores(learn, weight).std(-1)
        spread, tokens = ranks.totals(float(spreads.double().sum()), len(spreads))
        weight = weight / max(spread / tokens, 1e-12)
    if threshold:
        scores = ranks.gathered(routers.scores(held_out, weight))
        weight[-1] -= routing_threshold(scores, active)
    made = {"router": weight[:-1].t().contiguous(), "router.bias": weight[-1].clone()}
    return Division(place.sort(stable=True).indices, shared, made, turns)


def divide_as_published(
    indicators: Sequence[Tensor],
    gate: Tensor | None,
    up: Tensor,
    shared: int,
    experts: int,
    ranks: Ranks = ALONE,
) -> Division:
    """Divide neurons and make the router as CMoE does (arXiv 2502.04416, section 4).

    The neurons whose indicators are 1 for most tokens are shared; the others are clustered once by
    their indicators; and the router logits of an expert are the activations of the member nearest
    to its centre, with rows of the projections scaled to length 1. Where few indicators are 1 that
    is the member that has fewest: |c - v|_1 = |v|_1 + |c| - 2 <c, v>, and v is below a half
    everywhere.

    Args:
        indicators: From `top_k_indicators`, a tensor [T, K] for every batch of tokens.
        gate, up: The projections [N, D].
        ranks: Who shares the tokens.
    """
    width = len(up)
    counts = sum_of((indicator_counts(some_TK, width) for some_TK in indicators), ranks)
    order = counts.sort(descending=True, stable=True).indices
    members = order[shared:].sort().values
    groups = cluster(indicators, members, width, experts, ranks)
    near = sum_of(
        (
            overlaps(some_TK, cluster_centres(some_TK, groups, width), width)
            for some_TK in indicators
        ),
        ranks,
    )
    # Up to what depends on the centre alone, the distance to it.
    far = counts[:, None] - 2 * near
    chosen_neurons = torch.stack(
        [group[far[group, number].argmin()] for number, group in enumerate(groups)]
    )
    router = {"router": F.normalize(up[chosen_neurons].float(), dim=-1)}
    if gate is not None:
        router["router.gate"] = F.normalize(gate[chosen_neurons].float(), dim=-1)
    return Division(torch.cat([order[:shared].sort().values, groups.flatten()]), shared, router, 1)


def chosen(
    scores_TE: Tensor, active: int, *, threshold: bool = False, ranks: Ranks = ALONE
) -> Tensor:
    """Return 1 for the experts that tokens run and 0 for the others, as `top_k_gating` does.

    Args:
        threshold: Run what lies above one threshold for all tokens, `active` experts on average.
        ranks: Who shares the tokens.
    """
    if threshold:
        above = routing_threshold(ranks.gathered(scores_TE), active)
        return (scores_TE > above).to(scores_TE.dtype)
    return functional.top_k_gating(scores_TE, top_k=active)


def _energy_of(energy_TN: Tensor, place_N: Tensor, experts: int) -> Tensor:
    """Return every expert's energy [T, E]; place 0 is what is shared."""
    # A product, since a GPU would add up one number at a time for each token and place.
    return energy_TN @ F.one_hot(place_N, experts + 1)[:, 1:].to(energy_TN)


def _energy_by_place(energy: Iterable[Tensor], runs_TE: Tensor, ranks: Ranks) -> Tensor:
    """Return each neuron's energy in the tokens that run each place, fp32 [N, 1 + E].

    Args:
        energy: The energy of neurons, [T, N] for every batch.
        runs_TE: 1 for the experts that the tokens of all batches run; place 0 is what is shared.
    """
    runs = torch.cat([runs_TE.new_ones(len(runs_TE), 1), runs_TE], 1)
    sums, start = [], 0
    for energy_TN in energy:
        sums.append(energy_TN.t() @ runs[start : start + len(energy_TN)])
        start += len(energy_TN)
    return sum_of(sums, ranks)


class _RouterFit:
    """Routers of the same features, the part's input and a constant, for any places of neurons."""

    def __init__(self, learn: Tokens, held_out: Tokens, experts: int) -> None:
        self.tokens, self.experts = (learn, held_out), experts
        self.sums: list[LeastSquares] = []

    def fit(self, place: Tensor) -> Tensor:
        """Return the weights [D + 1, E], the constant's last."""
        first = not self.sums
        self.sums = [LeastSquares(), LeastSquares()] if first else [s.retarget() for s in self.sums]
        for sums, tokens in zip(self.sums, self.tokens, strict=True):
            for x, energy_TN in zip(tokens.x, tokens.energy, strict=True):
                targets = _energy_of(energy_TN, place, self.experts).sqrt()
                (sums.add if first else sums.add_targets)(_with_constant(x), targets)
            sums.reduce(tokens.ranks)
        # Where nothing predicts better than 0 does, the strongest ridge predicts least.
        learn, held_out = self.sums
        return learn.solve(best_ridge(learn, held_out)[0] or max(RIDGES)).float()

    @staticmethod
    def scores(tokens: Tokens, weight: Tensor) -> Tensor:
        """Return the scores of this rank's tokens, [T, E]."""
        return torch.cat([_with_constant(x) @ weight for x in tokens.x])


def _with_constant(x: Tensor) -> Tensor:
    """Return inputs [T, D] with a feature of 1 behind them, fp32 [T, D + 1]."""
    return torch.cat([x.float(), x.new_ones(len(x), 1).float()], 1)


def sum_of(tensors: Iterable[Tensor], ranks: Ranks) -> Tensor:
    """Return the sum of what batches of all ranks give; one of them is in memory at a time."""
    return ranks.total(functools.reduce(torch.add, tensors))
