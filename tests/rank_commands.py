"""Commands run by one of several ranks, in a process that the ranks' helper started."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

FAILING_PASS = '''
"""A pass of a user that fails on one rank while the other waits for it."""

import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphopt.errors import PassError
from graphopt.pass_manager.contract import Pass, PassResult, register_pass


@register_pass
@dataclass
class Fail(Pass):
    """Fail.

    Options:
        how: By an error, a bug, a signal, or not at all.
        rank: Which rank does.
    """

    name: ClassVar[str] = "fail"
    reads_weights: ClassVar[bool] = True
    how: Literal["error", "kill", "hang", "interrupt"] = "error"
    rank: int = 1

    def run(self, program, context):
        from graphopt.support.ranks import here

        if here().rank == self.rank:
            if self.how == "error":
                raise PassError("The lamp is out.", "Light it.")
            if self.how == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGINT)
            time.sleep(1)
        here().totals(1.0)
        return PassResult(program)
'''
"""The text of a file for --plugin."""


@dataclass(frozen=True)
class Said:
    """The end of a command: its exit code, and what it wrote."""

    code: int
    stdout: str
    stderr: str


def succeeding(rank: int, arguments: list[str]) -> Said:
    """Run a command that is to succeed; a rank counts as ended after four seconds of silence.

    Raises:
        AssertionError: It failed, with what it said.
    """
    from graphopt.support import rank_watch

    rank_watch.SILENT = 4.0
    said = command(rank, arguments)
    assert said.code == 0, said.stderr
    return said


def tool(rank: int, name: str, arguments: list[str]) -> None:
    """Run one of the repository's tools as one of several ranks."""
    path = Path(__file__).resolve().parent.parent / "tools" / f"{name}.py"
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def command(rank: int, arguments: list[str]) -> Said:
    """Run `graphopt ARGUMENTS` as one of several ranks."""
    from graphopt.cli.commands import app

    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = ["graphopt", *arguments]
            app(arguments, prog_name="graphopt")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Said(code, out.getvalue(), err.getvalue())
