"""Opening a model or an artifact to run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graphopt.errors import SourceError, UsageError
from graphopt.files.confined import folder_inside
from graphopt.ir.context import context_length
from graphopt.sources.base import output_tokenizer

if TYPE_CHECKING:
    pass
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.torch_artifact import TorchArtifactModel
from graphopt.execute.language_model import LanguageModel, ProgramModel

Backend = Literal["auto", "program", "torch", "onnx"]


def open_language_model(
    spec: str,
    backend: Backend = "auto",
    *,
    trust_remote_code: bool = False,
    keep_weights: bool = True,
) -> LanguageModel:
    """Open a model or an artifact to run it.

    Args:
        spec: What `open_model` takes, an output folder of `graphopt compile`, or a folder with
            `model.onnx`.
        backend: "auto" runs an output folder's model.py where it has one, else its ONNX graph,
            else its program; everything else is captured and run as a program.
        trust_remote_code: Let code of a checkpoint, or a changed model.py, run.
        keep_weights: See `ProgramModel`.

    Raises:
        SourceError: There is no such model, or it cannot be read.
        CaptureError: The source cannot be captured.
        UsageError: The backend is not among what the folder holds.
    """
    root = Path(spec).expanduser()
    artifact = (root / "program.json").is_file()
    onnx_folder = (folder_inside(root, "onnx") or root / "onnx") if artifact else root
    has_torch = artifact and (root / "model.py").is_file()
    has_onnx = (onnx_folder / "model.onnx").is_file()
    if backend == "auto":
        backend = "torch" if has_torch else "onnx" if has_onnx else "program"
    for name, there in (("torch", has_torch), ("onnx", has_onnx)):
        if backend == name and not there:
            raise UsageError(
                f"{spec!r} holds no {name} artifact.",
                f"Compile one with `graphopt compile {spec} --emit {name} -o FOLDER`.",
            )
    if backend == "onnx" and not artifact:
        return OnnxArtifactModel(onnx_folder)
    from graphopt.capture import capture

    program = capture(spec, trust_remote_code=trust_remote_code)
    if not program.has_values():
        raise SourceError(
            f"{program.name} is a config without weights, and nothing can be computed without.",
            "Give a model folder, a .gguf file or 'demo'; `graphopt inspect` takes a config.",
        )
    if backend == "torch":
        return TorchArtifactModel(root, program, trust_remote_code=trust_remote_code)
    if backend == "onnx":
        return OnnxArtifactModel(
            onnx_folder,
            name=program.name,
            config=program.config,
            generation=program.generation,
            tokenizer=output_tokenizer(root, program),
            constants=[weight.name for weight in program.weights if weight.constant],
            length=context_length(program),
        )
    return ProgramModel(program, keep_weights=keep_weights)
