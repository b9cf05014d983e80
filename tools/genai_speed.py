"""How fast onnxruntime-genai decodes with a model."""

from __future__ import annotations

import time
from pathlib import Path


def decode_speed(folder: Path, prompt: list[int], tokens: int, repeats: int) -> list[float]:
    """Return tokens per second of a model, some repetitions behind one that is left out."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    speeds: list[float] = []
    for repeat in range(repeats + 1):
        params = og.GeneratorParams(model)
        # Lengths alone end the run, so that every model does the same work.
        length = len(prompt) + tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        if repeat:
            speeds.append((tokens - 1) / (time.perf_counter() - start))
    return speeds
