"""How ONNX Runtime opens a graph that graphopt emitted."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from graphopt.errors import SourceError, first_line

STATES = {"past_key_values.": "present.", "past_policy.": "present_policy."}
"""How inputs with what a step left begin, and the outputs that leave it."""


def session_options() -> Any:
    """Return the options of a session: its log is silent, since what fails raises."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Whatever is dequantised and multiplied is not rounded to 8 bits without being asked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(path: Path, constants: Collection[str] = ()) -> Any:
    """Return a session of a graph, on the CPU.

    Args:
        constants: Initializers that may hold infinity on purpose.

    Raises:
        SourceError: It is not as graphopt emits graphs, or ONNX Runtime cannot load it.
    """
    import onnxruntime

    from graphopt.files.onnx_file import check_onnx

    check_onnx(path, constants)
    try:
        return onnxruntime.InferenceSession(
            str(path), session_options(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        # ONNX Runtime's exceptions share no base class of their own.
        raise SourceError(
            f"ONNX Runtime cannot load {path}: {first_line(error)}.", "Compile the model again."
        ) from error


def states_of(inputs: Any) -> dict[str, str]:
    """Return by the names of inputs that take what a step left the outputs that leave it."""
    return {
        name: name.replace(before, after, 1)
        for name in inputs
        for before, after in STATES.items()
        if name.startswith(before)
    }
