"""How ONNX Runtime opens a graph that graphopt emitted."""

from __future__ import annotations

from typing import Any

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


def states_of(inputs: Any) -> dict[str, str]:
    """Return by the names of inputs that take what a step left the outputs that leave it."""
    return {
        name: name.replace(before, after, 1)
        for name in inputs
        for before, after in STATES.items()
        if name.startswith(before)
    }
