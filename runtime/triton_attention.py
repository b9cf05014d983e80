"""The attention kernels in Triton: kernels/prefill.py and kernels/decode.py, loaded to be run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from graphopt.runtime.attention import decode, prefill
from graphopt.runtime.fitting_tiles import Constants


def load(phase: str, constants: Constants, code: bytes | None) -> Callable[..., Any]:
    """Return what runs an attention of (q, keys, scale=, extras=).

    See `attention.prefill` and `attention.decode`.

    Args:
        phase: `prefill` or `decode`.
        code: None: Triton compiles the kernels where they run.
    """
    # Imported here: a CPU has no Triton, and needs none.
    if phase == "decode":
        from graphopt.runtime.kernels.decode import attention_decode, attention_merge

        return partial(decode, attention_decode, attention_merge, constants=constants, rounds=True)
    from graphopt.runtime.kernels.prefill import attention_prefill

    return partial(prefill, attention_prefill, constants=constants)
