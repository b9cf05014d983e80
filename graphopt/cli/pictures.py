"""What `graphopt generate --image` and `graphopt eval --pictures` do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.generate import Sampling
    from graphopt.support.progress import Progress
    from graphopt.vision.answers import AnswersResult
    from graphopt.vision.processor import Processor
    from graphopt.vision.sighted_model import SightedModel


def check_form(backend: str) -> None:
    """Refuse forms that take token ids alone.

    Raises:
        UsageError: The backend is one.
    """
    if backend not in ("auto", "program"):
        raise UsageError(
            f"The {backend} form takes token ids, and a picture is none.",
            "Leave --backend out: pictures are looked at by the program.",
        )


def open_sighted(
    model: str, device: str, *, trust_remote_code: bool = False
) -> tuple[SightedModel, Processor]:
    """Return a model as what takes pictures, and its processor.

    Raises:
        SourceError: There is no such model, it has no weights, or no processor.
        UsageError: It is a model of text alone.
    """
    from graphopt.backends.opening import open_language_model
    from graphopt.execute.language_model import ProgramModel
    from graphopt.vision.processor import Processor
    from graphopt.vision.sighted_model import SightedModel

    opened = open_language_model(
        model, "program", device=device, trust_remote_code=trust_remote_code
    )
    assert isinstance(opened, ProgramModel)
    program = opened.runner.program
    processor = Processor(program)
    sees = SightedModel(program, device=opened.device)
    sees.placement = opened.placement
    return sees, processor


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
    model: str, rows: Path, device: str, progress: Progress, *, trust_remote_code: bool = False
) -> AnswersResult:
    """Measure the perplexity of answers given pictures; see `answer_perplexity`.

    Raises:
        UsageError, SourceError: As opening, reading and measuring do.
    """
    from graphopt.vision.answers import answer_perplexity
    from graphopt.vision.picture_rows import read_picture_rows

    read = read_picture_rows(rows)
    sees, processor = open_sighted(model, device, trust_remote_code=trust_remote_code)
    return answer_perplexity(sees, processor, read, progress)
