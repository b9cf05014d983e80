"""What fits a GPU's memory, as reports and commands tell it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FitEntry:
    """The largest batch, or the longest text, of which a step fits a GPU's memory.

    Attributes:
        phase: `prefill`, `decode` or `train`.
        size: `batch` or `seq`: which of the two is as large as it gets.
        value: How large; 0 where not even 1 fits.
        other: The size that was given: tokens of a text for a batch, texts for a length.
        bytes: What torch will reserve; of a step of size 1 where none fits.
        bound: What stopped the search where that was not the memory; else "".
    """

    phase: str
    size: str
    value: int
    other: int
    bytes: int
    bound: str = ""

    def describe(self) -> str:
        """Return it as a phrase."""
        given = f"of {self.other:,} tokens" if self.size == "batch" else f"at batch {self.other:,}"
        if not self.value:
            return f"{self.phase} {given}: none fits"
        what = "batch {:,}" if self.size == "batch" else "{:,} tokens"
        bound = f", {self.bound}" if self.bound else ""
        return f"{self.phase} {given}: {what.format(self.value)}{bound}"
