"""The graphs of a model that sees: pictures to features, tokens and features to embeddings, logits.

The decoder's graph is that of `graphopt.ir.sighted`, and reads one data file with the table of
words; the tower has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphopt.capture.vision_export import tower_program
from graphopt.errors import CaptureError
from graphopt.files.onnx_file import VISION_NAME
from graphopt.ir.embedder import embedder
from graphopt.ir.graph import Program
from graphopt.ir.sighted import sighted
from graphopt.lowering.onnx.external import DataFile
from graphopt.lowering.onnx.graph import Graph
from graphopt.lowering.onnx.ops import translation_of
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress


@dataclass
class Parts:
    """What a program that sees is divided into.

    Attributes:
        embedding: From `input_ids` and `image_features` to `inputs_embeds`.
        decoder: From `inputs_embeds` to `logits`.
        tower: From `pixel_values` to `image_features`; None where it has no graph.
        reason: Why not.
    """

    embedding: Program
    decoder: Program
    tower: Program | None = None
    reason: str = ""


def parts_of(program: Program) -> Parts:
    """Return the parts of a program that sees.

    Raises:
        UsageError: Its decoder has no form that takes embeddings.
    """
    parts = Parts(embedder(program), sighted(program))
    try:
        parts.tower = tower_program(program)
    except CaptureError as error:
        parts.reason = error.message
        return parts
    without = missing_form(parts.tower)
    if without is not None:
        parts.tower, parts.reason = None, f"the tower: {without} has no ONNX form"
    return parts


def missing_form(program: Program) -> str | None:
    """Return the first op of a program that has no ONNX form; None where all have one."""
    return next(
        (
            node.op
            for call in program.calls
            for node in program.functions[call.function].nodes
            if translation_of(node.op) is None
        ),
        None,
    )


def write_tower(
    tower: Program, folder: Path, root: Path, progress: Progress
) -> tuple[list[Path], dict[str, StoredWeight]]:
    """Write `vision.onnx` and its data file.

    Returns:
        The files, and where the weights of the tower are in them.

    Raises:
        LoweringError: An operator's arguments have no ONNX form.
        SourceError: A weight cannot be read.
    """
    path = folder / VISION_NAME
    data = DataFile(folder / f"{VISION_NAME}.data", root)
    model = Graph(tower, data).build()
    data.write(progress)
    ir.save(model, path)
    return [path, data.path], data.storage
