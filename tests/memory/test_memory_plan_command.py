"""`graphopt memory --plan`: the file it writes, its exit codes, and what it says."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from graphopt.cli.commands import app

ROWS = "id,lower,upper,size\na,0,3,4\nb,2,5,4\nc,4,9,8\nempty,1,8,0\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "blocks.csv"
    path.write_text(ROWS)
    return path


def _run(*arguments: object):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)])


def test_the_rows_are_written_with_offsets(table, tmp_path):
    out = tmp_path / "placed.csv"
    done = _run("--plan", table, "--capacity", 12, "-o", out)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [[row[c] for c in ("id", "lower", "upper", "size")] for row in rows] == [
        line.split(",") for line in ROWS.splitlines()[1:]
    ]
    assert int(rows[1]["offset"]) in (0, 8) and int(rows[2]["offset"]) in (0, 4)


def test_a_capacity_below_the_bound_is_an_exit_code_and_no_file(table, tmp_path):
    out = tmp_path / "placed.csv"
    done = _run("--plan", table, "--capacity", 11, "-o", out)
    assert done.exit_code == 1 and not out.exists()
    assert "proved to be out of reach, the bound is 12" in done.output


def test_without_a_capacity_the_smallest_arena_is_found(table):
    done = _run("--plan", table, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (told["height"], told["bound"], told["outcome"]) == (12, 12, "reached")


def test_a_place_that_cannot_be_written_is_refused(table, tmp_path):
    for out in (tmp_path, tmp_path / "none" / "placed.csv"):
        done = _run("--plan", table, "-o", out)
        assert done.exit_code == 2 and "valley" not in done.output


def test_the_table_is_not_overwritten(table):
    done = _run("--plan", table, "-o", table)
    assert done.exit_code == 2 and table.read_text() == ROWS
    assert _run("--plan", table, "--seconds", 0).exit_code == 2
