"""Which fits there is time for, judged by how long those before them took."""

from __future__ import annotations

from graphopt.solvers.least_squares import RIDGES
from graphopt.support.ranks import here


class TimeForFits:
    """Tells which fits would not be done in time.

    What takes time is told with its number of operations. A fit is taken to be as slow, for its
    operations, as the slowest one before it; and the first as runs of blocks were. Times are those
    of the ranks' clock, so that all ranks decide alike.

    Args:
        until: When the time is over; None where there is no limit.
        tokens: Those of a rank, about: a number that is the same on all ranks.
    """

    def __init__(self, until: float | None, tokens: int) -> None:
        self.until, self.tokens = until, tokens
        self._of_runs, self._of_fits = 0.0, 0.0  # seconds an operation
        self._longest = 0.0

    def now(self) -> float:
        """Return the time, to be given back as the beginning of what is told; 0 without a limit."""
        return 0.0 if self.until is None else here().clock()

    def of_run(self, weights: int) -> int:
        """Return about how many operations a run of so many weights takes."""
        return 2 * self.tokens * weights

    def of_fit(self, features: int, outputs: int) -> int:
        """Return about how many operations a fit of `features` to `outputs` takes.

        The sums over tokens, and for each ridge strength a Cholesky factor and a solution by it.
        """
        sums = 2 * self.tokens * features * (features + outputs)
        return sums + len(RIDGES) * (features**3 // 3 + 2 * features**2 * outputs)

    def ran(self, operations: int, since: float) -> None:
        """Take in that blocks were run, for so many operations."""
        self._of_runs = max(self._of_runs, (self.now() - since) / max(operations, 1))

    def fitted(self, operations: int, since: float) -> None:
        """Take in that a fit was made."""
        seconds = self.now() - since
        self._of_fits = max(self._of_fits, seconds / operations)
        self._longest = max(self._longest, seconds)

    def lacking(self, operations: int | None = None) -> str:
        """Return why a fit must not be begun, as a clause; "" where it may.

        Args:
            operations: The fit's; None where they are not known yet: it is then taken to be as long
                as the longest one so far.
        """
        if self.until is None:
            return ""
        left = self.until - self.now()
        if left < 0:
            return "the time for it was over"
        rate = self._of_fits or self._of_runs
        seconds = self._longest if operations is None else rate * operations
        if seconds <= left:
            return ""
        return f"it would have taken about {seconds:.2g} s of the {left:.2g} s that were left"
