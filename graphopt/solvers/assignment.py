"""Assigning rows to columns of given capacities, so that the sum of gains is largest."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.errors import PassError


def balanced_assignment(gain_NC: Tensor, capacity: Sequence[int]) -> Tensor:
    """Assign every row to a column so that each gets its capacity and the sum is largest.

    Exact. Every row first takes its best column at prices that nearly balance the columns; then,
    as long as a column holds too many, one unit is moved along the path over columns that costs
    least. Either keeps the assignment the best one for its loads (successive shortest paths,
    Ahuja, Magnanti and Orlin, Network Flows, section 9.7). The same gains give the same
    assignment.

    Args:
        gain_NC: fp [N, C].
        capacity: How many rows each column takes; together they hold the rows exactly.

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
