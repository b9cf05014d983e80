"""How the products of experts are cut into tiles: by the figures of a target and its memory."""

from __future__ import annotations

from dataclasses import dataclass


def power(size: int) -> int:
    """Return the power of two that is no less than a size."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """How a product of sorted tokens is cut.

    Attributes:
        rows, columns, depth: A tile's tokens, its outputs, and what is summed over at a time.
        group: Tiles of rows that share the columns of a weight while those are in the cache.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8

    def options(self, experts: int, weights: int, room: int | None) -> dict[str, int]:
        """Return what a kernel is compiled for.

        Args:
            weights: How many weights it reads a tile of.
            room: Bytes of shared memory; a GPU with little of it has fewer tiles ahead.
        """
        stages = self.stages
        if room is not None:
            ahead = room // (2 * self.depth * (self.rows + weights * self.columns))
            stages = min(stages, max(2, ahead + 1))
        return {
            "BLOCK_T": self.rows, "BLOCK_N": self.columns, "BLOCK_D": self.depth,
            "BLOCK_E": power(experts), "GROUP": self.group,
            "num_warps": self.warps, "num_stages": stages,
        }  # fmt: skip


@dataclass(frozen=True)
class ManyTokens:
    """Tiles of the products of tokens that are sorted by expert.

    Attributes:
        tokens: From how many tokens an expert has on average they are taken: an expert's last
            tile is half empty.
        expand, reduce: Tiles of the products with `up` and `gate`, and with `down`; their rows are
            equal.
    """

    tokens: int
    expand: Tiles
    reduce: Tiles


@dataclass(frozen=True)
class FewTokens:
    """What a program reads of a weight for one token.

    Attributes:
        rows, depth: Rows of the weight, and elements of each at a time.
    """

    rows: int
    depth: int
    warps: int


@dataclass(frozen=True)
class ExpertTiles:
    """Tiles of the experts' kernels on one target.

    Attributes:
        many: The most tokens first; the last from 0.
        expand_few, reduce_few: For the products with `up` and `gate`, and with `down`.
    """

    many: tuple[ManyTokens, ...]
    expand_few: FewTokens
    reduce_few: FewTokens

    def sorted_tokens(self, tokens: int, most_rows: int | None = None) -> ManyTokens:
        """Return the tiles for so many tokens an expert.

        Args:
            most_rows: The largest number of rows of a tile; None for any number.
        """
        fit = [row for row in self.many if most_rows is None or row.expand.rows <= most_rows]
        return next(row for row in fit if tokens >= row.tokens)
