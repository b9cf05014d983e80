"""The process of a command: one by itself, one of several ranks, or the one that starts them.

Of several ranks the first prints and writes; the others are silent, unless the first cannot say why
one of them ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from graphopt.cli import console as ui
from graphopt.errors import UsageError
from graphopt.support.launched import launched

if TYPE_CHECKING:
    from graphopt.support.ranks import Ranks

SEVERAL = {"compile_command": "compile", "eval_command": "eval"}
"""Commands that several ranks share, by their functions."""

STARTED = "GRAPHOPT_STARTED"
"""The variable by which a rank knows that --ranks and --launcher have been heeded."""


class CommandProcess:
    """The process of one command.

    Args:
        command: The name of the command's function.
        given: Its arguments.
    """

    def __init__(self, command: str, given: Mapping[str, Any]) -> None:
        self._command, self._given = command, given
        self._ranks: Ranks | None = None
        self._silent = False

    def run(self, work: Callable[[], None]) -> None:
        """Run a command, or start the ranks that do.

        Raises:
            UsageError: The command runs in one process, or options contradict the environment.
            GraphoptError: Another rank has ended, or what the command raises.
        """
        rank = launched()
        self._silent = rank is not None and rank.rank > 0
        launcher, count = self._given.get("launcher"), self._given.get("ranks")
        if rank is None and STARTED not in os.environ and (launcher or count):
            from graphopt.cli.launch import launch

            raise typer.Exit(launch(launcher, count, str(self._given.get("device", "auto"))))
        if rank is None:
            work()
            return
        if self._command not in SEVERAL:
            raise UsageError(
                f"This command runs in one process, and this is one of {rank.world} ranks.",
                f"Several ranks share graphopt {' and graphopt '.join(SEVERAL.values())}.",
            )
        if (launcher or count) and STARTED not in os.environ:
            option = "--launcher" if launcher else "--ranks"
            raise UsageError(
                f"This is rank {rank.rank} of {rank.world} already, as RANK and WORLD_SIZE of the "
                f"environment say, and {option} starts ranks.",
                f"Leave torchrun or {option} out.",
            )
        # What the store says at a rank's end, with its C++ stack, is said in a sentence here.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from graphopt.support import ranks

        self._ranks = ranks.join(str(self._given.get("device", "auto")))
        with contextlib.ExitStack() as stack:
            if self._silent:
                nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nothing))
                stack.enter_context(contextlib.redirect_stderr(nothing))
            work()
        ranks.leave()

    def tell(self, message: str, end: typer.Exit) -> None:
        """Tell the other ranks that the command ends here, which the user was told already."""
        if self._ranks is not None:
            self._ranks.speaks(message, "", end.exit_code)

    def say_error(self, message: str, remedy: str, code: int) -> None:
        """Tell why the command ends, to the other ranks too."""
        if self._ranks is None:
            speaks = not self._silent
        else:
            speaks = self._ranks.speaks(message, remedy, code)
        if speaks:
            ui.say_error(message, remedy)

    def close(self) -> None:
        """Be one process again, where a command ended by an error."""
        if self._ranks is not None:
            from graphopt.support.ranks import quit_ranks

            quit_ranks()
