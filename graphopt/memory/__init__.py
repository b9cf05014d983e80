"""What a run does with memory: every block's life, seen, predicted and planned.

trace = graphopt.memory.record(step, iterations=3)
trace.save("trace.json")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.memory.predict import Prediction, predict_peak, replay
    from graphopt.memory.recording import record
    from graphopt.memory.stand_in import StandIn
    from graphopt.memory.trace import Instance, Trace
    from graphopt.memory.workload import Workload

_HOMES = {
    "Instance": "graphopt.memory.trace",
    "Prediction": "graphopt.memory.predict",
    "StandIn": "graphopt.memory.stand_in",
    "Trace": "graphopt.memory.trace",
    "Workload": "graphopt.memory.workload",
    "predict_peak": "graphopt.memory.predict",
    "record": "graphopt.memory.recording",
    "replay": "graphopt.memory.predict",
}

__all__ = [
    "Instance",
    "Prediction",
    "StandIn",
    "Trace",
    "Workload",
    "predict_peak",
    "record",
    "replay",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, which a planner of offsets does not need."""
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt.memory' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List what is imported when it is asked for as well."""
    return sorted({*globals(), *__all__})
