"""What a pass tells about itself: a type of its own, which shows itself in the report.

The report knows what the pipeline measures of every pass. What one pass alone has to tell is its
`Record`: fields, which stand in `report.json` as the `details` of the pass, a line for the
terminal and a card for the page. Later passes, and resumed runs, get the record itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import pydantic


def finite_or_none(value: float | None) -> float | None:
    """Return a value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


Figure = Annotated[float | None, pydantic.AfterValidator(finite_or_none)]
"""A measured figure; None where it was not measured, or is no finite number."""


Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
"""A duration."""


class Record(pydantic.BaseModel):
    """Base of what passes tell: a pass names its own in `Pass.record`.

    Fields hold JSON data. They are validated when a record is made and when it is read again, so
    that a snapshot of another version is refused and not misread.
    """

    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())

    def line(self) -> str:
        """Return what stands under the table of passes on a terminal; empty for nothing."""
        return ""

    def card(self) -> str:
        """Return the body of the pass's card on the page, as HTML; empty for no card.

        Texts in it are escaped, and it refers to nothing outside: `graphopt.report.pictures` has
        its parts.
        """
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        return self.model_dump(mode="json")


class Step(pydantic.BaseModel):
    """The perplexity on held-out text at one point of a pass.

    Attributes:
        after: What the pass had done by then.
        value: The perplexity.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    after: str
    value: Figure


def told_in_a_line(removed: Sequence[str], steps: Sequence[Step]) -> str:
    """Return one line on what a pass removed, and on the perplexity after each of its steps."""
    parts = [f"removed {', '.join(removed)}"] if removed else []
    if steps:
        values = ["-" if step.value is None else f"{step.value:.4g}" for step in steps]
        # Where each step is one of the removals, those have been named.
        if not removed or len(steps) != len(removed) + 1:
            values = [f"{v} ({step.after})" for v, step in zip(values, steps, strict=True)]
            if len(values) > 4:
                values = [values[0], "…", values[-1]]
        parts.append("perplexity " + " → ".join(values))
    return "; ".join(parts)
