"""How a pipeline is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from graphopt.sources.windows import Bos


@dataclass(frozen=True)
class RunOptions:
    """How a pipeline is run.

    Attributes:
        calib: Text file for calibration and for the probe; None for a built-in text.
        calib_images: Folder with pictures and a file of JSON lines, on which passes calibrate and
            train; where there is a text as well, the two alternate.
        verify: Compare results before and after every pass. The structure is always verified.
        dump_ir: Folder that gets the program before and after every pass as text; a compile writes
            what the steps of capture left into `capture` there.
        stop_after: Name of the last pass to run; None for all.
        resume: Take up the latest snapshot that fits source and recipe.
        device: Where passes and verification compute.
        seed: The seed of every generator of random numbers.
        bos: Which windows of text begin with what the tokenizer puts before a text.
        text: Text file on which source and result are compared; None for a built-in text, where
            a pass that is not exact changed something, and for no comparison where none did.
        memory: Bytes of the GPU's memory by which passes size their batches; None for all of it.
    """

    calib: str | Path | None = None
    calib_images: str | Path | None = None
    verify: bool = True
    dump_ir: str | Path | None = None
    stop_after: str | None = None
    resume: bool = False
    device: str | torch.device = "cpu"
    seed: int = 0
    bos: Bos = "every"
    text: str | Path | None = None
    memory: int | None = None
