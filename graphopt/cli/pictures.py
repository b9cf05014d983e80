"""What `graphopt generate --image` and `graphopt eval --pictures` do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.backends.placement import Backend
    from graphopt.execute.language_model import LanguageModel
    from graphopt.generate import Sampling
    from graphopt.support.progress import Progress
    from graphopt.vision.answers import AnswersResult
    from graphopt.vision.processor import Processor
    from graphopt.vision.sighted_model import SightedModel


def open_sighted(
    model: str, backend: Backend, device: str, *, trust_remote_code: bool = False
) -> tuple[SightedModel, Processor]:
    """Return a model as what takes pictures, and its processor.

    Args:
        backend: "auto" is the package of an output folder where that takes pictures, or its ONNX
            graphs on a CPU where there is no package, else the program.

    Raises:
        SourceError: There is no such model, it has no weights, or no processor.
        UsageError: It is a model of text alone, or the form takes token ids alone.
    """
    from graphopt.backends.opening import open_language_model
    from graphopt.backends.torch_artifact import TorchArtifactModel
    from graphopt.execute.language_model import ProgramModel
    from graphopt.lowering.torch.sees import why_ids_alone
    from graphopt.vision.processor import Processor
    from graphopt.vision.sighted_model import SightedModel

    def open_as(form: Backend) -> LanguageModel:
        return open_language_model(model, form, device=device, trust_remote_code=trust_remote_code)

    if backend == "onnx" or (backend == "auto" and device in ("auto", "cpu") and _looks(model)):
        return _open_graphs(model, open_as("onnx"), trust_remote_code=trust_remote_code)
    has_package = backend == "auto" and all(
        (Path(model) / name).is_file() for name in ("model.py", "program.json")
    )
    opened = open_as("torch" if backend == "torch" or has_package else "program")
    form: LanguageModel | None = None
    if isinstance(opened, TorchArtifactModel):
        form, program, blind = opened, opened.program, why_ids_alone(opened.program)
        if blind is not None and backend == "torch":
            raise UsageError(
                f"The package in {model} takes token ids alone: {blind}.",
                "Leave --backend out: pictures are looked at by the program.",
            )
        if blind is not None:
            form, opened = None, open_as("program")
    if isinstance(opened, ProgramModel):
        program = opened.runner.program
    processor = Processor(program)
    sees = SightedModel(program, form, device=opened.device)
    sees.placement = opened.placement
    return sees, processor


def _looks(model: str) -> bool:
    """Whether an output folder has a graph of a tower, and no package beside it."""
    from graphopt.files.onnx_file import VISION_NAME

    root = Path(model).expanduser()
    return (root / "onnx" / VISION_NAME).is_file() and not (root / "model.py").is_file()


def _open_graphs(
    model: str, form: LanguageModel, *, trust_remote_code: bool
) -> tuple[SightedModel, Processor]:
    """Return the graphs of an output folder as what takes pictures, and the model's processor."""
    from graphopt.backends.onnx_tower import OnnxTower
    from graphopt.capture import capture
    from graphopt.vision.processor import Processor
    from graphopt.vision.sighted_model import SightedModel

    program = capture(model, trust_remote_code=trust_remote_code)
    tower = OnnxTower(program, Path(model).expanduser() / "onnx")
    return SightedModel(program, form, tower=tower), Processor(program)


def answer_pieces(
    model: SightedModel,
    processor: Processor,
    prompt: str,
    images: list[Path],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """Yield the answer to a prompt with pictures, piece by piece.

    Raises:
        UsageError, SourceError: As `Processor.inputs` and `generate_ids` do.
    """
    from graphopt.cli import console as ui
    from graphopt.generate.decoding import PieceDecoder, end_tokens, generate_ids, pieces

    ids = model.look_at(processor.inputs(prompt, images))
    tokens = generate_ids(
        model, ids,
        stop=end_tokens(model, processor.tokenizer), max_new_tokens=max_new_tokens,
        sampling=sampling, say=ui.say_note,
    )  # fmt: skip
    return pieces(tokens, PieceDecoder(processor.tokenizer))


def measure_answers(
    model: str,
    rows: Path,
    backend: Backend,
    device: str,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> AnswersResult:
    """Measure the perplexity of answers given pictures; see `answer_perplexity`.

    Raises:
        UsageError, SourceError: As opening, reading and measuring do.
    """
    from graphopt.vision.answers import answer_perplexity
    from graphopt.vision.picture_rows import read_picture_rows

    read = read_picture_rows(rows)
    sees, processor = open_sighted(model, backend, device, trust_remote_code=trust_remote_code)
    return answer_perplexity(sees, processor, read, progress)
