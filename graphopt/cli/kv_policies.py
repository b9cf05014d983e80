"""KV policies on the command line: measured by `graphopt eval`, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from graphopt.cli.console import say_note
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from graphopt.evaluate.kv_policy import PolicyResult
    from graphopt.evaluate.needles import NeedleResult
    from graphopt.evaluate.policy_spec import PolicySpec
    from graphopt.execute.language_model import LanguageModel
    from graphopt.report.kv_policies import PolicyFigures
    from graphopt.support.progress import Progress


def policy_specs(texts: Sequence[str], text: Path | None, needles: int | None) -> list[PolicySpec]:
    """Return the policies that options name.

    Args:
        texts: Of each option `--kv-policy`.
        text: What they are to be measured on.
        needles: That of the option `--needles`.

    Raises:
        UsageError: One is none, or an option is missing.
    """
    if texts and text is None:
        raise UsageError("KV policies are measured on a text.", "Give --text FILE.")
    if needles is not None and not texts:
        raise UsageError(
            "--needles is how many passkeys a KV policy is asked for, and there is none.",
            "Give --kv-policy, such as --kv-policy 'quest{budget=1/8}'.",
        )
    if not texts:
        return []
    from graphopt.evaluate.policy_spec import PolicySpec
    from graphopt.pass_manager.recipe import parse_named_options

    named = (each for one in texts for each in parse_named_options(one, "KV policy", "policy"))
    return [PolicySpec.of(kind, options) for kind, options in named]


def measure_policies(
    model: LanguageModel,
    specs: Sequence[PolicySpec],
    rows: Tensor,
    begin: int,
    tokenizer: PreTrainedTokenizerBase,
    content: str,
    needles: int | None,
    progress: Progress,
) -> list[PolicyFigures]:
    """Measure a model as it is and with each of some policies.

    Args:
        rows: Windows of the text.
        begin: How many tokens each begins with that count in no perplexity.
        content: The text.
        needles: How many passkeys are hidden in it for each; None for none.

    Raises:
        UsageError: It is no program, or a policy does not fit the length of the windows.
        SourceError: No attention of the model can follow a policy.
    """
    from graphopt.evaluate.kv_policy import measure_policy
    from graphopt.evaluate.needles import needle_tasks, retrieval
    from graphopt.execute.interpreter import Runner
    from graphopt.execute.language_model import ProgramModel
    from graphopt.ir.attach_policy import without_policies

    if not isinstance(model, ProgramModel):
        raise UsageError(
            f"KV policies are measured on programs, and {model.name} runs as {model.backend}.",
            "Give --backend program, or the source of the model.",
        )
    tokens = rows.shape[1]
    runner: Runner = model.runner
    device = model.device
    if any(state.policy is not None for state in runner.program.states.values()):
        # What is measured takes the place of what is attached.
        runner = Runner(without_policies(runner.program), device=device)
    program = runner.program
    policies = [(spec, spec.policy_for(program, tokens, device)) for spec in specs]
    for asked, fitted in policies:
        if fitted.budget.selectable == 0 and fitted.kind not in ("dense", "sink-local"):
            say_note(
                f"{asked.text} selects nothing: its {fitted.budget.tokens} tokens are sink and "
                "local alone. Raise the budget, or lower sink and local."
            )
    tasks = None if needles is None else needle_tasks(tokenizer, content, tokens, needles)
    figures: list[PolicyFigures] = []
    for spec, policy in [(None, None), *policies]:
        alone: dict[str, Any] = {}
        if spec is not None:
            alone = {"dense_layers": spec.dense_layers, "dense": spec.dense}
        result = measure_policy(runner, rows, policy, **alone, begin=begin, progress=progress)
        told = None
        if tasks is not None:
            told = retrieval(runner, tasks, policy, **alone, progress=progress)
        figures.append(figures_of(spec, result, told))
    return figures


def figures_of(
    spec: PolicySpec | None, result: PolicyResult, needles: NeedleResult | None = None
) -> PolicyFigures:
    """Return what was measured as the report has it."""
    from graphopt.report.kv_policies import LayerReadFigures, NeedleFigures, PolicyFigures

    told = None
    if needles is not None:
        by_depth = [(depth, *counts) for depth, counts in needles.by_depth().items()]
        told = NeedleFigures(
            right=needles.count,
            tasks=len(needles.right),
            tokens=needles.tokens,
            by_depth=by_depth,
        )
    return PolicyFigures(
        policy="dense" if spec is None else spec.text,
        kind=None if spec is None else spec.kind,
        page=None if spec is None else spec.page,
        budget_tokens=None if spec is None else spec.budget_tokens(result.tokens),
        tokens=result.tokens,
        prompt=result.prompt,
        texts=result.texts,
        perplexity=result.perplexity,
        by_position=list(result.by_position),
        recall=result.recall,
        oracle_recall=result.oracle_recall,
        pages_read=result.pages_read,
        layers=[
            LayerReadFigures(
                name=layer.name,
                recall=layer.recall_G,
                oracle_recall=layer.oracle_recall_G,
                pages_read=layer.pages_read,
                grid=layer.grid,
            )
            for layer in result.layers
        ],
        left_alone=result.left_alone,
        needles=told,
    )


def print_policies(console: Console, figures: Sequence[PolicyFigures]) -> None:
    """Print a line for the model as it is and for each policy, and which layers stay dense."""
    dense = figures[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy", overflow="fold")
    needles = any(one.needles is not None for one in figures)
    headings = ["ppl", "×dense", "recall", "best pages", "tokens read"]
    for heading in [*headings, *(["needles"] if needles else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in figures:
        times = None
        if one.kind is not None and one.perplexity is not None and dense.perplexity:
            times = one.perplexity / dense.perplexity
        read = one.pages_read * one.page if one.pages_read is not None and one.page else None
        cells = [_cell(one.perplexity, 3), _cell(times, 3), _cell(one.recall, 3)]
        cells += [_cell(one.oracle_recall, 3), _cell(read, 0)]
        if one.needles is not None:
            cells.append(f"{one.needles.right} of {one.needles.tasks}")
        table.add_row(one.policy, *cells)
    texts = "1 text" if dense.texts == 1 else f"{dense.texts} texts"
    console.print(
        f"Behind prompts of {dense.prompt} tokens, {texts} of {dense.tokens}:",
        soft_wrap=True,
    )
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for one in figures:
        for name, reason in one.left_alone:
            reasons.setdefault(f"{one.policy} leaves layers dense: {reason}", []).append(name)
    for told, names in reasons.items():
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"{told} ({names[0]}{rest}).", style="dim", soft_wrap=True)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
