"""Blocks of memory with their lifetimes, and the table of them in a CSV file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from graphopt.errors import SourceError
from graphopt.support.inputs import read_utf8, shown_path
from graphopt.support.plain import shown

Int64 = npt.NDArray[np.int64]

COLUMNS = ("id", "lower", "upper", "size")
OFFSET = "offset"
MAX_BYTES = 256 * 2**20
MAX_ROWS = 2_000_000
MAX_NUMBER = 2**62
"""Bound of times, and of the sum of all sizes: sums of two of them are 64-bit numbers."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True, eq=False)
class Problem:
    """Blocks that need places in one arena, so that no two that are alive at once overlap.

    Attributes:
        ids: Name of each block.
        lower: int64 [blocks]: when each begins to live.
        upper: int64 [blocks]: when it no longer lives: it is alive in [lower, upper).
        size: int64 [blocks], bytes, 0 or more.
        alignment: Of which number every offset is a multiple, bytes.
    """

    ids: Sequence[str]
    lower: Int64
    upper: Int64
    size: Int64
    alignment: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def padded(self) -> Int64:
        """The sizes, rounded up to the alignment: what blocks take in an arena."""
        return -(-self.size // self.alignment) * self.alignment

    @property
    def takes_room(self) -> npt.NDArray[np.bool_]:
        """Which blocks have a size and a lifetime; the others lie at 0 and are in nobody's way."""
        return (self.size > 0) & (self.lower < self.upper)

    def select(self, of: npt.NDArray[np.bool_]) -> Problem:
        """Return the problem of some blocks alone."""
        chosen = np.flatnonzero(of)
        ids = [self.ids[k] for k in chosen.tolist()]
        return Problem(
            ids, self.lower[chosen], self.upper[chosen], self.size[chosen], self.alignment
        )

    def check(self) -> None:
        """Refuse what is no problem.

        Raises:
            SourceError: A lifetime ends before it begins, a size is negative, or the sum of all
                sizes is beyond 2^62.
        """
        for k in np.flatnonzero((self.lower > self.upper) | (self.size < 0))[:1]:
            raise SourceError(
                f"Block {shown(self.ids[k])} lives from {self.lower[k]} to {self.upper[k]} and "
                f"has size {self.size[k]}.",
                "Give times in order, and sizes of 0 or more.",
            )
        if float(self.padded.sum(dtype=np.float64)) > MAX_NUMBER:
            raise SourceError("The sizes add up to more than 2^62.", "Give smaller ones.")


def read_problem(path: Path) -> Problem:
    """Return the problem of a CSV file with the columns id, lower, upper and size, in any order.

    A column `offset`, as in a file that was placed before, is left out.

    Raises:
        SourceError: The file cannot be read or is too large, a column is missing or unknown, or a
            row is wrong; the message has the number of the row's line.
    """
    name = shown_path(path)
    text = read_utf8(path, MAX_BYTES).removeprefix("\ufeff")
    rows = _rows(text, name)
    _, header = next(rows, (1, []))
    places = _places([title.strip().lower() for title in header], name)
    ids: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    seen: dict[str, int] = {}
    total = 0
    for line, row in rows:
        where = f"{name}, line {line}"
        if len(row) != len(header):
            raise SourceError(
                f"{where} has {len(row)} fields, and the header {len(header)}.", "Correct the row."
            )
        block = row[places["id"]].strip()
        if block in seen:
            raise SourceError(
                f"{where}: the id {shown(block)} stands in line {seen[block]} already.",
                "Give every block an id of its own.",
            )
        if len(seen) == MAX_ROWS:
            raise SourceError(f"{name} has more than {MAX_ROWS} rows.", "Give fewer blocks.")
        seen[block] = line
        lower, upper, size = (_number(row[places[c]], c, where) for c in COLUMNS[1:])
        if lower > upper:
            raise SourceError(
                f"{where}: lower is {lower}, and upper {upper}: the block would end before it "
                "begins.",
                "Exchange them, or correct the row.",
            )
        if size < 0:
            raise SourceError(f"{where}: the size is {size}.", "Give 0 or more bytes.")
        total += size
        if total > MAX_NUMBER:
            raise SourceError(
                f"{where}: up to here the sizes add up to more than 2^62.", "Give smaller ones."
            )
        ids.append(block)
        numbers.append((lower, upper, size))
    if not ids:
        raise SourceError(f"{name} has no row below its header.", "Give at least one block.")
    lower_, upper_, size_ = np.array(numbers, np.int64).T.copy()
    return Problem(ids, lower_, upper_, size_)


def write_offsets(problem: Problem, offsets: Int64) -> str:
    """Return the rows of a problem as CSV, with the offset of every block behind it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, OFFSET])
    columns = (problem.lower, problem.upper, problem.size, offsets)
    writer.writerows(zip(problem.ids, *(column.tolist() for column in columns), strict=True))
    return out.getvalue()


def _rows(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, with the numbers of their lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield reader.line_num, row
    except csv.Error as problem:
        raise SourceError(
            f"{name}, line {reader.line_num} is no row of a CSV file: {problem}.", "Correct it."
        ) from problem


def _places(titles: list[str], name: str) -> dict[str, int]:
    known = (*COLUMNS, OFFSET)
    for title in titles:
        if title not in known or titles.count(title) > 1:
            what = "occurs twice" if title in known else "is unknown"
            raise SourceError(
                f"{name}: the column {shown(title)} {what}.",
                f"The first line names the columns: {', '.join(COLUMNS)}.",
            )
    for column in COLUMNS:
        if column not in titles:
            raise SourceError(
                f"{name} has no column {column}.",
                f"The first line names the columns: {', '.join(COLUMNS)}.",
            )
    return {column: titles.index(column) for column in COLUMNS}


def _number(text: str, column: str, where: str) -> int:
    text = text.strip()
    if not _WHOLE.fullmatch(text) or abs(int(text)) > MAX_NUMBER:
        raise SourceError(
            f"{where}: {column} is {shown(text)}.", "Give a whole number of at most 2^62."
        )
    return int(text)
