"""`graphopt compile`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.completion import complete_recipe, complete_target
from graphopt.cli.pass_table import print_passes
from graphopt.cli.shared import (
    INTERRUPTED,
    MAX_COUNT,
    MAX_SEED,
    BosOption,
    ConfigOption,
    Json,
    LauncherOption,
    ModelArg,
    Plugins,
    RanksOption,
    Remote,
    add_plugins,
    errors_as_sentences,
    memory_bytes,
    model_spec,
    print_json,
)
from graphopt.errors import UsageError
from graphopt.support.quantities import format_bytes

if TYPE_CHECKING:
    from graphopt.compiler import CompileOptions
    from graphopt.ir.graph import Program
    from graphopt.pass_manager.pipeline import Pipeline
    from graphopt.report.records import FormSize, PassEntry


LONG_WRITE = 10**8
"""Bytes from which on it is said beforehand what will be written."""


@dataclass(frozen=True)
class CompileFlags:
    """The options of `graphopt compile`."""

    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")] = Path("out")
    target: Annotated[
        str,
        typer.Option(
            help="What to emit for; see 'graphopt targets'.", autocompletion=complete_target
        ),
    ] = "cpu"
    emit: Annotated[
        str | None,
        typer.Option(help="Comma-separated: onnx (the CPU's default), torch (others'), hf, gguf."),
    ] = None
    passes: Annotated[
        str | None,
        typer.Option(
            help="Recipe, such as 'prune-blocks{ratio=0.25},fuse-blocks'. Unless it names one of "
            "the default passes, it runs between them; '' for none.",
            autocompletion=complete_recipe,
        ),
    ] = None
    recipe: Annotated[Path | None, typer.Option(help="Recipe as a YAML file.")] = None
    calib: Annotated[
        Path | None, typer.Option(help="Text file for calibration and verification.")
    ] = None
    calib_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder with pictures and a .jsonl file of prompts and answers, for calibration "
            "and training beside --calib or in its place."
        ),
    ] = None
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file on which the result is compared with the source; a built-in English "
            "story by default, where a pass may have made it worse."
        ),
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
    onnx_policy_op: Annotated[
        bool,
        typer.Option(
            "--onnx-policy-op",
            help="In the ONNX form, an attention with a KV policy is one operator of the domain "
            "graphopt, with its body.",
        ),
    ] = False
    onnx_accuracy: Annotated[
        int,
        typer.Option(
            help="In the ONNX form, how packed weights are multiplied: 1 in fp32, 4 by integers, "
            "with activations rounded to 8 bits."
        ),
    ] = 1
    dtype: Annotated[
        str,
        typer.Option(
            help="In which weights are stored: float32, bfloat16, float16, or auto: what the "
            "source holds, and what GPU packages compute in."
        ),
    ] = "auto"
    gguf_type: Annotated[
        str,
        typer.Option(
            help="Type of matrices in the GGUF form: f32, f16, bf16, q8_0, q4_0, q4_1, or auto: "
            "what the program holds."
        ),
    ] = "auto"
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
    device: Annotated[
        str,
        typer.Option(
            help="Where passes and verification compute; auto takes a GPU where there is one and "
            "a pass is lossy."
        ),
    ] = "auto"
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of a GPU, such as 24GB: with --dry-run, say which batches and lengths fit "
            "it; passes on a GPU size their batches by it, in place of all that the GPU has."
        ),
    ] = None
    ranks: RanksOption = None
    launcher: LauncherOption = None
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything random.")] = 0
    bos: BosOption = "every"
    config: ConfigOption = None
    trust_remote_code: Remote = False


@errors_as_sentences
def compile_command(
    model: ModelArg = None, plugin: Plugins = None, *, flags: CompileFlags, as_json: Json = False
) -> None:
    """Compile a model to a folder that runs, with a report.

    Ranks that torchrun or --ranks starts share the text that passes calibrate and train on.
    """
    spec = model_spec(model, flags.config)
    add_plugins(plugin)
    with _saying_what_is_kept(flags.out), ui.progress_bars() as progress:
        progress("starting", 0, 1)
        from graphopt.compiler import compile_model
        from graphopt.storage.output_folder import check_output
        from graphopt.support.ranks import here

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

        def on_pass(entry: PassEntry) -> None:
            seconds = entry.seconds + entry.verify_seconds
            progress.milestone(f"{entry.name}: changed {entry.changed} in {seconds:.1f} s")

        def on_write(forms: list[FormSize]) -> None:
            needed = sum(form.bytes for form in forms)
            if needed >= LONG_WRITE and not as_json:
                sizes = "; ".join(f"{form.name} {form.describe()}" for form in forms)
                text = f"about {format_bytes(needed)} to {flags.out}  ({sizes})"
                ui.print_rows(console, [("writing", text)])

        progress("capture", 0, 1)
        report = compile_model(
            spec,
            flags.out,
            options,
            progress=progress,
            on_capture=on_capture,
            on_pass=on_pass,
            on_write=on_write,
            command=_command_line(model, plugin, flags),
        )
        if not here().first:
            return
    if as_json:
        print_json(report.to_json())
        return
    console.print()
    print_passes(console, report.passes)
    console.print()
    if flags.dry_run:
        ui.print_estimate(console, report)
    else:
        ui.print_report(console, report)


def _command_line(model: str | None, plugins: Iterable[Path] | None, flags: CompileFlags) -> str:
    """Return the command that gives these options: those that are not at their defaults."""
    words = ["graphopt", "compile", *([model] if model is not None else [])]
    for plugin in plugins or ():
        words += ["--plugin", str(plugin)]
    for item in fields(flags):
        value = getattr(flags, item.name)
        if value == item.default and item.name != "out":
            continue
        words.append(f"--{item.name.replace('_', '-')}")
        if not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


@contextlib.contextmanager
def _saying_what_is_kept(out: Path) -> Iterator[None]:
    """Name what an interrupted compile left to go on with, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from graphopt.storage.output_folder import work_folder
        from graphopt.storage.snapshot import kept_work

        kept = kept_work(work_folder(out))
        if kept is None:
            raise
        parts = [f"the result of {kept.passes} pass{'es' * (kept.passes > 1)}"] * (kept.passes > 0)
        parts += ["what the pass behind it had done"] * kept.within
        ui.say_error(
            f"Interrupted; nothing was left half-written. Kept in {str(kept.folder)!r} "
            f"({format_bytes(kept.bytes)}): {' and '.join(parts)}.",
            "The same command with --resume goes on from there; without it, it starts again.",
        )
        raise typer.Exit(INTERRUPTED) from None


def _compile_options(flags: CompileFlags) -> CompileOptions:
    from graphopt.compiler import CompileOptions
    from graphopt.sources.windows import check_bos

    emit, recipe = flags.emit, _pipeline(flags.passes, flags.recipe)
    return CompileOptions(
        target=flags.target,
        emit=None if emit is None else [n.strip() for n in emit.split(",") if n.strip()],
        recipe=recipe,
        calib=flags.calib,
        calib_images=flags.calib_images,
        text=flags.text,
        verify=not flags.no_verify,
        force=flags.force,
        strict=flags.strict,
        onnx_moe=flags.onnx_moe,
        onnx_policy_op=flags.onnx_policy_op,
        onnx_accuracy=flags.onnx_accuracy,
        dtype=flags.dtype,
        gguf_type=flags.gguf_type,
        max_length=flags.max_length,
        dry_run=flags.dry_run,
        stop_after=flags.stop_after,
        dump_ir=flags.dump_ir,
        resume=flags.resume,
        device=_device(flags.device, recipe),
        memory=memory_bytes(flags.memory),
        seed=flags.seed,
        bos=check_bos(flags.bos),
        trust_remote_code=flags.trust_remote_code,
    )


def _device(name: str, recipe: Pipeline) -> str:
    """Return the device of a recipe, and say where a GPU was found for it.

    Exact passes rewrite structure and are checked on a short text, which no GPU makes faster.
    """
    from graphopt.support.devices import AUTO, describe_device, found_gpu

    if name != AUTO:
        return name
    gpu = None if all(item.exact for item in recipe.passes) else found_gpu()
    if gpu is None:
        return "cpu"
    ui.say_note(f"Passes compute on {describe_device(gpu)}; --device cpu keeps them on the CPU.")
    return str(gpu)


def _pipeline(passes: str | None, recipe: Path | None) -> Pipeline:
    from graphopt.pass_manager.pipeline import Pipeline

    if passes is not None and recipe is not None:
        raise UsageError("Both --passes and --recipe are given.", "Give one of them.")
    if recipe is not None:
        return Pipeline.from_yaml(recipe)
    return Pipeline.parse(passes).within_default() if passes is not None else Pipeline.default()
