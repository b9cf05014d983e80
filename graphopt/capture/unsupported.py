"""Parts of models that have no form in graphopt, found before anything is traced."""

from __future__ import annotations

from torch import nn

from graphopt.capture.recurrent import refuse_recurrent
from graphopt.errors import CaptureError


def refuse_unsupported(module: nn.Module) -> None:
    """Refuse a language model with a recurrent mixer or with block-sparse attention.

    Raises:
        CaptureError: Naming the first such module, and what to do.
    """
    refuse_recurrent(module)
    _refuse_block_sparse(module)


def _refuse_block_sparse(module: nn.Module) -> None:
    """BigBird's: beyond some length tokens attend to random blocks; up to it, to all."""
    for path, part in module.named_modules():
        if getattr(part, "attention_type", None) == "block_sparse":
            raise CaptureError(
                f"{path or type(module).__name__} attends to random blocks in longer texts "
                "(attention_type 'block_sparse').",
                'Set "attention_type": "original_full" in config.json: for texts that are too '
                "short for blocks, the model is the same.",
            )
