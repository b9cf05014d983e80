"""What a pass tells: its record in the report, for later passes, and in a resumed run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from programs import tiny_program

from graphopt.errors import PassError
from graphopt.pass_manager.contract import Context, Earlier, Pass, PassResult, make_pass
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.report.record import Record


class Counted(Record):
    """How many calls a pass saw."""

    calls: int

    def line(self) -> str:
        return f"saw {self.calls} calls"

    def card(self) -> str:
        return f"<p>{self.calls} calls</p>"


class Named(Record):
    """What another pass tells."""

    name: str


@dataclass
class Count(Pass):
    """Count calls, and say so."""

    name: ClassVar[str] = "test-count"
    record: ClassVar[type[Record]] = Counted

    twice: bool = False

    def run(self, program, context):
        calls = len(program.calls) * (1 + self.twice)
        return PassResult(program, record=Counted(calls=calls))


@dataclass
class Asks(Pass):
    """Keep what an earlier pass told and what it was told."""

    name: ClassVar[str] = "test-asks"
    heard: ClassVar[list[object]] = []

    def run(self, program, context):
        Asks.heard[:] = [context.record(Counted), context.options_of(Count), context.record(Named)]
        return PassResult(program)


@dataclass
class Mistaken(Count):
    """Tell something else than is declared."""

    name: ClassVar[str] = "test-mistaken"

    def run(self, program, context):
        return PassResult(program, record=Named(name="x"))


def test_a_later_pass_asks_for_the_latest_record_and_its_pass_by_type():
    program = tiny_program()
    last = Count(twice=True)
    _, report = Pipeline([Count(), last, Asks()]).run(program)
    calls = len(program.calls)
    assert [Counted(calls=2 * calls), last, None] == Asks.heard
    assert [entry.details for entry in report.passes] == [
        {"calls": calls}, {"calls": 2 * calls}, {},
    ]  # fmt: skip
    assert report.to_json()["passes"][0]["details"] == {"calls": calls}
    assert report.passes[0].record.line() == f"saw {calls} calls"


def test_records_of_a_subtype_count():
    class Precise(Counted):
        places: int = 0

    context = Context(earlier=[Earlier(make_pass("dead-code-elimination", {}), Precise(calls=1))])
    assert context.record(Counted) == Precise(calls=1) and context.record(Named) is None


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_record_of_another_type_is_the_pass_developers_mistake(verb):
    with pytest.raises(PassError, match="returned a Named as its record, and declares Counted"):
        getattr(Pipeline([Mistaken()]), verb)(tiny_program())
