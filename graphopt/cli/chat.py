"""A chat in the terminal."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from graphopt.cli import console as ui
from graphopt.cli import keyboard
from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.generate import Conversation

_COMMANDS = "/reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C ends an answer."
_COMMAND = re.compile(r"/[a-z]*")
"""What looks like a command; a path has more slashes, a sentence has blanks."""


def chat(conversation: Conversation) -> None:
    """Answer what is typed, line by line, until the user leaves."""
    if not conversation.has_turns:
        ui.say_note("No chat template: each line is continued by itself, as plain text.")
    ui.say_note(_COMMANDS)
    while True:
        try:
            line = keyboard.ask("> ").strip()
        except EOFError:
            ui.write_piece("\n")
            return
        except KeyboardInterrupt:
            ui.write_piece("\n")
            ui.say_note(_COMMANDS)
            continue
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            ui.say_note("What was said is forgotten.")
        elif _COMMAND.fullmatch(line):
            ui.say_note(_COMMANDS)
        elif line:
            _answer(conversation, line)


def _answer(conversation: Conversation, prompt: str) -> None:
    """Print an answer; what is wrong with the prompt is said, and the chat goes on."""
    with _interrupts() as interrupted:
        try:
            for piece in conversation.answer(prompt, interrupted):
                ui.write_piece(piece)
        except KeyboardInterrupt:
            pass
        except GraphoptError as error:
            ui.say_error(error.message, error.remedy)
            return
        ui.write_piece("\n")
        if interrupted():
            ui.say_note("(ended by Ctrl-C)")


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Give a question whether Ctrl-C was pressed; a second press interrupts what runs.

    The first one lets a step end, behind which the KV cache holds what was read.
    """
    presses = 0

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
