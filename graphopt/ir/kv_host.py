"""How the keys of a layer are divided between a device and the host's memory, in pieces of tokens.

The first tokens of a text lie on the device, those behind them in host memory, in pieces of
neighbouring tokens. A step attends to some pieces on the device, to which they are copied through
two buffers, and to the others on the host's processors. So a text that is shorter than was planned
for leaves more of itself on the device.

Imports nothing but itself: the planner of `place-kv` counts with it, and models carry it.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFILL_TOKENS = 2048
"""Tokens of all rows of a prompt that are read at once: what a prompt computes is as large."""

_LEAST, _MOST, _PIECES = 256, 8192, 16


def piece_tokens(tokens: int, batch: int) -> int:
    """Return the tokens of a piece: 16 pieces a text, none of them large for all rows together.

    Args:
        tokens: Of each row in host memory.
        batch: Rows.
    """
    most = max(_LEAST, _MOST // batch // _LEAST * _LEAST)
    return min(most, max(_LEAST, -(-tokens // (_PIECES * _LEAST)) * _LEAST))


def prefill_chunk(batch: int) -> int:
    """Return the tokens of each row of a prompt that are read at once."""
    return max(64, PREFILL_TOKENS // batch)


@dataclass(frozen=True)
class HostShare:
    """How a layer's keys and values are divided, as it was planned for texts of so many tokens.

    Attributes:
        context: Tokens of a text, its answer included, and most of them that there may be.
        batch: Texts at once, and most that there may be.
        resident: Tokens at the front of a text that lie on the device.
        streamed: Of the others, those that a step copies to the device; the rest is attended to
            by the host's processors.

    Raises:
        ValueError: A number is negative, or they do not come out.
    """

    context: int
    batch: int
    resident: int
    streamed: int

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1 or min(self.resident, self.streamed) < 0:
            raise ValueError(f"{self}: numbers from 1 on, shares from 0 on")
        if self.resident + self.streamed > self.context or self.resident == self.context:
            raise ValueError(f"{self}: some tokens in host memory, and no more than there are")

    @property
    def computed(self) -> int:
        """Tokens that the host's processors attend to."""
        return self.context - self.resident - self.streamed

    def streamed_pieces(self, pieces: int) -> int:
        """Return how many of a text's pieces in host memory a step copies: the planned share."""
        return round(pieces * self.streamed / (self.context - self.resident))

    def __str__(self) -> str:
        return (
            f"host(context={self.context}, batch={self.batch}, resident={self.resident}, "
            f"streamed={self.streamed})"
        )
