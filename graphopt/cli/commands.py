"""The command line. Torch and transformers are imported by the commands that need them."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import functools
import gc
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast, get_type_hints

import click
import typer

from graphopt.cli import console as ui
from graphopt.errors import GraphoptError, UsageError, reason
from graphopt.support.boundary import BUG_CODE, REPORT_BUG, out_of_memory

if TYPE_CHECKING:
    from graphopt.compiler import CompileOptions
    from graphopt.ir.graph import Program
    from graphopt.pass_manager.pipeline import Pipeline

app = typer.Typer(
    name="graphopt",
    help="Capture a language model once, transform it with passes that check themselves, and "
    "emit a model that runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

INTERRUPTED = 130

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
"""Bounds of numbers on the command line: what generators, and sizes of tensors, take."""


Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


def _errors_as_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every error into one sentence on stderr and an exit code; adds the option --debug.

    A parameter whose type is a dataclass stands for its fields, an option of the command each.
    """

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        debug = kwargs.pop("debug", False)
        logged = logging.root.manager.disable
        if not debug:
            # torch and transformers log tracebacks of what they then raise.
            logging.disable(logging.ERROR)
        try:
            _refuse_bytes(kwargs)
            command(**_gathered(command, kwargs))
        except (typer.Exit, typer.Abort, click.ClickException):
            raise
        except KeyboardInterrupt:
            ui.say_error("Interrupted; nothing was left half-written.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                ui.say_traceback()
            message, remedy, code = describe_error(error, command.__name__)
            ui.say_error(message, remedy)
            raise typer.Exit(code) from None
        finally:
            logging.disable(logged)

    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*_expanded(command), option.replace(annotation=Debug))
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def _expanded(command: Callable[..., None]) -> Iterator[inspect.Parameter]:
    """Yield a command's parameters, with the fields of a dataclass in the place of one."""
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            yield parameter
            continue
        hints = get_type_hints(parameter.annotation, include_extras=True)
        for field in dataclasses.fields(parameter.annotation):
            default = field.default
            if default is dataclasses.MISSING:
                default = inspect.Parameter.empty
            yield parameter.replace(name=field.name, annotation=hints[field.name], default=default)


def _gathered(command: Callable[..., None], given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command, with an object for the fields of a dataclass."""
    arguments = dict(given)
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            names = [field.name for field in dataclasses.fields(parameter.annotation)]
            made = cast(Callable[..., Any], parameter.annotation)
            arguments[parameter.name] = made(**{name: arguments.pop(name) for name in names})
    return arguments


def _refuse_bytes(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments whose bytes are no text: they could be neither printed nor written."""
    for name, value in arguments.items():
        if isinstance(value, str | Path) and not str(value).isascii():
            try:
                str(value).encode()
            except UnicodeEncodeError:
                own = name.replace("_", "-")
                raise UsageError(
                    f"The argument {own} is not UTF-8 text: {str(value)!a:.100}.",
                    "Give it in UTF-8, or rename the file.",
                ) from None


_LESS_MEMORY = {
    "compile_command": "Give passes that calibrate smaller windows= or seqlen=, a shorter --calib "
    "text, or --no-verify.",
    "eval_command": "Give a smaller --seqlen, or a shorter text.",
    "generate_command": "Give a shorter --prompt or smaller --max-new-tokens.",
}
"""By command, which options lower what memory it needs."""


def describe_error(error: Exception, command: str) -> tuple[str, str, int]:
    """Return the sentence, the remedy and the exit code of an error that ends a command."""
    short_of = out_of_memory(error)
    if short_of is not None and not (isinstance(error, GraphoptError) and "memory" in str(error)):
        least = _LESS_MEMORY.get(command, "Give a smaller model.")
        return f"The memory of {short_of} does not suffice.", least, 1
    if isinstance(error, GraphoptError):
        return error.message, error.remedy, error.exit_code
    if isinstance(error, OSError):
        where = f" at {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"The disk is full{where}.", "Free some space and run again with --resume.", 1
        return f"A file operation failed{where}: {error.strerror or error}.", "", 1
    said = f"{type(error).__name__}: {reason(error)}"
    return f"This is a bug in graphopt: {said}.", REPORT_BUG, BUG_CODE


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code of the checkpoint run.")
]
ModelArg = Annotated[
    str | None,
    typer.Argument(
        help="Hugging Face id or folder, .gguf file, 'demo', or an output folder of graphopt."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="A config.json instead of a model: structure without weights."),
]

BosOption = Annotated[
    str,
    typer.Option(
        help="Which windows of text begin with the token that the tokenizer puts before a text: "
        "every, or, as in papers, the first."
    ),
]


def _spec(model: str | None, config: Path | None) -> str:
    if (model is None) == (config is None):
        raise UsageError("Name one model.", "Give MODEL, or --config FILE for a bare config.")
    return f"config:{config}" if config is not None else str(model)


def _capture(spec: str, trust_remote_code: bool) -> Program:
    from graphopt.capture import capture

    return capture(spec, trust_remote_code=trust_remote_code)


def _pipeline(passes: str | None, recipe: Path | None) -> Pipeline:
    from graphopt.pass_manager.pipeline import Pipeline

    if passes is not None and recipe is not None:
        raise UsageError("Both --passes and --recipe are given.", "Give one of them.")
    if recipe is not None:
        return Pipeline.from_yaml(recipe)
    return Pipeline.parse(passes).within_default() if passes is not None else Pipeline.default()


@dataclass(frozen=True)
class CompileFlags:
    """The options of `graphopt compile`."""

    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")] = Path("out")
    target: Annotated[str, typer.Option(help="What to emit for; see 'graphopt targets'.")] = "cpu"
    emit: Annotated[
        str | None,
        typer.Option(help="Comma-separated: onnx (the CPU's default), torch (others'), hf."),
    ] = None
    passes: Annotated[
        str | None,
        typer.Option(
            help="Recipe, such as 'prune-blocks{ratio=0.25},fuse-blocks'. Unless it names one of "
            "the default passes, it runs between them; '' for none."
        ),
    ] = None
    recipe: Annotated[Path | None, typer.Option(help="Recipe as a YAML file.")] = None
    calib: Annotated[
        Path | None, typer.Option(help="Text file for calibration and verification.")
    ] = None
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Don't compare results before and after passes.")
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")] = False
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse what would run without a kernel of the target."),
    ] = False
    onnx_moe: Annotated[
        bool,
        typer.Option(
            "--onnx-moe",
            help="In the ONNX form, experts become com.microsoft::MoE: faster for single tokens "
            "where there are many.",
        ),
    ] = False
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_COUNT, help="Tokens of a text; what the config states by default."
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; read no weight.")
    ] = False
    stop_after: Annotated[
        str | None, typer.Option(help="Leave out the passes behind this one.")
    ] = None
    dump_ir: Annotated[
        Path | None, typer.Option(help="Folder for the program after every pass, as text.")
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted compile to this folder.")
    ] = False
    device: Annotated[str, typer.Option(help="Where passes and verification compute.")] = "cpu"
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything random.")] = 0
    bos: BosOption = "every"
    config: ConfigOption = None
    trust_remote_code: Remote = False


@app.command("compile")
@_errors_as_sentences
def compile_command(model: ModelArg = None, *, flags: CompileFlags, as_json: Json = False) -> None:
    """Compile a model to a folder that runs, with a report."""
    spec = _spec(model, flags.config)
    with ui.progress_bars() as progress:
        progress("starting", 0, 1)
        from graphopt.compiler import compile_model
        from graphopt.storage.output_folder import check_output

        if not flags.dry_run:
            check_output(flags.out, flags.force)
        options = _compile_options(flags)
        progress("starting", 1, 1)
        console = ui.stderr() if as_json else ui.stdout()

        def on_capture(program: Program) -> None:
            progress("capture", 1, 1)
            rows = ui.describe(program)
            rows += [("target", flags.target), ("recipe", str(options.recipe) or "(no passes)")]
            if not as_json:
                ui.print_rows(console, rows)

        progress("capture", 0, 1)
        report = compile_model(spec, flags.out, options, progress=progress, on_capture=on_capture)
    if as_json:
        _print_json(report.to_json())
        return
    console.print()
    ui.print_passes(console, report.passes)
    console.print()
    if flags.dry_run:
        console.print("Dry run: no weight was read and nothing was written.")
    else:
        ui.print_report(console, report)


def _compile_options(flags: CompileFlags) -> CompileOptions:
    from graphopt.compiler import CompileOptions
    from graphopt.sources.windows import check_bos

    emit = flags.emit
    return CompileOptions(
        target=flags.target,
        emit=None if emit is None else [n.strip() for n in emit.split(",") if n.strip()],
        recipe=_pipeline(flags.passes, flags.recipe),
        calib=flags.calib,
        verify=not flags.no_verify,
        force=flags.force,
        strict=flags.strict,
        onnx_moe=flags.onnx_moe,
        max_length=flags.max_length,
        dry_run=flags.dry_run,
        stop_after=flags.stop_after,
        dump_ir=flags.dump_ir,
        resume=flags.resume,
        device=flags.device,
        seed=flags.seed,
        bos=check_bos(flags.bos),
        trust_remote_code=flags.trust_remote_code,
    )


@app.command("inspect")
@_errors_as_sentences
def inspect_command(
    model: ModelArg = None,
    config: ConfigOption = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="B, sequences.")] = 1,
    seq: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="S, tokens of one step.")] = 128,
    past: Annotated[int, typer.Option(min=0, max=MAX_COUNT, help="P, tokens in the KV cache.")] = 0,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Print a model's program, parameters, and FLOPs and bytes; no weight is read."""
    from graphopt.inspection import inspect_program

    with ui.progress_bars() as progress:
        progress("capture", 0, 1)
        program = _capture(_spec(model, config), trust_remote_code)
        found = inspect_program(program, batch, seq, past)
        progress("capture", 1, 1)
    if as_json:
        _print_json(found)
    else:
        ui.print_inspection(ui.stdout(), program, found)


Backend = Annotated[
    str, typer.Option(help="auto, program, torch or onnx: which form of an artifact to run.")
]


def _backend(name: str) -> Any:
    from graphopt.errors import unknown_name

    known = ("auto", "program", "torch", "onnx")
    if name not in known:
        raise unknown_name("backend", name, known)
    return name


@app.command("eval")
@_errors_as_sentences
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
    backend: Backend = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity and PIQA accuracy of a model, a torch or an ONNX artifact."""
    if text is None and piqa is None:
        raise UsageError("Nothing to evaluate on.", "Give --text FILE, --piqa FILE, or both.")
    with ui.progress_bars() as progress:
        progress("opening", 0, 1)
        from graphopt.backends.opening import open_language_model
        from graphopt.evaluate.perplexity import perplexity, read_text
        from graphopt.evaluate.piqa import piqa_accuracy, read_piqa
        from graphopt.execute.language_model import load_tokenizer
        from graphopt.sources.windows import check_bos

        beginning = check_bos(bos)
        content = read_text(text) if text is not None else None
        rows = read_piqa(piqa) if piqa is not None else None
        opened = open_language_model(model, _backend(backend), trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(opened)
        progress("opening", 1, 1)
        found: dict[str, Any] = {
            "model": model,
            "backend": opened.backend,
            "perplexity": None,
            "tokens": 0,
            "windows": 0,
            "seqlen": None,
            "bos": None,
            "begin": None,
            "seconds": 0.0,
            "piqa_accuracy": None,
            "piqa_rows": 0,
        }
        if content is not None:
            length = seqlen or min(2048, opened.positions or 2048)
            measured = perplexity(
                opened, tokenizer, content,
                windows=windows, seqlen=length, bos=beginning, progress=progress,
            )  # fmt: skip
            found["perplexity"] = measured.perplexity
            found["tokens"], found["windows"] = measured.tokens, measured.windows
            found["seqlen"] = measured.seqlen
            found["bos"], found["begin"] = beginning, list(measured.begin)
            found["seconds"] += measured.seconds
        if rows is not None:
            answered = piqa_accuracy(opened, tokenizer, rows, progress=progress)
            found["piqa_accuracy"], found["piqa_rows"] = answered.accuracy, answered.rows
            found["seconds"] += answered.seconds
    if as_json:
        _print_json(found)
        return
    lines = [("model", f"{model}  ({found['backend']})")]
    if content is not None:
        windowed = f"{found['windows']} windows of {found['seqlen']} tokens"
        if found["begin"]:
            named = " ".join(tokenizer.convert_ids_to_tokens(found["begin"]))
            windowed += f", each begun with {named}"
        elif beginning == "first":
            windowed += ", cut from one tokenisation"
        lines.append(("ppl", f"{found['perplexity']:.4f}  ({windowed})"))
    if rows is not None:
        lines.append(("piqa", f"{found['piqa_accuracy']:.2%}  ({found['piqa_rows']} questions)"))
    lines.append(("time", f"{found['seconds']:.1f} s"))
    ui.print_rows(ui.stdout(), lines)


@app.command("generate")
@_errors_as_sentences
def generate_command(
    model: Annotated[str, typer.Argument(help="A model or an output folder.")],
    prompt: Annotated[str, typer.Option(help="What to answer or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(max=MAX_COUNT, help="Tokens at most.")] = 256,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token each time.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="Draw tokens, with logits divided by it; 0 for greedy decoding."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(max=MAX_COUNT, help="Draw from so many of the likeliest; 0 for all."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest, up to this sum.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")
    ] = False,
    backend: Backend = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, printing tokens as they come.

    What is not given here is as the model's generation_config.json says.
    """
    import dataclasses
    import time

    options: dict[str, Any] = {
        "greedy": greedy, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    with ui.progress_bars() as progress:
        progress("opening", 0, 1)
        from graphopt.backends.opening import open_language_model
        from graphopt.execute.language_model import load_tokenizer
        from graphopt.generate import Sampling, check_options, generate
        from graphopt.sources.generation import GenerationSettings, not_applied

        check_options(max_new_tokens, Sampling.of(GenerationSettings(), **options))
        if not prompt:
            raise UsageError("The prompt is empty.", "Give at least one word.")
        opened = open_language_model(model, _backend(backend), trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(opened)
        sampling = Sampling.of(opened.settings, **options)
        progress("opening", 1, 1)
    ignored = not_applied(opened.generation)
    if not as_json:
        also = f"; not applied: {', '.join(ignored)}" if ignored else ""
        ui.stderr().print(f"{sampling}{also}", style="dim", highlight=False, markup=False)
    start = time.perf_counter()
    pieces: list[str] = []
    for piece in generate(
        opened,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        raw=raw,
        say=ui.say_note,
        **options,
    ):
        pieces.append(piece)
        if not as_json:
            ui.write_piece(piece)
    if as_json:
        seconds = time.perf_counter() - start
        found = {"model": model, "backend": opened.backend, "prompt": prompt}
        made = {"text": "".join(pieces), "seconds": seconds}
        how = {"sampling": dataclasses.asdict(sampling), "not_applied": ignored}
        _print_json({**found, **made, **how})
    else:
        sys.stdout.write("\n")


@app.command("passes")
@_errors_as_sentences
def passes_command(
    name: Annotated[str | None, typer.Argument(help="One pass, with its legality rules.")] = None,
    json_schema: Annotated[
        bool,
        typer.Option(
            "--json-schema", help="Print the JSON schema of recipes, with all passes' options."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the passes, their options and whether they are exact."""
    from graphopt.pass_manager.description import describe_passes

    if json_schema:
        from graphopt.pass_manager.recipe_schema import recipe_schema

        if name is not None:
            raise UsageError(
                "The JSON schema is of all passes together.", f"Leave {name} out; see its $defs."
            )
        _print_json(recipe_schema())
        return
    found = describe_passes(name)
    if as_json:
        _print_json(found)
    else:
        ui.print_pass_list(ui.stdout(), found, full=name is not None)


@app.command("targets")
@_errors_as_sentences
def targets_command(
    name: Annotated[str | None, typer.Argument(help="One target, with its sources.")] = None,
    as_json: Json = False,
) -> None:
    """List the targets and what is known about them."""
    import dataclasses

    from graphopt.targets import all_targets, get_target

    targets = [get_target(name)] if name is not None else list(all_targets().values())
    found = [dataclasses.asdict(target) for target in targets]
    if as_json:
        _print_json(found)
    else:
        ui.print_targets(ui.stdout(), found, full=name is not None)


@dataclass(frozen=True)
class AttentionFlags:
    """The options of `graphopt plan-attention`."""

    target: Annotated[str, typer.Option(help="See 'graphopt targets'.")]
    head_dim: Annotated[int, typer.Option(help="Size of a query or key head.")]
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; all heads by default.")] = None
    value_dim: Annotated[int | None, typer.Option(help="Size of a value head.")] = None
    dtype: Annotated[str, typer.Option(help="f16 or bf16.")] = "f16"
    phase: Annotated[str, typer.Option(help="prefill or decode.")] = "prefill"
    causal: Annotated[bool, typer.Option(help="See keys up to the query's place.")] = True
    align: Annotated[str, typer.Option(help="bottom-right or top-left.")] = "bottom-right"
    window: Annotated[int | None, typer.Option(help="Keys a query sees.")] = None
    chunk: Annotated[int | None, typer.Option(help="Length of the chunks of keys.")] = None
    softcap: Annotated[float | None, typer.Option(help="Bound of the scores.")] = None
    kv: Annotated[str, typer.Option(help="contiguous, ring or paged.")] = "contiguous"
    page: Annotated[int | None, typer.Option(help="Tokens of a page.")] = None
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached element.")] = 16
    also: Annotated[
        str,
        typer.Option(
            "--with",
            help="Comma-separated: sinks, alibi, key_mask, bias, varlen, lengths, "
            "selected_pages, lse, page_max.",
        ),
    ] = ""


@app.command("plan-attention")
@_errors_as_sentences
def plan_attention_command(flags: AttentionFlags, as_json: Json = False) -> None:
    """Show which kernel a target runs an attention with, and by which inequalities."""
    from graphopt.errors import unknown_name
    from graphopt.lowering.kernels import plan_attention
    from graphopt.plan import AttentionSpec
    from graphopt.targets import get_target

    switches = [f.name for f in dataclasses.fields(AttentionSpec) if f.default is False]
    wanted = [name.strip() for name in flags.also.split(",") if name.strip()]
    for name in wanted:
        if name not in switches:
            raise unknown_name("feature", name, switches)
    for name, value, known in (
        ("phase", flags.phase, ("prefill", "decode")),
        ("alignment", flags.align, ("bottom-right", "top-left")),
        ("cache", flags.kv, ("contiguous", "ring", "paged")),
    ):
        if value not in known:
            raise unknown_name(name, value, known)
    given = dataclasses.asdict(flags)
    del given["target"], given["also"]
    given["kv_heads"] = flags.kv_heads or flags.heads
    spec = AttentionSpec(**given, **cast(Any, dict.fromkeys(wanted, True)))
    plan = plan_attention(spec, get_target(flags.target))
    if as_json:
        _print_json(dataclasses.asdict(plan))
    else:
        ui.stdout().print("\n".join(plan.lines()), soft_wrap=True)


@app.command()
@_errors_as_sentences
def diff(
    a: Annotated[str, typer.Argument(help="A model or an output folder.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare two models: structure, parameters, weights and reports."""
    from graphopt.inspection import diff_models

    with ui.progress_bars() as progress:
        found = diff_models(a, b, trust_remote_code=trust_remote_code, progress=progress)
    if as_json:
        _print_json(found)
    else:
        ui.print_diff(ui.stdout(), found)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from graphopt import __version__

        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and end the process."""
    # A tracer makes millions of small objects that live as long as the process. Looking for
    # cycles among them, while they are made and once more at exit, takes seconds.
    gc.set_threshold(100_000, 20, 100)
    ui.keep_logs_plain()
    # A library that asks whether code may run gets no answer, not even from a pipe.
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    try:
        app()
        code: object = 0
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
