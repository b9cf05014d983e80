"""`graphopt eval`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import console as ui
from graphopt.cli.kv_policies import measure_policies, policy_specs, print_policies
from graphopt.cli.pictures import measure_answers
from graphopt.cli.shared import (
    MAX_COUNT,
    Backend,
    BosOption,
    Device,
    Json,
    LauncherOption,
    RanksOption,
    Remote,
    backend_named,
    errors_as_sentences,
    print_json,
)
from graphopt.errors import UsageError
from graphopt.support.quantities import counted

if TYPE_CHECKING:
    from graphopt.report.kv_policies import PolicyFigures


@errors_as_sentences
def eval_command(
    model: Annotated[str, typer.Argument(help="A model or an output folder.")],
    text: Annotated[Path | None, typer.Option(help="Text file for perplexity.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Windows at most; all by default.")
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            min=2, max=MAX_COUNT, help="Tokens of a window; 2048, or what the model takes."
        ),
    ] = None,
    bos: BosOption = "every",
    piqa: Annotated[Path | None, typer.Option(help="PIQA rows as JSON lines.")] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Pictures with prompts and answers, as JSON lines; see docs/vision.md."),
    ] = None,
    kv_policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A KV policy to measure on the text, such as 'quest{budget=1/8,page=16}'; "
            "several are measured one after the other."
        ),
    ] = None,
    needles: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_COUNT, help="Passkeys hidden in the text to ask for with each policy."
        ),
    ] = None,
    backend: Backend = "auto",
    device: Device = "auto",
    ranks: RanksOption = None,
    launcher: LauncherOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Output folder whose report gets the figures as well.")
    ] = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity and PIQA accuracy of a model, a torch or an ONNX artifact.

    With --pictures also perplexity of answers given pictures, of a model that sees.

    With --kv-policy also what a policy of the KV cache costs in steps behind a prompt. Ranks that
    torchrun or --ranks starts share windows and questions, and the figures are those of one.
    """
    if text is None and piqa is None and pictures is None:
        raise UsageError(
            "Nothing to evaluate on.", "Give --text FILE, --piqa FILE, --pictures FILE, or several."
        )
    specs = policy_specs(kv_policy or [], text, needles)
    with ui.progress_bars() as progress:
        progress("opening", 0, 1)
        from graphopt.backends.opening import open_language_model
        from graphopt.evaluate.perplexity import perplexity, read_text, text_windows
        from graphopt.evaluate.piqa import piqa_accuracy, read_piqa
        from graphopt.execute.language_model import load_tokenizer
        from graphopt.report.evaluations import Evaluation, add_evaluation
        from graphopt.report.record import finite_or_none
        from graphopt.report.saved_report import read_report
        from graphopt.sources.windows import check_bos
        from graphopt.support.ranks import here

        if report is not None:
            read_report(report)  # which is wrong before anything is measured
        beginning = check_bos(bos)
        content = read_text(text) if text is not None else None
        rows = read_piqa(piqa) if piqa is not None else None
        opened = open_language_model(
            model,
            backend_named(backend),
            device=device,
            trust_remote_code=trust_remote_code,
            by_layer=True,
        )
        tokenizer = load_tokenizer(opened)
        progress("opening", 1, 1)

        unsaid = [] if as_json else [opened.placement]

        def measuring(what: str, done: int, total: int) -> None:
            while unsaid:  # once, when text and options have turned out to be right
                ui.say_note(unsaid.pop())
            progress(what, done, total)

        found: dict[str, Any] = {
            "model": model,
            "backend": opened.backend,
            "device": str(opened.device),
            "perplexity": None,
            "tokens": 0,
            "windows": 0,
            "seqlen": None,
            "bos": None,
            "begin": None,
            "seconds": 0.0,
            "piqa_accuracy": None,
            "piqa_rows": 0,
            "picture_perplexity": None,
            "picture_answers": 0,
            "picture_tokens": 0,
            "kv_policies": [],
            "attached_kv_policies": list(opened.kv_policies),
        }
        policies: list[PolicyFigures] = []
        text_figures: dict[str, Any] = {}
        if content is not None:
            length = seqlen or min(2048, opened.positions or 2048)
            if specs:
                windowed_ids, begin = text_windows(
                    opened, tokenizer, content, windows=windows, seqlen=length, bos=beginning
                )
                policies = measure_policies(
                    opened, specs, windowed_ids, len(begin), tokenizer, content, needles, measuring
                )
                found["kv_policies"] = [one.model_dump(mode="json") for one in policies]
            measured = perplexity(
                opened, tokenizer, content,
                windows=windows, seqlen=length, bos=beginning, progress=measuring,
            )  # fmt: skip
            found["perplexity"] = measured.perplexity
            found["tokens"], found["windows"] = measured.tokens, measured.windows
            found["seqlen"] = measured.seqlen
            found["bos"], found["begin"] = beginning, list(measured.begin)
            found["seconds"] += measured.seconds
            text_figures = {
                "text": str(text),
                "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
                "perplexity": finite_or_none(measured.perplexity),
                "tokens": measured.tokens,
                "tokens_per_second": measured.tokens / max(measured.seconds, 1e-9),
                "kv_policies": policies,
            }
        if pictures is not None:
            seen = measure_answers(
                model, pictures, backend_named(backend), device, measuring,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            found["picture_perplexity"] = seen.perplexity
            found["picture_answers"], found["picture_tokens"] = seen.answers, seen.tokens
            found["seconds"] += seen.seconds
        if rows is not None:
            answered = piqa_accuracy(opened, tokenizer, rows, progress=measuring)
            found["piqa_accuracy"], found["piqa_rows"] = answered.accuracy, answered.rows
            found["seconds"] += answered.seconds
    if report is not None and here().first:
        add_evaluation(
            report,
            Evaluation(
                model=model,
                form=opened.backend,
                device=str(opened.device),
                piqa_accuracy=found["piqa_accuracy"],
                piqa_rows=found["piqa_rows"],
                picture_perplexity=finite_or_none(found["picture_perplexity"]),
                picture_answers=found["picture_answers"],
                **text_figures,
            ),
        )
    if as_json:
        print_json(found)
        return
    lines = [("model", f"{model}  ({found['backend']})")]
    if content is not None:
        windowed = f"{counted(found['windows'], 'window')} of {counted(found['seqlen'], 'token')}"
        if found["begin"]:
            named = " ".join(tokenizer.convert_ids_to_tokens(found["begin"]))
            windowed += f", each begun with {named}"
        elif beginning == "first":
            windowed += ", cut from one tokenisation"
        lines.append(("ppl", f"{found['perplexity']:.4f}  ({windowed})"))
    if rows is not None:
        lines.append(("piqa", f"{found['piqa_accuracy']:.2%}  ({found['piqa_rows']} questions)"))
    if pictures is not None:
        told = ", ".join(
            (
                counted(found["picture_answers"], "answer"),
                counted(found["picture_tokens"], "token"),
            )
        )
        lines.append(("answers", f"{found['picture_perplexity']:.4f}  ({told}, given pictures)"))
    lines.append(("time", f"{found['seconds']:.1f} s"))
    if opened.kv_policies:
        lines.append(
            (
                "note",
                f"Its steps select keys by {', '.join(opened.kv_policies)}. Texts here are read at "
                "once, with all keys; --kv-policy measures steps.",
            )
        )
    ui.print_rows(ui.stdout(), lines)
    if policies:
        print_policies(ui.stdout(), policies)
