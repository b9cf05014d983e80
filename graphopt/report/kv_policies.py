"""What KV policies did to a model, as `graphopt eval` measured it: figures, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pydantic

from graphopt.report.pictures import axis, curves, heat_map, legend, table
from graphopt.report.record import Figure
from graphopt.support.inputs import OpenSchema


class LayerReadFigures(OpenSchema):
    """What the steps of one attention read.

    Attributes:
        name: Where the attention is.
        recall, oracle_recall: Of each KV head, the attention mass that is read over all; and that
            of the best pages, as many.
        pages_read: Pages that a step reads for a KV head.
        grid: Share of KV heads and steps that read a page: rows are steps, columns pages, both in
            groups.
    """

    name: str
    recall: list[float] = pydantic.Field(min_length=1)
    oracle_recall: list[float] = pydantic.Field(min_length=1)
    pages_read: float
    grid: list[list[float]] = pydantic.Field(max_length=256)


class NeedleFigures(OpenSchema):
    """How many passkeys were told rightly.

    Attributes:
        right, tasks: How many, and of how many.
        tokens: Tokens of a task.
        by_depth: Depth in the text, how many were right there, and of how many.
    """

    right: int
    tasks: int
    tokens: int
    by_depth: list[tuple[float, int, int]]


class PolicyFigures(OpenSchema):
    """What one policy did, or the model as it is.

    Attributes:
        policy: As it was written; "dense" for the model as it is.
        kind: The policy's name; None for the model as it is.
        page: Tokens of a page.
        budget_tokens: Tokens that a step reads for a KV head at most, sink and local included.
        tokens, prompt, texts: Tokens of a text, how many of them are read at once, how many texts.
        perplexity: Of the tokens that steps predict.
        by_position: Of equal parts of the text.
        recall, oracle_recall: Means over layers and KV heads.
        pages_read: Pages that a step reads for a KV head of a layer.
        layers: The attentions that follow the policy.
        left_alone: Those that do not, with the reason.
        needles: Where they were measured.
    """

    policy: str
    kind: str | None = None
    page: int | None = None
    budget_tokens: int | None = None
    tokens: int
    prompt: int
    texts: int
    perplexity: Figure
    by_position: list[Figure]
    recall: float | None = None
    oracle_recall: float | None = None
    pages_read: float | None = None
    layers: list[LayerReadFigures] = pydantic.Field(default_factory=list)
    left_alone: list[tuple[str, str]] = pydantic.Field(default_factory=list)
    needles: NeedleFigures | None = None


def policies_section(policies: Sequence[PolicyFigures], text: str) -> str:
    """Return the card of the policies of one evaluation, the model as it is first among them.

    Args:
        text: What they were measured on.
    """
    first = policies[0]
    note = (
        f"On {text}: {first.texts} of {first.tokens:,} tokens, the first {first.prompt:,} read at "
        "once, each behind them in a step. A budget is tokens per KV head, sink and local "
        "included. Recall is the attention mass in the pages that a step reads over that in all, "
        "without the steps that read all; the best pages, as many, would have the recall beside it."
    )
    return (
        f'<section class="card"><h2>KV policies</h2><p class="dim">{escape(note)}</p>'
        f"{_figures(policies)}{_recall_by_budget(policies)}{_reads(policies)}</section>"
    )


def _figures(policies: Sequence[PolicyFigures]) -> str:
    headings = ("policy", "budget", "perplexity", "recall", "best pages", "tokens read", "needles")
    rows = [[escape(cell) for cell in _cells(one, policies[0])] for one in policies]
    return table(headings, rows, numbers=headings[1:])


def _cells(one: PolicyFigures, dense: PolicyFigures) -> list[str]:
    perplexity, needles = "–", "–"
    if one.perplexity is not None:
        perplexity = f"{one.perplexity:.3f}"
        if one.kind is not None and dense.perplexity:
            perplexity += f" ({one.perplexity / dense.perplexity - 1:+.1%})"
    if one.needles is not None:
        needles = f"{one.needles.right} of {one.needles.tasks}"
    read = one.pages_read * one.page if one.pages_read is not None and one.page else None
    return [
        one.policy,
        "–" if one.budget_tokens is None else f"{one.budget_tokens:,}",
        perplexity,
        "–" if one.recall is None else f"{one.recall:.3f}",
        "–" if one.oracle_recall is None else f"{one.oracle_recall:.3f}",
        "–" if read is None else f"{read:,.0f}",
        needles,
    ]


def _recall_by_budget(policies: Sequence[PolicyFigures]) -> str:
    """Return a picture for each kind with several budgets: recall by budget, and the best."""
    known: dict[str, list[tuple[int, float, float]]] = {}
    for one in policies:
        budget, recall, best = one.budget_tokens, one.recall, one.oracle_recall
        if one.kind is not None and budget is not None and recall is not None and best is not None:
            known.setdefault(one.kind, []).append((budget, recall, best))
    budgets = sorted({budget for figures in known.values() for budget, _, _ in figures})
    shown: list[str] = []
    for kind, figures in known.items():
        if len({budget for budget, _, _ in figures}) < 2:
            continue
        places = [(float(budgets.index(budget)), *both) for budget, *both in sorted(figures)]
        lines = [
            ("norm", [(x, best) for x, _, best in places]),
            ("time", [(x, recall) for x, recall, _ in places]),
        ]
        told = ", ".join(f"{recall:.3f} at {budget:,}" for budget, recall, _ in sorted(figures))
        drawn = curves(lines, len(budgets) - 1, f"Recall of {kind} by budget: {told}", told)
        ends = axis(f"{budgets[0]:,} tokens", f"{budgets[-1]:,}")
        shown.append(f"<div><p>{escape(kind)}</p>{drawn}{ends}</div>")
    if not shown:
        return ""
    colours = legend([("bg-time", "the policy"), ("bg-check", "the best pages, as many")])
    return (
        '<h3>Recall by budget</h3><p class="dim">From none at the bottom to all attention mass at '
        f'the top; budgets side by side.</p><div class="pictures">{"".join(shown)}</div>{colours}'
    )


def _reads(policies: Sequence[PolicyFigures]) -> str:
    """Return pictures of the pages that each layer reads over time, folded away for each policy."""
    parts: list[str] = []
    for one in policies:
        pictures = "".join(_layer_picture(one, layer) for layer in one.layers)
        if pictures:
            parts.append(
                f"<details><summary>{escape(one.policy)}</summary>"
                f'<div class="pictures">{pictures}</div></details>'
            )
    if not parts:
        return ""
    note = (
        "For each layer: steps from top to bottom, pages of keys from left to right; the darker, "
        "the more KV heads read a page. What is not there yet is empty."
    )
    return f'<h3>Pages read over time</h3><p class="dim">{note}</p>{"".join(parts)}'


def _layer_picture(one: PolicyFigures, layer: LayerReadFigures) -> str:
    recall = sum(layer.recall) / len(layer.recall)
    label = (
        f"Pages that {layer.name} reads with {one.policy}, over time: {layer.pages_read:.1f} a "
        f"step, recall {recall:.3f}"
    )
    name = f"{escape(layer.name)}: recall {recall:.3f}"
    return f"<div><p>{name}</p>{heat_map(layer.grid, label)}</div>"
