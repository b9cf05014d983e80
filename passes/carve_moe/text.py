"""The text that a carving learns from, is measured on, and sets thresholds by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.calibration.reconstruction import held_out_windows
from graphopt.calibration.text import calibration_windows, pick_apart, window_length
from graphopt.errors import PassError
from graphopt.execute.batch_sizes import BatchSize, walk_size
from graphopt.execute.hidden_states import TOKENS_AT_ONCE
from graphopt.ir.feed_forward import FeedForward
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context
from graphopt.passes.carve_moe.division import initial_k_activations
from graphopt.passes.carve_moe.parts import parts_of, width_of
from graphopt.support.per_device import on_device
from graphopt.support.quantities import counted

if TYPE_CHECKING:
    from graphopt.passes.carve_moe.carve_moe import CarveMoe


@dataclass(frozen=True)
class CarvingText:
    """Windows of the calibration text, int64 [N, S].

    Attributes:
        windows: What is learnt from, and behind it what is held out.
        held: How many of them are held out: strengths are chosen and figures measured by them.
        unseen: Other windows, by which thresholds are set; those held out where the text has none.
        at_once: How many windows are run at once.
    """

    windows: Tensor
    held: int
    unseen: Tensor
    at_once: BatchSize

    @property
    def held_out(self) -> Tensor:
        return self.windows[-self.held :]

    @classmethod
    def of(cls, options: CarveMoe, program: Program, context: Context) -> CarvingText:
        """Return the text of one carving.

        Raises:
            PassError: It is too short to learn from, or one window does not fit the memory.
        """
        length = window_length(program, options.seqlen, context.device)
        windows = calibration_windows(program, context, length)
        count = on_device(options.windows, context.device)
        windows, others = pick_apart(windows, count, count, context.seed)
        if len(windows) < 2:
            raise PassError(
                f"The calibration text has {counted(len(windows), 'window')} of {length} tokens, "
                "and carving needs one to learn from and one to measure on.",
                "Give a longer text with --calib, or a lower seqlen.",
            )
        held = held_out_windows(len(windows))
        _check_tokens(options, program, (len(windows) - held) * length)
        usual = TOKENS_AT_ONCE.on(context.device)
        at_once = walk_size(program, length, usual, context.device, context.memory)
        return cls(windows, held, others if len(others) else windows[-held:], at_once)


def _check_tokens(options: CarveMoe, program: Program, tokens: int) -> None:
    """Refuse so few tokens that most neurons are among the largest of none of them."""
    widths = [
        width_of(program, block, part)
        for block, part in parts_of(program)
        if isinstance(part, FeedForward)
    ]
    for width in widths if options.active else []:
        fitted = options.mode == "fit"
        k = initial_k_activations(width) if fitted else options.k_activations
        if tokens * k < width:
            raise PassError(
                f"{tokens} tokens to learn from, by the {k} largest neurons of each, cannot tell "
                f"{width} neurons apart.",
                f"Give a longer text with --calib, or windows and seqlen of {width // k} tokens "
                "and more.",
            )
