"""From a model to an output folder: capture, passes, emission, report."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import SourceError
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.what_fits import what_fits
from graphopt.ir.context import set_max_length
from graphopt.ir.dtypes import AUTO
from graphopt.ir.graph import Program
from graphopt.ir.types import DTYPE_NAMES
from graphopt.lowering.emission import Emission, files_under
from graphopt.lowering.onnx_accuracy import EXACT
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.pass_manager.run import OnPass
from graphopt.pass_manager.run_options import RunOptions
from graphopt.report.records import (
    ArtifactEntry,
    FormSize,
    Report,
    block_entries,
    machine,
    versions,
)
from graphopt.storage.output_folder import (
    check_dump,
    check_output,
    check_room,
    locked,
    output_folder,
    work_folder,
)
from graphopt.support.devices import usable_device
from graphopt.support.measure import Meter
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import here

if TYPE_CHECKING:
    from graphopt.capture.steps import CaptureStep, Watch
    from graphopt.sources import ModelSource


FIT_TOKENS = 2048
"""Tokens of the texts of which it is said how many fit a memory."""


def emit(
    program: Program,
    out: str | Path,
    *,
    target: str = "cpu",
    emit: Sequence[str] | None = None,
    report: Report | None = None,
    recipe: Pipeline | None = None,
    force: bool = False,
    strict: bool = False,
    onnx_moe: bool = False,
    onnx_policy_op: bool = False,
    onnx_accuracy: int = EXACT,
    dtype: str = AUTO,
    gguf_type: str = AUTO,
    progress: Progress = silent,
) -> Report:
    """Write a program as an output folder, which is itself a model graphopt opens.

    Args:
        emit: Names of emitters: `onnx`, `torch`, `hf`, `gguf`; by default `onnx` for a CPU and
            `torch` for other targets.
        report: From `Pipeline.run`, to be completed; None for a report of the emission alone.
        recipe: What made the program, for `recipe.yaml`.
        force: Replace an existing folder, once the new one is complete.
        strict: Refuse what would run without a kernel of the target.
        onnx_moe: In the ONNX form, experts become com.microsoft::MoE.
        onnx_policy_op: In the ONNX form, an attention with a KV policy is one operator of the
            domain `graphopt`, with its body.
        onnx_accuracy: In the ONNX form, how packed weights are multiplied with activations that
            are not rounded: 1 in fp32, 4 by integers, activations rounded to 8 bits.
        dtype: In which trained weights are stored: `float32`, `bfloat16`, `float16`, or `auto`:
            what the program holds, and in packages with kernels for a GPU what they compute in.
        gguf_type: The type of matrices in the GGUF form: `f32`, `f16`, `bf16`, `q8_0`, `q4_0`,
            `q4_1`, or `auto`: what the program holds, packed weights as they are where the format
            holds them.

    Returns:
        The report, as written.

    Raises:
        UsageError: Unknown target or emitter, or the folder exists.
        LoweringError: The program has no such form, or the target is not in this version.
    """
    emission = Emission.of(
        target,
        emit,
        strict,
        onnx_moe,
        dtype,
        onnx_policy_op=onnx_policy_op,
        onnx_accuracy=onnx_accuracy,
        gguf_type=gguf_type,
    )
    program = emission.rounded(program)
    emission.check(program)
    if report is None:
        report = Report(
            source=program.source,
            name=program.name,
            recipe="",
            versions=versions(),
            machine=machine(),
            parameters=program.parameter_count(),
            dtype=DTYPE_NAMES[program.checkpoint_dtype],
            blocks=block_entries(program),
        )
    check_output(Path(out), force)
    with locked(Path(out)):
        _write(program, Path(out), emission, report, recipe or Pipeline(), force, progress)
    return report


def _write(
    program: Program,
    out: Path,
    emission: Emission,
    report: Report,
    recipe: Pipeline,
    force: bool,
    progress: Progress,
    on_write: Callable[[list[FormSize]], None] | None = None,
) -> None:
    planned = emission.sizes(program)
    check_room(out, sum(form.bytes for form in planned))
    if on_write is not None:
        on_write(planned)
    with output_folder(out, force) as root:
        with Meter() as meter:
            usage, notes, forms = emission.write(program, root, recipe.to_yaml(), progress)
        size = sum(path.stat().st_size for path in files_under(root))
        names = [emitter.name for emitter in emission.emitters]
        report.target = emission.target
        report.licence = program.licence
        report.licence_files = [Path(path).name for path in program.licence_files]
        place = shlex.quote(str(out))
        # Two forms may be run by the same command.
        lines = [line.replace("{out}", place) for line in dict.fromkeys(usage)]
        report.artifact = ArtifactEntry(str(out), size, names, lines, notes, forms)
        report.stages["emit"] = meter.seconds
        report.total_seconds += meter.seconds
        report.peak_bytes = max(report.peak_bytes, meter.peak_bytes)
        report.write(root)


def _capture_dump(folder: str | Path | None) -> Watch | None:
    """Return what writes every step of capture to a file under `folder`, if there is one."""
    if folder is None:
        return None
    dumps, numbers = Path(folder) / "capture", itertools.count(1)

    def write(step: CaptureStep) -> None:
        dumps.mkdir(parents=True, exist_ok=True)
        path = dumps / f"{next(numbers):02d}-{step.name}.txt"
        path.write_text(f"# {step}\n\n{step.text}\n", encoding="utf-8")

    return write


@dataclass(frozen=True)
class CompileOptions(RunOptions):
    """How a model is compiled: how its passes are run, and what is emitted.

    Attributes:
        target: Name of a target.
        emit: Names of emitters; see `emit`.
        recipe: Passes; None for the default recipe.
        force: Replace the output folder if it exists, once the new one is complete.
        strict: Refuse what would run without a kernel of the target.
        onnx_moe: In the ONNX form, experts become com.microsoft::MoE.
        onnx_policy_op: In the ONNX form, an attention with a KV policy is one operator; see `emit`.
        onnx_accuracy: In the ONNX form, how packed weights are multiplied; see `emit`.
        dtype: In which trained weights are stored; see `emit`.
        gguf_type: The type of matrices in the GGUF form; see `emit`.
        max_length: How many tokens texts may have; None for what the config states.
        dry_run: Only say what would be done: no weight is read and nothing is written.
        trust_remote_code: Let code of the checkpoint run.
    """

    target: str = "cpu"
    emit: Sequence[str] | None = None
    recipe: Pipeline | None = None
    force: bool = False
    strict: bool = False
    onnx_moe: bool = False
    onnx_policy_op: bool = False
    onnx_accuracy: int = EXACT
    dtype: str = AUTO
    gguf_type: str = AUTO
    max_length: int | None = None
    dry_run: bool = False
    trust_remote_code: bool = False


def compile_model(
    model: str | ModelSource,
    out: str | Path,
    options: CompileOptions = CompileOptions(),
    *,
    progress: Progress = silent,
    on_capture: Callable[[Program], None] | None = None,
    on_pass: OnPass | None = None,
    on_write: Callable[[list[FormSize]], None] | None = None,
    command: str | None = None,
) -> Report:
    """Compile a model to an output folder.

    Target, emitters, recipe and output folder are checked before the model is opened, and what
    depends on its structure before any weight is read.

    Args:
        model: Hugging Face id or folder, `.gguf` file, `demo`, or a graphopt output folder.
        out: Folder to make.
        progress: Told about long work.
        on_capture: Told about the captured program.
        on_pass: Told about every pass when it is done.
        on_write: Told about how large each form will be, before it is written.
        command: What was typed, for the report.

    Returns:
        The report, which is also in the folder.

    Raises:
        GraphoptError: Whatever is wrong, as one sentence with a remedy; `out` is as it was.
    """
    from graphopt.capture import capture

    folder = Path(out)
    writes = not options.dry_run and here().first
    if writes:
        check_output(folder, options.force)
    if options.dump_ir is not None and here().first:
        check_dump(Path(options.dump_ir))
    device = usable_device(options.device)
    emission = Emission.of(
        options.target,
        options.emit,
        options.strict,
        options.onnx_moe,
        options.dtype,
        onnx_policy_op=options.onnx_policy_op,
        onnx_accuracy=options.onnx_accuracy,
        gguf_type=options.gguf_type,
    )
    pipeline = options.recipe if options.recipe is not None else Pipeline.default()
    if options.stop_after is not None:
        pipeline = pipeline.until(options.stop_after)
    for text in (options.calib, options.text):
        if text is not None:
            read_text(Path(text))
    if options.calib_images is not None:
        from graphopt.vision.picture_stream import calibration_rows

        calibration_rows(Path(options.calib_images))
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(locked(folder))
            check_output(folder, options.force)  # another compile may have ended meanwhile
        with Meter() as whole:
            with Meter() as capturing:
                program = capture(
                    model,
                    trust_remote_code=options.trust_remote_code,
                    watch=_capture_dump(options.dump_ir) if writes else None,
                )
            if options.max_length is not None:
                set_max_length(program, options.max_length)
            if on_capture is not None:
                on_capture(program)
            length = program.max_length
            planned, entries = pipeline.plan(program, device)
            planned = emission.rounded(planned)
            structural = not any(item.reads_weights for item in pipeline.passes)
            if structural:
                emission.check(planned)
            if not options.dry_run and not program.has_values():
                raise SourceError(
                    f"{program.name} is a config without weights, and there is nothing to emit.",
                    "Give a model folder, a .gguf file or 'demo'; --dry-run says what would be "
                    "done, and `graphopt inspect` shows the structure.",
                )
            if options.dry_run:
                report = _dry_report(planned, pipeline, entries, options.target)
                report.estimate = emission.estimate(
                    program, pipeline, device, verify=options.verify
                )
                if options.memory is not None:
                    report.estimate.memory = options.memory
                    report.estimate.fits = what_fits(
                        planned, options.memory, batch=1, seq=FIT_TOKENS, progress=progress
                    )
            else:
                work = work_folder(folder)
                program, report = pipeline.run(
                    program, options, work=work, progress=progress, on_pass=on_pass
                )
                if not here().first:
                    return report
                # A snapshot has that of the run which made it.
                program.max_length = length
                program = emission.rounded(program)
                if not structural:
                    emission.check(program)
                lowering, seconds = emission.lower(
                    program, options, progress=progress, on_pass=on_pass
                )
                report.passes += lowering
                for stage, more in seconds.items():
                    report.stages[stage] = report.stages.get(stage, 0.0) + more
        report.stages = {"capture": capturing.seconds, **report.stages}
        if report.estimate is not None:
            report.estimate.seconds = {"capture": capturing.seconds, **report.estimate.seconds}
        report.total_seconds, report.peak_bytes = whole.seconds, whole.peak_bytes
        report.command = command
        if not options.dry_run:
            _write(program, folder, emission, report, pipeline, options.force, progress, on_write)
            shutil.rmtree(work, ignore_errors=True)
    return report


def _dry_report(program: Program, pipeline: Pipeline, entries: list[Any], target: str) -> Report:
    return Report(
        source=program.source,
        name=program.name,
        recipe=str(pipeline),
        target=target,
        passes=entries,
        versions=versions(),
        machine=machine(),
        parameters=program.parameter_count(),
        dtype=DTYPE_NAMES[program.checkpoint_dtype],
        blocks=block_entries(program),
        dry_run=True,
    )
