"""Rounding the weights of one block after another on the residual stream of a text.

Two streams are walked side by side: of the program as it was, and of what has been rounded so far.
What a linear is to give is what it gave in the first; what it is given is what it finds in the
second, activations rounded as they will be. So every weight makes up for the errors in front of it.

For a linear with weight W, inputs x of the rounded program and the outputs y of the first one, the
matrix that is rounded is not W but the one of least squares |V x - y|^2, pulled towards W: with
r = y - W x it is W + r x^T (x x^T + ridge)^-1, of the strength that is best on windows that the fit
does not see, or W itself where none is better. Where the output is added to the residual stream, y
holds the stream's own error too. Source: the asymmetric calibration of GPTAQ (Li et al., arXiv
2504.02692), solved for as `graphopt.calibration.reconstruction` does.

A token counts in units of the power of what it is to give, since most models have a few tokens of
huge norm, which would decide every sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.token_power import token_power
from graphopt.execute.hidden_states import BlockStep
from graphopt.ir.blocks import SubBlock, sub_blocks
from graphopt.ir.graph import Function, Node, Value
from graphopt.passes.quantize.places import Stage
from graphopt.solvers.least_squares import LeastSquares, best_ridge

RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
"""Strengths by which a matrix may be pulled towards the weight, times its features' mean power."""


@dataclass(frozen=True)
class Moments:
    """What rounding the linears of one stage asks of the text.

    Attributes:
        gram: Second moments of what they read, [in, in].
        change: What is added to their weights, side by side, [sum of outs, in]; None for nothing.
        rows: For each slot its rows among the outputs.
    """

    gram: Tensor
    change: Tensor | None
    rows: dict[str, slice]


class BlockPair:
    """A block of the program as it was, and the same block while it is rounded.

    Args:
        dense, rounded: The two, each in front of the block.
    """

    def __init__(self, dense: BlockStep, rounded: BlockStep) -> None:
        self.dense, self.rounded = dense, rounded
        self._first = rounded
        self._terms = _sequential_terms(rounded.function, rounded.block.stream)
        self._kept: Value | None = None
        self._states: list[Tensor] = []
        self._by_name = {value.name: value for value in dense.function.values()}

    def moments(self, stage: Stage) -> Moments:
        """Return what the text says of a stage, all earlier ones being rounded.

        Raises:
            ValueError: Activations are not finite.
            torch.linalg.LinAlgError: Their second moments have no inverse.
        """
        self._keep_in_front_of(next(iter(stage.linears.values())))
        x = next(iter(stage.linears.values())).inputs[0]
        assert x is not None
        outputs = [node.output for node in stage.linears.values()]
        theirs = [self._by_name[value.name] for value in outputs]
        streams = {
            number: part
            for number, node in enumerate(stage.linears.values())
            if (part := self._terms.get(node)) is not None
        }
        learn, held = LeastSquares(), LeastSquares()
        for batch, is_held in enumerate(self.rounded.stream.held_out):
            fronts = [_stream_in_front(part) for part in streams.values()]
            features, *mine = self.rounded.values(batch, [x, *outputs, *fronts])
            wanted = self.dense.values(
                batch, [*theirs, *(self._by_name[front.name] for front in fronts)]
            )
            for place, number in enumerate(streams, start=len(outputs)):
                wanted[number] = wanted[number] + wanted[place]
                mine[number] = mine[number] + mine[place]
            goal, given = (torch.cat(v[: len(outputs)], -1).float() for v in (wanted, mine))
            root = token_power(goal).rsqrt()
            sums = held if is_held else learn
            sums.add(features.float() * root, (goal - given) * root)
        # Held-out sums are empty where there is one window, which no two ranks share.
        for sums in (learn, held) if held.gram is not None else (learn,):
            sums.reduce(self.rounded.stream.ranks)
        assert learn.gram is not None
        # The square is not finite where a target is not.
        measured = [sums for sums in (learn, held) if sums.gram is not None]
        if not all(_is_finite(sums) for sums in measured):
            raise ValueError("the activations hold NaN or infinity")
        ridge = None
        if held.gram is not None:
            ridge, _ = best_ridge(learn, held, RIDGES)
            learn = learn + held
        assert learn.gram is not None
        change = None if ridge is None else learn.solve(ridge).t().float()
        return Moments(learn.gram, change, self._rows(stage))

    def reload(self) -> None:
        """Go on with the weights that the program has now."""
        self.rounded = self._first.replace()
        if self._kept is not None:
            self.rounded.keep(self._kept, self._states)

    def advance(self) -> float:
        """Move both streams behind the block; return the relative squared error there."""
        ends = [step.function.results[0] for step in (self.rounded, self.dense)]
        error = power = 0.0
        steps = (self.rounded, self.dense)
        hidden: tuple[list[Tensor], list[Tensor]] = ([], [])
        for batch in range(len(self.rounded.stream.ids)):
            for step, end, states in zip(steps, ends, hidden, strict=True):
                states.append(step.stream.offload(step.values(batch, [end])[0]))
            mine, theirs = (states[-1].float() for states in hidden)
            per_token = theirs.square().sum(-1).clamp(min=1e-12)
            error += float(((mine - theirs).square().sum(-1) / per_token).sum())
            power += per_token.numel()
        self._first.advance(hidden[0])
        self.dense.advance(hidden[1])
        error, power = self.rounded.stream.ranks.totals(error, power)
        return error / max(power, 1.0)

    def _rows(self, stage: Stage) -> dict[str, slice]:
        rows: dict[str, slice] = {}
        start = 0
        for slot in stage.linears:
            size = self.rounded.weights[slot].shape[0]
            rows[slot] = slice(start, start + size)
            start += size
        return rows

    def _keep_in_front_of(self, node: Node) -> None:
        """Keep the streams at the last place inside the block that lies in front of a node."""
        nodes = self.rounded.function.nodes
        until = nodes.index(node)
        points = [part.behind for part in self._terms.values()]
        points = [p for p in points if p.node is not None and nodes.index(p.node) < until]
        if not points or points[-1] is self._kept:
            return
        self._kept = points[-1]
        self._states = self.rounded.keep(self._kept)
        self.dense.keep(self._by_name[self._kept.name])


def _is_finite(sums: LeastSquares) -> bool:
    assert sums.gram is not None and sums.cross is not None
    finite = sums.gram.isfinite().all() & sums.cross.isfinite().all()
    return bool(finite) and math.isfinite(sums.square)


def _sequential_terms(function: Function, stream: int) -> dict[Node, SubBlock]:
    """Return the projections that add to the residual stream one after another, with their terms.

    Terms that are added beside each other have one place behind them, and no stream in between.
    """
    parts = sub_blocks(function, stream)
    behind = [part.behind for part in parts]
    return {
        part.term.node: part
        for part in parts
        if behind.count(part.behind) == 1 and part.term.node is not None
    }


def _stream_in_front(part: SubBlock) -> Value:
    (front,) = [value for value in part.node.inputs if value is not part.term]
    assert front is not None
    return front
