"""What FuseGPT multiplies coefficients with. Listing passes reads this: it imports no torch."""

from __future__ import annotations

from typing import Literal

Donor = Literal["pruned", "self", "random", "none"]
"""The removed block's weight, the neighbour's own, noise of the removed one's size, or nothing."""
