"""The options that all passes which train have in common.

Listing passes reads this module, so that it imports nothing that computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.errors import PassError

TRAIN = ("all", "low-rank")


@dataclass
class TrainingOptions:
    """What passes that train are told.

    Attributes:
        seconds: Of the whole pass, at most; 150 where neither this nor `steps` is given.
        steps: Of training, at most.
        rate: Highest learning rate; by default 5e-4, and less for steps of under 8,192 tokens.
        batch: Windows of a step; 4 on a GPU and 2 on a CPU by default.
        seqlen: Tokens of a window; 2048 on a GPU and 256 on a CPU by default.
        own_text: Windows that the dense model writes itself; see `Distiller.lessons_text`.
        train: `all` trains weights whole, `low-rank` matrices by a term.
        rank: Of that term.
        patience: Stop after this many checks without a better held-out loss; 0 never stops.
    """

    seconds: float | None = None
    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    seqlen: int | None = None
    own_text: int | None = None
    train: str = "all"
    rank: int = 128
    patience: int = 0

    def check_training(self, name: str) -> None:
        """Refuse options out of range.

        Raises:
            PassError: Naming the option and what it may be.
        """
        if self.train not in TRAIN:
            raise PassError(f"{name} knows no train {self.train!r}.", f"Known: {', '.join(TRAIN)}.")
        for option, least in (
            ("seconds", 0), ("steps", 0), ("rate", 0), ("batch", 1), ("seqlen", 2),
            ("own_text", 0), ("rank", 1), ("patience", 0),
        ):  # fmt: skip
            value = getattr(self, option)
            if value is not None and not value >= least:
                raise PassError(
                    f"{name}: {option}={value} is below {least}.", f"Leave {option} out."
                )
